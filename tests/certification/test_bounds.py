"""Properties of bounds: they contain what samples and attacks find, and are exact if linear."""

from __future__ import annotations

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import attacks
from se_vae import certification as cert
from se_vae.certification import certificates, interval, linear_relaxation, regions, rounding
from tests import oracles

SHAPE = (5, 4, 1)
METHODS = tuple(map(cert.Method, cert.METHODS))
NORMS = {'linf': 0.1, 'l2': 0.4}
unjitted_box = certificates.output_box.__wrapped__


def dense(rng, fan_in, fan_out, dtype=np.float32):
  weights = rng.normal(size=(fan_in, fan_out)) * (2.0 / fan_in) ** 0.5
  return cert.Dense(weights.astype(dtype), (0.3 * rng.normal(size=fan_out)).astype(dtype))


def conv(rng, inputs, outputs, strides, dtype=np.float32):
  weights = rng.normal(size=(3, 3, inputs, outputs)) * (2.0 / (9 * inputs)) ** 0.5
  return cert.Conv(weights.astype(dtype), (0.3 * rng.normal(size=outputs)).astype(dtype), strides)


def network(name):
  rng, relu = np.random.default_rng(3), cert.ReLU()
  if name == 'mlp':
    first, second, third = (dense(rng, *sizes) for sizes in ((20, 12), (12, 8), (8, 3)))
    return (cert.Flatten(), first, relu, second, relu, third)
  first, second = conv(rng, 1, 3, (2, 2)), conv(rng, 3, 2, (2, 1))
  return (first, relu, second, relu, cert.Flatten(), dense(rng, 2 * 2 * 2, 3))


def images(count, seed=4):
  x = np.random.default_rng(seed).uniform(size=(count, *SHAPE)).astype(np.float32)
  x[0, 0], x[0, 1] = 0.0, 1.0  # on the bounds of the pixels
  return jnp.asarray(x)


def all_boxes(layers, x, radius, norm):
  """The box of the outputs by each method."""
  return compiled_boxes(layers, x, jnp.broadcast_to(jnp.float32(radius), len(x)), norm)


@functools.partial(oracles.quick_jit, static_argnames='norm')
def compiled_boxes(layers, x, radius, norm):
  region = cert.ball(x, radius, norm=norm)
  return [unjitted_box(layers, region, method) for method in METHODS]


def points(x, radius, norm, count):
  """Images in the ball: uniform, and on its corners or sphere; `[2 count, B, ...]`, in float64."""
  rng, x = np.random.default_rng(5), np.float64(x)
  offsets = rng.uniform(-1.0, 1.0, size=(count, *x.shape))
  ends = np.sign(offsets)
  if norm == 'l2':
    lengths = np.sqrt((offsets**2).sum(axis=(2, 3, 4), keepdims=True))
    ends = offsets / lengths
    offsets = ends * rng.uniform(size=lengths.shape)
  return np.clip(x + radius * np.concatenate([offsets, ends]), 0.0, 1.0)


def exact_outputs(layers, x):
  """The network in float64, for images `[..., H, W, C]`."""
  with jax.enable_x64(True):
    layers = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), layers)
    return np.asarray(cert.apply(layers, jnp.asarray(x.reshape(-1, *SHAPE)))).reshape(
      *x.shape[:-3], -1
    )


def violations(boxes, outputs):
  """The share of outputs `[S, B, N]` that are outside of any of the boxes `[B, N]`."""
  ends = [(np.asarray(box.lower), np.asarray(box.upper)) for box in boxes]
  return np.mean([(outputs < lower) | (outputs > upper) for lower, upper in ends])


def first_output(x_adv, layers, sign):
  return sign * cert.apply(layers, x_adv)[:, 0]


@pytest.mark.parametrize(('name', 'norm'), [('mlp', 'linf'), ('mlp', 'l2'), ('convnet', 'l2')])
def test_bounds_contain_samples_and_what_attacks_find(name, norm):
  layers, x, radius = network(name), images(3), NORMS[norm]
  boxes = all_boxes(layers, x, radius, norm)
  samples = points(x, float(np.float32(radius)), norm, 2500)  # 15,000 images
  assert violations(boxes, exact_outputs(layers, samples)) == 0.0
  reached = []
  for sign in (1.0, -1.0):
    x_adv = attacks.pgd(
      first_output,
      jax.random.key(0),
      x,
      radius=radius,
      num_steps=10,
      norm=norm,
      args=(layers, sign),
    )
    in_float32 = np.asarray(cert.apply(layers, x_adv))
    outputs = np.stack([exact_outputs(layers, np.float64(x_adv)), in_float32])
    assert violations(boxes, outputs) == 0.0
    reached.append(in_float32[:, 0])
  widths = np.array([np.mean(box.upper[:, 0] - box.lower[:, 0]) for box in boxes])
  assert (np.diff(widths) < 0.0).all()
  share = np.mean(reached[0] - reached[1]) / widths
  print('share of the boxes that PGD reaches', share)
  assert share[2] > 0.4


def no_intercept(box):
  slope, intercept = linear_relaxation_upper_line(box)
  return slope, 0.0 * intercept


def too_flat(box):
  slope, intercept = linear_relaxation_upper_line(box)
  return 0.0 * slope, intercept


def upper_line_twice(box, rows, lower_slope, extra):
  slope, intercept = linear_relaxation_upper_line(box)
  through, offset, error = linear_relaxation_relu(box, rows, slope[:, None], extra)
  return through, offset + regions.dots(jnp.maximum(rows, 0.0), intercept), error


def half_as_wide(layer, x, half, box):
  return interval_around(layer, x, 0.5 * half, box)


linear_relaxation_relu = linear_relaxation._relu
linear_relaxation_upper_line = linear_relaxation._upper_line
interval_around = interval._around
UNSOUND = {
  'upper line as the lower one': (linear_relaxation, '_relu', upper_line_twice),
  'no intercept': (linear_relaxation, '_upper_line', no_intercept),
  'upper slope': (linear_relaxation, '_upper_line', too_flat),
  'half width': (interval, '_around', half_as_wide),
}


@pytest.mark.parametrize('rule', UNSOUND)
def test_an_unsound_rule_is_noticed(rule, monkeypatch):
  monkeypatch.setattr(*UNSOUND[rule])
  layers, x, radius = network('mlp'), images(3), NORMS['linf']

  @oracles.quick_jit
  def boxes(layers):
    """CROWN's own box too: its intersection with interval bounds hides a part of the errors."""
    region = cert.ball(x, radius)
    known = linear_relaxation.boxes(layers, region)
    return known[-1], linear_relaxation.output_box(layers, known, region)

  outputs = exact_outputs(layers, points(x, radius, 'linf', 2500))
  assert violations(boxes(layers), outputs) > 0.0


@pytest.mark.parametrize('norm', NORMS)
def test_boxes_grow_with_the_radius(norm):
  layers, x = network('mlp'), images(3)
  grown = [all_boxes(layers, x, radius, norm)[0] for radius in (0.0, 0.02, 0.1, 0.5)]
  for small, large in itertools.pairwise(grown):
    assert (large.lower < small.lower).all() and (small.upper < large.upper).all()


@pytest.mark.parametrize('name', ['mlp', 'convnet'])
def test_radius_0_is_the_forward_pass_up_to_rounding(name):
  layers, x = network(name), images(3)
  outputs = exact_outputs(layers, np.float64(x))
  for box in all_boxes(layers, x, 0.0, 'l2'):
    lower, upper = np.asarray(box.lower), np.asarray(box.upper)
    assert ((lower < outputs) & (outputs < upper)).all()
    np.testing.assert_allclose(lower, upper, atol=5e-4)


@oracles.in_float64
@pytest.mark.parametrize('norm', NORMS)
def test_linear_networks_are_exact(norm):
  rng = np.random.default_rng(6)
  x = jnp.asarray(rng.uniform(0.3, 0.7, size=(3, *SHAPE)))
  first, second = conv(rng, 1, 2, (2, 2), np.float64), dense(rng, 3 * 2 * 2, 4, np.float64)
  layers = (first, cert.Flatten(), second, dense(rng, 4, 3, np.float64))
  region = cert.ball(x, 0.2, norm=norm)
  box = oracles.quick_jit(unjitted_box, static_argnames='method')(layers, region, METHODS[2])
  outputs = cert.apply(layers, x)
  jacobian = jax.jacobian(lambda x: cert.apply(layers, x[None])[0])(x[0]).reshape(3, -1)
  order = 1 if norm == 'linf' else 2
  half = 0.2 * np.linalg.norm(jacobian, ord=order, axis=1)
  np.testing.assert_allclose(box.upper, outputs + half[None], rtol=1e-11)
  np.testing.assert_allclose(box.lower, outputs - half[None], rtol=1e-11)


def test_linf_balls_are_cut_with_the_pixel_box():
  layers = (cert.Dense(jnp.array([[1.0], [-1.0]]), jnp.zeros(1)),)
  box = cert.output_box(layers, cert.ball(jnp.array([[0.95, 0.02]]), 0.1))
  np.testing.assert_allclose([box.lower[0, 0], box.upper[0, 0]], [0.85 - 0.12, 1.0], atol=1e-5)


def test_examples_do_not_depend_on_each_other():
  layers, x, order = network('convnet'), images(3), np.array([2, 0, 1])
  radii = jnp.array([0.1, 0.02, 0.3])
  there = all_boxes(layers, x, radii, 'l2')
  back = all_boxes(layers, x[order], radii[order], 'l2')
  for box, permuted in zip(there, back, strict=True):
    np.testing.assert_allclose(box.lower[order], permuted.lower, rtol=1e-6, atol=1e-6)


def test_bounds_in_float32_hold_for_sums_that_cancel(monkeypatch):
  """Large weights, whose sums are a thousand times smaller than their terms."""
  rng = np.random.default_rng(7)
  layers = (dense(rng, 2000, 50), cert.ReLU(), dense(rng, 50, 20))
  layers = jax.tree.map(lambda leaf: 1e3 * leaf, layers)
  x = jnp.asarray(rng.uniform(size=(4, 2000)).astype(np.float32))
  with jax.enable_x64(True):
    doubles = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), (layers, x))
    outputs = np.stack([np.asarray(cert.apply(*doubles)), np.asarray(cert.apply(layers, x))])
  assert np.abs(outputs[0] - outputs[1]).max() > 0.0

  def boxes(layers):
    return [unjitted_box(layers, cert.ball(x, 0.0), method) for method in METHODS]

  assert violations(oracles.quick_jit(boxes)(layers), outputs) == 0.0
  monkeypatch.setattr(rounding, 'gamma', lambda num_terms, dtype: 0.0)
  without_slack = oracles.quick_jit(lambda layers: boxes(layers))(layers)
  assert violations(without_slack, outputs) > 0.1


@pytest.mark.long
def test_bounds_are_differentiable_in_the_weights():
  layers, x = network('mlp'), images(2)

  @oracles.quick_jit
  @jax.grad
  def gradient(layers):
    box = unjitted_box(layers, cert.ball(x, 0.05), METHODS[2])  # interval bounds are part of it
    return jnp.sum(box.upper - box.lower)

  for leaf in jax.tree.leaves(gradient(layers))[:-1]:  # the last bias moves both ends
    assert np.isfinite(leaf).all() and np.abs(leaf).max() > 0.0


def test_what_is_no_number_is_not_certified():
  layers, x = network('mlp'), images(4)
  labels = cert.apply(layers, x).argmax(axis=1)
  margins = cert.margins(layers, cert.ball(x, jnp.array([jnp.nan, jnp.inf, -0.1, 0.0])), labels)
  np.testing.assert_array_equal(margins > 0.0, [False, False, False, True])
  huge = jax.tree.map(lambda leaf: 1e30 * leaf, layers)  # overflows
  assert not (cert.margins(huge, cert.ball(x, jnp.zeros(4)), labels) > 0.0).any()


def test_arguments_are_checked():
  layers, x = network('mlp'), images(2)
  with pytest.raises(AssertionError, match='radius'):
    cert.ball(x, jnp.zeros(3))
  with pytest.raises(ValueError, match='norm'):
    cert.ball(x, 0.1, norm='l1')
  with pytest.raises(ValueError, match='bounds'):
    cert.ball(x, 0.1, bounds=(1.0, 0.0))
  with pytest.raises(AssertionError, match='x must'):
    cert.ball(jnp.zeros(3), 0.1)
  with pytest.raises(TypeError, match='cannot certify dict'):
    unjitted_box((*layers, {}), cert.ball(x, 0.1))
  with pytest.raises(AssertionError, match='wants inputs'):
    unjitted_box(layers[1:], cert.ball(x, 0.1))
  for shape in ((19,), (21,), (20, 1)):
    with pytest.raises(AssertionError, match=r'a Dense layer wants inputs \(20,\), got'):
      layers[1].out_shape(shape)
  convolution = conv(np.random.default_rng(0), 2, 3, (1, 1))
  for shape in ((5, 4, 1), (5, 4, 3), (5, 2), (5, 4, 2, 1)):
    with pytest.raises(AssertionError, match=r'a Conv layer wants inputs \(H, W, 2\), got'):
      convolution.out_shape(shape)
  with pytest.raises(ValueError, match='name'):
    cert.Method('milp')
  with pytest.raises(ValueError, match='slope_steps'):
    cert.Method('crown', -1)
  with pytest.raises(ValueError, match='no useful error bound'):
    rounding.gamma(10**6, jnp.float32)


def test_empty_arguments_are_refused():
  layers, x = network('conv'), images(2)
  rng, labels = np.random.default_rng(0), jnp.zeros(2, jnp.int32)
  empty = cert.Region(cert.Box(x[:0], x[:0]))
  for function in (cert.output_box, functools.partial(cert.margins, labels=labels[:0])):
    with pytest.raises(AssertionError, match=r'region must not be empty, got inputs \(0, '):
      function(layers, empty)
  with pytest.raises(AssertionError, match=r'Conv: .*, not empty, got \(3, 3, 1, 0\), \(0,\)'):
    cert.output_box((conv(rng, 1, 0, (1, 1)),), cert.ball(x, 0.1))
  with pytest.raises(AssertionError, match=r'Dense: .*, not empty, got \(3, 0\), \(0,\)'):
    cert.margins((*layers, dense(rng, 3, 0)), cert.ball(x, 0.1), labels)


def test_weights_and_bias_must_fit():
  x, size = images(2), np.prod(SHAPE)
  for shape, bias in (((size, 2), 1), ((size, 1), 2), ((size, 2, 2), 2), ((size,), size)):
    layer = cert.Dense(jnp.ones(shape), jnp.ones(bias))
    with pytest.raises(AssertionError, match=r'Dense: weights and bias must be \[K, N\], \[N\]'):
      cert.output_box((cert.Flatten(), layer), cert.ball(x, 0.1))
  for shape, bias in (((3, 3, 1, 2), 1), ((0, 3, 1, 2), 2), ((3, 1, 2), 2)):
    layer = cert.Conv(jnp.ones(shape), jnp.ones(bias), (1, 1))
    with pytest.raises(AssertionError, match=r'Conv: weights and bias must be \[K, .* \[O\]'):
      cert.output_box((layer,), cert.ball(x, 0.1))


def test_logits_and_labels_must_fit():
  layers, region = network('conv'), cert.ball(images(2), 0.1)
  for function in (cert.margins, cert.worst_logits):
    with pytest.raises(AssertionError, match=r'outputs must be logits \[B, K\], got \(2, '):
      function(layers[:2], region, jnp.zeros(2, jnp.int32))
    for shape in ((0,), (1,), (3,), (), (2, 1)):
      with pytest.raises(AssertionError, match=re.escape(f'labels must be [2], got {shape}')):
        function(layers, region, jnp.zeros(shape, jnp.int32))


@pytest.mark.parametrize('method', METHODS, ids=str)
def test_worst_logits_of_a_linear_layer_are_exact(method):
  """They are the differences at the corner of the box that is worst for each class."""
  layer, rng = dense(np.random.default_rng(7), 6, 4), np.random.default_rng(8)
  x = rng.uniform(0.3, 0.7, size=(5, 6)).astype(np.float32)
  labels = np.array([0, 1, 2, 3, 0])
  worst = cert.worst_logits((layer,), cert.ball(jnp.asarray(x), 0.1), jnp.asarray(labels), method)
  for n, label in enumerate(labels):
    rows = np.float64(layer.weights - layer.weights[:, [label]])
    offsets = layer.bias - layer.bias[label]
    expected = np.float64(x[n]) @ rows + 0.1 * np.abs(rows).sum(axis=0) + offsets
    np.testing.assert_allclose(worst[n], expected, atol=1e-4)
    assert worst[n, label] == 0.0
  margins = cert.margins((layer,), cert.ball(jnp.asarray(x), 0.1), jnp.asarray(labels), method)
  others = np.where(np.eye(4, dtype=bool)[labels], -np.inf, worst)
  np.testing.assert_array_equal(margins, -others.max(axis=1))
