"""Flax networks as lists of the layers that `certification` knows.

Each kind of module has a rule. A network that has anything else in it is refused, by the name of
what is not known: its certificate would be one of another network.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_vae import certification
from se_vae.certification import Layer
from se_vae.models import cpu_ops, networks
from se_vae.models.vae import VAE, Params

Layers = tuple[Layer, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Conv(certification.Conv):
  """A convolution of `networks`, with the product of `cpu_ops`, which is fast in a CPU's loops."""

  def product(self, x: jax.Array) -> jax.Array:
    """Returns `[B, h, w, O]`, the layer without its bias, for `[B, H, W, I]`."""
    bias = jnp.zeros(self.weights.shape[3:], x.dtype)
    with jax.default_matmul_precision('highest'):
      return cpu_ops.conv(x, self.weights, bias, stride=self.strides[0])


def flatten(x: jax.Array) -> jax.Array:
  """Returns `[B, ...]` as `[B, F]`: the one function that a `Sequential` may flatten with."""
  return x.reshape(len(x), -1)


def layers_of(module: Any, variables: Any) -> Layers:
  """Returns the layers of a Flax network.

  Example:
    >>> network = nn.Sequential([flatten, nn.Dense(5), nn.relu, nn.Dense(2)])
    >>> variables = network.init(jax.random.key(0), jnp.zeros((1, 4, 4, 1)))
    >>> print([type(layer).__name__ for layer in layers_of(network, variables)])
    ['Flatten', 'Dense', 'ReLU', 'Dense']

  Args:
    module: an `MLPEncoder`, `ConvEncoder`, `Dense`, `Conv` or diagonal `GaussianHead` of
      `networks`, `flax.linen.Dense` or `Conv`, `nn.relu`, `flatten`, or a
      `flax.linen.Sequential` of these. The last layer of a Gaussian's network gives means and
      log-variances side by side.
    variables: its variables, `{'params': ...}`.

  Raises:
    TypeError: for anything else, by its name.
  """
  return _rule(module)(module, variables.get('params', {}))


def encoder_of(model: Any, params: Params) -> certification.Encoder:
  """Returns the encoder of a `VAE` as layers.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> encoder_of(model, model.init(jax.random.key(0))).mean.weights.shape
    (200, 3)

  Args:
    model: a `VAE` whose encoder is a network for `layers_of` that ends in a diagonal
      `GaussianHead`. A subclass must not have an `encode` of its own.
    params: its parameters, `{'encoder': ..., ...}`.

  Raises:
    TypeError: for another model, and for an encoder with something that has no rule, by its name.
  """
  if getattr(type(model), 'encode', None) is not VAE.encode:
    raise TypeError(f'cannot certify {_name(model)}: its encode may be more than its encoder')
  module = getattr(model, 'encoder', None)
  last = module
  while isinstance(last, nn.Sequential) and last.layers:
    last = last.layers[-1]
  if not isinstance(last, (networks.MLPEncoder, networks.ConvEncoder, networks.GaussianHead)):
    raise TypeError(
      f'cannot certify {_name(last)} as an encoder: it does not end in a GaussianHead'
    )
  *trunk, head = layers_of(module, params['encoder'])
  assert isinstance(head, certification.Dense)
  means, log_vars = (jnp.split(leaf, 2, axis=-1) for leaf in (head.weights, head.bias))
  mean, log_var = map(certification.Dense, means, log_vars)
  return certification.Encoder(tuple(trunk), mean, log_var)


def _rule(module: Any) -> Callable[[Any, Any], Layers]:
  """Returns the rule for exactly this type, since a subclass may compute something else."""
  if module is nn.relu or module is jax.nn.relu:
    return lambda module, params: (certification.ReLU(),)
  if module is flatten:
    return lambda module, params: (certification.Flatten(),)
  if type(module) not in _RULES:
    known = ', '.join(sorted({kind.__name__ for kind in _RULES}))
    raise TypeError(f'cannot certify {_name(module)}: known are {known}, nn.relu and flatten')
  return _RULES[type(module)]


def _name(module: Any) -> str:
  return getattr(module, '__name__', type(module).__name__)


def _sequential(module: nn.Sequential, params: Any) -> Layers:
  # Flax keeps the parameters of a module that is used again at its first place.
  first: dict[int, int] = {}
  for i, part in enumerate(module.layers):
    first.setdefault(id(part), i)
  parts = ((part, params.get(f'layers_{first[id(part)]}', {})) for part in module.layers)
  return sum((_rule(part)(part, own) for part, own in parts), ())


def _mlp_encoder(module: networks.MLPEncoder, params: Any) -> Layers:
  _check_diagonal(module)
  layers: Layers = (certification.Flatten(),)
  for i in range(len(module.hidden)):
    layers += (_dense(params[f'Dense_{i}']), certification.ReLU())
  return (*layers, _dense(params['GaussianHead_0']['Dense_0']))


def _conv_encoder(module: networks.ConvEncoder, params: Any) -> Layers:
  _check_diagonal(module)
  layers: Layers = ()
  for i in range(len(module.channels)):
    layers += (_own_product(params[f'Conv_{i}']), certification.ReLU())
  return (*layers, certification.Flatten(), _dense(params['GaussianHead_0']['Dense_0']))


def _gaussian_head(module: networks.GaussianHead, params: Any) -> Layers:
  _check_diagonal(module)
  return (_dense(params['Dense_0']),)


def _own_dense(module: networks.Dense, params: Any) -> Layers:
  return (_dense(params), *_activation(module))


def _own_conv(module: networks.Conv, params: Any) -> Layers:
  if module.transpose_to is not None:
    raise TypeError('cannot certify a Conv with transpose_to')
  return (_own_product(params), *_activation(module))


def _flax_dense(module: nn.Dense, params: Any) -> Layers:
  _check_plain(module, nn.Dense(module.features, use_bias=module.use_bias))
  return (_dense(params),)


def _flax_conv(module: nn.Conv, params: Any) -> Layers:
  plain = nn.Conv(
    module.features, module.kernel_size, strides=module.strides, use_bias=module.use_bias
  )
  _check_plain(module, plain)
  size = module.kernel_size
  if isinstance(size, int) or len(size) != 2:
    raise TypeError(f'cannot certify a Conv with kernel_size={size}: it must have two sizes')
  strides = module.strides or 1
  return (_conv(params, (strides, strides) if isinstance(strides, int) else tuple(strides)),)


_RULES: dict[type, Callable[[Any, Any], Layers]] = {
  networks.Conv: _own_conv,
  networks.ConvEncoder: _conv_encoder,
  networks.Dense: _own_dense,
  networks.GaussianHead: _gaussian_head,
  networks.MLPEncoder: _mlp_encoder,
  nn.Conv: _flax_conv,
  nn.Dense: _flax_dense,
  nn.Sequential: _sequential,
}


def _dense(params: Any) -> certification.Dense:
  return certification.Dense(params['kernel'], _bias(params))


def _conv(params: Any, strides: tuple[int, int]) -> certification.Conv:
  return certification.Conv(params['kernel'], _bias(params), strides)


def _own_product(params: Any) -> Conv:
  return Conv(params['kernel'], _bias(params), (networks.STRIDE, networks.STRIDE))


def _bias(params: Any) -> jax.Array:
  kernel = params['kernel']
  return params.get('bias', jnp.zeros(kernel.shape[-1:], kernel.dtype))


def _activation(module: networks.Dense | networks.Conv) -> Layers:
  if module.activation is cpu_ops.identity:
    return ()
  return _rule(module.activation)(module.activation, {})


def _check_diagonal(module: Any) -> None:
  if module.covariance != 'diagonal':
    raise TypeError(f'cannot certify {_name(module)} with covariance={module.covariance!r}')


# What changes what a Flax layer computes; initialisers do not.
_COMPUTED = (
  'dtype',
  'precision',
  'promote_dtype',
  'dot_general',
  'dot_general_cls',
  'padding',
  'input_dilation',
  'kernel_dilation',
  'feature_group_count',
  'mask',
  'conv_general_dilated',
  'conv_general_dilated_cls',
)


def _check_plain(module: nn.Module, plain: nn.Module) -> None:
  """Raises TypeError if an attribute that changes what a layer computes is not the default."""
  for name in _COMPUTED:
    value = getattr(module, name, None)
    if value != getattr(plain, name, None):
      raise TypeError(f'cannot certify {_name(module)} with {name}={value}')
