"""Damaged, foreign and half-written checkpoints, full disks and killed writers."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NoReturn

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from se_vae.storage import checkpoints
from se_vae.storage.checkpoints import CheckpointError
from tests.storage.small_trees import (
  assert_one_line,
  never,
  raise_no_space,
  restore_small,
  save_small,
  small,
)


def forge(directory: pathlib.Path, data: bytes, step: int = 9) -> pathlib.Path:
  """A file whose name is right for its bytes, whatever they are."""
  name = f'checkpoint_{step:08d}_{hashlib.sha256(data).hexdigest()}.safetensors'
  path = pathlib.Path(directory) / name
  path.write_bytes(data)
  return path


# Damage


def damaged_copies(data: bytes) -> Iterator[tuple[str, bytes]]:
  """Every way of damage tried, as (name, bytes)."""
  rng = np.random.default_rng(0)
  for position in sorted({0, 7, 8, len(data) - 1, *rng.integers(len(data), size=200).tolist()}):
    flipped = bytearray(data)
    flipped[position] ^= 1 << int(rng.integers(8))
    yield f'flip at {position}', bytes(flipped)
  for length in (0, 1, 8, 100, len(data) // 2, len(data) - 1):
    yield f'truncated to {length}', data[:length]
  yield 'longer', data + b'\0'
  yield 'zeros', bytes(len(data))
  yield 'foreign', b'PK\3\4 not a checkpoint'


def test_every_damage_is_found_and_the_previous_is_used(tmp_path: pathlib.Path) -> None:
  _, newest = save_small(tmp_path, 1, 2)
  data = newest.read_bytes()
  for name, damaged in damaged_copies(data):
    newest.write_bytes(damaged)
    step, damages = restore_small(tmp_path)
    assert step == 1, name
    assert len(damages) == 1 and str(newest) in damages[0] and 'damaged' in damages[0], name
  newest.write_bytes(data)
  assert restore_small(tmp_path) == (2, [])


def test_renamed_digest_and_renamed_step(tmp_path: pathlib.Path) -> None:
  _, newest = save_small(tmp_path, 1, 2)
  digest = newest.rename(newest.with_name(f'checkpoint_00000003_{"0" * 64}.safetensors'))
  assert restore_small(tmp_path) == (
    1,
    [f'{digest}: damaged, its SHA-256 is not the one in its name'],
  )
  step = digest.rename(newest.with_name(newest.name.replace('00000002', '00000003')))
  assert restore_small(tmp_path) == (1, [f'{step}: renamed, it is of step 2'])


def foreign_files() -> dict[str, bytes]:
  """Whole files, as far as a digest can tell, that no version of `save` wrote."""
  x = {'x': np.zeros(2, np.float32)}

  def with_document(document: str) -> bytes:
    return safetensors.numpy.save(x, {'se_vae': document})

  header = json.dumps({'x': {'dtype': 'F8_E4M3', 'shape': [1], 'data_offsets': [0, 1]}}).encode()
  huge = json.dumps({'x': {'dtype': 'F32', 'shape': [2**62], 'data_offsets': [0, 4]}}).encode()
  return {
    'empty': b'',
    'text': b'hello, world',
    'header too long': b'\xff' * 64,
    'no metadata': safetensors.numpy.save(x),
    'not json': with_document('{'),
    'not an object': with_document('[1]'),
    'next format': with_document('{"format": 2, "step": 9}'),
    'no step': with_document('{"format": 1}'),
    'deep': with_document('[' * 100_000),
    'long number': with_document('{"step": ' + '9' * 10_000 + '}'),
    'unreadable dtype': len(header).to_bytes(8, 'little') + header + b'\0',
    'sizes disagree': len(huge).to_bytes(8, 'little') + huge + bytes(4),
  }


@pytest.mark.parametrize('name', foreign_files())
def test_foreign_content_under_a_good_name(tmp_path: pathlib.Path, name: str) -> None:
  save_small(tmp_path, 1)
  path = forge(tmp_path, foreign_files()[name])
  with pytest.raises(CheckpointError) as error:
    checkpoints.load(path)
  assert_one_line(error, path)
  assert restore_small(tmp_path)[0] == 1


@pytest.mark.parametrize('name', ['model.safetensors', 'checkpoint_1_ab.safetensors'])
def test_load_wants_a_checkpoint_name(tmp_path: pathlib.Path, name: str) -> None:
  with pytest.raises(CheckpointError, match='is not named'):
    checkpoints.load(tmp_path / name)


def test_load_of_a_missing_file(tmp_path: pathlib.Path) -> None:
  path = tmp_path / f'checkpoint_00000003_{"0" * 64}.safetensors'
  with pytest.raises(CheckpointError) as error:
    checkpoints.load(path)
  assert_one_line(error, path, 'No such file')


# Writing


def assert_save_fails_harmlessly(directory: pathlib.Path, reason: int, tree: Any = None) -> None:
  before = {path: path.read_bytes() for path in directory.iterdir()}
  with pytest.raises(CheckpointError) as error:
    checkpoints.save(directory, 9, small(9) if tree is None else tree, {}, keep=1)
  assert_one_line(error, directory / 'checkpoint_00000009_', os.strerror(reason))
  assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize('function', ['replace', 'fsync'])
def test_interrupted_write_loses_nothing(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
  save_small(tmp_path, 1, 2)
  with monkeypatch.context() as patch:
    patch.setattr(os, function, raise_no_space)
    assert_save_fails_harmlessly(tmp_path, errno.ENOSPC)
  assert restore_small(tmp_path) == (2, [])
  save_small(tmp_path, 9)
  assert restore_small(tmp_path) == (9, [])


def test_file_that_cannot_be_written_in_full(tmp_path: pathlib.Path) -> None:
  save_small(tmp_path, 1, 2)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # A real write that stops half-way.
  try:
    assert_save_fails_harmlessly(tmp_path, errno.EFBIG, {'x': np.ones(50_000)})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert restore_small(tmp_path) == (2, [])


def test_interrupt_by_the_user_leaves_no_temporary_file(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def interrupt(_descriptor: int) -> NoReturn:
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'fsync', interrupt)
  with pytest.raises(KeyboardInterrupt):
    save_small(tmp_path, 1)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_directory(tmp_path: pathlib.Path) -> None:
  save_small(tmp_path, 1, 2)
  tmp_path.chmod(0o555)
  try:
    assert_save_fails_harmlessly(tmp_path, errno.EACCES)
    assert restore_small(tmp_path) == (2, [])
  finally:
    tmp_path.chmod(0o755)


def test_temporary_files_of_dead_writers_are_removed(tmp_path: pathlib.Path) -> None:
  for pid in (1, os.getpid(), 999_999_999):
    (tmp_path / f'.checkpoint_{pid}.safetensors.{pid}.tmp').write_bytes(b'half of it')
  assert checkpoints.load_latest(tmp_path, on_damage=never) is None
  (path,) = save_small(tmp_path, 1)
  assert list(tmp_path.iterdir()) == [path]


def test_durable_before_visible_before_pruned(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (old,) = save_small(tmp_path, 1)
  events = []
  real_fsync, real_replace, real_unlink = os.fsync, os.replace, pathlib.Path.unlink

  def fsync(descriptor: int) -> None:
    events.append(('fsync', pathlib.Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix))
    real_fsync(descriptor)

  def replace(source: Any, target: Any) -> None:
    events.append(('replace', pathlib.Path(target).suffix))
    real_replace(source, target)

  def unlink(path: pathlib.Path, missing_ok: bool = False) -> None:
    if path == old:
      events.append(('prune', path.suffix))
    real_unlink(path, missing_ok)

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(os, 'replace', replace)
  monkeypatch.setattr(pathlib.Path, 'unlink', unlink)
  save_small(tmp_path, 2, keep=1)
  assert events == [
    ('fsync', '.tmp'),
    ('replace', '.safetensors'),
    ('fsync', ''),  # The directory.
    ('prune', '.safetensors'),
  ]


# A writer that is killed. One process imports the library once and forks writers to kill.
KILLER = """
  import os, pathlib, random, signal, sys, time
  import numpy as np
  from se_vae.storage import checkpoints

  directory, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  template = {'a': np.zeros(20_000, np.float32), 'step': np.int32(0)}

  def latest():
    def on_damage(damage):
      raise AssertionError(damage)
    found = checkpoints.load_latest(directory, on_damage=on_damage)
    if found is None:
      return 0
    tree, metadata = found.restore(template), found.metadata
    assert tree['step'] == metadata['step'] and (tree['a'] == metadata['step']).all()
    return metadata['step']

  def write_for_ever(step):
    while True:
      step += 1
      tree = {'a': np.full(20_000, step, np.float32), 'step': np.int32(step)}
      checkpoints.save(directory, step, tree, {}, keep=2)

  random.seed(0)
  last = left = 0
  for _ in range(kills):
    writer = os.fork()
    if not writer:
      write_for_ever(last)
    while not any(step > last for step, _ in checkpoints.steps(directory)):
      time.sleep(0.001)  # however slow the machine is
    time.sleep(random.uniform(0.0, 0.06))
    os.kill(writer, signal.SIGKILL)
    assert os.waitpid(writer, 0)[1] == signal.SIGKILL
    left += len(list(directory.glob('.*.tmp')))
    step = latest()
    assert step >= last, (step, last)
    last = step
  checkpoints.save(directory, last + 1, template, {}, keep=2)
  print(last, left, len(list(directory.iterdir())))
"""


@pytest.mark.long
def test_killed_writers_lose_nothing(tmp_path: pathlib.Path) -> None:
  kills = 25
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(KILLER), str(tmp_path), str(kills)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0, done.stderr
  last, interrupted, files = map(int, done.stdout.split())
  assert last >= kills  # The writers did write.
  assert interrupted > 0  # Some were killed in the middle of a file.
  assert files == 2
