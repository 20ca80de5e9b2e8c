"""What a network's outputs can be over a whole region: boxes and margins.

Everything here is batched, and a function of layers and arrays. Each result is a bound in floating
point: see `rounding` for what is counted.
"""

from __future__ import annotations

import dataclasses
import functools
import numbers

import jax
import jax.numpy as jnp

from se_vae.certification import interval, linear_relaxation, rounding
from se_vae.certification.layers import Dense, Layers, check
from se_vae.certification.regions import Box, Region

METHODS: tuple[str, ...] = ('ibp', 'crown_ibp', 'crown')

# The largest relative error that is assumed of `exp` and of the rounding about it, in units of u.
_EXP_ULPS = 64


@dataclasses.dataclass(frozen=True)
class Method:
  """How bounds are found.

  Attributes:
    name: 'ibp' (interval bounds), 'crown_ibp' (linear bounds of the outputs, with interval bounds
      of the inputs of ReLUs) or 'crown' (linear bounds of both). Each is slower than the one before
      it. The last two are at least as tight as the first, and 'crown' is mostly the tightest.
    slope_steps: gradient steps on the slopes of linear bounds of the outputs, which make them
      tighter (alpha-CROWN). A step takes about three times as long as a bound.

  Raises:
    ValueError: for an unknown name or slope_steps < 0.
  """

  name: str = 'crown'
  slope_steps: int = 0

  def __post_init__(self) -> None:
    if self.name not in METHODS:
      raise ValueError(f'name must be one of {", ".join(METHODS)}, got {self.name!r}')
    if not isinstance(self.slope_steps, numbers.Integral) or self.slope_steps < 0:
      raise ValueError(f'slope_steps must be an integer >= 0, got {self.slope_steps!r}')

  def __str__(self) -> str:
    return f'{self.name}, {self.slope_steps} slope steps' if self.slope_steps else self.name


CROWN = Method()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Encoder:
  """An encoder as layers: a trunk, then a linear head each for mean and log-variance.

  Attributes:
    trunk: layers from inputs to features `[B, F]`.
    mean: features to means `[B, D]`.
    log_var: features to log-variances `[B, D]`.
  """

  trunk: Layers
  mean: Dense
  log_var: Dense

  def means(self, *further: Dense) -> Layers:
    """Returns the network from inputs to means, and on through further layers, as a probe."""
    return (*self.trunk, self.mean, *further)

  def both(self) -> Layers:
    """Returns the network from inputs to means and log-variances, side by side, `[B, 2 D]`."""
    heads = (self.mean, self.log_var)
    weights = jnp.concatenate([head.weights for head in heads], axis=1)
    return (*self.trunk, Dense(weights, jnp.concatenate([head.bias for head in heads])))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class LatentBox:
  """Bounds of an encoding over a region.

  Attributes:
    mean: of the means, `[B, D]`.
    log_var: of the log-variances, `[B, D]`.
  """

  mean: Box
  log_var: Box


@functools.partial(jax.jit, static_argnames='method')
def output_box(layers: Layers, region: Region, method: Method = CROWN) -> Box:
  """Returns bounds of the outputs `[B, ...]` over a region of inputs.

  Example:
    >>> from se_vae.certification import Dense, ball
    >>> layers = (Dense(jnp.array([[1.0], [-2.0]]), jnp.zeros(1)),)
    >>> box = output_box(layers, ball(jnp.array([[0.5, 0.5]]), 0.1))
    >>> print(box.lower.round(3), box.upper.round(3))
    [[-0.8]] [[-0.2]]

  Raises:
    TypeError: for something that is no layer, by its name, or layers of another dtype than the
      region's.
    AssertionError: if the shapes of neighbouring layers, or those of weights and bias, do not fit,
      or the region or a layer is empty.
  """
  layers = tuple(layers)
  _check(layers, region)
  known = _known(layers, region, method)
  if method.name == 'ibp':
    return known[-1]
  box = linear_relaxation.output_box(layers, known, region, slope_steps=method.slope_steps)
  return box.intersect(known[-1])


def latent_box(encoder: Encoder, region: Region, method: Method = CROWN) -> LatentBox:
  """Returns bounds of means and log-variances `[B, D]` over a region of inputs."""
  box = output_box(encoder.both(), region, method)
  lower, upper = (jnp.split(ends, 2, axis=1) for ends in (box.lower, box.upper))
  mean, log_var = map(Box, lower, upper)
  return LatentBox(mean, log_var)


@jax.jit
def latent_shift(box: LatentBox, mean: jax.Array, log_var: jax.Array) -> jax.Array:
  """Returns an upper bound `[B]` on the squared W2 distance from a Gaussian to all in a box.

  The distance of factorised Gaussians is a sum over latents (Eq. 12), and in each latent it is
  largest at an end of the interval of the mean and at one of the log-variance's.

  Args:
    box: of encodings.
    mean: of the Gaussian, as of the encoding of the clean input, `[B, D]`.
    log_var: its log-variance, `[B, D]`.
  """
  gamma = rounding.gamma(_EXP_ULPS, mean.dtype)
  stddev, lower, upper = (
    jnp.exp(0.5 * values) for values in (log_var, box.log_var.lower, box.log_var.upper)
  )
  in_mean = jnp.maximum(jnp.abs(box.mean.lower - mean), jnp.abs(box.mean.upper - mean))
  in_stddev = jnp.maximum(jnp.abs(lower - stddev), jnp.abs(upper - stddev))
  in_stddev += gamma * (stddev + upper)
  squares = jnp.sum(in_mean**2 + in_stddev**2, axis=1)
  return squares * (1.0 + rounding.gamma(2 * mean.shape[1] + 16, mean.dtype))


@functools.partial(jax.jit, static_argnames='method')
def margins(layers: Layers, region: Region, labels: jax.Array, method: Method = CROWN) -> jax.Array:
  """Returns lower bounds `[B]` of the margin: the label's logit minus the largest other one.

  Where the bound is > 0, no input in the region is misclassified. The difference of two logits is
  bounded as one linear function, which is tighter than bounds of each.

  Example:
    >>> from se_vae.certification import Dense, ball
    >>> layers = (Dense(jnp.eye(2), jnp.zeros(2)),)
    >>> print(margins(layers, ball(jnp.array([[0.7, 0.2]]), 0.1), jnp.array([0])).round(3))
    [0.3]

  Args:
    layers: from inputs to logits `[B, K]`, as `encoder.means(probe)`.
    region: of inputs.
    labels: `[B]` integers in [0, K). The bound is NaN for any other.
    method: how bounds are found. For 'ibp', each logit is bounded for itself up to the last layer.

  Raises:
    TypeError: for something that is no layer, layers of another dtype than the region's, or labels
      that are no integers.
    AssertionError: as in `output_box`, or if the outputs are not `[B, K]` or the labels not `[B]`.
  """
  worst = worst_logits(layers, region, labels, method)
  return _against_the_largest(-worst, labels)


@functools.partial(jax.jit, static_argnames='method')
def worst_logits(
  layers: Layers, region: Region, labels: jax.Array, method: Method = CROWN
) -> jax.Array:
  """Returns upper bounds `[B, K]` of each logit minus the label's; 0 for the label itself.

  The cross-entropy of these worst logits is at least that of any input in the region. Training
  minimises it (Gowal et al., 2018, with the last layer folded into the differences).

  Example:
    >>> from se_vae.certification import Dense, ball
    >>> layers = (Dense(jnp.eye(2), jnp.zeros(2)),)
    >>> print(worst_logits(layers, ball(jnp.array([[0.7, 0.2]]), 0.1), jnp.array([0])).round(3))
    [[ 0.  -0.3]]

  Args:
    layers: from inputs to logits `[B, K]`.
    region: of inputs.
    labels: `[B]` integers in [0, K).
    method: as in `margins`.

  Raises:
    TypeError, AssertionError: as in `margins`.
  """
  layers = tuple(layers)
  shape, size = _check(layers, region), len(region.box.lower)
  if len(shape) != 1:
    raise AssertionError(f'the outputs must be logits [B, K], got {(size, *shape)}')
  if labels.shape != (size,):
    raise AssertionError(f'labels must be [{size}], got {labels.shape}')
  (num_classes,) = shape
  known = _known(layers, region, method)
  unit = jnp.eye(num_classes, dtype=region.box.lower.dtype)
  is_label = _one_hot(labels, num_classes)
  rows = is_label[:, None].astype(unit.dtype) - unit[None]
  last = len(layers) - 1
  lower = linear_relaxation.lower_bounds(layers[last:], known[last:], Region(known[last]), rows)
  if method.name != 'ibp':
    linear = linear_relaxation.lower_bounds(
      layers, known, region, rows, slope_steps=method.slope_steps
    )
    lower = jnp.maximum(lower, linear)
  return jnp.where(is_label, 0.0, -lower)


def _one_hot(labels: jax.Array, num_classes: int) -> jax.Array:
  """Returns whether each class is the label, bool `[B, K]`."""
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise TypeError(f'labels must be integers, got {labels.dtype}')
  # The dtype of the labels may be too narrow for the classes.
  return labels.astype(jnp.int32)[:, None] == jnp.arange(num_classes, dtype=jnp.int32)[None]


def _against_the_largest(differences: jax.Array, labels: jax.Array) -> jax.Array:
  """Returns the least of the differences `[B, K]` to other classes; NaN without such a label."""
  is_label = _one_hot(labels, differences.shape[1])
  least = jnp.min(jnp.where(is_label, jnp.inf, differences), axis=1)
  return jnp.where(is_label.any(axis=1), least, jnp.nan)


def _check(layers: Layers, region: Region) -> tuple[int, ...]:
  """Returns the shape of an output; raises TypeError or AssertionError for what does not fit.

  The slack for rounding is that of one dtype.
  """
  inputs = region.box.lower
  if not inputs.size:
    raise AssertionError(f'the region must not be empty, got inputs {inputs.shape}')
  shape = check(layers, inputs.shape[1:])
  others = {leaf.dtype for leaf in jax.tree.leaves(layers)} - {inputs.dtype}
  if others:
    raise TypeError(f'layers must have the dtype of the region, {inputs.dtype}, got {others.pop()}')
  return shape


def box_margins(box: Box, probe: Dense, labels: jax.Array) -> jax.Array:
  """Returns lower bounds `[B]` of a probe's margin that follow from a box of means alone.

  With centres c and half-widths r they are the least over j of
  `(w_y - w_j) . c + b_y - b_j - |w_y - w_j| . r`, less the rounding. They are not as tight as
  `margins`, and hold for a probe that is fitted later.

  Example:
    >>> probe, box = Dense(jnp.eye(2), jnp.zeros(2)), Box(jnp.array([[1.0, 0.0]]), jnp.ones((1, 2)))
    >>> print(box_margins(box, probe, jnp.array([0])).round(3))
    [-0.]

  Args:
    box: of means `[B, D]`.
    probe: from means to logits `[B, K]`.
    labels: `[B]` integers in [0, K).
  """
  # Of one linear layer all methods give the same bounds, and this one computes them once.
  return margins((probe,), Region(box), labels, Method('ibp'))


def _known(layers: Layers, region: Region, method: Method) -> list[Box]:
  """Returns a box of the inputs of each layer and of the outputs."""
  find = linear_relaxation.boxes if method.name == 'crown' else interval.boxes
  return find(layers, region)
