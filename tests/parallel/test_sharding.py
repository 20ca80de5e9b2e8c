"""Placement: what is replicated is everywhere, what is split is split along one axis."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.parallel import sharding


def pieces(array: jax.Array) -> dict[int, np.ndarray]:
  """What each device holds."""
  return {shard.device.id: np.asarray(shard.data) for shard in array.addressable_shards}


@pytest.mark.parametrize('num_devices', [1, 2, 3, 4])
def test_mesh_has_the_first_devices_on_one_axis(num_devices):
  mesh = sharding.data_mesh(num_devices)
  assert mesh.axis_names == (sharding.DATA_AXIS,)
  assert list(mesh.devices) == jax.devices()[:num_devices]


def test_mesh_has_all_devices_by_default():
  assert sharding.data_mesh().size == len(jax.devices()) == 4


@pytest.mark.parametrize('num_devices', [-1, 0, 5])
def test_wrong_number_of_devices_raises(num_devices):
  with pytest.raises(ValueError, match=f'num_devices must be 1 to 4 here, got {num_devices}'):
    sharding.data_mesh(num_devices)


@pytest.mark.parametrize(
  ('arguments', 'shape'), [((), (4, 1)), ((3,), (3, 1)), ((2, 2), (2, 2)), ((None, 2), (2, 2))]
)
def test_a_population_s_mesh_has_groups_of_devices(arguments, shape):
  mesh = sharding.population_mesh(*arguments)
  assert mesh.axis_names == (sharding.POPULATION_AXIS, sharding.DATA_AXIS)
  assert mesh.devices.shape == shape
  assert list(mesh.devices.flat) == jax.devices()[: mesh.size]


@pytest.mark.parametrize(('arguments', 'needed'), [((0,), 0), ((5,), 5), ((3, 2), 6)])
def test_a_population_s_mesh_needs_its_devices(arguments, needed):
  message = rf'num_groups \* devices_each must be 1 to 4 here, got {needed}'
  with pytest.raises(ValueError, match=message):
    sharding.population_mesh(*arguments)


def test_members_are_split_over_groups_and_batches_within_them():
  mesh = sharding.population_mesh(2, 2)
  members, batches = np.arange(12.0).reshape(4, 3), np.arange(48).reshape(4, 2, 6)
  for i, piece in pieces(sharding.replicate(mesh, members)).items():
    np.testing.assert_array_equal(piece, members[i // 2 * 2 :][:2])
  for i, piece in pieces(sharding.split(mesh, batches, axis=1)).items():
    np.testing.assert_array_equal(piece, batches[i // 2 * 2 :][:2, :, i % 2 * 3 :][:, :, :3])
  with pytest.raises(ValueError, match='a batch of 5 cannot be split evenly over 2 devices'):
    sharding.split(mesh, batches[:, :, :5], axis=1)


@pytest.mark.parametrize('vectorize', ['auto', 'loop', 'vmap'])
def test_members_average_over_their_own_devices(vectorize):
  """The batch `[P, B]` of each of four members has its own mean."""
  mesh = sharding.population_mesh(2, 2)
  batches = np.arange(24, dtype=np.float32).reshape(4, 6)

  def function(scale, batch):
    index = sharding.positions(len(batch))
    return sharding.mean_over_devices((scale * batch.mean(), index.astype(np.float32).mean()))

  parallel = sharding.per_device(mesh, function, (None, 0), vectorize)
  means, places = jax.jit(parallel)(np.arange(4, dtype=np.float32), batches)
  np.testing.assert_array_equal(means, np.arange(4) * batches.mean(axis=1))
  np.testing.assert_array_equal(places, [2.5] * 4)


@pytest.mark.parametrize('num_devices', [1, 2, 4])
def test_replicated_leaves_are_whole_on_every_device(num_devices):
  mesh = sharding.data_mesh(num_devices)
  tree = {'array': np.arange(6.0).reshape(2, 3), 'scalar': np.int32(7), 'key': jax.random.key(3)}
  placed = sharding.replicate(mesh, tree)
  assert all(leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(placed))
  for name in ('array', 'scalar'):
    found = pieces(placed[name])
    assert list(found) == list(range(num_devices))
    for piece in found.values():
      np.testing.assert_array_equal(piece, tree[name])
  assert placed['key'] == tree['key']


@pytest.mark.parametrize('num_devices', [1, 2, 4])
@pytest.mark.parametrize('axis', [0, 1])
def test_split_leaves_are_cut_in_order_along_one_axis(axis, num_devices):
  mesh = sharding.data_mesh(num_devices)
  tree = [np.arange(96).reshape(4, 8, 3), np.arange(64).reshape(8, 8)]
  for leaf, placed in zip(tree, sharding.split(mesh, tree, axis=axis), strict=True):
    np.testing.assert_array_equal(placed, leaf)
    found = pieces(placed)
    for i, expected in enumerate(np.split(leaf, num_devices, axis=axis)):
      np.testing.assert_array_equal(found[i], expected)
    assert len(found) == num_devices


@pytest.mark.parametrize('axis', [0, 1])
def test_batch_that_the_devices_do_not_divide_raises(axis):
  shape = (6, 4) if axis == 0 else (4, 6)
  tree = [np.zeros((4, 4)), np.zeros(shape)]
  with pytest.raises(ValueError, match='a batch of 6 cannot be split evenly over 4 devices'):
    sharding.split(sharding.data_mesh(4), tree, axis=axis)


def test_program_over_split_batch_needs_no_communication_in_its_source():
  """A mean over a split batch and replicated weights is the mean of one device."""
  x = np.random.default_rng(0).normal(size=(8, 3)).astype(np.float32)
  weights = np.arange(3, dtype=np.float32)
  mesh = sharding.data_mesh(4)
  mean = jax.jit(lambda weights, x: jnp.mean(x @ weights))
  split = mean(sharding.replicate(mesh, weights), sharding.split(mesh, x))
  assert split.sharding.is_fully_replicated
  np.testing.assert_allclose(split, np.mean(x @ weights), rtol=1e-5)  # a sum in another order


@pytest.mark.parametrize('leaf', [np.arange(64.0, dtype=np.float32), jnp.arange(64.0)])
def test_a_replicated_copy_may_be_donated(leaf):
  """The original keeps its values however often its copies are overwritten in place."""
  mesh = sharding.data_mesh(4)
  double = jax.jit(lambda x: 2.0 * x, donate_argnums=0)
  for _ in range(3):
    copy = sharding.replicate_copy(mesh, {'leaf': leaf})
    assert copy['leaf'].sharding.is_fully_replicated
    np.testing.assert_array_equal(double(copy['leaf']), 2.0 * np.arange(64.0))
    np.testing.assert_array_equal(leaf, np.arange(64.0))


@pytest.mark.parametrize(('num_devices', 'batch_size'), [(1, 1), (1, 3), (4, 3), (2, 10), (4, 64)])
def test_mapped_batches_are_full_and_give_every_row_once(num_devices, batch_size):
  mesh = sharding.data_mesh(num_devices)
  x = np.random.default_rng(0).normal(size=(10, 2)).astype(np.float32)
  shapes = []

  def function(batch):
    shapes.append(batch['x'].shape)
    assert len(pieces(batch['x'])) == num_devices
    return 2.0 * batch['x'], batch['index']

  tree = {'x': x, 'index': np.arange(10), 'none': None}
  doubled, index = sharding.map_batches(mesh, function, tree, batch_size)
  np.testing.assert_array_equal(doubled, 2.0 * x)
  np.testing.assert_array_equal(index, np.arange(10))
  full = -(-batch_size // num_devices) * num_devices
  assert shapes == [(full, 2)] * -(-10 // full)
