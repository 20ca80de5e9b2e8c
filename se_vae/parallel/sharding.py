"""Placement of arrays on devices. Only this module knows how many there are, and in which process.

Parameters are replicated, batches are split along one mesh axis, and each device works on its own
share until the gradients are averaged. No program branches on the number of devices or draws a
random number that depends on it.

A mesh may have a second axis, for a population: members that are trained side by side. On such a
mesh every array has a leading axis `[P, ...]` of members, which is split over the population axis,
and `axis` counts from the one behind it. Members never communicate.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal, TypeAlias, TypeVar, get_args

import jax
import jax.flatten_util
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

DATA_AXIS = 'data'
POPULATION_AXIS = 'population'

# How a device takes its members: one after the other, all at once, or as suits its platform.
Vectorize: TypeAlias = Literal['auto', 'loop', 'vmap']

# The most pixel values of a batch of images that `fitting` allows.
_BATCH_VALUES = 2**21

Tree = TypeVar('Tree')


def data_mesh(num_devices: int | None = None) -> Mesh:
  """Returns a one-axis mesh over the first devices of each process.

  Args:
    num_devices: devices of each process; None takes all.

  Raises:
    ValueError: if this process has fewer devices.
  """
  most = jax.local_device_count()
  num_devices = most if num_devices is None else num_devices
  if not 1 <= num_devices <= most:
    raise ValueError(f'num_devices must be 1 to {most} here, got {num_devices}')
  devices = [
    device
    for process in range(jax.process_count())
    for device in jax.local_devices(process_index=process)[:num_devices]
  ]
  return jax.make_mesh((len(devices),), (DATA_AXIS,), axis_types=(AxisType.Auto,), devices=devices)


def population_mesh(num_groups: int | None = None, devices_each: int = 1) -> Mesh:
  """Returns a mesh over this process's first devices, in groups that each train some members.

  Args:
    num_groups: the length of the population axis; None for as many groups as there are devices for.
    devices_each: the length of the data axis, the devices that share each batch of a member.

  Raises:
    ValueError: if this process has fewer devices.
  """
  most = jax.local_device_count()
  num_groups = most // devices_each if num_groups is None else num_groups
  needed = num_groups * devices_each
  if not 1 <= needed <= most:
    raise ValueError(f'num_groups * devices_each must be 1 to {most} here, got {needed}')
  axes, kinds = (POPULATION_AXIS, DATA_AXIS), (AxisType.Auto, AxisType.Auto)
  shape, devices = (num_groups, devices_each), jax.local_devices()[:needed]
  return jax.make_mesh(shape, axes, axis_types=kinds, devices=devices)


def replicate(mesh: Mesh, tree: Tree) -> Tree:
  """Returns the tree with a copy of every leaf on every device."""
  return _place(tree, NamedSharding(mesh, _spec(mesh, None)))


def replicate_copy(mesh: Mesh, tree: Tree) -> Tree:
  """Returns what `replicate` returns, in fresh buffers that may be donated.

  The leaves of `replicate` may share memory with a host array, with each other, or with the
  argument. A donated buffer is overwritten.
  """
  copied: Tree = _copier(mesh)(tree)
  return copied


@functools.lru_cache
def _copier(mesh: Mesh) -> Callable[[Any], Any]:
  """Returns one function object for each mesh: a fresh one would be compiled at every call."""
  return jax.jit(
    lambda leaves: jax.tree.map(jnp.copy, leaves),
    out_shardings=NamedSharding(mesh, _spec(mesh, None)),
  )


def per_device(
  mesh: Mesh,
  function: Callable[..., Tree],
  axes: Sequence[int | None],
  vectorize: Vectorize = 'auto',
) -> Any:
  """Returns a function that runs on every device's share of its arguments.

  Args:
    mesh: the devices.
    function: takes shares, and returns the same values on every device, as `mean_over_devices`
      and `whole_batch` give them. On a mesh with a population axis it takes one member's shares,
      and is applied to each member.
    axes: for each argument the axis along which it is split, or None if it is replicated.
    vectorize: how a device takes its members: 'loop' one after the other, 'vmap' all at once,
      'auto' in a loop on a CPU and all at once elsewhere, as the program is lowered.

  Returns:
    A function of whole arrays, whose result is replicated.
  """
  specs = tuple(_spec(mesh, axis) for axis in axes)
  function = _over_members(function, vectorize) if POPULATION_AXIS in mesh.shape else function
  # Not checked, since the check wants every value marked as varying over devices or not.
  return jax.shard_map(
    function, mesh=mesh, in_specs=specs, out_specs=_spec(mesh, None), check_vma=False
  )


def _over_members(function: Callable[..., Tree], vectorize: Vectorize) -> Callable[..., Tree]:
  """Returns a function of stacked arguments `[P, ...]` that applies `function` to each member."""

  def loop(*stacked: Any) -> Any:
    return jax.lax.map(lambda member: function(*member), stacked)

  def choose(*stacked: Any) -> Any:
    return jax.lax.platform_dependent(*stacked, cpu=loop, default=jax.vmap(function))

  if vectorize not in get_args(Vectorize):
    raise ValueError(f'vectorize must be one of {get_args(Vectorize)}, got {vectorize!r}')
  return {'loop': loop, 'vmap': jax.vmap(function), 'auto': choose}[vectorize]


def mean_over_devices(tree: Tree) -> Tree:
  """Returns the mean of each leaf over the devices of `per_device`, in one all-reduce.

  Elsewhere it returns the leaves as they are.
  """
  if not _is_per_device():
    return tree
  flat, restore = jax.flatten_util.ravel_pytree(tree)
  mean: Tree = restore(jax.lax.pmean(flat, DATA_AXIS))
  return mean


def whole_batch(tree: Tree) -> Tree:
  """Returns the rows `[B, ...]` of all devices of `per_device`, in the order of the batch.

  Elsewhere it returns the rows as they are.
  """
  if not _is_per_device():
    return tree
  whole: Tree = jax.tree.map(lambda rows: jax.lax.all_gather(rows, DATA_AXIS, tiled=True), tree)
  return whole


def positions(size: int) -> jax.Array:
  """Returns the positions in the whole batch of the `size` examples at hand, `[size]`.

  They are this device's examples within `per_device`, and all of them elsewhere.
  """
  index = jnp.arange(size, dtype=jnp.int32)
  return jax.lax.axis_index(DATA_AXIS) * size + index if _is_per_device() else index


def _is_per_device() -> bool:
  return DATA_AXIS in jax.sharding.get_abstract_mesh().manual_axes


def split(mesh: Mesh, tree: Tree, axis: int = 0) -> Tree:
  """Returns the tree with every leaf split over the devices along `axis`.

  Raises:
    ValueError: if the number of devices does not divide the length of the axis.
  """
  sharding, num_devices = NamedSharding(mesh, _spec(mesh, axis)), mesh.shape[DATA_AXIS]
  for leaf in jax.tree.leaves(tree):
    length = leaf.shape[len(sharding.spec) - 1]
    if length % num_devices:
      raise ValueError(f'a batch of {length} cannot be split evenly over {num_devices} devices')
  return _place(tree, sharding)


def split_rows(mesh: Mesh, array: np.ndarray, indices: np.ndarray) -> jax.Array:
  """Returns `array[indices]` `[K, B, ...]`, split over the devices along B.

  Each process reads only the rows of its own devices.

  Args:
    mesh: the devices, whose number divides B.
    array: `[N, ...]`, on the host; without a leading axis of members on any mesh.
    indices: `[K, B]`, in [0, N).
  """

  def read(share: Any) -> np.ndarray:
    return array[indices[share[: indices.ndim]]]

  shape = (*indices.shape, *array.shape[1:])
  return jax.make_array_from_callback(shape, NamedSharding(mesh, _spec(mesh, 1)), read)


def _place(tree: Tree, sharding: NamedSharding) -> Tree:
  """Returns leaves, which are whole in every process, as arrays with a sharding."""
  if sharding.is_fully_addressable:
    return jax.device_put(tree, sharding)
  # `device_put` would first compare the values of all processes, by sending them to all.
  placed: Tree = jax.tree.map(
    lambda leaf: jax.make_array_from_callback(leaf.shape, sharding, leaf.__getitem__), tree
  )
  return placed


def _spec(mesh: Mesh, axis: int | None) -> PartitionSpec:
  """Returns the specification that splits along `axis`, or that replicates for None."""
  members = (POPULATION_AXIS,) if POPULATION_AXIS in mesh.shape else ()
  along = () if axis is None else (*(None,) * axis, DATA_AXIS)
  return PartitionSpec(*members, *along)


def fitting(batch_size: int, rows: np.ndarray) -> int:
  """Returns `batch_size`, or less if each row is large, so that a batch fits into any device.

  Args:
    batch_size: the number of rows wanted.
    rows: `[N, ...]`, of which only the shape is used.

  Example:
    >>> fitting(512, np.zeros((1000, 28, 28, 3), np.uint8))
    512
    >>> fitting(512, np.zeros((1000, 128, 128, 3), np.uint8))
    42
  """
  return min(batch_size, max(1, _BATCH_VALUES // rows[0].size))


def map_batches(mesh: Mesh, function: Callable[[Any], Any], arrays: Any, batch_size: int) -> Any:
  """Applies a function of a batch, split over the devices, to all rows of host arrays.

  Args:
    mesh: the devices.
    function: maps a tree of `[B, ...]` to a tree of `[B, ...]`; each row of the result depends on
      the same row of the argument only.
    arrays: tree of `[N, ...]`, N >= 1.
    batch_size: B, rounded up to a multiple of the number of devices.

  Returns:
    A tree of NumPy arrays `[N, ...]`.
  """
  parts = batches(mesh, function, arrays, batch_size)
  return jax.tree.map(lambda *leaves: np.concatenate(leaves), *parts)


def batches(
  mesh: Mesh, function: Callable[[Any], Any], arrays: Any, batch_size: int, *, first: int = 0
) -> Iterator[Any]:
  """Yields the result of `map_batches` batch by batch, from the row `first` on.

  Every batch has the same shape, so that `function` is compiled once. Rows from the beginning fill
  the last batch, and their results are dropped.
  """
  count = len(jax.tree.leaves(arrays)[0])
  batch_size = -(-batch_size // mesh.size) * mesh.size
  for start in range(first, count, batch_size):
    rows = np.arange(start, start + batch_size) % count
    outputs = function(split(mesh, jax.tree.map(operator.itemgetter(rows), arrays)))
    kept = operator.itemgetter(slice(count - start))
    yield jax.tree.map(kept, jax.device_get(outputs))
