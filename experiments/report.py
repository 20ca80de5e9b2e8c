r"""Writes one self-contained HTML page about a run, several runs side by side, or a figure.

  python -m experiments.report --workdir=runs/se --compare=runs/vae

The page, `report.html` in --workdir or --output, needs no network: it contains its pictures and
charts. A run is a directory of experiments.pretrain, with the results of experiments.probe in it; a
directory of experiments.figure1 stands for all of its runs. No other file is written.
"""

from __future__ import annotations

import dataclasses
import functools
import io
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from experiments import figure1, pretrain, recording
from experiments.cli import app, flags
from experiments.cli.flags import UsageError
from experiments.visual import plots, report_page
from experiments.visual.report_page import CurveRow, Picture, Series, Style, Table
from se_vae.config import setting, validate
from se_vae.evaluation.verdicts import SanityCheck
from se_vae.storage import atomic_files

FIGURE = 'figure1.json'

T = TypeVar('T')

_PICTURES = {
  'reconstructions': (
    'Reconstructions',
    "rows: held-out images; selected x'; reconstructions of the images; reconstructions of x'",
  ),
  'samples': ('Samples', 'a hundred images decoded from samples of the prior'),
  'traversals': (
    'Traversals',
    'the first held-out image, decoded with one latent a row varied from -3 to 3; the latent with '
    'the largest variance comes first',
  ),
}
_ADVERSARIAL = (
  'images that are misclassified within some radius, in ascending order of it; rows: images; '
  'adversarial images; reconstructions of the images; reconstructions of the adversarial images'
)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a run, or of a figure.')
  compare: tuple[str, ...] | None = setting(None, 'Directories to show beside it.')
  output: str | None = setting(None, "The page to write; 'report.html' in --workdir if not given.")


class Probe(NamedTuple):
  """The content of a probe_TASK.json."""

  task: str
  attack: str
  num_examples: int
  step: int
  accuracy: Series
  joint: tuple[str, Series] | None
  latent_shift: Series | None
  checks: list[SanityCheck]
  summary: str


class Run(NamedTuple):
  """A run of experiments.pretrain; empty or None where a part is missing."""

  label: str
  style: Style
  config: dict[str, Any]
  environment: dict[str, Any]
  state: str
  rows: list[dict[str, float]]
  test: dict[str, float] | None
  probes: list[Probe]
  pictures: list[Picture]


def main() -> None:
  """Entry point."""
  print(run(flags.from_flags(ReportConfig)))


def run(config: ReportConfig) -> Path:
  """Writes the page; returns its path.

  Raises:
    UsageError: for a wrong flag or a damaged file, before anything is written.
  """
  validate(config)
  directories = [_directory('--workdir', config.workdir)]
  directories += [_directory('--compare', name) for name in config.compare or ()]
  output = _check_output(Path(config.output) if config.output else directories[0] / 'report.html')
  atomic_files.write(output, render(directories).encode())
  return output


def _directory(flag: str, name: str | None) -> Path:
  if not name:
    raise UsageError(f'{flag}: is required; the directory of a run, or of a figure')
  path = Path(name)
  if not path.is_dir():
    raise UsageError(f'{flag}: {path} is not a directory')
  if not runs_in(path):
    raise UsageError(f'{flag}: {path} holds no run; experiments.pretrain makes one')
  return path


def _check_output(path: Path) -> Path:
  if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
    raise UsageError(f'--output: {path.parent} is not a writable directory')
  if path.exists():
    with path.open('rb') if path.is_file() else io.BytesIO() as file:
      if report_page.GENERATOR.encode() not in file.read(1000):
        raise UsageError(f'--output: {path} is not a report, and is not overwritten')
  return path


def runs_in(directory: Path) -> list[Path]:
  """The directory itself if it is a run's, else the runs in it, in the order of their names."""
  candidates = [directory] if (directory / recording.CONFIG).exists() else directory.iterdir()
  return sorted(path for path in candidates if (path / recording.CONFIG).exists())


def render(directories: Sequence[Path]) -> str:
  """The page about these directories.

  Raises:
    UsageError: for a damaged file; names it.
  """
  paths = list(dict.fromkeys(path for directory in directories for path in runs_in(directory)))
  metadata = [_metadata(path) for path in paths]
  styles = report_page.styles(each['config']['objective'] for each in metadata)
  runs = list(map(_load_run, paths, _labels(paths), styles, metadata))
  figures = [path / FIGURE for path in directories if (path / FIGURE).exists()]
  pictures = {picture.title: picture.text for run in runs for picture in run.pictures}
  titles = [title for title, _ in _PICTURES.values() if title in pictures]
  usual = flags.to_dict(pretrain.PretrainConfig())
  table = functools.partial(report_page.metric_table, [(r.label, r.style, r.state) for r in runs])
  return report_page.render(
    title=', '.join(_labels(directories)),
    runs=runs,
    figures=[table for path in figures for table in _panels(path)],
    figure_notes=[
      _parsed(path, lambda content: str(content.get('optimizer', ''))) for path in figures
    ],
    unfinished=[str(d) for d in directories if d not in paths and not (d / FIGURE).exists()],
    held_out=table([run.test or {} for run in runs]),
    last_rows=table([run.rows[-1] if run.rows else {} for run in runs]),
    robustness=_robustness(runs),
    training=_training(runs),
    picture_titles=[(t, pictures[t]) for t in titles + sorted(pictures.keys() - {*titles})],
    settings=report_page.side_by_side([run.config for run in runs], usual),
    environment=report_page.side_by_side([run.environment for run in runs], {}),
  )


def _labels(paths: Sequence[Path]) -> list[str]:
  """The directories' own names, or their whole paths where names repeat."""
  names = [path.resolve().name for path in paths]
  return names if len(set(names)) == len(names) else [str(path) for path in paths]


# Reading


def _parsed(path: Path, parse: Callable[[Any], T], content: str | bytes | None = None) -> T:
  """What `parse` makes of a JSON file, or of `content`, a part of one.

  Raises:
    UsageError: if it is not what a run writes; names the file.
  """
  return _checked(path, lambda: parse(json.loads(path.read_text() if content is None else content)))


def _checked(path: Path, read: Callable[[], T]) -> T:
  try:
    return read()
  except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:200]
    raise UsageError(f'{path}: is damaged ({reason})') from None


def _metadata(path: Path) -> dict[str, Any]:
  def parse(content: Any) -> dict[str, Any]:
    config = flags.to_dict(pretrain.stored_config(content['config']))
    texts = {name: str(config[name]) for name in ('dataset', 'objective')}
    return {
      'config': config | texts | {'num_steps': int(config['num_steps'])},
      'environment': {
        **dict(content['versions']),
        'devices': content['devices'],
        'data': content['data']['source'],
        'digest of the data': content['data']['digest'],
      },
    }

  return _parsed(path / recording.CONFIG, parse)


def _load_run(path: Path, label: str, style: Style, metadata: dict[str, Any]) -> Run:
  rows = _load_rows(path / recording.METRICS)
  num_steps = metadata['config']['num_steps']
  step, test = 0, None
  if (path / recording.RESULT).exists():
    step, test = _parsed(
      path / recording.RESULT, lambda content: (int(content['step']), _floats(content['test']))
    )
  state = f'finished: {num_steps:,} steps'
  if step != num_steps:
    test, step = None, int(rows[-1]['step']) if rows else 0
    state = f'not finished: {step:,} of {num_steps:,} steps'
    if (path / recording.NOT_FINITE).exists():
      bad = _parsed(path / recording.NOT_FINITE, lambda content: int(content['step']))
      state += f'; step {bad:,} was not finite'
  files = sorted(path.glob('probe_*.json'))
  probes = [_parsed(file, _parse_probe) for file in files]
  pictures = [(path / f'{name}.png', *words) for name, words in _PICTURES.items()]
  for file, probe in zip(files, probes, strict=True):
    title = f'Adversarial images, {probe.task} probe, {probe.attack}'
    pictures.append((file.with_name(f'{file.stem}_images.png'), title, _ADVERSARIAL))
  return Run(
    label,
    style,
    metadata['config'],
    metadata['environment'],
    state,
    rows,
    test,
    probes,
    [_load_picture(*picture) for picture in pictures if picture[0].exists()],
  )


def _load_rows(path: Path) -> list[dict[str, float]]:
  """The rows of metrics.jsonl, without a last one that is half written."""
  if not path.exists():
    return []
  *lines, _ = path.read_text().split('\n')
  return [_parsed(path, lambda row: {'step': row['step'], **_floats(row)}, line) for line in lines]


def _load_picture(path: Path, title: str, text: str) -> Picture:
  return _checked(path, lambda: report_page.picture(path.read_bytes(), title, text))


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise TypeError(f'{name} is {value!r}')
  return dict(values)


def _parse_probe(content: Any) -> Probe:
  joint, shift = content.get('joint'), content.get('moves')
  checks = [SanityCheck.from_json(check) for check in content['checks']]
  return Probe(
    str(content['task']),
    str(content['config']['attack']),
    int(content['num_examples']),
    int(content['step']),
    _parse_accuracy(content),
    (' and '.join(map(str, joint['tasks'])), _parse_accuracy(joint)) if joint else None,
    _parse_shift(shift) if shift else None,
    checks,
    plots.checks_summary({'checks': checks}),
  )


def _parse_accuracy(content: Any) -> Series:
  return _parse_series(content['radii'], content['accuracy'], content['interval'])


def _parse_shift(content: Any) -> Series:
  lowest, *_, highest = content['quantiles'].values()
  return _parse_series(content['radii'], content['mean'], list(zip(lowest, highest, strict=True)))


def _parse_series(radii: Any, values: Any, band: Any) -> Series:
  points = list(zip(radii, values, band, strict=True))
  return Series(
    [radius + 0.0 for radius, _, _ in points],
    [value + 0.0 for _, value, _ in points],
    [(low + 0.0, high + 0.0) for _, _, (low, high) in points],
  )


# Arranging


def _panels(path: Path) -> list[Table]:
  """A table for each panel of a figure, with a row for each curve."""

  def parse(content: Any) -> list[Table]:
    panels = [figure1.Panel(**panel) for panel in content['panels']]
    return [table(panel, figure1.curves_of(panel, content['results'])) for panel in panels]

  def table(panel: figure1.Panel, curves: list[plots.Curve]) -> Table:
    styles = report_page.styles(curve.objective for curve in curves)
    found = []
    for curve, style in zip(curves, styles, strict=True):
      columns = (curve.radii.tolist(), curve.accuracy.tolist(), curve.interval.tolist())
      note = f'seeds: {len(curve.results)}'
      found.append(CurveRow(curve.label, style, note, _parse_series(*columns), curve.checks))
    return report_page.accuracy_table(panel.title, found)

  return _parsed(path, parse)


def _robustness(runs: Sequence[Run]) -> list[Table]:
  """A table for each data set and task, each set of tasks together, and the latent shift."""
  accuracies: dict[str, list[CurveRow]] = {}
  shifts: dict[str, list[CurveRow]] = {}
  not_run = plots.checks_summary()  # the checks are those of the probe's own curve
  for run in runs:
    dataset = run.config['dataset']
    for probe in run.probes:
      note = f'{probe.attack}, n = {probe.num_examples:,}, step {probe.step:,}'
      curve = CurveRow(run.label, run.style, note, probe.accuracy, probe.summary)
      title = f'{dataset}, {probe.task} probe, {probe.attack}'
      accuracies.setdefault(title, []).append(curve)
      if probe.joint:
        tasks, series = probe.joint
        joint = curve._replace(series=series, checks=not_run)
        accuracies.setdefault(f'{dataset}, {tasks} probes together', []).append(joint)
      if probe.latent_shift:
        shift = curve._replace(series=probe.latent_shift, checks=not_run)
        shifts.setdefault(f'{dataset}, latent shift under attack', []).append(shift)
  return [
    *(report_page.accuracy_table(title, rows) for title, rows in accuracies.items()),
    *(report_page.latent_shift_table(title, rows) for title, rows in shifts.items()),
  ]


def _training(runs: Sequence[Run]) -> dict[str, list[Table]]:
  """Charts of every metric, for each data set."""
  by_dataset: dict[str, list[tuple[Style, list[dict[str, float]]]]] = {}
  for run in runs:
    if run.rows:
      by_dataset.setdefault(run.config['dataset'], []).append((run.style, run.rows))
  return {name: report_page.training_charts(group) for name, group in by_dataset.items()}


if __name__ == '__main__':
  flags.define_flags(ReportConfig)
  app.run(main)
