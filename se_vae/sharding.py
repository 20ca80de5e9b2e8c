"""Placement of arrays on devices: the only module that knows how many devices there are.

Parameters are replicated, batches are split along one mesh axis, and each device works on its share
alone until the gradients are averaged. A program never branches on the number of devices, and draws
no random number that depends on it.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = 'data'

Tree = TypeVar('Tree')


def data_mesh(num_devices: int | None = None) -> Mesh:
  """A one-axis mesh over the first `num_devices` devices, or over all of them.

  Raises:
    ValueError: if there are fewer devices.
  """
  devices = jax.devices()
  num_devices = len(devices) if num_devices is None else num_devices
  if not 1 <= num_devices <= len(devices):
    raise ValueError(f'num_devices must be 1 to {len(devices)} here, got {num_devices}')
  return jax.make_mesh(
    (num_devices,), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices[:num_devices]
  )


def replicate(mesh: Mesh, tree: Tree) -> Tree:
  """Puts a copy of every leaf on every device."""
  return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def replicate_copy(mesh: Mesh, tree: Tree) -> Tree:
  """`replicate` into fresh buffers, which may be donated.

  `replicate` may leave a host array's memory where it is, shared by all devices, or hand back the
  very buffer it was given; a donated buffer is overwritten.
  """
  copy = jax.jit(
    lambda leaves: jax.tree.map(jnp.copy, leaves),
    out_shardings=NamedSharding(mesh, PartitionSpec()),
  )
  copied: Tree = copy(tree)
  return copied


def per_device(mesh: Mesh, function: Callable[..., Tree], axes: Sequence[int | None]) -> Any:
  """`function` on each device's share of its arguments, to a replicated result.

  Args:
    mesh: the devices.
    function: takes shares, gives the same values on every device: by way of `mean_over_devices`.
    axes: for each argument the axis along which it is split, or None where it is replicated.
  """
  specs = tuple(map(_spec, axes))
  # Not checked: the check wants every value marked as varying over devices or not.
  return jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=PartitionSpec(), check_vma=False
  )


def mean_over_devices(tree: Tree) -> Tree:
  """The mean of each leaf over the devices of `per_device`, all leaves in one all-reduce."""
  flat, restore = jax.flatten_util.ravel_pytree(tree)
  mean: Tree = restore(jax.lax.pmean(flat, DATA_AXIS))
  return mean


def gather_over_devices(rows: jax.Array) -> jax.Array:
  """The rows of all devices of `per_device`, in the order of the batch."""
  return jax.lax.all_gather(rows, DATA_AXIS, tiled=True)


def share_of_batch(size: int) -> jax.Array:
  """Inside `per_device`: the places in the whole batch of this device's `size` examples."""
  return jax.lax.axis_index(DATA_AXIS) * size + jnp.arange(size)


def split(mesh: Mesh, tree: Tree, axis: int = 0) -> Tree:
  """Splits every leaf along `axis`, whose length the number of devices must divide.

  Raises:
    ValueError: if it does not.
  """
  for leaf in jax.tree.leaves(tree):
    if leaf.shape[axis] % mesh.size:
      raise ValueError(
        f'a batch of {leaf.shape[axis]} cannot be split evenly over {mesh.size} devices'
      )
  return jax.device_put(tree, NamedSharding(mesh, _spec(axis)))


def _spec(axis: int | None) -> PartitionSpec:
  """Split along `axis`, or replicated."""
  return PartitionSpec() if axis is None else PartitionSpec(*(None,) * axis, DATA_AXIS)


def map_batches(mesh: Mesh, function: Callable[[Any], Any], arrays: Any, batch_size: int) -> Any:
  """A function of a batch, split over the devices, on all rows of host arrays.

  Every batch has one shape, so that `function` is compiled once: rows from the beginning fill the
  last one, and what they give is dropped.

  Args:
    mesh: devices.
    function: a tree of `[B, ...]` to a tree of `[B, ...]`, each row of its own row alone.
    arrays: tree of `[N, ...]`, N >= 1.
    batch_size: B, rounded up to a multiple of the number of devices.

  Returns:
    A tree of NumPy arrays `[N, ...]`.
  """
  count = len(jax.tree.leaves(arrays)[0])
  batch_size = -(-batch_size // mesh.size) * mesh.size
  parts = []
  for start in range(0, count, batch_size):
    rows = np.arange(start, start + batch_size) % count
    outputs = function(split(mesh, jax.tree.map(operator.itemgetter(rows), arrays)))
    kept = operator.itemgetter(slice(count - start))
    parts.append(jax.tree.map(kept, jax.device_get(outputs)))
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)
