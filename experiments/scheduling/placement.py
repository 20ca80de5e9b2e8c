"""How the runs of a sweep or a figure are shared out: here, in slots, or on a Ray cluster."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import platform
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from etils import epy

from experiments.cli import app, messages, programs, signals
from experiments.scheduling import jobs, processes, ray_cluster, slots
from se_vae.config import ArgumentError, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

  from se_vae.storage import locks


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
  resources_per_run: str | None = setting(
    None, "What a run takes of a Ray node, such as 'cpu=2,gpu=0.5'; one core if not given."
  )

  def __post_init__(self) -> None:
    validate(self)
    slots.parse(self.parallel)
    if self.resources_per_run is not None:
      ray_cluster.parse_resources(self.resources_per_run)
    if self.ray_address is not None and self.parallel != 'auto':
      raise ArgumentError(
        'parallel', 'is for this machine; with --ray_address, Ray shares runs out'
      )
    if self.ray_address is None and self.resources_per_run is not None:
      raise ArgumentError('resources_per_run', 'is for --ray_address, which is not given')


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
    RunsFailedError: after all others have ended, if jobs failed. They are printed before.
  """
  failed: list[tuple[jobs.AnyJob, str]] = []
  in_logs = config.ray_address is not None

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
    resources = ray_cluster.parse_resources(config.resources_per_run or '')
    ray_cluster.run(left, config.ray_address, resources, config.retries, workdir, stop, note)
  elif left:
    # Those of all jobs, so that the same command goes on with as many cores for each.
    own = slots.slots(config.parallel, len(every), max(job.num_devices or 1 for job in every))
    in_logs = _run_here(left, own, config.retries, workdir, stop, note)
  _remove_programs(workdir)
  if failed:
    print(jobs.failure_text(failed, logs=in_logs), file=sys.stderr)
    raise app.RunsFailedError(f'{len(failed)} of {len(every)} runs failed; the others are finished')


def use_cpu_alone_beside_slots(config: PlacementConfig) -> None:
  """Leaves the GPUs to the processes of the runs, if there are any. Before JAX is first used."""
  if config.ray_address is not None or (slots.parse(config.parallel) != 1 and slots.gpus()):
    jax.config.update('jax_platforms', 'cpu')


def _run_here(
  left: Sequence[jobs.AnyJob],
  own: Sequence[slots.Slot],
  retries: int,
  workdir: Path,
  stop: signals.StopSignal,
  report: jobs.Report,
) -> bool:
  """Does jobs on this machine: in slots, or if one has all of it, in this process.

  Returns whether they were processes of their own, which have logs.
  """
  chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  if len(own) == 1 and own[0].gpu is None:
    _run_in_this_process(left, retries, stop, report)
    return False
  if chosen is not None:
    processes.run(left, own, retries, Path(chosen), stop, report)
  else:
    compiled, lock = _programs(workdir)
    with locks.share(lock):
      compiled.mkdir(parents=True, exist_ok=True)
      processes.run(left, own, retries, compiled, stop, report)
  return True


def _programs(workdir: Path) -> tuple[Path, Path]:
  """The folder of this host's compiled programs, and the lock that their users share."""
  host = platform.node()
  return jobs.compiled_programs(workdir) / host, workdir / f'.compiled.{host}.lock'


def _remove_programs(workdir: Path) -> None:
  """Removes what this command has compiled, or one that was killed, where nobody uses it now."""
  compiled, lock = _programs(workdir)
  if compiled.exists():
    with contextlib.suppress(locks.InUseError, OSError), locks.hold(lock):
      shutil.rmtree(compiled)
      compiled.parent.rmdir()  # if there are none of other hosts


def _run_in_this_process(
  left: Sequence[jobs.AnyJob], retries: int, stop: signals.StopSignal, report: jobs.Report
) -> None:
  """Does jobs one after the other; puts those off that another process works on."""
  waiting = collections.deque((job, 1) for job in left)
  put_off = ended = 0
  told: set[str] = set()
  while waiting:
    job, number = waiting.popleft()
    shown = dataclasses.replace(job, name=f'[{ended + 1}/{len(left)}] {job.name}')
    outcome = jobs.attempt(shown, stop)
    programs.forget_if_many()  # encoders of other sizes have programs of their own
    if outcome.user is not None:
      if job.name not in told:
        messages.write_line(jobs.waiting(job, outcome.user))
      told.add(job.name)
      waiting.append((job, number))
      put_off += 1
      if put_off >= len(waiting):
        time.sleep(jobs.LOOK_EVERY)
        put_off = 0
      stop.check()
      continue
    put_off = 0
    if jobs.is_tried_again(outcome, number, retries):
      messages.write_line(f'{job.name}: {outcome.error}; started again')
      waiting.appendleft((job, number + 1))
    else:
      ended += 1
      report(job, outcome)
