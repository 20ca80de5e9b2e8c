"""Active latents, held-out bounds against NumPy, and the interval of an accuracy."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from se_vae.evaluation import metrics
from se_vae.models import vae
from se_vae.parallel import sharding
from tests.evaluation.small_model import SHAPE, model_and_params

KEY = jax.random.key(2)
OBS_VAR = 0.3
IMAGES = np.random.default_rng(1).integers(0, 256, (10, *SHAPE), np.uint8)


def held_out(images=IMAGES, num_devices: int = 1, **options):
  model, params = model_and_params()
  mesh = sharding.data_mesh(num_devices)
  return metrics.held_out(model, params, KEY, images, obs_var=OBS_VAR, mesh=mesh, **options)


def test_latents_that_vary_are_active():
  wave = np.where(np.arange(1000) % 2, 1.0, -1.0)  # of variance one
  means = np.stack([wave, 5.0 + 0.11 * wave, -3.0 + 0.09 * wave, np.full(1000, 7.0)], axis=1)
  assert metrics.active_latents(means) == 2
  assert metrics.active_latents(means[:, 2:]) == 0
  assert metrics.active_latents(means[:, :1].astype(np.float32)) == 1


def test_held_out_is_the_average_over_images():
  model, params = model_and_params()
  x = IMAGES / np.float32(255.0)
  q = model.encode(params, jnp.asarray(x))
  mean, log_var = (np.asarray(array, np.float64) for array in (q.mean, q.log_var))
  noise = np.stack(
    [jax.random.normal(jax.random.fold_in(KEY, i), (2,), jnp.float32) for i in range(len(IMAGES))]
  )
  z = mean + np.exp(log_var / 2.0) * noise
  decoded, reconstructed = (model.decode(params, jnp.asarray(at, jnp.float32)) for at in (z, mean))
  squares = np.sum((x - np.asarray(decoded)) ** 2, axis=(1, 2, 3))
  log_likelihood = -squares / (2.0 * OBS_VAR) - 12 / 2.0 * math.log(2.0 * math.pi * OBS_VAR)
  kl = 0.5 * np.sum(np.exp(log_var) + mean**2 - 1.0 - log_var, axis=1)
  expected = {
    'elbo': np.mean(log_likelihood - kl),
    'log_likelihood': np.mean(log_likelihood),
    'kl': np.mean(kl),
    'squared_error': np.mean(np.sum((x - np.asarray(reconstructed)) ** 2, axis=(1, 2, 3))),
  }
  actual = held_out()
  assert set(actual) == set(expected)
  for name, value in expected.items():
    np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=name)  # float32


@pytest.mark.parametrize(('num_devices', 'batch_size'), [(1, 3), (1, 1), (4, 4), (4, 500)])
def test_batches_and_devices_do_not_matter(num_devices, batch_size):
  whole = held_out()
  actual = held_out(num_devices=num_devices, batch_size=batch_size)
  for name, value in whole.items():
    np.testing.assert_allclose(actual[name], value, rtol=1e-5, err_msg=name)


def test_every_image_counts_once():
  """An average over 7 + 3 images is the average of the averages, weighted; here the kl's."""
  parts = held_out(IMAGES[:7], batch_size=3)['kl'], held_out(IMAGES[7:], batch_size=3)['kl']
  np.testing.assert_allclose(held_out()['kl'], np.average(parts, weights=[7, 3]), rtol=1e-5)


def test_compiles_once_for_all_batches():
  traces = []

  class CountingVAE(vae.VAE):
    def encode(self, params, x):
      traces.append(x.shape)
      return super().encode(params, x)

  model, params = model_and_params()
  metrics.held_out(
    CountingVAE(**vars(model)),
    params,
    KEY,
    IMAGES,
    obs_var=OBS_VAR,
    mesh=sharding.data_mesh(1),
    batch_size=4,
  )
  assert traces == [(4, *SHAPE)]


@pytest.mark.parametrize('confidence', [0.95, 0.99])
def test_interval_is_wilsons(confidence):
  correct = np.zeros((4, 40), bool)
  for row, count in zip(correct, (0, 7, 30, 40), strict=True):
    row[:count] = True
  result = metrics.AdversarialAccuracy(np.arange(4.0), correct)
  z = scipy.stats.norm.ppf(0.5 + confidence / 2.0)
  p, n = np.array([0.0, 0.175, 0.75, 1.0]), 40
  center = (p + z**2 / (2 * n)) / (1 + z**2 / n)
  half = z / (1 + z**2 / n) * np.sqrt(p * (1 - p) / n + z**2 / (4 * n**2))
  interval = result.interval(confidence)
  np.testing.assert_allclose(interval, np.stack([center - half, center + half], 1), atol=1e-12)
