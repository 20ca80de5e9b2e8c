r"""Builds the results of the project anew, compares them, and writes the page that shows them.

  python -m experiments.results build --rows=smoothed,vae --data_dir=DIR

`results/manifest.yaml` lists all rows with their commands, seeds, costs and expected numbers. The
action `build` trains and attacks what is missing, side by side on all cores, and writes a JSON file
for each row and then RESULTS.md with its figures. `check` builds rows in another directory, and
compares what comes out with what is expected. `render` writes the page alone, and `list` prints the
rows with their costs and commands. An interrupted build continues when the same command is given
again. Finished runs are not repeated.

The manifest has a `revision`, a number that rises whenever the code computes other numbers with the
same flags. Rows of an older revision are marked on the page.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epy

from experiments import pretrain
from experiments.cli import app, devices, flags, messages, signals, workdirs
from experiments.cli.flags import UsageError
from experiments.reproduction import claims, manifest, plan
from experiments.scheduling import jobs, placement
from se_vae.config import ArgumentError, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from experiments.reproduction import document, rows
  from se_vae.storage import atomic_files, json_files

ACTIONS = ('build', 'check', 'render', 'list')
PAGE = 'RESULTS.md'  # beside the directory of the results


@dataclasses.dataclass(frozen=True)
class ResultsConfig:
  """The flags of this binary."""

  rows: tuple[str, ...] | None = setting(None, 'Names of rows; all of the manifest if not given.')
  results: str = setting('results', 'Directory of the manifest and of the measured rows.')
  workdir: str | None = setting(
    None, 'Directory of all runs; runs/results if not given, or runs/results_check for check.'
  )
  data_dir: str | None = setting(
    None, 'Directory of the MNIST files, which are downloaded into it.'
  )
  seeds: int | None = setting(None, 'Take so many of the seeds of each row.', at_least=1)
  placement: placement.PlacementConfig = dataclasses.field(
    default_factory=placement.PlacementConfig
  )


def main(action: str) -> None:
  """Entry point."""
  config = flags.from_flags(ResultsConfig)
  if action in ('build', 'check'):
    placement.use_cpu_alone_beside_slots(config.placement)
    devices.use_all_cores(pretrain.PretrainConfig().batch_size)
  with signals.StopSignal().listening() as stop:
    if not run(action, config, stop):
      sys.exit(1)


def run(action: str, config: ResultsConfig, stop: signals.StopSignal) -> bool:
  """Does one of `ACTIONS`; returns False if results differ from what is expected.

  Raises:
    ArgumentError: for wrong settings or a wrong manifest, before anything is trained.
    Interrupted: when `stop` has a signal, after a checkpoint of every run.
    RunsFailedError: if runs failed, after all others.
  """
  validate(config)
  results = Path(config.results)
  found = manifest.load(results / manifest.MANIFEST)
  check_claims(found)
  chosen = _chosen(config, found)
  if action == 'render':
    render(found, results)
    return True
  default = 'runs/results_check' if action == 'check' else 'runs/results'
  workdir = Path(config.workdir or default)
  if config.seeds is not None:
    found = _with_seeds(found, chosen, config.seeds)
  planned = plan.Plan(found, workdir, config.data_dir)
  if action == 'list':
    print(_listed(planned, chosen))
    return True
  workdirs.check_directory('workdir', str(workdir))
  measured: dict[str, rows.Measured] = {}

  def done(name: str, row: rows.Measured) -> None:
    measured[name] = row
    if action == 'build':
      print(f'{rows.write(results, row)}: finished')

  try:
    _measure(config.placement, planned, chosen, stop, done)
  finally:
    if action == 'build' and measured:
      render(found, results)
  return action == 'build' or _compare(found, measured)


def check_claims(found: manifest.Manifest) -> None:
  """Raises ArgumentError for comparisons that are no comparisons, or of rows that do not exist."""
  for section in found.content['sections']:
    for claim in section.get('claims', ()):
      for comparison in map(claims.parse, claim['holds_if']):
        for name in (comparison.left, comparison.right):
          if isinstance(name, str) and name not in found.rows:
            raise UsageError(f'--results: claim {claim["claim"]!r}: {name} is no row')


def render(found: manifest.Manifest, results: Path) -> None:
  """Writes the page beside the directory of the results, and its figures into that directory.

  Raises:
    UsageError: if the file of a row is damaged.
  """
  page = document.Document(found, results)
  try:
    page.draw()
    text = page.text()
  except json_files.JsonError as error:
    raise UsageError(f'--results: {error}') from None
  path = results.absolute().parent / PAGE
  atomic_files.write(path, text.encode())
  print(f'{path}: {len(page.measured)} of {len(found.rows)} rows')


def _chosen(config: ResultsConfig, found: manifest.Manifest) -> list[str]:
  unknown = [name for name in config.rows or () if name not in found.rows]
  if unknown:
    raise UsageError(f'--rows: {", ".join(unknown)}: no such row; the action list prints them')
  return list(dict.fromkeys(config.rows or found.rows))


def _with_seeds(found: manifest.Manifest, chosen: list[str], count: int) -> manifest.Manifest:
  own = {name: {**found.rows[name], 'seeds': found.rows[name]['seeds'][:count]} for name in chosen}
  content: Any = {**found.content, 'rows': {**found.rows, **own}}
  return manifest.Manifest(content)


def _listed(planned: plan.Plan, chosen: list[str]) -> str:
  """The rows with their costs and the commands of their first seeds."""
  lines = []
  for name in chosen:
    row = planned.manifest.rows[name]
    cost, seeds = planned.manifest.minutes([name]), ', '.join(map(str, row['seeds']))
    lines.append(f'{name}: {row["title"]}; seeds {seeds}; {cost:.0f} core-minutes')
    lines += [f'  {command}' for command in planned.commands(name, row['seeds'][0])]
  total = planned.manifest.minutes(chosen)
  return '\n'.join([*lines, f'{len(chosen)} rows, {total:.0f} core-minutes'])


def _measure(
  where: placement.PlacementConfig,
  planned: plan.Plan,
  chosen: list[str],
  stop: signals.StopSignal,
  done: Callable[[str, rows.Measured], None],
) -> None:
  """Does what is missing of rows, section by section; `done` takes each row when it is finished.

  Raises:
    ArgumentError: for wrong settings, before the first run.
    Interrupted: when `stop` has a signal.
    RunsFailedError: if runs failed, after all that do not need them.
  """
  for name in chosen:
    for seed in planned.manifest.rows[name]['seeds']:
      planned.job(name, seed)  # its settings are checked
  failed: app.RunsFailedError | None = None
  for group in _groups(planned.manifest, chosen):
    left = list(group)

    def report(job: jobs.AnyJob, outcome: jobs.Outcome, left: list[str] = left) -> None:
      for name in [name for name in left if _is_of(planned, name, job)]:
        if (row := _row(planned, name)) is not None:
          left.remove(name)
          done(name, row)

    for wave in planned.waves(group):
      try:
        ready = list(_ready(wave, failed is not None))
        placement.run_all(ready, where, planned.workdir, stop, report)
      except app.RunsFailedError as error:
        failed = error
  if failed is not None:
    raise failed


def _ready(wave: list[jobs.AttackedJob], some_failed: bool) -> Iterator[jobs.AttackedJob]:
  """The jobs that can be done: where runs failed before, not those that need them."""
  for job in wave:
    try:
      job.check()
    except ArgumentError:
      if not some_failed:
        raise
    else:
      yield job


def _is_of(planned: plan.Plan, name: str, job: jobs.AnyJob) -> bool:
  """Whether a job attacks what a row needs, and does not only train it."""
  if isinstance(job, jobs.Job) and not job.attacks:
    return False
  seeds = planned.manifest.rows[name]['seeds']
  return any(planned.job(name, seed).workdir == job.workdir for seed in seeds)


def _groups(found: manifest.Manifest, chosen: list[str]) -> Iterator[list[str]]:
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


def _row(planned: plan.Plan, name: str) -> rows.Measured | None:
  """A row from the files of its runs; None unless all are finished."""
  row, outcomes = planned.manifest.rows[name], {}
  for seed in row['seeds']:
    outcome = planned.job(name, seed).finished()
    if outcome is None or outcome.encoder is None:
      return None
    (attacked,) = outcome.attacked
    outcomes[seed] = outcome.encoder, attacked
  elsewhere = plan.Plan(planned.manifest, Path('runs/results'), None)
  return rows.measured(
    name,
    row['title'],
    planned.manifest.content['revision'],
    elsewhere.commands(name, row['seeds'][0]),
    outcomes,
  )


def _compare(found: manifest.Manifest, measured: dict[str, rows.Measured]) -> bool:
  """Prints what is expected of rows beside what came out; returns whether all agree."""
  cells, agree = [], True
  for name, row in measured.items():
    expected, tolerance = found.rows[name].get('expected', {}), found.rows[name]['tolerance']
    for radius, value, came_out, is_near in rows.differences(row, expected, tolerance):
      verdict = 'agrees' if is_near else 'DIFFERS'
      cells.append(
        (name, f'{radius:g}', f'{value:.3f} ± {tolerance:g}', f'{came_out:.3f}', verdict)
      )
      agree = agree and is_near
  print(messages.markdown_table(('row', 'radius', 'expected', 'came out', ''), cells))
  return agree and bool(cells)


if __name__ == '__main__':
  flags.define_flags(ResultsConfig)
  app.run(main, ACTIONS)
