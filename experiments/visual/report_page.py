"""Layout of the report: tables, charts and pictures as data URIs, and the HTML template."""

from __future__ import annotations

import base64
import io
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

GENERATOR = 'se_vae experiments.report'  # marks a page as a report of this project

# A family of colours for each objective; a colour that comes again has another kind of line. The
# names of the lines are the same in CSS and in Matplotlib.
_COLORS = {
  'se': ('#1b6ca8', '#2a8c3c', '#7b3fb5', '#1497a6'),
  'vae': ('#d95f02', '#c2185b', '#8c564b', '#b08900'),
}
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
  'squared_w2': ("Encoding shift from x to x'", 'squared W2'),
  'squared_error': ('Squared error', 'summed over pixels in [0, 1]'),
  'gradient_norm': ('Gradient norm', 'l2'),
  'active_latents': ('Active latents', 'number of latent dimensions in use'),
}
_ACCURACY = 'adversarial accuracy, with 95 % intervals'
_SHIFT = 'squared W2 between the encodings of x and the attack; mean, and 5 % to 95 % of the images'

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


class Number(NamedTuple):
  """A number: as in the file, in JSON, and as the page shows it."""

  exact: str
  text: str


class Series(NamedTuple):
  """Values `[R]` at radii `[R]`, with a band `[R, 2]`."""

  radii: list[float]
  values: list[float]
  band: list[tuple[float, float]]


class Picture(NamedTuple):
  """A PNG file as a data URI, with its description."""

  title: str
  text: str
  source: str
  width: int
  height: int


class Row(NamedTuple):
  """A row of a table: the run, a remark, the verdict of its checks, and one cell a column."""

  label: str
  style: Style
  note: str
  cells: list[tuple[Number, ...] | None]
  checks: str = ''


class CurveRow(NamedTuple):
  """A row of a table of curves: the run, a remark, its values and the verdict of its checks."""

  label: str
  style: Style
  note: str
  series: Series
  checks: str


class Table(NamedTuple):
  """A table with a row for each run, and its chart as a data URI ('' if there is none)."""

  title: str
  unit: str
  headings: list[str]
  rows: list[Row]
  chart: str = ''


def styles(objectives: Iterable[str]) -> list[Style]:
  """A style for each run, from the family of its objective; twelve in a family are distinct."""
  counts = dict.fromkeys(_COLORS, 0)
  found = []
  for objective in objectives:
    family = 'se' if objective == 'se' else 'vae'
    colors, number = _COLORS[family], counts[family]
    counts[family] += 1
    found.append(Style(colors[number % len(colors)], _LINES[number // len(colors) % len(_LINES)]))
  return found


def number(value: float, decimals: str) -> Number:
  """A number with a typographic minus in its text; integers are shown in full."""
  text = f'{value:,}' if isinstance(value, int) else format(value, decimals)
  return Number(json.dumps(value), text.replace('-', '\N{MINUS SIGN}'))


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
  import matplotlib as mpl  # slow to import
  from matplotlib.figure import Figure

  options = {'svg.fonttype': 'none', 'svg.hashsalt': GENERATOR, 'axes.unicode_minus': True}
  with mpl.rc_context(options):
    figure = Figure(figsize=size, layout='constrained')
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


def accuracy_table(title: str, curves: Sequence[CurveRow]) -> Table:
  """A table and chart of adversarial accuracies."""
  return _curve_table(title, _ACCURACY, curves, '.3f', (-0.02, 1.02))


def latent_shift_table(title: str, curves: Sequence[CurveRow]) -> Table:
  """A table and chart of latent shifts."""
  return _curve_table(title, _SHIFT, curves, '.4g', None)


def _curve_table(
  title: str,
  unit: str,
  curves: Sequence[CurveRow],
  decimals: str,
  y_limits: tuple[float, float] | None,
) -> Table:
  radii = sorted({radius for curve in curves for radius in curve.series.radii})
  rows, lines = [], []
  for label, style, note, series, checks in curves:
    cells = {
      radius: tuple(number(each, decimals) for each in (value, *band))
      for radius, value, band in zip(*series, strict=True)
    }
    rows.append(Row(label, style, note, [cells.get(radius) for radius in radii], checks))
    lows, highs = ([ends[side] for ends in series.band] for side in (0, 1))
    lines.append(Line(style, series.radii, series.values, lows, highs))
  drawing = chart(lines, 'radius of the attack (l-inf, pixels in [0, 1])', y_limits=y_limits)
  return Table(title, unit, [f'{radius:g}' for radius in radii], rows, drawing)


def training_charts(runs: Sequence[tuple[Style, list[dict[str, float]]]]) -> list[Table]:
  """A chart of every metric; each run is a style and its rows of metrics, at least one."""
  last = max(rows[-1]['step'] for _, rows in runs)
  tables = []
  for name in _in_order(row for _, rows in runs for row in rows):
    lines = []
    for style, rows in runs:
      steps, values = ([row[key] for row in rows if name in row] for key in ('step', name))
      lines.append(Line(style, thin(steps), thin(values)))
    drawing = chart(lines, 'training step', x_limits=(0.0, last or 1.0), size=(4.2, 2.6))
    tables.append(Table(*_named(name), [], [], drawing))
  return tables


def metric_table(
  runs: Sequence[tuple[str, Style, str]], metrics: Sequence[Mapping[str, float]]
) -> Table:
  """A table of one set of metrics a run; a run is its label, its style and its state."""
  names = _in_order(metrics)
  rows = []
  for (label, style, state), values in zip(runs, metrics, strict=True):
    numbers = (values.get(name) for name in names)
    cells = [None if value is None else (number(value, '.5g'),) for value in numbers]
    rows.append(Row(label, style, '' if values else state, list(cells)))
  return Table('', '', [_named(name)[0] for name in names], rows)


def _in_order(rows: Iterable[Mapping[str, float]]) -> list[str]:
  """The metrics of the rows, known ones first; without the loss, which is minus the bound."""
  names = dict.fromkeys(name for row in rows for name in row)
  ordered = [*_METRICS, *sorted(names.keys() - _METRICS)]
  return [name for name in ordered if name in names and name not in ('step', 'loss')]


def _named(name: str) -> tuple[str, str]:
  return _METRICS.get(name, (name, ''))


def side_by_side(
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
    ValueError: if `content` is not a PNG picture.
  """
  from PIL import Image, UnidentifiedImageError

  try:
    with Image.open(io.BytesIO(content), formats=('png',)) as image:
      width, height = image.size
  except UnidentifiedImageError:
    raise ValueError('not a PNG picture') from None
  return Picture(title, text, _data_uri('image/png', content), width, height)


def render(**content: Any) -> str:
  """The page; every text in `content` is escaped."""
  import jinja2  # slow to import

  environment = jinja2.Environment(
    loader=jinja2.FileSystemLoader(Path(__file__).parent),
    autoescape=True,
    undefined=jinja2.StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
  )
  page = environment.get_template('report.html').render(generator=GENERATOR, **content)
  return page.lstrip()


def _data_uri(kind: str, content: bytes) -> str:
  return f'data:{kind};base64,{base64.b64encode(content).decode()}'
