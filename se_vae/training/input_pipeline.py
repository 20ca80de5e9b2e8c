"""What the devices are fed with: the whole training set at once, or a few batches at a time.

A training step takes its examples out of a pool of images on its device, by their places in it. The
pool is the whole training set, on every device, or each device's examples of the next few steps,
which Grain reads ahead while the devices work. Either way step s has the examples that
`indices_for` gives, and the compiled step is the same but for the pool's size: neither the results
nor a resumed run show which it was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from se_vae.parallel import sharding

# (first step, number of steps) to example indices [steps, B].
IndicesFor = Callable[[int, int], np.ndarray]

# All devices' pools have about so many bytes, and `_AHEAD` more are read while they are used:
# little on any device, and still enough for a second of small steps.
_POOL_BYTES = 2**24
_AHEAD = 2


class Feed(NamedTuple):
  """The examples of some consecutive steps.

  Attributes:
    step: the first of them.
    indices: `[K, B]`, the training examples of each.
    images: the pools, uint8: the training set `[N, H, W, C]`, replicated, or `[K, B, H, W, C]`,
      split along the batch.
    places: int32 `[K, B]`, where they are in their device's pool; split along the batch.
  """

  step: int
  indices: np.ndarray
  images: jax.Array
  places: jax.Array


def resident(
  mesh: Mesh, images: np.ndarray, indices_for: IndicesFor, steps: range
) -> Iterator[Feed]:
  """Feeds from a training set `[N, H, W, C]`, uint8, that is on every device.

  Args:
    mesh: the devices.
    images: the training set.
    indices_for: the examples of each step.
    steps: the first step of each feed; their distance is K.
  """
  pool: Any = sharding.replicate(mesh, images)
  for step in steps:
    indices = indices_for(step, steps.step)
    places: Any = sharding.split(mesh, indices, axis=1)
    yield Feed(step, indices, pool, places)


def streamed(
  mesh: Mesh, images: np.ndarray, indices_for: IndicesFor, steps: range
) -> Iterator[Feed]:
  """`resident`, but the training set stays on the host, or in the file that it is mapped from."""
  import grain  # slow to import

  def read(step: int) -> Feed:
    indices = indices_for(step, steps.step)
    count, batch_size = indices.shape
    share = batch_size // mesh.size
    host_places = np.arange(count)[:, None] * share + np.arange(batch_size)[None] % share
    places: Any = sharding.split(mesh, host_places.astype(np.int32), axis=1)
    return Feed(step, indices, sharding.split_rows(mesh, images, indices), places)

  feeds = grain.MapDataset.range(steps.start, steps.stop, steps.step).map(read)
  options = grain.ReadOptions(num_threads=_AHEAD, prefetch_buffer_size=_AHEAD)
  reader = iter(feeds.to_iter_dataset(options))
  try:
    yield from reader
  finally:
    reader.close()


def steps_a_pool(images: np.ndarray, batch_size: int, most: int) -> int:
  """How many steps' images `[N, H, W, C]` a pool should hold, 1 to `most`."""
  return min(max(1, _POOL_BYTES // (batch_size * images[:1].nbytes)), most)
