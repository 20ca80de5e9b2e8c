"""Agreement between several processes, on several hosts.

All processes run the same program. What only one of them can know (the time, a signal, a file, an
error) becomes a decision of all of them through `maximum`, `together` and `from_first`. Every
process must call these in the same order. With one process they do nothing.
"""

from __future__ import annotations

import collections
import zlib
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from jax.experimental import multihost_utils

from se_vae.parallel import connections

Tree = TypeVar('Tree')
Value = TypeVar('Value')


class OtherProcessError(RuntimeError):
  """Another process failed, and reports the reason; this one has stopped with it."""


def join(
  coordinator: str | None = None,
  num_processes: int | None = None,
  process_id: int | None = None,
  *,
  timeout: int = 60,
  heartbeat_timeout: int = 100,
) -> None:
  """Joins several processes, so that JAX sees the devices of all of them.

  This must happen before JAX is first used.

  Args:
    coordinator: `host:port` of process 0; None to find it, the number of processes and this
      process's number in the environment (SLURM, Kubernetes, Open MPI, Cloud TPU).
    num_processes: the number of processes.
    process_id: the number of this process, in [0, num_processes).
    timeout: seconds after which JAX kills a process that cannot reach the others.
    heartbeat_timeout: seconds of silence after which JAX takes a process for dead, and kills the
      others.

  Raises:
    ValueError: if the environment lacks the values, or the processes have different numbers of
      devices.
  """
  # This service would silently replace the program's handler of SIGTERM.
  jax.config.update('jax_enable_preemption_service', False)
  jax.distributed.initialize(
    coordinator,
    num_processes,
    process_id,
    initialization_timeout=timeout,
    heartbeat_timeout_seconds=heartbeat_timeout,
  )
  connections.listen_on_the_way_to_the_coordinator()
  counts = collections.Counter(device.process_index for device in jax.devices())
  if len(set(counts.values())) > 1:
    raise ValueError(f'the processes must have equally many devices, got {dict(counts)}')


def is_first() -> bool:
  """Returns whether this process writes files: process 0, or the only one."""
  return not _several() or jax.process_index() == 0


def maximum(value: int) -> int:
  """Returns the maximum over the values of all processes, each an int32."""
  return int(_gather(np.int32(value)).max())


def differing(values: Mapping[str, Any]) -> list[str]:
  """Returns the names whose values, compared by `repr`, are not the same in every process."""
  digests = [zlib.crc32(repr(value).encode()) for value in values.values()]
  rows = _gather(np.array(digests, np.uint32))
  differs = (rows != rows[:1]).any(axis=0)
  return [name for name, different in zip(values, differs, strict=True) if different]


def together(function: Callable[..., Value], *args: Any) -> Value:
  """Returns `function(*args)`, if no process raises an error.

  The function must not communicate with other processes.

  Raises:
    OtherProcessError: if the function raised an error in another process only.
    Exception: the function's own error.
  """
  try:
    value = function(*args)
  except Exception:
    maximum(1)
    raise
  if maximum(0):
    raise OtherProcessError('another process has failed, and reports the reason')
  return value


def on_first(function: Callable[..., Value], *args: Any) -> Value | None:
  """Returns `function(*args)` in process 0 and None in the others, with errors as in `together`."""
  return together(function, *args) if is_first() else together(lambda: None)


def from_first(tree: Tree) -> Tree:
  """Returns process 0's tree, bit for bit.

  Args:
    tree: NumPy arrays and numbers, of the same structure, shapes and dtypes in every process.
  """
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
  """Returns the values of all processes, stacked in the order of the processes."""
  return multihost_utils.process_allgather(value) if _several() else np.asarray(value)[None]
