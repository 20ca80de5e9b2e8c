r"""The leaderboard of robust representations of MNIST: adds an entry, and writes the page.

  python -m experiments.leaderboard add --workdir=runs/mine --name=mine --title='My encoder'
  python -m experiments.leaderboard render

`add` takes runs that `experiments.probe --attack=worst_case` or `experiments.supervised` has
attacked, one for each seed, checks that they obey the rules of the page, and writes
`results/leaderboard/NAME.json`. Both actions then write the table and the figure of
docs/leaderboard.md, from these files and from the rows of the manifest that are on it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

from etils import epy

from experiments import recording, records
from experiments.cli import app, flags
from experiments.cli.flags import UsageError
from experiments.reproduction import manifest
from se_vae.config import ArgumentError, setting, validate
from se_vae.evaluation import verdicts

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from experiments.reproduction import leaderboard, rows
  from se_vae.storage import atomic_files, json_files

ACTIONS = ('render', 'add')
_PROBE = 'probe_digit_worst_case.json'


class _Trained(TypedDict):
  """What an entry needs of the settings of its training."""

  seed: int
  dataset: str
  validation: bool


class _Pretrained(_Trained):
  """The settings of pretrain that an entry needs."""

  objective: str


class _Classifier(_Trained):
  """The settings of supervised that an entry needs; `probe` has the flags of its attack."""

  probe: str


class _Probe(records.FinishedProbe):
  """What an entry needs of the result of a probe."""

  evaluation: records.Attack
  versions: dict[str, str]


class _Supervised(records.Curve):
  """What an entry needs of the result of a classifier."""

  task: str
  num_examples: int
  config: _Classifier
  evaluation: records.Attack
  data: records.Data
  checks: list[verdicts.CheckRecord]
  versions: dict[str, str]


@dataclasses.dataclass(frozen=True)
class LeaderboardConfig:
  """The flags of this binary."""

  workdir: tuple[str, ...] | None = setting(
    None, 'Directories with results of probe or supervised, one for each seed.'
  )
  name: str | None = setting(None, 'Name of the entry: letters, digits and underscores.')
  title: str | None = setting(None, 'What the table calls the entry.')
  link: str | None = setting(None, 'Address of its code or paper.')
  results: str = setting('results', 'Directory of the manifest and of the measured rows.')
  page: str = setting('docs/leaderboard.md', 'The page to write the table to.')
  figure: str = setting('docs/_static/leaderboard.png', 'The figure to draw.')


def main(action: str) -> None:
  """Entry point."""
  run(action, flags.from_flags(LeaderboardConfig))


def run(action: str, config: LeaderboardConfig) -> list[rows.Measured]:
  """Adds an entry if `action` is 'add', and writes the page; returns all entries.

  Raises:
    UsageError: for wrong flags, or results that the rules do not admit, before anything is written.
  """
  validate(config)
  results, page = Path(config.results), Path(config.page)
  found = manifest.load(results / manifest.MANIFEST)
  if not page.is_file():
    raise UsageError(f'--page: {page} is not a file')
  if not (folder := Path(config.figure).absolute().parent).is_dir():
    raise UsageError(f'--figure: {folder} is not a directory')
  entry = _entry(config, found, results) if action == 'add' else None
  try:
    listed = leaderboard.entries(found, results)
    if entry is not None:
      listed = leaderboard.ordered([*listed, entry])
    text = leaderboard.page(page.read_text(), listed)
  except (json_files.JsonError, ValueError) as error:
    raise UsageError(f'--page, --results: {error}') from None
  if entry is not None:
    print(f'{rows.write(results, entry, leaderboard.FOLDER)}: added')
  leaderboard.draw(Path(config.figure), listed)
  atomic_files.write(page, text.encode())
  print(f'{page}: {len(listed)} entries')
  return listed


def _entry(config: LeaderboardConfig, found: manifest.Manifest, results: Path) -> rows.Measured:
  """The entry of the given directories.

  Raises:
    UsageError: if flags are missing, or the rules do not admit the results.
  """
  if not config.workdir or not config.name or not config.title:
    raise UsageError('--workdir, --name, --title: are required to add an entry')
  if not re.fullmatch(r'\w{1,80}', config.name, re.ASCII):
    raise UsageError(f'--name: must be letters, digits and underscores, got {config.name!r}')
  taken = results / leaderboard.FOLDER / f'{config.name}.json'
  if taken.exists() or config.name in found.rows:
    raise UsageError(f'--name: there is an entry {config.name}; take another name')
  outcomes: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
  for directory in config.workdir:
    encoder, attacked = _read(Path(directory))
    seed = (attacked.get('pretraining') or attacked['config'])['seed']
    if seed in outcomes:
      raise UsageError(f'--workdir: {directory}: seed {seed} is there twice')
    outcomes[seed] = encoder, attacked
  revision = found.content['revision']
  try:
    entry = rows.measured(config.name, config.title, revision, list(_commands(outcomes)), outcomes)
  except (ArgumentError, json_files.JsonError) as error:
    raise UsageError(f'--workdir: {error}') from None
  if config.link:
    entry['link'] = config.link
  for wrong in leaderboard.faults_of_names(entry):
    raise UsageError(f'--{wrong}')
  if faults := list(leaderboard.faults(entry)):
    raise UsageError(f'--workdir: {"; ".join(faults)}')
  return entry


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """What pretrain and probe have written, or nothing and what supervised has."""
  try:
    if (directory / _PROBE).exists():
      attacked = json_files.read(directory / _PROBE, _Probe)
      with json_files.naming(directory / _PROBE):
        json_files.check(attacked['pretraining'], _Pretrained, 'pretraining')
      encoder: dict[str, Any] = {}
      if (directory / recording.RESULT).exists():
        encoder = dict(json_files.read(directory / recording.RESULT, records.Result))
      return encoder, dict(attacked)
    if (directory / recording.RESULT).exists() and not (directory / recording.CONFIG).exists():
      return {}, dict(json_files.read(directory / recording.RESULT, _Supervised))
  except json_files.JsonError as error:
    raise UsageError(f'--workdir: {error}') from None
  raise UsageError(f'--workdir: {directory} has no {_PROBE}, and no result of supervised')


def _commands(outcomes: dict[int, tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[str]:
  """How the last encoder of the first seed was trained and attacked, as its settings tell."""
  _, attacked = outcomes[min(outcomes)]
  trained = attacked.get('pretraining')
  last = 'supervised' if trained is None else 'probe'
  for binary, settings in (('pretrain', trained), (last, attacked['config'])):
    if settings is not None:
      given = [
        f'--{name}={_text(name, value)}'
        for name, value in settings.items()
        if name not in flags.PLACES and value is not None
      ]
      yield shlex.join(['python', '-m', f'experiments.{binary}', *given])


def _text(name: str, value: Any) -> str:
  if name in flags.ENCODERS:  # a place too, of which the last part names the encoder
    return Path(value).name
  return ','.join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == '__main__':
  flags.define_flags(LeaderboardConfig)
  app.run(main, ACTIONS)
