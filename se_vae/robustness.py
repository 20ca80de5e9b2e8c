"""Adversarial accuracy against radius, under PGD on the probe's loss (paper Sec. 7, Figure 1)."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from se_vae import attacks, sharding

LogitsFn = Callable[..., jax.Array]


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
  """The objective of the attack: the classifier's cross-entropy, in nats, per example."""

  logits_fn: LogitsFn

  def __call__(self, x_adv: jax.Array, labels: jax.Array, *args: Any) -> jax.Array:
    """`[B]`."""
    logits = self.logits_fn(x_adv, *args)
    return optax.softmax_cross_entropy_with_integer_labels(logits, labels)


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
  logits_fn: LogitsFn,
  key: jax.Array,
  x: jax.Array,
  labels: jax.Array,
  index: jax.Array,
  radius: jax.Array,
  step_size: jax.Array,
  args: tuple[Any, ...],
  *,
  num_steps: int,
  norm: attacks.Norm,
  bounds: tuple[float, float],
) -> tuple[jax.Array, jax.Array]:
  """Whether each example is still classified correctly after one attack, and its logits finite.

  Both bool `[B]`. An example whose logits are not finite is not classified correctly: the largest
  of a row of NaN would be class 0.
  """
  x_adv = attacks.pgd(
    CrossEntropy(logits_fn),
    key,
    x,
    radius=radius,
    num_steps=num_steps,
    step_size=step_size,
    norm=norm,
    bounds=bounds,
    keep_best=True,
    args=(labels, *args),
    index=index,
  )
  logits = logits_fn(x_adv, *args)
  finite = jnp.isfinite(logits).all(axis=-1)
  return finite & (jnp.argmax(logits, axis=-1) == labels), finite


def adversarial_accuracy(
  logits_fn: LogitsFn,
  key: jax.Array,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  num_steps: int = 40,
  restarts: int = 1,
  relative_step_size: float | None = None,
  norm: attacks.Norm = 'linf',
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


def _check(
  logits_fn: LogitsFn,
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
  if not (x.min() >= bounds[0] and x.max() <= bounds[1]):
    raise ValueError(f'images must lie in {bounds}, got [{x.min()}, {x.max()}]')
  logits = jax.eval_shape(logits_fn, x[:1], *args)
  if logits.ndim != 2 or logits.shape[0] != 1 or logits.shape[1] < 2:
    raise ValueError(f'logits_fn must give [B, K] with K >= 2, got {logits.shape} for one image')
  num_classes = logits.shape[1]
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ValueError(f'labels must lie in [0, {num_classes}), got [{labels.min()}, {labels.max()}]')
