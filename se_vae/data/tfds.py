"""Prepared TFDS sets: found in a directory, or downloaded into one, and decoded.

TensorFlow is not needed to read array_record sets. Only downloading a set, or reading another
format, needs it. TFDS itself is imported when a set is opened, as the import is slow.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import importlib.util
import os
import re
import socket
import threading
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np

from se_vae.data import cache
from se_vae.data.examples import (
  Contents,
  DataError,
  canonical_order,
  check_examples,
  describe,
  list_directory,
  reorder_in_place,
  split_off_a_sixth,
)
from se_vae.data.transforms import central_square

# tfds:NAME[/CONFIG][:VERSION]
NAME = re.compile(r'tfds:[a-z]\w*(/\w[\w.\-]*)?(:\d+\.\d+\.\d+)?', re.ASCII)
_VERSION = re.compile(r'\d+\.\d+\.\d+', re.ASCII)
_HOST = ('storage.googleapis.com', 443)

# The number of images that are compared before decoding, of a set whose images may differ in size.
_NUM_COMPARED = 100


def default_dir() -> str:
  """Returns the directory where TFDS keeps prepared sets."""
  # As TFDS defines it. Asking TFDS would mean importing it, which is slow.
  home = os.path.join(os.path.expanduser('~'), 'tensorflow_datasets')
  return os.environ.get('TFDS_DATA_DIR', home)


def find_prepared(root: str, request: str) -> str | None:
  """Returns the directory of the newest prepared version in `root` that fits `NAME[:VERSION]`."""
  path, _, version = request.partition(':')
  parent = os.path.join(root, *path.split('/'))
  if not os.path.isdir(parent):
    return None
  versions = [v for v in list_directory(parent) if _VERSION.fullmatch(v) and version in ('', v)]
  directories = [
    os.path.join(parent, v)
    for v in sorted(versions, key=lambda v: tuple(map(int, v.split('.'))))
    if os.path.isfile(os.path.join(parent, v, 'dataset_info.json'))
  ]
  return directories[-1] if directories else None


@dataclasses.dataclass(frozen=True)
class PreparedSet:
  """A prepared TFDS set, checked as far as that goes without decoding it.

  Attributes:
    builder: the TFDS builder.
    directory: where the set is.
    image: the name of the feature with the images.
    label: the name of the feature with the labels.
    splits: 'train', and 'test' where a split has test images with labels -> the split of the set
      that serves as it. Without 'test' the last sixth of the training split is the test split.
    is_array_record: whether the set can be read without TensorFlow.
    image_size: S, to take the central square of every image as S x S pixels; None takes them whole.
  """

  builder: Any
  directory: str
  image: str
  label: str
  splits: Mapping[str, str]
  is_array_record: bool
  image_size: int | None

  def read(self, cache_dir: str | None) -> Contents:
    """Decodes the set, or maps it from the cache."""
    info = self.builder.info
    size = '' if self.image_size is None else f'-{self.image_size}px'
    with _tfds_errors(self.directory):
      arrays = cache.decode_once(
        functools.partial(_decode, self), cache_dir, f'{info.full_name}{size}', self.directory
      )
    num_classes = info.features[self.label].num_classes
    where = repr(self.directory)
    splits = [
      check_examples(arrays[f'{name}_images'], arrays[f'{name}_labels'], num_classes, where)
      for name in self.splits
    ]
    name, _, version = info.full_name.rpartition('/')
    source = f'TFDS {name}:{version}{size}'
    if 'test' not in self.splits:
      (whole,) = splits
      splits = [whole.take(rows) for rows in split_off_a_sixth(len(whole.images))]
      source += ' (a sixth of its train split as test)'
    elif self.splits['test'] != 'test':
      source += f' (its {self.splits["test"]} split as test)'
    train, test = splits
    return Contents(source, num_classes, train, test)


def open_prepared(directory: str, image_size: int | None) -> PreparedSet:
  """Opens a prepared TFDS set, and checks what can be checked without decoding it.

  Args:
    directory: of one version of the set.
    image_size: as in `PreparedSet`.

  Raises:
    DataError: if the set lacks a file, has not the features that are needed, has images of several
      sizes, or can only be read with TensorFlow, which is not installed.
  """
  with _tfds_errors(directory):
    import tensorflow_datasets as tfds

    info = (builder := tfds.builder_from_directory(directory)).info
    image = _find_feature(info.features, tfds.features.Image, 'image', directory)
    label = _find_feature(info.features, tfds.features.ClassLabel, 'label', directory)
    if info.features[image].np_dtype != np.uint8:
      raise DataError('data_dir', f'the images in {directory!r} are not 8-bit')
    if 'train' not in info.splits:
      raise DataError('data_dir', f"{directory!r} has no split 'train'")
    _check_files(info, 'train')
    formats = [file_format.value for file_format in info.available_file_formats()]
    is_array_record = 'array_record' in formats
    if not is_array_record and not _has_tensorflow():
      raise DataError(
        'data_dir',
        f'reading {directory!r} ({", ".join(formats)}) needs TensorFlow; install it,'
        " or prepare the set with file_format='array_record'",
      )
    splits = {'train': 'train'}
    prepared = PreparedSet(builder, directory, image, label, splits, is_array_record, image_size)
    held_out = (split for split in ('test', 'validation') if split in info.splits)
    if (test := next((name for name in held_out if _has_labels(prepared, name)), None)) is not None:
      prepared = dataclasses.replace(prepared, splits={**splits, 'test': test})
    if is_array_record and image_size is None and None in info.features[image].shape:
      _compare_sizes(prepared)
  return prepared


@dataclasses.dataclass(frozen=True)
class Download:
  """A TFDS set that `read` downloads and prepares.

  Attributes:
    request: `NAME[/CONFIG][:VERSION]`.
    data_dir: where it is prepared.
    image_size: as in `PreparedSet`.
  """

  request: str
  data_dir: str
  image_size: int | None

  def read(self, cache_dir: str | None) -> Contents:
    """Downloads, prepares and decodes the set."""
    try:
      import tensorflow_datasets as tfds

      builder = tfds.builder(self.request, data_dir=self.data_dir, file_format='array_record')
      builder.download_and_prepare()
    except Exception as error:
      raise DataError(
        'data_dir',
        f'TFDS could not prepare {self.request!r} in {self.data_dir!r}: {describe(error)}',
      ) from error
    # TFDS chose config and version, so its own directory is read, not one searched for.
    return open_prepared(os.fspath(builder.data_path), self.image_size).read(cache_dir)


def can_download() -> bool:
  """Returns whether TensorFlow is installed and TFDS's server answers."""
  return _has_tensorflow() and _is_online()


def _has_tensorflow() -> bool:
  return importlib.util.find_spec('tensorflow') is not None


def _is_online(timeout: float = 2.0) -> bool:
  # TFDS itself retries for minutes without a network.
  answered = threading.Event()

  def connect() -> None:
    with contextlib.suppress(OSError), socket.create_connection(_HOST, timeout):
      answered.set()

  # In a thread, as the socket's timeout does not cover the name's resolution.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(timeout)
  return answered.is_set()


def _find_feature(features: Mapping[str, Any], kind: type, preferred: str, where: str) -> str:
  """Returns the name of the preferred feature of a kind, or of the only one."""
  items = features.items() if hasattr(features, 'items') else ()
  names = [name for name, feature in items if isinstance(feature, kind)]
  if preferred in names:
    return preferred
  if len(names) != 1:
    raise DataError(
      'data_dir',
      f'{where!r} has {len(names)} features of type {kind.__name__} and none named {preferred!r};'
      ' need exactly one',
    )
  return names[0]


def _check_files(info: Any, split: str) -> None:
  """Raises DataError if a split lacks a file."""
  for path in info.splits[split].filepaths:
    if not os.path.isfile(path):
      raise DataError('data_dir', f'{os.fspath(path)!r} is missing')


def _has_labels(prepared: PreparedSet, split: str) -> bool:
  """Whether the examples of a split have labels. Competitions keep those of their test split."""
  _check_files(prepared.builder.info, split)
  import tensorflow_datasets as tfds

  decoders = {prepared.image: tfds.decode.SkipDecoding()}
  first = next(iter(_examples(prepared, split, decoders)), None)
  return first is None or int(first[prepared.label]) >= 0


def _compare_sizes(prepared: PreparedSet) -> None:
  """Raises DataError for images of several sizes, as far as a few of them show it."""
  examples = _examples(prepared, 'train')
  places = np.linspace(0, len(examples) - 1, min(len(examples), _NUM_COMPARED)).astype(int)
  shapes = [examples[int(place)][prepared.image].shape for place in places]
  for shape in shapes:
    _check_size(prepared, shape, shapes[0])


def _check_size(prepared: PreparedSet, shape: tuple[int, ...], first: tuple[int, ...]) -> None:
  if shape != first:
    raise DataError(
      ('data_dir', 'image_size'),
      f'images in {prepared.directory!r} differ in size, {first} and {shape}; choose one size for'
      ' all',
    )


def _decode(prepared: PreparedSet, allocate: cache.Allocate) -> cache.Arrays:
  """Returns images and labels of the splits that are used, in canonical order."""
  arrays: cache.Arrays = {}
  for name, split in prepared.splits.items():
    allocate_images = functools.partial(allocate, f'{name}_images')
    images, labels = _decode_split(prepared, split, allocate_images)
    arrays |= {f'{name}_images': images, f'{name}_labels': labels}
  return arrays


def _decode_split(
  prepared: PreparedSet, split: str, allocate: Callable[[tuple[int, ...]], np.ndarray]
) -> tuple[np.ndarray, np.ndarray]:
  """Decodes one split into an array from `allocate`, without a second array of its size."""
  count = prepared.builder.info.splits[split].num_examples
  images: np.ndarray | None = None
  labels: list[int] = []
  for example in _examples(prepared, split):
    image = example[prepared.image]
    if prepared.image_size is not None:
      image = central_square(image, prepared.image_size)
    if images is None:
      images = allocate((count, *image.shape))
    _check_size(prepared, image.shape, images.shape[1:])
    images[len(labels)] = image
    labels.append(int(example[prepared.label]))
  if images is None or len(labels) != count:
    raise DataError(
      'data_dir',
      f'{prepared.directory!r} has {len(labels)} examples in split {split!r}, expected'
      f' {max(count, 1)}',
    )
  order = canonical_order(images, np.array(labels))
  reorder_in_place(images, order)
  return images, np.array(labels)[order]


def _examples(prepared: PreparedSet, split: str, decoders: Any = None) -> Any:
  """Returns the examples of one split, each a mapping of features, decoded as TFDS does if None."""
  if prepared.is_array_record:
    return prepared.builder.as_data_source(split, decoders=decoders, file_format='array_record')
  import tensorflow_datasets as tfds

  return tfds.as_numpy(prepared.builder.as_dataset(split=split, decoders=decoders))


@contextlib.contextmanager
def _tfds_errors(directory: str) -> Iterator[None]:
  # TFDS and array_record raise errors of any type, some over many lines.
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    message = f'cannot read the TFDS set in {directory!r}: {describe(error)}'
    raise DataError('data_dir', message) from error
