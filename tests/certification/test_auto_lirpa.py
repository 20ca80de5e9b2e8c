"""Bounds are those of auto_LiRPA (Xu et al., 2020), which `tests/tools/auto_lirpa.py` stored."""

from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import certification as cert
from tests.oracles import in_float64

STORED = np.load(Path(__file__).with_name('auto_lirpa.npz'))


def in_64(values):
  """In float64, in which our slack for rounding is too small to matter."""
  return jnp.asarray(values, jnp.float64)


def network(name):
  layers = []
  for i in range(3):
    weights, bias = (in_64(STORED[f'{name}/{i}/{part}']) for part in ('weights', 'bias'))
    is_conv = weights.ndim == 4
    if not is_conv and name == 'convnet':
      layers.append(cert.Flatten())
    layers.append(cert.Conv(weights, bias, (2, 2)) if is_conv else cert.Dense(weights, bias))
    layers.append(cert.ReLU())
  return tuple(layers[:-1])


@pytest.mark.parametrize('method', ['ibp', 'crown_ibp', 'crown'])
@pytest.mark.parametrize('name', ['mlp', 'convnet'])
@in_float64
def test_bounds_agree_with_auto_lirpa(name, method):
  region = cert.ball(in_64(STORED[f'{name}/x']), float(STORED['radius']))
  box = cert.output_box(network(name), region, cert.Method(method))
  lower, upper = (STORED[f'{name}/{method}/{end}'] for end in ('lower', 'upper'))
  assert (upper - lower > 0.05).all()  # the units of these networks are alive
  # Ours are intersected with interval bounds, and may be tighter in the fifth digit here.
  np.testing.assert_allclose(box.lower, lower, atol=1e-4)
  np.testing.assert_allclose(box.upper, upper, atol=1e-4)
