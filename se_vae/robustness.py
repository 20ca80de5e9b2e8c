"""Adversarial accuracy against radius (paper Sec. 7, Figure 1), and claims that stand up.

`adversarial_accuracy` is the paper's curve, each radius attacked apart. `evaluate` is a claim with
its evidence: each example's worst case over a suite of attacks, the images that prove it, and the
checks of `se_vae.checks`. It takes any JAX callable.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae import attacks, audit, classification, sharding, suite
from se_vae.balls import Norm
from se_vae.checks import Check
from se_vae.classification import Aim, Joint, LatentMove, Model
from se_vae.gaussians import DiagonalGaussian
from se_vae.ledger import Ledger
from se_vae.problem import Problem, attempt, forward
from se_vae.vae import VAE, Params

# Seconds between two copies of the ledger on disk.
_SAVE_EVERY = 10.0


@dataclasses.dataclass(frozen=True)
class AdversarialAccuracy:
  """Which examples survive at which radius.

  Attributes:
    radii: `[R]`.
    correct: bool `[R, N]`: example n is classified correctly by every attempt at radius r.
  """

  radii: np.ndarray
  correct: np.ndarray

  @property
  def accuracy(self) -> np.ndarray:
    """Adversarial accuracy at each radius, `[R]`."""
    return self.correct.mean(axis=1)

  def interval(self, confidence: float = 0.95) -> np.ndarray:
    """Wilson score interval of each accuracy, `[R, 2]`."""
    from scipy.stats import binomtest

    count = self.correct.shape[1]
    intervals = [
      binomtest(int(row.sum()), count).proportion_ci(confidence, method='wilson')
      for row in self.correct
    ]
    return np.array([(interval.low, interval.high) for interval in intervals])


@functools.partial(jax.jit, static_argnames=('logits_fn', 'num_steps', 'norm', 'bounds'))
def _survives(
  logits_fn: Model,
  key: jax.Array,
  x: jax.Array,
  labels: jax.Array,
  index: jax.Array,
  radius: jax.Array,
  step_size: jax.Array,
  args: tuple[Any, ...],
  *,
  num_steps: int,
  norm: Norm,
  bounds: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
  """Whether each example is still classified correctly after one attack, and its logits finite.

  Both bool `[B]`. An example whose logits are not finite is not classified correctly: the largest
  of a row of NaN would be class 0.
  """
  x_adv = attacks.pgd(
    classification.CrossEntropy(logits_fn),
    key,
    x,
    radius=radius,
    num_steps=num_steps,
    step_size=step_size,
    norm=norm,
    bounds=bounds,
    keep_best=True,
    args=(Aim(labels), *args),
    index=index,
  )
  logits = logits_fn(x_adv, *args)
  return classification.is_correct(logits, labels), jnp.isfinite(logits).all(axis=-1)


def adversarial_accuracy(
  logits_fn: Model,
  key: jax.Array,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  num_steps: int = 40,
  restarts: int = 1,
  relative_step_size: float | None = None,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  batch_size: int = 200,
  args: tuple[Any, ...] = (),
  mesh: Mesh | None = None,
  progress: Callable[[int], Any] = lambda examples: None,
) -> AdversarialAccuracy:
  """Attacks a classifier at every radius, and counts who survives.

  Each radius and restart is a separate PGD attack from its own random start; an example survives a
  radius if it survives all restarts there. Radius 0 is the clean accuracy. The result does not
  depend on the batch size or on the number of devices, beyond rounding.

  Args:
    logits_fn: images `[B, ...]` (and `args`) to logits `[B, K]`; hashable, compiled once.
    key: one PRNG key.
    x: images `[N, ...]`, float, inside `bounds`.
    labels: `[N]` integers in [0, K).
    radii: radii >= 0, traced: one compilation serves them all.
    num_steps: PGD steps.
    restarts: attacks for each radius.
    relative_step_size: step size as a share of the radius; `attacks.pgd`'s rule if None.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    batch_size: examples attacked at a time.
    args: further arguments of `logits_fn`, such as parameters.
    mesh: devices to spread a batch over; all of them if None.
    progress: called with the number of attacked examples after each batch.

  Raises:
    ValueError: for no examples, labels that do not fit, negative radii, counts < 1, images outside
      `bounds`, logits that are not `[B, K]` with K >= 2, or clean logits (radius 0) that are not
      finite.
  """
  counts = {'num_steps': num_steps, 'restarts': restarts, 'batch_size': batch_size}
  _check(logits_fn, args, x, labels, radii, counts, bounds)
  mesh = sharding.data_mesh() if mesh is None else mesh
  batch_size = -(-min(batch_size, len(x)) // mesh.size) * mesh.size
  args = sharding.replicate(mesh, args)
  correct = np.ones((len(radii), len(x)), bool)
  relative_step_size = 2.5 / num_steps if relative_step_size is None else relative_step_size
  for start in range(0, len(x), batch_size):
    # The last batch wraps around, so that every batch has the same shape: one compilation.
    index = np.arange(start, start + batch_size)
    rows = index % len(x)
    batch = sharding.split(mesh, (x[rows], labels[rows].astype(np.int32), rows.astype(np.int32)))
    stop = min(start + batch_size, len(x))
    for i, radius in enumerate(radii):
      for restart in range(restarts if radius > 0.0 else 1):
        survives, finite = _survives(
          logits_fn,
          jax.random.fold_in(jax.random.fold_in(key, i), restart),
          *batch,
          jnp.float32(radius),
          jnp.float32(radius * relative_step_size),
          args,
          num_steps=num_steps,
          norm=norm,
          bounds=bounds,
        )
        if radius == 0.0 and not np.asarray(finite).all():
          raise ValueError('the logits of clean images are not finite: the classifier has diverged')
        correct[i, start:stop] &= np.asarray(survives)[: stop - start]
    progress(stop - start)
  return AdversarialAccuracy(np.asarray(radii, np.float64), correct)


@dataclasses.dataclass(frozen=True)
class Evaluation:
  """A claim and its evidence.

  Attributes:
    curve: accuracy at each radius, in the order asked for.
    ledger: what broke each example, when, with which image, at what cost.
    checks: in order; none if none were asked for.
    config: everything that the numbers depend on, as JSON values.
  """

  curve: AdversarialAccuracy
  ledger: Ledger
  checks: tuple[Check, ...]
  config: dict[str, Any]

  @property
  def passed(self) -> bool:
    """Whether every check passed."""
    return all(check.passed for check in self.checks)


def evaluate(
  logits_fn: Model,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  attack: str = 'standard',
  num_steps: int = 40,
  restarts: int = 1,
  num_queries: int = 1000,
  relative_step_size: float | None = None,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  seed: int = 0,
  batch_size: int = 200,
  args: tuple[Any, ...] = (),
  latents_fn: Model | None = None,
  reconstruct_fn: Model | None = None,
  surrogate: tuple[Model, tuple[Any, ...]] | None = None,
  check_examples: int = 500,
  mesh: Mesh | None = None,
  state_path: str | Path | None = None,
  progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Evaluation:
  """Attacks a classifier as hard as it can, and says whether to believe the result.

  Radii are attacked from the smallest up. An example that is broken, by an earlier attack or at a
  smaller radius, is not attacked again: what is left is compacted into batches of one shape, so
  that every attack is compiled once. The result depends neither on the batch size nor on the
  number of devices, beyond rounding.

  Example:
    >>> x = np.float32([[[0.9], [0.9]], [[0.1], [0.1]]])
    >>> fn = lambda x: jnp.stack([x.sum(axis=(1, 2)) - 1.0, jnp.zeros(x.shape[0])], axis=1)
    >>> result = evaluate(fn, x, np.array([0, 1]), radii=(0.0, 0.3, 0.5), batch_size=2)
    >>> print(result.curve.accuracy, result.checks[0].passed)
    [1. 1. 0.] True

  Args:
    logits_fn: images `[B, ...]` (and `args`) to logits `[B, K]`; hashable, compiled once for each
      attack.
    x: images `[N, ...]`, float, inside `bounds`.
    labels: `[N]` integers in [0, K), of at least two classes.
    radii: radii >= 0, in any order, none beyond the pixel range.
    attack: 'standard' (the paper's PGD) or 'worst_case' (everything in `suite.worst_case`).
    num_steps: gradient steps of each try.
    restarts: tries of each untargeted attack.
    num_queries: queries of Square, in the suite and in the checks.
    relative_step_size: PGD's step size as a share of the radius; `attacks.pgd`'s rule if None.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    seed: of every random draw.
    batch_size: examples attacked at a time.
    args: further arguments of all functions given, such as parameters.
    latents_fn: images (and `args`) to representations `[B, E]`, for the attacks that aim there.
    reconstruct_fn: images (and `args`) to their reconstructions, for check 12.
    surrogate: another classifier and its arguments, whose adversarial examples check 8 tries here.
    check_examples: how many of the first examples the checks attack again; 0 for no checks.
    mesh: devices to spread a batch over; all of them if None.
    state_path: npz file that keeps the ledger, to go on from after an interruption.
    progress: called after each batch with the number of finished tries and of all.

  Returns:
    The curve, the ledger and the checks.

  Raises:
    ValueError: for input that makes no sense, clean logits that are not finite, or a state that
      belongs to another evaluation.
  """
  counts = {
    'num_steps': num_steps,
    'restarts': restarts,
    'num_queries': num_queries,
    'batch_size': batch_size,
  }
  if check_examples < 0:
    raise ValueError(f'check_examples must be >= 0, got {check_examples}')
  x, labels = np.asarray(x), np.asarray(labels)
  if not np.issubdtype(x.dtype, np.floating) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f'x must be float and labels integer, got {x.dtype} and {labels.dtype}')
  x = x.astype(np.float32)
  _check(logits_fn, args, x, labels, radii, counts, bounds)
  _check_claim(x, labels, radii, attack, norm, bounds)
  mesh = sharding.data_mesh() if mesh is None else mesh
  problem = Problem(
    logits_fn=logits_fn,
    args=sharding.replicate(mesh, args),
    x=x,
    labels=labels.astype(np.int32),
    key=jax.random.key(seed),
    num_classes=jax.eval_shape(logits_fn, x[:1], *args).shape[1],
    norm=norm,
    bounds=bounds,
    batch_size=-(-min(batch_size, len(x)) // mesh.size) * mesh.size,
    mesh=mesh,
  )
  logits = forward(problem, logits_fn, x)
  if not np.isfinite(logits).all():
    raise ValueError('the logits of clean images are not finite: the classifier has diverged')
  latents = x.reshape(len(x), -1) if latents_fn is None else forward(problem, latents_fn, x)
  if not np.isfinite(latents).all():
    raise ValueError('the representations of clean images are not finite')
  problem = dataclasses.replace(problem, aims=suite.find_aims(x, problem.labels, latents, bounds))
  settings: dict[str, Any] = {
    'num_steps': num_steps,
    'restarts': restarts,
    'step_share': relative_step_size,
  }
  if attack == 'standard':
    table = suite.standard(logits_fn, **settings)
  else:
    table = suite.worst_case(
      logits_fn,
      latents_fn,
      classes=len(np.unique(labels)),
      num_classes=problem.num_classes,
      norm=norm,
      num_queries=num_queries,
      **settings,
    )
  config = {
    'attack': attack,
    'attacks': {row.name: {'steps': row.num_steps, 'tries': row.tries} for row in table},
    'relative_step_size': relative_step_size,
    'norm': norm,
    'bounds': list(bounds),
    'seed': seed,
    'radii': sorted({0.0, *map(float, radii)}),
  }
  ledger = _attack_all(
    problem, table, logits, config, None if state_path is None else Path(state_path), progress
  )
  radii_asked = np.asarray(radii, np.float64)
  curve = AdversarialAccuracy(radii_asked, ledger.survives(radii_asked))
  if not check_examples:
    return Evaluation(curve, ledger, (), config)
  checks = audit.audit(
    problem,
    table,
    ledger,
    curve.accuracy,
    curve.interval(),
    radii_asked,
    config,
    count=min(check_examples, len(x)),
    num_steps=num_steps,
    num_queries=num_queries,
    representation=logits if latents_fn is None else latents,
    reconstruct_fn=reconstruct_fn,
    surrogate=surrogate,
  )
  return Evaluation(curve, ledger, checks, config)


def _attack_all(
  problem: Problem,
  table: tuple[suite.Attack, ...],
  logits: np.ndarray,
  config: dict[str, Any],
  state_path: Path | None,
  progress: Callable[[int, int], Any],
) -> Ledger:
  """Every try of every attack at every radius, on the examples that are left; resumable."""
  fingerprint = _fingerprint(problem, config)
  if state_path is not None and state_path.exists():
    ledger = Ledger.load(state_path, fingerprint)
  else:
    ledger = Ledger.empty(('clean', *(attack.name for attack in table)), problem.x)
    wrong = ~np.asarray(classification.is_correct(jnp.asarray(logits), jnp.asarray(problem.labels)))
    ledger.record(np.flatnonzero(wrong), problem.x[wrong], radius=0.0, attack=0, restart=0)
    ledger.forwards += 1
  tries = [
    (radius, number, attack, restart)
    for radius in config['radii']
    if radius > 0.0
    for number, attack in enumerate(table, start=1)
    for restart in range(attack.tries)
  ]
  saved = time.monotonic()
  try:
    for radius, number, attack, restart in tries[ledger.done :]:
      rows = np.flatnonzero(np.isinf(ledger.radius))
      report = functools.partial(progress, ledger.done, len(tries))
      images, correct = attempt(problem, attack, radius, restart, rows, report)
      ledger.forwards[rows] += attack.forwards
      ledger.gradients[rows] += attack.gradients
      ledger.record(rows[~correct], images[~correct], radius=radius, attack=number, restart=restart)
      ledger.done += 1
      if state_path is not None and time.monotonic() - saved > _SAVE_EVERY:
        ledger.save(state_path, fingerprint)
        saved = time.monotonic()
  finally:
    if state_path is not None:
      ledger.save(state_path, fingerprint)
  progress(len(tries), len(tries))
  return ledger


def _fingerprint(problem: Problem, config: dict[str, Any]) -> str:
  """Of everything that the ledger depends on but the functions themselves."""
  digest = hashlib.sha256(repr(sorted(config.items())).encode())
  for leaf in (problem.x, problem.labels, *jax.tree.leaves(problem.args)):
    digest.update(np.ascontiguousarray(leaf).tobytes())
  return digest.hexdigest()


def largest_values(
  objective: Model,
  x: np.ndarray,
  aim: Aim,
  *,
  radii: Sequence[float],
  num_steps: int = 40,
  restarts: int = 1,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  seed: int = 0,
  batch_size: int = 200,
  args: tuple[Any, ...] = (),
  mesh: Mesh | None = None,
) -> np.ndarray:
  """The largest value of an objective that `apgd` finds within each radius of each example.

  Args:
    objective: `(x_adv, aim, *args) -> [B]`.
    x: images `[N, ...]`.
    aim: of all examples.
    radii: radii >= 0.
    num_steps: as for `evaluate`, as are the others.
    restarts: tries at each radius.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    seed: of the random starts.
    batch_size: examples at a time.
    args: further arguments of the objective.
    mesh: devices.

  Returns:
    `[R, N]`: what is within a smaller radius counts at a larger one too.

  Raises:
    ValueError: for bad radii, images outside the bounds, or no examples.
  """
  if len(x) == 0 or not (x.min() >= bounds[0] and x.max() <= bounds[1]):
    raise ValueError(f'needs images in {bounds}, got {len(x)} of them')
  if not len(radii) or min(radii) < 0.0 or not np.isfinite(radii).all():
    raise ValueError(f'radii must be finite and >= 0, got {list(radii)}')
  mesh = sharding.data_mesh() if mesh is None else mesh
  batch_size = -(-min(batch_size, len(x)) // mesh.size) * mesh.size
  args = sharding.replicate(mesh, args)
  row = suite.Attack('largest', 'apgd', objective, num_steps=num_steps, tries=restarts)
  order = sorted({0.0, *map(float, radii)})
  found = np.full((len(order), len(x)), -np.inf)
  for start in range(0, len(x), batch_size):
    rows = np.arange(start, start + batch_size) % len(x)
    everything = (x, aim, np.arange(len(x), dtype=np.int32))
    batch = jax.tree.map(functools.partial(_rows, rows=rows), everything)
    x_batch, aim_batch, index = sharding.split(mesh, batch)
    stop = min(start + batch_size, len(x))
    for i, radius in enumerate(order):
      for restart in range(restarts if radius else 1):
        key = suite.try_key(jax.random.key(seed), row, radius, restart)
        x_adv = suite.run(
          row, key, x_batch, aim_batch, index, jnp.float32(radius), args, norm=norm, bounds=bounds
        )
        values = np.asarray(_values(objective, x_adv, aim_batch, args))[: stop - start]
        # A value that is not a number is as bad as can be.
        values = np.where(np.isnan(values), np.inf, values)
        found[i, start:stop] = np.maximum(found[i, start:stop], values)
  found = np.maximum.accumulate(found, axis=0)
  return found[[order.index(float(radius)) for radius in radii]]


def _rows(leaf: Any, rows: np.ndarray) -> np.ndarray:
  return np.asarray(leaf)[rows]


@functools.partial(jax.jit, static_argnames='objective')
def _values(objective: Model, x_adv: jax.Array, aim: Aim, args: tuple[Any, ...]) -> jax.Array:
  return objective(x_adv, aim, *args)


def joint_accuracy(
  logits_fns: Sequence[Model],
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  args: Sequence[tuple[Any, ...]],
  **options: Any,
) -> AdversarialAccuracy:
  """Share of examples for which no one image within the radius breaks all classifiers at once.

  Args:
    logits_fns: T classifiers of the same images.
    x: images `[N, ...]`.
    labels: `[N, T]`.
    radii: radii >= 0.
    args: further arguments of each classifier.
    **options: as for `largest_values`.

  Raises:
    ValueError: if the numbers of classifiers, labels and arguments differ; as `largest_values`.
  """
  if labels.shape != (len(x), len(logits_fns)) or len(args) != len(logits_fns):
    raise ValueError(
      f'{len(logits_fns)} classifiers need labels [N, {len(logits_fns)}] and as many args, got '
      f'{labels.shape} and {len(args)}'
    )
  objective, aim = Joint(tuple(logits_fns)), Aim(labels.astype(np.int32))
  margins = largest_values(objective, x, aim, radii=radii, args=tuple(args), **options)
  return AdversarialAccuracy(np.asarray(radii, np.float64), margins <= 0.0)


def representation_moves(
  latents_fn: Model,
  x: np.ndarray,
  *,
  radii: Sequence[float],
  args: tuple[Any, ...] = (),
  **options: Any,
) -> np.ndarray:
  """The furthest that a representation can be moved, without labels: `[R, N]`, squared.

  With `GaussianLatents` it is the largest squared W2 of encodings, the quantity that SE training
  keeps small.

  Args:
    latents_fn: images (and `args`) to representations `[B, E]`.
    x: images `[N, ...]`.
    radii: radii >= 0.
    args: further arguments of `latents_fn`.
    **options: as for `largest_values`.
  """
  latents = np.concatenate(
    [np.asarray(latents_fn(jnp.asarray(x[i : i + 500]), *args)) for i in range(0, len(x), 500)]
  )
  aim = Aim(np.zeros(len(x), np.int32), latent=latents)
  return largest_values(LatentMove(latents_fn), x, aim, radii=radii, args=args, **options)


@dataclasses.dataclass(frozen=True)
class GaussianLatents:
  """Means and standard deviations of an encoder, side by side: Euclid's distance is W2 (Eq. 12).

  Full covariances have no such coordinates: their means alone, a lower bound of W2.
  """

  model: VAE

  def __call__(self, x: jax.Array, params: Params, *_: Any) -> jax.Array:
    """Images `[B, H, W, C]` to `[B, 2 D]`, or `[B, D]`."""
    q = self.model.encode(params, x)
    if isinstance(q, DiagonalGaussian):
      return jnp.concatenate([q.mean, q.stddev], axis=-1)
    return q.mean


@dataclasses.dataclass(frozen=True)
class Reconstruction:
  """Images, through the encoder's mean and the decoder, to images."""

  model: VAE

  def __call__(self, x: jax.Array, params: Params, *_: Any) -> jax.Array:
    """`[B, H, W, C]` to `[B, H, W, C]`."""
    return self.model.decode(params, self.model.encode(params, x).mean)


def _check_claim(
  x: np.ndarray,
  labels: np.ndarray,
  radii: Sequence[float],
  attack: str,
  norm: str,
  bounds: tuple[float, float],
) -> None:
  """What `evaluate` asks for on top of `_check`."""
  if attack not in suite.SUITES:
    raise ValueError(f'attack must be one of {", ".join(suite.SUITES)}, got {attack!r}')
  if norm not in attacks.NORMS:
    raise ValueError(f'norm must be one of {", ".join(attacks.NORMS)}, got {norm!r}')
  largest = (bounds[1] - bounds[0]) * (np.sqrt(x[0].size) if norm == 'l2' else 1.0)
  if max(radii) > largest:
    raise ValueError(f'radii must be at most the pixel range {largest:g}, got {max(radii)}')
  if len(np.unique(labels)) < 2:
    raise ValueError('the labels are all of one class: a constant would be robust')


def _check(
  logits_fn: Model,
  args: tuple[Any, ...],
  x: np.ndarray,
  labels: np.ndarray,
  radii: Sequence[float],
  counts: dict[str, int],
  bounds: tuple[float, float],
) -> None:
  if len(x) == 0 or labels.shape != x.shape[:1]:
    raise ValueError(
      f'x [N, ...] and labels [N] must fit, with N >= 1, got {x.shape}, {labels.shape}'
    )
  if not len(radii) or min(radii) < 0.0 or not np.isfinite(radii).all():
    raise ValueError(f'radii must be finite and >= 0, got {list(radii)}')
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f'{name} must be >= 1, got {count}')
  if not (x.min() >= bounds[0] and x.max() <= bounds[1]):  # NaN is outside too
    raise ValueError(f'images must lie in {bounds}, got [{x.min()}, {x.max()}]')
  logits = jax.eval_shape(logits_fn, x[:1], *args)
  if logits.ndim != 2 or logits.shape[0] != 1 or logits.shape[1] < 2:
    raise ValueError(f'logits_fn must give [B, K] with K >= 2, got {logits.shape} for one image')
  num_classes = logits.shape[1]
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(f'labels must lie in [0, {num_classes}), got [{labels.min()}, {labels.max()}]')
