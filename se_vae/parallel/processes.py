"""What several processes, on several hosts, agree on.

They all run the same program. What one of them alone can know (the time, a signal, a file, an
error) becomes a decision of all of them by way of `largest`, `together` and `from_first`, which
every process must call in the same order. Where there is one process they do nothing.
"""

from __future__ import annotations

import collections
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

Tree = TypeVar('Tree')
Value = TypeVar('Value')


class OtherProcessError(RuntimeError):
  """Another process failed, and says itself why; this one has stopped with it."""


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int = 60,
  heartbeat_timeout: int = 100,
) -> None:
  """Makes the devices of several processes one machine. Must come before JAX is first used.

  Args:
    coordinator: `host:port` of process 0; None to find all three in the environment (SLURM,
      Kubernetes, Open MPI, Cloud TPU).
    num_processes: how many there are.
    process_id: this one's number.
    timeout: seconds. A process that cannot reach the others until then is killed by JAX.
    heartbeat_timeout: seconds of silence after which a process is taken for dead, and the others
      are killed by JAX.

  Raises:
    ValueError: if the environment does not say, or the processes differ in number of devices.
  """
  # This service would silently take SIGTERM away from the program.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    initialization_timeout=timeout,
    heartbeat_timeout_seconds=heartbeat_timeout,
  )
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    raise ValueError(f'the processes must have equally many devices, got {dict(counts)}')


def is_first() -> bool:
  """Whether this process is the one that writes files; a process alone is."""
  return not _several() or jax.process_index() == 0


def largest(value: int) -> int:
  """The largest of all processes' values."""
  return int(_gather(np.int32(value)).max())


def differing(values: Mapping[str, Any]) -> list[str]:
  """The names whose values (by their `repr`) are not the same in every process."""
  digests = [zlib.crc32(repr(value).encode()) for value in values.values()]
  rows = _gather(np.array(digests, np.uint32))
  differs = (rows != rows[:1]).any(axis=0)
  return [name for name, different in zip(values, differs, strict=True) if different]


def together(function: Callable[..., Value], *args: Any) -> Value:
  """`function(*args)`, which must call nothing of several processes, in each of them.

  Raises:
    OtherProcessError: if it raised in another one; what it raised, where it did.
  """
  try:
    value = function(*args)
  except Exception:
    largest(1)
    raise
  if largest(0):
    raise OtherProcessError('another process has failed, and says why')
  return value


def on_first(function: Callable[..., Value], *args: Any) -> Value | None:
  """`together`, but in process 0 alone: None in the others."""
  return together(function, *args) if is_first() else together(lambda: None)


def from_first(tree: Tree) -> Tree:
  """Process 0's leaves, NumPy arrays and numbers of the same shapes everywhere, bit for bit."""
  if not _several():
    return tree
  leaves, structure = jax.tree.flatten(jax.device_get(tree))
  arrays = [np.asarray(leaf) for leaf in leaves]
  # As bytes: a sum with zeros would lose the sign of a zero.
  sent = [np.frombuffer(array.tobytes(), np.uint8) for array in arrays]
  received = multihost_utils.broadcast_one_to_all(sent)
  restored = [
    np.frombuffer(content.tobytes(), array.dtype).reshape(array.shape)
    for content, array in zip(received, arrays, strict=True)
  ]
  return jax.tree.unflatten(structure, restored)


def _several() -> bool:
  return jax.distributed.is_initialized() and jax.process_count() > 1


def _gather(value: Any) -> np.ndarray:
  """Every process's value, by process."""
  return multihost_utils.process_allgather(value) if _several() else np.asarray(value)[None]
