"""The random keys that seeds stand for."""

from __future__ import annotations

import jax


def key_of(seed: int) -> jax.Array:
  """Returns the PRNG key of a seed.

  The generator is named, so results depend on the seed alone, and not on `jax_default_prng_impl`.

  Args:
    seed: a whole number.
  """
  return jax.random.key(seed, impl='threefry2x32')
