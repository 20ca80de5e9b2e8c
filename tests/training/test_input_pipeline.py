"""Chunks of batches: each device finds its share of every step's examples."""

from __future__ import annotations

import numpy as np
import pytest

from se_vae import data
from se_vae.parallel import sharding
from se_vae.training import input_pipeline

SHAPE = (3, 2, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), np.uint8)
EXAMPLES = data.batch_indices(4, 6, 3, 8, len(IMAGES))


class Spied:
  """A training set that notes what is read of it."""

  shape = IMAGES.shape

  def __init__(self) -> None:
    self.read: list[np.ndarray] = []

  def __getitem__(self, indices: np.ndarray) -> np.ndarray:
    self.read.append(indices)
    return IMAGES[indices]


@pytest.mark.parametrize('num_devices', [1, 2, 4])
def test_every_device_has_its_share_of_each_batch(num_devices):
  chunk = input_pipeline.read_chunk(sharding.data_mesh(num_devices), IMAGES, EXAMPLES)
  shares = np.split(EXAMPLES, num_devices, axis=1)
  for shard, share in zip(chunk.images.addressable_shards, shares, strict=True):
    np.testing.assert_array_equal(shard.data, IMAGES[share])
  for shard, share in zip(chunk.examples.addressable_shards, shares, strict=True):
    np.testing.assert_array_equal(shard.data, share)


@pytest.mark.parametrize('num_devices', [1, 4])
def test_each_device_s_share_alone_is_read(num_devices):
  spied = Spied()
  placed = sharding.split_rows(sharding.data_mesh(num_devices), spied, EXAMPLES)
  np.testing.assert_array_equal(placed, IMAGES[EXAMPLES])
  shares = np.split(EXAMPLES, num_devices, axis=1)
  assert sorted(read.tolist() for read in spied.read) == sorted(share.tolist() for share in shares)


@pytest.mark.parametrize(
  ('shape', 'batch_size', 'at_most', 'expected'),
  [
    ((28, 28, 1), 64, 100, 100),  # 50,176 bytes a step
    ((28, 28, 1), 64, 1000, 334),
    ((64, 64, 3), 64, 100, 21),  # 786,432
    ((512, 512, 3), 64, 100, 1),  # 50,331,648: more than a chunk should have
  ],
)
def test_a_chunk_has_as_many_steps_as_fit_but_one_at_least(shape, batch_size, at_most, expected):
  images = np.broadcast_to(np.uint8(0), (1000, *shape))
  assert input_pipeline.steps_per_chunk(images, batch_size, at_most) == expected
