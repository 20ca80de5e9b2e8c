"""Transformations of images."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def pixels(images: jax.typing.ArrayLike) -> jax.Array:
  """uint8 images as float32 in [0, 1].

  Raises:
    TypeError: for another dtype, which may be in [0, 1] already.
  """
  images = jnp.asarray(images)
  if images.dtype != jnp.uint8:
    raise TypeError(f'images must be uint8, 0 to 255, got {images.dtype}')
  return images.astype(jnp.float32) / 255.0
