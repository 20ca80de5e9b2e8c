"""The page of a report: its tables, its charts and pictures as data URIs, and its HTML."""

from __future__ import annotations

import base64
import io
import itertools
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from experiments.visual import plots
from se_vae.evaluation.verdicts import SanityCheck

GENERATOR = 'se_vae experiments.report'  # marks a page as a report of this project

SUPERVISED = 'supervised'  # in place of an objective

# A family of colours for each objective; a colour that comes again has another kind of line. The
# names of the lines are the same in CSS and in Matplotlib.
_COLORS = {
  SUPERVISED: ('#71767d', '#9c7a3c', '#a3a8ae', '#4f7f7f'),
  'se': ('#1b6ca8', '#2a8c3c', '#7b3fb5', '#1497a6'),
  'vae': ('#d95f02', '#c2185b', '#8c564b', '#b08900'),
}
_OTHER_COLORS = ('#66a61e', '#e7298a', '#444444', '#a6761d')  # of all objectives else
_LINES = ('solid', 'dashed', 'dotted')

# Title and unit of each metric, in the order of the page.
_METRICS = {
  'elbo': ('Bound', 'nats; the ELBO of a VAE, the SE-ELBO of an SE'),
  'log_likelihood': ('Log-likelihood', 'nats'),
  'kl': ('KL from the prior', 'nats'),
  'log_prior_a': ('Log-prior of z', 'nats'),
  'log_prior_b': ("Log-prior of z'", 'nats'),
  'transport_cost': ('Entropic transport cost', 'nats'),
  'normalized_elbo': ('Normalised SE-ELBO', 'nats'),
  'certified_elbo': ('SE-ELBO of the worst encoding within the bounds', 'nats'),
  'consistency_kl': ('Divergence of the encoding of what was decoded', 'nats'),
  'mutual_information': ('Mutual information of image and latents', 'nats'),
  'total_correlation': ('Total correlation of the latents', 'nats'),
  'dimensionwise_kl': ('KL of each latent from the prior, summed', 'nats'),
  'squared_jacobian_norm': ("Squared norm of the encoder mean's Jacobian", 'estimate'),
  'clean_loss': ('Contrastive loss of shifted images', 'nats'),
  'attacked_loss': ("Contrastive loss of x'", 'nats'),
  'squared_w2': ("Encoding shift from x to x'", 'squared W2'),
  'squared_error': ('Squared error', 'summed over pixels in [0, 1]'),
  'gradient_norm': ('Gradient norm', 'l2'),
  'active_latents': ('Active latents', 'number of latent dimensions in use'),
}
_MOST_POINTS = 240  # of a line in a chart; longer ones are averaged in groups
_MOST_MARKS = 20  # points of a line that are marked by a dot each


class Style(NamedTuple):
  """Colour and kind of a line, in the chart and beside its label in the text."""

  color: str
  line: str


class Line(NamedTuple):
  """A line of a chart: points `x`, `y` `[N]`, and a band from `low` to `high` `[N]` if given."""

  style: Style
  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] = ()
  high: Sequence[float] = ()


class Series(NamedTuple):
  """Values `[R]` at radii `[R]`, with a band from `low` to `high` `[R]`."""

  radii: list[float]
  values: list[float]
  low: list[float]
  high: list[float]


def series(radii: Any, values: Any, low: Any, high: Any) -> Series:
  """A series of the numbers in a file.

  Raises:
    TypeError, ValueError: unless they are numbers, as many of each.
  """
  points = sorted(zip(radii, values, low, high, strict=True))  # they may have any order
  return Series(*([point[column] + 0.0 for point in points] for column in range(4)))


class Picture(NamedTuple):
  """A PNG file as a data URI, with its description."""

  title: str
  text: str
  source: str
  width: int
  height: int


class Row(NamedTuple):
  """A row of a table: the run, a remark, one cell a column, and the verdict of the checks.

  A cell is a metric, or the value, low and high end of a curve; None where there is none.
  """

  label: str
  style: Style
  note: str
  cells: Sequence[Any]
  checks: str = ''


class CurveRow(NamedTuple):
  """A row of a table of curves: the run, a remark, its values and the verdict of its checks.

  The band of a certified curve reaches up to the values `[R]` of the attacked one, `attacked`.
  """

  label: str
  style: Style
  note: str
  series: Series
  checks: str
  attacked: Sequence[float] = ()


class Table(NamedTuple):
  """A table with a row for each run, and its chart as a data URI ('' if there is none).

  Numbers are shown in the format `decimals`.
  """

  title: str
  unit: str
  headings: list[str]
  rows: list[Row]
  chart: str = ''
  decimals: str = '.5g'


class Probe(NamedTuple):
  """The result of a probe, or of a supervised classifier.

  `dataset` is that of the attacked images, or empty if it is that of the run.
  `joint` has the names of several tasks and their curve, `certified` the method and its curve.
  """

  dataset: str
  task: str
  attack: str
  num_examples: int
  step: int
  accuracy: Series
  joint: tuple[str, Series] | None
  certified: tuple[str, Series] | None
  latent_shift: Series | None
  checks: list[SanityCheck]
  summary: str


class Run(NamedTuple):
  """A run of experiments.pretrain or supervised; empty or None where a part is missing."""

  label: str
  style: Style
  config: dict[str, Any]
  environment: dict[str, Any]
  state: str
  rows: Sequence[dict[str, float]] = ()
  test: dict[str, float] | None = None
  probes: Sequence[Probe] = ()
  pictures: Sequence[Picture] = ()

  @property
  def supervised(self) -> bool:
    """Whether it is a classifier that was trained with labels, and no encoder."""
    return bool(self.config['objective'] == SUPERVISED)


def styles(objectives: Iterable[str]) -> list[Style]:
  """A style for each run, from the family of its objective; twelve in a family are distinct."""
  families = {
    objective: itertools.cycle([Style(color, line) for line in _LINES for color in colors])
    for objective, colors in (*_COLORS.items(), ('other', _OTHER_COLORS))
  }
  return [next(families.get(objective, families['other'])) for objective in objectives]


def _shown(value: float, decimals: str) -> str:
  """The text of a number, with a typographic minus; integers are shown in full."""
  text = f'{value:,}' if isinstance(value, int) else format(value, decimals)
  return text.replace('-', '\N{MINUS SIGN}')


def thin(values: Sequence[float], most: int = _MOST_POINTS) -> list[float]:
  """Means of groups of consecutive values, at most `most` of them."""
  size = -(-len(values) // most) or 1
  groups = (values[start : start + size] for start in range(0, len(values), size))
  return [sum(group) / len(group) for group in groups]


def chart(
  lines: Sequence[Line],
  x_label: str,
  *,
  x_limits: tuple[float, float] | None = None,
  y_limits: tuple[float, float] | None = None,
  size: tuple[float, float] = (5.4, 3.4),
) -> str:
  """A line chart as the data URI of an SVG picture; points that are not finite leave gaps.

  Args:
    lines: what to draw; in the SVG, line number i and its band have the ids `line_i`, `band_i`.
    x_label: text under the horizontal axis.
    x_limits: ends of the horizontal axis; those of the lines if None.
    y_limits: ends of the vertical axis; those of the lines if None.
    size: width and height, in inches.
  """
  figure = plots.new_figure(*size)
  import matplotlib as mpl  # there since there is a figure

  options = {'svg.fonttype': 'none', 'svg.hashsalt': GENERATOR, 'axes.unicode_minus': True}
  with mpl.rc_context(options):
    axis = figure.subplots()
    for i, line in enumerate(lines):
      color, kind = line.style
      marker = 'o' if len(line.x) <= _MOST_MARKS else ''
      axis.plot(line.x, line.y, color=color, ls=kind, marker=marker, ms=3.5, gid=f'line_{i}')
      if line.low:
        band = axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.15, lw=0)
        band.set_gid(f'band_{i}')
    axis.set(xlabel=x_label, xlim=x_limits, ylim=y_limits)
    axis.grid(alpha=0.3)
    axis.spines[['top', 'right']].set_visible(False)
    file = io.BytesIO()
    no_metadata = dict.fromkeys(('Creator', 'Date', 'Format', 'Type'))
    figure.savefig(file, format='svg', metadata=no_metadata)
  return _data_uri('image/svg+xml', file.getvalue())


def panel(title: str, curves: Sequence[plots.Curve]) -> Table:
  """A table and chart of a figure's panel, with a row for each curve."""
  rows = []
  for curve, style in zip(curves, styles(curve.objective for curve in curves), strict=True):
    note = f'seeds: {len(curve.results)}'
    numbers = series(
      *(column.tolist() for column in (curve.radii, curve.accuracy, *curve.interval.T))
    )
    rows.append(CurveRow(curve.label, style, note, numbers, curve.checks))
    if curve.certified is not None:
      values = curve.certified.tolist()
      rows.append(_certified(rows[-1], note, series(curve.radii.tolist(), values, values, values)))
  return _accuracy_table(title, rows)


def _certified(attacked: CurveRow, note: str, numbers: Series) -> CurveRow:
  """The row of a certified curve, below that of the attacked one."""
  return CurveRow(
    f'{attacked.label}, certified',
    attacked.style._replace(line='dotted'),
    note,
    numbers,
    'the true accuracy is in the shaded band between this curve and the attacked one',
    attacked.series.values,
  )


def _robustness(runs: Sequence[Run]) -> list[Table]:
  """A table for each data set and task, each set of tasks together, and the latent shift."""
  accuracies: dict[str, list[CurveRow]] = {}
  shifts: dict[str, list[CurveRow]] = {}
  not_run = plots.checks_summary()  # the checks are those of the probe's own curve
  for run in runs:
    for probe in run.probes:
      dataset = probe.dataset or run.config['dataset']
      note = f'{probe.attack}, n = {probe.num_examples:,}, step {probe.step:,}'
      note = f'trained with labels, {note}' if run.supervised else note
      curve = CurveRow(run.label, run.style, note, probe.accuracy, probe.summary)
      title = f'{dataset}, {probe.task} probe, {probe.attack} attack'
      accuracies.setdefault(title, []).append(curve)
      if probe.certified:
        method, numbers = probe.certified
        accuracies[title].append(_certified(curve, f'method {method}', numbers))
      if probe.joint:
        tasks, numbers = probe.joint
        joint = curve._replace(series=numbers, checks=not_run)
        accuracies.setdefault(f'{dataset}, {tasks} probes together', []).append(joint)
      if probe.latent_shift:
        shift = curve._replace(series=probe.latent_shift, checks=not_run)
        shifts.setdefault(f'{dataset}, latent shift under attack', []).append(shift)
  unit = 'squared W2 between the encodings of x and the attack; mean, and 5 % to 95 % of the images'
  return [
    *(_accuracy_table(title, rows) for title, rows in accuracies.items()),
    *(_curve_table(title, unit, rows, '.4g', None) for title, rows in shifts.items()),
  ]


def _accuracy_table(title: str, curves: Sequence[CurveRow]) -> Table:
  unit = 'adversarial accuracy, with 95 % intervals'
  return _curve_table(title, unit, curves, '.3f', (-0.02, 1.02))


def _curve_table(
  title: str,
  unit: str,
  curves: Sequence[CurveRow],
  decimals: str,
  y_limits: tuple[float, float] | None,
) -> Table:
  radii = sorted({radius for curve in curves for radius in curve.series.radii})
  rows, lines = [], []
  for label, style, note, numbers, checks, attacked in curves:
    cells = {radius: values for radius, *values in zip(*numbers, strict=True)}
    rows.append(Row(label, style, note, [cells.get(radius) for radius in radii], checks))
    line = Line(style, *numbers)
    lines.append(line._replace(low=line.y, high=attacked) if attacked else line)
  drawing = chart(lines, 'radius of the attack (l-inf, pixels in [0, 1])', y_limits=y_limits)
  return Table(title, unit, [f'{radius:g}' for radius in radii], rows, drawing, decimals)


def _training(runs: Sequence[Run]) -> dict[str, list[Table]]:
  """A chart of every metric, for each data set."""
  by_dataset: dict[str, list[Run]] = {}
  for run in runs:
    if run.rows:
      by_dataset.setdefault(run.config['dataset'], []).append(run)
  return {dataset: _training_charts(group) for dataset, group in by_dataset.items()}


def _training_charts(runs: Sequence[Run]) -> list[Table]:
  last = max(run.rows[-1]['step'] for run in runs)
  tables = []
  for name in _in_order(row for run in runs for row in run.rows):
    lines = []
    for run in runs:
      steps, values = ([row[key] for row in run.rows if name in row] for key in ('step', name))
      lines.append(Line(run.style, thin(steps), thin(values)))
    drawing = chart(lines, 'training step', x_limits=(0.0, last or 1.0), size=(4.2, 2.6))
    tables.append(Table(*_named(name), [], [], drawing))
  return tables


def _metric_table(runs: Sequence[Run], metrics: Sequence[Mapping[str, float]]) -> Table:
  """A table of one set of metrics a run."""
  names = _in_order(metrics)
  rows = []
  for run, values in zip(runs, metrics, strict=True):
    cells = [values.get(name) for name in names]
    rows.append(Row(run.label, run.style, '' if values else run.state, cells))
  return Table('', '', [_named(name)[0] for name in names], rows)


def _in_order(rows: Iterable[Mapping[str, float]]) -> list[str]:
  """The metrics of the rows, known ones first; without the loss, which is minus the bound."""
  names = dict.fromkeys(name for row in rows for name in row)
  ordered = [*_METRICS, *sorted(names.keys() - _METRICS)]
  return [name for name in ordered if name in names and name not in ('step', 'loss')]


def _named(name: str) -> tuple[str, str]:
  return _METRICS.get(name, (name, ''))


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


def picture(content: bytes, title: str, text: str) -> Picture:
  """A picture for the page.

  Raises:
    ValueError: if `content` is not a whole PNG picture.
  """
  from PIL import Image

  try:
    with Image.open(io.BytesIO(content), formats=('png',)) as image:
      width, height = image.size
      image.verify()
  except Exception:  # Pillow has an error of its own for every kind of damage
    raise ValueError('not a whole PNG picture') from None
  return Picture(title, text, _data_uri('image/png', content), width, height)


def render(
  title: str,
  runs: Sequence[Run],
  figures: Sequence[tuple[Sequence[Table], str]],
  unfinished: Sequence[str],
  damages: Sequence[str],
  defaults: Mapping[str, Any],
) -> str:
  """The page, in HTML; every text in it is escaped.

  Args:
    title: heading of the page.
    runs: the runs, at least one.
    figures: the panels of each figure, and a note about it that may be empty.
    unfinished: directories that hold runs, and neither a figure nor a sweep.
    damages: a line about each file that is left out.
    defaults: the settings that a single run is compared with.
  """
  import jinja2  # slow to import

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  environment.filters['shown'] = _shown
  pictures = {picture.title: picture.text for run in runs for picture in run.pictures}
  encoders = [run for run in runs if not run.supervised]
  page = environment.get_template('report.html').render(
    generator=GENERATOR,
    title=title,
    runs=runs,
    figures=figures,
    unfinished=unfinished,
    damages=damages,
    encoders=encoders,
    held_out=_metric_table(encoders, [run.test or {} for run in encoders]),
    last_rows=_metric_table(encoders, [run.rows[-1] if run.rows else {} for run in encoders]),
    robustness=_robustness(runs),
    training=_training(runs),
    pictures=pictures,
    settings=_side_by_side([run.config for run in runs], defaults),
    environment=_side_by_side([run.environment for run in runs], {}),
  )
  return page.lstrip()


def _data_uri(kind: str, content: bytes) -> str:
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'
