"""One run of a sweep or a figure: an encoder to train, and the attacks on its probes.

A job is plain settings, so that it can be sent to another process or host. Its files are in its
work directory alone, where whoever takes it up goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import platform
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from etils import epy

from experiments import pretrain, probe, probe_settings, recording
from experiments.cli import flags, signals, workdirs
from se_vae.config import ArgumentError

with epy.lazy_imports():
  from se_vae.storage import locks

# What a run prints, in its work directory, where it is not printed for the user at once.
LOG = 'run.log'

_LOCKS = (workdirs.LOCK, probe.LOCK)
_SHOWN_LINES = 8


@dataclasses.dataclass(frozen=True)
class Job:
  """An encoder and the attacks on it.

  Attributes:
    name: what the user knows it by; no two jobs have the same.
    pretraining: the settings of its training.
    attacks: the settings of its probes and of the attacks on them.
  """

  name: str
  pretraining: pretrain.PretrainConfig
  attacks: tuple[probe_settings.ProbeConfig, ...]

  @property
  def workdir(self) -> Path:
    """The directory of all files of this job."""
    return Path(str(self.pretraining.workdir))

  def to_json(self) -> dict[str, Any]:
    """The job as JSON values."""
    return {
      'name': self.name,
      'pretraining': flags.to_dict(self.pretraining),
      'attacks': [flags.to_dict(attack) for attack in self.attacks],
    }

  @classmethod
  def from_json(cls, values: dict[str, Any]) -> Job:
    """Inverts `to_json`."""
    return cls(
      values['name'],
      flags.from_dict(pretrain.PretrainConfig, values['pretraining']),
      tuple(flags.from_dict(probe_settings.ProbeConfig, attack) for attack in values['attacks']),
    )

  def check(self, attacks_flag: str | None = None) -> None:
    """Checks all settings. Compiles and writes nothing.

    A directory in which another process works is not checked: that process has done so.

    Args:
      attacks_flag: the flag that the settings of the attacks come from, for the error.

    Raises:
      ArgumentError: if a setting cannot be used.
    """
    try:
      dataset = pretrain.prepare(self.pretraining)
    except workdirs.InUseError:
      return
    of_flag = (
      contextlib.nullcontext() if attacks_flag is None else flags.errors_begin_with(attacks_flag)
    )
    with of_flag:
      for attack in self.attacks:
        probe.check_fits(attack, dataset, self.pretraining.model)

  def user(self) -> str | None:
    """Who works in the directory, such as 'process 7 on host'; None if nobody does."""
    try:
      for name in _LOCKS:
        locks.check_free(self.workdir / name)
    except locks.InUseError as owner:
      return str(owner)
    return None

  def finished(self) -> Outcome | None:
    """The results, if the encoder and all attacks are finished; None otherwise."""
    encoder = pretrain.finished(self.pretraining)
    if encoder is None:
      return None
    try:
      attacked = [probe.finished(attack) for attack in self.attacks]
    except workdirs.InUseError:
      return None
    found = [result for result in attacked if result is not None]
    return Outcome(encoder, found) if len(found) == len(attacked) else None


@dataclasses.dataclass(frozen=True)
class Outcome:
  """How an attempt at a job has ended; JSON values.

  Attributes:
    encoder: the content of the encoder's result.json; None unless the job is finished.
    attacked: the content of the result of each attack.
    seconds: how long it took, if it began afresh and was not interrupted.
    error: why the job failed, in a line; None unless it did.
    again: whether another attempt may succeed where this one failed.
    user: who else works in the directory, if that is why nothing was done.
  """

  encoder: dict[str, Any] | None = None
  attacked: list[dict[str, Any]] = dataclasses.field(default_factory=list)
  seconds: float | None = None
  error: str | None = None
  again: bool = False
  user: str | None = None


def compiled_programs(workdir: Path) -> Path:
  """Where the jobs of a directory keep this host's compiled programs until all are finished."""
  return workdir.absolute() / 'compiled' / platform.node()


# What takes the outcome of a job.
Report = Callable[[Job, Outcome], None]


def attempt(job: Job, stop: signals.StopSignal) -> Outcome:
  """Does what is left of a job; an error becomes an outcome.

  Raises:
    Interrupted: when `stop` says so, after a checkpoint.
  """
  started, fresh = time.monotonic(), not (job.workdir / recording.CONFIG).exists()
  try:
    encoder = pretrain.run(job.pretraining, stop, job.name)
    attacked = [
      probe.run(attack, stop, f'{job.name}, attack on {attack.task}') for attack in job.attacks
    ]
  except signals.Interrupted:
    raise
  except workdirs.InUseError as error:
    return Outcome(user=error.owner)
  except ArgumentError as error:
    return Outcome(error=flags.name_flags(error))
  except Exception as error:  # whatever it is, the other jobs go on
    machine = isinstance(error, OSError | MemoryError | RuntimeError)
    if not isinstance(error, OSError | ArithmeticError | MemoryError):
      traceback.print_exc()  # into the log of the run
    return Outcome(error=' '.join(str(error).split()) or type(error).__name__, again=machine)
  return Outcome(encoder, attacked, time.monotonic() - started if fresh else None)


def ending(outcome: Outcome) -> str:
  """What became of a job, in a few words."""
  if outcome.error is not None:
    return f'failed: {outcome.error}'
  return 'finished' if outcome.seconds is None else f'finished in {outcome.seconds:.0f} s'


def last_lines(path: Path) -> list[str]:
  """The last lines of a log, which may be missing."""
  if not path.exists():
    return []
  with path.open('rb') as file:
    file.seek(max(0, path.stat().st_size - 2**14))
    text = file.read().decode(errors='replace')
  return text.splitlines()[-_SHOWN_LINES:]


def failure_text(failures: Iterable[tuple[Job, str]]) -> str:
  """What a user reads of failed jobs: the error of each, and the end of its log."""
  parts = []
  for job, error in failures:
    log = job.workdir / LOG
    lines = [f'    {line}' for line in last_lines(log)]
    parts.append(
      '\n'.join([f'failed: {job.name}: {error}', *([f'  {log}:', *lines] if lines else [])])
    )
  return '\n'.join(parts)
