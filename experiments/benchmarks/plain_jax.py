"""The training step in JAX, as one would write it first, to compare our times with.

Layers are `x @ kernel + bias` and XLA's own convolutions, on images `[B, ...]`; gradients are
`jax.grad`; one compiled step is called from Python, on one device, whose matrix products use all
cores. The weights, selection, bound, optimiser and schedule are ours.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from se_vae.models import networks
from se_vae.models.vae import VAE, Params
from se_vae.training import TrainConfig

_LOG_2PI = math.log(2.0 * math.pi)
_LAYOUT = ('NHWC', 'HWIO', 'NHWC')


class PlainJax:
  """A model with its optimiser and training set."""

  def __init__(
    self, model: VAE, params: Params, config: TrainConfig, images: np.ndarray, indices: np.ndarray
  ) -> None:
    """Takes over our weights.

    Args:
      model: an MLP or a ConvNet of `networks`, with factorised covariance.
      params: its parameters.
      config: the settings of the step; the optimiser is Adam.
      images: training set, uint8 `[N, H, W, C]`.
      indices: `[K, B]`, the batches that `run` goes round.
    """
    self.config, self.latent_dim, self.image_shape = config, model.latent_dim, model.image_shape
    is_conv = isinstance(model.encoder, networks.ConvEncoder)
    self.num_conv = len(model.encoder.channels) if is_conv else 0
    self.images, self.indices = jnp.asarray(images), jnp.asarray(indices)
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
    self.optimizer = optax.adam(schedule)
    self.params = jax.tree.map(jnp.array, params)  # copies: a step gives up what it is given
    self.state = (self.params, self.optimizer.init(self.params), jax.random.key(0))
    self.state = jax.tree.map(jnp.copy, self.state)
    self.step = jax.jit(self._step, donate_argnums=0)

  def run(self, steps: int) -> None:
    """Trains for so many steps."""
    for step in range(steps):
      self.state, _ = self.step(self.state, self.images, self.indices[step % len(self.indices)])
    jax.block_until_ready(self.state)

  def loss_and_norms(
    self, x: np.ndarray, start: np.ndarray, noise: np.ndarray
  ) -> tuple[float, dict[str, float]]:
    """Returns what `torch_twin.Twin.loss_and_norms` does, with the weights that were taken over."""
    loss_and_gradient = jax.jit(jax.value_and_grad(self._loss))
    loss, gradients = loss_and_gradient(self.params, x, start, noise)
    return float(loss), {name: float(optax.tree.norm(part)) for name, part in gradients.items()}

  def _step(self, state: Any, images: jax.Array, indices: jax.Array) -> tuple[Any, jax.Array]:
    params, opt_state, key = state
    key, start_key, noise_key = jax.random.split(key, 3)
    x = images[indices].astype(jnp.float32) / 255.0
    radius = self.config.radius
    start = x + jax.random.uniform(start_key, x.shape, x.dtype, -radius, radius)
    noise = jax.random.normal(noise_key, (len(x), self.latent_dim), x.dtype)
    loss, gradients = jax.value_and_grad(self._loss)(params, x, start, noise)
    updates, opt_state = self.optimizer.update(gradients, opt_state, params)
    return (optax.apply_updates(params, updates), opt_state, key), loss

  def encode(self, params: Params, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns mean and log-variance `[B, D]` of images `[B, H, W, C]`."""
    layers = params['encoder']['params']
    for i in range(self.num_conv):
      x = jax.nn.relu(_conv(layers[f'Conv_{i}'], x))
    x = x.reshape(len(x), -1)
    for i in range(_num_dense(layers)):
      x = jax.nn.relu(_dense(layers[f'Dense_{i}'], x))
    outputs = _dense(layers['GaussianHead_0']['Dense_0'], x)
    return outputs[:, : self.latent_dim], outputs[:, self.latent_dim :]

  def decode(self, params: Params, z: jax.Array) -> jax.Array:
    """Returns image means `[B, H, W, C]` of latents `[B, D]`."""
    layers = params['decoder']['params']
    *hidden, last = [layers[f'Dense_{i}'] for i in range(_num_dense(layers))]
    for layer in hidden:
      z = jax.nn.relu(_dense(layer, z))
    x = _dense(last, z)
    if self.num_conv:
      *sizes, smallest = networks.feature_sizes(self.image_shape, self.num_conv)
      x = x.reshape(len(x), *smallest, -1)
      for i, size in enumerate(sizes[::-1]):
        x = _conv_transpose(layers[f'Conv_{i}'], jax.nn.relu(x), size)
    return jax.nn.sigmoid(x).reshape(len(x), *self.image_shape)

  def select(
    self, params: Params, x: jax.Array, start: jax.Array, mean_a: jax.Array, sd_a: jax.Array
  ) -> jax.Array:
    """`training.select` for encodings of these means and deviations `[B, D]`."""
    step_size = 2.5 * self.config.radius / self.config.pgd_steps
    low = jnp.clip(x - self.config.radius, 0.0, 1.0)
    high = jnp.clip(x + self.config.radius, 0.0, 1.0)

    def shift(x_adv: jax.Array) -> jax.Array:
      mean, log_var = self.encode(params, x_adv)
      return jnp.sum((mean - mean_a) ** 2) + jnp.sum((jnp.exp(0.5 * log_var) - sd_a) ** 2)

    def step(_: int, x_adv: jax.Array) -> jax.Array:
      return jnp.clip(x_adv + step_size * jnp.sign(jax.grad(shift)(x_adv)), low, high)

    return jax.lax.fori_loop(0, self.config.pgd_steps, step, jnp.clip(start, low, high))

  def _loss(self, params: Params, x: jax.Array, start: jax.Array, noise: jax.Array) -> jax.Array:
    """The selection and `training.loss`; 'vae' selects nothing."""
    obs_var, gamma = self.config.obs_var, self.config.gamma
    mean, log_var = self.encode(params, x)
    var = jnp.exp(log_var)
    x_mean = self.decode(params, mean + jnp.sqrt(var) * noise)
    squared_error = jnp.sum((x - x_mean) ** 2, axis=(1, 2, 3))
    likelihood = -0.5 * (squared_error / obs_var + x[0].size * (_LOG_2PI + math.log(obs_var)))
    if self.config.objective == 'vae':
      return jnp.mean(0.5 * jnp.sum(var + mean**2 - 1.0 - log_var, axis=1) - likelihood)
    fixed = jax.lax.stop_gradient((params, x, start, mean, jnp.sqrt(var)))
    mean_b, log_var_b = self.encode(params, jax.lax.stop_gradient(self.select(*fixed)))
    var_b = jnp.exp(log_var_b)
    priors = -0.5 * jnp.sum(mean**2 + var + mean_b**2 + var_b + 2.0 * _LOG_2PI, axis=1)
    # Eq. 13 at the coupling of Eq. 24.
    product = var * var_b
    psi = 2.0 * gamma * product / (1.0 + jnp.sqrt(1.0 + 4.0 * gamma**2 * product))
    distance = (mean - mean_b) ** 2 + var + var_b - 2.0 * psi
    entropy = 0.5 * jnp.log(product - psi**2) + _LOG_2PI + 1.0
    cost = jnp.sum(0.5 * gamma * distance - entropy, axis=1)
    return jnp.mean(cost - priors - likelihood)


def _num_dense(layers: Params) -> int:
  return sum(name.startswith('Dense') for name in layers)


def _dense(layer: Params, x: jax.Array) -> jax.Array:
  return x @ layer['kernel'] + layer['bias']


def _conv(layer: Params, x: jax.Array) -> jax.Array:
  strides = (networks.STRIDE, networks.STRIDE)
  convolve = functools.partial(jax.lax.conv_general_dilated, dimension_numbers=_LAYOUT)
  return convolve(x, layer['kernel'], strides, 'SAME') + layer['bias']


def _conv_transpose(layer: Params, y: jax.Array, size: tuple[int, int]) -> jax.Array:
  strides = (networks.STRIDE, networks.STRIDE)
  whole = jax.lax.conv_transpose(
    y, layer['kernel'], strides, 'VALID', dimension_numbers=_LAYOUT, transpose_kernel=True
  )
  # The edges that `SAME` pads are cropped off.
  (top, left), (height, width) = (_near(whole.shape[1:3], size), size)
  return whole[:, top : top + height, left : left + width] + layer['bias']


def _near(whole: tuple[int, ...], size: tuple[int, int]) -> list[int]:
  return [(length - wanted) // 2 for length, wanted in zip(whole, size, strict=True)]
