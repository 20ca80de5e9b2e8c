"""Latent shift and joint robustness: the largest value of an objective within each radius.

The latent shift needs no labels: it is how far an attack can move an image's representation.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae import seeds
from se_vae.attacks.losses import Aim, Joint, LatentShift, Model
from se_vae.attacks.projections import Norm, as_bounds
from se_vae.config import ArgumentError, check_counts
from se_vae.evaluation import attack_suite, attacked_classifier, states
from se_vae.evaluation.metrics import AdversarialAccuracy
from se_vae.parallel import sharding


def maximal_values(
  objective: Model,
  x: np.ndarray,
  aim: Aim,
  outputs: np.ndarray,
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
  state_path: str | Path | None = None,
  progress: Callable[[int, int], Any] = lambda done, total: None,
) -> np.ndarray:
  """The largest value of an objective that `attacks.apgd` finds within each radius.

  Args:
    objective: `(x_adv, aim, *args) -> [B]`.
    x: images `[N, ...]`, float32, inside `bounds`.
    aim: what the objective knows of each of the N examples.
    outputs: values `[N + M, ...]` of the objective's functions on x and on
      `attacked_classifier.noise`. A state is taken up only if it has the same ones.
    radii: radii >= 0, in any order.
    num_steps: gradient steps of each attempt.
    restarts: attempts at each radius, each from a random start of its own.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    seed: seed of every random draw.
    batch_size: examples attacked at a time, >= 1.
    args: further arguments of the objective.
    mesh: devices to spread a batch over; all of them if None.
    state_path: npz file that keeps the values found so far, for a call that is interrupted and
      repeated.
    progress: called before the first batch, after each one and at the end with the number of
      finished attacks of an example and of all; may raise to stop.

  Returns:
    `[R, N]`. A value found within a smaller radius counts at every larger one, and NaN as infinity.

  Raises:
    ArgumentError: for bad radii or counts, images outside the bounds, or a bad `state_path`.
    StateError: for a state that is damaged or belongs to another call.
  """
  bounds = as_bounds(bounds)
  attacked_classifier.check_images(x, bounds)
  attacked_classifier.check_radii(radii)
  check_counts(num_steps=num_steps, restarts=restarts)
  path = states.check_path(state_path)
  mesh = sharding.data_mesh() if mesh is None else mesh
  # The name is part of the random draws.
  attack = attack_suite.APGD(name='largest', objective=objective, num_steps=num_steps)
  order = sorted({0.0, *map(float, radii)})
  attempts = [(r, attempt) for r in order for attempt in range(restarts if r else 1)]
  total = len(attempts) * len(x)
  examples = (x, aim, np.arange(len(x), dtype=np.int32))
  settings = {'radii': order, 'num_steps': num_steps, 'restarts': restarts}
  settings |= {'norm': norm, 'bounds': tuple(bounds), 'seed': seed}
  fingerprint = states.fingerprint(settings, (x, aim.labels, args))
  args = sharding.replicate(mesh, args)
  seed_key = seeds.key_of(seed)

  def attack_batch(
    radius: float, attempt: int, batch: tuple[jax.Array, Aim, jax.Array]
  ) -> jax.Array:
    x, aim, index = batch
    key = attack_suite.attempt_key(seed_key, attack, radius, attempt)
    x_adv = attack_suite.run(
      attack, key, x, aim, index, jnp.float32(radius), args, norm=norm, bounds=bounds
    )
    return attacked_classifier.apply(objective, x_adv, (aim, *args))

  def report(before: int, done: int) -> None:
    progress(before + done, total)

  found = np.full((len(order), len(x)), -np.inf)
  with states.ValueLog(path, fingerprint, outputs) as log:
    for number, (radius, attempt) in enumerate(attempts):
      values = log.map_batches(
        mesh,
        functools.partial(attack_batch, radius, attempt),
        examples,
        min(batch_size, len(x)),
        functools.partial(report, number * len(x)),
      )
      i = order.index(radius)
      found[i] = np.maximum(found[i], np.where(np.isnan(values), np.inf, values))
  progress(total, total)
  found = np.maximum.accumulate(found, axis=0)
  return found[[order.index(float(radius)) for radius in radii]]


def _images(x: np.ndarray) -> np.ndarray:
  """The images in float32; raises ArgumentError unless they are floats `[N, ...]`, at least one."""
  x = np.asarray(x)
  if x.ndim < 2 or not x.size or not jnp.issubdtype(x.dtype, jnp.floating):
    message = f'must be float images [N, ...], at least one, got {x.dtype} {x.shape}'
    raise ArgumentError('x', message)
  return x.astype(np.float32)


def _and_noise(x: np.ndarray, options: dict[str, Any]) -> np.ndarray:
  """The images x `[N, ...]` and M of noise, on which a state tells functions apart."""
  bounds = as_bounds(options.get('bounds', (0.0, 1.0)))
  return np.concatenate([x, attacked_classifier.noise(x, bounds)])


def joint_accuracy(
  logits_fns: Sequence[Model],
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  args: Sequence[tuple[Any, ...]],
  batch_size: int = 200,
  mesh: Mesh | None = None,
  **options: Any,
) -> AdversarialAccuracy:
  """Share of examples for which no single image within the radius misleads all classifiers.

  Example:
    >>> def above(x, threshold):  # one pixel, two classes
    ...   return jnp.stack([threshold - x[:, 0], x[:, 0] - threshold], axis=1)
    >>> x, labels = np.array([[0.2]], np.float32), np.array([[0, 0]])
    >>> args = ((0.3,), (0.5,))  # 0.15 brings the pixel over the first threshold alone
    >>> print(joint_accuracy((above, above), x, labels, radii=(0.15, 0.4), args=args).accuracy)
    [1. 0.]

  Args:
    logits_fns: T classifiers of the same images.
    x: images `[N, ...]`.
    labels: `[N, T]`, the true class for each classifier.
    radii: radii >= 0, in any order.
    args: T tuples, further arguments of each classifier.
    batch_size: examples attacked at a time.
    mesh: devices to spread a batch over; all of them if None.
    **options: `num_steps`, `restarts`, `norm`, `bounds`, `seed`, `state_path` and `progress` of
      `maximal_values`.

  Raises:
    ArgumentError: if the numbers of classifiers, labels and arguments differ, or for arguments that
      `maximal_values` refuses.
    StateError: for a state that is damaged or belongs to another call.
  """
  x, labels = _images(x), np.asarray(labels)
  if not np.issubdtype(labels.dtype, np.integer):
    raise ArgumentError('labels', f'must be integers, got {labels.dtype}')
  if labels.shape != (len(x), len(logits_fns)) or len(args) != len(logits_fns):
    raise ArgumentError(
      ('labels', 'args'),
      f'must be [N, {len(logits_fns)}] and {len(logits_fns)} tuples, one for each classifier, got '
      f'{labels.shape} and {len(args)}',
    )
  check_counts(batch_size=batch_size)
  for task, (logits_fn, own) in enumerate(zip(logits_fns, args, strict=True)):
    name = f'logits_fns[{task}]'
    _, num_classes = attacked_classifier.check_function(name, logits_fn, x, own, logits=True)
    if labels[:, task].min() < 0 or labels[:, task].max() >= num_classes:
      raise ArgumentError('labels', f'must lie in [0, {num_classes}) for {name}')
  objective, aim = Joint(tuple(logits_fns)), Aim(labels.astype(np.int32))
  mesh = sharding.data_mesh() if mesh is None else mesh
  args = sharding.replicate(mesh, tuple(args))
  images = _and_noise(x, options)
  outputs = sharding.map_batches(
    mesh,
    lambda batch: attacked_classifier.apply(objective, batch[0], (batch[1], *args)),
    (images, Aim(np.resize(aim.labels, (len(images), len(logits_fns))))),
    min(batch_size, len(x)),
  )
  options |= {'radii': radii, 'batch_size': batch_size, 'args': args, 'mesh': mesh}
  margins = maximal_values(objective, x, aim, np.nan_to_num(outputs), **options)
  return AdversarialAccuracy(np.asarray(radii, np.float64), margins <= 0.0)


def max_latent_shift(
  latents_fn: Model,
  x: np.ndarray,
  *,
  radii: Sequence[float],
  batch_size: int = 200,
  args: tuple[Any, ...] = (),
  mesh: Mesh | None = None,
  **options: Any,
) -> np.ndarray:
  """The largest squared distance between the representations of x and of x', `[R, N]`.

  With `GaussianLatents` it is the largest squared W2 between encodings (Eq. 12), the quantity that
  SE training keeps small.

  Example:
    >>> x = np.full((1, 2), 0.5, np.float32)
    >>> print(max_latent_shift(lambda x: 10.0 * x, x, radii=(0.1,)).round(3))
    [[2.]]

  Args:
    latents_fn: images (and `args`) to representations `[B, E]`.
    x: images `[N, ...]`.
    radii: radii >= 0, in any order.
    batch_size: examples attacked at a time.
    args: further arguments of `latents_fn`.
    mesh: devices to spread a batch over; all of them if None.
    **options: `num_steps`, `restarts`, `norm`, `bounds`, `seed`, `state_path` and `progress` of
      `maximal_values`.

  Raises:
    ArgumentError: for no images, or arguments that `maximal_values` refuses.
    StateError: for a state that is damaged or belongs to another call.
  """
  mesh, x = sharding.data_mesh() if mesh is None else mesh, _images(x)
  check_counts(batch_size=batch_size)
  args = sharding.replicate(mesh, args)
  outputs = sharding.map_batches(
    mesh,
    lambda images: attacked_classifier.apply(latents_fn, images, args),
    _and_noise(x, options),
    min(batch_size, len(x)),
  )
  aim = Aim(np.zeros(len(x), np.int32), latent=outputs[: len(x)])
  options |= {'radii': radii, 'batch_size': batch_size, 'args': args, 'mesh': mesh}
  return maximal_values(LatentShift(latents_fn), x, aim, np.nan_to_num(outputs), **options)
