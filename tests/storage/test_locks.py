"""Locks on files. Two holders in one process exclude each other as two processes do."""

from __future__ import annotations

import fcntl
import os
import threading

import pytest

from se_vae.storage import locks


def test_a_lock_has_one_owner_whom_the_others_are_told(tmp_path):
  path = tmp_path / '.lock'
  locks.check_free(path)  # there is none yet
  with locks.hold(path):
    for refused in (lambda: locks.check_free(path), lambda: locks.hold(path).__enter__()):
      with pytest.raises(locks.InUseError, match=f'^process {os.getpid()} on '):
        refused()
  locks.check_free(path)
  with locks.hold(path):
    assert path.read_text().startswith(f'process {os.getpid()} on ')


def test_an_owner_that_fails_gives_the_lock_back(tmp_path):
  with pytest.raises(ZeroDivisionError), locks.hold(tmp_path / '.lock'):
    raise ZeroDivisionError
  locks.check_free(tmp_path / '.lock')


def test_who_waits_gets_the_lock_after_the_owner(tmp_path):
  path, entered = tmp_path / '.lock', threading.Event()

  def wait():
    with locks.hold(path, wait=True):
      entered.set()

  with locks.hold(path):
    waiting = threading.Thread(target=wait)
    waiting.start()
    assert not entered.wait(0.1)
  waiting.join(30)
  assert entered.is_set()


def test_a_lock_that_cannot_be_written_is_an_os_error(tmp_path):
  with pytest.raises(FileNotFoundError), locks.hold(tmp_path / 'missing' / '.lock'):
    pytest.fail('held')


def test_a_shared_lock_keeps_an_owner_out(tmp_path):
  path = tmp_path / '.lock'
  with locks.share(path), locks.share(path), pytest.raises(locks.InUseError):
    locks.hold(path).__enter__()
  with locks.hold(path):
    pass


def test_a_lock_that_is_looked_at_is_not_taken(tmp_path):
  """`check_free` shares it for a moment."""
  path = tmp_path / '.lock'
  with path.open('a+') as file:
    fcntl.flock(file, fcntl.LOCK_SH)
    threading.Timer(0.03, fcntl.flock, (file, fcntl.LOCK_UN)).start()
    with locks.hold(path):
      pass
