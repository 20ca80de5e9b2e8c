"""How the runs of a sweep or a figure are shared out: here, in slots, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import dataclasses
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from etils import epy

from experiments.cli import messages, signals
from experiments.scheduling import jobs, processes, ray_cluster, slots
from se_vae.config import setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

# Seconds between two looks at a directory in which another process works.
_LOOK_EVERY = 2.0


@dataclasses.dataclass(frozen=True)
class PlacementConfig:
  """Where runs take place. Their results depend on it by rounding only."""

  parallel: str = setting(
    'auto',
    "Runs side by side on this machine, each with cores or a GPU of its own: a number, or 'auto' "
    'for one a GPU, or else one a core.',
  )
  retries: int = setting(
    2,
    'How often a run that fails or is killed is started again, from its last checkpoint.',
    at_least=0,
    at_most=1000,
  )
  ray_address: str | None = setting(
    None,
    "Ray cluster to run on: 'auto' for that of this machine, or HOST:PORT. Needs the extra "
    'cluster, and a work directory that all nodes share.',
  )
  resources_per_run: str = setting(
    'cpu=1', "What a run takes of a Ray node: amounts, such as 'cpu=2,gpu=0.5'."
  )

  def __post_init__(self) -> None:
    validate(self)
    slots.parse(self.parallel)
    ray_cluster.parse_resources(self.resources_per_run)


def run_all(
  every: Sequence[jobs.AnyJob],
  config: PlacementConfig,
  workdir: Path,
  stop: signals.StopSignal,
  report: jobs.Report,
) -> None:
  """Does all jobs that are not finished, and reports what became of each when it is known.

  Args:
    every: the jobs, in the order in which they start. They have been checked.
    config: where they run.
    workdir: the directory of all of them.
    stop: asked often whether to stop.
    report: called once for every job.

  Raises:
    ArgumentError: for a cluster that cannot be used, before anything is trained.
    Interrupted: when `stop` says so; all runs have saved their work.
    ChildProcessError: after all others have ended, if jobs failed. They are printed before.
  """
  failed: list[tuple[jobs.AnyJob, str]] = []

  def note(job: jobs.AnyJob, outcome: jobs.Outcome) -> None:
    if outcome.error is not None:
      failed.append((job, outcome.error))
    report(job, outcome)

  left = []
  for job in every:
    outcome = job.finished()
    if outcome is None:
      left.append(job)
    else:
      report(job, outcome)
  if left and config.ray_address is not None:
    resources = ray_cluster.parse_resources(config.resources_per_run)
    ray_cluster.run(left, config.ray_address, resources, config.retries, workdir, stop, note)
  elif left:
    _run_here(left, config, workdir, stop, note)
  compiled = jobs.compiled_programs(workdir)
  shutil.rmtree(compiled, ignore_errors=True)
  with contextlib.suppress(OSError):  # other hosts have theirs there
    compiled.parent.rmdir()
  if failed:
    print(jobs.failure_text(failed), file=sys.stderr)
    raise ChildProcessError(f'{len(failed)} of {len(every)} runs failed; the others are finished')


def use_cpu_alone_beside_slots(config: PlacementConfig) -> None:
  """Leaves the GPUs to the processes of the runs, if there are any. Before JAX is first used."""
  if config.ray_address is not None or (config.parallel != '1' and slots.gpus()):
    jax.config.update('jax_platforms', 'cpu')


def _run_here(
  left: Sequence[jobs.AnyJob],
  config: PlacementConfig,
  workdir: Path,
  stop: signals.StopSignal,
  report: jobs.Report,
) -> None:
  """Does jobs on this machine: in slots, or if one has all of it, in this process."""
  own = slots.slots(config.parallel, len(left), left[0].pretraining.num_devices or 1)
  if len(own) == 1 and own[0].gpu is None:
    for number, job in enumerate(left, start=1):
      report(job, _attempt_here(job, f'[{number}/{len(left)}]', config.retries, stop))
    return
  chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  cache_dir = jobs.compiled_programs(workdir) if chosen is None else Path(chosen)
  processes.run(left, own, config.retries, cache_dir, stop, report)


def _attempt_here(
  job: jobs.AnyJob, counted: str, retries: int, stop: signals.StopSignal
) -> jobs.Outcome:
  """Does a job in this process; waits for a directory that another one uses."""
  left, told = retries, False
  while True:
    outcome = jobs.attempt(dataclasses.replace(job, name=f'{counted} {job.name}'), stop)
    if outcome.user is not None:
      if not told:
        messages.write_line(
          f'{job.name}: {job.workdir} is in use by {outcome.user}; waiting for it'
        )
      told = True
      time.sleep(_LOOK_EVERY)
      stop.check()
    elif outcome.again and left > 0:
      messages.write_line(f'{job.name}: {outcome.error}; started again')
      left -= 1
    else:
      return outcome
