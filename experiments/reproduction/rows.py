"""The measured rows: JSON files with the results of all seeds of a row, and their comparison."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import numpy as np

from experiments import records
from experiments.cli import flags, workdirs
from experiments.probe_settings import ProbeConfig
from se_vae.config import OBJECTIVES, SUITES, ArgumentError
from se_vae.evaluation.verdicts import CheckRecord
from se_vae.storage import json_files

ROWS = 'rows'
LABELS = 'supervised'  # in place of an objective: the classifier was trained with labels

_OF_SEED = ('accuracy', 'interval', 'num_examples', 'checkpoint', 'commit', 'versions', 'devices')
_LONG_DIGITS = 5  # of the numbers in a file: no accuracy of 10,000 images has more


# The settings of the attack that say how strong it is, and of the checks.
STRENGTH = ('pgd_steps', 'num_queries', 'restarts', 'relative_step_size', 'check_examples')


class Seed(TypedDict):
  """The result of one seed."""

  seed: int
  radii: Annotated[list[float], json_files.SAME_LENGTH]
  accuracy: Annotated[list[float], json_files.SAME_LENGTH]
  interval: Annotated[list[tuple[float, float]], json_files.SAME_LENGTH]
  num_examples: int
  checks: list[CheckRecord]
  held_out: dict[str, float]
  certified: NotRequired[records.Certified]
  checkpoint: NotRequired[str | None]
  commit: NotRequired[str | None]
  versions: dict[str, str]


class Measured(TypedDict):
  """A row as it was measured: the JSON file of the row.

  `data` is the digest of the data set, `settings` has those of `STRENGTH`, and `machine` is where
  the row was put together.
  """

  name: str
  title: str
  revision: int
  objective: str
  task: str
  dataset: str
  data: str
  validation: bool
  attack: str
  radii: list[float]
  settings: dict[str, float | None]
  commands: list[str]
  machine: str
  seeds: list[Seed]
  link: NotRequired[str]


# What all seeds of a row share.
_SHARED = ('objective', 'task', 'dataset', 'data', 'validation', 'attack', 'radii', 'settings')


def measured(
  name: str,
  title: str,
  revision: int,
  commands: Sequence[str],
  outcomes: Mapping[int, tuple[dict[str, Any], dict[str, Any]]],
) -> Measured:
  """Returns the row of finished runs.

  Args:
    name: of the row.
    title: of the row.
    revision: of the manifest.
    commands: the command lines of the first seed.
    outcomes: for each seed what pretrain and probe have returned, or an empty dict and what
      supervised has.

  Raises:
    ArgumentError: if the seeds differ in more than the seed.
    JsonError: if a result has values that none can have.
  """
  every = {seed: _shared(attacked) for seed, (_, attacked) in sorted(outcomes.items())}
  first = next(iter(every.values()))
  for seed, own in every.items():
    for key in _SHARED:
      if own[key] != first[key]:
        raise ArgumentError('seeds', f'seed {seed} has {key} {own[key]}, and others {first[key]}')
  kinds = {kind for _, attacked in outcomes.values() for kind in attacked.get('devices', ())}
  accelerators = sorted(kinds - {'cpu'})
  content = {
    'name': name,
    'title': title,
    'revision': revision,
    **first,
    'commands': list(commands),
    'machine': ', '.join([machine(), *accelerators]),
    'seeds': [_seed(seed, *outcome) for seed, outcome in sorted(outcomes.items())],
  }
  row = json_files.check(content, Measured)
  _check_values(row)
  return row


def joined(before: Measured, now: Measured) -> Measured:
  """Returns a row that has the seeds of two measurements, which share none.

  Args:
    before: one measurement.
    now: the other one.

  Raises:
    ArgumentError: if they differ in more than the seeds.
  """
  old, new = dict(before), dict(now)
  for key in _SHARED:
    if old[key] != new[key]:
      raise ArgumentError(
        'rows',
        f'{now["name"]}: its new seeds have {key} {new[key]}, and those in its file {old[key]}; '
        'remove the file to measure all seeds',
      )
  machines = dict.fromkeys((before['machine'], now['machine']))
  seeds = sorted([*before['seeds'], *now['seeds']], key=lambda seed: seed['seed'])
  first = before if seeds[0] in before['seeds'] else now  # its commands are shown
  return {**first, 'machine': '; '.join(machines), 'seeds': seeds}


def _shared(attacked: dict[str, Any]) -> dict[str, Any]:
  """What the result of a seed has of `_SHARED`."""
  config, trained = attacked['config'], attacked.get('pretraining')
  if trained is None:  # a classifier, whose settings have those of its attack as text
    trained = {**config, 'objective': LABELS}
    config = flags.to_dict(flags.parse(ProbeConfig, config['probe'], '--probe'))
  return {
    'objective': trained['objective'],
    'task': attacked['task'],
    'dataset': trained['dataset'],
    'data': attacked['data']['digest'],
    'validation': trained['validation'],
    'attack': attacked['evaluation']['attack'],
    'radii': attacked['radii'],
    'settings': {key: config.get(key) for key in STRENGTH},
  }


def _seed(seed: int, encoder: dict[str, Any], attacked: dict[str, Any]) -> Seed:
  content: dict[str, Any] = {
    'seed': seed,
    'radii': attacked['radii'],
    **{key: attacked[key] for key in _OF_SEED if key in attacked},
    'checks': [
      {key: check[key] for key in ('number', 'name', 'verdict', 'figure') if key in check}
      for check in attacked['checks']
    ],
    'held_out': encoder.get('test', {}),
  }
  if 'certified' in attacked:
    content['certified'] = attacked['certified']
  return json_files.check(_rounded(content), Seed)


def _rounded(value: Any) -> Any:
  if isinstance(value, float):
    return round(value, _LONG_DIGITS)
  if isinstance(value, dict):
    # Results are looked up by radius, such as 8 / 255.
    return {key: each if key == 'radii' else _rounded(each) for key, each in value.items()}
  return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def machine(cpuinfo: Path = Path('/proc/cpuinfo')) -> str:
  """The processor, how wide its vectors are, the number of its cores and the system, in a line.

  Sums are rounded in another order where vectors have another width.
  """
  try:
    lines = cpuinfo.read_text().splitlines()
  except OSError:
    lines = []
  pairs = [line.partition(':') for line in lines]
  first_core = {name.strip(): value.strip() for name, _, value in reversed(pairs)}
  processor = first_core.get('model name') or platform.processor() or platform.machine()
  features = first_core.get('flags', '').split()
  widths = {'avx512f': ' (AVX-512)', 'avx2': ' (AVX2)'}
  width = next((text for feature, text in widths.items() if feature in features), '')
  return f'{processor}{width}, {os.cpu_count()} cores, {platform.system()}'


def write(results: Path, row: Measured, folder: str = ROWS) -> Path:
  """Writes the file of a row, and returns its path."""
  path = results / folder / f'{row["name"]}.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  workdirs.write_json(path, row)
  return path


def read(results: Path, name: str) -> Measured | None:
  """Returns a row that was measured; None if it was not.

  Raises:
    JsonError: if the file is damaged, or that of another row.
  """
  path = results / ROWS / f'{name}.json'
  return read_file(path) if path.exists() else None


def read_file(path: Path) -> Measured:
  """Returns the row in a file.

  Raises:
    OSError: if the file cannot be read.
    JsonError: if it is damaged, or that of another row.
  """
  row = json_files.read(path, Measured)
  with json_files.naming(path):
    if row['name'] != path.stem:
      raise json_files.JsonError(f'it is of the row {row["name"]}')
    _check_values(row)
  return row


def _check_values(row: Measured) -> None:
  """Raises JsonError for values of the right type that no row can have."""
  if row['objective'] not in (*OBJECTIVES, LABELS):
    raise json_files.JsonError(f'there is no objective {row["objective"]!r}')
  if row['attack'] not in SUITES:
    raise json_files.JsonError(f'there is no attack {row["attack"]!r}')
  if not row['seeds']:
    raise json_files.JsonError('it has no seeds')
  for seed in row['seeds']:
    curves = [seed, seed['certified']] if 'certified' in seed else [seed]
    for curve in curves:
      for value, (low, high) in zip(curve['accuracy'], curve['interval'], strict=True):
        if not 0.0 <= low <= value <= high <= 1.0:  # also for one that was edited alone
          raise json_files.JsonError(
            f'seed {seed["seed"]}: accuracies must be in [0, 1] and within their intervals, '
            f'got {value:g} in [{low:g}, {high:g}]'
          )


def seeds_of(row: Measured) -> list[int]:
  """The seeds for which a row was measured."""
  return [seed['seed'] for seed in row['seeds']]


def at_radius(row: Measured, radius: float) -> np.ndarray:
  """The accuracies `[seeds]` at a radius.

  Raises:
    KeyError: if a seed was not attacked at this radius.
  """
  return np.array([_at(seed['radii'], seed['accuracy'], radius) for seed in row['seeds']])


def has_radii(row: Measured, radii: Sequence[float]) -> bool:
  """Whether all seeds of a row were attacked at these radii."""
  return all(np.isclose(seed['radii'], radius).any() for seed in row['seeds'] for radius in radii)


def certified_at(row: Measured, radius: float) -> np.ndarray | None:
  """The certified accuracies `[seeds]` at a radius; None unless every seed has it."""
  try:
    found = [seed['certified'] for seed in row['seeds']]
    return np.array([_at(each['radii'], each['accuracy'], radius) for each in found])
  except KeyError:
    return None


def _at(radii: Sequence[float], values: Sequence[float], radius: float) -> float:
  """The value at a radius; raises KeyError if there is none."""
  for own, value in zip(radii, values, strict=True):
    if np.isclose(own, radius):
      return value
  raise KeyError(radius)


def differences(
  row: Measured, expected: Mapping[str, float], tolerance: float
) -> Iterator[tuple[float, float, float, bool]]:
  """For each expected number: the radius, what is expected, what came out, and whether they agree.

  Args:
    row: the measured row.
    expected: the mean accuracy at radii, which are given as text.
    tolerance: how far what came out may lie from what is expected.
  """
  for text, value in expected.items():
    found = float(at_radius(row, float(text)).mean())
    yield float(text), value, found, abs(found - value) <= tolerance
