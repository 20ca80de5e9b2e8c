"""Users who set `jax_enable_x64` get the same models and results, bit for bit."""

from __future__ import annotations

import jax
import numpy as np
import pytest

import se_vae
from se_vae import TrainConfig, attacks, training
from se_vae.evaluation.linear_probe import ProbedEncoder
from se_vae.parallel import sharding

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part

ARGUMENTS = {'image_shape': (4, 4, 1), 'latent_dim': 3, 'hidden_units': 4, 'num_layers': 1}


def train_probe_and_attack(workdir):
  """A tree of everything that is computed; the model goes through a checkpoint."""
  rng = np.random.default_rng(0)
  images, labels = rng.integers(0, 256, (12, 4, 4, 1)).astype(np.uint8), np.arange(12) % 3
  model, mesh = se_vae.make_vae(**ARGUMENTS), sharding.data_mesh(1)
  config = TrainConfig(num_steps=3, pgd_steps=2)
  trained, rows = se_vae.fit(model, config, images, batch_size=4, steps_per_row=3)
  if not (workdir / 'checkpoints').exists():
    se_vae.save_model(workdir, trained, **ARGUMENTS)
  model, params = se_vae.load_model(workdir)
  probe = se_vae.fit_probe(se_vae.encoder_means(model, params, images, mesh=mesh), labels, 3)
  x = (images / 255.0).astype(np.float32)
  result = se_vae.evaluate(
    ProbedEncoder(model),
    x,
    labels,
    args=(params, probe),
    radii=(0.1,),
    num_steps=3,
    check_examples=0,
    mesh=mesh,
  )
  square = attacks.square(
    se_vae.EncodingShift(model),
    jax.random.key(0),
    x,
    radius=0.1,
    num_queries=4,
    args=(params, model.encode(params, x)),
  )
  log = result.attack_log
  return trained, rows, params, probe, log.images, log.outputs, log.radius, square


def train_population(_):
  images = np.random.default_rng(0).integers(0, 256, (12, 4, 4, 1)).astype(np.uint8)
  configs = [TrainConfig(num_steps=3, pgd_steps=2)] * 2
  model = se_vae.make_vae(**ARGUMENTS)
  members = se_vae.fit_population(model, configs, images, seeds=[0, 1], batch_size=4)
  return [params for params, _ in members], members


@pytest.mark.parametrize(
  'compute', [train_probe_and_attack, pytest.param(train_population, marks=pytest.mark.slow)]
)
def test_x64_changes_nothing(tmp_path, compute):
  """The second one loads what the first one has saved."""
  narrow = compute(tmp_path)
  with jax.enable_x64(True):
    wide = compute(tmp_path)
  assert {leaf.dtype for leaf in jax.tree.leaves(wide[0])} == {np.dtype(np.float32)}
  assert jax.tree.structure(wide) == jax.tree.structure(narrow)
  for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
    np.testing.assert_array_equal(a, b, strict=isinstance(b, jax.Array))


def test_a_step_that_a_user_compiles_takes_numbers_of_64_bits():
  """`jit` makes Python's numbers so wide. A warning of JAX would be an error here."""
  model, config = se_vae.make_vae(**ARGUMENTS), TrainConfig(objective='vae', num_steps=3)
  x = np.random.default_rng(0).uniform(size=(4, 4, 4, 1)).astype(np.float32)

  def step():
    state = training.init_state(model, config, jax.random.key(0))
    take = jax.jit(training.train_step, static_argnames='model')
    return take(model, config, state, jax.random.key(1), x)[0]

  narrow = step()
  with jax.enable_x64(True):
    wide = step()
  for a, b in zip(jax.tree.leaves(wide), jax.tree.leaves(narrow), strict=True):
    assert a.dtype == b.dtype
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)
