"""Adversarial accuracy against radius (paper Sec. 7, Figure 1), and claims that stand up.

`adversarial_accuracy` is the paper's curve, each radius attacked apart. `evaluate` is a claim with
its evidence: each example's worst case over a suite of attacks, the images that prove it, and the
checks of `se_vae.checks`. Both take any JAX callable.
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

from se_vae.attacks import losses
from se_vae.attacks.losses import Model
from se_vae.attacks.projections import Norm
from se_vae.config import SUITES
from se_vae.evaluation import attack_suite, check_evidence
from se_vae.evaluation.attack_log import Ledger
from se_vae.evaluation.batched_attacks import Problem, attempt, forward, pose, survivors
from se_vae.evaluation.metrics import AdversarialAccuracy
from se_vae.evaluation.sanity_checks import Check

# Seconds between two copies of the ledger on disk.
_SAVE_EVERY = 10.0


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
  progress: Callable[[int, int], Any] = lambda done, total: None,
) -> AdversarialAccuracy:
  """The paper's PGD at every radius apart, whatever it breaks at another.

  Example:
    >>> def above_half(x):  # one pixel, two classes
    ...   return jnp.stack([0.5 - x[:, 0], x[:, 0] - 0.5], axis=1)
    >>> x, labels = np.array([[0.2], [0.45]], np.float32), np.array([0, 0])
    >>> radii = (0.0, 0.1, 0.4)
    >>> adversarial_accuracy(above_half, jax.random.key(0), x, labels, radii=radii).accuracy
    array([1. , 0.5, 0. ])

  An example survives a radius if it survives all restarts there. Radius 0 is the clean accuracy.
  The result does not depend on the batch size or on the number of devices, beyond rounding.

  Args:
    logits_fn: as for `evaluate`, as are the others.
    key: one PRNG key.
    x: images.
    labels: their classes, which may be one.
    radii: radii >= 0.
    num_steps: PGD steps.
    restarts: tries at each radius.
    relative_step_size: step size as a share of the radius.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    batch_size: examples attacked at a time.
    args: further arguments of `logits_fn`.
    mesh: devices.
    progress: called after each batch with the number of finished radii and of all.

  Raises:
    ValueError: for input that makes no sense, or clean logits that are not finite.
  """
  counts = {'num_steps': num_steps, 'restarts': restarts, 'batch_size': batch_size}
  problem, _ = pose(
    logits_fn,
    key,
    x,
    labels,
    radii=radii,
    counts=counts,
    norm=norm,
    bounds=bounds,
    args=args,
    mesh=mesh,
  )
  table = attack_suite.standard(
    logits_fn, num_steps=num_steps, restarts=restarts, step_share=relative_step_size
  )
  correct = np.zeros((len(radii), len(x)), bool)
  for i, radius in enumerate(radii):
    problem = dataclasses.replace(problem, on_batch=functools.partial(progress, i, len(radii)))
    correct[i, survivors(problem, table, float(radius), np.arange(len(x)))] = True
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
    attack: 'standard' (the paper's PGD) or 'worst_case' (everything in `attack_suite.worst_case`).
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
  problem, logits = pose(
    logits_fn,
    jax.random.key(seed),
    x,
    labels,
    radii=radii,
    counts=counts,
    norm=norm,
    bounds=bounds,
    args=args,
    mesh=mesh,
  )
  x, labels = problem.x, problem.labels
  _check_claim(problem, radii, attack, check_examples)
  latents = x.reshape(len(x), -1) if latents_fn is None else forward(problem, latents_fn, x)
  if not np.isfinite(latents).all():
    raise ValueError('the representations of clean images are not finite')
  settings: dict[str, Any] = {
    'num_steps': num_steps,
    'restarts': restarts,
    'step_share': relative_step_size,
  }
  if attack == 'standard':
    table = attack_suite.standard(logits_fn, **settings)
  else:
    table = attack_suite.worst_case(
      logits_fn,
      latents_fn,
      classes=len(np.unique(labels)),
      num_classes=problem.num_classes,
      norm=norm,
      num_queries=num_queries,
      **settings,
    )
  if any(row.target for row in table):
    problem = dataclasses.replace(problem, aims=attack_suite.find_aims(x, labels, latents, bounds))
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
  checks = check_evidence.audit(
    dataclasses.replace(problem, on_batch=functools.partial(progress, ledger.done, ledger.done)),
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
  table: tuple[attack_suite.Attack, ...],
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
    wrong = ~np.asarray(losses.is_correct(jnp.asarray(logits), jnp.asarray(problem.labels)))
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
      if len(rows):
        report = functools.partial(progress, ledger.done, len(tries))
        images, correct = attempt(
          dataclasses.replace(problem, on_batch=report), attack, radius, restart, rows
        )
        broken, images = rows[~correct], images[~correct]
        ledger.forwards[rows] += attack.forwards
        ledger.gradients[rows] += attack.gradients
        ledger.record(broken, images, radius=radius, attack=number, restart=restart)
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


def _check_claim(
  problem: Problem, radii: Sequence[float], attack: str, check_examples: int
) -> None:
  """What `evaluate` asks for on top of `pose`."""
  if check_examples < 0:
    raise ValueError(f'check_examples must be >= 0, got {check_examples}')
  if attack not in SUITES:
    raise ValueError(f'attack must be one of {", ".join(SUITES)}, got {attack!r}')
  largest = problem.bounds[1] - problem.bounds[0]
  if problem.norm == 'l2':
    largest *= float(np.sqrt(problem.x[0].size))
  if max(radii) > largest:
    raise ValueError(f'radii must be at most the pixel range {largest:g}, got {max(radii)}')
  if len(np.unique(problem.labels)) < 2:
    raise ValueError('the labels are all of one class: a constant would be robust')
