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
from se_vae.models import cpu_ops

KERNEL_SIZE = 3
STRIDE = 2


class Dense(nn.Module):
  """A linear layer with its activation function, `[B, K]` to `[B, units]`.

  It has the parameters of `flax.linen.Dense`, and another form on a CPU (see `cpu_ops`).

  Attributes:
    units: the number of outputs.
    activation: an elementwise function of the outputs.
  """

  units: int
  activation: cpu_ops.Activation = cpu_ops.identity

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, K]` to `[B, units]`."""
    init = nn.initializers.lecun_normal()
    kernel = self.param('kernel', init, (x.shape[1], self.units), x.dtype)
    bias = self.param('bias', nn.initializers.zeros_init(), (self.units,), x.dtype)
    return cpu_ops.dense(x, kernel, bias, activation=self.activation)


class GaussianHead(nn.Module):
  """One linear layer from features to a Gaussian over D latents.

  Attributes:
    latent_dim: the latent dimension D.
    covariance: 'diagonal' (2 D units: mean and log-variance, the paper's) or 'full' (D units for
      the mean and D (D + 1) / 2 for a Cholesky factor with the exponential of its diagonal).
  """

  latent_dim: int
  covariance: str = 'diagonal'

  @nn.compact
  def __call__(self, features: jax.Array) -> Gaussian:
    """Features `[B, F]` to a Gaussian with means `[B, D]`."""
    dim = self.latent_dim
    if self.covariance not in COVARIANCES:
      raise ValueError(f'covariance must be one of {COVARIANCES}, got {self.covariance!r}')
    if self.covariance == 'diagonal':
      outputs = Dense(2 * dim)(features)
      # Not two slices: their gradients would meet in a sum of padded arrays, which is slow.
      return DiagonalGaussian(*jnp.split(outputs, 2, axis=-1))
    outputs = Dense(dim + dim * (dim + 1) // 2)(features)
    mean, log_var, below = jnp.split(outputs, (dim, 2 * dim), axis=-1)
    rows, columns = jnp.tril_indices(dim, -1)
    scale_tril = jnp.zeros((len(outputs), dim, dim), outputs.dtype)
    scale_tril = scale_tril.at[:, rows, columns].set(below)
    diagonal = jnp.arange(dim)
    scale_tril = scale_tril.at[:, diagonal, diagonal].set(jnp.exp(0.5 * log_var))
    return FullGaussian(mean, scale_tril)


class MLPEncoder(nn.Module):
  """Flattened pixels through ReLU layers of `hidden` units, then a `GaussianHead`."""

  latent_dim: int
  hidden: tuple[int, ...] = (200, 200, 200, 200)
  covariance: str = 'diagonal'

  @nn.compact
  def __call__(self, x: jax.Array) -> Gaussian:
    """Images `[B, H, W, C]` to a Gaussian with means `[B, D]`."""
    features = x.reshape(x.shape[0], -1)
    for units in self.hidden:
      features = Dense(units, nn.relu)(features)
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
  """A 3 x 3 convolution of stride 2 with its activation function, or its transpose.

  Attributes:
    channels: of the output.
    activation: an elementwise function of the outputs.
    transpose_to: (H, W) of the output of the transposed convolution; None for the convolution.
  """

  channels: int
  activation: cpu_ops.Activation = cpu_ops.identity
  transpose_to: tuple[int, int] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    """`[B, H, W, I]` to `[B, h, w, channels]`."""
    ends, init = (x.shape[3], self.channels), nn.initializers.lecun_normal()
    if self.transpose_to is not None:  # the kernel leads from the outputs to the inputs
      ends, init = ends[::-1], nn.initializers.lecun_normal(-1, -2)
    kernel = self.param('kernel', init, (KERNEL_SIZE, KERNEL_SIZE, *ends), x.dtype)
    bias = self.param('bias', nn.initializers.zeros_init(), (self.channels,), x.dtype)
    if self.transpose_to is None:
      return cpu_ops.conv(x, kernel, bias, stride=STRIDE, activation=self.activation)
    return cpu_ops.conv_transpose(
      x, kernel, bias, stride=STRIDE, image_size=self.transpose_to, activation=self.activation
    )


def feature_sizes(image_shape: tuple[int, int, int], num_layers: int) -> list[tuple[int, int]]:
  """Returns (H, W) of an image, and after each of `num_layers` convolutions of stride 2."""
  height, width, _ = image_shape
  sizes = [(height, width)]
  for _ in range(num_layers):
    height, width = (cpu_ops.output_size(size, STRIDE) for size in sizes[-1])
    sizes.append((height, width))
  return sizes


class ConvEncoder(nn.Module):
  """ReLU convolutions of stride 2, one for each of `channels`, then a `GaussianHead`."""

  latent_dim: int
  channels: tuple[int, ...] = (200, 200, 200, 200)
  covariance: str = 'diagonal'

  @nn.compact
  def __call__(self, x: jax.Array) -> Gaussian:
    """Images `[B, H, W, C]` to a Gaussian with means `[B, D]`."""
    for channels in self.channels:
      x = Conv(channels, nn.relu)(x)
    return GaussianHead(self.latent_dim, self.covariance)(x.reshape(x.shape[0], -1))


class ConvDecoder(nn.Module):
  """The mirror image of `ConvEncoder`, ending in sigmoid means of `image_shape` (H, W, C)."""

  image_shape: tuple[int, int, int]
  channels: tuple[int, ...] = (200, 200, 200, 200)

  @nn.compact
  def __call__(self, z: jax.Array) -> jax.Array:
    """Latents `[B, D]` to image means `[B, H, W, C]`."""
    *sizes, (height, width) = feature_sizes(self.image_shape, len(self.channels))
    features = nn.relu(nn.Dense(height * width * self.channels[-1])(z))
    x = features.reshape(z.shape[0], height, width, self.channels[-1])
    for size, channels in reversed(list(zip(sizes[1:], self.channels[:-1], strict=True))):
      x = Conv(channels, nn.relu, transpose_to=size)(x)
    return Conv(self.image_shape[2], nn.sigmoid, transpose_to=sizes[0])(x)
