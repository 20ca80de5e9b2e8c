"""Image folders: one subdirectory of PNG and JPEG files for each class."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from se_vae.data import cache
from se_vae.data.examples import (
  Contents,
  DataError,
  Examples,
  canonical_order,
  describe,
  reorder_in_place,
  split_off_a_sixth,
)
from se_vae.data.transforms import central_square

NAME = re.compile('folder:.+', re.DOTALL)
_SUFFIXES = ('.png', '.jpg', '.jpeg')
_GRAY_MODES = ('1', 'L', 'LA')
_MODES = (*_GRAY_MODES, 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr')  # of 8 bits a channel
# The number of images of a split that are compared before all are decoded.
_NUM_COMPARED = 10


@dataclasses.dataclass(frozen=True)
class ImageFolder:
  """A folder of images, checked as far as a few of them show.

  Attributes:
    argument: which named the folder, 'dataset' or 'data_dir'.
    directory: the folder.
    image_size: S, to take the central square of every image as S x S pixels; None takes them whole.
    classes: the names of the classes, in order.
    splits: 'train', and 'test' where the folder has both -> the paths, each with its class.
  """

  argument: str
  directory: Path
  image_size: int | None
  classes: Sequence[str]
  splits: Mapping[str, Sequence[tuple[Path, int]]]

  def __post_init__(self) -> None:
    if 'test' not in self.splits and (count := len(self.splits['train'])) < 6:
      message = f'{str(self.directory)!r} has {count} images, too few to hold out a sixth as test'
      raise DataError(self.argument, message)
    first = self._image(self.splits['train'][0][0])
    for files in self.splits.values():
      for path, _ in files[:: -(-len(files) // _NUM_COMPARED)]:
        self._image(path, first.shape)

  def read(self, cache_dir: str | None) -> Contents:
    """Decodes the images, or maps them from the cache."""
    size = '' if self.image_size is None else f'-{self.image_size}px'
    # A run may write its own files into the folder.
    files = [path for split in self.splits.values() for path, _ in split]
    arrays = cache.decode_once(self._decode, cache_dir, f'folder{size}', str(self.directory), files)
    splits = [Examples(arrays[f'{s}_images'], arrays[f'{s}_labels']) for s in self.splits]
    if len(splits) == 1:
      splits = [splits[0].take(rows) for rows in split_off_a_sixth(len(splits[0].images))]
    train, test = splits
    return Contents(f'images in {self.directory}{size}', len(self.classes), train, test)

  def _decode(self, allocate: cache.Allocate) -> cache.Arrays:
    """Returns images and labels of the splits, in canonical order."""
    arrays: cache.Arrays = {}
    shape = self._image(self.splits['train'][0][0]).shape
    for name, files in self.splits.items():
      images = allocate(f'{name}_images', (len(files), *shape))
      for row, (path, _) in enumerate(files):
        images[row] = self._image(path, shape)
      labels = np.array([label for _, label in files], np.int32)
      order = canonical_order(images, labels)
      reorder_in_place(images, order)
      arrays |= {f'{name}_images': images, f'{name}_labels': labels[order]}
    return arrays

  def _image(self, path: Path, shape: tuple[int, ...] | None = None) -> np.ndarray:
    """Returns one image, uint8 [H, W, C], which must have this shape; C is 1 for gray, or 3."""
    from PIL import Image, ImageOps  # slow to import

    try:
      with Image.open(path, formats=('PNG', 'JPEG')) as file:
        # Pillow reads 16 bits a channel of a colour image as 8, and only its raw mode shows this.
        if file.mode not in _MODES or any(';16' in str(tile[3]) for tile in file.tile):
          raise ValueError(f'it has not 8 bits a channel (mode {file.mode})')
        kind = 'L' if file.mode in _GRAY_MODES else 'RGB'
        pixels = np.asarray(ImageOps.exif_transpose(file).convert(kind))
    except Exception as error:  # Pillow raises errors of many types
      message = f'cannot read {str(path)!r}: {describe(error)}'
      raise DataError(self.argument, message) from error
    image = pixels.reshape(*pixels.shape[:2], -1)
    if self.image_size is not None:
      image = central_square(image, self.image_size)
    if image.shape != (shape or image.shape):
      raise DataError(
        (self.argument, 'image_size'),
        f'images differ, {shape} and {image.shape} ({str(path)!r}); choose one size for all, and'
        ' convert them to gray (1) or colour (3)',
      )
    return image


def open_folder(argument: str, directory: str, image_size: int | None) -> ImageFolder:
  """Opens an image folder, and checks what can be checked without decoding all images.

  Args:
    argument: which named the folder.
    directory: with one subdirectory for each class, or with such folders `train` and `test`.
    image_size: as in `ImageFolder`.

  Raises:
    DataError: if it has no images, something else among them, images that cannot be read, or images
      of several sizes or kinds.
  """
  root = Path(directory)
  try:
    halves = {split: root / split for split in ('train', 'test') if (root / split).is_dir()}
    roots = halves if len(halves) == 2 else {'train': root}
    files = {
      split: {place.name: _visible(place) for place in _visible(root) if place.is_dir()}
      for split, root in roots.items()
    }
  except (OSError, ValueError) as error:
    raise DataError(argument, f'cannot list {directory!r}: {describe(error)}') from error
  classes = [*files['train']]
  for split, by_class in files.items():
    if not by_class:
      wrong = f'{str(roots[split])!r} has no subdirectories; expected one for each class'
      raise DataError(argument, wrong)
    for name, paths in by_class.items():
      if name not in classes:
        raise DataError(argument, f'{directory!r} has test images of {name!r}, but none to train')
      if not paths:
        raise DataError(argument, f'{str(roots[split] / name)!r} has no images')
      for path in paths:
        if path.suffix.lower() not in _SUFFIXES:
          raise DataError(argument, f'{str(path)!r} is no PNG or JPEG file, as all must be there')
  splits = {
    split: [(path, classes.index(name)) for name in by_class for path in by_class[name]]
    for split, by_class in files.items()
  }
  return ImageFolder(argument, root, image_size, classes, splits)


def _visible(directory: Path) -> list[Path]:
  return sorted(path for path in directory.iterdir() if not path.name.startswith('.'))
