"""The jobs of a sweep or a figure: encoders to train, and the attacks on their probes.

A job is plain settings, so that it can be sent to another process or host. Its files are in work
directories, where whoever takes it up goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
import itertools
import os
import time
import traceback
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from etils import epy

from experiments import population, pretrain, probe, probe_settings, recording, supervised
from experiments.cli import app, flags, signals, workdirs
from se_vae.config import ArgumentError

with epy.lazy_imports():
  from se_vae.storage import checkpoints, locks

# What a run prints, in its work directory, where it is not printed for the user at once.
LOG = 'run.log'

# Seconds between two looks at a directory in which another process works.
LOOK_EVERY = 2.0

_LOCKS = (workdirs.LOCK, probe.LOCK)
_SHOWN_LINES = 8
# Errors of storage, memory and network that may pass.
_PASSING = frozenset(
  getattr(errno, name)
  for name in (
    *('EAGAIN', 'EBUSY', 'EINTR', 'EIO', 'ENOLCK', 'ENOMEM', 'EPIPE', 'EREMOTEIO', 'ESTALE'),
    *('ECONNABORTED', 'ECONNREFUSED', 'ECONNRESET', 'ETIMEDOUT'),
    *('EHOSTDOWN', 'EHOSTUNREACH', 'ENETDOWN', 'ENETUNREACH'),
  )
  if hasattr(errno, name)  # not every system has all of them
)


@dataclasses.dataclass(frozen=True)
class Job:
  """An encoder and the attacks on it.

  Attributes:
    name: shown to the user; no two jobs have the same.
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

  @property
  def batch_size(self) -> int:
    """Examples a step."""
    return self.pretraining.batch_size

  @property
  def num_devices(self) -> int | None:
    """The devices that the settings ask for, if they do."""
    return self.pretraining.num_devices

  def settings(self) -> dict[str, Any]:
    """All settings of the training, by name."""
    return flags.to_dict(self.pretraining)

  def to_json(self) -> dict[str, Any]:
    """The job as JSON values, for `from_json`."""
    return {
      'name': self.name,
      'pretraining': flags.to_dict(self.pretraining),
      'attacks': [flags.to_dict(attack) for attack in self.attacks],
    }

  def with_absolute_paths(self) -> Job:
    """The job for a process that starts in another directory."""
    attacks = tuple(_with_absolute_path(attack) for attack in self.attacks)
    return Job(self.name, _with_absolute_path(self.pretraining), attacks)

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
        probe.load_surrogate(attack, dataset.train.images.shape[1:])

  def user(self) -> str | None:
    """Who works in the directory, such as 'process 7 on host'; None if nobody does."""
    return _user([self.workdir])

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

  def do(self, stop: signals.StopSignal) -> Outcome:
    """Does what is left.

    Raises:
      Interrupted: when `stop` says so, after a checkpoint.
      Exception: whatever training and attacks raise.
    """
    started, fresh = time.monotonic(), not (self.workdir / recording.CONFIG).exists()
    encoder = pretrain.run(self.pretraining, stop, self.name)
    attacked = [
      probe.run(attack, stop, f'{self.name}, attack on {attack.task}') for attack in self.attacks
    ]
    return Outcome(encoder, attacked, time.monotonic() - started if fresh else None)


@dataclasses.dataclass(frozen=True)
class PopulationJob:
  """Encoders that one program trains together, for jobs of their own that attack them later.

  Attributes:
    name: shown to the user.
    members: the settings of each training.
    workdir: the directory of all of them.
  """

  name: str
  members: tuple[pretrain.PretrainConfig, ...]
  workdir: Path

  @property
  def batch_size(self) -> int:
    """Examples a step, of all members."""
    return self.members[0].batch_size * len(self.members)

  @property
  def num_devices(self) -> int | None:
    """The devices that the settings ask for, if they do."""
    return self.members[0].num_devices

  def settings(self) -> dict[str, Any]:
    """All settings of the first member, by name."""
    return flags.to_dict(self.members[0])

  def to_json(self) -> dict[str, Any]:
    """The job as JSON values, for `from_json`."""
    members = [flags.to_dict(member) for member in self.members]
    return {'name': self.name, 'members': members, 'workdir': str(self.workdir)}

  def with_absolute_paths(self) -> PopulationJob:
    """The job for a process that starts in another directory."""
    members = tuple(_with_absolute_path(member) for member in self.members)
    return PopulationJob(self.name, members, self.workdir.absolute())

  def user(self) -> str | None:
    """Who works in one of the directories; None if nobody does."""
    return _user([Path(str(member.workdir)) for member in self.members])

  def finished(self) -> Outcome | None:
    """An outcome without results, if all members are trained; None otherwise."""
    results = [pretrain.finished(member) for member in self.members]
    return None if None in results else Outcome(encoder={})

  def do(self, stop: signals.StopSignal) -> Outcome:
    """Does what is left, as `Job.do`."""
    started = time.monotonic()
    population.train_population(self.members, stop, self.name)
    return Outcome(encoder={}, seconds=time.monotonic() - started)


@dataclasses.dataclass(frozen=True)
class SupervisedJob:
  """A classifier that is trained with labels, and attacked.

  Attributes:
    name: shown to the user; no two jobs have the same.
    config: the settings of its training and of the attack.
  """

  name: str
  config: supervised.SupervisedConfig

  @property
  def workdir(self) -> Path:
    """The directory of all files of this job."""
    return Path(str(self.config.workdir))

  @property
  def batch_size(self) -> int:
    """Examples a step."""
    return self.config.batch_size

  @property
  def num_devices(self) -> int | None:
    """None: a classifier takes the devices that there are."""
    return None

  def settings(self) -> dict[str, Any]:
    """All settings, by name."""
    return flags.to_dict(self.config)

  def to_json(self) -> dict[str, Any]:
    """The job as JSON values, for `from_json`."""
    return {'name': self.name, 'supervised': self.settings()}

  def with_absolute_paths(self) -> SupervisedJob:
    """The job for a process that starts in another directory."""
    return SupervisedJob(self.name, _with_absolute_path(self.config))

  def check(self) -> None:
    """Checks all settings. Compiles and writes nothing.

    Raises:
      ArgumentError: if a setting cannot be used.
    """
    with contextlib.suppress(workdirs.InUseError):
      supervised.prepare(self.config)

  def user(self) -> str | None:
    """Who works in the directory; None if nobody does."""
    return _user([self.workdir])

  def finished(self) -> Outcome | None:
    """The result, if the classifier is trained and attacked; None otherwise."""
    try:
      result = supervised.finished(self.config)
    except workdirs.InUseError:
      return None
    return None if result is None else Outcome(encoder={}, attacked=[result])

  def do(self, stop: signals.StopSignal) -> Outcome:
    """Does what is left, as `Job.do`."""
    started, fresh = time.monotonic(), not (self.workdir / recording.CHECKPOINTS).exists()
    result = supervised.run(self.config, stop)
    return Outcome({}, [result], time.monotonic() - started if fresh else None)


AnyJob = Job | PopulationJob | SupervisedJob
AttackedJob = Job | SupervisedJob


def from_json(values: dict[str, Any]) -> AnyJob:
  """Inverts `to_json`."""
  if 'supervised' in values:
    config = flags.from_dict(supervised.SupervisedConfig, values['supervised'])
    return SupervisedJob(values['name'], config)
  if 'members' in values:
    members = [flags.from_dict(pretrain.PretrainConfig, member) for member in values['members']]
    return PopulationJob(values['name'], tuple(members), Path(values['workdir']))
  return Job(
    values['name'],
    flags.from_dict(pretrain.PretrainConfig, values['pretraining']),
    tuple(flags.from_dict(probe_settings.ProbeConfig, attack) for attack in values['attacks']),
  )


def _with_absolute_path(config: Any) -> Any:
  values = flags.absolute(flags.to_dict(config))
  return flags.replace(config, **(values | {'workdir': os.path.abspath(values['workdir'])}))


def _user(directories: Iterable[Path]) -> str | None:
  try:
    for directory, name in itertools.product(directories, _LOCKS):
      locks.check_free(directory / name)
  except locks.InUseError as owner:
    return str(owner)
  return None


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


# What takes the outcome of a job.
Report = Callable[[Any, Outcome], None]


def compiled_programs(workdir: Path) -> Path:
  """Where the jobs of a sweep or a figure keep compiled programs, until all are finished.

  Each host has a folder there: XLA compiles for the very processor that it runs on.
  """
  return workdir.absolute() / 'compiled'


def attempt(job: AnyJob, stop: signals.StopSignal) -> Outcome:
  """Does what is left of a job; an error becomes an outcome.

  Raises:
    Interrupted: when `stop` says so, after a checkpoint.
  """
  try:
    return job.do(stop)
  except signals.Interrupted:
    raise
  except workdirs.InUseError as error:
    return Outcome(user=error.owner)
  except ArgumentError as error:
    return Outcome(error=flags.name_flags(error))
  except Exception as error:  # whatever it is, the other jobs go on
    memory = app.out_of_memory(error)
    if memory is not None:
      return Outcome(error=' '.join(memory.split()))
    if not isinstance(error, app.failures()):
      traceback.print_exc()  # into the log of the run
    return Outcome(error=' '.join(str(error).split()) or type(error).__name__, again=_passes(error))


def _passes(error: Exception) -> bool:
  """Whether what the machine did may not happen again: numbers, files and settings stay."""
  if isinstance(error, OSError):
    return error.errno in _PASSING
  lasting = (checkpoints.CheckpointError, NotImplementedError, RecursionError)
  return isinstance(error, RuntimeError) and not isinstance(error, lasting)


def is_tried_again(outcome: Outcome, attempts: int, retries: int) -> bool:
  """Whether a job is started again after so many attempts, of which this was the last."""
  return outcome.again and attempts <= retries


def waiting(job: AnyJob, user: str) -> str:
  """What a user reads of a job that is put off, since another process works in its directory."""
  return f'{job.name}: {job.workdir} is in use by {user}; waiting for it'


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


def failure_text(failures: Iterable[tuple[AnyJob, str]], *, logs: bool) -> str:
  """What a user reads of failed jobs: the error of each, and the end of its log if it has one."""
  parts = []
  for job, error in failures:
    log = job.workdir / LOG
    lines = [f'    {line}' for line in last_lines(log)] if logs else []
    parts.append(
      '\n'.join([f'failed: {job.name}: {error}', *([f'  {log}:', *lines] if lines else [])])
    )
  return '\n'.join(parts)
