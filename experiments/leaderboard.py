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
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epy

from experiments import recording, records
from experiments.cli import app, flags, workdirs
from experiments.cli.flags import UsageError
from experiments.reproduction import manifest
from se_vae.config import setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from experiments.reproduction import leaderboard, rows
  from se_vae.storage import atomic_files, json_files

ACTIONS = ('render', 'add')
_PROBE = 'probe_digit_worst_case.json'


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
  results = Path(config.results)
  found = manifest.load(results / manifest.MANIFEST)
  if not Path(config.page).is_file():
    raise UsageError(f'--page: {config.page} is not a file')
  if action == 'add':
    entry = _entry(config, found)
    path = results / leaderboard.FOLDER / f'{entry["name"]}.json'
    atomic_files.make_directory(path.parent)
    workdirs.write_json(path, entry)
    print(f'{path}: added')
  try:
    listed = leaderboard.entries(found, results)
    text = leaderboard.page(Path(config.page).read_text(), listed)
  except (json_files.JsonError, ValueError) as error:
    raise UsageError(f'--page, --results: {error}') from None
  leaderboard.draw(Path(config.figure), listed)
  atomic_files.write(Path(config.page), text.encode())
  print(f'{config.page}: {len(listed)} entries')
  return listed


def _entry(config: LeaderboardConfig, found: manifest.Manifest) -> rows.Measured:
  """The entry of the given directories.

  Raises:
    UsageError: if flags are missing, or the rules do not admit a result.
  """
  if not config.workdir or not config.name or not config.title:
    raise UsageError('--workdir, --name, --title: are required to add an entry')
  if not re.fullmatch(r'\w{1,80}', config.name, re.ASCII):
    raise UsageError(f'--name: must be letters, digits and underscores, got {config.name!r}')
  if re.search(r'[|\[\]\n]', config.title):
    raise UsageError(f'--title: must have none of | [ ] in it, got {config.title!r}')
  outcomes: dict[int, tuple[dict[str, Any], dict[str, Any]]] = {}
  for directory in config.workdir:
    encoder, attacked = _read(Path(directory))
    wrong = list(leaderboard.faults(attacked))
    if wrong:
      raise UsageError(f'--workdir: {directory}: {"; ".join(wrong)}')
    seed = (attacked.get('pretraining') or attacked['config'])['seed']
    if seed in outcomes:
      raise UsageError(f'--workdir: {directory}: seed {seed} is there twice')
    outcomes[seed] = encoder, attacked
  revision = found.content['revision']
  entry = rows.measured(config.name, config.title, revision, list(_commands(outcomes)), outcomes)
  if config.link:
    entry['link'] = config.link
  return entry


def _read(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """What pretrain and probe have written, or nothing and what supervised has."""
  try:
    if (directory / _PROBE).exists():
      attacked = json_files.read(directory / _PROBE, records.FinishedProbe)
      encoder: dict[str, Any] = {}
      if (directory / recording.RESULT).exists():
        encoder = dict(json_files.read(directory / recording.RESULT, records.Result))
      return encoder, dict(attacked)
    if (directory / recording.RESULT).exists():
      return {}, dict(json_files.read(directory / recording.RESULT, records.Supervised))
  except json_files.JsonError as error:
    raise UsageError(f'--workdir: {error}') from None
  raise UsageError(f'--workdir: {directory} has no {_PROBE}, and no result of supervised')


def _commands(outcomes: dict[int, tuple[dict[str, Any], dict[str, Any]]]) -> Iterator[str]:
  """How the last encoder of the first seed was trained, as far as its settings tell."""
  _, attacked = outcomes[min(outcomes)]
  stored = attacked.get('pretraining') or attacked['config']
  binary = 'pretrain' if attacked.get('pretraining') else 'supervised'
  places = ('workdir', 'data_dir', 'cache_dir')
  given = (f'--{name}={value}' for name, value in stored.items() if name not in places)
  yield ' '.join(['python', '-m', f'experiments.{binary}', *(g for g in given if '=None' not in g)])


if __name__ == '__main__':
  flags.define_flags(LeaderboardConfig)
  app.run(main, ACTIONS)
