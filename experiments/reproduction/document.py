"""RESULTS.md: the sections of the manifest, with tables, figures and verdicts of measured rows."""

from __future__ import annotations

import dataclasses
import functools
import re
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments import recording
from experiments.cli.messages import markdown_table
from experiments.reproduction import claims, plan, rows
from experiments.reproduction.manifest import Claim, Figure, Manifest, Panel, Section
from experiments.visual import ablations, plots
from se_vae.storage import atomic_files, json_files

FIGURES = 'figures'

_HELD_OUT = {'elbo': 'ELBO', 'active_latents': 'active latents'}
_OLDER = '†'
RADII = (0.0, 0.1, 0.2)  # of a figure that names none
_WIDTH = 100


@dataclasses.dataclass(frozen=True)
class Document:
  """The page of results and its figures.

  Attributes:
    manifest: the manifest.
    results: the directory of the measured rows.
  """

  manifest: Manifest
  results: Path

  @functools.cached_property
  def measured(self) -> dict[str, rows.Measured]:
    """The rows of the manifest that were measured, by name.

    Raises:
      JsonError: if a file is damaged.
    """
    found = {name: rows.read(self.results, name) for name in self.manifest.rows}
    return {name: self._titled(row) for name, row in found.items() if row is not None}

  def _titled(self, row: rows.Measured) -> rows.Measured:
    """The row with the title of now, and a mark if code or commands of now give other numbers."""
    entry = self.manifest.rows[row['name']]
    is_current = self._is_of_now(row) and rows.seeds_of(row) == entry['seeds']
    titled: Any = {**row, 'title': f'{entry["title"]}{"" if is_current else _OLDER}'}
    return titled

  def _is_of_now(self, row: rows.Measured) -> bool:
    """Whether the code and the commands of now give the numbers of a row, whatever its seeds."""
    planned = plan.Plan(self.manifest, Path('.')).shown()
    commands = planned.commands(row['name'], rows.seeds_of(row)[0])
    return row['revision'] >= self.manifest.content['revision'] and row['commands'] == commands

  def in_part(self, name: str) -> rows.Measured | None:
    """The row if its file has some seeds of the manifest, and lacks others; else None."""
    try:
      row = rows.read(self.results, name)
    except json_files.JsonError:  # all is built anew
      return None
    if row is None or not self._is_of_now(row):
      return None
    return row if set(rows.seeds_of(row)) < set(self.manifest.rows[name]['seeds']) else None

  def text(self) -> str:
    """The whole page, in Markdown. Sections of which nothing is measured are left out."""
    sections = [
      self._section(section)
      for section in self.manifest.content['sections']
      if 'claims' in section or any(name in self.measured for name in section.get('rows', ()))
    ]
    head = f'# Results\n\n{_paragraphs(self.manifest.content["introduction"])}'
    return '\n\n'.join([head, *sections, *self._missing()]) + '\n'

  def summary(self) -> str:
    """The table of the README: the rows in `summary`, at the radii that all of them have."""
    shown = [self.measured[name] for name in self.manifest.content['summary']]
    radii = sorted(set.intersection(*(set(row['radii']) for row in shown)))
    header = ('', *(f'{radius:g}' for radius in radii), 'seeds', 'images', 'sanity checks')
    cells = (
      (
        row['title'],
        *(over_seeds(rows.at_radius(row, radius)) for radius in radii),
        str(len(row['seeds'])),
        f'{min(seed["num_examples"] for seed in row["seeds"]):,}',
        checks_of(row),
      )
      for row in shown
    )
    return markdown_table(header, cells)

  def draw(self) -> list[Path]:
    """Draws the figures that have a panel whose rows were all measured, and returns their paths."""
    sections = self.manifest.content['sections']
    figures = [section['figure'] for section in sections if 'figure' in section]
    measured = [(figure, self._measured_panels(figure)) for figure in figures]
    return [self._draw(figure, panels) for figure, panels in measured if panels]

  def _section(self, section: Section) -> str:
    parts = [f'## {section["title"]}', _paragraphs(section['text'])]
    if 'figure' in section and self._measured_panels(section['figure']):
      place = f'{self.results.name}/{FIGURES}/{section["figure"]["file"]}'
      parts.append(f'![{section["title"]}]({place})')
    shown = [self.measured[name] for name in section.get('rows', ()) if name in self.measured]
    if shown:
      parts += [self._table(shown, section.get('radii')), *self._notes(shown)]
    if 'claims' in section:
      parts.append(self._claims(section['claims']))
    return '\n\n'.join(part for part in parts if part)

  def _table(self, shown: Sequence[rows.Measured], radii: Sequence[float] | None) -> str:
    if radii is None:
      radii = sorted({radius for row in shown for radius in row['radii']})
    shown_radii = (f'{radius:g}' for radius in radii)
    header = ('', 'seeds', *shown_radii, *_HELD_OUT.values(), 'checks', 'row')
    return markdown_table(header, (self._cells(row, radii) for row in shown))

  def _cells(self, row: rows.Measured, radii: Sequence[float]) -> Iterator[str]:
    yield row['title']
    yield str(len(row['seeds']))
    for radius in radii:
      try:
        yield over_seeds(rows.at_radius(row, radius))
      except KeyError:
        yield ''
    held_out = [recording.meaningful(row['objective'], seed['held_out']) for seed in row['seeds']]
    for key in _HELD_OUT:
      mean = np.mean([figures.get(key, np.nan) for figures in held_out])
      yield '' if np.isnan(mean) else f'{mean:.0f}'
    yield checks_of(row)
    yield f'`{row["name"]}`'

  def _notes(self, shown: Sequence[rows.Measured]) -> Iterator[str]:
    """What stands below a table: the attack, the certified accuracies, and every failed check."""
    kinds: dict[tuple[str, int], list[str]] = {}
    for row in shown:
      count = min(seed['num_examples'] for seed in row['seeds'])
      kinds.setdefault((row['attack'], count), []).append(row['name'])
    texts = [
      f'{_ATTACKS[attack]}, {count:,} test images'
      + ('' if len(kinds) == 1 else f': {", ".join(f"`{name}`" for name in names)}')
      for (attack, count), names in kinds.items()
    ]
    yield _filled(f'{". ".join(texts)}.')
    lines = [line for row in shown for line in certified_of(row)]
    lines += [line for row in shown for line in failures_of(row)]
    if any(map(is_older, shown)):
      lines.append(f'{_OLDER} Measured by older code, or with other settings than those of now.')
    yield '\n'.join(_filled(f'- {line}', '  ') for line in lines)

  def _claims(self, listed: Sequence[Claim]) -> str:
    def cells() -> Iterator[Sequence[str]]:
      for each in listed:
        comparisons = [claims.parse(text) for text in each['holds_if']]
        found, lines = claims.verdict(comparisons, self.measured.get)
        numbers = '<br>'.join([*lines, *([each['note']] if 'note' in each else [])])
        yield each['claim'], f'**{found}**', numbers

    return markdown_table(('claim', 'here', 'numbers, seed by seed'), cells())

  def _missing(self) -> Iterator[str]:
    names = [name for name in self.manifest.rows if name not in self.measured]
    if names:
      yield '## Not measured yet'
      yield 'The cost is that of a row built alone. Rows that share encoders cost less together.'
      cells = (
        (
          self.manifest.rows[name]['title'],
          f'{self.manifest.minutes([name]):.0f}',
          f'`make results ROWS={name}`',
        )
        for name in names
      )
      yield markdown_table(('', 'core-minutes', 'command'), cells)

  def _measured_panels(self, figure: Figure) -> list[Panel]:
    """The panels whose rows were all measured, at the radii of the figure."""
    radii = figure.get('radii', RADII) if 'at' in figure['panels'][0] else ()

    def is_measured(name: str) -> bool:
      return name in self.measured and rows.has_radii(self.measured[name], radii)

    return [panel for panel in figure['panels'] if all(map(is_measured, panel['rows']))]

  def _draw(self, figure: Figure, panels: Sequence[Panel]) -> Path:
    path = self.results / FIGURES / figure['file']
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic_files.replacing(path) as file:
      if 'at' in panels[0]:
        ablations.save(file, list(map(self._ablation, panels)), figure.get('radii', RADII))
      else:
        plots.save(file, [(panel['title'], self._curves(panel)) for panel in panels])
    return path

  def _curves(self, panel: Panel) -> list[plots.Curve]:
    labels = panel.get('labels') or [''] * len(panel['rows'])
    shown = [self.measured[name] for name in panel['rows']]
    return [
      plots.Curve(row['objective'], [dict(seed) for seed in row['seeds']], f'{label}{_mark(row)}')
      for row, label in zip(shown, labels, strict=True)
    ]

  def _ablation(self, panel: Panel) -> ablations.Panel:
    shown = [self.measured[name] for name in panel['rows']]
    summary = plots.checks_summary(*(dict(seed) for row in shown for seed in row['seeds']))
    return ablations.Panel(
      panel['title'],
      panel.get('axis', ''),
      panel['at'],
      [functools.partial(rows.at_radius, row) for row in shown],
      summary,
      panel.get('scale', 'linear'),
    )


def is_older(row: rows.Measured) -> bool:
  """Whether a row of `Document.measured` is marked."""
  return row['title'].endswith(_OLDER)


def _mark(row: rows.Measured) -> str:
  return _OLDER if is_older(row) else ''


_ATTACKS = {
  'standard': 'PGD',
  'worst_case': "The worst case: each image's minimum over a suite of attacks",
}


def between_marks(text: str, name: str, content: str) -> str:
  """Returns a page with other content between `<!-- name -->` and `<!-- end of name -->`.

  Raises:
    ValueError: if the page has no such comments.
  """
  begin, end = f'<!-- {name} -->', f'<!-- end of {name} -->'
  pattern = re.compile(f'{begin}.*?{end}', re.DOTALL)
  if not pattern.search(text):
    raise ValueError(f'the page has no {begin} and {end}')
  return pattern.sub(lambda _: f'{begin}\n\n{content}\n\n{end}', text)


def over_seeds(values: np.ndarray) -> str:
  """The mean of accuracies, with half their range if there are several.

  Example:
    >>> over_seeds(np.array([0.7, 0.72]))
    '.710 ± .010'
  """
  texts = [f'{values.mean():.3f}']
  if len(values) > 1:
    texts.append(f'{(values.max() - values.min()) / 2.0:.3f}')
  return ' ± '.join(text.removeprefix('0') for text in texts)


def checks_of(row: rows.Measured) -> str:
  """How many sanity checks of all seeds passed or were skipped, and which failed."""
  checks = [check for seed in row['seeds'] for check in seed['checks']]
  if not checks:
    return 'not run'
  passed = sum(check.get('verdict') == 'pass' for check in checks)
  failed = sorted({check['number'] for check in checks if check.get('verdict') == 'fail'})
  skipped = sum(check.get('verdict') == 'skipped' for check in checks)
  parts = [f'{passed} passed']
  parts += [f'{skipped} skipped'] if skipped else []
  parts += [f'failed: {", ".join(map(str, failed))}'] if failed else []
  return ', '.join(parts)


def failures_of(row: rows.Measured) -> Iterator[str]:
  """A line for each check that failed."""
  for seed in row['seeds']:
    for check in seed['checks']:
      if check.get('verdict') == 'fail':
        yield (
          f'`{row["name"]}`, seed {seed["seed"]}: check {check["number"]} ({check["name"]}) '
          f'fails: {check["figure"]}'
        )


def certified_of(row: rows.Measured) -> Iterator[str]:
  """The certified accuracies of a row, if every seed has them."""
  found: list[Any] = [seed.get('certified') for seed in row['seeds']]
  if None not in found:
    values = np.array([each['accuracy'] for each in found])
    texts = (
      f'{over_seeds(column)} at {radius:g}'
      for radius, column in zip(found[0]['radii'], values.T, strict=True)
    )
    yield f'`{row["name"]}` certified ({found[0]["method"]}): {", ".join(texts)}'


def _paragraphs(text: str) -> str:
  """Text with its paragraphs filled; lists, tables and code stay as they are."""
  parts = text.strip().split('\n\n')
  return '\n\n'.join(part if part[:1] in '-|`!<' else _filled(part) for part in parts)


def _filled(text: str, indent: str = '') -> str:
  return textwrap.fill(
    text, _WIDTH, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False
  )
