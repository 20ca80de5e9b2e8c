"""Pages of images of a model at work, as arrays and as PNG files."""

from __future__ import annotations

import functools
import io
import math
from collections.abc import Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from PIL import Image, ImageDraw, ImageFont

from se_vae import attacks, training
from se_vae.data.transforms import pixels
from se_vae.models import vae
from se_vae.storage import atomic_files

# What the rows of a page of attacked images show.
ROWS = ('image x', "attacked x'", 'reconstruction\nof x', "reconstruction\nof x'")

# Values of the latent that a traversal varies, and the number of latents on a page.
_TRAVERSAL = np.linspace(-3.0, 3.0, 10, dtype=np.float32)
_MOST_LATENTS = 10

_ROW = 40  # the lowest row, in pixels of the picture, that has room for a label of two lines


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
    Pages `[rows, columns, H, W, C]` in [0, 1], by name. `reconstructions` has the `ROWS`, with the
    selected x'. `samples` has a hundred images decoded from the prior. `traversals` has the first
    image, decoded with one latent a row varied from -3 to 3; the latent whose mean varies most
    comes first.
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


def encode_png(page: np.ndarray, scale: int = 1, labels: Sequence[str] = ()) -> bytes:
  """A page `[rows, columns, H, W, C]` in [0, 1] as one PNG picture.

  Args:
    page: images of 1 or 3 channels; values outside [0, 1] are clipped.
    scale: width and height of a pixel in the picture.
    labels: texts to the left of the rows, if any.

  Raises:
    ValueError: for another number of channels.
  """
  rows, columns, height, width, channels = page.shape
  if channels not in (1, 3):
    raise ValueError(f'images must have 1 or 3 channels, got {channels}')
  grid = page.transpose(0, 2, 1, 3, 4).reshape(rows * height, columns * width, channels)
  pixels = np.round(255.0 * np.clip(grid, 0.0, 1.0)).astype(np.uint8)
  pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
  picture = Image.fromarray(pixels[..., 0] if channels == 1 else pixels)
  buffer = io.BytesIO()
  (_labelled(picture, labels) if labels else picture).save(buffer, 'png')
  return buffer.getvalue()


def _labelled(picture: Image.Image, labels: Sequence[str]) -> Image.Image:
  """The picture to the right of the labels of its rows."""
  font = ImageFont.load_default(13)
  draw = ImageDraw.Draw(picture)
  margin = 12 + round(max(draw.textbbox((0, 0), label, font)[2] for label in labels))
  page = Image.new(picture.mode, (margin + picture.width, picture.height), 'white')
  page.paste(picture, (margin, 0))
  draw = ImageDraw.Draw(page)
  for row, label in enumerate(labels):
    middle = (row + 0.5) / len(labels) * picture.height
    draw.text((6, middle), label, 'black', font, anchor='lm')
  return page


def save(path: Path, page: np.ndarray, labels: Sequence[str] = ()) -> None:
  """Writes a page to a PNG file, at twice its size or so large that labels fit beside the rows."""
  scale = max(2, math.ceil(_ROW / page.shape[2])) if labels else 2
  atomic_files.write(path, encode_png(page, scale, labels))
