"""Data sets: MNIST and its relatives, embedded, from IDX files or from TFDS, in canonical order.

Importing this package opens no file, imports no source of data and uses no JAX backend.
"""

from se_vae.data.batches import batch_indices, batch_stream
from se_vae.data.clusters import spectral_clusters
from se_vae.data.datasets import Dataset, Split, check, load
from se_vae.data.examples import DataError
from se_vae.data.few_labels import few_labels
from se_vae.data.mnist import read_idx
from se_vae.data.tasks import DERIVED_TASKS, slant, tasks_of, thickness, with_task
from se_vae.data.transforms import COLORS, central_square, colorize, pixels

__all__ = [
  'COLORS',
  'DERIVED_TASKS',
  'DataError',
  'Dataset',
  'Split',
  'batch_indices',
  'batch_stream',
  'central_square',
  'check',
  'colorize',
  'few_labels',
  'load',
  'pixels',
  'read_idx',
  'slant',
  'spectral_clusters',
  'tasks_of',
  'thickness',
  'with_task',
]
