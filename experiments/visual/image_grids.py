"""Pages of images of a model at work, as arrays and as PNG files."""

from __future__ import annotations

import functools
import io
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image

from se_vae import attacks, training
from se_vae.data.transforms import pixels
from se_vae.models import vae
from se_vae.storage import atomic_files

# Values of the latent that a traversal varies, and the number of latents on a page.
_TRAVERSAL = np.linspace(-3.0, 3.0, 10, dtype=np.float32)
_MOST_LATENTS = 10


def pages(
  model: vae.VAE,
  config: training.TrainConfig,
  params: vae.Params,
  key: jax.Array,
  images: np.ndarray,
  means: np.ndarray,
) -> dict[str, np.ndarray]:
  """Pages of reconstructions, samples and traversals.

  Args:
    model: the model.
    config: settings of the selection of x'.
    params: the model's parameters.
    key: one PRNG key, for the selection and the samples.
    images: uint8 `[N, H, W, C]`.
    means: encoder means `[M, D]` of some images; their variance orders the latents.

  Returns:
    Pages `[rows, columns, H, W, C]` in [0, 1], by name. `reconstructions` has a row each of images,
    selected x', reconstructions of the images, and reconstructions of x'. `samples` has a hundred
    images decoded from the prior. `traversals` has the first image, decoded with one latent a row
    varied from -3 to 3; the latent whose mean varies most comes first.
  """
  order = np.argsort(-np.var(means, axis=0), kind='stable')[:_MOST_LATENTS]
  drawn = _pages(model, config, params, key, pixels(images), jnp.asarray(order))
  return {name: np.asarray(page) for name, page in drawn.items()}


@functools.partial(jax.jit, static_argnames='model')
def _pages(
  model: vae.VAE,
  config: training.TrainConfig,
  params: vae.Params,
  key: jax.Array,
  x: jax.Array,
  latents: jax.Array,
) -> dict[str, jax.Array]:
  q = model.encode(params, x)
  x_adv = training.select(model, config, params, key, x, q)
  of_x_adv = model.encode(params, x_adv)
  noise_keys = attacks.example_keys(key, jnp.arange(100, dtype=jnp.int32))
  z = jax.vmap(lambda one: jax.random.normal(one, (model.latent_dim,), jnp.float32))(noise_keys)
  z_of_first = jnp.tile(q.mean[0], (len(_TRAVERSAL), 1))
  varied = jax.vmap(lambda latent: z_of_first.at[:, latent].set(_TRAVERSAL))(latents)  # [L, T, D]
  traversals = model.decode(params, varied.reshape(-1, model.latent_dim))
  return {
    'reconstructions': jnp.stack(
      [x, x_adv, model.decode(params, q.mean), model.decode(params, of_x_adv.mean)]
    ),
    'samples': model.decode(params, z).reshape(10, 10, *model.image_shape),
    'traversals': traversals.reshape(*varied.shape[:2], *model.image_shape),
  }


def perturbation(reconstructions: np.ndarray) -> float:
  """Mean linf distance between the images and the selected x' of `reconstructions`."""
  x, x_adv = reconstructions[:2]
  return float(np.abs(x_adv - x).reshape(len(x), -1).max(axis=1).mean())


def squared_w2(model: vae.VAE, params: vae.Params, reconstructions: np.ndarray) -> float:
  """Mean squared W2 between the encodings of the images and selected x' of `reconstructions`."""
  return float(_mean_shift(model, params, reconstructions[0], reconstructions[1]))


@functools.partial(jax.jit, static_argnames='model')
def _mean_shift(model: vae.VAE, params: vae.Params, x: jax.Array, x_adv: jax.Array) -> jax.Array:
  return jnp.mean(training.EncodingShift(model)(x_adv, params, model.encode(params, x)))


def encode_png(page: np.ndarray, scale: int = 1) -> bytes:
  """A page `[rows, columns, H, W, C]` in [0, 1] as one PNG picture.

  Args:
    page: images of 1 or 3 channels; values outside [0, 1] are clipped.
    scale: width and height of a pixel in the picture.

  Raises:
    ValueError: for another number of channels.
  """
  rows, columns, height, width, channels = page.shape
  if channels not in (1, 3):
    raise ValueError(f'images must have 1 or 3 channels, got {channels}')
  grid = page.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
  pixels = np.round(255.0 * np.clip(grid, 0.0, 1.0)).astype(np.uint8)
  pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
  buffer = io.BytesIO()
  Image.fromarray(pixels[..., 0] if channels == 1 else pixels).save(buffer, 'png')
  return buffer.getvalue()


def save(path: Path, page: np.ndarray) -> None:
  """Writes a page to a PNG file at twice its size."""
  atomic_files.write(path, encode_png(page, scale=2))
