"""The random keys that seeds stand for, and draws that depend on the key alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from se_vae.config import ArgumentError


def key_of(seed: int) -> jax.Array:
  """Returns the PRNG key of a seed.

  The generator is named, so results depend on the seed alone, and not on `jax_default_prng_impl`.

  Args:
    seed: in [0, 2**31).

  Raises:
    ArgumentError: for any other seed.
  """
  if not isinstance(seed, int | np.integer) or not 0 <= seed < 2**31:
    raise ArgumentError('seed', f'must be an integer in [0, 2**31), got {seed!r}')
  return jax.random.key(seed, impl='threefry2x32')


def draw(
  generator: Callable[..., jax.Array], key: jax.Array, shape: Sequence[int], dtype: jnp.dtype
) -> jax.Array:
  """Returns a draw of a distribution of `jax.random`, the same whatever `jax_enable_x64` is.

  Args:
    generator: of `jax.random`, with the arguments key, shape and dtype.
    key: one PRNG key.
    shape: of the draw.
    dtype: of the draw, floating point.
  """
  with jax.enable_x64(dtype == jnp.float64):
    return generator(key, shape, dtype=dtype)
