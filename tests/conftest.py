"""Strict settings for every test: fake devices, no silent broadcasting, warnings are errors."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import jax
import pytest

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Neither a test nor a binary that it starts reaches a server elsewhere: no proxy listens there.
os.environ |= dict.fromkeys(('HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9')
os.environ['NO_PROXY'] = 'localhost,127.0.0.1'


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line('filterwarnings', 'error')
  # Third-party modules that warn about themselves at import.
  config.addinivalue_line('filterwarnings', 'ignore::DeprecationWarning:tensorflow_datasets.*')
  _keep_what_is_compiled(config)


def _keep_what_is_compiled(config: pytest.Config) -> None:
  """Tests and the binaries that they start share programs: a third of the time goes into compiling.

  Each worker has a cache of its own, since JAX does not write entries atomically; for the same
  reason a test that kills a binary may leave a broken one.
  """
  directory = tempfile.mkdtemp(prefix='se_vae_tests_')
  config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
  for name, value in (
    ('jax_compilation_cache_dir', directory),
    ('jax_persistent_cache_min_compile_time_secs', 0.2),
  ):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
  config.addinivalue_line('filterwarnings', 'ignore:Error reading persistent compilation cache')


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
