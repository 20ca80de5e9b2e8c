"""The devices of this machine: how a binary uses them, and what it records of them."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
import platform
from typing import Any

from etils import epy

from experiments.cli.messages import warn
from se_vae.config import ArgumentError

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

  from se_vae.parallel import sharding

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scikit-learn', 'se_vae')


# Below this many examples a CPU core's share of a batch is too small to be worth a device.
_SMALLEST_SHARE = 16


def use_all_cores(batch_size: int, num_devices: int | None = None) -> None:
  """Splits the host into one JAX device a core, as far as the batch allows, or into `num_devices`.

  XLA's CPU backend runs the small matrix products of this project faster side by side on several
  devices than each spread over all cores. Must run before JAX is first used; leaves accelerators
  alone, and any number of host devices that the user chose.
  """
  chosen: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  if chosen > 0 or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  jax.config.update('jax_num_cpu_devices', num_devices or _cores_worth(batch_size, num_cores()))


def num_cores() -> int:
  """How many cores this process may use."""
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
  elif share % num_devices:
    raise ArgumentError(
      ('batch_size', 'num_devices'),
      f'{batch_size} examples cannot be split evenly over {num_processes * num_devices} devices',
    )
  return sharding.data_mesh(num_devices)


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


def versions() -> dict[str, str]:
  """The versions that a result may depend on."""
  found = {'python': platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def device_kinds(mesh: Any = None) -> list[str]:
  """The kinds of a mesh's devices, or of all devices of all processes."""
  found = jax.devices() if mesh is None else mesh.devices.flat
  return [device.device_kind for device in found]
