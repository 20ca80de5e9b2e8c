"""Transformations of images: pixels in [0, 1], colours, squares of one size."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from se_vae import seeds

# Colour id -> which of the red, green and blue channels are on. Black is left out: it hides the
# digit.
COLORS = np.array(
  [
    [1, 0, 0],  # 0 red
    [0, 1, 0],  # 1 green
    [0, 0, 1],  # 2 blue
    [1, 1, 0],  # 3 yellow
    [1, 0, 1],  # 4 magenta
    [0, 1, 1],  # 5 cyan
    [1, 1, 1],  # 6 white
  ],
  np.uint8,
)
COLORS.setflags(write=False)

# Folded into the key, so that colours are unrelated to batches and to whatever else a caller
# derives from `jax.random.key(seed)`.
_COLOR_DOMAIN = 0x636F6C72


def pixels(images: jax.typing.ArrayLike) -> jax.Array:
  """Returns uint8 images as float32 in [0, 1].

  Raises:
    TypeError: for another dtype, which may be in [0, 1] already.
  """
  images = jnp.asarray(images)
  if images.dtype != jnp.uint8:
    raise TypeError(f'images must be uint8, 0 to 255, got {images.dtype}')
  return images.astype(jnp.float32) / 255.0


def draw_colors(count: int, data_seed: int, split_index: int) -> np.ndarray:
  """Returns independent, uniform colour ids.

  Args:
    count: the number N of images.
    data_seed: in [0, 2**31).
    split_index: the number of the split; each split has colours of its own.

  Returns:
    int32 [N], rows of `COLORS`.
  """
  # The generator is named, so that JAX's configured default cannot change the data.
  key = jax.random.fold_in(seeds.key_of(data_seed), _COLOR_DOMAIN)
  key = jax.random.fold_in(key, split_index)
  return np.array(jax.random.randint(key, (count,), 0, len(COLORS), dtype=jnp.int32))


def colorize(gray_images: np.ndarray, color_ids: np.ndarray) -> np.ndarray:
  """Returns gray images with some RGB channels switched on and the others off.

  The gray image is the maximum over the channels of the coloured one, as no colour is black.

  Args:
    gray_images: uint8 [N, H, W, 1].
    color_ids: integers [N], rows of `COLORS`.

  Returns:
    uint8 [N, H, W, 3].

  Raises:
    ValueError: if a shape, a dtype or an id is wrong.
  """
  if gray_images.dtype != np.uint8 or gray_images.ndim != 4 or gray_images.shape[-1] != 1:
    raise ValueError(
      f'gray_images must be uint8 [N, H, W, 1], got {gray_images.dtype} {gray_images.shape}'
    )
  if color_ids.shape != gray_images.shape[:1]:
    raise ValueError(f'{len(gray_images)} images need as many colours, got {color_ids.shape}')
  if not np.isin(color_ids, np.arange(len(COLORS))).all():
    raise ValueError(f'color_ids must be in [0, {len(COLORS)})')
  colored: np.ndarray = gray_images * COLORS[color_ids][:, None, None, :]
  return colored


def central_square(image: np.ndarray, size: int) -> np.ndarray:
  """Returns the largest square in the middle of an image, averaged or interpolated to one size.

  Args:
    image: uint8 [H, W, C], C of 1, 3 or 4.
    size: S, in pixels.

  Returns:
    uint8 [S, S, C].
  """
  from PIL import Image  # slow to import

  height, width, channels = image.shape
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  square = image[top : top + side, left : left + side]
  picture = Image.fromarray(square[..., 0] if channels == 1 else square)
  resized = picture.resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(resized).reshape(size, size, channels)
