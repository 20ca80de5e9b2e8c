"""TFDS sets: found, opened, decoded or downloaded, and refused with the reason."""

from __future__ import annotations

import functools
import json
import pathlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from se_vae import data
from se_vae.data import tfds
from tests.data.tiny_idx import assert_raises, examples, tiny_arrays, write_idx
from tests.data.tiny_tfds import write_tfds


def test_online_gives_up_in_time(monkeypatch):
  monkeypatch.undo()  # the real `_is_online`
  finish = threading.Event()

  def hang(*_):  # like a name server that does not answer
    finish.wait(30)
    raise OSError

  monkeypatch.setattr(socket, 'create_connection', hang)
  start = time.monotonic()
  assert not tfds._is_online(timeout=0.1)
  assert time.monotonic() - start < 5
  finish.set()


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


@pytest.mark.parametrize(
  ('others', 'chosen', 'sizes'),
  [
    ({'validation': [0, 1]}, ' (its validation split as test)', (12, 2)),
    ({}, ' (a sixth of its train split as test)', (10, 2)),
    ({'validation': [-1, -1]}, ' (a sixth of its train split as test)', (10, 2)),
  ],
)
def test_tfds_test_split_without_labels_is_not_used(tmp_path, others, chosen, sizes):
  images = np.random.default_rng(0).integers(0, 256, (12, 3, 4, 3), dtype=np.uint8)
  splits = {'train': (images, [0, 1] * 6), 'test': (images[:5], [-1] * 5)}
  splits |= {name: (images[: len(labels)], labels) for name, labels in others.items()}
  write_tfds(tmp_path, splits, name='contest', version='1.0.0', image_shape=(3, 4, 3))
  data.check('tfds:contest', str(tmp_path))
  dataset = data.load('tfds:contest', data_dir=str(tmp_path))
  assert dataset.source == f'TFDS contest:1.0.0{chosen}'
  assert (len(dataset.train.images), len(dataset.test.images)) == sizes
  assert dataset.test.labels['label'].min() >= 0


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


def test_tfds_images_of_any_size_are_made_one(tmp_path):
  rng = np.random.default_rng(0)
  images = [rng.integers(0, 256, (h, w, 1), np.uint8) for h, w in ((5, 4), (9, 7), (4, 4), (6, 8))]
  xy = images, range(4)
  write_tfds(tmp_path, {'train': xy, 'test': xy}, name='objects', image_shape=(None, None, 1))
  where = {'data_dir': str(tmp_path)}
  assert_raises(lambda: data.check('tfds:objects', **where), 'image_size')
  data.check('tfds:objects', **where, image_size=4)
  cache = str(tmp_path / 'cache')
  for size, cache_dir in ((4, None), (4, cache), (3, cache), (4, cache)):
    dataset = data.load('tfds:objects', **where, cache_dir=cache_dir, image_size=size)
    assert dataset.source == f'TFDS objects:3.0.1-{size}px'
    assert dataset.train.images.shape == (4, size, size, 1)
    for image, label in zip(dataset.train.images, dataset.train.labels['label'], strict=True):
      np.testing.assert_array_equal(image, data.central_square(images[label], size))
  for name in ('mnist', 'mnist_5k'):
    assert_raises(lambda name=name: data.check(name, image_size=28), 'image_size')
  assert_raises(lambda: data.check('tfds:objects', **where, image_size=0), 'image_size')


def test_tfds_images_must_have_one_size(tmp_path, monkeypatch):
  images = [np.zeros((h, 4, 1), np.uint8) for h in (5, 5, 6, 5)]
  xy = images, range(4)
  root = tmp_path / 'set'
  root.mkdir()
  write_tfds(root, {'train': xy, 'test': xy}, name='objects', image_shape=(None, None, 1))
  sizes = '(5, 4, 1)', '(6, 4, 1)'
  assert_raises(lambda: data.check('tfds:objects', str(root)), *sizes)
  # Where the few that are looked at happen to agree, decoding finds it, and leaves nothing behind.
  monkeypatch.setattr(tfds, '_NUM_COMPARED', 1)
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
  import tensorflow_datasets

  class Builder:
    def __init__(self, name, data_dir, file_format):
      assert (name, file_format) == ('fashion_mnist', 'array_record')
      self.root = pathlib.Path(data_dir)

    def download_and_prepare(self):
      splits = {'train': examples('train'), 'test': examples('t10k')}
      self.data_path = write_tfds(self.root, splits)

  monkeypatch.setattr(tensorflow_datasets, 'builder', Builder)

  def load():
    return data.load('tfds:fashion_mnist', data_dir=str(tmp_path))

  assert_raises(load)
  monkeypatch.setattr(tfds, '_has_tensorflow', lambda: True)
  assert_raises(load)
  monkeypatch.setattr(tfds, '_is_online', lambda: True)
  assert_raises(lambda: data.check('tfds:fashion_mnist', None))
  data.check('tfds:fashion_mnist', str(tmp_path))
  assert not any(tmp_path.iterdir())  # a check downloads nothing
  assert load().source == 'TFDS fashion_mnist:3.0.1'

  def fail(*_, **__):
    raise OSError('no\nroute')

  monkeypatch.setattr(tensorflow_datasets, 'builder', fail)
  assert_raises(lambda: data.load('tfds:objects', data_dir=str(tmp_path)), 'objects', 'no route')
