"""The largest value of any objective within each radius: joint attacks, moves of encodings."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae.attacks.losses import Aim, Joint, LatentMove, Model
from se_vae.attacks.projections import Norm
from se_vae.evaluation import attack_suite
from se_vae.evaluation.batched_attacks import check_images, check_radii
from se_vae.evaluation.metrics import AdversarialAccuracy
from se_vae.parallel import sharding


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
  progress: Callable[[int, int], Any] = lambda done, total: None,
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
    progress: called after each batch with the number of finished radii and of all.

  Returns:
    `[R, N]`: what is within a smaller radius counts at a larger one too.

  Raises:
    ValueError: for bad radii, images outside the bounds, or no examples.
  """
  check_images(x, bounds)
  check_radii(radii)
  mesh = sharding.data_mesh() if mesh is None else mesh
  args = sharding.replicate(mesh, args)
  attack = attack_suite.Attack('largest', 'apgd', objective, num_steps=num_steps, tries=restarts)
  order = sorted({0.0, *map(float, radii)})
  examples = (x, aim, np.arange(len(x), dtype=np.int32))

  def climb(radius: float, restart: int, batch: tuple[jax.Array, Aim, jax.Array]) -> jax.Array:
    x, aim, index = batch
    key = attack_suite.try_key(jax.random.key(seed), attack, radius, restart)
    x_adv = attack_suite.run(
      attack, key, x, aim, index, jnp.float32(radius), args, norm=norm, bounds=bounds
    )
    progress(order.index(radius), len(order))
    return _values(objective, x_adv, aim, args)

  found = np.full((len(order), len(x)), -np.inf)
  for i, radius in enumerate(order):
    for restart in range(restarts if radius else 1):
      values = sharding.map_batches(
        mesh, functools.partial(climb, radius, restart), examples, min(batch_size, len(x))
      )
      # A value that is not a number is as bad as can be.
      found[i] = np.maximum(found[i], np.where(np.isnan(values), np.inf, values))
  found = np.maximum.accumulate(found, axis=0)
  return found[[order.index(float(radius)) for radius in radii]]


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

  Example:
    >>> def above(x, threshold):  # one pixel, two classes
    ...   return jnp.stack([threshold - x[:, 0], x[:, 0] - threshold], axis=1)
    >>> x, labels = np.array([[0.2]], np.float32), np.array([[0, 0]])
    >>> args = ((0.3,), (0.5,))  # 0.15 moves the pixel over the first threshold alone
    >>> print(joint_accuracy((above, above), x, labels, radii=(0.15, 0.4), args=args).accuracy)
    [1. 0.]

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
  batch_size: int = 200,
  args: tuple[Any, ...] = (),
  mesh: Mesh | None = None,
  **options: Any,
) -> np.ndarray:
  """The furthest that a representation can be moved, without labels: `[R, N]`, squared.

  With `GaussianLatents` it is the largest squared W2 of encodings, the quantity that SE training
  keeps small.

  Example:
    >>> x = np.full((1, 2), 0.5, np.float32)
    >>> print(representation_moves(lambda x: 10.0 * x, x, radii=(0.1,)).round(3))
    [[2.]]

  Args:
    latents_fn: images (and `args`) to representations `[B, E]`.
    x: images `[N, ...]`.
    radii: radii >= 0.
    batch_size: examples at a time.
    args: further arguments of `latents_fn`.
    mesh: devices.
    **options: as for `largest_values`.
  """
  mesh = sharding.data_mesh() if mesh is None else mesh
  latents = sharding.map_batches(
    mesh, lambda images: latents_fn(images, *args), x, min(batch_size, len(x))
  )
  aim = Aim(np.zeros(len(x), np.int32), latent=latents)
  options |= {'radii': radii, 'batch_size': batch_size, 'args': args, 'mesh': mesh}
  return largest_values(LatentMove(latents_fn), x, aim, **options)
