"""Further tasks of digits, computed from labels and images where a task is asked for.

`parity` says whether a digit is odd. `thickness` and `slant` are measured in the gray image, as in
Morpho-MNIST (Castro et al., 2019), whose slant has the same definition, and cut into three classes
of equal size, from thin to thick and from left to right.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np

from se_vae.data.datasets import Dataset, Split

DERIVED_TASKS = ('parity', 'thickness', 'slant')

# Variances of the row, in squared pixels, that are rounding: of images within one row, where they
# should be 0. A single gray pixel of 1 beside 100 x 100 white ones has 4e-7.
_LEAST_VARIANCE = 1e-9

# Images measured at a time, so that the memory does not grow with their number.
_CHUNK = 1024


def tasks_of(dataset: Dataset) -> tuple[str, ...]:
  """Returns the names of all tasks of a data set, those that are computed last."""
  own = tuple(task for task in dataset.num_classes if task not in DERIVED_TASKS)
  return (*own, *DERIVED_TASKS) if 'digit' in own else own


def with_task(dataset: Dataset, task: str) -> Dataset:
  """Returns the data set with the labels of a task; unchanged if it has them, or no such task.

  The digest stays: it is that of the images and labels from which the others follow. The limits of
  the classes of `thickness` and `slant` are the terciles of the training images.

  Args:
    dataset: of `load`.
    task: one of `tasks_of(dataset)`.
  """
  if task in dataset.num_classes or task not in tasks_of(dataset):
    return dataset
  splits = (dataset.train, dataset.test)
  if task == 'parity':
    num_classes, labels = 2, [split.labels['digit'] % 2 for split in splits]
  else:
    measure = {'thickness': thickness, 'slant': slant}[task]
    train, test = (measure(split.images) for split in splits)
    limits = np.quantile(train, (1 / 3, 2 / 3))
    num_classes = len(limits) + 1
    labels = [np.digitize(values, limits).astype(np.int32) for values in (train, test)]
  train_split, test_split = (
    Split(split.images, split.labels | {task: own})
    for split, own in zip(splits, labels, strict=True)
  )
  return dataclasses.replace(
    dataset,
    train=train_split,
    test=test_split,
    num_classes=dataset.num_classes | {task: num_classes},
  )


def thickness(images: np.ndarray) -> np.ndarray:
  """Returns the mean thickness of the strokes in pixels, twice the area over the perimeter.

  A stroke of width w and length L has the area w L, and a perimeter of 2 L besides its ends, so
  that w is twice their ratio. Gray pixels count in proportion: the area is the sum of the pixels in
  [0, 1], and the perimeter that of the lengths of the gradients in cells of 2 x 2 pixels. By the
  coarea formula this is the mean perimeter over all thresholds. A long bar of 2.5 pixels or more
  comes out right to 3 %, whatever its angle, and one of 2 pixels up to 12 % too thick.

  Example:
    >>> image = np.zeros((1, 28, 28, 1), np.uint8)
    >>> image[0, 4:24, 10:14] = 255  # 20 pixels long and 4 wide, so both ends take a sixth
    >>> print(thickness(image).round(1))
    [3.4]

  Args:
    images: uint8 `[N, H, W, C]`. Coloured images are measured as the gray ones they come from.

  Returns:
    float64 `[N]`; 0 for images without a stroke.
  """
  return _in_chunks(_thickness, images)


def slant(images: np.ndarray) -> np.ndarray:
  """Returns the angle in degrees by which a digit leans to the right.

  It is the angle of the horizontal shear that would make the second central moments upright: its
  tangent is minus the covariance of column and row over the variance of the row, with pixels as
  weights, as in Morpho-MNIST (Castro et al., 2019). A row is further down the larger it is.

  Example:
    >>> image = np.zeros((1, 28, 28, 1), np.uint8)
    >>> image[0, np.arange(5, 20), 24 - np.arange(5, 20)] = 255  # from bottom left to top right
    >>> print(slant(image).round(1))
    [45.]

  Args:
    images: uint8 `[N, H, W, C]`. Coloured images are measured as the gray ones they come from.

  Returns:
    float64 `[N]`, above -90 and below 90; 0 for images within one row.
  """
  return _in_chunks(_slant, images)


def _in_chunks(measure: Callable[[np.ndarray], np.ndarray], images: np.ndarray) -> np.ndarray:
  """Returns a measure of gray images in [0, 1], each with a border of a black pixel."""
  measured = [
    measure(np.pad(images[i : i + _CHUNK].max(axis=-1) / 255.0, ((0, 0), (1, 1), (1, 1))))
    for i in range(0, len(images), _CHUNK)
  ]
  return np.concatenate(measured)


def _thickness(x: np.ndarray) -> np.ndarray:
  across, down = np.diff(x, axis=2), np.diff(x, axis=1)
  across = 0.5 * (across[:, :-1] + across[:, 1:])
  down = 0.5 * (down[:, :, :-1] + down[:, :, 1:])
  perimeter = np.sqrt(across**2 + down**2).sum(axis=(1, 2))
  return _ratio(2.0 * x.sum(axis=(1, 2)), perimeter)


def _slant(x: np.ndarray) -> np.ndarray:
  rows, columns = np.arange(x.shape[1], dtype=x.dtype), np.arange(x.shape[2], dtype=x.dtype)
  mass, of_rows = x.sum(axis=(1, 2)), x.sum(axis=2)
  row, column = _ratio(of_rows @ rows, mass), _ratio(x.sum(axis=1) @ columns, mass)
  variance = _ratio(of_rows @ rows**2, mass) - row**2
  covariance = _ratio((x @ columns) @ rows, mass) - row * column
  variance = np.where(variance > _LEAST_VARIANCE, variance, 0.0)
  return np.degrees(np.arctan(-_ratio(covariance, variance)))


def _ratio(numerator: np.ndarray, denominator: np.ndarray) -> np.ndarray:
  """Returns the quotients, 0 where the denominator is 0."""
  return np.divide(numerator, denominator, out=np.zeros_like(numerator), where=denominator > 0.0)
