"""Shapes and sizes by hand, forward passes against NumPy and Flax's own layers, the two heads."""

from __future__ import annotations

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import gaussians
from se_vae.models import networks

GRAY = (28, 28, 1)
COLOR = (32, 32, 3)
ODD = (13, 9, 2)


def shapes_of(module: nn.Module, *shape: int):
  """The shapes of a module's parameters, without the cost of drawing them."""
  return jax.eval_shape(module.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))


def randomised(params, seed: int, scale: float = 1.0):
  """Parameters of the same shapes with nothing zero, biases included."""
  rng = np.random.default_rng(seed)
  return jax.tree.map(
    lambda leaf: (scale * rng.normal(size=leaf.shape)).astype(np.float32) / len(leaf) ** 0.5, params
  )


def dense(layer, features: np.ndarray) -> np.ndarray:
  return features @ np.float64(layer['kernel']) + np.float64(layer['bias'])


def count(params) -> int:
  return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(params))


@pytest.mark.parametrize('shape', [GRAY, COLOR, ODD])
@pytest.mark.parametrize('arch', ['mlp', 'convnet'])
def test_shapes_of_encodings_and_images(arch, shape):
  sizes = (5, 6, 7)
  if arch == 'mlp':
    encoder, decoder = networks.MLPEncoder(3, sizes), networks.MLPDecoder(shape, sizes)
  else:
    encoder, decoder = networks.ConvEncoder(3, sizes), networks.ConvDecoder(shape, sizes)
  x = jax.ShapeDtypeStruct((2, *shape), jnp.float32)
  q = jax.eval_shape(lambda x: encoder.init_with_output(jax.random.key(0), x)[0], x)
  assert q.mean.shape == q.log_var.shape == (2, 3)
  z = jax.ShapeDtypeStruct((2, 3), jnp.float32)
  images = jax.eval_shape(lambda z: decoder.init_with_output(jax.random.key(0), z)[0], z)
  assert images.shape == (2, *shape)
  assert images.dtype == q.mean.dtype == jnp.float32


@pytest.mark.parametrize('latent_dim', [32, 64, 128])
def test_paper_mlp_has_four_layers_of_200_and_heads_of_64_128_256(latent_dim):
  encoder = shapes_of(networks.MLPEncoder(latent_dim), 1, *GRAY)['params']
  hidden = (784 * 200 + 200) + 3 * (200 * 200 + 200)
  assert count(encoder) == hidden + (200 * 2 * latent_dim + 2 * latent_dim)
  head = encoder['GaussianHead_0']['Dense_0']['kernel'].shape
  assert head == (200, {32: 64, 64: 128, 128: 256}[latent_dim])
  decoder = shapes_of(networks.MLPDecoder(GRAY), 1, latent_dim)['params']
  hidden = (latent_dim * 200 + 200) + 3 * (200 * 200 + 200)
  assert count(decoder) == hidden + (200 * 784 + 784)


@pytest.mark.parametrize(
  # Sides of 28, 14, 7, 4, 2; of 32, 16, 8, 4, 2; of 13, 7, 4, 2, 1 by 9, 5, 3, 2, 1.
  ('shape', 'last_size'),
  [(GRAY, 2 * 2), (COLOR, 2 * 2), (ODD, 1)],
)
def test_paper_convnet_has_four_layers_of_200_channels(shape, last_size):
  channels, features = shape[2], last_size * 200
  encoder = shapes_of(networks.ConvEncoder(64), 1, *shape)['params']
  layers = (9 * channels * 200 + 200) + 3 * (9 * 200 * 200 + 200)
  assert count(encoder) == layers + (features * 128 + 128)
  decoder = shapes_of(networks.ConvDecoder(shape), 1, 64)['params']
  layers = 3 * (9 * 200 * 200 + 200) + (9 * 200 * channels + channels)
  assert count(decoder) == (64 * features + features) + layers


@pytest.mark.parametrize(
  ('shape', 'sizes'),
  [
    (GRAY, [(4, 4), (7, 7), (14, 14), (28, 28)]),
    (COLOR, [(4, 4), (8, 8), (16, 16), (32, 32)]),
    (ODD, [(2, 2), (4, 3), (7, 5), (13, 9)]),
    ((1, 3, 1), [(1, 1), (1, 1), (1, 2), (1, 3)]),
  ],
)
def test_conv_decoder_mirrors_the_encoder(shape, sizes):
  channels = (5, 6, 7, 8)
  decoder, encoder = networks.ConvDecoder(shape, channels), networks.ConvEncoder(3, channels)

  def layers(module, inputs):
    key = jax.random.key(0)
    _, state = module.init_with_output(key, inputs, capture_intermediates=True)
    found = state['intermediates']
    return [found[f'Conv_{i}']['__call__'][0] for i in range(len(channels))]

  z, x = (jnp.zeros((1, *size), jnp.float32) for size in ((3,), shape))
  shapes = lambda *args: [layer.shape for layer in jax.eval_shape(lambda: layers(*args))]  # noqa: E731
  decoded, encoded = (
    [(h, w, c) for _, h, w, c in shapes(*args)] for args in ((decoder, z), (encoder, x))
  )
  assert [layer[:2] for layer in decoded] == sizes
  assert [layer[2] for layer in decoded] == [7, 6, 5, shape[2]]
  assert [shape, *encoded[:-1]] == decoded[::-1]


def test_mlp_is_the_written_network():
  rng = np.random.default_rng(0)
  x, z = rng.uniform(size=(3, 4, 3, 2)), rng.normal(size=(3, 2))
  encoder, decoder = networks.MLPEncoder(2, (6, 5)), networks.MLPDecoder((4, 3, 2), (5, 6))
  encoder_params = randomised(shapes_of(encoder, 1, 4, 3, 2), 1)
  decoder_params = randomised(shapes_of(decoder, 1, 2), 2)

  layers = encoder_params['params']
  features = np.maximum(dense(layers['Dense_0'], x.reshape(3, -1)), 0.0)
  features = np.maximum(dense(layers['Dense_1'], features), 0.0)
  outputs = dense(layers['GaussianHead_0']['Dense_0'], features)
  q = jax.jit(encoder.apply)(encoder_params, jnp.float32(x))
  # float32 against float64, through three layers of numbers of size one.
  np.testing.assert_allclose(q.mean, outputs[:, :2], rtol=1e-5, atol=1e-5)
  np.testing.assert_allclose(q.log_var, outputs[:, 2:], rtol=1e-5, atol=1e-5)

  layers = decoder_params['params']
  features = np.maximum(dense(layers['Dense_0'], z), 0.0)
  features = np.maximum(dense(layers['Dense_1'], features), 0.0)
  means = 1.0 / (1.0 + np.exp(-dense(layers['Dense_2'], features)))
  actual = jax.jit(decoder.apply)(decoder_params, jnp.float32(z))
  np.testing.assert_allclose(actual, means.reshape(3, 4, 3, 2), rtol=1e-5, atol=1e-5)


class FlaxEncoder(nn.Module):
  """`ConvEncoder` in Flax's own layers."""

  @nn.compact
  def __call__(self, x):
    for channels in (4, 5):
      x = nn.relu(nn.Conv(channels, (3, 3), strides=2, padding='SAME')(x))
    return nn.Dense(4)(x.reshape(len(x), -1))


class FlaxDecoder(nn.Module):
  """`ConvDecoder` in Flax's own layers, whose images have sides that are multiples of 4."""

  @nn.compact
  def __call__(self, z):
    def transpose(channels):
      return nn.ConvTranspose(channels, (3, 3), strides=(2, 2), transpose_kernel=True)

    x = nn.relu(nn.Dense(2 * 3 * 5)(z)).reshape(-1, 2, 3, 5)
    x = nn.relu(transpose(4)(x))
    return nn.sigmoid(transpose(2)(x))


def test_convnet_is_the_network_of_flax_layers():
  rng = np.random.default_rng(0)
  x, z = rng.uniform(size=(3, 8, 12, 2)), rng.normal(size=(3, 2))
  x, z = jnp.float32(x), jnp.float32(z)
  encoder, decoder = networks.ConvEncoder(2, (4, 5)), networks.ConvDecoder((8, 12, 2), (4, 5))

  params = randomised(shapes_of(encoder, 1, 8, 12, 2), 3)['params']
  theirs = {name: params[name] for name in ('Conv_0', 'Conv_1')}
  theirs['Dense_0'] = params['GaussianHead_0']['Dense_0']
  q = jax.jit(encoder.apply)({'params': params}, x)
  expected = jax.jit(FlaxEncoder().apply)({'params': theirs}, x)
  # The same float32 sums, of up to 45 terms of size one, in another order.
  np.testing.assert_allclose(
    jnp.concatenate([q.mean, q.log_var], axis=-1), expected, rtol=1e-4, atol=1e-4
  )

  params = randomised(shapes_of(decoder, 1, 2), 4)['params']
  theirs = {'Dense_0': params['Dense_0']} | {
    f'ConvTranspose_{i}': params[f'Conv_{i}'] for i in range(2)
  }
  actual = jax.jit(decoder.apply)({'params': params}, z)
  expected = jax.jit(FlaxDecoder().apply)({'params': theirs}, z)
  np.testing.assert_allclose(actual, expected, rtol=1e-4, atol=1e-4)
  assert np.std(actual) > 0.1


@pytest.mark.parametrize('arch', ['mlp', 'convnet'])
def test_decoded_pixels_stay_in_bounds_when_saturated(arch):
  shape, sizes = (5, 6, 2), (4, 4)
  make = networks.MLPDecoder if arch == 'mlp' else networks.ConvDecoder
  decoder = make(shape, sizes)
  params = randomised(shapes_of(decoder, 1, 3), 5, scale=100.0)
  z = 100.0 * jax.random.normal(jax.random.key(1), (4, 3), jnp.float32)
  images = jax.jit(decoder.apply)(params, z)
  assert images.min() == 0.0 and images.max() == 1.0  # so that NaN fails too


@pytest.mark.parametrize('shape', [(4, 3, 1), (8, 8, 3)])
@pytest.mark.parametrize('arch', ['mlp', 'convnet'])
def test_examples_do_not_mix(arch, shape):
  sizes = (4, 4)
  if arch == 'mlp':
    encoder, decoder = networks.MLPEncoder(2, sizes), networks.MLPDecoder(shape, sizes)
  else:
    encoder, decoder = networks.ConvEncoder(2, sizes), networks.ConvDecoder(shape, sizes)
  for module, inputs in ((encoder, (3, *shape)), (decoder, (3, 2))):
    params = randomised(shapes_of(module, *inputs), 6)
    x = np.random.default_rng(7).uniform(size=inputs).astype(np.float32)
    changed = x.copy()
    changed[1] = 1.0 - changed[1]
    apply = jax.jit(module.apply)
    for before, after in zip(
      jax.tree.leaves(apply(params, x)), jax.tree.leaves(apply(params, changed)), strict=True
    ):
      before, after = np.asarray(before), np.asarray(after)
      np.testing.assert_array_equal(before[[0, 2]], after[[0, 2]])
      assert np.abs(before[1] - after[1]).max() > 1e-4


def head_outputs(outputs: np.ndarray, latent_dim: int, covariance: str):
  """The head's Gaussian for given outputs of its linear layer, which is made the identity."""
  head = networks.GaussianHead(latent_dim, covariance)
  identity = {'kernel': jnp.eye(outputs.shape[1]), 'bias': jnp.zeros(outputs.shape[1])}
  return jax.jit(head.apply)({'params': {'Dense_0': identity}}, jnp.asarray(outputs, jnp.float32))


def test_diagonal_head_gives_means_then_log_variances():
  outputs = np.arange(6, dtype=np.float32).reshape(1, 6)
  q = head_outputs(outputs, 3, 'diagonal')
  assert isinstance(q, gaussians.DiagonalGaussian)
  np.testing.assert_array_equal(q.mean, [[0, 1, 2]])
  np.testing.assert_array_equal(q.log_var, [[3, 4, 5]])


def test_full_head_gives_a_cholesky_factor():
  outputs = np.random.default_rng(0).normal(size=(2, 9))
  q = head_outputs(outputs, 3, 'full')
  assert isinstance(q, gaussians.FullGaussian)
  np.testing.assert_allclose(q.mean, outputs[:, :3], rtol=1e-6)
  for row, factor in zip(outputs, np.asarray(q.scale_tril), strict=True):
    sd, below = np.exp(row[3:6] / 2.0), row[6:]
    expected = [[sd[0], 0.0, 0.0], [below[0], sd[1], 0.0], [below[1], below[2], sd[2]]]
    np.testing.assert_allclose(factor, expected, rtol=1e-6)


@pytest.mark.parametrize('make', [networks.MLPEncoder, networks.ConvEncoder])
def test_full_covariance_encoders_give_lower_triangles_with_positive_diagonals(make):
  encoder = make(4, (5, 5), 'full')
  params = randomised(shapes_of(encoder, 1, 6, 5, 1), 1)
  assert params['params']['GaussianHead_0']['Dense_0']['bias'].shape == (4 + 4 * 5 // 2,)
  x = np.random.default_rng(2).uniform(size=(3, 6, 5, 1)).astype(np.float32)
  q = jax.jit(encoder.apply)(params, x)
  factor = np.asarray(q.scale_tril)
  assert factor.shape == (3, 4, 4)
  np.testing.assert_array_equal(np.triu(factor, 1), 0.0)
  assert (np.diagonal(factor, axis1=1, axis2=2) > 0.0).all()
  assert (factor[:, *np.tril_indices(4, -1)] != 0.0).all()


def test_one_latent_has_no_covariances():
  q = head_outputs(np.array([[0.5, 2.0]]), 1, 'full')
  np.testing.assert_allclose(q.scale_tril, [[[np.exp(1.0)]]], rtol=1e-6)


def test_unknown_covariance_raises():
  with pytest.raises(ValueError, match='covariance must be one of'):
    shapes_of(networks.MLPEncoder(2, (3,), 'banded'), 1, *GRAY)


def test_kernels_start_with_the_variance_of_their_fan_in():
  """Fan-in of 9 input channels times 60: the features are of the size of the inputs."""
  for target in (None, (3, 3)):
    conv = networks.Conv(50, transpose_to=target)
    kernel = jax.jit(conv.init)(jax.random.key(0), jnp.zeros((1, 2, 2, 60)))['params']['kernel']
    # 27,000 draws from a normal law cut at two deviations: the standard error of the mean square
    # is below sqrt(2 / 27,000), 1 %.
    np.testing.assert_allclose(np.mean(np.square(kernel)), 1.0 / (9 * 60), rtol=0.04)
