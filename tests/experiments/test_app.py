"""The edge of every binary: errors in a line, exit codes, signals, home directories."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from absl import flags as absl_flags

from experiments.cli import app, flags, signals
from experiments.cli.flags import UsageError
from se_vae.config import ArgumentError

ROOT = Path(__file__).parents[2]


def exit_code(main: Callable[[], Any]) -> Any:
  """The code with which a binary with this `main` ends, in this process."""
  values = absl_flags.FlagValues()
  flags.define_flags(app.RuntimeConfig, values)
  absl_flags.DEFINE_integer('verbosity', 0, '', flag_values=values)
  values(['binary', '--verbosity=0'])
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(app.absl_flags, 'FLAGS', values)
    patch.setattr(flags, 'from_flags', lambda _: app.RuntimeConfig())
    with pytest.raises(SystemExit) as end:
      app._guarded(main, ['binary'])
  return end.value.code


def raises(error: BaseException) -> Callable[[], None]:
  def main() -> None:
    raise error

  return main


@pytest.mark.parametrize(
  ('error', 'code', 'line'),
  [
    (UsageError('--radius: must be >= 0; got -1'), 2, 'error: --radius: must be >= 0; got -1'),
    (ArgumentError('data_dir', 'is\nmissing'), 2, 'error: --data_dir: is missing'),
    (ArgumentError(('a', 'b'), 'must differ'), 2, 'error: --a, --b: must differ'),
    (FileNotFoundError('the disk\nis gone'), 1, 'error: the disk is gone'),
    (ZeroDivisionError('by zero'), 1, 'error: by zero'),
    (KeyboardInterrupt(), 130, 'SIGINT'),
  ],
)
def test_an_error_is_one_line_and_a_code(capsys, error, code, line):
  assert exit_code(raises(error)) == code
  assert capsys.readouterr().err == f'{line}\n'


def test_a_bug_keeps_its_traceback():
  with pytest.raises(KeyError):
    exit_code(raises(KeyError('bug')))


@pytest.mark.parametrize(('saves', 'says'), [(True, 'SIGINT: saved.'), (False, 'nothing is kept')])
def test_who_keeps_nothing_does_not_say_saved(capsys, saves, says):
  def main():
    stop = signals.StopSignal(saves)
    stop.signum = signal.SIGINT
    stop.check()

  assert exit_code(main) == 130 and says in capsys.readouterr().err


def test_a_home_directory_is_expanded_in_any_flag(monkeypatch):
  """As in --workdir=~/run, which shells hand on as it is."""
  values = absl_flags.FlagValues()
  for name in ('workdir', 'name', 'empty'):
    absl_flags.DEFINE_string(name, None, '', flag_values=values)
  monkeypatch.setattr(app.absl_flags, 'FLAGS', values)
  monkeypatch.setenv('HOME', '/home/of/test')
  app._parse_flags(['binary', '--workdir=~/run', '--name=a~b', '--empty='])
  found = [values[name].value for name in ('workdir', 'name', 'empty')]
  assert found == ['/home/of/test/run', 'a~b', '']


# The main thread is in a call that no signal interrupts, as it is in a long dispatch.
STUCK = """
  import hashlib
  from experiments.cli import app, signals

  def main():
    with signals.StopSignal().listening() as stop:
      stop.patience = {patience}
      print('listening', flush=True)
      hashlib.pbkdf2_hmac('sha256', b'', b'', 2**31 - 1)

  app.run(main)
"""


@pytest.mark.parametrize(('patience', 'count'), [(0.5, 1), (1e6, 2)])
def test_a_signal_ends_a_process_in_the_middle_of_a_long_dispatch(patience, count):
  code = textwrap.dedent(STUCK.format(patience=patience))
  process = subprocess.Popen(
    [sys.executable, '-c', code],
    cwd=ROOT,
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout.readline() == 'listening\n'
  for _ in range(count):
    process.send_signal(signal.SIGTERM)
    time.sleep(0.2)  # two of a kind at once are one
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  if count == 1:
    assert 'Run the same command again' in stderr.splitlines()[-1]


def test_ctrl_c_while_a_binary_imports_is_no_traceback():
  """JAX and the library are imported within `main`."""
  code = 'from experiments.cli import app\nimport os, signal\n'
  code += 'app.run(lambda: (os.kill(os.getpid(), signal.SIGINT), __import__("jax")))'
  done = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert (done.returncode, done.stderr) == (130, 'SIGINT\n')
