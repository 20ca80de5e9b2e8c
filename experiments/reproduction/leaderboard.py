"""The leaderboard: which results it takes, and the table and the figure of its page."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np

from experiments.cli.messages import markdown_table
from experiments.reproduction import document, rows
from experiments.reproduction.manifest import Manifest
from experiments.visual import leaderboard_plot
from se_vae.storage import atomic_files, json_files

FOLDER = 'leaderboard'
RADII = (0.1, 0.2)

# The digest of MNIST's four files, as `se_vae.data` reads them.
DATA = 'e842274a05563eecde4bbdc6c93af22e52fc198fdc676ebe1f0a0ce0ed189c6f'
LEAST_IMAGES = 1000
_LEAST = {'pgd_steps': 40, 'num_queries': 1000, 'restarts': 1, 'check_examples': 200}
# Where one of these checks fails, the accuracies are wrong. Others say that an attack is weak,
# which the worst case of many attacks forgives; they are shown.
_NEEDED = (1, 2, 3, 10, 11)
_NO_TITLE = re.compile(r'[|\[\]<>\x00-\x1f]')


def faults(row: rows.Measured) -> Iterator[str]:
  """What keeps a row off the leaderboard, a line each: its title and link, and then its runs."""
  yield from faults_of_names(row)
  if row['data'] != DATA:
    yield 'the data must be MNIST'
  if row['validation']:
    yield 'the images must be test images, not training images that were held out (--validation)'
  if row['task'] != 'digit':
    yield f'the task must be digit, not {row["task"]}'
  if row['attack'] != 'worst_case':
    yield f'the attack must be worst_case, not {row["attack"]}'
  for name, least in _LEAST.items():
    if not (row['settings'].get(name) or 0) >= least:
      yield f'--{name} must be at least {least}, not {row["settings"].get(name)}'
  if row['settings'].get('relative_step_size') is not None:
    yield '--relative_step_size must not be given'
  for seed in row['seeds']:
    for fault in _faults_of_seed(seed):
      yield f'seed {seed["seed"]}: {fault}'


def faults_of_names(row: rows.Measured) -> Iterator[str]:
  """What is wrong with a row's title and link, a line each."""
  if _NO_TITLE.search(row['title']):
    yield 'title: must have none of | [ ] < > and no line break in it'
  if not re.fullmatch(r'(https://[^\s()|]+)?', row.get('link', '')):
    yield 'link: must be an address that begins with https://'


def _faults_of_seed(seed: rows.Seed) -> Iterator[str]:
  if seed['num_examples'] < LEAST_IMAGES:
    yield f'at least {LEAST_IMAGES} images must be attacked, not {seed["num_examples"]}'
  for radius in (0.0, *RADII):
    if not np.isclose(seed['radii'], radius).any():
      yield f'the radii must have {radius:g}'
  accuracy = np.array(seed['accuracy'])[np.argsort(seed['radii'])]
  if not ((accuracy >= 0.0) & (accuracy <= 1.0)).all() or (np.diff(accuracy) > 0.0).any():
    yield 'accuracies must be in [0, 1], and must not rise with the radius'
  if 'certified' in seed:
    of_radius = dict(zip(seed['radii'], seed['accuracy'], strict=True))
    certified = seed['certified']
    for radius, value in zip(certified['radii'], certified['accuracy'], strict=True):
      if not 0.0 <= value <= of_radius.get(radius, 0.0):
        yield f'the certified accuracy at {radius:g} is above that under attack'
  verdicts = {check['number']: check.get('verdict') for check in seed['checks']}
  for number in _NEEDED:
    if verdicts.get(number) != 'pass':
      yield f'sanity check {number} must pass; it is {verdicts.get(number) or "missing"}'


def entries(manifest: Manifest, results: Path) -> list[rows.Measured]:
  """All entries: rows of the manifest, and those that were added. The most robust one is first.

  Raises:
    JsonError: if a file is damaged, or the rules do not admit a row.
  """
  of_manifest = document.Document(manifest, results).measured
  found = [row for name, row in of_manifest.items() if manifest.rows[name].get('leaderboard')]
  found += [rows.read_file(path) for path in sorted((results / FOLDER).glob('*.json'))]
  for row in found:
    for fault in faults(row):
      raise json_files.JsonError(f'{row["name"]} is no entry of the leaderboard: {fault}')
  return ordered(found)


def ordered(found: Iterable[rows.Measured]) -> list[rows.Measured]:
  """Rows in the order of the page: the most robust one first."""
  return sorted(found, key=lambda row: -rows.at_radius(row, RADII[0]).mean())


def page(text: str, listed: Sequence[rows.Measured]) -> str:
  """The text of a page with the table of entries between its two marks.

  Raises:
    ValueError: if the page has no such marks.
  """
  return document.between_marks(text, 'leaderboard', _table(listed))


def draw(path: Path, listed: Sequence[rows.Measured]) -> None:
  """Draws the figure: robust against clean accuracy, a panel for each radius."""
  marked = list(zip(_marks(listed), listed, strict=True))
  panels = [(f'radius {radius:g}', [_point(*each, radius) for each in marked]) for radius in RADII]
  with atomic_files.replacing(path) as file:
    leaderboard_plot.save(file, panels)


def _table(listed: Sequence[rows.Measured]) -> str:
  header = ('', 'encoder', 'labels', 'clean', *(f'at {radius:g}' for radius in RADII))
  certified = (f'certified at {radius:g}' for radius in RADII)
  cells = (_cells(mark, row) for mark, row in zip(_marks(listed), listed, strict=True))
  return markdown_table((*header, *certified, 'seeds', 'images', 'checks'), cells)


def _marks(listed: Sequence[rows.Measured]) -> Iterator[str]:
  """The place of each entry, or a letter for classifiers, which do not compete."""
  places, letters = itertools.count(1), itertools.count(ord('a'))
  for row in listed:
    yield chr(next(letters)) if _has_labels(row) else str(next(places))


def _has_labels(row: rows.Measured) -> bool:
  return row['objective'] == rows.LABELS


def _cells(place: str, row: rows.Measured) -> Iterator[str]:
  yield place
  yield f'[{row["title"]}]({row["link"]})' if 'link' in row else row['title']
  yield 'yes' if _has_labels(row) else 'no'
  for radius in (0.0, *RADII):
    yield document.over_seeds(rows.at_radius(row, radius))
  for radius in RADII:
    values = rows.certified_at(row, radius)
    yield '' if values is None else document.over_seeds(values)
  yield str(len(row['seeds']))
  yield f'{min(seed["num_examples"] for seed in row["seeds"]):,}'
  yield document.checks_of(row)


def _point(mark: str, row: rows.Measured, radius: float) -> leaderboard_plot.Point:
  certified = rows.certified_at(row, radius)
  return leaderboard_plot.Point(
    mark,
    row['title'],
    clean=float(rows.at_radius(row, 0.0).mean()),
    robust=float(rows.at_radius(row, radius).mean()),
    certified=None if certified is None else float(certified.mean()),
    labels=_has_labels(row),
  )
