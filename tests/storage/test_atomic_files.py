"""Files that are whole or not there. `test_checkpoints` has the order of syncs, and kills."""

from __future__ import annotations

import errno
import os

import pytest

from se_vae.storage import atomic_files


def test_a_file_is_replaced_when_the_block_ends(tmp_path):
  path = tmp_path / 'file'
  path.write_bytes(b'old')
  with atomic_files.replacing(path) as file:
    file.write(b'new')
    assert path.read_bytes() == b'old'
  assert path.read_bytes() == b'new' and os.listdir(tmp_path) == ['file']


def test_two_writers_do_not_mix(tmp_path):
  path = tmp_path / 'file'
  with atomic_files.replacing(path) as one:
    with atomic_files.replacing(path) as other:
      one.write(b'one')
      other.write(b'other')
    assert path.read_bytes() == b'other'
  assert path.read_bytes() == b'one' and os.listdir(tmp_path) == ['file']


@pytest.mark.parametrize('error', [OSError(errno.ENOSPC, 'full'), ValueError('no'), SystemExit(1)])
def test_a_block_that_fails_leaves_what_was_there(tmp_path, error):
  path = tmp_path / 'file'
  path.write_bytes(b'old')
  with pytest.raises(type(error)) as raised, atomic_files.replacing(path) as file:
    file.write(b'half')
    raise error
  assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['file']
  if isinstance(error, OSError):
    assert str(raised.value) == f"[Errno 28] full: '{path}'"


@pytest.mark.parametrize('call', ['fsync', 'replace'])
def test_a_disk_that_fails_leaves_what_was_there(tmp_path, monkeypatch, call):
  def fail(*_):
    raise OSError(errno.EIO, 'failed')

  path = tmp_path / 'file'
  path.write_bytes(b'old')
  with monkeypatch.context() as patch:
    patch.setattr(os, call, fail)
    with pytest.raises(OSError, match=f"failed: '{path}'"), atomic_files.replacing(path) as file:
      file.write(b'new')
  assert path.read_bytes() == b'old' and os.listdir(tmp_path) == ['file']


def test_a_missing_directory_is_an_error_that_names_the_file(tmp_path):
  path = tmp_path / 'gone' / 'file'
  with pytest.raises(FileNotFoundError, match=str(path)), atomic_files.replacing(path):
    pytest.fail('there is nothing to write to')


def test_a_new_directory_is_entered_durably_in_each_of_its_parents(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(os, 'fsync', lambda fd: synced.append(os.readlink(f'/proc/self/fd/{fd}')))
  atomic_files.make_directory(tmp_path / 'a' / 'b')
  assert sorted(synced) == [str(tmp_path), str(tmp_path / 'a')]
  atomic_files.make_directory(tmp_path / 'a' / 'b')
  assert (tmp_path / 'a' / 'b').is_dir() and len(synced) == 2


def test_all_bytes_are_synced_before_the_file_gets_its_name(tmp_path, monkeypatch):
  sizes, real = [], os.fsync

  def fsync(descriptor):
    sizes.append(os.fstat(descriptor).st_size)
    real(descriptor)

  monkeypatch.setattr(os, 'fsync', fsync)
  atomic_files.write(tmp_path / 'file', b'12345')
  assert sizes[0] == 5
