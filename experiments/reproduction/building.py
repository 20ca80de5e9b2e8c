"""Building rows of a manifest: what is checked before, the runs in order, and the rows after."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from etils import epy

from experiments import pretrain, probe, probe_settings
from experiments.cli import app, flags, messages, signals, workdirs
from experiments.reproduction.manifest import Manifest
from experiments.reproduction.plan import Plan
from experiments.scheduling import jobs, placement
from se_vae.config import ArgumentError

with epy.lazy_imports():
  from experiments.reproduction import rows
  from se_vae.storage import json_files

# Says in a work directory which results it is for.
LEDGER = 'results.json'

Done = Callable[[str, Any], None]  # takes the name of a row and the row


def radii(planned: Plan, name: str) -> tuple[float, ...]:
  """The radii at which a row is attacked."""
  row = planned.manifest.rows[name]
  if 'encoder' in row:
    return planned.attack(name, row['seeds'][0]).radii
  return probe_settings.parse(row['probe']).radii


def check(planned: Plan, chosen: list[str]) -> None:
  """Checks the settings of all runs of rows, as far as that is possible before encoders exist.

  Raises:
    ArgumentError: if a setting cannot be used.
  """
  for name in chosen:
    row = planned.manifest.rows[name]
    if 'supervised' in row:
      for seed in row['seeds']:
        planned.job(name, seed).check()
      continue
    seed = row['seeds'][0]  # the others have the same settings and data
    for encoder in planned.manifest.encoders_of(name):
      planned.pretraining(encoder, seed)
    pretraining = planned.pretraining(str(row.get('encoder')), seed)
    dataset = pretrain.load_dataset(pretraining.data, planned.workdir)
    attack = planned.attack(name, seed)
    with flags.errors_begin_with(f'row {name}'):
      probe.check_fits(attack, dataset, pretraining.model)


def claim(workdir: Path, ledger: dict[str, Any]) -> None:
  """Marks a work directory as that of some results, which later calls must name again.

  Args:
    workdir: the directory, which is made.
    ledger: JSON values. `checked` marks the end of a check, which is not repeated there.

  Raises:
    ArgumentError: if the directory has runs of other results, or its ledger is damaged.
  """
  directory = workdirs.check_directory('workdir', str(workdir))
  try:
    before = json_files.read(directory / LEDGER, dict[str, Any])
  except FileNotFoundError:
    before = None
  except json_files.JsonError as error:  # it may be that of other code, whose runs are no use
    raise ArgumentError('workdir', f'{error}; remove the directory or name another') from None
  if before is not None and {**before, 'checked': True} != {**ledger, 'checked': True}:
    raise ArgumentError('workdir', f'{workdir} has runs of other code; remove it or name another')
  if before is not None and before.get('checked'):
    raise ArgumentError('workdir', f'{workdir} has a finished check; remove it or name another')
  if before != ledger:
    directory.mkdir(parents=True, exist_ok=True)
    workdirs.write_json(directory / LEDGER, ledger)


def build(
  where: placement.PlacementConfig,
  planned: Plan,
  chosen: list[str],
  stop: signals.StopSignal,
  done: Done,
) -> None:
  """Does what is missing of rows, section by section; `done` takes each row when it is finished.

  Raises:
    Interrupted: when `stop` has a signal.
    RunsFailedError: if rows are not finished, after all that can be.
  """
  unfinished = [
    name
    for group in _groups(planned.manifest, chosen)
    for name in _build_group(where, planned, group, stop, done)
  ]
  if unfinished:
    raise app.RunsFailedError(f'not finished: {", ".join(unfinished)}; the other rows are')


def _build_group(
  where: placement.PlacementConfig,
  planned: Plan,
  group: list[str],
  stop: signals.StopSignal,
  done: Done,
) -> list[str]:
  """Does what is missing of some rows; returns those that are not finished."""
  left = list(group)

  def collect(names: Iterable[str]) -> None:
    for name in names:
      if name in left and (row := _row(planned, name)) is not None:
        left.remove(name)
        done(name, row)

  def report(job: jobs.AnyJob, outcome: jobs.Outcome) -> None:
    if outcome.attacked:
      collect([job.name.partition(',')[0]])

  failed = False
  for wave in planned.waves(group):
    try:
      ready = list(_ready(wave)) if failed else wave
      placement.run_all(ready, where, planned.workdir, stop, report)
    except app.RunsFailedError:
      failed = True
  collect(group)
  return left


def _ready(wave: list[jobs.AttackedJob]) -> Iterator[jobs.AttackedJob]:
  """The jobs that do not need what has failed."""
  for job in wave:
    try:
      job.check()
    except ArgumentError as error:
      messages.warn(f'{job.name} is left out: {flags.name_flags(error)}')
    else:
      yield job


def _groups(found: Manifest, chosen: list[str]) -> Iterator[list[str]]:
  """The chosen rows, section by section, and those that no section shows at the end."""
  left = dict.fromkeys(chosen)
  for section in found.content['sections']:
    own = [name for name in section.get('rows', ()) if name in left]
    for name in own:
      left.pop(name)
    if own:
      yield own
  if left:
    yield list(left)


def _row(planned: Plan, name: str) -> rows.Measured | None:
  """A row from the files of its runs; None unless all are finished."""
  row, outcomes = planned.manifest.rows[name], {}
  for seed in row['seeds']:
    # Also those that it starts from: their flags may have changed since.
    encoders = [planned.pretraining(each, seed) for each in planned.manifest.encoders_of(name)]
    if not all(map(pretrain.finished, encoders)):
      return None
    try:
      outcome = planned.job(name, seed).finished()
    except ArgumentError:  # an encoder that it starts from failed
      return None
    if outcome is None or outcome.encoder is None:
      return None
    (attacked,) = outcome.attacked
    outcomes[seed] = outcome.encoder, attacked
  return rows.measured(
    name,
    row['title'],
    planned.manifest.content['revision'],
    planned.shown().commands(name, row['seeds'][0]),
    outcomes,
  )
