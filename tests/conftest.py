"""Strict settings for every test: fake devices, no silent broadcasting, warnings are errors."""

from __future__ import annotations

import gc
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import pytest

from experiments.cli import programs

jax.config.update('jax_platforms', 'cpu')
jax.config.update('jax_num_cpu_devices', 4)
jax.config.update('jax_numpy_rank_promotion', 'raise')

# Neither a test nor a binary that it starts reaches a server elsewhere: no proxy listens there.
os.environ |= dict.fromkeys(('HTTP_PROXY', 'HTTPS_PROXY'), 'http://127.0.0.1:9')
os.environ['NO_PROXY'] = 'localhost,127.0.0.1'

collect_ignore = ['tools/auto_lirpa.py']  # a script of PyTorch, which need not be there

os.environ['POT_BACKEND_DISABLE_PYTORCH'] = '1'  # or POT, an oracle, would load it


# What computes the paper's formulas and the attacks is tested as users compile it. All other tests
# compile without most optimisations, and take about three fifths of the time. On a processor
# without AVX-512, such a program rounded a loop over the members of a population in another way
# than a single run. Programs as users compile them did not.
OPTIMIZED = (
  'se_vae/attacks/',
  'se_vae/certification/',
  'se_vae/gaussians.py',
  'se_vae/matrix_functions.py',
  'se_vae/objectives/',
  'se_vae/wasserstein.py',
  'tests/attacks/',
  'tests/models/test_cpu_ops.py',
  'tests/objectives/',
  'tests/parallel/test_lowering.py',
  'tests/test_gaussians.py',
  'tests/test_matrix_functions.py',
  'tests/test_wasserstein',
  'tests/training/test_population.py::test_members_with_other_settings_are_their_single_runs',
)
# The files that take longest start first, so that no worker is left alone with one at the end.
LONGEST = (
  'tests/experiments/test_scheduling.py',
  'tests/attacks/test_attacks.py',
  'tests/experiments/test_ray.py',
  'tests/test_commands.py',
  'tests/objectives/test_certified.py',
  'tests/experiments/test_pipeline.py',
  'tests/parallel/test_lowering.py',
  'tests/test_docs.py',
  'tests/models/test_cpu_ops.py',
  'tests/experiments/test_faults.py',
  'tests/training/test_population.py',
  'tests/training/test_losses.py',
  'tests/experiments/test_population.py',
  'tests/parallel/test_processes.py',
  'tests/objectives/test_bounds.py',
  'tests/training/test_certified.py',
  'tests/experiments/test_benchmark.py',
  'tests/experiments/test_probe.py',
  'tests/training/test_loop.py',
)
# Of the slow tests those of this file, which kill, take as long as all others.
KILLS = 'tests/experiments/test_faults.py'


def pytest_configure(config: pytest.Config) -> None:
  config.addinivalue_line('filterwarnings', 'error')
  # Third-party modules that warn about themselves at import.
  config.addinivalue_line('filterwarnings', 'ignore::DeprecationWarning:tensorflow_datasets.*')
  config.option.loadscopereorder = False  # pytest-xdist keeps the order of the files
  if jax.__version_info__ < (0, 11) and not _is_soak(config):
    # Half of the time of JAX 0.10's compiler goes into this part. Newer ones are faster with it.
    os.environ['XLA_FLAGS'] = (
      f'--xla_cpu_use_fusion_emitters=false {os.environ.get("XLA_FLAGS", "")}'
    )
  _keep_what_is_compiled(config)
  gc.set_threshold(100_000)  # tracing makes many objects, and little of it is garbage
  config.pluginmanager.register(_Compilation())  # for the examples in docstrings too


def _is_soak(config: pytest.Config) -> bool:
  """Whether these are the slow tests, which run for minutes."""
  return bool(config.option.markexpr == 'slow')


def _keep_what_is_compiled(config: pytest.Config) -> None:
  """The workers and the binaries that they start share what they compile.

  The directory is that of JAX_COMPILATION_CACHE_DIR, where another run of the tests finds it too,
  or a temporary one. JAX does not write entries atomically, but it compresses them: a part of an
  entry, read too early or left by a killed binary, does not decompress. JAX warns and compiles.
  """
  directory = os.environ.get('JAX_COMPILATION_CACHE_DIR')
  if directory is None:  # this process starts the workers, if there are any
    directory = tempfile.mkdtemp(prefix='se_vae_tests_')
    config.add_cleanup(lambda: shutil.rmtree(directory, ignore_errors=True))
  for name, value in (
    ('jax_compilation_cache_dir', directory),
    ('jax_persistent_cache_min_compile_time_secs', 0.0),
  ):
    jax.config.update(name, value)
    os.environ[name.upper()] = str(value)
  warning = 'Error reading persistent compilation cache'
  config.addinivalue_line('filterwarnings', f'ignore:{warning}')
  os.environ['PYTHONWARNINGS'] = f'ignore:{warning}'


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
  """Optimised programs come first, since JAX forgets all programs where that changes."""
  longest = (KILLS, *LONGEST) if _is_soak(config) else LONGEST

  def place(item: pytest.Item) -> tuple[bool, int]:
    path = _path_of(item)
    rank = longest.index(path) if path in longest else len(longest)
    return not _is_optimized(item), rank

  items.sort(key=place)


def _path_of(item: pytest.Item) -> str:
  """From the root of the repository."""
  return item.path.relative_to(Path(__file__).parents[1]).as_posix()


def _is_optimized(item: pytest.Item) -> bool:
  return f'{_path_of(item)}::{item.name}'.startswith(OPTIMIZED)


class _Compilation:
  """Compiles the programs of a test, and of the binaries that it starts, as `OPTIMIZED` says."""

  @pytest.hookimpl(tryfirst=True)
  def pytest_runtest_setup(self, item: pytest.Item) -> None:
    disabled = not _is_optimized(item) and not _is_soak(item.config)
    if disabled != jax.config.read('jax_disable_most_optimizations'):
      jax.config.update('jax_disable_most_optimizations', disabled)
      os.environ['JAX_DISABLE_MOST_OPTIMIZATIONS'] = str(int(disabled))
      jax.clear_caches()  # they do not tell one kind of program from the other

  def pytest_runtest_teardown(self, item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """Between two files, since the tests of all files together have very many programs."""
    if nextitem is not None and nextitem.path != item.path:
      programs.forget_if_many(0.4)


@pytest.fixture(autouse=True, scope='module')
def dtype_promotion(request: pytest.FixtureRequest) -> Iterator[None]:
  """No silent promotion of dtypes, but where optax, which relies on it, takes part."""
  with jax.numpy_dtype_promotion(getattr(request.module, 'DTYPE_PROMOTION', 'strict')):
    yield


@pytest.fixture(scope='module')
def shallow() -> Iterator[Callable[..., Any]]:
  """Pretraining in the process of a test takes networks of one layer, which compile faster.

  No flag sets the number of layers: the paper has four. The value is the function that says so.
  """
  from experiments import pretrain

  arguments = pretrain.model_arguments
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(
      pretrain, 'model_arguments', lambda *given: {**arguments(*given), 'num_layers': 1}
    )
    yield arguments


@pytest.fixture
def mnist_dir() -> Path:
  """The four original MNIST files, where they are to be had."""
  default = Path(__file__).parents[2] / 'shared' / 'mnist'
  path = Path(os.environ.get('SE_VAE_MNIST_DIR', default))
  if not path.is_dir():
    pytest.skip('needs the MNIST files: set SE_VAE_MNIST_DIR')
  return path
