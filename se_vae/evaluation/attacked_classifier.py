"""A classifier and the examples to break it on: checked, and attacked in batches of one shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae.attacks import projections
from se_vae.attacks.losses import Aim, Model, is_correct
from se_vae.attacks.projections import Norm
from se_vae.evaluation import attack_suite
from se_vae.parallel import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Problem:
  """What stays the same through an evaluation.

  Attributes:
    logits_fn: the classifier.
    args: its further arguments, replicated.
    x: images `[N, ...]`, float32.
    labels: `[N]`, int32.
    key: of everything random.
    num_classes: K.
    norm: of the balls.
    bounds: lowest and highest pixel value.
    batch_size: examples at a time.
    mesh: the devices.
    aims: what the targeted attacks aim at; None where there are none.
    on_batch: called after each batch; may raise to stop.
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
  aims: attack_suite.Aims | None = None
  on_batch: Callable[[], Any] = lambda: None


def pose(
  logits_fn: Model,
  key: jax.Array,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  counts: Mapping[str, int],
  norm: Norm,
  bounds: tuple[float, float],
  args: tuple[Any, ...],
  mesh: Mesh | None,
) -> tuple[Problem, np.ndarray]:
  """Checks what a caller gave; returns the problem, and the logits of the clean images.

  Args:
    logits_fn: as for `robustness.evaluate`, as are the others.
    key: of everything random.
    x: images.
    labels: their classes.
    radii: to be attacked.
    counts: by name, what must be >= 1; `batch_size` among them.
    norm: of the balls.
    bounds: of the pixels.
    args: of `logits_fn`.
    mesh: devices.

  Raises:
    ValueError: for input that makes no sense, or clean logits that are not finite.
  """
  x, labels = np.asarray(x), np.asarray(labels)
  if not np.issubdtype(x.dtype, np.floating) or not np.issubdtype(labels.dtype, np.integer):
    raise ValueError(f'x must be float and labels integer, got {x.dtype} and {labels.dtype}')
  if len(x) == 0 or labels.shape != x.shape[:1]:
    raise ValueError(
      f'x [N, ...] and labels [N] must fit, with N >= 1, got {x.shape}, {labels.shape}'
    )
  check_radii(radii)
  for name, count in counts.items():
    if count < 1:
      raise ValueError(f'{name} must be >= 1, got {count}')
  if norm not in projections.NORMS:
    raise ValueError(f'norm must be one of {", ".join(projections.NORMS)}, got {norm!r}')
  x = x.astype(np.float32)
  check_images(x, bounds)
  shape = jax.eval_shape(logits_fn, x[:1], *args).shape
  if len(shape) != 2 or shape[0] != 1 or shape[1] < 2:
    raise ValueError(f'logits_fn must give [B, K] with K >= 2, got {shape} for one image')
  if labels.min() < 0 or labels.max() >= shape[1]:
    raise ValueError(f'labels must lie in [0, {shape[1]}), got [{labels.min()}, {labels.max()}]')
  mesh = sharding.data_mesh() if mesh is None else mesh
  problem = Problem(
    logits_fn=logits_fn,
    args=sharding.replicate(mesh, args),
    x=x,
    labels=labels.astype(np.int32),
    key=key,
    num_classes=shape[1],
    norm=norm,
    bounds=bounds,
    batch_size=min(counts['batch_size'], len(x)),
    mesh=mesh,
  )
  logits = forward(problem, logits_fn, x)
  if not np.isfinite(logits).all():
    raise ValueError('the logits of clean images are not finite: the classifier has diverged')
  return problem, logits


def check_radii(radii: Sequence[float]) -> None:
  """Raises ValueError unless there are radii, all finite and >= 0."""
  if not len(radii) or min(radii) < 0.0 or not np.isfinite(radii).all():
    raise ValueError(f'radii must be finite and >= 0, got {list(radii)}')


def check_images(x: np.ndarray, bounds: tuple[float, float]) -> None:
  """Raises ValueError unless there are images, all inside the bounds."""
  if not len(x) or not (x.min() >= bounds[0] and x.max() <= bounds[1]):  # NaN is outside too
    found = f'[{x.min()}, {x.max()}]' if len(x) else 'none'
    raise ValueError(f'images must lie in {bounds}, got {found}')


def attempt(
  problem: Problem, attack: attack_suite.Attack, radius: float, restart: int, rows: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
  """One try on the examples `rows`, of which there must be some.

  Returns:
    The images `[len(rows), ...]`, and whether the classifier is right on each.
  """
  aim = aim_at(problem, attack, restart, rows)
  key = attack_suite.try_key(problem.key, attack, radius, restart)

  def attack_batch(batch: tuple[jax.Array, Aim, jax.Array]) -> tuple[jax.Array, jax.Array]:
    x, aim, index = batch
    norm, bounds = problem.norm, problem.bounds
    x_adv = attack_suite.run(
      attack, key, x, aim, index, jnp.float32(radius), problem.args, norm=norm, bounds=bounds
    )
    logits = _apply(problem.logits_fn, x_adv, problem.args)
    problem.on_batch()
    return x_adv, is_correct(logits, aim.labels)

  return in_batches(problem, attack_batch, (problem.x[rows], aim, rows.astype(np.int32)))


def aim_at(problem: Problem, attack: attack_suite.Attack, restart: int, rows: np.ndarray) -> Aim:
  """What one try aims at, for the examples `rows`."""
  return attack_suite.aim_at(
    problem.aims, attack, restart, rows, problem.x, problem.labels, problem.num_classes
  )


def survivors(
  problem: Problem, table: tuple[attack_suite.Attack, ...], radius: float, rows: np.ndarray
) -> np.ndarray:
  """Those of `rows` that no try of these attacks breaks at this radius."""
  for attack in table:
    for restart in range(attack.tries):
      if len(rows):
        rows = rows[attempt(problem, attack, radius, restart, rows)[1]]
  return rows


def forward(problem: Problem, function: Model, images: np.ndarray) -> np.ndarray:
  """A function of images (and the problem's args) on all of them, `[N, ...]`."""
  return in_batches(problem, lambda x: _apply(function, x, problem.args), images)


def in_batches(problem: Problem, function: Callable[[Any], Any], arrays: Any) -> Any:
  """`sharding.map_batches` with the problem's batches."""
  return sharding.map_batches(problem.mesh, function, arrays, problem.batch_size)


@functools.partial(jax.jit, static_argnames='function')
def _apply(function: Model, x: jax.Array, args: tuple[Any, ...]) -> jax.Array:
  return function(x, *args)
