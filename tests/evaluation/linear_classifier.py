"""A linear encoder and probe whose adversarial accuracy has a closed form, for several tests."""

from __future__ import annotations

import functools

import numpy as np

from se_vae.evaluation import robustness
from se_vae.parallel import sharding

SHAPE = (4, 4, 1)
CLASSES = 3
COUNT = 48
RADII = (0.0, 0.02, 0.05, 0.1, 0.3)
SMALL = dict(radii=RADII, num_steps=10, num_queries=150, batch_size=16)


@functools.cache
def examples():
  """Images, labels that are mostly right, a linear encoder and a linear probe, in float32."""
  rng = np.random.default_rng(1)
  x = rng.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
  encoder = rng.normal(size=(16, 5)).astype(np.float32)
  probe = rng.normal(size=(5, CLASSES)).astype(np.float32)
  bias = (-0.5 * (encoder @ probe).sum(axis=0)).astype(np.float32)
  clean = np.argmax(x.reshape(COUNT, 16) @ encoder @ probe + bias, axis=1)
  labels = np.where(rng.uniform(size=COUNT) < 0.05, (clean + 1) % CLASSES, clean)
  return x, labels, (encoder, probe, bias)


def latents(x, encoder, probe, bias):
  return x.reshape(x.shape[0], -1) @ encoder


def linear(x, encoder, probe, bias):
  return latents(x, encoder, probe, bias) @ probe + bias[None]


def evaluate(logits_fn=linear, **options):
  x, labels, args = examples()
  options = {'args': args, 'mesh': sharding.data_mesh(1), **SMALL, **options}
  return robustness.evaluate(
    logits_fn, options.pop('x', x), options.pop('labels', labels), **options
  )


def closed_form():
  """Whether each example is robust at each radius, exactly: each pixel at its worst in the box."""
  x, labels, (encoder, probe, bias) = examples()
  x = np.float64(x.reshape(COUNT, 16))
  weights = np.float64(encoder) @ np.float64(probe)
  gap = np.empty((len(RADII), COUNT))
  for i, radius in enumerate(RADII):
    lowest, highest = np.maximum(x - radius, 0.0), np.minimum(x + radius, 1.0)
    for n in range(COUNT):
      towards = weights - weights[:, labels[n], None]
      worst = np.where(towards > 0.0, highest[n, :, None], lowest[n, :, None]) * towards
      margins = worst.sum(axis=0) + bias - bias[labels[n]]
      gap[i, n] = np.delete(margins, labels[n]).max()
  assert np.abs(gap).min() > 1e-4  # no example is decided by float32's rounding
  return gap < 0.0


def assert_legal(log, x):
  offset = np.abs(np.float64(log.images) - np.float64(x)).reshape(len(x), -1).max(axis=1)
  allowed = np.where(np.isfinite(log.radius), log.radius, 0.0)
  assert np.all(offset <= allowed + np.spacing(np.float32(1.0)))
  assert log.images.min() >= 0.0 and log.images.max() <= 1.0


def failed(result):
  return {check.number for check in result.checks if check.verdict == 'fail'}


def skipped(result):
  return {check.number for check in result.checks if check.verdict == 'skipped'}
