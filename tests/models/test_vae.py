"""The model: its configuration, its checks, and modules that are not the library's."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import gaussians
from se_vae.models import networks, vae

SHAPE = (4, 3, 2)


def tiny(arch: str = 'mlp', **changes) -> vae.VAE:
  options = dict(arch=arch, latent_dim=3, hidden_units=5, conv_channels=4, num_layers=2)
  return vae.make_vae(SHAPE, **options | changes)


def drawn(model: vae.VAE):
  """Parameters drawn by NumPy, which is quicker than compiling the initialisers."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: (rng.normal(size=leaf.shape) / len(leaf) ** 0.5).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )


@pytest.mark.parametrize('covariance', networks.COVARIANCES)
@pytest.mark.parametrize('arch', vae.ARCHS)
def test_images_go_to_a_gaussian_and_latents_to_images(arch, covariance):
  model = tiny(arch, covariance=covariance)
  x = np.random.default_rng(0).uniform(size=(2, *SHAPE)).astype(np.float32)

  @jax.jit
  def through(params, x):
    q = model.encode(params, x)
    return q, model.decode(params, q.mean)

  q, x_mean = through(drawn(model), x)
  family = {'diagonal': gaussians.DiagonalGaussian, 'full': gaussians.FullGaussian}[covariance]
  assert isinstance(q, family)
  assert q.mean.shape == (2, 3)
  assert x_mean.shape == (2, *SHAPE)
  assert x_mean.min() > 0.0 and x_mean.max() < 1.0


@pytest.mark.parametrize(('latent_dim', 'encoder_outputs'), [(32, 64), (64, 128), (128, 256)])
def test_paper_model_has_the_parameters_counted_by_hand(latent_dim, encoder_outputs):
  params = jax.eval_shape(vae.make_vae((28, 28, 1), latent_dim=latent_dim).init, jax.random.key(0))
  encoder = 784 * 200 + 200 + 3 * 40_200 + 200 * encoder_outputs + encoder_outputs
  decoder = latent_dim * 200 + 200 + 3 * 40_200 + 200 * 784 + 784
  assert vae.num_parameters(params['encoder']) == encoder
  assert vae.num_parameters(params) == encoder + decoder


def test_full_covariance_adds_the_entries_below_the_diagonal():
  diagonal, full = (
    vae.num_parameters(jax.eval_shape(tiny(covariance=name).init, jax.random.key(0)))
    for name in networks.COVARIANCES
  )
  assert full - diagonal == (5 + 1) * 3 * 2 // 2


def test_parameters_depend_on_the_key_alone():
  model = tiny()
  init = jax.jit(model.init)
  first, again, other = (init(jax.random.key(seed)) for seed in (0, 0, 1))
  jax.tree.map(np.testing.assert_array_equal, first, again)
  kernels = [params['encoder']['params']['Dense_1']['kernel'] for params in (first, other)]
  assert np.abs(kernels[0] - kernels[1]).max() > 0.1
  # The encoder and the decoder draw from different keys.
  assert not np.array_equal(kernels[0], first['decoder']['params']['Dense_1']['kernel'])


def test_equal_configurations_are_one_compilation():
  traces = []

  @functools.partial(jax.jit, static_argnames='model')
  def encode(model, params, x):
    traces.append(model)
    return model.encode(params, x)

  x = jnp.zeros((2, *SHAPE), jnp.float32)
  for _ in range(2):
    model = tiny()
    encode(model, drawn(model), x)
  assert tiny() == tiny() and hash(tiny()) == hash(tiny())
  assert len(traces) == 1
  other = tiny(latent_dim=2)
  encode(other, drawn(other), x)
  assert len(traces) == 2


@pytest.mark.parametrize(
  'change',
  [
    {'arch': 'convnet'},
    {'latent_dim': 4},
    {'hidden_units': 6},
    {'num_layers': 3},
    {'covariance': 'full'},
  ],
)
def test_different_configurations_are_different_models(change):
  assert tiny(**change) != tiny()


def test_sizes_of_the_other_architecture_do_not_matter():
  assert tiny(conv_channels=9) == tiny()
  assert tiny('convnet', hidden_units=9) == tiny('convnet')


class RadialEncoder(nn.Module):
  """A user's encoder, which is not built of the library's parts."""

  @nn.compact
  def __call__(self, x):
    scale = self.param('scale', nn.initializers.ones, (2,), jnp.float32)
    brightness = jnp.mean(x, axis=(1, 2, 3))[:, None]
    mean = brightness * scale[None]
    return gaussians.DiagonalGaussian(mean, jnp.zeros_like(mean))


def test_any_flax_module_will_do():
  model = vae.VAE(RadialEncoder(), networks.MLPDecoder(SHAPE, (4,)), SHAPE, 2)
  params = model.init(jax.random.key(0))
  q = model.encode(params, jnp.full((3, *SHAPE), 0.25, jnp.float32))
  np.testing.assert_array_equal(q.mean, np.full((3, 2), 0.25))
  assert model.decode(params, q.mean).shape == (3, *SHAPE)
  assert hash(model) == hash(vae.VAE(RadialEncoder(), networks.MLPDecoder(SHAPE, (4,)), SHAPE, 2))


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'arch': 'resnet'}, "arch: must be one of mlp, convnet, got 'resnet'"),
    ({'covariance': 'banded'}, "covariance: must be one of .* got 'banded'"),
    ({'latent_dim': 0}, 'latent_dim: must be >= 1, got 0'),
    ({'latent_dim': 2.5}, 'latent_dim: must be an integer, got 2.5'),
    ({'hidden_units': 0}, '>= 1'),
    ({'conv_channels': -1}, '>= 1'),
    ({'num_layers': 0}, '>= 1'),
    ({'conv_channels': 2**31}, 'conv_channels: must be <= 2147483647'),
    ({'num_layers': 2**40}, f'num_layers: must be <= 1000, got {2**40}'),
  ],
)
def test_wrong_configurations_raise(change, message):
  with pytest.raises(ValueError, match=message):
    tiny(**change)


def test_empty_images_raise():
  with pytest.raises(ValueError, match='image_shape'):
    vae.make_vae((28, 0, 1))
  for shape in (28, (28, 28), (28, 28, None)):
    with pytest.raises(ValueError, match='image_shape: must be'):
      vae.make_vae(shape)


def test_images_of_sizes_beyond_32_bits_raise():
  with pytest.raises(ValueError, match='image_shape: must be <= 2147483647, got 2147483648'):
    vae.make_vae((28, 2**31, 1))


def test_a_list_of_sizes_is_a_shape():
  assert vae.make_vae([4, 3, 2]) == vae.make_vae((4, 3, 2))


def test_a_model_is_shown_in_one_line():
  assert repr(tiny()) == 'VAE(MLPEncoder, MLPDecoder, (4, 3, 2), 3 latents)'


def test_wrong_shapes_raise():
  model = tiny()
  params = jax.eval_shape(model.init, jax.random.key(0))
  for shape in [(2, 3, 4, 2), (4, 3, 2), (2, 4, 3), (2, 4, 3, 1), (2, 24)]:
    with pytest.raises(AssertionError, match=r'x must be \[B, 4, 3, 2\]'):
      model.encode(params, jnp.zeros(shape))
  for shape in [(2, 4), (3,), (2, 1, 3)]:
    with pytest.raises(AssertionError, match=r'z must be \[B, 3\]'):
      model.decode(params, jnp.zeros(shape))
  with pytest.raises(AssertionError, match=r'x must be .* of floats, got uint8 \(2, 4, 3, 2\)'):
    model.encode(params, jnp.zeros((2, 4, 3, 2), jnp.uint8))
  with pytest.raises(AssertionError, match=r'z must be .* of floats, got int32 \(2, 3\)'):
    model.decode(params, jnp.zeros((2, 3), jnp.int32))


class RandomEncoder(RadialEncoder):
  """It drops inputs at random."""

  @nn.compact
  def __call__(self, x):
    mean = nn.Dropout(0.5, deterministic=False)(jnp.mean(x, axis=(1, 2)))
    return gaussians.DiagonalGaussian(mean, jnp.zeros_like(mean))


class NormalisedDecoder(nn.Module):
  """It keeps statistics of its batches."""

  @nn.compact
  def __call__(self, z):
    z = nn.BatchNorm(use_running_average=False)(z)
    return nn.sigmoid(nn.Dense(24)(z)).reshape(-1, *SHAPE)


def test_random_and_stateful_modules_are_refused():
  decoder = networks.MLPDecoder(SHAPE, (4,))
  with pytest.raises(ValueError, match=r'encoder must draw no random numbers.*dropout'):
    vae.VAE(RandomEncoder(), decoder, SHAPE, 2).init(jax.random.key(0))
  with pytest.raises(ValueError, match=r'decoder must have no variables .* collection batch_stats'):
    vae.VAE(RadialEncoder(), NormalisedDecoder(), SHAPE, 2).init(jax.random.key(0))
