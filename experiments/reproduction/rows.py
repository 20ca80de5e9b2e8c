"""The measured rows: JSON files with the results of all seeds of a row, and their comparison."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import numpy as np

from experiments import records
from experiments.cli import workdirs
from se_vae.evaluation.verdicts import CheckRecord
from se_vae.storage import json_files

ROWS = 'rows'
LABELS = 'supervised'  # in place of an objective: the classifier was trained with labels

_OF_SEED = ('accuracy', 'interval', 'num_examples', 'checkpoint', 'commit', 'versions', 'devices')
_LONG_DIGITS = 5  # of the numbers in a file: no accuracy of 10,000 images has more


class Seed(TypedDict):
  """The result of one seed."""

  seed: int
  radii: list[float]
  accuracy: list[float]
  interval: list[tuple[float, float]]
  num_examples: int
  checks: list[CheckRecord]
  held_out: dict[str, float]
  certified: NotRequired[records.Certified]
  checkpoint: NotRequired[str | None]
  commit: NotRequired[str | None]
  versions: dict[str, str]


class Measured(TypedDict):
  """A row as it was measured: the JSON file of the row. `data` is the digest of the data set."""

  name: str
  title: str
  revision: int
  objective: str
  task: str
  dataset: str
  data: str
  attack: str
  radii: list[float]
  commands: list[str]
  machine: str
  seeds: list[Seed]
  link: NotRequired[str]


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
  """
  _, attacked = next(iter(outcomes.values()))
  trained = attacked.get('pretraining')
  return {
    'name': name,
    'title': title,
    'revision': revision,
    'objective': LABELS if trained is None else trained['objective'],
    'task': attacked['task'],
    'dataset': (attacked['config'] if trained is None else trained)['dataset'],
    'data': attacked['data']['digest'],
    'attack': attacked['evaluation']['attack'],
    'radii': attacked['radii'],
    'commands': list(commands),
    'machine': machine(),
    'seeds': [_seed(seed, *outcome) for seed, outcome in sorted(outcomes.items())],
  }


def _seed(seed: int, encoder: dict[str, Any], attacked: dict[str, Any]) -> Seed:
  content: dict[str, Any] = {
    'seed': seed,
    'radii': attacked['radii'],
    **{key: attacked[key] for key in _OF_SEED if key in attacked},
    'checks': [
      {key: check[key] for key in ('number', 'name', 'verdict', 'figure')}
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
    return {key: _rounded(each) for key, each in value.items()}
  return [_rounded(each) for each in value] if isinstance(value, list | tuple) else value


def machine() -> str:
  """The processor, the number of its cores and the system, in a line."""
  try:
    lines = Path('/proc/cpuinfo').read_text().splitlines()
    names = [line.partition(':')[2].strip() for line in lines if line.startswith('model name')]
  except OSError:
    names = []
  processor = names[0] if names else platform.processor() or platform.machine()
  return f'{processor}, {os.cpu_count()} cores, {platform.system()}'


def write(results: Path, row: Measured) -> Path:
  """Writes the file of a row, and returns its path."""
  path = results / ROWS / f'{row["name"]}.json'
  path.parent.mkdir(parents=True, exist_ok=True)
  workdirs.write_json(path, row)
  return path


def read(results: Path, name: str) -> Measured | None:
  """Returns a row that was measured; None if it was not.

  Raises:
    JsonError: if the file is damaged.
  """
  path = results / ROWS / f'{name}.json'
  return json_files.read(path, Measured) if path.exists() else None


def accuracy(row: Measured) -> np.ndarray:
  """The accuracies `[seeds, R]`."""
  return np.array([seed['accuracy'] for seed in row['seeds']])


def at_radius(row: Measured, radius: float) -> np.ndarray:
  """The accuracies `[seeds]` at a radius.

  Raises:
    KeyError: if the row was not attacked at this radius.
  """
  for index, own in enumerate(row['radii']):
    if np.isclose(own, radius):
      return accuracy(row)[:, index]
  raise KeyError(f'row {row["name"]} has no radius {radius:g}')


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


def certified_at(row: Measured, radius: float) -> np.ndarray | None:
  """The certified accuracies `[seeds]` at a radius; None unless every seed has it."""
  values = []
  for seed in row['seeds']:
    certified = seed.get('certified')
    if certified is None or not (near := np.isclose(certified['radii'], radius)).any():
      return None
    values.append(certified['accuracy'][int(near.argmax())])
  return np.array(values)
