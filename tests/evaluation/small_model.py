"""A small VAE with random parameters, shared by the tests of probes and metrics."""

from __future__ import annotations

import functools

import jax
import numpy as np

from se_vae.models import vae

SHAPE = (3, 4, 1)


@functools.cache
def model_and_params():
  model = vae.make_vae(SHAPE, latent_dim=2, hidden_units=5, num_layers=1)
  rng = np.random.default_rng(0)
  params = jax.tree.map(
    lambda leaf: (rng.normal(size=leaf.shape) / len(leaf) ** 0.5).astype(np.float32),
    jax.eval_shape(model.init, jax.random.key(0)),
  )
  return model, params
