"""The cache of decoded TFDS sets."""

from __future__ import annotations

import errno
import functools
import os
import pathlib
import shutil
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from se_vae import data
from se_vae.data import cache, tfds
from tests.data.tiny_idx import Arrays, assert_raises, examples
from tests.data.tiny_tfds import write_tfds


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """Grows with each split that is decoded."""
  calls: list[str] = []
  decode = tfds._decode_split

  def counted(tfds_set: Any, split: str, *rest: Any) -> Any:
    calls.append(split)
    return decode(tfds_set, split, *rest)

  monkeypatch.setattr(tfds, '_decode_split', counted)
  return calls


def cache_entry(cache: pathlib.Path) -> pathlib.Path:
  (path,) = cache.glob('*/sha256')
  return path.parent


def test_cache_spares_the_decoding(prepared, tmp_path, decodings):
  cache = tmp_path / 'cache' / 'new'

  def load():
    return data.load('fashion_mnist', data_dir=str(prepared), cache_dir=str(cache))

  first = load()
  assert decodings == ['train', 'test']
  assert [path.name for path in cache.glob('[!.]*')] == [cache_entry(cache).name]
  second = load()
  assert decodings == ['train', 'test']
  assert (first.digest, first.source) == (second.digest, second.source)
  for dataset in (first, second):  # from the file, and in memory no more than is used
    assert isinstance(dataset.train.images.base, np.memmap)
    assert not dataset.train.images.flags.writeable


@pytest.mark.parametrize('damage', ['empty', 'cut', 'flipped', 'pickle', 'no digest'])
def test_damaged_cache_is_rebuilt(prepared, tmp_path, decodings, damage):
  def load():
    return data.load('fashion_mnist', data_dir=str(prepared), cache_dir=str(tmp_path))

  expected = load().digest
  path = cache_entry(tmp_path) / 'train_images.npy'
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  if damage == 'no digest':
    (path.parent / 'sha256').unlink()  # the process was killed
  elif damage == 'pickle':
    np.save(path, np.array([{}], object))
  else:
    path.write_bytes({'empty': b'', 'cut': content[:-100], 'flipped': content}[damage])
  assert load().digest == expected
  assert len(decodings) == 4
  assert load().digest == expected
  assert len(decodings) == 4


def test_cache_of_other_files_is_not_used(own_copy, tmp_path, decodings):
  cache = str(tmp_path / 'cache')
  data.load('fashion_mnist', data_dir=str(own_copy), cache_dir=cache)
  shutil.rmtree(own_copy)
  write_tfds(own_copy, {'train': examples('t10k'), 'test': examples('t10k')})
  dataset = data.load('fashion_mnist', data_dir=str(own_copy), cache_dir=cache)
  assert len(dataset.train.images) == 12


def test_several_processes_decode_once(prepared, tmp_path):
  """Threads, whose locks are their own as those of processes are."""
  cache = str(tmp_path)
  load = functools.partial(data.load, 'fashion_mnist', data_dir=str(prepared), cache_dir=cache)
  entered, leave = threading.Event(), threading.Event()
  decode, calls = tfds._decode, []

  def slow(*args: Any) -> Arrays:
    calls.append(args)
    entered.set()
    assert leave.wait(30)
    return decode(*args)

  with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
    patch.setattr(tfds, '_decode', slow)
    first = pool.submit(load)
    assert entered.wait(30)
    second = pool.submit(load)
    with pytest.raises(TimeoutError):
      second.result(0.2)
    leave.set()
    digests = {first.result(30).digest, second.result(30).digest}
  assert len(calls) == 1 and digests == {load().digest}


def test_a_full_disk_is_an_error_in_a_line(prepared, tmp_path, monkeypatch):
  def fallocate(*_: int) -> None:
    raise OSError(errno.ENOSPC, 'No space left on device')

  monkeypatch.setattr(os, 'posix_fallocate', fallocate)
  call = functools.partial(data.load, 'fashion_mnist', data_dir=str(prepared))
  assert_raises(lambda: call(cache_dir=str(tmp_path)), 'cache_dir', 'No space left')
  assert not list(tmp_path.glob('[!.]*'))


def test_unusable_cache_directory_is_named(prepared, tmp_path, decodings):
  (tmp_path / 'file').write_text('')
  cache = str(tmp_path / 'file')
  assert_raises(
    lambda: data.load('fashion_mnist', data_dir=str(prepared), cache_dir=cache),
    'cache_dir',
    cache,
  )
  assert not decodings


def test_a_file_that_cannot_be_looked_at_is_an_error_in_a_line(tmp_path):
  (tmp_path / 'images').mkdir()
  (tmp_path / 'images' / '.#0.png').symlink_to('nowhere')
  places = str(tmp_path / 'cache'), 'name', str(tmp_path / 'images')
  message = "images' has a file that cannot be read: FileNotFoundError"
  assert_raises(lambda: cache.decode_once(lambda _: {}, *places), 'data_dir', message)
