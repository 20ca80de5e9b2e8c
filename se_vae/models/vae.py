"""The model as pure functions: a pair of Flax modules, and parameters that are passed in."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.errors
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from se_vae.config import ARCHS, COVARIANCES, LARGEST_INT, ArgumentError, check_counts
from se_vae.gaussians import Gaussian
from se_vae.models import networks

# Each layer takes about 10 ms to trace. Without a limit, a wrong number in a file could take hours,
# or all memory.
_MOST_LAYERS = 1000

Params = Any  # {'encoder': pytree, 'decoder': pytree}


@dataclasses.dataclass(frozen=True, repr=False)
class VAE:
  """A variational autoencoder of two Flax Linen modules: encoder q(z | x), decoder mean g(z).

  Training and evaluation accept any hashable object with its methods `encode(params, x)` and
  `decode(params, z)`. A `VAE` is hashable, so that it can be a static argument of a jitted
  function. Its modules may be any with the signatures of `networks`, if they are functions of
  their parameters and their input alone.

  Attributes:
    encoder: module from images `[B, H, W, C]` to a `Gaussian` with means `[B, D]`.
    decoder: module from latents `[B, D]` to image means `[B, H, W, C]`.
    image_shape: (H, W, C).
    latent_dim: the latent dimension D.
  """

  encoder: nn.Module
  decoder: nn.Module
  image_shape: tuple[int, int, int]
  latent_dim: int

  def __repr__(self) -> str:
    encoder, decoder = type(self.encoder).__name__, type(self.decoder).__name__
    return f'VAE({encoder}, {decoder}, {self.image_shape}, {self.latent_dim} latents)'

  def init(self, key: jax.Array) -> Params:
    """Returns fresh parameters in float32: `{'encoder': ..., 'decoder': ...}`.

    Raises:
      ValueError: for a module that has variables besides its parameters, as batch statistics, or
        that draws random numbers, as dropout does.
    """
    encoder_key, decoder_key = jax.random.split(key)
    x = jnp.zeros((1, *self.image_shape), jnp.float32)
    z = jnp.zeros((1, self.latent_dim), jnp.float32)
    return {
      'encoder': _init('encoder', self.encoder, encoder_key, x),
      'decoder': _init('decoder', self.decoder, decoder_key, z),
    }

  def encode(self, params: Params, x: jax.Array) -> Gaussian:
    """Returns q(z | x) for images `[B, H, W, C]` in [0, 1]."""
    _check('x', x, self.image_shape)
    q: Gaussian = self.encoder.apply(params['encoder'], x)
    return q

  def decode(self, params: Params, z: jax.Array) -> jax.Array:
    """Returns the decoder mean g(z) `[B, H, W, C]` in [0, 1], for latents `[B, D]`."""
    _check('z', z, (self.latent_dim,))
    x_mean: jax.Array = self.decoder.apply(params['decoder'], z)
    return x_mean


def make_vae(
  image_shape: tuple[int, int, int],
  *,
  arch: str = 'mlp',
  latent_dim: int = 64,
  hidden_units: int = 200,
  conv_channels: int = 200,
  num_layers: int = 4,
  covariance: str = 'diagonal',
) -> VAE:
  """Returns one of the paper's models (Sec. 7).

  Example:
    >>> model = make_vae((28, 28, 1), latent_dim=32)
    >>> params = model.init(jax.random.key(0))
    >>> x = jnp.zeros((5, 28, 28, 1))
    >>> z = model.encode(params, x).mean
    >>> z.shape, model.decode(params, z).shape
    ((5, 32), (5, 28, 28, 1))

  Args:
    image_shape: (H, W, C).
    arch: 'mlp' or 'convnet'.
    latent_dim: D; the paper uses 32, 64 and 128.
    hidden_units: units of each layer of an MLP.
    conv_channels: channels of each layer of a ConvNet.
    num_layers: layers of the encoder before its head, and of the decoder; at most 1000.
    covariance: the encoder's, 'diagonal' (the paper's) or 'full'.

  Raises:
    ArgumentError: for an unknown arch or covariance, a size that is not an integer >= 1, more than
      1000 layers, or another size of 2**31 or more.
  """
  if arch not in ARCHS:
    raise ArgumentError('arch', f'must be one of {", ".join(ARCHS)}, got {arch!r}')
  if covariance not in COVARIANCES:
    raise ArgumentError(
      'covariance', f'must be one of {", ".join(COVARIANCES)}, got {covariance!r}'
    )
  check_counts(
    at_most=LARGEST_INT,
    latent_dim=latent_dim,
    hidden_units=hidden_units,
    conv_channels=conv_channels,
  )
  check_counts(at_most=_MOST_LAYERS, num_layers=num_layers)
  if np.shape(image_shape) != (3,):
    raise ArgumentError('image_shape', f'must be (H, W, C), got {image_shape}')
  image_shape = (*image_shape,)  # a list cannot be hashed
  for size in image_shape:
    check_counts(at_most=LARGEST_INT, image_shape=size)
  if arch == 'mlp':
    widths = (hidden_units,) * num_layers
    encoder: nn.Module = networks.MLPEncoder(latent_dim, widths, covariance)
    decoder: nn.Module = networks.MLPDecoder(image_shape, widths)
  else:
    channels = (conv_channels,) * num_layers
    encoder = networks.ConvEncoder(latent_dim, channels, covariance)
    decoder = networks.ConvDecoder(image_shape, channels)
  return VAE(encoder, decoder, image_shape, latent_dim)


def _check(name: str, array: jax.Array, shape: tuple[int, ...]) -> None:
  """Raises AssertionError unless this is a batch of floats, each row of the given shape."""
  floating = jnp.issubdtype(array.dtype, jnp.floating)
  if array.ndim == 0 or array.shape[1:] != shape or not array.shape[0] or not floating:
    wanted = ', '.join(map(str, ('B', *shape)))
    message = f'{name} must be [{wanted}], B >= 1, of floats, got {array.dtype} {array.shape}'
    raise AssertionError(message)


def _init(name: str, module: nn.Module, key: jax.Array, inputs: jax.Array) -> Any:
  """Returns a module's parameters, if it is a function of them and of its inputs alone."""
  variables = module.init(key, inputs)
  others = sorted(set(variables) - {'params'})
  if others:
    raise ValueError(
      f'{name} must have no variables but its parameters, got collection {", ".join(others)}'
    )
  try:
    jax.eval_shape(module.apply, variables, inputs)
  except flax.errors.InvalidRngError as error:
    raise ValueError(f'{name} must draw no random numbers, as dropout does: {error}') from None
  return variables


def num_parameters(params: Params) -> int:
  """Returns the number of scalars in a parameter tree."""
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))
