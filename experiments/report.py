r"""Writes one self-contained HTML page about a run, several runs beside each other, or a figure.

  python -m experiments.report --workdir=runs/se --compare=runs/vae

The page, `report.html` in --workdir or --output, needs no network: pictures and charts are in it. A
run is what experiments.pretrain left in a directory, with the probes that were fitted there; a
directory of experiments.figure1 stands for all of its runs. Nothing but the page is written.
"""

from __future__ import annotations

import base64
import dataclasses
import io
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from experiments import figure1, pretrain, recording
from experiments.cli import app, flags
from experiments.cli.flags import UsageError
from experiments.visual import charts, plots
from se_vae.config import setting, validate
from se_vae.storage import atomic_files

FIGURE = 'figure1.json'
GENERATOR = 'se_vae experiments.report'  # by which a page is known to be one of ours

T = TypeVar('T')

# What there is to say about a metric, in the order of the page: its title, and its unit.
_METRICS = {
  'elbo': ('Bound', 'nats; the ELBO of a VAE, the SE-ELBO of an SE'),
  'log_likelihood': ('Log-likelihood', 'nats'),
  'kl': ('KL from the prior', 'nats'),
  'log_prior_a': ('Log-prior of z', 'nats'),
  'log_prior_b': ("Log-prior of z'", 'nats'),
  'transport_cost': ('Entropic transport cost', 'nats'),
  'normalized_elbo': ('Normalised SE-ELBO', 'nats'),
  'squared_w2': ('Move of the selection', 'squared W2'),
  'squared_error': ('Squared error', 'summed over pixels in [0, 1]'),
  'gradient_norm': ('Gradient norm', 'l2'),
  'active_latents': ('Active latents', 'of them all'),
}
_PICTURES = {
  'reconstructions': (
    'Reconstructions',
    "held-out images; x' that the selection finds; reconstructions of the images; of x'",
  ),
  'samples': ('Samples', 'a hundred images decoded from the prior'),
  'traversals': (
    'Traversals',
    'the first held-out image with one latent a row moved from -3 to 3, the most used first',
  ),
}
_ACCURACY = 'adversarial accuracy, with 95 % intervals'
_MOVES = 'squared W2: mean, and 5 to 95 % of the images'
_FALLEN = (
  'images that were right and fell, from the smallest radius to the largest; adversarial ones; '
  'reconstructions of the images; of the adversarial ones'
)
_MOST_POINTS = 240  # of a training curve; more are averaged in groups
_HUES = 4  # colours of each objective in the style sheet, and as many kinds of dashes


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a run, or of a figure.')
  compare: tuple[str, ...] | None = setting(None, 'Directories to show beside it.')
  output: str | None = setting(None, "The page to write; 'report.html' in --workdir if not given.")


class Number(NamedTuple):
  """A number as it is in a file, and as a reader likes it."""

  exact: str
  text: str


class Check(NamedTuple):
  """A verdict on an evaluation."""

  number: int
  name: str
  passed: bool
  figure: str


class Curve(NamedTuple):
  """Values `[R]` against radii `[R]`, with a band `[R, 2]`."""

  radii: list[float]
  values: list[float]
  band: list[tuple[float, float]]


class Probe(NamedTuple):
  """What one probe_TASK.json says."""

  task: str
  attack: str
  num_examples: int
  step: int
  accuracy: Curve
  joint: tuple[str, Curve] | None
  moves: Curve | None
  checks: list[Check]


class Picture(NamedTuple):
  """A PNG file, as a data URI, with what is to be seen on it."""

  title: str
  text: str
  source: str
  width: int
  height: int


class Run(NamedTuple):
  """What a directory says of a run; what it does not have is empty or None."""

  label: str
  style: str
  config: dict[str, Any]
  environment: dict[str, Any]
  state: str
  rows: list[dict[str, float]]
  test: dict[str, float] | None
  probes: list[Probe]
  pictures: list[Picture]


class Row(NamedTuple):
  """A row of a table: who, what else there is to say of it, and its cells."""

  label: str
  style: str
  note: str
  cells: list[tuple[Number, ...] | None]


class Table(NamedTuple):
  """A chart (or None) with its numbers: one column a heading."""

  title: str
  unit: str
  headings: list[str]
  rows: list[Row]
  chart: charts.Drawing | None = None


def main() -> None:
  """Entry point."""
  print(run(flags.from_flags(ReportConfig)))


def run(config: ReportConfig) -> Path:
  """Writes the page; returns its path.

  Raises:
    UsageError: for a flag that is wrong, or a file that is damaged, before anything is written.
  """
  validate(config)
  directories = [_directory('--workdir', config.workdir)]
  directories += [_directory('--compare', name) for name in config.compare or ()]
  output = _check_output(Path(config.output) if config.output else directories[0] / 'report.html')
  page = render(directories)
  atomic_files.write(output, page.encode())
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
      if GENERATOR.encode() not in file.read(1000):
        raise UsageError(f'--output: {path} is not a report, and is not overwritten')
  return path


def runs_in(directory: Path) -> list[Path]:
  """The directory itself if it is a run's, else those of its runs, in the order of their names."""
  candidates = [directory] if (directory / recording.CONFIG).exists() else directory.iterdir()
  return sorted(path for path in candidates if (path / recording.CONFIG).exists())


def render(directories: Sequence[Path]) -> str:
  """The page about these directories.

  Raises:
    UsageError: naming a file that is damaged.
  """
  import jinja2  # slow to import

  paths = list(dict.fromkeys(path for directory in directories for path in runs_in(directory)))
  found = [(path, _metadata(path)) for path in paths]
  styles = _styles([str(metadata['config']['objective']) for _, metadata in found])
  runs = [
    _load_run(path, label, style, metadata)
    for (path, metadata), label, style in zip(found, _labels(paths), styles, strict=True)
  ]
  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent / 'visual'),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  template = environment.get_template('report.html')
  page = template.render(
    generator=GENERATOR,
    title=', '.join(_labels(directories)),
    runs=runs,
    figures=[
      panel for path in directories if (path / FIGURE).exists() for panel in _panels(path / FIGURE)
    ],
    unfinished=[str(d) for d in directories if d not in paths and not (d / FIGURE).exists()],
    held_out=_metric_table([(run, run.test or {}) for run in runs]),
    last_rows=_metric_table([(run, run.rows[-1] if run.rows else {}) for run in runs]),
    robustness=_robustness(runs),
    training=_training(runs),
    picture_titles=sorted({p.title for run in runs for p in run.pictures}, key=_picture_order),
    settings=_side_by_side([run.config for run in runs], flags.to_dict(pretrain.PretrainConfig())),
    environment=_side_by_side([run.environment for run in runs], {}),
    size=(charts.WIDTH, charts.HEIGHT),
  )
  return page.lstrip()


def _labels(paths: Sequence[Path]) -> list[str]:
  """The directories' own names, or their whole paths where names repeat."""
  names = [path.resolve().name for path in paths]
  return names if len(set(names)) == len(names) else [str(path) for path in paths]


def _styles(objectives: Iterable[str]) -> list[str]:
  """Classes of the style sheet: a family of colours for each objective, then dashes."""
  seen: dict[str, int] = {}
  styles = []
  for objective in objectives:
    family = 'se' if objective == 'se' else 'vae'
    number = seen[family] = seen.get(family, -1) + 1
    styles.append(f'{family}{number % _HUES} dash{number // _HUES % _HUES}')
  return styles


def _picture_order(title: str) -> tuple[int, str]:
  titles = [known for known, _ in _PICTURES.values()]
  return titles.index(title) if title in titles else len(titles), title


# Reading


def _parsed(path: Path, parse: Callable[[Any], T], content: str | None = None) -> T:
  """What a JSON file (or `content`, a part of one) says.

  Raises:
    UsageError: if it is not what a run writes; names the file.
  """
  try:
    return parse(json.loads(path.read_text() if content is None else content))
  except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
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


def _load_run(path: Path, label: str, style: str, metadata: dict[str, Any]) -> Run:
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
  drawn = [(path / f'{name}.png', *words) for name, words in _PICTURES.items()]
  drawn += [
    (
      file.with_name(f'{file.stem}_images.png'),
      f'Adversarial images, {probe.task} probe, {probe.attack}',
      _FALLEN,
    )
    for file, probe in zip(files, probes, strict=True)
  ]
  return Run(
    label,
    style,
    metadata['config'],
    metadata['environment'],
    state,
    rows,
    test,
    probes,
    [_load_picture(*picture) for picture in drawn if picture[0].exists()],
  )


def _load_rows(path: Path) -> list[dict[str, float]]:
  """The rows of metrics.jsonl; the last line may be half written."""
  if not path.exists():
    return []
  *lines, _ = path.read_text().split('\n')
  return [_parsed(path, lambda row: {'step': row['step'], **_floats(row)}, line) for line in lines]


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise TypeError(f'{name} is {value!r}')
  return dict(values)


def _parse_probe(content: Any) -> Probe:
  joint, moves = content.get('joint'), content.get('moves')
  return Probe(
    str(content['task']),
    str(content['config']['attack']),
    int(content['num_examples']),
    int(content['step']),
    _parse_curve(content['radii'], content['accuracy'], content['interval']),
    joint
    and (
      ' and '.join(map(str, joint['tasks'])),
      _parse_curve(joint['radii'], joint['accuracy'], joint['interval']),
    ),
    moves and _parse_moves(moves),
    [
      Check(int(c['number']), str(c['name']), bool(c['passed']), str(c['figure']))
      for c in content['checks']
    ],
  )


def _parse_moves(moves: Any) -> Curve:
  lowest, *_, highest = moves['quantiles'].values()
  return _parse_curve(moves['radii'], moves['mean'], list(zip(lowest, highest, strict=True)))


def _parse_curve(radii: Any, values: Any, band: Any) -> Curve:
  points = list(zip(radii, values, band, strict=True))
  return Curve(
    [radius + 0.0 for radius, _, _ in points],
    [value + 0.0 for _, value, _ in points],
    [(low + 0.0, high + 0.0) for _, _, (low, high) in points],
  )


def _load_picture(path: Path, title: str, text: str) -> Picture:
  from PIL import Image, UnidentifiedImageError

  content = path.read_bytes()
  try:
    with Image.open(io.BytesIO(content), formats=('png',)) as picture:
      width, height = picture.size
  except UnidentifiedImageError:
    raise UsageError(f'{path}: is damaged (not a PNG picture)') from None
  encoded = base64.b64encode(content).decode()
  return Picture(title, text, f'data:image/png;base64,{encoded}', width, height)


# Arranging


def _panels(path: Path) -> list[Table]:
  """The panels of a figure, VAE beside SE."""

  def parse(content: Any) -> list[Table]:
    panels = [figure1.Panel(**panel) for panel in content['panels']]
    return [panel_table(panel, figure1.curves_of(panel, content['results'])) for panel in panels]

  def panel_table(panel: figure1.Panel, curves: list[plots.Curve]) -> Table:
    styles = _styles(curve.objective for curve in curves)
    rows = [
      (curve.label, style, f'seeds: {len(curve.results)}', _of_plot(curve))
      for curve, style in zip(curves, styles, strict=True)
    ]
    return _curve_table(panel.title, 'adversarial accuracy', rows, (0.0, 1.0))

  return _parsed(path, parse)


def _of_plot(curve: plots.Curve) -> Curve:
  return _parse_curve(curve.radii.tolist(), curve.accuracy.tolist(), curve.interval.tolist())


def _robustness(runs: Sequence[Run]) -> list[Table]:
  """One table for each data set and task (and several together), runs beside each other."""
  accuracies: dict[str, list[tuple[str, str, str, Curve]]] = {}
  moves: dict[str, list[tuple[str, str, str, Curve]]] = {}
  for run in runs:
    dataset = run.config['dataset']
    for probe in run.probes:
      row = (
        run.label,
        run.style,
        f'{probe.attack}, n = {probe.num_examples:,}, step {probe.step:,}',
      )
      title = f'{dataset}, {probe.task} probe, {probe.attack}'
      accuracies.setdefault(title, []).append((*row, probe.accuracy))
      if probe.joint:
        title = f'{dataset}, {probe.joint[0]} probes together'
        accuracies.setdefault(title, []).append((*row, probe.joint[1]))
      if probe.moves:
        title = f'{dataset}, largest move of the encoding'
        moves.setdefault(title, []).append((*row, probe.moves))
  return [
    *(_curve_table(title, _ACCURACY, rows, (0.0, 1.0)) for title, rows in accuracies.items()),
    *(_curve_table(title, _MOVES, rows) for title, rows in moves.items()),
  ]


def _curve_table(
  title: str,
  unit: str,
  curves: Sequence[tuple[str, str, str, Curve]],
  y_limits: tuple[float, float] | None = None,
) -> Table:
  radii = sorted({radius for *_, curve in curves for radius in curve.radii})
  decimals = '.4g' if y_limits is None else '.3f'
  rows, lines = [], []
  for label, style, note, curve in curves:
    cells = {
      radius: tuple(_number(number, decimals) for number in (value, *band))
      for radius, value, band in zip(*curve, strict=True)
    }
    rows.append(Row(label, style, note, [cells.get(radius) for radius in radii]))
    lows, highs = ([ends[side] for ends in curve.band] for side in (0, 1))
    lines.append(charts.Line(label, style, curve.radii, curve.values, lows, highs))
  headings = [f'{radius:g}' for radius in radii]
  return Table(title, unit, headings, rows, charts.draw(lines, y_limits=y_limits))


def _training(runs: Sequence[Run]) -> dict[str, list[Table]]:
  """Charts of every metric for each data set."""
  by_dataset: dict[str, list[Run]] = {}
  for run in runs:
    if run.rows:
      by_dataset.setdefault(run.config['dataset'], []).append(run)
  return {name: _training_charts(group) for name, group in by_dataset.items()}


def _training_charts(runs: Sequence[Run]) -> list[Table]:
  steps = (0.0, max(run.rows[-1]['step'] for run in runs))
  tables = []
  for name in _in_order(row for run in runs for row in run.rows):
    lines = []
    for run in runs:
      rows = [row for row in run.rows if name in row]
      x, y = (
        charts.thin([row[key] for row in rows], _MOST_POINTS) if rows else []
        for key in ('step', name)
      )
      lines += [charts.Line(run.label, run.style, x, y)] if rows else []
    tables.append(Table(*_named(name), [], [], charts.draw(lines, steps)))
  return tables


def _metric_table(values: Sequence[tuple[Run, Mapping[str, float]]]) -> Table:
  names = _in_order(metrics for _, metrics in values)
  rows = []
  for run, metrics in values:
    numbers = (metrics.get(name) for name in names)
    cells = [None if number is None else (_number(number, '.5g'),) for number in numbers]
    rows.append(Row(run.label, run.style, '' if metrics else run.state, list(cells)))
  return Table('', '', [_named(name)[0] for name in names], rows)


def _in_order(rows: Iterable[Mapping[str, float]]) -> list[str]:
  """The metrics of the rows: those the page knows first. The loss is minus the bound."""
  names = dict.fromkeys(name for row in rows for name in row)
  ordered = [*_METRICS, *sorted(names.keys() - _METRICS)]
  return [name for name in ordered if name in names and name not in ('step', 'loss')]


def _named(name: str) -> tuple[str, str]:
  return _METRICS.get(name, (name, ''))


def _number(value: float, decimals: str) -> Number:
  """A number for the page; the typographic minus is for the eye alone."""
  text = f'{value:,}' if isinstance(value, int) else format(value, decimals)
  return Number(json.dumps(value), text.replace('-', '\N{MINUS SIGN}'))


def _side_by_side(
  columns: Sequence[Mapping[str, Any]], usual: Mapping[str, Any]
) -> list[tuple[str, list[str], bool]]:
  """Rows (name, values, whether they differ) of dicts, from each other or, if alone, from usual."""
  names = dict.fromkeys(name for column in columns for name in column)
  rows = []
  for name in names:
    values = [column.get(name) for column in columns]
    others = [usual[name]] if len(columns) == 1 and name in usual else []
    differs = any(value != values[0] for value in values + others) and name != 'workdir'
    rows.append((name, [_setting_text(value) for value in values], differs))
  return rows


def _setting_text(value: Any) -> str:
  if value is None:
    return 'not given'
  return ', '.join(map(str, value)) if isinstance(value, list) else str(value)


if __name__ == '__main__':
  flags.define_flags(ReportConfig)
  app.run(main)
