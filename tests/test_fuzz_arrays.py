"""Arrays of any shape, dtype and value: refused with a documented error, or a result of its shape.

SE_VAE_FUZZ sets the number of inputs of each function. `tests/experiments/test_fuzz.py` has files.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

import se_vae
from se_vae import ArgumentError, DiagonalGaussian, FullGaussian
from tests.tools.fuzzing import fuzz
from tests.training.small_runs import drawn

DTYPE_PROMOTION = 'standard'  # as for a user

DIMENSIONS = st.sampled_from([0, 1, 2, 3])
DTYPES = ['float32'] * 8 + ['float16', 'bfloat16', 'int32', 'uint8', 'bool', 'complex64']
KEY = jax.random.key(0)
MODEL = se_vae.make_vae((2, 2, 1), latent_dim=3, hidden_units=2, num_layers=1)
PARAMS = drawn(MODEL)

# By name: a function of arrays, the usual shapes of the arrays for dimensions B and D, and the
# shape of every array of the result.
CALLS: dict[str, tuple[Callable[..., Any], list[str], str]] = {
  'sample': (lambda m, v: DiagonalGaussian(m, v).sample(KEY), ['BD', 'BD'], 'BD'),
  'log_prob': (lambda m, v, z: DiagonalGaussian(m, v).log_prob(z), ['BD', 'BD', 'BD'], 'B'),
  'full sample': (lambda m, s: FullGaussian(m, s).sample(KEY), ['BD', 'BDD'], 'BD'),
  'full log_prob': (lambda m, s, z: FullGaussian(m, s).log_prob(z), ['BD', 'BDD', 'BD'], 'B'),
  'entropy': (lambda m, v: se_vae.entropy(DiagonalGaussian(m, v)), ['BD', 'BD'], 'B'),
  'full entropy': (lambda m, s: se_vae.entropy(FullGaussian(m, s)), ['BD', 'BDD'], 'B'),
}


def of_pairs(function: Callable[..., Any], *more: Any) -> None:
  def diagonal(*parts: jax.Array) -> Any:
    return function(DiagonalGaussian(*parts[:2]), DiagonalGaussian(*parts[2:4]), *more, *parts[4:])

  def full(*parts: jax.Array) -> Any:
    return function(FullGaussian(*parts[:2]), FullGaussian(*parts[2:4]), *more, *parts[4:])

  gamma = [''] * (function.__name__.startswith('entropic'))
  CALLS[function.__name__] = (diagonal, ['BD'] * 4 + gamma, 'B')
  CALLS[f'full {function.__name__}'] = (full, ['BD', 'BDD'] * 2 + gamma, 'B')


for each in (
  se_vae.kl_divergence,
  se_vae.squared_w2,
  se_vae.entropic_squared_w2,
  se_vae.entropic_transport_cost,
):
  of_pairs(each)

CALLS |= {
  'elbo': (
    lambda x, y, m, v, obs_var: se_vae.elbo(x, y, DiagonalGaussian(m, v), obs_var=obs_var),
    ['BD', 'BD', 'BD', 'BD', ''],
    'B',
  ),
  'se_elbo': (
    lambda x, m, v, gamma, obs_var: se_vae.se_elbo(
      x, x, DiagonalGaussian(m, v), DiagonalGaussian(v, m), gamma=gamma, obs_var=obs_var
    ),
    ['BD', 'BD', 'BD', '', ''],
    'B',
  ),
  'log_normalizer': (lambda gamma: se_vae.log_normalizer(gamma, 3), [''], ''),
  'pixels': (se_vae.pixels, ['BD'], 'BD'),
  'encode': (lambda x: MODEL.encode(PARAMS, x), ['B221'], 'B3'),
  'decode': (lambda z: MODEL.decode(PARAMS, z), ['B3'], 'B221'),
  'pgd': (
    lambda x, radius, start, index: se_vae.pgd(
      _objective, KEY, x, radius=radius, num_steps=2, start=start, index=index
    ),
    ['BD', '', 'BD', 'B'],
    'BD',
  ),
}


def _objective(x: jax.Array) -> jax.Array:
  return jnp.sum(x**2, axis=tuple(range(1, x.ndim)))


def shape_of(text: str, sizes: dict[str, int]) -> tuple[int, ...]:
  return tuple(sizes[letter] if letter in sizes else int(letter) for letter in text)


@pytest.mark.parametrize('name', CALLS)
@fuzz(0.2)
@given(choices=st.data())
def test_shapes_and_dtypes(name, choices):
  """Traced as under jit, where only shapes and dtypes are known."""
  function, usual, returned = CALLS[name]
  sizes = {'B': choices.draw(DIMENSIONS), 'D': choices.draw(DIMENSIONS)}
  arrays = []
  for text in usual:
    right = st.just(shape_of(text, sizes))
    shape = choices.draw(right | right | right | st.lists(DIMENSIONS, max_size=4).map(tuple))
    arrays.append(jax.ShapeDtypeStruct(shape, choices.draw(st.sampled_from(DTYPES))))
  try:
    with jax.numpy_rank_promotion('allow'):
      result = jax.eval_shape(function, *arrays)
  except (AssertionError, TypeError) as error:
    assert any(word in str(error) for word in ('must', 'needs', 'different shapes')), error
    return
  for leaf in jax.tree.leaves(result):
    assert jnp.issubdtype(leaf.dtype, jnp.floating), arrays
    if all(array.shape == shape_of(text, sizes) for array, text in zip(arrays, usual, strict=True)):
      assert leaf.shape == shape_of(returned, sizes)


FLOATS = st.floats(width=32) | st.sampled_from([math.nan, math.inf, -math.inf, 3e38, -3e38, 1e-45])
ONES = jnp.ones((2, 3))


@fuzz(0.2)
@given(gamma=FLOATS, obs_var=FLOATS)
def test_scalars(gamma, obs_var):
  """Refused where they are out of range, and only there."""
  q = DiagonalGaussian(ONES, ONES)
  for call, fits in (
    (lambda: se_vae.log_normalizer(gamma, 3), 0.0 <= gamma < math.inf),
    (lambda: se_vae.entropic_squared_w2(q, q, gamma), 0.0 <= gamma < math.inf),
    (lambda: se_vae.elbo(ONES, ONES, q, obs_var=obs_var).elbo[0], 0.0 < obs_var < math.inf),
  ):
    if fits:
      assert jnp.shape(call()) in ((), (2,))
    else:
      with pytest.raises(ValueError, match='must be finite'):
        call()


SHAPES = st.just((3, 2, 2, 1)) | st.lists(DIMENSIONS, max_size=4).map(tuple)
IMAGES = SHAPES.flatmap(
  lambda shape: hnp.arrays(st.sampled_from([np.float32] * 4 + [np.uint8, np.int64]), shape)
) | hnp.arrays(np.float32, (3, 2, 2, 1), elements=st.floats(0, 1, width=32))
LABELS = hnp.arrays(np.int64, 3, elements=st.integers(0, 1)) | hnp.arrays(
  st.sampled_from([np.int64, np.float32, np.uint8]), st.sampled_from([3, 0, 2, (3, 1), ()])
)
TWO_CLASSES = np.array([0, 1, 0])
HUGE = 3.4028235677973366e38  # finite, but not in float32
RADII = st.lists(st.floats(0, 0.5) | st.floats(), max_size=2)


def _encodings(x: jax.Array) -> jax.Array:
  return x.reshape(x.shape[0], math.prod(x.shape[1:]))


def _logits(x: jax.Array) -> jax.Array:
  total = jnp.sum(_encodings(x), axis=1)
  return jnp.stack([total, 2.0 - total], axis=1)


@fuzz(0.04)
@given(x=IMAGES, labels=LABELS, radii=RADII, function=st.sampled_from([0, 1]))
@example(x=np.zeros((), np.float32), labels=TWO_CLASSES, radii=[0.1], function=0)
@example(x=np.zeros((3, 0), np.float32), labels=TWO_CLASSES, radii=[0.1], function=0)
@example(x=np.zeros((3, 2), np.float32), labels=TWO_CLASSES, radii=[HUGE], function=0)
def test_evaluations(x, labels, radii, function):
  """Images, labels and radii: refused, naming the argument, or a curve over these radii."""
  try:
    if function:
      curve = se_vae.adversarial_accuracy(_logits, x, labels, radii=radii, num_steps=1)
    else:
      options = {'num_steps': 1, 'check_examples': 0}
      curve = se_vae.evaluate(_logits, x, labels, radii=radii, **options).curve
  except (ArgumentError, AssertionError) as error:
    assert any(name in str(error) for name in ('x', 'labels', 'radii', 'logits_fn'))
  else:
    assert curve.accuracy.shape == (len(radii),) and curve.correct.shape == (len(radii), len(x))


@fuzz(0.04)
@given(x=IMAGES, labels=LABELS, radii=RADII)
@example(x=np.zeros((3, 2), np.float32), labels=TWO_CLASSES[:, None], radii=[HUGE])
@example(x=np.zeros((3, 2), np.float32), labels=np.full((3, 1), np.float32(3e9)), radii=[0.1])
def test_joint_accuracy_and_latent_shift(x, labels, radii):
  try:
    curve = se_vae.joint_accuracy((_logits,), x, labels, radii=radii, args=((),), num_steps=1)
  except (ArgumentError, AssertionError):
    pass
  else:
    assert curve.accuracy.shape == (len(radii),)
  try:
    shift = se_vae.max_latent_shift(_encodings, x, radii=radii, num_steps=1)
  except (ArgumentError, AssertionError):
    pass
  else:
    assert shift.shape == (len(radii), len(x))


@fuzz(0.2)
@given(
  means=hnp.arrays(
    st.sampled_from([np.float32, np.float64, np.int64]),
    hnp.array_shapes(min_dims=0, min_side=0, max_side=4),
  )
  | hnp.arrays(np.float32, (3, 2), elements=FLOATS),
  labels=LABELS,
  num_classes=st.integers(-1, 4),
)
def test_fit_probe(means, labels, num_classes):
  try:
    probe = se_vae.fit_probe(means, labels, num_classes, max_iter=100)
  except (ArgumentError, RuntimeError) as error:
    assert '\n' not in str(error)
  else:
    assert probe.weights.shape == (means.shape[1], num_classes)


@fuzz(0.2)
@given(
  images=SHAPES.flatmap(
    lambda shape: hnp.arrays(st.sampled_from([np.uint8, np.uint8, np.float32, np.int32]), shape)
  )
)
def test_encoder_means(images):
  try:
    means = se_vae.encoder_means(MODEL, PARAMS, images)
  except (AssertionError, TypeError, ArgumentError) as error:
    assert 'must be' in str(error)
  else:
    assert means.shape == (len(images), 3)
