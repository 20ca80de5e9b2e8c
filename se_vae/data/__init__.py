"""Data sets: MNIST and its relatives, embedded, from IDX files or from TFDS, in canonical order."""

from se_vae.data.loading import (
  COLORS,
  DataError,
  Dataset,
  Split,
  batch_indices,
  central_square,
  check,
  colorize,
  load,
  read_idx,
)

__all__ = [
  'COLORS',
  'DataError',
  'Dataset',
  'Split',
  'batch_indices',
  'central_square',
  'check',
  'colorize',
  'load',
  'read_idx',
]
