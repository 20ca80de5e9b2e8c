"""Changes the mathematics in one place at a time and lists every change that no test notices.

    pip install cosmic-ray==8.7.0
    python -m tests.tools.mutants [gaussians] [objectives] [objectives/smooth.py:90-110]

cosmic-ray makes the mutants. Each runs the tests of its module in a forked process, which stops at
the first failure and begins with the tests that killed the last mutants, then the quickest.
Outcomes are written down one by one: the same command goes on after an interruption. A mutant that
survived is tried again where tests have changed, and all mutants of a file where the file has.
"""

from __future__ import annotations

import argparse
import collections
import dataclasses
import hashlib
import importlib.machinery
import itertools
import os
import re
import resource
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from tests.tools import journal

ROOT = Path(__file__).parents[2]
_TRAINING = [f'tests/training/test_{name}.py' for name in ('losses', 'step', 'certified')]
# Modules and packages, with their tests.
TESTS = {
  'gaussians.py': ['tests/test_gaussians.py'],
  'matrix_functions.py': ['tests/test_matrix_functions.py'],
  'wasserstein.py': [
    'tests/test_wasserstein.py',
    'tests/test_wasserstein_float32.py',
    'tests/test_wasserstein_properties.py',
  ],
  'objectives': ['tests/objectives'],
  'attacks': ['tests/attacks'],
  'certification': ['tests/certification'],
  'evaluation/latent_shift.py': ['tests/evaluation/test_latent_shift.py'],
  'evaluation/linear_probe.py': ['tests/evaluation/test_linear_probe.py'],
  'evaluation/randomized_smoothing.py': ['tests/evaluation/test_randomized_smoothing.py'],
  'evaluation/sanity_checks.py': ['tests/evaluation/test_sanity_checks.py'],
  'evaluation/targets.py': ['tests/evaluation/test_targets.py'],
  'evaluation/verdicts.py': ['tests/evaluation/test_verdicts.py'],
  'training/losses.py': _TRAINING,
  'training/selection.py': _TRAINING,
}
# Left out: operators that float arrays refuse (shifts, bits), `is` for `==`, twins of those here,
# and what is no operation: a bare `*` in a signature.
OPERATORS = re.compile(
  'NumberReplacer|AddNot|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceTrueWithFalse'
  '|ReplaceFalseWithTrue|RemoveDecorator|ZeroIterationForLoop|ReplaceUnaryOperator_Delete_.*'
  '|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|Pow_Mul)'
  '|ReplaceComparisonOperator_(?!Is)[A-Za-z]+_(?!Is)[A-Za-z]+|ReplaceComparisonOperator_IsNot_Is'
)
BARE_STAR = re.compile(r'(^|[(,] ?)/,')


@dataclasses.dataclass(frozen=True)
class Mutant:
  """A file of the library with one change."""

  path: Path
  operator: str
  occurrence: int
  line: int
  source: str

  @property
  def text(self) -> str:
    return self.source.splitlines()[self.line - 1].strip()


def mutants(path: Path) -> Iterator[Mutant]:
  from cosmic_ray.mutating import mutate_code
  from cosmic_ray.plugins import get_operator, operator_names

  source = path.read_text()
  for name in sorted(operator_names()):
    if OPERATORS.fullmatch(name.removeprefix('core/')):
      for occurrence in itertools.count():
        mutated = mutate_code(source, get_operator(name)(), occurrence)
        if mutated is None:
          break
        pairs = zip(source.splitlines(), mutated.splitlines(), strict=False)
        line = next(number for number, (a, b) in enumerate(pairs, 1) if a != b)
        mutant = Mutant(path, name.removeprefix('core/'), occurrence, line, mutated)
        if not BARE_STAR.search(mutant.text):
          yield mutant


class Order:
  """A pytest plugin: tests in a given order, their times, and the first failure."""

  def __init__(self, order: list[str]) -> None:
    self.rank = {name: rank for rank, name in enumerate(order)}
    self.times: dict[str, float] = {}
    self.failed = ''

  def pytest_collection_modifyitems(self, items):
    items.sort(key=lambda item: self.rank.get(item.nodeid, 0))

  def pytest_runtest_logreport(self, report):
    self.times[report.nodeid] = self.times.get(report.nodeid, 0.0) + report.duration
    if report.failed:
      self.failed = self.failed or report.nodeid

  def pytest_collectreport(self, report):
    if report.failed:
      self.failed = self.failed or report.nodeid


class Trial:
  """A forked process that runs tests on a mutant, or without one on the library as it is."""

  def __init__(
    self, tests: list[str], order: list[str], mutant: Mutant | None = None, seconds: int = 3600
  ) -> None:
    self.begin = time.monotonic()
    reader, writer = os.pipe()
    self.process = os.fork()
    if not self.process:
      os.close(reader)
      _run(tests, order, mutant, seconds, writer)
    os.close(writer)
    self._reader = reader

  def result(self, status: int) -> tuple[bool, list[str]]:
    """Whether all tests passed; the test that failed, or all, the quick ones first."""
    with os.fdopen(self._reader) as pipe:
      return status == 0, pipe.read().split('\n')


def _run(
  tests: list[str], order: list[str], mutant: Mutant | None, seconds: int, writer: int
) -> None:
  status = 1
  try:
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1), os.dup2(quiet, 2)
    import pytest

    get_code = importlib.machinery.SourceFileLoader.get_code

    def mutated(loader, name):
      if mutant is not None and Path(loader.path) == mutant.path:
        return compile(mutant.source, mutant.path, 'exec')
      return get_code(loader, name)

    importlib.machinery.SourceFileLoader.get_code = mutated
    plugin = Order(order)
    options = ('-x', '-q', '-p', 'no:cacheprovider', '-m', 'not slow')
    status = pytest.main([*options, *tests], plugins=[plugin])
    names = [plugin.failed] if status else sorted(plugin.times, key=plugin.times.__getitem__)
    os.write(writer, '\n'.join(names).encode())
  finally:
    os._exit(int(status))


def digest(paths: list[str]) -> str:
  """Of the content of files, and of the Python files below directories."""
  found = hashlib.sha256()
  for name in paths:
    path = ROOT / name
    for file in sorted(path.rglob('*.py')) if path.is_dir() else [path]:
      found.update(file.read_bytes())
  return found.hexdigest()[:16]


def chosen(arguments: list[str]) -> Iterator[tuple[Path, list[str], range | None]]:
  """Files, their tests, and the lines that were asked for."""
  for argument in arguments or TESTS:
    name, _, lines = argument.partition(':')
    first, _, last = lines.partition('-')
    wanted = range(int(first), int(last or first) + 1) if lines else None
    keys = [key for key in (name, f'{name}.py', name.split('/')[0]) if key in TESTS]
    if not keys:
      sys.exit(f'{name} is none of {", ".join(TESTS)}')
    place = ROOT / 'se_vae' / (name if keys[0] != f'{name}.py' else keys[0])
    files = sorted(place.rglob('*.py')) if place.is_dir() else [place]
    for file in files:
      if file.name != '__init__.py':
        # Examples in the docstrings of a package are tests too. pytest would load a file that it is
        # given by name in its own way, and without the change.
        examples = [f'se_vae/{keys[0]}'] if place.is_dir() else []
        yield file, [*TESTS[keys[0]], *examples], wanted


class Records:
  """Outcomes of mutants, a line each, in one file."""

  def __init__(self, path: Path) -> None:
    self.path = path
    self.found: dict[tuple, dict] = {}
    for entry in journal.read(path):
      self.found[self._key(entry)] = entry

  def _key(self, entry: dict) -> tuple:
    return tuple(entry[name] for name in ('file', 'source', 'operator', 'occurrence'))

  def known(self, entry: dict) -> dict | None:
    found = self.found.get(self._key(entry))
    if found and (found['killed_by'] or found['tests'] == entry['tests']):
      return found
    return None

  def add(self, entry: dict) -> None:
    self.found[self._key(entry)] = entry
    journal.append(self.path, entry)


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
  parser.add_argument('files', nargs='*', help=f'of {", ".join(TESTS)}; all if none is given')
  cores = len(os.sched_getaffinity(0))
  parser.add_argument('--parallel', type=int, default=cores, help='mutants at a time')
  parser.add_argument('--workdir', type=Path, default=ROOT / 'build' / 'mutants')
  arguments = parser.parse_args()
  arguments.workdir.mkdir(parents=True, exist_ok=True)
  records = Records(arguments.workdir / 'mutants.jsonl')

  # What the tests import is imported once, and what may change is forgotten before the forks. JAX
  # starts its threads later, with the first computation.
  import hypothesis.extra.numpy  # noqa: F401
  import pytest  # noqa: F401
  import scipy.optimize  # noqa: F401

  import tests.oracles  # noqa: F401

  for name in [*sys.modules]:
    if name.split('.')[0] in ('se_vae', 'tests', 'experiments'):
      del sys.modules[name]
  os.chdir(ROOT)
  with tempfile.TemporaryDirectory() as cache:
    os.environ['JAX_COMPILATION_CACHE_DIR'] = cache
    summary = [examine(*each, records, arguments.parallel) for each in chosen(arguments.files)]
  print('| File | mutants | killed | survived |\n|---|---|---|---|')
  for name, outcomes in summary:
    killed = sum(bool(entry['killed_by']) for entry in outcomes)
    print(f'| `{name}` | {len(outcomes)} | {killed} | {len(outcomes) - killed} |')


def examine(
  path: Path, tests: list[str], lines: range | None, records: Records, parallel: int
) -> tuple[str, list[dict]]:
  """Tries all mutants of a file that have not been tried; returns the outcome of each."""
  name = str(path.relative_to(ROOT))
  shared = {'file': name, 'source': digest([name]), 'tests': digest(tests)}
  outcomes, left = [], collections.deque()
  for mutant in mutants(path):
    if lines is None or mutant.line in lines:
      entry = {
        **shared,
        **{key: getattr(mutant, key) for key in ('operator', 'occurrence', 'line', 'text')},
      }
      known = records.known(entry)
      if known is None:
        left.append((mutant, entry))
      else:
        outcomes.append(known)
  seconds, order = 3600, []
  if left:
    trial = Trial(tests, [])
    passed, order = trial.result(os.waitpid(trial.process, 0)[1])
    if not passed:
      sys.exit(f'the tests of {name} fail without any mutation: {order}')
    # A mutant that takes much longer than the tests do is in a loop that it never leaves.
    seconds = 120 + 4 * int(time.monotonic() - trial.begin)
  running: dict[int, tuple[Trial, dict]] = {}
  total = len(left)
  while left or running:
    while left and len(running) < parallel:
      mutant, entry = left.popleft()
      trial = Trial(tests, order, mutant, seconds)
      running[trial.process] = trial, entry
    process, status = os.wait()
    trial, entry = running.pop(process)
    passed, names = trial.result(status)
    killer = '' if passed else names[0] or 'no end'
    if killer in order:
      order.remove(killer)
      order.insert(0, killer)
    entry |= {'killed_by': killer, 'seconds': round(time.monotonic() - trial.begin, 1)}
    records.add(entry)
    outcomes.append(entry)
    done = total - len(left) - len(running)
    if passed:
      print(f'{name}:{entry["line"]} {entry["operator"]}: {entry["text"]}', flush=True)
    if done % 20 == 0 or done == total:
      print(f'{name}: {done} of {total}', flush=True)
  return name, outcomes


if __name__ == '__main__':
  main()
