"""Colours, and squares of one size."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from se_vae import data


def test_colour_table_is_every_combination_but_black():
  assert {tuple(color) for color in data.COLORS} == {*itertools.product((0, 1), repeat=3)} - {
    (0, 0, 0)
  }


def test_colorize_refuses_what_it_would_broadcast():
  gray = np.ones((3, 2, 2, 1), np.uint8)
  data.colorize(gray, np.array([0, 3, 6]))
  for images, ids in (
    (gray.repeat(3, -1), [0, 1, 2]),
    (gray[..., 0], [0, 1, 2]),
    (gray.astype(np.float32), [0, 1, 2]),
    (gray, [0]),
    (gray, [0, 1, 7]),
    (gray, [0, 1, -1]),
  ):
    with pytest.raises(ValueError, match=r'colo|gray'):
      data.colorize(images, np.array(ids))


def test_the_central_square_of_an_image():
  image = np.zeros((6, 10, 3), np.uint8)
  image[1, 2] = (10, 20, 30)  # the square's columns are 2 to 7
  image[:, :2] = image[:, 8:] = 255
  np.testing.assert_array_equal(data.central_square(image, 6), image[:, 2:8])
  constant = np.full((9, 4, 1), 77, np.uint8)
  for size in (1, 3, 8):
    square = data.central_square(constant, size)
    assert square.shape == (size, size, 1) and (square == 77).all()
  # Averaged and not sampled: a chessboard becomes grey.
  chessboard = np.indices((32, 32)).sum(axis=0) % 2 * np.uint8(255)
  small = data.central_square(chessboard[..., None].astype(np.uint8), 4)
  assert np.abs(small.astype(int) - 127).max() < 10
