"""Changes the mathematics in one place at a time and prints every change that no test notices.

    pip install cosmic-ray==8.7.0
    python -m tests.tools.mutants [gaussians] [wasserstein:120] [objectives:90-110]

cosmic-ray makes the mutants. Each runs the tests of its module in a forked process, which stops at
the first failure and begins with the tests that killed the last mutants, then the quickest.
"""

from __future__ import annotations

import importlib.machinery
import itertools
import os
import re
import resource
import sys
import tempfile
import time
from pathlib import Path

MODULES = ('gaussians', 'matrix_functions', 'wasserstein', 'objectives')
# Left out: operators that float arrays refuse (shifts, bits), `is` for `==`, twins of those here.
OPERATORS = re.compile(
  'NumberReplacer|AddNot|ReplaceAndWithOr|ReplaceOrWithAnd|ReplaceTrueWithFalse'
  '|ReplaceFalseWithTrue|RemoveDecorator|ZeroIterationForLoop|ReplaceUnaryOperator_Delete_.*'
  '|ReplaceBinaryOperator_(Add_Sub|Sub_Add|Mul_Div|Div_Mul|Pow_Mul)'
  '|ReplaceComparisonOperator_(?!Is)[A-Za-z]+_(?!Is)[A-Za-z]+|ReplaceComparisonOperator_IsNot_Is'
)
CPU_SECONDS = 200  # a mutant that takes longer, in a loop it never leaves, is killed too


def mutants(source: str):
  """Yields (operator, line, source) of every mutant of a module."""
  from cosmic_ray.mutating import mutate_code
  from cosmic_ray.plugins import get_operator, operator_names

  for name in sorted(operator_names()):
    if OPERATORS.fullmatch(name.removeprefix('core/')):
      for occurrence in itertools.count():
        mutant = mutate_code(source, get_operator(name)(), occurrence)
        if mutant is None:
          break
        pairs = zip(source.splitlines(), mutant.splitlines(), strict=False)
        line = next(number for number, (a, b) in enumerate(pairs, 1) if a != b)
        yield name.removeprefix('core/'), line, mutant


class Order:
  """A pytest plugin: tests in a given order, their times, and the first failure."""

  def __init__(self, order: list[str]):
    self.rank = {name: rank for rank, name in enumerate(order)}
    self.times: dict[str, float] = {}
    self.failed = ''

  def pytest_collection_modifyitems(self, items):
    items.sort(key=lambda item: self.rank.get(item.nodeid, 0))

  def pytest_runtest_logreport(self, report):
    self.times[report.nodeid] = self.times.get(report.nodeid, 0.0) + report.duration
    if report.failed:
      self.failed = self.failed or report.nodeid


def run_tests(path: Path, source: str, order: list[str]) -> tuple[bool, list[str]]:
  """Whether the tests of the module at `path` pass on `source`; the killer or all, quick first."""
  reader, writer = os.pipe()
  if not os.fork():
    status = 1
    try:
      resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
      quiet = os.open(os.devnull, os.O_WRONLY)
      os.dup2(quiet, 1), os.dup2(quiet, 2)
      import pytest

      get_code = importlib.machinery.SourceFileLoader.get_code

      def mutated(loader, name):
        code = compile(source, path, 'exec')
        return code if Path(loader.path) == path else get_code(loader, name)

      importlib.machinery.SourceFileLoader.get_code = mutated
      plugin = Order(order)
      tests = sorted(map(str, (path.parents[1] / 'tests').glob(f'test_{path.stem}*.py')))
      status = pytest.main(['-x', '-q', '-p', 'no:cacheprovider', *tests], plugins=[plugin])
      names = [plugin.failed] if status else sorted(plugin.times, key=plugin.times.get)
      os.write(writer, '\n'.join(names).encode())
    finally:
      os._exit(int(status))
  os.close(writer)
  with os.fdopen(reader) as pipe:
    names = pipe.read().split('\n')
  return os.wait()[1] == 0, names


def main():
  # What the tests import is imported once, and what may change is forgotten before the forks. JAX
  # starts its threads later, with the first computation.
  import hypothesis.extra.numpy  # noqa: F401
  import jax
  import pytest  # noqa: F401

  import tests.oracles  # noqa: F401

  for name in [name for name in sys.modules if name.split('.')[0] in ('se_vae', 'tests')]:
    del sys.modules[name]
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  with tempfile.TemporaryDirectory() as cache:
    jax.config.update('jax_compilation_cache_dir', cache)
    for argument in sys.argv[1:] or MODULES:
      name, _, lines = argument.partition(':')
      first, _, last = lines.partition('-')
      path = Path(__file__).parents[2] / 'se_vae' / f'{name}.py'
      source = path.read_text()
      passed, order = run_tests(path, source, [])
      assert passed, f'the tests of {name} fail without any mutation: {order}'
      begin, count, survivors = time.monotonic(), 0, 0
      for operator, line, mutant in mutants(source):
        if lines and not int(first) <= line <= int(last or first):
          continue
        count += 1
        passed, names = run_tests(path, mutant, order)
        if passed:
          survivors += 1
          print(f'{name}:{line} {operator}: {mutant.splitlines()[line - 1].strip()}', flush=True)
        elif names[0] in order:
          order.remove(names[0])
          order.insert(0, names[0])
      minutes = (time.monotonic() - begin) / 60
      print(f'{name}: {count} mutants, {survivors} survive ({minutes:.0f} min)', flush=True)


if __name__ == '__main__':
  main()
