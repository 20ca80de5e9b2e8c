"""The bash blocks of README and docs run as they stand, in a clone with the package's dependencies.

A comment before each block, which a rendered page does not show, says what is done with it:

  <!-- run -->               it runs with the long tests
  <!-- run slow -->          it runs with the slow ones
  <!-- not run: REASON -->   it does not run

The blocks of a page run in order, after what comments `<!-- bash ... -->` prepare for them.

Of the README all runs but its two commands, `make figure1` and `make test`. Both install packages
from the network; the first then takes minutes, and the second runs this test. A dry run shows the
commands behind them, and test_figure1.py runs the figure with tiny networks. Of the other pages
those blocks do not run that install packages from the network, download data, need several hosts,
or take many minutes. Their binaries run with tiny networks in tests/experiments, and test_docs.py
checks the flags of all blocks.
"""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

import pytest

from tests.clean_environment import ROOT, make_clone, make_environment, run

PAGES = [ROOT / 'README.md', *sorted((ROOT / 'docs').glob('*.md'))]
_BLOCK = re.compile(r'^(?:<!-- ([^\n]*) -->\n)?```bash\n(.*?)^```$', re.DOTALL | re.MULTILINE)
_RUNNABLE = r'<!-- (?:bash|{mark} -->\n```bash)\n(.*?)^(?:-->|```)$'


def script(page: Path, mark: str) -> str:
  """The blocks of a page that have a mark, in order, with what prepares them; '' if none has."""
  text = page.read_text()
  if not any(found == mark for found, _ in _BLOCK.findall(text)):
    return ''
  pattern = _RUNNABLE.format(mark=mark)
  return ''.join(re.findall(pattern, text, flags=re.DOTALL | re.MULTILINE))


def pages(mark: str) -> list[Path]:
  return [page for page in PAGES if script(page, mark)]


@pytest.fixture(scope='module')
def python(tmp_path_factory):
  """Python where all that the package needs is installed. The binaries find it in their clone."""
  return make_environment(tmp_path_factory.mktemp('environment') / 'venv')


@pytest.mark.long
@pytest.mark.parametrize('page', pages('run'), ids=lambda page: page.name)
def test_commands_run(page, python, tmp_path):
  check(script(page, 'run'), python, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize('page', pages('run slow'), ids=lambda page: page.name)
def test_slow_commands_run(page, python, tmp_path):
  check(script(page, 'run slow'), python, tmp_path)


def check(commands: str, python: Path, tmp_path: Path) -> None:
  """Runs commands in a new clone, and checks that they have written what they were to write."""
  clone = make_clone(tmp_path / 'clone')
  (clone / 'commands').write_text(commands)
  run('bash', '-euo', 'pipefail', 'commands', cwd=clone, commands=python.parent)
  for directory in re.findall(r'--(?:workdir|output)=([^\s$]+)', commands):
    assert any((clone / directory).iterdir()), directory


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_every_block_says_whether_it_runs(page):
  for mark, block in _BLOCK.findall(page.read_text()):
    assert mark in ('run', 'run slow') or mark.startswith('not run: '), block


def test_the_quick_start_runs():
  readme = script(ROOT / 'README.md', 'run')
  assert 'pip install .' in readme and '--help' in readme and '--pretrained=' in readme


def test_make_starts_the_figure_and_the_tests():
  line = ('make', '--dry-run', 'figure1', 'test')
  done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  assert '/python -m experiments.figure1 --workdir=runs/figure1\n' in done.stdout
  assert '/python -m pytest -m "not long and not slow"' in done.stdout
