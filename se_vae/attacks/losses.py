"""What an attack on a classifier maximises: losses of logits, and shifts of its representation.

Each is a frozen, hashable callable `(x_adv, aim, *args) -> [B]`, an objective of `attacks.pgd`;
`args` go to the classifier. A wrapped classifier is compiled once for each kind of loss.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

Model = Callable[..., jax.Array]
Array = Any  # of JAX under jit, of NumPy outside


class Aim(NamedTuple):
  """What an attack knows of each example; a field that no objective reads may be None.

  Attributes:
    labels: `[B]`, the true classes.
    target: `[B]`, another class.
    latent: `[B, E]`, a point of the representation to approach, or to leave.
    image: `[B, ...]`, an image to approach.
  """

  labels: Array
  target: Array | None = None
  latent: Array | None = None
  image: Array | None = None


def margin(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """The highest other logit minus the label's, `[B]`: above 0 only where the classifier is wrong.

  Where two logits are equal it is 0, and `is_correct` decides.
  """
  # The dtype of the labels may be too narrow for the classes.
  is_label = (
    jnp.arange(logits.shape[-1], dtype=jnp.int32)[None] == labels.astype(jnp.int32)[:, None]
  )
  others = jnp.where(is_label, -jnp.inf, logits).max(axis=-1)
  return others - _logit(logits, labels)


def is_correct(logits: jax.Array, labels: jax.Array) -> jax.Array:
  """Whether all logits are finite and the label's is the highest, bool `[B]`.

  Of equal logits the first class counts. A row of NaN would otherwise count as class 0.
  """
  labels = jnp.asarray(labels)
  highest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
  return jnp.isfinite(logits).all(axis=-1) & (highest == labels.astype(jnp.int32))


@dataclasses.dataclass(frozen=True)
class CrossEntropy:
  """Cross-entropy in nats."""

  logits_fn: Model

  def __call__(self, x_adv: jax.Array, aim: Aim, *args: Any) -> jax.Array:
    """The cross-entropy `[B]`, in nats."""
    logits = self.logits_fn(x_adv, *args)
    return optax.softmax_cross_entropy_with_integer_labels(logits, aim.labels)


@dataclasses.dataclass(frozen=True)
class Margin:
  """`margin` as an objective: unlike cross-entropy it does not saturate."""

  logits_fn: Model

  def __call__(self, x_adv: jax.Array, aim: Aim, *args: Any) -> jax.Array:
    """The margin `[B]`."""
    return margin(self.logits_fn(x_adv, *args), aim.labels)


@dataclasses.dataclass(frozen=True)
class DLR:
  """Difference of logits ratio (Croce and Hein, 2020, Eq. 6).

  The margin over the gap between the highest and the third highest logit: it does not change when
  all logits are shifted or scaled alike. Raises ValueError for K < 3.
  """

  logits_fn: Model

  def __call__(self, x_adv: jax.Array, aim: Aim, *args: Any) -> jax.Array:
    """The ratio `[B]`, at most 1."""
    logits = self.logits_fn(x_adv, *args)
    if logits.shape[-1] < 3:
      raise ValueError(f'DLR needs at least 3 classes, got {logits.shape[-1]}')
    top = jax.lax.top_k(logits, 3)[0]
    gap = top[:, 0] - top[:, 2]
    return margin(logits, aim.labels) / jnp.where(gap > 0.0, gap, 1.0)


@dataclasses.dataclass(frozen=True)
class Targeted:
  """Logit of `aim.target` minus the label's: for a linear probe (w_j - w_y) . mean + constant."""

  logits_fn: Model

  def __call__(self, x_adv: jax.Array, aim: Aim, *args: Any) -> jax.Array:
    """The difference of logits `[B]`."""
    assert aim.target is not None
    logits = self.logits_fn(x_adv, *args)
    return _logit(logits, aim.target) - _logit(logits, aim.labels)


@dataclasses.dataclass(frozen=True)
class LatentShift:
  """Squared distance of the representation from `aim.latent`, in squared latent units.

  For representations that stack the means and standard deviations of factorised Gaussians this is
  squared W2 (paper Eq. 12).
  """

  latents_fn: Model

  def __call__(self, x_adv: jax.Array, aim: Aim, *args: Any) -> jax.Array:
    """The squared distance `[B]`."""
    assert aim.latent is not None
    return jnp.sum((self.latents_fn(x_adv, *args) - aim.latent) ** 2, axis=-1)


@dataclasses.dataclass(frozen=True)
class LatentTarget:
  """Minus `LatentShift`: an attack approaches `aim.latent`."""

  latents_fn: Model

  def __call__(self, x_adv: jax.Array, aim: Aim, *args: Any) -> jax.Array:
    """Minus the squared distance `[B]`."""
    return -LatentShift(self.latents_fn)(x_adv, aim, *args)


@dataclasses.dataclass(frozen=True)
class UntilMisclassified:
  """An objective, but +inf, with no gradient, where the classifier is wrong.

  The image that an example is misclassified for need not be the one of the highest loss: the best
  iterate under this objective is misclassified if any iterate is.
  """

  objective: Model
  logits_fn: Model

  def __call__(self, x_adv: jax.Array, aim: Aim, *args: Any) -> jax.Array:
    """The objective's value `[B]`, or +inf."""
    # The compiler merges the two forward passes.
    correct = is_correct(self.logits_fn(x_adv, *args), aim.labels)
    return jnp.where(correct, self.objective(x_adv, aim, *args), jnp.inf)


@dataclasses.dataclass(frozen=True)
class Joint:
  """The smallest margin of several classifiers: above 0 just where all are wrong at once.

  Wrong is what `is_correct` says, so that ties and logits that are not finite count as in other
  attacks.

  Attributes:
    logits_fns: one for each task; `aim.labels` is `[B, T]`, and args[t] are the arguments of
      classifier t.
  """

  logits_fns: tuple[Model, ...]

  def __call__(self, x_adv: jax.Array, aim: Aim, *args: tuple[Any, ...]) -> jax.Array:
    """The smallest margin `[B]`."""
    margins = []
    for task, (logits_fn, own) in enumerate(zip(self.logits_fns, args, strict=True)):
      logits, labels = logits_fn(x_adv, *own), aim.labels[:, task]
      found = margin(logits, labels)
      above_0 = jnp.fmax(found, jnp.finfo(found.dtype).tiny)
      margins.append(jnp.where(is_correct(logits, labels), found, above_0))
    return jnp.stack(margins).min(axis=0)


def _logit(logits: jax.Array, classes: jax.Array) -> jax.Array:
  return jnp.take_along_axis(logits, classes[:, None], axis=-1)[:, 0]
