"""What every source of data yields: checked examples in canonical order, or a `DataError`.

The same data arrives in different orders (IDX files and TFDS disagree). The examples of each split
are therefore sorted by (SHA-256 of the image bytes, label). Results do not depend on where the data
came from, and every prefix of a split is a fair random sample of it.

Stratified splits are the exception: each class ends at a digest of its own there, so that the last
examples of the order are not a fair sample, nor are the first ones after them. Examples to evaluate
on are then sorted by a second digest (`sampling_order`).
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from typing import NamedTuple, Protocol

import numpy as np

from se_vae.config import ArgumentError


class DataError(ArgumentError):
  """A data set that cannot be had. The message says in one line what is wrong and what to do."""


class Examples(NamedTuple):
  """The examples of one split.

  Attributes:
    images: uint8 [N, H, W, C].
    labels: int32 [N].
  """

  images: np.ndarray
  labels: np.ndarray

  def take(self, rows: slice | np.ndarray) -> Examples:
    """Returns the examples in these rows, in the order of `rows`."""
    return Examples(self.images[rows], self.labels[rows])


class Contents(NamedTuple):
  """What a source holds: two splits, each in canonical order, without colours.

  Attributes:
    source: where the data came from, for people.
    num_classes: the number of classes; labels are in [0, num_classes).
    train: the training split.
    test: the test split.
    is_stratified: whether the two were split class by class, in canonical order.
  """

  source: str
  num_classes: int
  train: Examples
  test: Examples
  is_stratified: bool = False


class Source(Protocol):
  """A place that holds a data set. Making one checks quickly that the data is there."""

  def read(self, cache_dir: str | None) -> Contents:
    """Reads and decodes the data; may keep what it decoded in `cache_dir`."""
    ...


def list_directory(directory: str) -> list[str]:
  """Returns the names in a directory of data.

  Raises:
    DataError: if it is not a readable directory.
  """
  try:
    return os.listdir(directory)
  except (OSError, ValueError) as error:
    raise DataError(
      'data_dir',
      f'{directory!r} is not a readable directory; expected one with the four IDX files or a'
      ' prepared TFDS set',
    ) from error


def check_examples(
  images: np.ndarray, labels: np.ndarray, num_classes: int, where: str
) -> Examples:
  """Returns the examples of one split, with labels as int32.

  Args:
    images: uint8 [N, H, W, C].
    labels: integers [N].
    num_classes: the labels must be below it.
    where: the file or directory that an error names.

  Raises:
    DataError: if there are no images, not as many labels as images, or a label out of range.
  """
  if len(images) == 0 or len(images) != len(labels):
    raise DataError('data_dir', f'{where} has {len(images)} images but {len(labels)} labels')
  if labels.min() < 0 or labels.max() >= num_classes:
    raise DataError(
      'data_dir',
      f'{where} has labels from {labels.min()} to {labels.max()}, expected 0 to {num_classes - 1}',
    )
  return Examples(images, labels.astype(np.int32))


def sampling_order(images: np.ndarray) -> np.ndarray:
  """Returns the indices that sort images by a digest that is unrelated to `canonical_order`.

  Args:
    images: uint8 [N, H, W, C]. Coloured images are sorted as the gray ones that they come from.

  Returns:
    int64 [N], a permutation of range(N).
  """
  digests = [hashlib.sha256(b'sample' + x.tobytes()).digest() for x in images.max(-1)]
  return np.array(sorted(range(len(digests)), key=digests.__getitem__), np.int64)


def canonical_order(images: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """Returns the indices that sort examples by (SHA-256 of the image bytes, label).

  Args:
    images: uint8 [N, ...].
    labels: integers [N].

  Returns:
    int64 [N], a permutation of range(N).
  """
  keys = [
    (hashlib.sha256(x.tobytes()).digest(), int(y)) for x, y in zip(images, labels, strict=True)
  ]
  return np.array(sorted(range(len(keys)), key=keys.__getitem__), np.int64)


def reorder_in_place(array: np.ndarray, order: np.ndarray) -> None:
  """Sets `array[:] = array[order]` without a second array, cycle by cycle of the permutation."""
  done = np.zeros(len(order), bool)
  for start in range(len(order)):
    if done[start]:
      continue
    first, place = array[start].copy(), start
    while order[place] != start:
      array[place] = array[order[place]]
      done[place] = True
      place = order[place]
    array[place] = first
    done[place] = True


def split_off_a_sixth(count: int) -> tuple[slice, slice]:
  """Returns the rows to train on and the last sixth of `count` examples, which is held out.

  Raises:
    DataError: if there are fewer than six examples.
  """
  num_held_out = count // 6
  if num_held_out == 0:
    raise DataError('data_dir', f'{count} training examples are too few to hold out 1/6')
  return slice(None, -num_held_out), slice(-num_held_out, None)


def sha256(arrays: Mapping[str, np.ndarray]) -> str:
  """Returns the SHA-256 (hex) over the names, dtypes, shapes and values of arrays."""
  digest = hashlib.sha256()
  for name, array in sorted(arrays.items()):
    digest.update(f'{name} {array.dtype.str} {array.shape}\n'.encode())
    digest.update(np.ascontiguousarray(array).data)
  return digest.hexdigest()


def describe(error: BaseException) -> str:
  """Returns the type and the message of an error in one line."""
  text = ' '.join(str(error).split())[:200]
  return f'{type(error).__name__}: {text}' if text else type(error).__name__
