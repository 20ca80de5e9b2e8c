"""The devices of this machine: how a binary uses them, and what it records of them."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.metadata
import os
import platform
from collections.abc import Sequence
from typing import Any

from etils import epy

from experiments.cli.messages import warn
from se_vae.config import ArgumentError, ModelConfig, TrainConfig

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

  from se_vae import certification
  from se_vae.models import layer_lists, vae
  from se_vae.parallel import sharding

# The number of cores that a process counts on, if it may not use all. XLA reads it too.
CORES_VARIABLE = 'NPROC'

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scikit-learn', 'se_vae')


# Below this many examples a CPU core's share of a batch is too small to be worth a device.
_SMALLEST_SHARE = 16


def use_all_cores(batch_size: int, num_devices: int | None = None) -> None:
  """Splits the host into one JAX device a core, as far as the batch allows, or into `num_devices`.

  XLA's CPU backend runs the small matrix products of this project faster side by side on several
  devices than each spread over all cores. Must run before JAX is first used; leaves accelerators
  alone, and any number of host devices that the user chose.

  Raises:
    ArgumentError: if the devices do not divide the batch: JAX would start them all first.
  """
  if num_devices is not None:
    _check_split(batch_size, num_devices)
  chosen: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  if chosen > 0 or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  jax.config.update('jax_num_cpu_devices', num_devices or _cores_worth(batch_size, num_cores()))


def num_cores() -> int:
  """How many cores this process may use."""
  reserved = os.environ.get(CORES_VARIABLE, '')
  if reserved.isdecimal() and int(reserved):
    return int(reserved)
  affinity = getattr(os, 'sched_getaffinity', None)
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def mesh_for(batch_size: int, num_devices: int | None = None) -> Any:
  """The data mesh over `num_devices` devices of each process, or as many as divide the batch.

  CPU devices are chosen so that each has at least 16 examples. Compiles nothing.

  Raises:
    ArgumentError: if the devices do not divide the batch, or are not there.
  """
  num_processes, most = jax.process_count(), jax.local_device_count()
  if batch_size % num_processes:
    raise ArgumentError(
      'batch_size', f'must be a multiple of the {num_processes} processes; got {batch_size}'
    )
  share = batch_size // num_processes
  if num_devices is None:
    split = _cores_worth if jax.default_backend() == 'cpu' else _even_split
    num_devices = split(share, most)
  elif num_devices > most:
    raise ArgumentError('num_devices', f'must be <= {most}, the devices here; got {num_devices}')
  else:
    _check_split(share, num_devices)
  return sharding.data_mesh(num_devices)


def population_mesh(num_members: int, num_devices: int | None = None) -> Any:
  """The mesh for a population: one device for each member, as far as there are `num_devices`.

  Raises:
    ArgumentError: if there are fewer devices than `num_devices`.
  """
  most = jax.local_device_count()
  if num_devices is not None and num_devices > most:
    raise ArgumentError('num_devices', f'must be <= {most}, the devices here; got {num_devices}')
  return sharding.population_mesh(min(num_members, num_devices or most))


def _check_split(share: int, num_devices: int) -> None:
  if share % num_devices:
    raise ArgumentError(
      ('batch_size', 'num_devices'),
      f'{share} examples cannot be split evenly over {num_devices} devices',
    )


def check_memory(
  config: ModelConfig,
  image_shape: Sequence[int],
  mesh: Any,
  part: str | None = None,
  copies: int = 1,
) -> None:
  """Checks that a model can be trained, before anything is allocated: the system may kill it.

  Args:
    config: the settings of the model.
    image_shape: (H, W, C).
    mesh: the devices.
    part: 'encoder' if that alone is trained.
    copies: how many models each device trains.

  Raises:
    ArgumentError: if the parameters, their gradients and Adam's averages need more memory than an
      accelerator has, or on a CPU, where every device has a copy, more than the machine has.
  """
  names = ('latent_dim', 'hidden_units' if config.arch == 'mlp' else 'conv_channels')
  try:
    needed = 4 * copies * _parameter_bytes(config, tuple(image_shape), part)
  except OverflowError as error:
    raise ArgumentError(names, f'too large: {error}') from None
  _check_fits(names, 'training', needed, mesh)


def check_bounds_memory(
  names: str | Sequence[str], what: str, num_coefficients: int, mesh: Any
) -> None:
  """Checks that linear bounds can be computed, before anything is allocated.

  Args:
    names: the arguments that decide.
    what: needs the memory.
    num_coefficients: of the bounds at the widest layer, on each device. They are held twice at
      least, before and after a layer.
    mesh: the devices.

  Raises:
    ArgumentError: if the coefficients alone need more memory than there is.
  """
  _check_fits(names, what, 2 * 4 * num_coefficients, mesh)


def check_bounds_of_selection(
  train: TrainConfig,
  config: ModelConfig,
  image_shape: tuple[int, int, int],
  batch_size: int,
  mesh: Any,
) -> None:
  """Checks that the linear bounds of a batch can be computed, if the selection takes them.

  Args:
    train: the settings of the training.
    config: the settings of the model.
    image_shape: (H, W, C).
    batch_size: examples a step.
    mesh: the devices, which share them.

  Raises:
    ArgumentError: if they need more memory than there is.
  """
  if train.objective != 'se' or train.selection != 'linear':
    return
  model = vae.make_vae(image_shape, **dataclasses.asdict(config))
  params = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
  layers = jax.eval_shape(functools.partial(layer_lists.encoder_of, model), params).means()
  rows = 2 * config.latent_dim * (batch_size // mesh.size)
  count = rows * certification.num_row_coefficients(layers, model.image_shape)
  width = 'hidden_units' if config.arch == 'mlp' else 'conv_channels'
  check_bounds_memory(('selection', 'batch_size', width), 'linear', count, mesh)


def _check_fits(names: str | Sequence[str], what: str, needed: int, mesh: Any) -> None:
  """Raises ArgumentError if each device needs so many bytes, and there are fewer."""
  device = mesh.local_devices[0]
  on_cpu = device.platform == 'cpu'
  here = _host_memory() if on_cpu else (device.memory_stats() or {}).get('bytes_limit')
  needed *= len(mesh.local_devices) if on_cpu else 1
  if here is not None and needed > here:
    needs, has = (f'{size / 2**30:,.1f} GiB' for size in (needed, here))
    raise ArgumentError(names, f'{what} needs at least {needs} of memory, and there are {has}')


@functools.lru_cache
def _parameter_bytes(config: ModelConfig, image_shape: Any, part: str | None) -> int:
  model = vae.make_vae(image_shape, **dataclasses.asdict(config))
  shapes = jax.eval_shape(model.init, jax.eval_shape(lambda: jax.random.key(0)))
  leaves = jax.tree.leaves(shapes if part is None else shapes[part])
  return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)


def _host_memory() -> int:
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def warn_of_idle_devices(mesh: Any, batch_size: int) -> None:
  """Tells the user where a batch leaves accelerators without work."""
  if mesh.size < jax.device_count() and jax.default_backend() != 'cpu':
    warn(
      f'--batch_size: {batch_size} examples are shared by {mesh.size} of {jax.device_count()} '
      'devices, as many as divide them'
    )


def _even_split(batch_size: int, most: int) -> int:
  return next(count for count in range(most, 0, -1) if batch_size % count == 0)


def _cores_worth(batch_size: int, most: int) -> int:
  return _even_split(batch_size, max(1, min(most, batch_size // _SMALLEST_SHARE)))


def versions(*others: str) -> dict[str, str]:
  """The versions that a result may depend on, and those of other packages that are installed."""
  found = {'python': platform.python_version()}
  for package in (*_PACKAGES, *others):
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def device_kinds(mesh: Any = None) -> list[str]:
  """The kinds of a mesh's devices, or of all devices of all processes."""
  found = jax.devices() if mesh is None else mesh.devices.flat
  return [device.device_kind for device in found]
