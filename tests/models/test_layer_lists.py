"""Layer lists compute what the networks compute; everything without a rule is refused by name."""

from __future__ import annotations

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import certification as cert
from se_vae import make_vae
from se_vae.models import layer_lists, networks, vae
from tests import oracles
from tests.models.test_networks import randomised

SHAPE = (9, 8, 2)
X = np.random.default_rng(0).uniform(size=(5, *SHAPE)).astype(np.float32)
SEQUENTIAL = nn.Sequential(
  [
    nn.Conv(3, (3, 2), strides=(1, 2), use_bias=False),
    nn.relu,
    networks.Conv(4, nn.relu),
    layer_lists.flatten,
    nn.Dense(7),
    nn.relu,
    nn.Sequential([networks.Dense(6, nn.relu), nn.Dense(5, use_bias=False)]),
    networks.GaussianHead(3),
  ]
)


def variables_of(module):
  return randomised(jax.eval_shape(module.init, jax.random.key(0), X), seed=1)


@pytest.mark.long
@pytest.mark.parametrize(
  'module',
  [networks.MLPEncoder(3, (6, 5)), networks.ConvEncoder(3, (4, 3)), SEQUENTIAL],
  ids=['mlp', 'convnet', 'sequential'],
)
def test_layers_compute_what_the_network_does(module):
  variables = variables_of(module)
  q = module.apply(variables, X)
  outputs = cert.apply(layer_lists.layers_of(module, variables), X)
  expected = np.concatenate([q.mean, q.log_var], axis=1)
  np.testing.assert_allclose(outputs, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
@pytest.mark.parametrize(
  'name',  # both rules of a convolution, for intervals and for lines, take part in the fast one
  [
    pytest.param('ibp', marks=pytest.mark.slow),
    'crown_ibp',
    pytest.param('crown', marks=pytest.mark.slow),
  ],
)
def test_our_convolutions_have_the_bounds_and_gradients_of_plain_ones(name):
  module = networks.ConvEncoder(3, (4, 3))
  ours = layer_lists.layers_of(module, variables_of(module))
  plain = tuple(
    cert.Conv(layer.weights, layer.bias, layer.strides) if isinstance(layer, cert.Conv) else layer
    for layer in ours
  )
  assert sum(type(layer) is layer_lists.Conv for layer in ours) == 2
  region = cert.ball(jnp.asarray(X), 0.1)

  @oracles.quick_jit
  @functools.partial(jax.value_and_grad, has_aux=True)
  def width_and_box(layers):
    box = cert.output_box(layers, region, cert.Method(name))
    return jnp.sum(box.half_width), box

  for a, b in zip(*map(jax.tree.leaves, map(width_and_box, (ours, plain))), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('arch', ['mlp', 'convnet'])
def test_an_encoder_has_a_head_for_means_and_one_for_log_variances(arch):
  model = make_vae(SHAPE, arch=arch, latent_dim=3, hidden_units=6, conv_channels=4, num_layers=2)
  params = {'encoder': variables_of(model.encoder)}
  encoder, q = layer_lists.encoder_of(model, params), model.encode(params, X)
  np.testing.assert_allclose(cert.apply(encoder.means(), X), q.mean, rtol=1e-5, atol=1e-5)
  log_var = cert.apply((*encoder.trunk, encoder.log_var), X)
  np.testing.assert_allclose(log_var, q.log_var, rtol=1e-5, atol=1e-5)
  both = np.concatenate([q.mean, q.log_var], axis=1)
  np.testing.assert_allclose(cert.apply(encoder.both(), X), both, rtol=1e-5, atol=1e-5)


def my_flatten(x):
  return x.reshape(len(x), -1)


class MyDense(nn.Dense):
  """A subclass may compute something else."""


@pytest.mark.parametrize(
  ('module', 'name'),
  [
    (nn.Sequential([my_flatten, nn.Dense(3)]), 'my_flatten'),
    (nn.Sequential([nn.Dense(3), nn.tanh]), 'tanh'),
    (nn.LayerNorm(), 'LayerNorm'),
    (MyDense(3), 'MyDense'),
    (networks.Dense(3, nn.gelu), 'gelu'),
    (networks.Conv(3, nn.relu, transpose_to=(3, 3)), 'transpose_to'),
    (networks.GaussianHead(3, 'full'), "covariance='full'"),
    (networks.MLPEncoder(3, (2,), 'full'), "covariance='full'"),
    (networks.ConvEncoder(3, (2,), 'full'), "covariance='full'"),
    (nn.Conv(3, (3, 3), padding='VALID'), 'padding=VALID'),
    (nn.Conv(3, (3, 3), kernel_dilation=2), 'kernel_dilation=2'),
    (nn.Conv(4, (3, 3), feature_group_count=2), 'feature_group_count=2'),
    (nn.Conv(3, (3,)), 'kernel_size'),
    (nn.Dense(3, dtype=jnp.bfloat16), 'dtype='),
  ],
)
def test_everything_else_is_refused_by_name(module, name):
  params = {'kernel': np.zeros((3, 3), np.float32), 'bias': np.zeros(3, np.float32)}
  with pytest.raises(TypeError, match=f'cannot certify .*{name}'):
    layer_lists.layers_of(module, {'params': {'layers_0': params, 'layers_1': params, **params}})


def test_a_layer_that_is_used_twice_has_its_parameters_twice():
  twice = nn.Dense(4)
  network = nn.Sequential([layer_lists.flatten, twice, nn.relu, twice, nn.Dense(2)])
  x = jax.random.normal(jax.random.key(0), (3, 2, 2, 1), jnp.float32)
  variables = network.init(jax.random.key(1), x)
  found = cert.apply(layer_lists.layers_of(network, variables), x)
  np.testing.assert_allclose(found, network.apply(variables, x), rtol=1e-5, atol=1e-6)


def test_the_head_of_an_encoder_may_lie_in_a_network_within_it():
  inner = nn.Sequential([networks.Dense(5, nn.relu), networks.GaussianHead(3)])
  module = nn.Sequential([layer_lists.flatten, inner])
  variables = variables_of(module)
  model = vae.VAE(module, None, SHAPE, 3)
  found = layer_lists.encoder_of(model, {'encoder': variables})
  mean = cert.apply((*found.trunk, found.mean), X)
  np.testing.assert_allclose(mean, module.apply(variables, X).mean, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
  ('encoder', 'name'),
  [
    (nn.Dense(3), 'Dense'),
    (nn.Sequential([]), 'Sequential'),
    (nn.Sequential([layer_lists.flatten, nn.Dense(3)]), 'Dense'),
  ],
)
def test_an_encoder_without_a_gaussian_is_refused(encoder, name):
  model = vae.VAE(encoder, None, SHAPE, 3)
  with pytest.raises(TypeError, match=f'cannot certify {name} as an encoder'):
    layer_lists.encoder_of(model, {'encoder': {}})
