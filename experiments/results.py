r"""Builds the results of the project anew, compares them, and writes the page that shows them.

  python -m experiments.results build --rows=clusters,smoothed_300 --data_dir=DIR

`results/manifest.yaml` lists all rows with their commands, seeds, costs and expected numbers. The
action `list`, the default, prints them. `build` trains and attacks what is missing, side by side on
all cores, and writes a JSON file for each row and then RESULTS.md with its figures; it builds the
rows that --rows names, or else those without a file. `check` builds rows in another directory, and
compares what comes out with what is expected. `render` writes the page alone. An interrupted build
or check continues when the same command is given again; what is finished is not repeated.

The manifest has a `revision`, a number that rises whenever the code computes other numbers with the
same flags. Rows of an older revision are marked on the page.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from etils import epy

from experiments import pretrain
from experiments.cli import app, devices, flags, messages, provenance, signals
from experiments.cli.flags import UsageError
from experiments.reproduction import building, claims, manifest, plan
from experiments.scheduling import placement
from se_vae.config import setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from experiments.reproduction import document, rows
  from se_vae.storage import atomic_files, json_files

ACTIONS = ('list', 'build', 'check', 'render')
PAGE, README = 'RESULTS.md', 'README.md'  # beside the directory of the results


@dataclasses.dataclass(frozen=True)
class ResultsConfig:
  """The flags of this binary."""

  rows: tuple[str, ...] | None = setting(
    None, 'Names of rows; if not given all of the manifest, or for build those that are missing.'
  )
  results: str = setting('results', 'Directory of the manifest and of the measured rows.')
  workdir: str | None = setting(
    None, 'Directory of all runs; runs/results if not given, or runs/results_check for check.'
  )
  data_dir: str | None = setting(
    None, 'Directory of the MNIST files, which are downloaded into it.'
  )
  seeds: int | None = setting(None, 'Check or list so many of the seeds of each row.', at_least=1)
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
    RunsFailedError: if runs failed, after all that do not need them.
  """
  validate(config)
  results = Path(config.results)
  found = manifest.load(results / manifest.MANIFEST)
  chosen = _chosen(config, found)
  workdir = Path(config.workdir or ('runs/results_check' if action == 'check' else 'runs/results'))
  shown = found
  if config.seeds is not None:
    shown = found.with_seeds({name: found.rows[name]['seeds'][: config.seeds] for name in chosen})
  planned = plan.Plan(shown, workdir, config.data_dir)
  check_radii(plan.Plan(found, workdir))
  if action == 'render':
    render(found, results)
  elif action == 'list':
    print(_listed(planned, chosen))
  elif action == 'build':
    if config.seeds is not None:
      raise UsageError('--seeds: is for list and check; a row is built with all its seeds')
    missing = chosen if config.rows else _missing(found, results)
    _build(config, planned, missing, results, stop)
  else:
    return _check(config, planned, chosen, stop)
  return True


def _build(
  config: ResultsConfig,
  planned: plan.Plan,
  chosen: list[str],
  results: Path,
  stop: signals.StopSignal,
) -> None:
  """Builds what is missing of rows, and writes the file of each row and the page."""
  written: list[str] = []
  page = document.Document(planned.manifest, results)
  kept = {name: row for name in chosen if (row := page.in_part(name)) is not None}
  missing = {
    name: [seed for seed in planned.manifest.rows[name]['seeds'] if seed not in rows.seeds_of(row)]
    for name, row in kept.items()
  }

  def done(name: str, row: rows.Measured) -> None:
    row = rows.joined(kept[name], row) if name in kept else row
    written.append(name)
    print(f'{rows.write(results, row)}: finished')

  left = dataclasses.replace(planned, manifest=planned.manifest.with_seeds(missing))
  building.check(left, chosen)
  building.claim(planned.workdir, {'revision': planned.manifest.content['revision']})
  try:
    building.build(config.placement, left, chosen, stop, done)
  except BaseException:
    try:  # an error here must not hide the one above
      _render_if(written, planned.manifest, results)
    except (UsageError, OSError) as error:
      messages.warn(str(error))
    raise
  _render_if(written, planned.manifest, results)


def _render_if(written: list[str], found: manifest.Manifest, results: Path) -> None:
  if written:
    render(found, results)


def _check(
  config: ResultsConfig, planned: plan.Plan, chosen: list[str], stop: signals.StopSignal
) -> bool:
  """Builds rows in a directory of their own, and compares; returns whether all agree."""
  without = [name for name in chosen if not planned.manifest.rows[name].get('expected')]
  if without:
    raise UsageError(f'--rows: {", ".join(without)}: these rows have no expected numbers yet')
  measured: dict[str, rows.Measured] = {}
  building.check(planned, chosen)
  ledger = {
    'revision': planned.manifest.content['revision'],
    'commit': provenance.commit(),
    'changes': provenance.changes(),  # '-dirty' alone does not tell two states of the code apart
  }
  building.claim(planned.workdir, ledger)
  try:
    building.build(config.placement, planned, chosen, stop, measured.__setitem__)
  except app.RunsFailedError:
    if measured:
      _compare(planned.manifest, measured)
    raise
  building.claim(planned.workdir, {**ledger, 'checked': True})
  return _compare(planned.manifest, measured)


def check_radii(planned: plan.Plan) -> None:
  """Raises UsageError for claims, expected numbers and figures at radii that are not attacked."""
  attacked = {name: building.radii(planned, name) for name in planned.manifest.rows}
  asked = [
    (name, float(radius))
    for name, row in planned.manifest.rows.items()
    for radius in row.get('expected', {})
  ]
  for section in planned.manifest.content['sections']:
    for claim in section.get('claims', ()):
      for left, right, radius, _ in map(claims.parse, claim['holds_if']):
        asked += [(name, radius) for name in (left, right) if isinstance(name, str)]
    if 'figure' in section:
      panels = [panel for panel in section['figure']['panels'] if 'at' in panel]
      figure_radii = section['figure'].get('radii', document.RADII)
      asked += [(row, r) for panel in panels for row in panel['rows'] for r in figure_radii]
  for name, radius in asked:
    if name not in attacked:
      raise UsageError(f'--results: a claim names {name}, but {name} is no row')
    if radius not in attacked[name]:
      raise UsageError(f'--results: row {name} is not attacked at radius {radius:g}')


def render(found: manifest.Manifest, results: Path) -> None:
  """Writes the page beside the directory of the results, and its figures into that directory.

  The README there gets the table of the manifest's `summary`, once all its rows are measured.

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
  readme, summary = path.with_name(README), found.content.get('summary', [])
  if readme.is_file() and all(name in page.measured for name in summary) and summary:
    try:
      content = document.between_marks(readme.read_text(), 'results', page.summary())
    except ValueError as error:
      raise UsageError(f'--results: {readme}: {error}') from None
    atomic_files.write(readme, content.encode())
  print(f'{path}: {len(page.measured)} of {len(found.rows)} rows')


def _chosen(config: ResultsConfig, found: manifest.Manifest) -> list[str]:
  unknown = [name for name in config.rows or () if name not in found.rows]
  if unknown:
    raise UsageError(f'--rows: {", ".join(unknown)}: no such row; the action list prints them')
  return list(dict.fromkeys(config.rows or found.rows))


def _missing(found: manifest.Manifest, results: Path) -> list[str]:
  """The rows without a file, and those that code or settings of before have measured."""
  try:
    measured = document.Document(found, results).measured
  except json_files.JsonError as error:
    raise UsageError(f'--results: {error}') from None
  return [name for name in found.rows if name not in measured or document.is_older(measured[name])]


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
