"""Prints the table of the direct dependencies and their licences that BUILD.md holds.

python -m tests.tools.licences
"""

from __future__ import annotations

import configparser
import importlib.metadata
import re
from pathlib import Path

SETUP = Path(__file__).parents[2] / 'setup.cfg'


def licence(package: str) -> str:
  """As the package states it: an SPDX expression, a classifier, or the licence's first line."""
  stated = importlib.metadata.metadata(package)
  for classifier in stated.get_all('Classifier') or ():
    if classifier.startswith('License :: ') and 'License-Expression' not in stated:
      return classifier.split(' :: ')[-1]
  return stated.get('License-Expression') or stated['License'].splitlines()[0]


def requirements(extra: str = '') -> list[str]:
  """What setup.cfg requires, or one of its extras."""
  setup = configparser.ConfigParser()
  setup.read(SETUP)
  group = setup['options.extras_require'][extra] if extra else setup['options']['install_requires']
  return [line for line in group.split('\n') if line]


def table() -> list[str]:
  """The lines of the Markdown table."""
  lines = ['| Package | Versions | Licence |', '|---|---|---|']
  for note, extra in {'': '', ' (tests)': 'test'}.items():
    for requirement in requirements(extra):
      package, versions = re.fullmatch(r'([\w.-]+(?:\[\w+\])?) ?(.*)', requirement).groups()
      name = package.split('[')[0]
      lines.append(f'| {name}{note} | {versions or "any"} | {licence(name)} |')
  return lines


if __name__ == '__main__':
  print('\n'.join(table()))
