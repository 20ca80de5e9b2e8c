"""Verdicts of checks: their line, and their JSON values, also those of older versions."""

from __future__ import annotations

import pytest

from se_vae.evaluation import verdicts
from se_vae.evaluation.verdicts import SanityCheck
from se_vae.storage import json_files


def check(number: int, verdict: str) -> SanityCheck:
  return SanityCheck(number, f'name {number}', verdict, 'figure', {})


@pytest.mark.parametrize(
  ('checks', 'line'),
  [
    ([], 'checks: not run'),
    ([check(1, 'pass')], 'checks: 1 passed, 0 failed, 0 skipped'),
    ([check(1, 'fail')], 'checks: 0 passed, 1 failed (1: name 1), 0 skipped'),
    (
      [check(1, 'pass'), check(2, 'skipped'), check(3, 'fail'), check(4, 'pass')],
      'checks: 2 passed, 1 failed (3: name 3), 1 skipped (2: name 2)',
    ),
    (
      [check(2, 'fail'), check(3, 'fail'), check(2, 'fail'), check(3, 'pass')],
      'checks: 1 passed, 3 failed (2: name 2, 2 times; 3: name 3), 0 skipped',
    ),
  ],
)
def test_the_line_counts_and_names(checks, line):
  assert verdicts.summary(checks) == line
  assert verdicts.summary([each.to_json() for each in checks]) == line
  assert verdicts.summary(iter(checks)) == line


@pytest.mark.parametrize(
  ('verdict', 'passed'), [('pass', True), ('fail', False), ('skipped', None)]
)
def test_json_says_passed_too(verdict, passed):
  values = {'gap': 0.5, 'counts': [0, 1, 2]}
  content = SanityCheck(3, 'a name', verdict, 'a figure', values).to_json()
  assert content['passed'] is passed and content['verdict'] == verdict
  assert (content['number'], content['name'], content['figure']) == (3, 'a name', 'a figure')
  read = SanityCheck.from_json(content)
  assert (read.number, read.name, read.verdict, read.figure) == (3, 'a name', verdict, 'a figure')
  assert read.values == values and read.to_json() == content


@pytest.mark.parametrize(('passed', 'verdict'), [(True, 'pass'), (False, 'fail')])
def test_records_without_a_verdict_are_read_by_what_passed(passed, verdict):
  content = {'number': 1, 'name': 'n', 'figure': 'f', 'passed': passed}
  assert SanityCheck.from_json(content) == SanityCheck(1, 'n', verdict, 'f', {})


@pytest.mark.parametrize('passed', [{}, {'passed': None}])
def test_a_record_with_neither_is_refused(passed):
  with pytest.raises(json_files.JsonError, match='verdict'):
    SanityCheck.from_json({'number': 1, 'name': 'n', 'figure': 'f', **passed})
