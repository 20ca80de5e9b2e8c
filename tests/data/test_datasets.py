"""Data sets: canonical order, colours, held-out splits, and what is said where there is none."""

from __future__ import annotations

import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest

from se_vae import data
from se_vae.data import examples
from tests.data.tiny_idx import STEMS, assert_raises, hashes, splits, tiny_arrays, write_idx

ROOT = pathlib.Path(__file__).resolve().parents[2]


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


def test_reordering_in_place_is_indexing():
  rng = np.random.default_rng(0)
  for size in (1, 2, 7, 50):
    array, order = rng.integers(0, 256, (size, 3, 1)), rng.permutation(size)
    expected = array[order]
    examples.reorder_in_place(array, order)
    np.testing.assert_array_equal(array, expected)


def test_runs_on_the_former_order_go_on_and_those_on_other_data_do_not(digits, colored, tmp_path):
  for digest in (digits.digest, digits.digest_before):
    digits.check_is_that_of(digest)
  assert_raises(lambda: digits.check_is_that_of(colored.digest), 'dataset: ', 'start a new run')
  idx = data.load('fashion_mnist', data_dir=write_idx(tmp_path, tiny_arrays()))
  assert idx.digest == idx.digest_before
  assert_raises(lambda: idx.check_is_that_of(digits.digest), 'data_dir: ', idx.digest[:12])


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


@pytest.mark.parametrize('seed', [-1, 2**31, 1.5, 'a', None])
def test_data_seed_must_be_in_range(seed):
  assert_raises(lambda: data.load('color_mnist_5k', data_seed=seed), 'data_seed', str(seed))


# Held-out validation examples


def rows(split: data.Split) -> list[tuple[bytes, ...]]:
  return list(zip(hashes(split.images), *split.labels.values(), strict=True))


@pytest.mark.parametrize('name', ['mnist_5k', 'color_mnist_5k'])
def test_validation_splits_the_training_examples_only(name):
  full, held_out = data.load(name), data.load(name, validation=True)
  assert len(held_out.train.images) == 4000 - 666
  assert len(held_out.test.images) == 666
  assert rows(held_out.train) == rows(full.train)[:-666]
  assert sorted(rows(held_out.test)) == sorted(rows(full.train)[-666:])
  assert held_out.num_classes == full.num_classes
  assert held_out.digest != full.digest


def test_validation_needs_enough_examples(tmp_path):
  arrays = {stem: array[:5] for stem, array in tiny_arrays().items()}
  directory = write_idx(tmp_path, arrays)
  assert_raises(lambda: data.load('fashion_mnist', data_dir=directory, validation=True), 'few')


# Nothing there


def test_unknown_names_are_refused():
  for name in (
    'x',
    'MNIST',
    'mnist ',
    '',
    'tfds:',
    'tfds:../x',
    'tfds:a/../b',
    'a\nb',
    'color_x',
    3,
  ):
    assert_raises(lambda name=name: data.check(name, None), 'dataset', repr(name), 'mnist_5k')


@pytest.mark.parametrize('name', ['mnist', 'color_mnist', 'fashion_mnist', 'tfds:cifar10'])
def test_no_data_is_said_at_once(tmp_path, name):
  (tmp_path / 'empty').mkdir()
  (tmp_path / 'file').write_text('')
  (tmp_path / 'other').mkdir()
  (tmp_path / 'other' / 'notes.txt').write_text('')
  start = time.monotonic()
  for data_dir in (None, '', '\0', *(str(tmp_path / d) for d in ('empty', 'file', 'other', 'no'))):
    for call in (data.check, lambda name, data_dir: data.load(name, data_dir=data_dir)):
      assert_raises(lambda call=call, data_dir=data_dir: call(name, data_dir), 'data_dir', 'TFDS')
  assert time.monotonic() - start < 5


def test_messages_offer_what_would_work(tmp_path):
  assert_raises(lambda: data.check('mnist', None), 'mnist_5k', 'four IDX files')
  assert_raises(lambda: data.check('color_mnist', str(tmp_path)), 'color_mnist_5k')
  with pytest.raises(data.DataError) as caught:
    data.check('tfds:cifar10', None)
  assert str(caught.value) == (
    "data_dir: 'tfds:cifar10' was not found in the default directories; name a directory with the "
    "TFDS set 'cifar10', prepared with TensorFlow"
  )


def test_embedded_sets_take_no_directory(tmp_path):
  assert_raises(lambda: data.check('mnist_5k', str(tmp_path)), 'data_dir', 'embedded')


def test_import_is_light():
  code = (
    'import sys, se_vae.data;'
    'heavy = {"tensorflow", "tensorflow_datasets", "mlxtend", "pooch"} & set(sys.modules);'
    'assert not heavy, heavy;'
    'import jax; jax.config.update("jax_num_cpu_devices", 3); assert jax.device_count("cpu") == 3'
  )
  subprocess.run([sys.executable, '-c', code], cwd=ROOT, check=True, timeout=60)
