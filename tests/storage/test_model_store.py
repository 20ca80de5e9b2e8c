"""Saved models: their own arguments and networks, runs, and runs of older code."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import data, training
from se_vae.config import ArgumentError
from se_vae.models import vae
from se_vae.storage import checkpoints, model_store
from se_vae.storage.checkpoints import CheckpointError
from tests.storage.small_trees import (
  MODEL,
  assert_one_line,
  assert_same,
  make_model,
  make_state,
)


def save_run(
  workdir: pathlib.Path, step: int = 1, metadata: Any = None
) -> tuple[vae.Params, pathlib.Path]:
  state = jax.tree.map(jnp.asarray, make_state())
  metadata = {'model': MODEL} if metadata is None else metadata
  return state.params, checkpoints.save(workdir / 'checkpoints', step, state, metadata)


@pytest.fixture(scope='module')
def params() -> vae.Params:
  return jax.jit(make_model().init)(jax.random.key(3))


@pytest.mark.parametrize('as_type', [str, pathlib.Path])
def test_load_model(tmp_path: pathlib.Path, as_type: type) -> None:
  params, _ = save_run(tmp_path)
  model, loaded = model_store.load_model(as_type(tmp_path))
  assert model == make_model()
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
  assert_same(jax.device_get(loaded), jax.device_get(params))
  x = jax.random.uniform(jax.random.key(1), (5, 4, 4, 1), jnp.float32)
  expected, actual = make_model().encode(params, x), model.encode(loaded, x)
  assert_same(jax.device_get(actual), jax.device_get(expected))


def test_load_model_passes_over_damage_with_a_warning(tmp_path: pathlib.Path) -> None:
  params, _ = save_run(tmp_path, 1)
  _, newest = save_run(tmp_path, 2)
  newest.write_bytes(b'')
  with pytest.warns(UserWarning, match='damaged'):
    _, loaded = model_store.load_model(tmp_path)
  assert_same(jax.device_get(loaded), jax.device_get(params))


def test_load_model_without_checkpoint(tmp_path: pathlib.Path) -> None:
  with pytest.raises(CheckpointError, match='there is no checkpoint'):
    model_store.load_model(tmp_path)


@pytest.mark.parametrize(
  'model, words',
  [
    (None, "KeyError 'model'"),
    ([1], 'describes no model'),
    (
      {'latent_dim': 2},
      "TypeError make_vae() missing 1 required positional argument: 'image_shape'",
    ),
    (MODEL | {'image_shape': 4}, 'ArgumentError image_shape: must be (H, W, C), got 4'),
    (MODEL | {'arch': 'transformer'}, 'transformer'),
    (MODEL | {'colour': 'red'}, 'colour'),
    (MODEL | {'latent_dim': '2'}, 'describes no model'),
    (MODEL | {'hidden_units': 4}, 'does not fit'),
    (MODEL | {'latent_dim': 2**31, 'covariance': 'full'}, 'latent_dim: must be <= 2147483647'),
    (MODEL | {'latent_dim': 2**30, 'covariance': 'full'}, ''),  # what is wrong depends on JAX
    (MODEL | {'num_layers': 2**31}, 'num_layers: must be <= 1000'),
    (MODEL | {'num_layers': 3}, 'is missing'),
    (MODEL | {'num_layers': 1}, 'is not in the template'),
  ],
)
def test_load_model_of_something_else(tmp_path: pathlib.Path, model: Any, words: Any) -> None:
  _, path = save_run(tmp_path, metadata={} if model is None else {'model': model})
  with pytest.raises(CheckpointError) as error:
    model_store.load_model(tmp_path)
  assert_one_line(error, path, words)


def test_save_model(tmp_path: pathlib.Path, params: vae.Params) -> None:
  arguments = dict(MODEL)
  for _ in range(2):
    path = model_store.save_model(tmp_path, params, **arguments)
    assert list((tmp_path / 'checkpoints').iterdir()) == [path]
  model, loaded = model_store.load_model(tmp_path)
  assert model == make_model()
  assert_same(jax.device_get(loaded), jax.device_get(params))


def test_numbers_of_numpy_are_saved(tmp_path: pathlib.Path, params: vae.Params) -> None:
  arguments = MODEL | {'latent_dim': np.int64(MODEL['latent_dim'])}
  model_store.save_model(tmp_path, params, **arguments)
  assert model_store.load_model(tmp_path)[0] == make_model()


def test_save_model_of_other_parameters(tmp_path: pathlib.Path, params: vae.Params) -> None:
  with pytest.raises(ValueError, match='are not those of make_vae'):
    model_store.save_model(tmp_path, params, **MODEL | {'latent_dim': 9})
  with pytest.raises(ValueError, match='arch: must be one of'):
    model_store.save_model(tmp_path, params, **MODEL | {'arch': 'transformer'})
  with pytest.raises(ValueError, match=r'make_vae does not take .*image_shape'):
    model_store.save_model(tmp_path, params, latent_dim=3)
  with pytest.raises(ValueError, match='num_layers: must be <= 1000'):
    model_store.save_model(tmp_path, params, **MODEL | {'num_layers': 2**31})
  for dtype, name in ((jnp.bfloat16, 'bfloat16'), (np.float64, 'float64')):
    other = jax.tree.map(lambda leaf, dtype=dtype: np.asarray(leaf).astype(dtype), params)
    with pytest.raises(ValueError, match=f'must be float32 or float16, got {name}'):
      model_store.save_model(tmp_path, other, **MODEL)
  assert list(tmp_path.iterdir()) == []


def test_networks_of_one_s_own_are_saved_and_handed_over(tmp_path: pathlib.Path) -> None:
  made = make_model()
  own = vae.VAE(made.encoder, made.decoder.clone(hidden=(7,)), made.image_shape, made.latent_dim)
  params = jax.jit(own.init)(jax.random.key(4))
  path = model_store.save_model(tmp_path, params)
  model, loaded = model_store.load_model(tmp_path, own)
  assert model is own
  assert_same(jax.device_get(loaded), jax.device_get(params))
  with pytest.raises(CheckpointError) as error:
    model_store.load_model(tmp_path)
  assert_one_line(error, path, 'networks of your own')
  with pytest.raises(CheckpointError, match='does not fit'):
    model_store.load_model(tmp_path, made)


def test_save_model_refuses_the_directory_of_a_run(
  tmp_path: pathlib.Path, params: vae.Params
) -> None:
  """Saving there would remove the checkpoints of the run."""
  for name in ('begun', 'trained'):
    workdir = tmp_path / name
    if name == 'begun':
      workdir.mkdir()
      (workdir / 'config.json').write_text('{}')
    else:
      save_run(workdir, step=1)
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob('*')}
    with pytest.raises(ArgumentError, match=r'workdir: .* holds a training run') as error:
      model_store.save_model(workdir, params, **MODEL)
    assert isinstance(error.value, ValueError) and error.value.arguments == ('workdir',)
    assert {path: path.stat().st_mtime_ns for path in workdir.rglob('*')} == before


# A run of version 0.2.0.dev0, before packages were laid out by concept

OLD = pathlib.Path(__file__).parent / 'old_checkpoint'


def test_an_old_checkpoint_gives_the_same_encodings() -> None:
  saved = model_store.load_saved(OLD)
  assert saved.model == vae.make_vae((28, 28, 1), latent_dim=2, hidden_units=4)
  assert saved.metadata['step'] == 3
  assert saved.metadata['config'] == json.loads((OLD / 'config.json').read_text())['config']
  dataset = data.load(saved.metadata['config']['dataset'])
  dataset.check_is_that_of(saved.metadata['data']['digest'])
  encoding = saved.model.encode(saved.params, data.pixels(dataset.test.images[[573, 241]]))
  # As the code that wrote it encoded them; they came first then. Sums in another order may round
  # differently.
  mean = [[0.00812502, 0.0004928], [0.00842403, 0.00060442]]
  log_var = [[-0.0097661, -0.01336694], [-0.01014025, -0.0139378]]
  np.testing.assert_allclose(encoding.mean, mean, rtol=1e-4, atol=1e-7)
  np.testing.assert_allclose(encoding.log_var, log_var, rtol=1e-4, atol=1e-7)


def test_an_old_checkpoint_is_restored_as_a_state_of_training() -> None:
  ((step, path),) = checkpoints.steps(OLD / 'checkpoints')
  checkpoint = checkpoints.load(path)
  config = training.TrainConfig(schedule='constant')
  model = vae.make_vae((28, 28, 1), latent_dim=2, hidden_units=4)
  template = jax.eval_shape(lambda: training.init_state(model, config, jax.random.key(0)))
  tensors = checkpoint.tensors.items()
  state = {name: value for name, value in tensors if not name.startswith('window/')}
  restored = checkpoint._replace(tensors=state).restore(template)
  assert restored.step == step == 3
  assert restored.opt_state[0].count == 3
