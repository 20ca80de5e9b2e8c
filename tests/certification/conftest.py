"""Most of the time of these tests goes into compiling."""

import jax
import pytest


@pytest.fixture(autouse=True, scope='module')
def quick_compilation():
  """The programs run for a moment only."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)
