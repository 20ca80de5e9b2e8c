"""Spectral clusters: against dense linear algebra, and on clusters that k-means cannot find."""

import numpy as np
import pytest
import scipy.sparse.linalg

from se_vae.config import ArgumentError
from se_vae.data import clusters, load, spectral_clusters


def rings(count=120):
  """Two rings, one inside the other, as images of 1 x 2 pixels, and the ring of each."""
  angles = np.linspace(0.0, 2.0 * np.pi, count, endpoint=False)
  circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
  return np.concatenate([circle, 5.0 * circle]).reshape(-1, 1, 2, 1), np.repeat([0, 1], count)


def test_rings_are_two_clusters():
  images, ring = rings()
  found = spectral_clusters(images, 2, num_neighbors=4)
  assert found.dtype == np.int32 and found.shape == ring.shape
  assert np.array_equal(found, ring) or np.array_equal(found, 1 - ring)


def test_the_coordinates_are_the_leading_eigenvectors(monkeypatch):
  """The vectors of ARPACK span what those of a dense solver do, of a graph made by brute force."""
  images = np.random.default_rng(0).normal(size=(60, 2, 2, 1))
  points = images.reshape(60, -1)
  squared = np.square(points[:, None] - points[None]).sum(axis=2)
  np.fill_diagonal(squared, np.inf)
  graph = np.zeros((60, 60))
  np.put_along_axis(graph, squared.argsort(axis=1)[:, :5], 1.0, axis=1)
  graph += graph.T
  scale = 1.0 / np.sqrt(graph.sum(axis=1))
  expected = np.linalg.eigh(scale[:, None] * graph * scale)[1][:, -4:]
  solve, used = scipy.sparse.linalg.eigsh, []
  monkeypatch.setattr(
    scipy.sparse.linalg, 'eigsh', lambda *args, **kw: used.append(solve(*args, **kw)) or used[0]
  )
  spectral_clusters(images, 4, num_neighbors=5)
  vectors = used[0][1]
  np.testing.assert_allclose(vectors @ vectors.T, expected @ expected.T, atol=2e-2)


@pytest.mark.parametrize('num_clusters', [3, 5, 7])
def test_groups_without_neighbours_in_others_are_not_mixed(num_clusters):
  rng = np.random.default_rng(0)
  images = np.concatenate([100.0 * k + rng.normal(size=(60, 2, 2, 1)) for k in range(5)])
  found = spectral_clusters(images, num_clusters, num_neighbors=10).reshape(5, 60)
  groups = [set(row.tolist()) for row in found]
  if num_clusters <= 5:  # a group is in one cluster
    assert all(len(group) == 1 for group in groups)
  else:  # a cluster is in one group
    assert sum(map(len, groups)) == num_clusters
  assert set.union(*groups) == set(range(num_clusters))


def test_components_of_large_images_keep_their_distances(monkeypatch):
  rng = np.random.default_rng(0)
  images = (rng.normal(size=(50, 8)) @ rng.normal(size=(8, 300))).reshape(50, 10, 10, 3)
  exact = clusters._principal_components(images)
  monkeypatch.setattr(clusters, '_LARGE', 299)
  found = clusters._principal_components(images)
  assert found.dtype == exact.dtype == np.float32
  gaps = [np.linalg.norm(points[:, None] - points, axis=2) for points in (found, exact)]
  np.testing.assert_allclose(*gaps, rtol=1e-3, atol=1e-2)


@pytest.mark.long
def test_clusters_of_digits_are_mostly_of_one_digit():
  split = load('mnist_5k').train
  found = spectral_clusters(split.images, 30)
  digits = split.labels['digit']
  most = [np.bincount(digits[found == k], minlength=10).max() for k in range(30)]
  assert set(found) == set(range(30))
  assert np.sum(most) > 0.85 * len(digits)


def test_large_sets_have_their_centres_from_a_sample(monkeypatch):
  monkeypatch.setattr(clusters, '_SAMPLE', 50)
  images, ring = rings()
  found = spectral_clusters(images, 2, num_neighbors=4)
  assert np.array_equal(found, ring) or np.array_equal(found, 1 - ring)
  np.testing.assert_array_equal(found, spectral_clusters(images, 2, num_neighbors=4))


@pytest.mark.parametrize(
  ('num_clusters', 'num_neighbors', 'name'),
  [(1, 3, 'num_clusters'), (20, 3, 'num_clusters'), (2, 0, 'num_neighbors'), (2, 20, 'num_neigh')],
)
def test_numbers_that_do_not_fit_the_set_are_refused(num_clusters, num_neighbors, name):
  with pytest.raises(ArgumentError, match=name):
    spectral_clusters(np.zeros((20, 2, 2, 1)), num_clusters, num_neighbors=num_neighbors)
