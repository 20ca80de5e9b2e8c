"""Pools of images: the same examples for every step, however they come to the devices."""

from __future__ import annotations

import threading
import time

import numpy as np
import pytest

from se_vae import data
from se_vae.parallel import sharding
from se_vae.training import input_pipeline

SHAPE = (3, 2, 1)
IMAGES = np.random.default_rng(0).integers(0, 256, (20, *SHAPE), np.uint8)
BATCH = 8


def indices_for(step: int, count: int) -> np.ndarray:
  return data.batch_indices(4, step, count, BATCH, len(IMAGES))


class Spied:
  """A training set that notes what is read of it."""

  shape = IMAGES.shape

  def __init__(self, broken: bool = False) -> None:
    self.broken = broken
    self.read: list[np.ndarray] = []

  def __getitem__(self, indices: np.ndarray) -> np.ndarray:
    if self.broken:
      raise OSError('the disk is gone')
    self.read.append(indices)
    return IMAGES[indices]


@pytest.mark.parametrize('num_devices', [1, 2, 4])
@pytest.mark.parametrize('feeds', [input_pipeline.resident, input_pipeline.streamed])
def test_every_device_finds_its_share_of_each_batch_in_its_pool(feeds, num_devices):
  mesh = sharding.data_mesh(num_devices)
  found = list(feeds(mesh, IMAGES, indices_for, range(6, 20, 3)))
  assert [feed.step for feed in found] == [6, 9, 12, 15, 18]
  for feed in found:
    np.testing.assert_array_equal(feed.indices, indices_for(feed.step, 3))
    expected = np.split(IMAGES[feed.indices], num_devices, axis=1)
    pools, places = (
      {shard.device.id: np.asarray(shard.data) for shard in array.addressable_shards}
      for array in (feed.images, feed.places)
    )
    for device, share in enumerate(expected):
      pool = pools[device].reshape(-1, *SHAPE)
      assert len(pool) == (
        20 if feeds is input_pipeline.resident else share.shape[0] * share.shape[1]
      )
      np.testing.assert_array_equal(pool[places[device]], share)


@pytest.mark.parametrize('num_devices', [1, 4])
def test_split_rows_reads_each_device_s_share_alone(num_devices):
  spied, indices = Spied(), indices_for(0, 3)
  placed = sharding.split_rows(sharding.data_mesh(num_devices), spied, indices)
  np.testing.assert_array_equal(placed, IMAGES[indices])
  shares = np.split(indices, num_devices, axis=1)
  assert sorted(read.tolist() for read in spied.read) == sorted(share.tolist() for share in shares)


def readers() -> list[threading.Thread]:
  return [thread for thread in threading.enumerate() if thread.name.startswith('grain')]


def until(condition) -> None:
  deadline = time.monotonic() + 30.0
  while not condition():
    assert time.monotonic() < deadline
    time.sleep(0.01)


def test_a_few_pools_are_read_ahead_and_the_readers_end_with_the_feed():
  until(lambda: not readers())  # of other tests
  spied = Spied()
  feeds = input_pipeline.streamed(sharding.data_mesh(1), spied, indices_for, range(0, 1000, 2))
  next(feeds)
  until(lambda: len(spied.read) == 1 + input_pipeline._AHEAD)
  time.sleep(0.1)  # they could read more if they wanted to
  assert len(spied.read) == 1 + input_pipeline._AHEAD and readers()
  feeds.close()
  until(lambda: not readers())


def test_an_error_of_a_reader_is_raised_where_its_feed_is_wanted():
  feeds = input_pipeline.streamed(
    sharding.data_mesh(1), Spied(broken=True), indices_for, range(0, 9, 3)
  )
  with pytest.raises(OSError, match='the disk is gone'):
    next(feeds)


@pytest.mark.parametrize(
  ('shape', 'batch_size', 'most', 'expected'),
  [
    ((28, 28, 1), 64, 100, 100),  # 50,176 bytes a step
    ((28, 28, 1), 64, 1000, 334),
    ((64, 64, 3), 64, 100, 21),  # 786,432
    ((512, 512, 3), 64, 100, 1),  # 50,331,648: more than a pool should have
  ],
)
def test_a_pool_has_as_many_steps_as_fit_but_one_at_least(shape, batch_size, most, expected):
  images = np.broadcast_to(np.uint8(0), (1000, *shape))
  assert input_pipeline.steps_a_pool(images, batch_size, most) == expected
