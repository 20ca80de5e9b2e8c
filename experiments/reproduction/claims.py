"""The verdict on a claim: in how many seeds comparisons between rows hold."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

from experiments.reproduction import rows
from se_vae.config import ArgumentError

_COMPARISON = re.compile(r'([\w.]+) ([<>]) ([\w.]+) at (\d+(?:\.\d+)?)(?: by (\d+(?:\.\d+)?))?')
_BySeed = dict[str | float, Mapping[int, float]]  # for each side of a comparison
_NUMBER = re.compile(r'\d*\.?\d+')


class Comparison(NamedTuple):
  """'left > right at radius by margin': the accuracies differ by more than the margin.

  Attributes:
    left: the row that is to be higher, or a number.
    right: the row that is to be lower, or a number.
    radius: of the attack.
    margin: 0 if none is given.
  """

  left: str | float
  right: str | float
  radius: float
  margin: float


def parse(text: str) -> Comparison:
  """Returns the comparison that a text describes, such as 'se > vae at 0.1 by 0.05'.

  Example:
    >>> parse('vae < se at 0.1')
    Comparison(left='se', right='vae', radius=0.1, margin=0.0)

  Raises:
    ArgumentError: if it describes none.
  """
  found = _COMPARISON.fullmatch(text)
  if found is None:
    raise ArgumentError('results', f"a comparison is 'ROW > ROW at RADIUS', got {text!r}")
  left, sign, right, radius, margin = found.groups()
  left, right = (float(side) if _NUMBER.fullmatch(side) else side for side in (left, right))
  if isinstance(left, float) and isinstance(right, float):
    raise ArgumentError('results', f'a comparison needs a row, got {text!r}')
  if sign == '<':
    left, right = right, left
  return Comparison(left, right, float(radius), float(margin or 0.0))


def verdict(
  comparisons: Sequence[Comparison], measured: Callable[[str], rows.Measured | None]
) -> tuple[str, list[str]]:
  """Returns 'yes', 'no', 'partly' or 'not measured', and a line of numbers for each comparison.

  A comparison holds if it holds in every seed that both rows have. The verdict is 'yes' if all
  hold, 'no' if none holds in any seed, and 'partly' otherwise. It is 'not measured' where a row is
  missing or was not attacked at the radius, or two rows have no seed in common.

  Args:
    comparisons: the comparisons.
    measured: gives the row of a name, or None if there is none.
  """
  counts, lines = [], []
  for left, right, radius, margin in comparisons:
    found = {name: measured(name) for name in (left, right) if isinstance(name, str)}
    compared = {name: row for name, row in found.items() if row is not None}
    if len(compared) < len(found):
      return 'not measured', []
    try:
      accuracies: _BySeed = {name: _by_seed(row, radius) for name, row in compared.items()}
    except KeyError:  # a row was measured before the manifest had this radius
      return 'not measured', []
    seeds = sorted(set.intersection(*map(set, accuracies.values())))
    numbers: _BySeed = {
      side: dict.fromkeys(seeds, side) for side in (left, right) if isinstance(side, float)
    }
    sides = accuracies | numbers
    holds = [sides[left][seed] > sides[right][seed] + margin for seed in seeds]
    counts.append((sum(holds), len(holds)))
    titles = ' / '.join(row['title'] for row in compared.values())
    values = ', '.join(
      ' / '.join(f'{of_row[seed]:.3f}' for of_row in accuracies.values()) for seed in seeds
    )
    lines.append(f'{titles} at {radius:g}: {values}')
  if not all(count for _, count in counts):
    return 'not measured', []
  if all(held == count for held, count in counts):
    return 'yes', lines
  return ('no' if not any(held for held, _ in counts) else 'partly'), lines


def _by_seed(row: rows.Measured, radius: float) -> Mapping[int, float]:
  accuracies = rows.at_radius(row, radius)
  return {seed['seed']: float(value) for seed, value in zip(row['seeds'], accuracies, strict=True)}
