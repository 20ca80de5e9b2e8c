"""Killed, crowded out, out of disk: nothing finished is lost, and the end is as if undisturbed."""

from __future__ import annotations

import functools
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments import figure1, pretrain, probe, probe_settings
from experiments.cli import flags, signals, workdirs
from se_vae.config import ArgumentError
from se_vae.storage import checkpoints
from tests.experiments.scheduled import ALONE
from tests.experiments.test_app import exit_code
from tests.experiments.tiny_run import unexamined
from tests.tools import fuzzing

DTYPE_PROMOTION = 'standard'  # optax takes part

ROOT = Path(__file__).parents[2]
FLAGS = {
  'tensorboard': False,
  'num_devices': 1,
  'objective': 'vae',
  'hidden_units': 16,
  'latent_dim': 4,
  'num_steps': 600,
  'log_every': 50,
  'checkpoint_every': 100,
}


def config(workdir: Path, **changes) -> pretrain.PretrainConfig:
  values = {'workdir': str(workdir), **FLAGS, **changes}
  return flags.from_dict(pretrain.PretrainConfig, values)


def run(workdir: Path, **changes) -> dict:
  """The binary's work, in this process."""
  return pretrain.run(config(workdir, **changes), signals.StopSignal())


def start(workdir: Path, **changes) -> subprocess.Popen:
  """The binary, as a user starts it, with the devices of this process."""
  arguments = {'workdir': workdir, **FLAGS, **changes}
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.pretrain', *(f'--{k}={v}' for k, v in arguments.items())],
    cwd=ROOT,
    env={**os.environ, 'JAX_NUM_CPU_DEVICES': str(jax.device_count())},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def last_step(workdir: Path) -> int:
  """Of the rows that are complete."""
  path = workdir / 'metrics.jsonl'
  lines = path.read_text().split('\n')[:-1] if path.exists() else []
  return json.loads(lines[-1])['step'] if lines else 0


def wait_for_step(process: subprocess.Popen, workdir: Path, step: int) -> None:
  deadline = time.monotonic() + 120
  while last_step(workdir) < step and process.poll() is None:
    assert time.monotonic() < deadline
    time.sleep(0.01)


def assert_same_end(workdir: Path, expected: Path) -> None:
  assert (workdir / 'metrics.jsonl').read_text() == (expected / 'metrics.jsonl').read_text()
  results = [json.loads((path / 'result.json').read_text()) for path in (workdir, expected)]
  assert results[0]['test'] == results[1]['test']
  tensors = [
    checkpoints.load_latest(path / 'checkpoints', on_damage=pytest.fail).tensors
    for path in (workdir, expected)
  ]
  assert tensors[0].keys() == tensors[1].keys()
  for name, tensor in tensors[0].items():
    np.testing.assert_array_equal(tensor, tensors[1][name], err_msg=name)


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory) -> Path:
  workdir = tmp_path_factory.mktemp('undisturbed')
  run(workdir)
  assert last_step(workdir) == FLAGS['num_steps']
  return workdir


@pytest.mark.slow
@pytest.mark.parametrize(
  ('binary', 'devices'),
  [
    ('pretrain', 1),
    ('pretrain', 4),
    ('probe', 2),
    ('probe_joint', 2),
    ('probe_moves', 2),
    ('probe_certify', 2),
    ('figure1', 2),
    ('supervised', 2),
    ('sweep', 1),
  ],
)
def test_a_binary_killed_at_random_moments_leaves_the_same_bytes(
  tmp_path, binary, devices, record_property
):
  directory, seed = str(tmp_path / 'kills'), fuzzing.SEED or 0
  done = subprocess.run(
    [sys.executable, '-m', 'tests.tools.kills', binary, directory, '--kills=20', f'--seed={seed}'],
    cwd=ROOT,
    env={**os.environ, 'XLA_FLAGS': f'--xla_force_host_platform_device_count={devices}'},
    capture_output=True,
    text=True,
  )
  assert done.returncode == 0, done.stderr
  assert '20 kills' in done.stdout
  record_property('kills', 20)


@pytest.mark.long
def test_sigterm_saves_within_seconds_and_the_run_ends_bitwise_equal(tmp_path, undisturbed):
  """In the middle of a window as long as the run, so that no row or checkpoint is due."""
  process = start(tmp_path, log_every=600, checkpoint_every=600)
  while not (tmp_path / 'metrics.jsonl').exists():  # then training is under way
    time.sleep(0.05)
  process.send_signal(signal.SIGTERM)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGTERM
  assert 'SIGTERM: saved. Run the same command again' in stderr.splitlines()[-1]
  (step, _), *_ = checkpoints.steps(tmp_path / 'checkpoints')
  assert 0 < step < 600
  run(tmp_path, log_every=600, checkpoint_every=600)
  mine, theirs = (
    checkpoints.load_latest(path / 'checkpoints', on_damage=pytest.fail).tensors
    for path in (tmp_path, undisturbed)
  )
  for name in (name for name in theirs if name.startswith(('params/', 'opt_state/'))):
    np.testing.assert_array_equal(mine[name], theirs[name], err_msg=name)


def test_a_directory_is_one_process_s_at_a_time(tmp_path):
  with workdirs.lock(tmp_path):
    owner = f'in use by process {os.getpid()} on '
    with pytest.raises(ArgumentError, match=owner), workdirs.lock(tmp_path):
      pytest.fail('both hold the lock')
    with pytest.raises(ArgumentError, match=r'workdir: .* in use'):
      pretrain.run(pretrain.PretrainConfig(workdir=str(tmp_path)), signals.StopSignal())
  with workdirs.lock(tmp_path):
    assert str(os.getpid()) in (tmp_path / '.lock').read_text()


def test_probe_and_figure1_have_locks_too_and_a_run_in_training_may_be_probed(tmp_path):
  owner = f'in use by process {os.getpid()} on '
  stop = signals.StopSignal()
  with workdirs.lock(tmp_path, name='.probe.lock'), pytest.raises(ArgumentError, match=owner):
    probe.run(probe_settings.ProbeConfig(workdir=str(tmp_path)), stop)
  with workdirs.lock(tmp_path):
    with pytest.raises(ArgumentError, match=owner):
      figure1.run(figure1.Figure1Config(placement=ALONE, workdir=str(tmp_path)), stop)
    with pytest.raises(ArgumentError, match='holds no pretrained encoder'):
      probe.run(probe_settings.ProbeConfig(workdir=str(tmp_path)), stop)


def test_a_lock_notices_when_its_directory_is_another_one(tmp_path):
  workdir = tmp_path / 'run'
  with workdirs.lock(workdir) as check_place:
    check_place()
    shutil.rmtree(workdir)
    with pytest.raises(FileNotFoundError, match='vanished'):
      check_place()
    with workdirs.lock(workdir), pytest.raises(FileNotFoundError, match='vanished'):
      check_place()


def test_a_lock_removes_what_dead_writers_left_of_its_own_files(tmp_path):
  for name in ('.result.json.7.tmp', '.probe_digit.json.7.tmp', '.mine.tmp'):
    (tmp_path / name).touch()
  with workdirs.lock(tmp_path, 'result.json', 'config.json'):
    names = {path.name for path in tmp_path.iterdir()}
  assert names == {'.lock', '.probe_digit.json.7.tmp', '.mine.tmp'}


def test_the_lock_of_a_dead_process_is_taken_over(tmp_path):
  code = (
    'import pathlib, signal, os\n'
    'from experiments.cli import workdirs\n'
    f'with workdirs.lock(pathlib.Path({str(tmp_path)!r})):\n'
    '  os.kill(os.getpid(), signal.SIGKILL)\n'
  )
  process = subprocess.run([sys.executable, '-c', code], cwd=ROOT)
  assert process.returncode == -signal.SIGKILL
  assert 'process ' in (tmp_path / '.lock').read_text()
  with workdirs.lock(tmp_path):
    assert f'process {os.getpid()} on' in (tmp_path / '.lock').read_text()


def assert_fails_in_a_line(capsys, main: Callable[[], Any], *words: str) -> None:
  """A binary with this `main` ends with code 1 and one line that has these words."""
  assert exit_code(main) == 1
  last = capsys.readouterr().err.splitlines()[-1]
  assert last.startswith('error: ')
  for word in words:
    assert word in last


@pytest.mark.long
def test_a_file_that_cannot_grow_is_an_error_in_a_line(tmp_path, capsys, undisturbed):
  """The kernel's own refusal of a write, as of a full quota: nothing half-written is left."""
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, hard))
  try:
    assert_fails_in_a_line(capsys, lambda: run(tmp_path), 'cannot be written', 'too large')
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert checkpoints.steps(tmp_path / 'checkpoints') == []
  assert not [path for path in (tmp_path / 'checkpoints').rglob('*') if path.is_file()]
  assert last_step(tmp_path) > 0


@pytest.mark.slow
def test_a_full_disk_is_an_error_in_a_line_and_the_run_goes_on_afterwards(tmp_path):
  long_enough = {'objective': 'se', 'pgd_steps': 2}  # to fill the disk meanwhile
  run(tmp_path / 'undisturbed', **long_enough)
  disk = tmp_path / 'disk'
  disk.mkdir()
  mounted = subprocess.run(['mount', '-t', 'tmpfs', '-o', 'size=1m', 'tmpfs', str(disk)])
  if mounted.returncode:
    pytest.skip('needs the right to mount a tmpfs')
  try:
    workdir = disk / 'run'
    process = start(workdir, **long_enough)
    wait_for_step(process, workdir, 250)
    (disk / 'ballast').write_bytes(b'x' * (shutil.disk_usage(disk).free - 4096))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 1 and 'Traceback' not in stderr, stderr
    last = stderr.splitlines()[-1]
    assert last.startswith('error: ') and 'No space left' in last
    assert checkpoints.load_latest(workdir / 'checkpoints', on_damage=pytest.fail) is not None
    (disk / 'ballast').unlink()
    subprocess.run(['mount', '-o', 'remount,size=8m', str(disk)], check=True)
    run(workdir, **long_enough)
    assert_same_end(workdir, tmp_path / 'undisturbed')
  finally:
    subprocess.run(['umount', str(disk)], check=True)


class Vandal(signals.StopSignal):
  """Removes the work directory once it has a row."""

  def __init__(self, workdir: Path) -> None:
    super().__init__()
    self.workdir = workdir

  def requested(self) -> int | None:
    if last_step(self.workdir) >= 50:
      shutil.rmtree(self.workdir)
    return super().requested()


@pytest.mark.long
def test_a_work_directory_that_vanishes_is_an_error_in_a_line(tmp_path, capsys, undisturbed):
  workdir = tmp_path / 'run'
  main = functools.partial(pretrain.run, config(workdir), Vandal(workdir))
  assert_fails_in_a_line(capsys, main, 'vanished')
  assert not workdir.exists()


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(tmp_path, capsys, undisturbed):
  shutil.copytree(undisturbed, tmp_path / 'run')
  workdir = tmp_path / 'run'
  (workdir / 'result.json').unlink()
  (_, newest), (before, _), *_ = checkpoints.steps(workdir / 'checkpoints')
  content = bytearray(newest.read_bytes())
  content[len(content) // 2] ^= 1
  newest.write_bytes(bytes(content))
  run(workdir)
  assert f'warning: {newest}: damaged' in capsys.readouterr().err
  assert before < FLAGS['num_steps']
  assert_same_end(workdir, undisturbed)


def test_damaged_results_and_rows_are_named_and_made_again(tmp_path, capsys):
  few = {'num_steps': 150, 'checkpoint_every': 150}  # three rows
  run(tmp_path, **few)
  kept = {path: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
  result = tmp_path / 'result.json'
  result.write_bytes(kept[result].replace(b'"step"', b'"stfp"'))
  (tmp_path / 'config.json').write_bytes(b'\xff')
  with pytest.raises(ArgumentError, match='obs_var'):  # the checkpoint knows too
    run(tmp_path, obs_var=0.5, **few)
  rows = kept[tmp_path / 'metrics.jsonl'].splitlines(keepends=True)
  (tmp_path / 'metrics.jsonl').write_bytes(b''.join([rows[0], b'\0\n', *rows[2:]]))
  run(tmp_path, **few)
  assert result.read_bytes() == kept[result]
  assert (tmp_path / 'config.json').read_bytes() == kept[tmp_path / 'config.json']
  assert (tmp_path / 'metrics.jsonl').read_bytes() == b''.join([rows[0], *rows[2:]])
  error = capsys.readouterr().err
  for damage in (
    'result.json: damaged',
    'config.json: damaged',
    'metrics.jsonl: line 2 is damaged',
  ):
    assert damage in error


def test_no_good_checkpoint_at_all_is_an_error_and_nothing_is_overwritten(
  tmp_path, capsys, undisturbed
):
  shutil.copytree(undisturbed, tmp_path / 'run')
  directory = tmp_path / 'run' / 'checkpoints'
  (tmp_path / 'run' / 'result.json').unlink()
  for _, path in checkpoints.steps(directory):
    path.write_bytes(b'')
  before = sorted(path.name for path in directory.iterdir())
  main = functools.partial(run, tmp_path / 'run')
  assert_fails_in_a_line(capsys, main, 'none of its 2 checkpoints is good')
  assert sorted(path.name for path in directory.iterdir()) == before


@pytest.mark.long
def test_a_constant_rate_may_train_on_and_a_cosine_may_not(tmp_path):
  few = {'schedule': 'constant', 'num_steps': 50}
  longer = {**few, 'num_steps': 100}
  with unexamined():
    run(tmp_path, **few)
    assert run(tmp_path, **longer)['step'] == 100
    run(tmp_path / 'straight', **longer)
  mine, theirs = (
    checkpoints.load_latest(path / 'checkpoints', on_damage=pytest.fail).tensors
    for path in (tmp_path, tmp_path / 'straight')
  )
  for name, tensor in theirs.items():
    if not name.startswith('window/'):
      np.testing.assert_array_equal(mine[name], tensor, err_msg=name)
  with pytest.raises(ArgumentError, match='num_steps'):
    run(tmp_path, **{**longer, 'num_steps': 75})
  with pytest.raises(ArgumentError, match='schedule'):
    run(tmp_path, **{**longer, 'schedule': 'cosine'})
