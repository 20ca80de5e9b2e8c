"""Small models, images and runs that the tests of training share."""

from __future__ import annotations

import dataclasses
import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np

from se_vae import training
from se_vae.models import vae
from se_vae.parallel import sharding

SHAPE = (4, 4, 1)
BATCH = 8
KEY = jax.random.key(5)
# 47 steps in dispatches of 10: the last is shorter.
STEPS, ROW = 47, 10
CONFIG = training.TrainConfig(pgd_steps=3, learning_rate=1e-2, num_steps=STEPS)
WARM = dataclasses.replace(CONFIG, warm_start=True, pgd_steps=1)

TRACES = []


def strictly(test):
  """Runs a test that calls no optimiser with strict promotion; put it under `parametrize`."""
  return jax.numpy_dtype_promotion('strict')(test)


class CountingVAE(vae.VAE):
  """Notes every trace of its encoder."""

  def encode(self, params, x):
    TRACES.append(x.shape)
    return super().encode(params, x)


def plain(**changes) -> vae.VAE:
  """One hidden layer, since most of the time of these tests is compilation."""
  options = dict(latent_dim=3, hidden_units=8, conv_channels=4, num_layers=1)
  return vae.make_vae(SHAPE, **options | changes)


def tiny(**changes) -> CountingVAE:
  """The same, which cannot be certified, since its `encode` is its own."""
  return CountingVAE(**vars(plain(**changes)))


def drawn(model: vae.VAE, dtype=np.float32):
  """Parameters drawn by NumPy, which is quicker than compiling the initialisers."""
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: jnp.asarray(rng.normal(size=leaf.shape) / len(leaf) ** 0.5, dtype),
    jax.eval_shape(model.init, jax.random.key(0)),
  )


def start(model: vae.VAE, config: training.TrainConfig) -> training.TrainState:
  """The state at step 0, with offsets of all images for a warm start."""
  params, offsets = drawn(model), None
  if config.warm_start:
    shape = (len(IMAGES), IMAGES[0].size)
    offsets = jnp.asarray(np.random.default_rng(2).integers(-127, 128, shape), jnp.int8)
  opt_state = training.make_optimizer(config).init(params)
  return training.TrainState(jnp.zeros((), jnp.int32), params, opt_state, offsets)


def stripes() -> np.ndarray:
  """24 images: noise on horizontal or vertical stripes, uint8."""
  rng = np.random.default_rng(1)
  pattern = np.where(np.arange(4) % 2, 200, 30)[:, None] * np.ones((1, 4))
  images = np.stack([pattern if i % 2 else pattern.T for i in range(24)])
  return (images + rng.integers(0, 30, images.shape))[..., None].astype(np.uint8)


IMAGES = stripes()


def indices_for(step: int, num_steps: int) -> np.ndarray:
  rows = [np.random.default_rng(s).integers(0, 24, BATCH) for s in range(step, step + num_steps)]
  return np.stack(rows).astype(np.int32)


def batch(step: int) -> jax.Array:
  return jnp.asarray(IMAGES[indices_for(step, 1)[0]] / np.float32(255.0))


def progress(model, config, state, num_devices: int = 1, window=None, seconds: float = 1e3):
  """What `training.run` yields, copied before it is donated."""
  outputs = training.run(
    training.TrainStep(model),
    state,
    (config, KEY),
    IMAGES,
    indices_for,
    num_steps=config.num_steps,
    steps_per_row=ROW,
    mesh=sharding.data_mesh(num_devices),
    window=window,
    seconds_per_dispatch=seconds,
  )
  for state, window, row in outputs:
    yield jax.tree.map(np.array, state), jax.tree.map(np.array, window), row


def run(model, config, state, num_devices: int = 1, rows: int | None = None, window=None):
  """The state and the metrics at the end of each window, or of the first few."""
  ends = ((s, row) for s, _, row in progress(model, config, state, num_devices, window) if row)
  return list(itertools.islice(ends, rows))


@functools.cache
def whole_run(objective: str = 'se'):
  """The uninterrupted run."""
  config = dataclasses.replace(CONFIG, objective=objective)
  return run(tiny(), config, start(tiny(), config))


@functools.cache
def jitted_step():
  return jax.jit(training.train_step, static_argnames='model')


def assert_same(actual, expected):
  jax.tree.map(np.testing.assert_array_equal, actual, expected)


def assert_close(actual, expected, rtol: float):
  """To `rtol` of the largest entry of each leaf."""

  def compare(actual, expected):
    scale = np.abs(expected).max()
    np.testing.assert_allclose(actual, expected, rtol=0.0, atol=rtol * scale + 1e-30)

  jax.tree.map(compare, actual, expected)
