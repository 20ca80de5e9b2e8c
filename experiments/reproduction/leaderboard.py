"""The leaderboard: which results it takes, and the table and the figure of its page."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cli.messages import markdown_table
from experiments.reproduction import document, rows
from experiments.reproduction.manifest import Manifest
from experiments.visual import leaderboard_plot
from se_vae.storage import atomic_files, json_files

FOLDER = 'leaderboard'
RADII = (0.1, 0.2)
_BEGIN, _END = '<!-- leaderboard -->', '<!-- end of leaderboard -->'

# What an entry needs. The digest is that of MNIST's four files as `se_vae.data` reads them.
DATA = 'e842274a05563eecde4bbdc6c93af22e52fc198fdc676ebe1f0a0ce0ed189c6f'
LEAST_IMAGES = 1000
_STRENGTH = {'pgd_steps': 40, 'num_queries': 1000, 'restarts': 1}
# Where one of these checks fails, the accuracies are wrong. Others say that an attack is weak,
# which the worst case of many attacks forgives; they are shown.
_NEEDED = (1, 2, 3, 10, 11)


def faults(attacked: dict[str, Any]) -> Iterator[str]:
  """What keeps a result of probe or supervised off the leaderboard, a line each.

  Args:
    attacked: the content of probe_digit_worst_case.json, or of result.json of supervised.
  """
  config = attacked.get('config', {})
  settings = {**config, **attacked.get('evaluation', {})}
  if attacked['data']['digest'] != DATA:
    yield 'the data must be the test images of MNIST'
  if config.get('validation') or attacked.get('pretraining', {}).get('validation'):
    yield 'the images must be test images, not training images that were held out (--validation)'
  if attacked['task'] != 'digit':
    yield f'the task must be digit, not {attacked["task"]}'
  if settings.get('attack') != 'worst_case':
    yield f'the attack must be worst_case, not {settings.get("attack")}'
  if attacked['num_examples'] < LEAST_IMAGES:
    yield f'at least {LEAST_IMAGES} images must be attacked, not {attacked["num_examples"]}'
  for radius in (0.0, *RADII):
    if not np.isclose(attacked['radii'], radius).any():
      yield f'the radii must have {radius:g}'
  for name, least in _STRENGTH.items():
    if settings.get(name, least) < least:
      yield f'--{name} must be at least {least}, not {settings[name]}'
  verdicts = {check['number']: check.get('verdict') for check in attacked.get('checks', ())}
  for number in _NEEDED:
    if verdicts.get(number) != 'pass':
      yield f'sanity check {number} must pass; it is {verdicts.get(number) or "missing"}'


def entries(manifest: Manifest, results: Path) -> list[rows.Measured]:
  """All entries: rows of the manifest, and those that were added. The most robust one is first.

  Raises:
    JsonError: if a file is damaged.
  """
  named = [name for name, row in manifest.rows.items() if row.get('leaderboard')]
  found = [row for name in named if (row := rows.read(results, name)) is not None]
  for path in sorted((results / FOLDER).glob('*.json')):
    found.append(json_files.read(path, rows.Measured))
  return sorted(found, key=lambda row: -rows.at_radius(row, RADII[0]).mean())


def page(text: str, listed: Sequence[rows.Measured]) -> str:
  """The text of a page with the table of entries between its two marks.

  Raises:
    ValueError: if the page has no such marks.
  """
  pattern = re.compile(f'{_BEGIN}.*?{_END}', re.DOTALL)
  if not pattern.search(text):
    raise ValueError(f'the page has no {_BEGIN} and {_END}')
  return pattern.sub(lambda _: f'{_BEGIN}\n\n{_table(listed)}\n\n{_END}', text)


def draw(path: Path, listed: Sequence[rows.Measured]) -> None:
  """Draws the figure: robust against clean accuracy, a panel for each radius."""
  panels = [(f'radius {radius:g}', [_point(row, radius) for row in listed]) for radius in RADII]
  with atomic_files.replacing(path) as file:
    leaderboard_plot.save(file, panels)


def _table(listed: Sequence[rows.Measured]) -> str:
  header = ('', 'encoder', 'labels', 'clean', *(f'at {radius:g}' for radius in RADII))
  certified = (f'certified at {radius:g}' for radius in RADII)
  cells = (_cells(place, row) for place, row in enumerate(listed, 1))
  return markdown_table((*header, *certified, 'seeds', 'images', 'checks'), cells)


def _cells(place: int, row: rows.Measured) -> Iterator[str]:
  yield str(place)
  yield f'[{row["title"]}]({row["link"]})' if 'link' in row else row['title']
  yield 'yes' if row['objective'] == rows.LABELS else 'no'
  for radius in (0.0, *RADII):
    yield document.over_seeds(rows.at_radius(row, radius))
  for radius in RADII:
    values = rows.certified_at(row, radius)
    yield '' if values is None else document.over_seeds(values)
  yield str(len(row['seeds']))
  yield f'{min(seed["num_examples"] for seed in row["seeds"]):,}'
  yield document.checks_of(row)


def _point(row: rows.Measured, radius: float) -> leaderboard_plot.Point:
  certified = rows.certified_at(row, radius)
  return leaderboard_plot.Point(
    row['title'],
    clean=float(rows.at_radius(row, 0.0).mean()),
    robust=float(rows.at_radius(row, radius).mean()),
    certified=None if certified is None else float(certified.mean()),
    labels=row['objective'] == rows.LABELS,
  )
