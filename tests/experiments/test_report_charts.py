"""The charts of the report: drawn where the numbers are, and told apart."""

from __future__ import annotations

import base64
import os
import re
import subprocess
import sys
import xml.etree.ElementTree
from pathlib import Path

import numpy as np
import pytest

from experiments.visual import report_page


def drawn(uri: str) -> xml.etree.ElementTree.Element:
  """The SVG picture in a data URI, its names without their namespaces."""
  kind, content = uri.split(';base64,')
  assert kind == 'data:image/svg+xml'
  text = base64.b64decode(content).decode()
  return xml.etree.ElementTree.fromstring(re.sub(r' xmlns(:\w+)?="[^"]*"|xlink:', '', text))


def points_of(picture: xml.etree.ElementTree.Element, name: str) -> np.ndarray:
  """The points `[N, 2]` of the path in the group of this id."""
  group = picture.find(f".//g[@id='{name}']")
  shape = group.find('path')
  if shape is None and group.find('defs/path') is None:
    return np.empty((0, 2))  # nothing to draw
  offset = np.zeros(2)
  if shape is None:  # a band: defined first, then put into its place
    shape = group.find('defs/path')
    offset += [float(group.find('g/use').get(axis)) for axis in 'xy']
  numbers = re.findall(r'[-+]?[0-9.]+(?:e[-+]?[0-9]+)?', shape.get('d'))
  return np.array(numbers, float).reshape(-1, 2) + offset


def scales(picture: xml.etree.ElementTree.Element) -> list[np.ndarray]:
  """For both axes the line (slope, offset) from a place in the drawing to a value, by its ticks."""
  found = []
  for axis in 'xy':
    places, values = [], []
    for tick in picture.iter('g'):
      if tick.get('id', '').startswith(f'{axis}tick_'):
        places.append(float(next(tick.iter('use')).get(axis)))
        values.append(float(next(tick.iter('text')).text.replace('\N{MINUS SIGN}', '-')))
    found.append(np.polyfit(places, values, 1))
  return found


def test_curves_are_drawn_where_the_numbers_are():
  style = report_page.Style('#1b6ca8', 'solid')
  line = report_page.Line(style, [0.0, 0.1, 0.4], [0.9, 0.5, 0.2], [0.8, 0.4, 0.1], [1.0, 0.6, 0.3])
  picture = drawn(report_page.chart([line], 'radius', y_limits=(0.0, 1.0)))
  x_scale, y_scale = scales(picture)
  x, y = points_of(picture, 'line_0').T
  np.testing.assert_allclose(np.polyval(x_scale, x), line.x, atol=1e-5)
  np.testing.assert_allclose(np.polyval(y_scale, y), line.y, atol=1e-5)
  x, y = points_of(picture, 'band_0').T
  corners = {
    (round(a, 4), round(b, 4))
    for a, b in zip(np.polyval(x_scale, x), np.polyval(y_scale, y), strict=True)
  }
  assert corners == {*zip(line.x, line.low, strict=True), *zip(line.x, line.high, strict=True)}


@pytest.mark.parametrize('values', [[], [2.0], [1.0, 1.0], [float('nan'), 1.0], [-1e9, 1e9]])
def test_charts_of_few_flat_or_missing_values(values):
  style = report_page.Style('#1b6ca8', 'solid')
  line = report_page.Line(style, list(range(len(values))), values)
  picture = drawn(report_page.chart([line], 'step'))
  assert len(points_of(picture, 'line_0')) == np.isfinite(values).sum()
  left, top, width, height = map(float, picture.get('viewBox').split())
  for tick in picture.iter('use'):
    assert left <= float(tick.get('x')) <= left + width
    assert top <= float(tick.get('y')) <= top + height


def test_long_curves_are_averaged_in_groups():
  assert report_page.thin([1.0, 2.0, 3.0], 3) == [1.0, 2.0, 3.0]
  assert report_page.thin([1.0, 2.0, 3.0, 4.0, 9.0], 3) == [1.5, 3.5, 9.0]
  assert len(report_page.thin([0.0] * 3000, 240)) <= 240


def test_runs_side_by_side_look_different():
  """Twelve runs of each objective; one objective's colours are never the other's."""
  styles = report_page.styles(['se', 'vae'] * 12)
  assert len(set(styles)) == 24
  assert not {style.color for style in styles[::2]} & {style.color for style in styles[1::2]}


def test_charts_leave_nothing_in_the_home_directory(tmp_path):
  code = 'from experiments.visual import plots; plots.new_figure(1, 1)'
  environment = {name: value for name, value in os.environ.items() if name != 'MPLCONFIGDIR'}
  home = {name: str(tmp_path) for name in ('HOME', 'XDG_CONFIG_HOME', 'XDG_CACHE_HOME')}
  command = [sys.executable, '-c', code]
  subprocess.run(command, cwd=Path(__file__).parents[2], env=environment | home, check=True)
  assert list(tmp_path.iterdir()) == []
