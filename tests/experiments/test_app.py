"""The edge of every binary: errors in a line, exit codes, signals, home directories."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

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
  for name in ('data_dir', 'a', 'b', 'batch_size', 'coordinator'):
    absl_flags.DEFINE_string(name, None, '', flag_values=values)
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
    (ArgumentError(('means', 'b'), 'must fit'), 2, 'error: means, --b: must fit'),
    (ArgumentError('means', 'must be finite'), 1, 'error: means: must be finite'),
    (
      MemoryError('8 GiB'),
      1,
      'error: out of memory; smaller values of --batch_size need less: 8 GiB',
    ),
    (
      RuntimeError('RESOURCE_EXHAUSTED: 8 bytes\nthe rest'),
      1,
      'error: out of memory; smaller values of --batch_size need less: RESOURCE_EXHAUSTED: 8 bytes',
    ),
    (FileNotFoundError('the disk\nis gone'), 1, 'error: the disk is gone'),
    (ZeroDivisionError('by zero'), 1, 'error: by zero'),
    (KeyboardInterrupt(), 130, 'SIGINT'),
  ],
)
def test_an_error_is_one_line_and_a_code(capsys, error, code, line):
  assert exit_code(raises(error)) == code
  assert capsys.readouterr().err == f'{line}\n'


@pytest.mark.parametrize('bug', [KeyError('bug'), RuntimeError('INTERNAL: bug')])
def test_a_bug_keeps_its_traceback(bug):
  with pytest.raises(type(bug)):
    exit_code(raises(bug))


def test_damaged_programs_in_the_cache_are_one_warning(tmp_path, monkeypatch, capsys):
  shown = []
  monkeypatch.setattr(warnings, 'showwarning', lambda message, *_: shown.append(message))
  monkeypatch.setattr(app, 'jax', mock.MagicMock())
  app.use_compilation_cache(str(tmp_path))
  for message in ('Error reading persistent compilation cache entry', 'another'):
    for number in (1, 2):
      warnings.showwarning(f'{message} {number}', UserWarning, 'compiler.py', 782)
  assert shown == ['another 1', 'another 2']
  error = capsys.readouterr().err
  assert error.startswith('warning: --compilation_cache_dir: ') and error.count('\n') == 1
  assert 'entry 1' in error


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
  for name in ('workdir', 'name', 'empty', 'runs'):
    absl_flags.DEFINE_string(name, None, '', flag_values=values)
  monkeypatch.setattr(app.absl_flags, 'FLAGS', values)
  monkeypatch.setenv('HOME', '/home/of/test')
  app._parse_flags(['binary', '--workdir=~/run', '--name=a~b', '--empty=', '--runs=~/a,b,~/c'])
  found = [values[name].value for name in ('workdir', 'name', 'empty', 'runs')]
  assert found == ['/home/of/test/run', 'a~b', '', '/home/of/test/a,b,/home/of/test/c']


def test_a_platform_that_is_not_here_is_an_error_in_a_line(tmp_path):
  done = subprocess.run(
    [sys.executable, '-m', 'experiments.pretrain', f'--workdir={tmp_path}', '--dataset=mnist_5k'],
    env={**os.environ, 'JAX_PLATFORMS': 'cuda'},
    capture_output=True,
    text=True,
  )
  if done.returncode == 0:
    pytest.skip('a GPU is here')
  assert done.stderr.splitlines()[-1].startswith('error: ') and 'Traceback' not in done.stderr
  assert 'JAX_PLATFORMS' in done.stderr and 'cuda' in done.stderr


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


def test_a_signal_waits_as_long_as_the_binary_says_afterwards(monkeypatch, capsys):
  """It comes while the binary prepares, which takes less patience than a step."""
  stop, waited = signals.StopSignal(), []

  def select(*arguments):
    waited.append(arguments[-1])
    stop.patience = 60.0
    return [], [], []

  monkeypatch.setattr(signals.time, 'monotonic', lambda: sum(waited))
  monkeypatch.setattr(signals.select, 'select', select)
  monkeypatch.setattr(signals.os, '_exit', sys.exit)
  reader, writer = os.pipe()
  os.write(writer, bytes([signal.SIGTERM]))
  with pytest.raises(SystemExit, match='143'):
    stop._watch(reader)
  os.close(reader)
  os.close(writer)
  assert waited == [10.0, 50.0]
  assert 'SIGTERM: a step takes longer than 60 s' in capsys.readouterr().err


@pytest.mark.parametrize('honoured', [False, True])
@pytest.mark.parametrize('second_ends', [False, True])
def test_whether_a_second_signal_ends_the_process(monkeypatch, honoured, second_ends):
  """Not that of a run beside others, which may get the same request from several sides."""
  stop = signals.StopSignal(second_ends=second_ends)
  monkeypatch.setattr(signals.os, '_exit', sys.exit)
  reader, writer = os.pipe()
  os.write(writer, bytes([signal.SIGTERM, signal.SIGINT]))
  os.close(writer)  # as at the end of `listening`
  if honoured:
    stop._honoured.set()
  with pytest.raises(SystemExit, match='130') if second_ends else contextlib.nullcontext():
    stop._watch(reader)
  os.close(reader)
  assert stop.signum == signal.SIGTERM


@pytest.mark.parametrize(
  ('binary', 'module'), [('pretrain', 'absl'), ('pretrain', 'jax'), ('report', 'numpy')]
)
def test_ctrl_c_while_a_binary_imports_is_no_traceback(tmp_path, binary, module):
  """An exception within an import would become another one, or crash an extension module."""
  (tmp_path / f'{module}.py').write_text('import os, signal; os.kill(os.getpid(), signal.SIGINT)')
  done = subprocess.run(
    [sys.executable, '-m', f'experiments.{binary}', f'--workdir={tmp_path}'],
    cwd=ROOT,
    env={**os.environ, 'PYTHONPATH': str(tmp_path)},
    capture_output=True,
    text=True,
  )
  assert (done.returncode, done.stdout, done.stderr) == (130, '', 'SIGINT\n')


# Writes a file and a little of everything, as a binary does.
TALK = """
from experiments.cli import startup
startup.prepare()
import sys
with open(sys.argv[1], 'w') as file:
  print('out ü \\udcff', flush=True)
  print('err ü \\udcff', file=sys.stderr)
  print('kept', file=file)
print('out')
sys.exit(3)
"""


@pytest.mark.parametrize('closed', ['', '>&-', '2>&-', '<&- >&- 2>&-'])
@pytest.mark.parametrize('encoding', ['utf-8', 'ascii'])
def test_streams_that_are_closed_or_ascii_end_nothing(tmp_path, closed, encoding):
  done = subprocess.run(
    ['sh', '-c', f'exec "$0" "$@" {closed}', sys.executable, '-c', TALK, str(tmp_path / 'file')],
    cwd=ROOT,
    env={**os.environ, 'PYTHONIOENCODING': encoding},
    capture_output=True,
  )
  letter = 'ü'.encode(encoding, 'backslashreplace') + b' \xff'  # of a path, as its bytes were
  assert done.returncode == 3
  assert done.stdout == (b'' if ' >&-' in f' {closed}' else b'out ' + letter + b'\nout\n')
  assert done.stderr == (b'' if '2>&-' in closed else b'err ' + letter + b'\n')
  assert (tmp_path / 'file').read_bytes() == b'kept\n'


def test_a_reader_that_goes_away_ends_nothing(tmp_path):
  """As in `binary 2>&1 | head -1`."""
  reader, writer = os.pipe()
  os.close(reader)
  command = [sys.executable, '-c', TALK, str(tmp_path / 'file')]
  done = subprocess.run(command, cwd=ROOT, stdout=writer, stderr=writer)
  os.close(writer)
  assert done.returncode == 3
  assert (tmp_path / 'file').read_bytes() == b'kept\n'


def test_a_full_disk_for_the_output_is_told_in_a_line():
  if not os.path.exists('/dev/full'):
    pytest.skip('needs /dev/full')
  code = 'from experiments.cli import startup; startup.prepare(); from experiments.cli import app;'
  with open('/dev/full', 'wb') as full:
    done = subprocess.run(
      [sys.executable, '-c', code + "app.run(lambda: print('result'))"],
      cwd=ROOT,
      stdout=full,
      stderr=subprocess.PIPE,
      text=True,
    )
  assert done.returncode == 1
  assert done.stderr.startswith('error: ') and 'No space left' in done.stderr
