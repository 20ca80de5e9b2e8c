"""Runs the slow tests and the fuzzing, round after round, and sums up what was survived.

  python -m tests.tools.soak --rounds=3

Each round has other random inputs and other moments of kills, and uses all cores. Every test that
ends is written down at once, so the same command goes on after an interruption: of the same commit,
it repeats only what did not pass. It ends with a table and, if anything failed, with exit code 1.
"""

from __future__ import annotations

import argparse
import collections
import functools
import os
import subprocess
import sys
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest

from tests.tools import journal

ROOT = Path(__file__).parents[2]
RECORD = 'SE_VAE_SOAK_RECORD'  # the variable with the path of a round's record
COUNTS = ('kills', 'faults', 'inputs')  # what a test survived, as it tells with record_property,
# and each test of these files is one fault more.
FAULTS = ('test_faults.py', 'test_planted_faults.py', 'test_processes.py', 'test_hosts.py')
# The tests of a round: arguments of pytest, one run of it for each.
PARTS = (
  ('-m', 'slow', 'tests'),
  ('-m', 'not slow', 'tests/experiments/test_faults.py'),
  (
    *('-m', 'not slow', '--dist=worksteal'),  # one file takes longer than the two others
    'tests/experiments/test_fuzz.py',
    'tests/experiments/test_fuzz_sources.py',
    'tests/test_fuzz_arrays.py',
  ),
)
# A test that takes longer than an hour hangs.
OPTIONS = (
  '-q',
  '-p',
  'no:cacheprovider',
  '-p',
  'tests.tools.soak',
  '-o',
  'faulthandler_timeout=3600',
  *('--numprocesses=auto', '--dist=loadfile', '--max-worker-restart=0'),
)


class Recorder:
  """A pytest plugin: appends every test that ends to a record, and leaves out what did not fail.

  pytest-xdist's workers leave tests out and count inputs, and the process that hears of them all
  writes.
  """

  def __init__(self, record: Path, is_worker: bool) -> None:
    self.record, self.is_worker = record, is_worker
    self.ended = {entry['test'] for entry in last_words(record) if entry['outcome'] != 'failed'}
    self.reports: dict[str, list[pytest.TestReport]] = collections.defaultdict(list)

  def pytest_collection_modifyitems(self, config: pytest.Config, items: list[pytest.Item]) -> None:
    config.hook.pytest_deselected(items=[item for item in items if item.nodeid in self.ended])
    items[:] = [item for item in items if item.nodeid not in self.ended]

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_call(self, item: pytest.Item) -> None:
    """Counts the inputs of a test of Hypothesis."""
    test = getattr(getattr(item, 'obj', None), 'hypothesis', None)
    if test is not None:
      test.inner_test = _counted(test.inner_test, item)

  def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
    reports = self.reports[report.nodeid]
    reports.append(report)
    if report.when != 'teardown' or self.is_worker:
      return
    outcomes = {each.outcome for each in reports}
    counts: dict[str, int] = collections.Counter()
    for name, value in report.user_properties:
      counts[name] += value  # type: ignore[operator]
    counts['faults'] += report.nodeid.split('::')[0].endswith(FAULTS) and not counts['kills']
    entry = {
      'test': report.nodeid,
      'outcome': next(each for each in ('failed', 'skipped', 'passed') if each in outcomes),
      'seconds': round(sum(each.duration for each in reports), 1),
      **{name: counts[name] for name in COUNTS},
    }
    if entry['outcome'] == 'failed':  # pytest tells why only at the end of the part
      entry['why'] = '\n'.join(each.longreprtext for each in reports if each.failed)[-2000:]
    journal.append(self.record, entry)


def _counted(test: Any, item: pytest.Item) -> Any:
  inputs = 0

  @functools.wraps(test)
  def wrapped(*args: Any, **kwargs: Any) -> Any:
    nonlocal inputs
    inputs += 1
    item.user_properties[:] = [('inputs', inputs)]
    return test(*args, **kwargs)

  return wrapped


def pytest_configure(config: pytest.Config) -> None:
  config.pluginmanager.register(
    Recorder(Path(os.environ[RECORD]), is_worker=hasattr(config, 'workerinput'))
  )


def last_words(record: Path) -> list[dict[str, Any]]:
  """The last entry of each test."""
  return list({entry['test']: entry for entry in journal.read(record)}.values())


def commit() -> str:
  command = ['git', 'describe', '--always', '--dirty', '--abbrev=12', '--exclude=*']
  return subprocess.run(
    command, cwd=ROOT, check=True, capture_output=True, text=True
  ).stdout.strip()


def table(rounds: Iterable[tuple[str, list[dict[str, Any]]]]) -> str:
  """One line for each round. A test that failed counts as that, also if it passed later."""
  names = ('round', 'passed', 'skipped', 'failed', *COUNTS, 'minutes')
  lines = [' | '.join(names)]
  for name, entries in rounds:
    outcomes = collections.Counter(entry['outcome'] for entry in entries)
    cells = [name, *(f'{outcomes[key]:,}' for key in ('passed', 'skipped', 'failed'))]
    cells += [f'{sum(entry[key] for entry in entries):,}' for key in COUNTS]
    cells.append(f'{sum(entry["seconds"] for entry in entries) / 60:.1f}')
    lines.append(' | '.join(cells))
  return '\n'.join(f'| {line} |' for line in lines)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('--rounds', type=int, default=1)
  parser.add_argument('--inputs', type=int, default=10_000, help='fuzzed inputs of each kind')
  parser.add_argument('--workdir', type=Path, default=ROOT / 'build' / 'soak')
  arguments = parser.parse_args()
  workdir = arguments.workdir / commit()
  workdir.mkdir(parents=True, exist_ok=True)
  records = [workdir / f'round{number}.jsonl' for number in range(1, arguments.rounds + 1)]
  codes = []
  for number, record in enumerate(records):
    environment = {
      **os.environ,
      RECORD: str(record),
      'SE_VAE_FUZZ': str(arguments.inputs),
      'SE_VAE_FUZZ_SEED': str(number),
    }
    for part in PARTS:
      begin = time.monotonic()
      print(f'{record.stem}: pytest {" ".join(part)}', flush=True)
      command = [sys.executable, '-m', 'pytest', *OPTIONS, *part]
      codes.append(subprocess.run(command, cwd=ROOT, env=environment).returncode)
      print(f'{record.stem}: {time.monotonic() - begin:.0f} s', flush=True)
  for record in records:
    for entry in journal.read(record):
      if entry['outcome'] != 'passed':
        print(f'{record.stem}: {entry["outcome"]}: {entry["test"]}')
  print(table((record.stem, list(journal.read(record))) for record in records))
  no_tests = pytest.ExitCode.NO_TESTS_COLLECTED  # all of them have passed before
  if any(code not in (0, no_tests) for code in codes):
    sys.exit(1)


if __name__ == '__main__':
  main()
