"""The layout in which a CPU runs the loop of an attack fastest: images as columns `[P, B]`.

Products of a network then need no transposition in the loop. An attack takes the batch axis of its
images from its ball, so it is written once for images `[B, ...]` and for columns.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import jax

from se_vae.attacks import projections

# Images to values [B] and to the gradient of each value in its own image.
Evaluate = Callable[[jax.Array], tuple[jax.Array, jax.Array]]


def inside(
  attack: Callable[[Evaluate, projections.Ball, jax.Array], jax.Array],
  evaluate: Evaluate,
  ball: projections.Ball,
  first: jax.Array,
) -> jax.Array:
  """Returns `attack(evaluate, ball, first)`, images `[B, ...]`, computed on columns.

  Args:
    attack: returns images of the ball, in the layout of `first`.
    evaluate: of images `[B, ...]`.
    ball: of images `[B, ...]`.
    first: images `[B, ...]`, where the attack starts.
  """
  shape = ball.x.shape

  def to_columns(x: jax.Array) -> jax.Array:
    return x.reshape(shape[0], -1).T

  def to_images(columns: jax.Array) -> jax.Array:
    return columns.T.reshape(shape)

  def evaluate_columns(columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    values, gradient = evaluate(to_images(columns))
    return values, to_columns(gradient)

  ball = dataclasses.replace(ball, x=to_columns(ball.x), batch_axis=1)
  return to_images(attack(evaluate_columns, ball, to_columns(first)))
