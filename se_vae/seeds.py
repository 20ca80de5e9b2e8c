"""The random keys that seeds stand for."""

from __future__ import annotations

import jax
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
