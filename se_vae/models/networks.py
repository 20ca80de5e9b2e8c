"""Encoders and decoders (paper Sec. 7): MLPs of 4 x 200 ReLU units, and 4-layer ConvNets.

An encoder is any Flax module that maps images `[B, H, W, C]` in [0, 1] to a Gaussian over latents;
a decoder any that maps latents `[B, D]` to image means `[B, H, W, C]` in [0, 1]. Bring your own.
"""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from se_vae.config import COVARIANCES
from se_vae.gaussians import DiagonalGaussian, FullGaussian, Gaussian
from se_vae.models import convolutions, products

KERNEL_SIZE = 3
STRIDE = 2


class Dense(nn.Module):
  """A linear layer between features-major activations."""

  units: int

  @nn.compact
  def __call__(self, features: jax.Array) -> jax.Array:
    """`[K, B]` to `[units, B]`."""
    init = nn.initializers.lecun_normal()
    kernel = self.param('kernel', init, (features.shape[0], self.units), features.dtype)
    bias = self.param('bias', nn.initializers.zeros_init(), (self.units,), features.dtype)
    return products.product(kernel, features) + bias[:, None]


class GaussianHead(nn.Module):
  """Features-major `[F, B]` to a Gaussian over D latents, through one linear layer.

  Attributes:
    latent_dim: D.
    covariance: 'diagonal' (2 D units: mean and log-variance, the paper's) or 'full' (D units for
      the mean and D (D + 1) / 2 for a Cholesky factor with the exponential of its diagonal).
  """

  latent_dim: int
  covariance: str = 'diagonal'

  @nn.compact
  def __call__(self, features: jax.Array) -> Gaussian:
    """`[F, B]` to a Gaussian with means `[B, D]`."""
    dim = self.latent_dim
    if self.covariance not in COVARIANCES:
      raise ValueError(f'covariance must be one of {COVARIANCES}, got {self.covariance!r}')
    if self.covariance == 'diagonal':
      outputs = products.transposed(Dense(2 * dim)(features))
      # Not two slices: their gradients would meet in a sum of padded arrays, which is slow.
      return DiagonalGaussian(*jnp.split(outputs, 2, axis=-1))
    outputs = products.transposed(Dense(dim + dim * (dim + 1) // 2)(features))
    mean, half_log_var, below = jnp.split(outputs, (dim, 2 * dim), axis=-1)
    rows, columns = jnp.tril_indices(dim, -1)
    scale_tril = jnp.zeros((len(outputs), dim, dim), outputs.dtype)
    scale_tril = scale_tril.at[:, rows, columns].set(below)
    diagonal = jnp.arange(dim)
    scale_tril = scale_tril.at[:, diagonal, diagonal].set(jnp.exp(0.5 * half_log_var))
    return FullGaussian(mean, scale_tril)


class MLPEncoder(nn.Module):
  """Flattened pixels through ReLU layers of `hidden` units, then a `GaussianHead`."""

  latent_dim: int
  hidden: tuple[int, ...] = (200, 200, 200, 200)
  covariance: str = 'diagonal'

  @nn.compact
  def __call__(self, x: jax.Array) -> Gaussian:
    """Images `[B, H, W, C]` to a Gaussian with means `[B, D]`."""
    features = products.transposed(x.reshape(x.shape[0], -1))
    for units in self.hidden:
      features = nn.relu(Dense(units)(features))
    return GaussianHead(self.latent_dim, self.covariance)(features)


class MLPDecoder(nn.Module):
  """Latents through ReLU layers of `hidden` units to sigmoid means of `image_shape` (H, W, C)."""

  image_shape: tuple[int, int, int]
  hidden: tuple[int, ...] = (200, 200, 200, 200)

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Latents `[B, D]` to image means `[B, H, W, C]`."""
    for units in self.hidden:
      z = nn.relu(nn.Dense(units)(z))
    pixels = nn.Dense(math.prod(self.image_shape))(z)
    return nn.sigmoid(pixels).reshape(z.shape[0], *self.image_shape)


class Conv(nn.Module):
  """A 3 x 3 convolution of stride 2, or its transpose onto images of size `transpose_to`."""

  channels: int
  transpose_to: tuple[int, int] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[H, W, B, I]` to `[h, w, B, channels]`."""
    ends = (x.shape[3], self.channels)
    if self.transpose_to is not None:
      ends = ends[::-1]
    window = (KERNEL_SIZE, KERNEL_SIZE)
    init = nn.initializers.lecun_normal(*((-1, -2) if self.transpose_to is not None else (-2, -1)))
    kernel = self.param('kernel', init, (*window, *ends), x.dtype)
    bias = self.param('bias', nn.initializers.zeros_init(), (self.channels,), x.dtype)
    if self.transpose_to is not None:
      outputs = convolutions.conv_transpose(x, kernel, STRIDE, self.transpose_to)
    else:
      outputs = convolutions.conv(x, kernel, STRIDE)
    return outputs + bias.reshape(1, 1, 1, -1)


class ConvEncoder(nn.Module):
  """ReLU convolutions of stride 2, one for each of `channels`, then a `GaussianHead`."""

  latent_dim: int
  channels: tuple[int, ...] = (200, 200, 200, 200)
  covariance: str = 'diagonal'

  @nn.compact
  def __call__(self, x: jax.Array) -> Gaussian:
    """Images `[B, H, W, C]` to a Gaussian with means `[B, D]`."""
    batch_size = x.shape[0]
    x = x.transpose(1, 2, 0, 3)
    for channels in self.channels:
      x = nn.relu(Conv(channels)(x))
    features = x.transpose(2, 0, 1, 3).reshape(batch_size, -1)
    return GaussianHead(self.latent_dim, self.covariance)(products.transposed(features))


class ConvDecoder(nn.Module):
  """The mirror image of `ConvEncoder`, ending in sigmoid means of `image_shape` (H, W, C)."""

  image_shape: tuple[int, int, int]
  channels: tuple[int, ...] = (200, 200, 200, 200)

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Latents `[B, D]` to image means `[B, H, W, C]`."""
    height, width, image_channels = self.image_shape
    sizes = [(height, width)]  # of the images between the encoder's layers, from the input on
    for _ in self.channels:
      height, width = (convolutions.output_size(size, STRIDE) for size in sizes[-1])
      sizes.append((height, width))
    features = nn.Dense(height * width * self.channels[-1])(z)
    x = nn.relu(features).reshape(z.shape[0], height, width, self.channels[-1])
    x = x.transpose(1, 2, 0, 3)
    outputs = (image_channels, *self.channels[:-1])
    for size, channels in reversed(list(zip(sizes[:-1], outputs, strict=True))[1:]):
      x = nn.relu(Conv(channels, transpose_to=size)(x))
    x = nn.sigmoid(Conv(image_channels, transpose_to=sizes[0])(x))
    return x.transpose(2, 0, 1, 3)
