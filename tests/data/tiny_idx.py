"""Small IDX files, and what the tests of data share."""

from __future__ import annotations

import gzip
import hashlib
import pathlib
import re
import struct
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from se_vae import data

STEMS = ('train-images', 'train-labels', 't10k-images', 't10k-labels')
Arrays = dict[str, np.ndarray]


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


def examples(prefix: str = 'train') -> tuple[np.ndarray, np.ndarray]:
  arrays = tiny_arrays()
  return arrays[f'{prefix}-images'][..., None], arrays[f'{prefix}-labels']


def assert_raises(call: Callable[[], Any], *words: str) -> None:
  """The call must fail with one line that names arguments, no flags, and contains all the words."""
  with pytest.raises(data.DataError) as caught:
    call()
  message = str(caught.value)
  assert '\n' not in message
  assert re.match('[a-z_]+(, [a-z_]+)*: ', message) and '--' not in message
  for word in words:
    assert word in message


def splits(dataset: data.Dataset) -> tuple[data.Split, data.Split]:
  return dataset.train, dataset.test


def hashes(images: np.ndarray) -> list[bytes]:
  return [hashlib.sha256(image.tobytes()).digest() for image in images]
