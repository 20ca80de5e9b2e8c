"""Clusters of images, found without labels: spectral clustering of nearest neighbours."""

from __future__ import annotations

from typing import Any

import numpy as np

from se_vae.config import ArgumentError

# Neighbours are found in the space of this many principal components, which is much faster. Of
# images with more numbers than `_LARGE` the components are found by a randomised method, since the
# exact one takes the square of their number in memory, and its cube in time.
_COMPONENTS, _LARGE = 60, 4096

# K-means sees at most this many images, which are enough to find the centres, and takes the best of
# this many starts, which differ by several points of purity.
_SAMPLE, _STARTS = 10_000, 20


def spectral_clusters(
  images: np.ndarray, num_clusters: int, *, num_neighbors: int = 10, seed: int = 0
) -> np.ndarray:
  """Returns the cluster of each image, int32 `[N]` in [0, num_clusters).

  Two images are joined where one is among the nearest neighbours of the other, in Euclidean
  distance, and with twice the weight where each is among those of the other. The coordinates of an
  image are its entries in the leading eigenvectors of this graph's normalised adjacency matrix,
  scaled to length 1, and k-means finds their clusters (Ng et al., 2001).

  Example:
    >>> images = np.zeros((40, 2, 2, 1), np.uint8)
    >>> images[:, 0, 0] = np.arange(40)[:, None]
    >>> images[20:, 1, 1] = 255
    >>> clusters = spectral_clusters(images, 2, num_neighbors=3)
    >>> [len(set(clusters[half].tolist())) for half in (slice(20), slice(20, 40), slice(40))]
    [1, 1, 2]

  Args:
    images: `[N, ...]`, of any numbers.
    num_clusters: the number K of clusters, at least 2 and below N.
    num_neighbors: neighbours of each image, at least 1 and below N.
    seed: seed of k-means.

  Raises:
    ArgumentError: if a number is outside its range.
  """
  from sklearn.cluster import KMeans  # slow to import
  from sklearn.neighbors import NearestNeighbors

  for name, value, least in (
    ('num_clusters', num_clusters, 2),
    ('num_neighbors', num_neighbors, 1),
  ):
    if not least <= value < len(images):
      raise ArgumentError(
        name, f'must be >= {least} and below the number of images, {len(images)}; got {value}'
      )
  points = _principal_components(images)
  search = NearestNeighbors(n_neighbors=num_neighbors, algorithm='brute').fit(points)
  graph = search.kneighbors_graph()
  first = np.random.default_rng(seed).standard_normal(len(images))
  vectors = _leading_eigenvectors(graph + graph.T, num_clusters, first)
  lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
  coordinates = vectors / np.maximum(lengths, np.finfo(vectors.dtype).tiny)
  sample = coordinates[:: -(-len(images) // _SAMPLE)]
  k_means = KMeans(num_clusters, n_init=_STARTS, random_state=seed).fit(sample)
  return np.asarray(k_means.predict(coordinates), np.int32)


def _leading_eigenvectors(graph: Any, count: int, first: np.ndarray) -> np.ndarray:
  """Returns eigenvectors `[N, count]` of a graph's normalised adjacency matrix.

  Args:
    graph: weights of the edges, a sparse symmetric matrix `[N, N]`.
    count: how many.
    first: the vector `[N]` that the solver begins with.
  """
  import scipy.sparse.linalg  # slow to import
  from scipy import sparse

  roots = np.sqrt(np.asarray(graph.sum(axis=1)).ravel())
  adjacency = sparse.diags(1.0 / roots) @ graph @ sparse.diags(1.0 / roots)
  num_parts, part = sparse.csgraph.connected_components(graph, directed=False)
  if num_parts == 1:
    return np.asarray(scipy.sparse.linalg.eigsh(adjacency, k=count, tol=1e-3, v0=first)[1])
  # Each part has an eigenvector of its own with the eigenvalue 1, the largest. Of equal eigenvalues
  # the solver would find one, so it gets a matrix without these.
  largest = np.argsort(-np.bincount(part), kind='stable')[:count]
  known = (part[:, None] == largest) * roots[:, None]
  known /= np.linalg.norm(known, axis=0)
  if len(largest) == count:
    return known
  rest = scipy.sparse.linalg.LinearOperator(
    adjacency.shape, matvec=lambda x: adjacency @ x - known @ (known.T @ x), dtype=np.float64
  )
  options = {'k': count - num_parts, 'tol': 1e-3, 'v0': first}
  return np.hstack([known, scipy.sparse.linalg.eigsh(rest, **options)[1]])


def _principal_components(images: np.ndarray) -> np.ndarray:
  """Returns the leading principal components of the images, float32 `[N, D]`."""
  points = images.reshape(len(images), -1).astype(np.float32)
  points -= points.mean(axis=0)
  if points.shape[1] > _LARGE:
    from sklearn.decomposition import PCA  # slow to import

    method = PCA(min(_COMPONENTS, *points.shape), svd_solver='randomized', random_state=0)
    return np.ascontiguousarray(method.fit_transform(points))
  _, vectors = np.linalg.eigh(points.T @ points)
  return np.ascontiguousarray(points @ vectors[:, -_COMPONENTS:])
