"""Strict settings for every test: fake devices, no silent broadcasting, warnings are errors."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_rank_promotion', 'raise')


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line('filterwarnings', 'error')
  # Third-party modules that warn about themselves at import.
  config.addinivalue_line('filterwarnings', 'ignore::DeprecationWarning:tensorflow_datasets.*')


@pytest.fixture(autouse=True, scope='module')
def dtype_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
  """No silent promotion of dtypes, but where optax, which relies on it, takes part."""
  with jax.numpy_dtype_promotion(getattr(request.module, 'DTYPE_PROMOTION', 'strict')):
    yield


@pytest.fixture
def mnist_dir() -> Path:
  """The four original MNIST files, where they are to be had."""
  default = Path(__file__).parents[2] / 'shared' / 'mnist'
  path = Path(os.environ.get('SE_VAE_MNIST_DIR', default))
  if not path.is_dir():
    pytest.skip('needs the MNIST files: set SE_VAE_MNIST_DIR')
  return path
