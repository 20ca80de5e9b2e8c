"""The batches of consecutive training steps, as the devices take them.

The training set stays on the host, in memory or mapped from a file, and may be larger than the
memory of a device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from se_vae.parallel import sharding

# (first step, number of steps) to example indices [steps, B].
IndicesFor = Callable[[int, int], np.ndarray]

# All devices' batches together have about so many bytes at a time: little on any device, and still
# enough for a second of small steps.
_CHUNK_BYTES = 2**24


class Chunk(NamedTuple):
  """The batches of K consecutive steps.

  Attributes:
    images: uint8 `[K, B, H, W, C]`, split over the devices along B.
    examples: int32 `[K, B]`, their places in the training set, split likewise.
  """

  images: jax.Array
  examples: jax.Array


def read_chunk(mesh: Mesh, images: np.ndarray, examples: np.ndarray) -> Chunk:
  """Puts batches on the devices. Each process reads its own devices' share alone.

  Args:
    mesh: the devices, whose number divides B.
    images: the training set `[N, H, W, C]`, uint8.
    examples: int32 `[K, B]`, the examples of each step.
  """
  placed: Any = sharding.split(mesh, examples, axis=1)
  return Chunk(sharding.split_rows(mesh, images, examples), placed)


def steps_per_chunk(images: np.ndarray, batch_size: int, at_most: int) -> int:
  """Returns how many steps' batches of `images` `[N, H, W, C]` fit into a chunk, 1 to `at_most`."""
  return min(max(1, _CHUNK_BYTES // (batch_size * images[:1].nbytes)), at_most)
