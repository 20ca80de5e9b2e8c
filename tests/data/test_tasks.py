"""Further tasks of digits: drawn strokes of known thickness and slant, and classes by terciles."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import scipy.ndimage
import scipy.stats

from se_vae import data
from se_vae.data import tasks

FINE = 10  # points of a pixel's side, so that edges are drawn in gray


def drawn(inside) -> np.ndarray:
  """The points of which `inside(column, row)` is true, on 64 x 64 pixels, `[1, H, W, 1]`."""
  points = (np.arange(64 * FINE) + 0.5) / FINE - 32.0
  shares = inside(points[None], points[:, None]).reshape(64, FINE, 64, FINE).mean(axis=(1, 3))
  return (255.0 * shares).round().astype(np.uint8)[None, ..., None]


def bar(width: float, length: float, degrees: float) -> np.ndarray:
  """A bar that is turned to the right of the vertical."""
  cos, sin = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
  return drawn(
    lambda x, y: (np.abs(x * cos + y * sin) < width / 2) & (np.abs(x * sin - y * cos) < length / 2)
  )


@pytest.mark.parametrize('degrees', [0.0, 20.0, 45.0, 70.0, 90.0])
@pytest.mark.parametrize('width', [2.0, 2.5, 3.5, 6.0])
def test_the_thickness_of_a_bar_is_its_width(width, degrees):
  length = 48.0
  image = bar(width, length, degrees)
  expected = width * length / (width + length)  # the ends are part of the perimeter
  np.testing.assert_allclose(data.thickness(image), [expected], rtol=0.13 if width == 2.0 else 0.03)


def test_the_thickness_of_a_blurred_bar_is_the_same():
  image = bar(5.0, 48.0, 30.0)
  blurred = scipy.ndimage.uniform_filter(np.float64(image[0, ..., 0]), 3)
  blurred = blurred.round().astype(np.uint8)[None, ..., None]
  np.testing.assert_allclose(data.thickness(blurred), data.thickness(image), rtol=0.03)


def test_thickness_orders_digits_as_the_distance_to_the_background_does(digits):
  images = digits.test.images[:400]
  distances = []
  for image in images:
    stroke = scipy.ndimage.zoom(np.float64(image[..., 0]), 4, order=1) > 127
    distances.append(scipy.ndimage.distance_transform_edt(stroke)[stroke].mean())
  order = scipy.stats.spearmanr(distances, data.thickness(images)).statistic
  assert order > 0.95  # 1 for the same order


@pytest.mark.parametrize('degrees', [-50.0, -10.0, 0.0, 25.0, 60.0])
def test_the_slant_of_a_sheared_rectangle_is_the_angle(degrees):
  shear = np.tan(np.radians(degrees))
  image = drawn(lambda x, y: (np.abs(x + shear * y) < 4) & (np.abs(y) < 12))
  np.testing.assert_allclose(data.slant(image), [degrees], atol=0.2)


def test_an_image_within_one_row_has_no_slant():
  # Its moments are sums of gray values, which are rounded.
  images = np.zeros((26, 28, 28, 1), np.uint8)
  for row, image in enumerate(images, 1):
    image[row, 3:20, 0] = np.random.default_rng(row).integers(0, 255, 17)
  assert not data.slant(images).any()


def test_a_sheared_digit_has_that_much_more_slant(digits):
  images = digits.test.images[:50]
  wide = np.pad(images, ((0, 0), (0, 0), (40, 40), (0, 0)))
  sheared = np.stack([np.roll(wide[:, row], -row, axis=1) for row in range(28)], axis=1)
  before, after = (np.tan(np.radians(data.slant(each))) for each in (wide, sheared))
  np.testing.assert_allclose(after, before + 1.0, rtol=1e-9)
  mirrored = data.slant(images[:, :, ::-1])
  np.testing.assert_allclose(mirrored, -data.slant(images), atol=1e-9)


def test_measures_do_not_depend_on_place_color_or_company(digits, colored):
  images = digits.test.images[:20]
  for measure in (data.thickness, data.slant):
    own = measure(images)
    placed = np.pad(images, ((0, 0), (3, 0), (0, 5), (0, 0)))
    np.testing.assert_allclose(measure(placed), own, atol=1e-9)
    many = np.tile(images, (100, 1, 1, 1))
    np.testing.assert_allclose(measure(many), np.tile(own, 100), atol=1e-9)
    np.testing.assert_array_equal(measure(colored.test.images[:20]), own)
    np.testing.assert_array_equal(measure(np.zeros((2, 4, 4, 1), np.uint8)), [0.0, 0.0])
    assert np.isfinite(measure(np.full((1, 1, 5, 1), 255, np.uint8))).all()


@pytest.mark.parametrize('task', ['thickness', 'slant'])
@pytest.mark.parametrize('validation', [False, True])
def test_classes_are_terciles_of_the_training_images(task, validation):
  loaded = data.load('mnist_5k', validation=validation)
  dataset = data.with_task(loaded, task)
  assert dataset.num_classes == {'digit': 10, task: 3}
  counts = np.bincount(dataset.train.labels[task])
  assert len(counts) == 3 and np.ptp(counts) <= 1
  measure = getattr(data, task)
  train, test = measure(dataset.train.images), measure(dataset.test.images)
  limits = np.sort(train)[[counts[0], counts[0] + counts[1]]]
  for values, split in ((train, dataset.train), (test, dataset.test)):
    expected = np.sum(values[:, None] >= limits, axis=1)
    np.testing.assert_array_equal(split.labels[task], expected)
    assert split.labels[task].dtype == np.int32

  # The test images have no part in the limits.
  few = data.Split(loaded.test.images[:3], {'digit': loaded.test.labels['digit'][:3]})
  other = data.with_task(dataclasses.replace(loaded, test=few), task)
  np.testing.assert_array_equal(other.test.labels[task], dataset.test.labels[task][:3])


def test_parity_is_that_of_the_digit(colored):
  dataset = data.with_task(colored, 'parity')
  assert dataset.num_classes == {'digit': 10, 'color': 7, 'parity': 2}
  for split in (dataset.train, dataset.test):
    odd = np.isin(split.labels['digit'], (1, 3, 5, 7, 9))
    np.testing.assert_array_equal(split.labels['parity'], odd)


def test_the_data_set_is_otherwise_the_same_and_is_left_as_it_was(colored):
  before = dict(colored.num_classes), set(colored.train.labels)
  dataset = data.with_task(colored, 'parity')
  assert (dict(colored.num_classes), set(colored.train.labels)) == before
  assert dataset.digest == colored.digest and dataset.provenance() == colored.provenance()
  assert dataset.train.images is colored.train.images
  assert data.with_task(dataset, 'parity') is dataset
  assert data.tasks_of(dataset) == ('digit', 'color', 'parity', 'thickness', 'slant')


def test_what_nobody_asks_for_is_not_computed(monkeypatch):
  monkeypatch.setattr(tasks, '_in_chunks', lambda *_: pytest.fail('measured'))
  dataset = data.load('mnist_5k')
  assert data.with_task(dataset, 'digit') is dataset
  with pytest.raises(pytest.fail.Exception, match='measured'):
    data.with_task(dataset, 'slant')
  clothes = dataclasses.replace(dataset, num_classes={'label': 10})
  assert data.tasks_of(clothes) == ('label',)
  assert data.with_task(clothes, 'slant') is clothes
