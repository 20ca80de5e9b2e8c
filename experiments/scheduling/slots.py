"""The slots of this machine: the cores or the GPU that one run has for itself."""

from __future__ import annotations

import dataclasses
import functools
import importlib.metadata
import importlib.util
import os
import subprocess
import sys
from collections.abc import Mapping

from experiments.cli import devices, messages
from se_vae.config import ArgumentError

_VISIBLE = 'CUDA_VISIBLE_DEVICES'
# Of the memory of a GPU; the rest is for its driver and for other programs.
_USABLE = 0.9
# Seconds in which JAX has to count the GPUs.
_PATIENCE = 60.0


@dataclasses.dataclass(frozen=True)
class Slot:
  """What one run has for itself.

  Attributes:
    cores: the numbers of its CPU cores; empty where the system does not bind processes to cores.
    num_cores: how many cores it counts on.
    gpu: its GPU, as `CUDA_VISIBLE_DEVICES` names it; None for a CPU.
    gpu_share: the share of that GPU's memory.
  """

  cores: tuple[int, ...]
  num_cores: int
  gpu: str | None = None
  gpu_share: float = 1.0

  def environment(self) -> dict[str, str]:
    """The variables that bind a process to this slot, before JAX is first used."""
    variables = {devices.CORES_VARIABLE: str(self.num_cores)}
    if self.gpu is not None:
      variables |= {_VISIBLE: self.gpu} | share_of_memory(self.gpu_share)
    return variables


def share_of_memory(share: float) -> dict[str, str]:
  """The variable that gives a process a share of the memory of its GPU; none for all of it."""
  return {'XLA_CLIENT_MEM_FRACTION': f'{_USABLE * share:.3f}'} if share < 1.0 else {}


def parse(parallel: str) -> int | None:
  """The number of slots that --parallel asks for; None for 'auto'.

  Raises:
    ArgumentError: if it is neither.
  """
  if parallel == 'auto':
    return None
  try:
    count = int(parallel)
  except ValueError:
    count = 0
  if not 1 <= count <= 1024:
    raise ArgumentError('parallel', f"must be 'auto' or a number from 1 to 1024, got {parallel!r}")
  return count


def slots(parallel: str, num_runs: int, devices_per_run: int = 1) -> list[Slot]:
  """The slots for a number of runs. All have equally many cores.

  'auto' makes a slot of each GPU, or else of each core, as far as there are runs for them. A single
  run has all of them.

  Args:
    parallel: 'auto' or a number.
    num_runs: how many runs there are.
    devices_per_run: the GPUs, or else the cores, that a run asks for.

  Raises:
    ArgumentError: for another text, or fewer GPUs than a run asks for.
  """
  asked = parse(parallel)
  if asked == 1:
    return _slots_of(1, [])
  found = gpus()
  if not found and has_other_accelerator():
    if asked is not None:
      messages.warn(f'--parallel: {asked} runs cannot share this accelerator; one after the other')
    return _slots_of(1, [])
  if found and devices_per_run > len(found):
    raise ArgumentError('num_devices', f'must be <= {len(found)}, the GPUs here')
  if num_runs <= 1:
    return _slots_of(1, [','.join(found)] if found else [])
  groups = [
    ','.join(found[i : i + devices_per_run])
    for i in range(0, len(found) - devices_per_run + 1, devices_per_run)
  ]
  fitting = max(1, len(groups) if found else devices.num_cores() // devices_per_run)
  count = min(fitting if asked is None else asked, num_runs)
  if count > fitting:
    have = f'{len(found)} GPUs' if found else f'{devices.num_cores()} cores'
    messages.warn(f'--parallel: {count} runs share {have}')
  return _slots_of(count, groups)


def _slots_of(count: int, groups: list[str]) -> list[Slot]:
  """As many slots, on these groups of GPUs, or on cores alone if there are none."""
  number = max(1, devices.num_cores() // count)
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
  made = []
  for i in range(count):
    own = tuple(cores[(i * number + j) % len(cores)] for j in range(number)) if cores else ()
    if groups:
      sharing = len(range(i % len(groups), count, len(groups)))
      made.append(Slot(own, number, groups[i % len(groups)], 1.0 / sharing))
    else:
      made.append(Slot(own, number))
  return made


def gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
  """The NVIDIA GPUs that JAX would use, by the names that `CUDA_VISIBLE_DEVICES` takes.

  JAX is not started here: it would take the memory of all of them.
  """
  wanted = (environment.get('JAX_PLATFORMS') or 'cuda').split(',')
  if not any('cuda' in name for name in _plugins()) or not {'cuda', 'gpu'} & set(wanted):
    return []
  visible = environment.get(_VISIBLE)
  if visible is not None:
    return [name for name in visible.split(',') if name and name != '-1']
  return [str(i) for i in range(_count_gpus())]


def has_other_accelerator(environment: Mapping[str, str] = os.environ) -> bool:
  """Whether JAX would use an accelerator that slots cannot share out, such as a TPU."""
  wanted = environment.get('JAX_PLATFORMS')
  others = [name for name in _plugins() if 'cuda' not in name]
  return bool(others) and wanted != 'cpu'


def _plugins() -> list[str]:
  """The accelerators for which JAX has a package here."""
  found = [entry.name for entry in importlib.metadata.entry_points(group='jax_plugins')]
  has_tpu = importlib.util.find_spec('libtpu') is not None
  return [*found, 'tpu'] if has_tpu else found


@functools.cache
def _count_gpus() -> int:
  """Asks JAX in another process, which takes no memory of them.

  Raises:
    ArgumentError: if there is no answer.
  """
  code = 'import jax; print(len(jax.devices("cuda")))'
  try:
    asked = subprocess.run(
      [sys.executable, '-c', code],
      env={**os.environ, 'XLA_PYTHON_CLIENT_PREALLOCATE': 'false'},
      capture_output=True,
      text=True,
      check=True,
      timeout=_PATIENCE,
    )
    return int(asked.stdout.split()[-1])
  except subprocess.TimeoutExpired:
    # Runs on CPU slots would all open the GPUs.
    message = f'the GPUs did not answer in {_PATIENCE:g} s; JAX_PLATFORMS=cpu leaves them alone'
    raise ArgumentError('parallel', message) from None
  except (subprocess.CalledProcessError, ValueError, IndexError):
    return 0
