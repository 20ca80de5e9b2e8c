"""The slots of this machine: the cores or the GPU that one run has for itself."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import os
import subprocess
import sys
from collections.abc import Mapping

from experiments.cli import devices, messages
from se_vae.config import ArgumentError

_VISIBLE = 'CUDA_VISIBLE_DEVICES'
# Of the memory of a GPU; the rest is for its driver and for other programs.
_USABLE = 0.9


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
      variables[_VISIBLE] = self.gpu
      if self.gpu_share < 1.0:
        variables['XLA_PYTHON_CLIENT_MEM_FRACTION'] = f'{_USABLE * self.gpu_share:.3f}'
    return variables


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


def slots(parallel: str, num_jobs: int, cores_per_run: int = 1) -> list[Slot]:
  """The slots for a number of runs; a single one has all cores, and leaves the GPUs to JAX.

  'auto' makes a slot of each GPU, or else of each core, as far as there are runs for them. All
  slots have equally many cores.

  Args:
    parallel: 'auto' or a number.
    num_jobs: the number of runs.
    cores_per_run: the CPU cores that a run asks for.

  Raises:
    ArgumentError: for another text.
  """
  asked = parse(parallel)
  if asked == 1:
    return _divided(1, [])
  found = gpus()
  if num_jobs <= 1:  # it has all of them
    return _divided(1, [','.join(found)] if found else [])
  fitting = len(found) or devices.num_cores() // cores_per_run
  if asked is not None and asked > max(fitting, 1):
    have = f'{len(found)} GPUs' if found else f'{devices.num_cores()} cores'
    messages.warn(f'--parallel: {asked} runs share {have}, and are no faster side by side')
  return _divided(max(1, min(fitting if asked is None else asked, num_jobs)), found)


def _divided(count: int, found: list[str]) -> list[Slot]:
  """The slots that `count` runs have, on the GPUs that were found."""
  number = max(1, devices.num_cores() // count)
  cores = sorted(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else []
  made = []
  for i in range(count):
    own = tuple(cores[(i * number + j) % len(cores)] for j in range(number)) if cores else ()
    if found:
      sharing = len(range(i % len(found), count, len(found)))
      made.append(Slot(own, number, found[i % len(found)], 1.0 / sharing))
    else:
      made.append(Slot(own, number))
  return made


def gpus(environment: Mapping[str, str] = os.environ) -> list[str]:
  """The NVIDIA GPUs that JAX would use, by the names that `CUDA_VISIBLE_DEVICES` takes.

  JAX is not started here: it would take the memory of all of them.
  """
  wanted = environment.get('JAX_PLATFORMS', 'cuda')
  plugins = [entry.name for entry in importlib.metadata.entry_points(group='jax_plugins')]
  if not any('cuda' in name for name in plugins) or not {'cuda', 'gpu'} & set(wanted.split(',')):
    return []
  visible = environment.get(_VISIBLE)
  if visible is not None:
    return [name for name in visible.split(',') if name and name != '-1']
  code = 'import jax; print(len(jax.devices("cuda")))'
  asked = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
  return [str(i) for i in range(int(asked.stdout))] if asked.returncode == 0 else []
