"""The manifest of results: every encoder, every row, and the page that shows them.

`results/manifest.yaml` is all that is needed to build the results anew. An *encoder* is a run of
`experiments.pretrain`, or a chain of them: `init_from` names the encoder that it starts with. A
*row* is the attack on a probe of an encoder, or a classifier of `experiments.supervised`, for one
or several seeds. A *section* is a part of the page RESULTS.md, and a *claim* a statement about rows
that is judged seed by seed.
"""

from __future__ import annotations

import dataclasses
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal, NotRequired, TypedDict

from etils import epy

from se_vae.config import ArgumentError
from se_vae.storage import json_files

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import yaml

MANIFEST = 'manifest.yaml'

_RESERVED = ('rows', 'data', 'compiled')  # folders beside those of the encoders
_SET_BY_THE_PLAN = (
  'seed',
  'workdir',
  'output',
  'data_dir',
  'cache_dir',
  'init_from',
  'surrogate',
  'pretrained',
  'probe',
)


class Encoder(TypedDict):
  """A run of pretrain: its flags but directories and seed, and the core-minutes that it takes."""

  flags: str
  init_from: NotRequired[str]
  minutes: float


class Row(TypedDict):
  """What is attacked, and what came out.

  `expected` has the mean over the seeds of the accuracy at some radii, and `tolerance` how far
  another machine's mean may lie from it. `minutes` are core-minutes of one seed, without those of
  the encoder.
  """

  title: str
  encoder: NotRequired[str]
  supervised: NotRequired[str]
  probe: str
  surrogate: NotRequired[str]
  seeds: list[int]
  minutes: float
  expected: NotRequired[dict[str, float]]
  tolerance: float
  leaderboard: NotRequired[bool]


class Panel(TypedDict):
  """A panel of a figure: curves of rows, or accuracies of rows against the numbers `at`."""

  title: str
  rows: list[str]
  labels: NotRequired[list[str]]
  at: NotRequired[list[float]]
  axis: NotRequired[str]
  scale: NotRequired[Literal['linear', 'log']]


class Figure(TypedDict):
  """A picture of a section; `radii` are those of panels with `at`."""

  file: str
  panels: list[Panel]
  radii: NotRequired[list[float]]


class Claim(TypedDict):
  """A statement of the paper, and the comparisons that decide on it.

  A comparison 'a > b at 0.1' holds for a seed if the accuracy of row a exceeds that of row b at
  this radius; 'a > 0.98 at 0' compares with a number.
  """

  claim: str
  holds_if: list[str]
  note: NotRequired[str]


class Section(TypedDict):
  """A part of the page."""

  title: str
  text: str
  rows: NotRequired[list[str]]
  radii: NotRequired[list[float]]
  figure: NotRequired[Figure]
  claims: NotRequired[list[Claim]]


class Content(TypedDict):
  """The file as a whole.

  `revision` is that of the arithmetic (see `experiments.results`), and `summary` has the rows of
  the table in README.md.
  """

  revision: int
  introduction: str
  encoders: dict[str, Encoder]
  rows: dict[str, Row]
  sections: list[Section]
  summary: NotRequired[list[str]]


@dataclasses.dataclass(frozen=True)
class Manifest:
  """The manifest.

  Attributes:
    content: what the file holds.
  """

  content: Content

  @property
  def encoders(self) -> Mapping[str, Encoder]:
    """The encoders by name."""
    return self.content['encoders']

  @property
  def rows(self) -> Mapping[str, Row]:
    """The rows by name, in the order in which they are built."""
    return self.content['rows']

  def chain(self, encoder: str) -> list[str]:
    """The encoders that are trained for one, the first first and itself last."""
    before = self.encoders[encoder].get('init_from')
    return [*(self.chain(before) if before else ()), encoder]

  def encoders_of(self, row: str) -> list[str]:
    """All encoders that a row needs, each after the one that it starts with."""
    named = (self.rows[row].get(name) for name in ('encoder', 'surrogate'))
    return list(dict.fromkeys(each for name in named if name for each in self.chain(str(name))))

  def with_seeds(self, seeds: Mapping[str, list[int]]) -> Manifest:
    """The manifest with other seeds for some rows, by name."""
    changed = {name: {**self.rows[name], 'seeds': own} for name, own in seeds.items()}
    content: Any = {**self.content, 'rows': {**self.rows, **changed}}
    return Manifest(content)

  def minutes(self, rows: Iterator[str] | list[str]) -> float:
    """Core-minutes of building rows from nothing, with all seeds."""
    rows = list(rows)
    attacks = sum(self.rows[row]['minutes'] * len(self.rows[row]['seeds']) for row in rows)
    runs = {
      (name, seed)
      for row in rows
      for name in self.encoders_of(row)
      for seed in self.rows[row]['seeds']
    }
    return attacks + sum(self.encoders[name]['minutes'] for name, _ in runs)


def load(path: Path) -> Manifest:
  """Reads and checks a manifest.

  Args:
    path: the file.

  Raises:
    ArgumentError: if it cannot be read, or has names that nothing has.
  """
  try:
    values = _with_text_keys(yaml.load(path.read_text(), _loader()))
    content = json_files.check(values, Content)
  except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
    raise ArgumentError('results', f'{path}: {" ".join(str(error).split())}') from None
  manifest = Manifest(content)
  for fault in _faults(manifest):
    raise ArgumentError('results', f'{path}: {" ".join(fault.split())}')
  return manifest


def _faults(manifest: Manifest) -> Iterator[str]:
  """What is wrong with a manifest, a line each."""
  yield from _unknown_keys(manifest.content)
  for name in (*manifest.encoders, *manifest.rows):
    if not re.fullmatch(r'[A-Za-z_][\w.]*', name, re.ASCII) or name in _RESERVED:
      reserved = ', '.join(_RESERVED)
      yield (
        f'{name!r} is not a valid name: use a letter, then letters, digits, _ or .; {reserved} are '
        'reserved'
      )
  for name, encoder in manifest.encoders.items():
    yield from _own_flags(f'encoder {name}', encoder['flags'])
    before, seen = encoder.get('init_from'), {name}
    while before is not None:
      if before in seen:
        yield f'encoder {name} starts with itself'
        return
      if before not in manifest.encoders:
        yield f'encoder {name} starts with {before}, which is no encoder'
        return
      seen.add(before)
      before = manifest.encoders[before].get('init_from')
  for name, row in manifest.rows.items():
    yield from _faults_of_row(manifest, name, row)
  for section in manifest.content['sections']:
    yield from _faults_of_section(manifest, section)
  for name in manifest.content.get('summary', ()):
    if name not in manifest.rows:
      yield f'summary: {name} is no row'


def _faults_of_row(manifest: Manifest, name: str, row: Row) -> Iterator[str]:
  if ('encoder' in row) == ('supervised' in row):
    yield f'row {name} needs an encoder or supervised, and not both'
  if 'supervised' in row and 'surrogate' in row:
    yield f'row {name}: a classifier has no surrogate'
  for key in ('encoder', 'surrogate'):
    if key in row and row.get(key) not in manifest.encoders:
      yield f'row {name}: {row.get(key)} is no encoder'
  if len(set(row['seeds'])) != len(row['seeds']) or not row['seeds']:
    yield f'row {name} needs seeds, each once'
  if not 0.0 < row['tolerance'] <= 1.0:
    yield f'row {name}: the tolerance must be in (0, 1]'
  for radius, value in row.get('expected', {}).items():
    if not re.fullmatch(r'\d+(\.\d+)?', radius) or not 0.0 <= value <= 1.0:
      yield f'row {name}: expected has a radius and an accuracy, not {radius}: {value}'
  for key in ('probe', 'supervised'):
    yield from _own_flags(f'row {name}', str(row.get(key, '')))


def _faults_of_section(manifest: Manifest, section: Section) -> Iterator[str]:
  panels = section['figure']['panels'] if 'figure' in section else []
  named = [*section.get('rows', ()), *(row for panel in panels for row in panel['rows'])]
  for row in named:
    if row not in manifest.rows:
      yield f'section {section["title"]}: {row} is no row'
  if 'figure' in section and not panels:
    yield f'section {section["title"]}: a figure needs panels'
  if len({'at' in panel for panel in panels}) > 1:
    yield f'section {section["title"]}: all panels of a figure have `at`, or none has'
  if 'figure' in section and not re.fullmatch(r'[\w-]+\.png', section['figure']['file'], re.ASCII):
    yield f'section {section["title"]}: {section["figure"]["file"]} is no name of a PNG file'
  for panel in panels:
    for key in ('labels', 'at'):
      if key in panel and len(panel[key]) != len(panel['rows']):
        yield f'section {section["title"]}: {key} must have one value for each row'
  for claim in section.get('claims', ()):
    if not claim['holds_if']:
      yield f'claim {claim["claim"]!r} needs comparisons'


def _own_flags(owner: str, text: str) -> Iterator[str]:
  """Faults for flags that the plan sets itself: seeds and places."""
  try:
    given = shlex.split(text)
  except ValueError as error:  # a quotation mark without its partner
    yield f'{owner}: {error}'
    return
  for flag in given:
    name = flag.partition('=')[0].lstrip('-')
    if flag.startswith('-') and name in _SET_BY_THE_PLAN:
      yield f'{owner}: --{name} is set automatically; remove it'


def _unknown_keys(content: Content) -> Iterator[str]:
  """Faults for keys that nothing reads, such as misspelt ones."""
  sections = content['sections']
  figures = [section['figure'] for section in sections if 'figure' in section]
  every: list[tuple[type, list[Any]]] = [
    (Content, [content]),
    (Encoder, list(content['encoders'].values())),
    (Row, list(content['rows'].values())),
    (Section, sections),
    (Figure, figures),
    (Panel, [panel for figure in figures for panel in figure['panels']]),
    (Claim, [claim for section in sections for claim in section.get('claims', ())]),
  ]
  for kind, items in every:
    for item in items:
      for key in item.keys() - kind.__annotations__.keys():
        yield f'{key} is no key of a {kind.__name__.lower()}'


def _with_text_keys(values: Any) -> Any:
  """The same values with text for every key: YAML reads the radius in `0.1: 0.7` as a number."""
  if isinstance(values, dict):
    return {str(key): _with_text_keys(value) for key, value in values.items()}
  return [_with_text_keys(value) for value in values] if isinstance(values, list) else values


def _loader() -> type[yaml.SafeLoader]:
  """A loader that refuses a key that stands twice, of which YAML would take the last."""

  class Loader(yaml.SafeLoader):
    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
      keys = [self.construct_object(key, deep=deep) for key, _ in node.value]
      for key in keys:
        if keys.count(key) > 1:
          raise yaml.YAMLError(f'{key} is there twice, in line {node.start_mark.line + 1}')
      return super().construct_mapping(node, deep)

  return Loader
