"""The summary of the slow tests: what passed is not repeated, what failed is not forgotten."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.tools import journal, soak

TESTS = """
import pathlib
from hypothesis import given, settings, strategies as st

def test_killed(record_property):
  record_property('kills', 3)

@settings(max_examples=7, derandomize=True)
@given(st.integers())
def test_any_integer(number):
  assert number == number

def test_only_the_second_time():
  marker = pathlib.Path(__file__).with_name('marker')
  was_there = marker.exists()
  marker.touch()
  assert was_there
"""


def run(folder: Path) -> int:
  environment = os.environ | {soak.RECORD: str(folder / 'round1.jsonl')}
  command = [sys.executable, '-m', 'pytest', *soak.OPTIONS, '--rootdir', str(folder), str(folder)]
  done = subprocess.run(command, cwd=soak.ROOT, env=environment, capture_output=True, text=True)
  return done.returncode


@pytest.mark.long
def test_the_record_counts_and_goes_on(tmp_path):
  (tmp_path / 'test_faults.py').write_text(TESTS)
  record = tmp_path / 'round1.jsonl'
  assert run(tmp_path) == 1
  with record.open('a') as file:
    file.write('\n{"test": "cut')  # as a kill leaves it
  assert run(tmp_path) == 0
  assert run(tmp_path) == pytest.ExitCode.NO_TESTS_COLLECTED
  (failed,) = (entry for entry in journal.read(record) if entry['outcome'] == 'failed')
  assert 'assert was_there' in failed['why']
  names = [entry['test'].split('::')[1] for entry in journal.read(record)]
  assert names == [
    *('test_killed', 'test_any_integer', 'test_only_the_second_time'),
    'test_only_the_second_time',
  ]
  assert [entry['outcome'] for entry in soak.last_words(record)] == ['passed'] * 3
  header, row = soak.table([('round1', list(journal.read(record)))]).splitlines()
  cells = dict(zip(header.split(' | '), row.split(' | '), strict=True))
  del cells['minutes |']
  assert cells == {
    '| round': '| round1',
    'passed': '3',
    'skipped': '0',
    'failed': '1',
    'kills': '3',
    'faults': '3',  # the tests of such a file but those with kills
    'inputs': '7',
  }
