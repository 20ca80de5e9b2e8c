"""A classifier with the examples that it is attacked on, in batches of one shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae import seeds
from se_vae.attacks import projections
from se_vae.attacks.losses import Aim, Model, is_correct
from se_vae.attacks.projections import Norm
from se_vae.config import ArgumentError, check_counts
from se_vae.evaluation import attack_suite
from se_vae.evaluation.attack_suite import Attack
from se_vae.evaluation.states import ValueLog
from se_vae.evaluation.targets import Targets
from se_vae.parallel import sharding

# The number of images of noise on which functions are compared with those of a state.
_ELSEWHERE = 8

_HINT = '; se_vae.pixels makes floats of uint8 images'


@dataclasses.dataclass(frozen=True, eq=False)
class AttackedClassifier:
  """What stays the same through an evaluation; `prepare` makes it.

  Attributes:
    logits_fn: the classifier.
    args: its further arguments, replicated on all devices.
    x: images `[N, ...]`, float32.
    labels: `[N]`, int32.
    key: root of all random draws.
    num_classes: the number K of classes.
    norm: of the balls.
    bounds: lowest and highest pixel value.
    batch_size: examples at a time.
    mesh: the devices.
    targets: what targeted attacks aim at.
    on_batch: called after each batch; may raise to stop.
    log: stores the results of `robust`; stored results are not computed again.
  """

  logits_fn: Model
  args: tuple[Any, ...]
  x: np.ndarray
  labels: np.ndarray
  key: jax.Array
  num_classes: int
  norm: Norm
  bounds: tuple[float, float]
  batch_size: int
  mesh: Mesh
  targets: Targets
  on_batch: Callable[[], Any] = lambda: None
  log: ValueLog = dataclasses.field(default_factory=ValueLog)

  @property
  def diameter(self) -> float:
    """The radius at which every image is in reach of every other."""
    span = self.bounds[1] - self.bounds[0]
    return float(span * np.sqrt(self.x[0].size)) if self.norm == 'l2' else span

  def attack(
    self, attack: Attack, radius: float, attempt: int, rows: np.ndarray
  ) -> tuple[np.ndarray, np.ndarray]:
    """Runs one attempt of an attack on the examples `rows`, at least one.

    Returns:
      The images `[len(rows), ...]`, and whether the classifier is right on each, bool.
    """
    found = []
    for results in self.attack_batches(attack, radius, attempt, rows):
      found.append(results)
      self.on_batch()
    images, correct = zip(*found, strict=True)
    return np.concatenate(images), np.concatenate(correct)

  def attack_batches(
    self, attack: Attack, radius: float, attempt: int, rows: np.ndarray
  ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Yields what `attack` returns, batch by batch. There may be no `rows`."""
    if len(rows):
      function, arrays = self._attempt(attack, radius, attempt, rows)
      yield from sharding.batches(self.mesh, function, arrays, self.batch_size)

  def _attempt(
    self, attack: Attack, radius: float, attempt: int, rows: np.ndarray
  ) -> tuple[Callable[[Any], tuple[jax.Array, jax.Array]], Any]:
    """A function of a batch that gives what `attack` returns, and the arrays to be cut."""
    aim = attack.aim(self.targets, rows, attempt)
    key = attack_suite.attempt_key(self.key, attack, radius, attempt)

    def attack_batch(batch: tuple[jax.Array, Aim, jax.Array]) -> tuple[jax.Array, jax.Array]:
      x, aim, index = batch
      norm, bounds = self.norm, self.bounds
      x_adv = attack_suite.run(
        attack, key, x, aim, index, jnp.float32(radius), self.args, norm=norm, bounds=bounds
      )
      logits = apply(self.logits_fn, x_adv, self.args)
      return x_adv, is_correct(logits, aim.labels)

    return attack_batch, (self.x[rows], aim, rows.astype(np.int32))

  def robust(self, attacks: Iterable[Attack], radius: float, rows: np.ndarray) -> np.ndarray:
    """Those of `rows` that the classifier gets right after every attempt of these attacks."""
    for attack in attacks:
      for attempt in range(attack.restarts):
        if len(rows):
          rows = rows[self._is_correct(attack, radius, attempt, rows)]
    return rows

  def _is_correct(
    self, attack: Attack, radius: float, attempt: int, rows: np.ndarray
  ) -> np.ndarray:
    """Whether the classifier is right on each of `rows` after an attempt, as `log` has it."""
    function, arrays = self._attempt(attack, radius, attempt, rows)
    correct = self.log.map_batches(
      self.mesh,
      lambda batch: function(batch)[1],
      arrays,
      self.batch_size,
      lambda done: self.on_batch() if done else None,
    )
    return correct > 0.0

  def apply(self, function: Model, images: np.ndarray) -> np.ndarray:
    """A function of images (and of `args`) on images `[N, ...]`: `[N, ...]`."""
    return self.in_batches(lambda x: apply(function, x, self.args), images)

  def outputs_elsewhere(self, *functions: Model) -> np.ndarray:
    """What functions give side by side on `noise`."""
    images = noise(self.x, self.bounds)
    return np.nan_to_num(np.hstack([self.apply(function, images) for function in functions]))

  def in_batches(self, function: Callable[[Any], Any], arrays: Any) -> Any:
    """`sharding.map_batches` with these batches and devices."""
    return sharding.map_batches(self.mesh, function, arrays, self.batch_size)


def prepare(
  logits_fn: Model,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  seed: int = 0,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  batch_size: int = 200,
  args: tuple[Any, ...] = (),
  mesh: Mesh | None = None,
  latents_fn: Model | None = None,
) -> tuple[AttackedClassifier, np.ndarray]:
  """Checks the arguments of an evaluation, which `robustness.evaluate` explains.

  Returns:
    The classifier with its examples, and the logits of the clean images `[N, K]`.

  Raises:
    ArgumentError: for arguments that contradict each other or are out of range, and for logits or
      representations of clean images that are not finite.
  """
  x, labels, bounds = np.asarray(x), np.asarray(labels), projections.as_bounds(bounds)
  if not jnp.issubdtype(x.dtype, jnp.floating) or not jnp.issubdtype(labels.dtype, jnp.integer):
    message = f'must be float and integer, got {x.dtype} and {labels.dtype}'
    raise ArgumentError(('x', 'labels'), message + _HINT * (x.dtype == np.uint8))
  if x.ndim < 2 or len(x) == 0 or labels.shape != x.shape[:1]:
    raise ArgumentError(
      ('x', 'labels'), f'must be [N, ...] and [N], with N >= 1, got {x.shape} and {labels.shape}'
    )
  check_radii(radii)
  check_counts(batch_size=batch_size)
  if norm not in projections.NORMS:
    raise ArgumentError('norm', f'must be one of {", ".join(projections.NORMS)}, got {norm!r}')
  x = x.astype(np.float32)
  check_images(x, bounds)
  _, num_classes = check_function('logits_fn', logits_fn, x, args, logits=True)
  if labels.min() < 0 or labels.max() >= num_classes:
    raise ArgumentError(
      'labels', f'must lie in [0, {num_classes}), got [{labels.min()}, {labels.max()}]'
    )
  if latents_fn is not None:
    check_function('latents_fn', latents_fn, x, args)
  mesh = sharding.data_mesh() if mesh is None else mesh
  classifier = AttackedClassifier(
    logits_fn=logits_fn,
    args=sharding.replicate(mesh, args),
    x=x,
    labels=labels.astype(np.int32),
    key=seeds.key_of(seed),
    num_classes=num_classes,
    norm=norm,
    bounds=bounds,
    batch_size=min(batch_size, len(x)),
    mesh=mesh,
    targets=Targets(x, labels, x, num_classes, bounds),
  )
  logits = classifier.apply(logits_fn, x)
  if not np.isfinite(logits).all():
    raise ArgumentError('logits_fn', 'must be finite on clean images: the classifier has diverged')
  if latents_fn is not None:
    latents = classifier.apply(latents_fn, x)
    if not np.isfinite(latents).all():
      raise ArgumentError('latents_fn', 'must be finite on clean images: the encoder has diverged')
    targets = dataclasses.replace(classifier.targets, latents=latents)
    classifier = dataclasses.replace(classifier, targets=targets)
  return classifier, logits


def noise(x: np.ndarray, bounds: tuple[float, float]) -> np.ndarray:
  """A few images of noise, float32 `[M, ...]`, M <= N, the same ones in every call.

  Functions that agree on the images x `[N, ...]` may differ there, as where one rounds its input.
  """
  shape = (min(_ELSEWHERE, len(x)), *x.shape[1:])
  return np.random.default_rng(0).uniform(*bounds, shape).astype(np.float32)


def check_radii(radii: Sequence[float], name: str = 'radii') -> None:
  """Raises ArgumentError, for the argument `name`, unless there are radii, all finite and >= 0."""
  found = np.asarray(radii)
  most = np.finfo(np.float32).max  # attacks compute in float32
  are_numbers = found.ndim == 1 and len(found) and found.dtype.kind in 'iuf'
  if not are_numbers or not ((found >= 0.0) & (found <= most)).all():
    raise ArgumentError(name, f'must be finite and >= 0, at least one in a list, got {radii}')


def check_function(
  name: str, function: Model, x: np.ndarray, args: tuple[Any, ...], *, logits: bool = False
) -> tuple[int, ...]:
  """The shape of what a function gives for two of the images x. It is traced, and not run.

  Raises:
    ArgumentError: unless it gives floats, a row for each image; or logits `[B, K]` if that is said.
  """
  two = jax.ShapeDtypeStruct((2, *x.shape[1:]), x.dtype)
  output = jax.eval_shape(function, two, *args)
  shape: tuple[int, ...] = getattr(output, 'shape', ())
  dtype = getattr(output, 'dtype', type(output))
  fits = len(shape) >= 2 and shape[0] == 2 and jnp.issubdtype(dtype, jnp.floating)
  if not fits or (logits and (len(shape) > 2 or shape[1] < 2)):
    wanted = '[B, K] with K >= 2' if logits else '[B, ...]'
    raise ArgumentError(name, f'must give floats {wanted}, got {dtype} {shape} for 2 images')
  return shape


def check_step_size(relative_step_size: float | None) -> None:
  """Raises ArgumentError unless it is None, or finite and > 0."""
  if relative_step_size is not None and not 0.0 < relative_step_size < np.inf:
    raise ArgumentError('relative_step_size', f'must be finite and > 0, got {relative_step_size}')


def check_images(x: np.ndarray, bounds: tuple[float, float]) -> None:
  """Raises ArgumentError unless there are images, all inside the bounds."""
  if not x.size or not (x.min() >= bounds[0] and x.max() <= bounds[1]):  # NaN is outside too
    found = f'[{x.min()}, {x.max()}]' if x.size else 'none'
    raise ArgumentError('x', f'must lie in {bounds}, got {found}')


@functools.partial(jax.jit, static_argnames='function')
def apply(function: Model, x: jax.Array, args: tuple[Any, ...]) -> jax.Array:
  """A function of images and `args`, compiled once for each function."""
  return function(x, *args)
