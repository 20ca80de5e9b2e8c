"""A classifier and the examples to break it on, in batches of one shape."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae import sharding, suite
from se_vae.balls import Norm
from se_vae.classification import Model, is_correct


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
    batch_size: a multiple of the number of devices.
    mesh: the devices.
    aims: what the targeted attacks aim at.
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
  aims: suite.Aims | None = None


def attempt(
  problem: Problem,
  attack: suite.Attack,
  radius: float,
  restart: int,
  rows: np.ndarray,
  progress: Callable[[], Any] = lambda: None,
) -> tuple[np.ndarray, np.ndarray]:
  """One try on the examples `rows`.

  Returns:
    The images `[len(rows), ...]`, and whether the classifier is right on each.
  """
  assert problem.aims is not None
  key = suite.try_key(problem.key, attack, radius, restart)
  images = np.empty((len(rows), *problem.x.shape[1:]), np.float32)
  correct = np.ones(len(rows), bool)
  for places, some in _batches(rows, problem.batch_size):
    aim = suite.aim_at(problem.aims, attack, restart, some, problem.x, problem.num_classes)
    x, aim, index = sharding.split(problem.mesh, (problem.x[some], aim, some.astype(np.int32)))
    x_adv = suite.run(
      attack,
      key,
      x,
      aim,
      index,
      jnp.float32(radius),
      problem.args,
      norm=problem.norm,
      bounds=problem.bounds,
    )
    logits = _apply(problem.logits_fn, x_adv, problem.args)
    images[places] = np.asarray(x_adv)[: len(places)]
    correct[places] = np.asarray(is_correct(logits, aim.labels))[: len(places)]
    progress()
  return images, correct


def survivors(
  problem: Problem, table: tuple[suite.Attack, ...], radius: float, rows: np.ndarray
) -> np.ndarray:
  """Those of `rows` that no try of these attacks breaks at this radius."""
  for attack in table:
    for restart in range(attack.tries):
      if len(rows):
        rows = rows[attempt(problem, attack, radius, restart, rows)[1]]
  return rows


def forward(problem: Problem, function: Model, images: np.ndarray) -> np.ndarray:
  """A function of images (and the problem's args) on all of them, `[N, ...]`."""
  outputs = [
    np.asarray(_apply(function, sharding.split(problem.mesh, images[some]), problem.args))[
      : len(places)
    ]
    for places, some in _batches(np.arange(len(images)), problem.batch_size)
  ]
  return np.concatenate(outputs)


@functools.partial(jax.jit, static_argnames='function')
def _apply(function: Model, x: jax.Array, args: tuple[Any, ...]) -> jax.Array:
  return function(x, *args)


def _batches(rows: np.ndarray, batch_size: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
  """Places in `rows`, and a full batch of rows that begins with those: one compilation."""
  for start in range(0, len(rows), batch_size):
    places = np.arange(start, start + batch_size)
    yield places[places < len(rows)], rows[places % len(rows)]
