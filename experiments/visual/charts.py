"""Line charts as geometry: where lines, bands and ticks go; a template draws them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

# In units of the drawing, which is scaled to the width it is given.
WIDTH, HEIGHT = 360, 230
_LEFT, _RIGHT, _TOP, _BOTTOM = 50, 336, 10, 190

# With more points than this none is marked by a dot.
_MOST_MARKS = 20


class Line(NamedTuple):
  """Points to join: `x` and `y` `[N]`; `low` and `high` `[N]` where there is a band."""

  label: str
  style: str
  x: Sequence[float]
  y: Sequence[float]
  low: Sequence[float] = ()
  high: Sequence[float] = ()


class Tick(NamedTuple):
  """A place on an axis, and what is written there."""

  place: float
  text: str


class Mark(NamedTuple):
  """A dot on a line, and what it says."""

  x: float
  y: float
  text: str


class Shape(NamedTuple):
  """A line as drawn: paths of the line and of its band ('' if there is none), and its dots."""

  label: str
  style: str
  path: str
  band: str
  marks: list[Mark]


class Drawing(NamedTuple):
  """A chart: the frame's edges, ticks and shapes."""

  left: float
  right: float
  top: float
  bottom: float
  x_ticks: list[Tick]
  y_ticks: list[Tick]
  shapes: list[Shape]


def draw(
  lines: Sequence[Line],
  x_limits: tuple[float, float] | None = None,
  y_limits: tuple[float, float] | None = None,
) -> Drawing:
  """Lays out lines; points that are not finite are left out.

  Args:
    lines: what to draw.
    x_limits: lowest and highest x, for charts to be compared; the lines' own if None.
    y_limits: likewise of y; round numbers around the lines' own if None.
  """
  lines = [_finite(line) for line in lines]
  xs = [x for line in lines for x in line.x]
  ys = [y for line in lines for y in (*line.y, *line.low, *line.high)]
  x_ticks, x_low, x_high = _ticks(x_limits or _range(xs), tight=True)
  y_ticks, y_low, y_high = _ticks(y_limits or _range(ys), tight=y_limits is not None)

  def at_x(x: float) -> float:
    return _LEFT + (_RIGHT - _LEFT) * (x - x_low) / (x_high - x_low)

  def at_y(y: float) -> float:
    return _BOTTOM - (_BOTTOM - _TOP) * (y - y_low) / (y_high - y_low)

  def path(x: Sequence[float], y: Sequence[float]) -> str:
    points = (f'{at_x(a):.1f} {at_y(b):.1f}' for a, b in zip(x, y, strict=True))
    return 'M' + 'L'.join(points) if x else ''

  def shape(line: Line) -> Shape:
    band = path([*line.x, *reversed(line.x)], [*line.high, *reversed(line.low)]) if line.low else ''
    marked = zip(line.x, line.y, strict=True) if len(line.x) <= _MOST_MARKS else ()
    marks = [Mark(at_x(x), at_y(y), f'{line.label}: {y:.4g} at {x:g}') for x, y in marked]
    return Shape(line.label, line.style, path(line.x, line.y), f'{band}Z' if band else '', marks)

  return Drawing(
    _LEFT,
    _RIGHT,
    _TOP,
    _BOTTOM,
    [Tick(at_x(x), _text(x)) for x in x_ticks],
    [Tick(at_y(y), _text(y)) for y in y_ticks],
    [shape(line) for line in lines],
  )


def thin(values: Sequence[float], most: int) -> list[float]:
  """Means of consecutive values, as many to each as leave at most `most` of them."""
  size = math.ceil(len(values) / most) or 1
  groups = (values[start : start + size] for start in range(0, len(values), size))
  return [sum(group) / len(group) for group in groups]


def _finite(line: Line) -> Line:
  columns = [column for column in (line.x, line.y, line.low, line.high) if column]
  rows = [row for row in zip(*columns, strict=True) if all(map(math.isfinite, row))]
  kept = list(zip(*rows, strict=True)) or [(), ()]
  return Line(line.label, line.style, *kept)


def _range(values: Sequence[float]) -> tuple[float, float]:
  return min(values, default=0.0), max(values, default=1.0)


def _ticks(limits: tuple[float, float], *, tight: bool) -> tuple[list[float], float, float]:
  """Round numbers, and the axis' ends: the outermost of them, or if tight the limits."""
  from matplotlib.ticker import MaxNLocator  # slow to import

  lowest, highest = limits
  if not lowest < highest:
    room = abs(lowest) / 10.0 or 0.5
    lowest, highest = lowest - room, highest + room
  places = MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]).tick_values(lowest, highest)
  ticks = [float(place) for place in places]
  if tight:
    slack = 1e-6 * (highest - lowest)
    return [t for t in ticks if lowest - slack <= t <= highest + slack], lowest, highest
  return ticks, ticks[0], ticks[-1]


def _text(value: float) -> str:
  return f'{value:,.6g}'.replace('-', '\N{MINUS SIGN}')
