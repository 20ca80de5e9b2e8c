"""`supervised --certified_weight`: a loss over whole balls, which training makes small."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special

from experiments import records, supervised
from experiments.cli import flags, signals
from se_vae import attacks, certification, make_vae
from se_vae.attacks import losses
from se_vae.config import ArgumentError
from se_vae.evaluation.linear_probe import LinearProbe, ProbedEncoder
from se_vae.storage import json_files

DTYPE_PROMOTION = 'standard'  # optax takes part

SHAPE = (5, 4, 1)


@pytest.fixture(params=['mlp', 'convnet'], scope='module')
def classifier(request):
  """A model, the parameters of a classifier with its encoder, images and labels."""
  sizes = {'hidden_units': 12} if request.param == 'mlp' else {'conv_channels': 3}
  model = make_vae(SHAPE, arch=request.param, latent_dim=4, **sizes)
  rng = np.random.default_rng(0)
  probe = LinearProbe(*(jnp.asarray(rng.normal(size=size), jnp.float32) for size in ((4, 3), 3)))
  x = jnp.asarray(rng.uniform(size=(8, *SHAPE)), jnp.float32)
  return model, (jax.jit(model.init)(jax.random.key(1)), probe), x, jnp.arange(8) % 3


@pytest.mark.long
def test_the_layers_are_those_of_the_classifier(classifier):
  model, params, x, _ = classifier
  found = jax.jit(lambda params: certification.apply(supervised.layers_of(model, params), x))
  expected = jax.jit(ProbedEncoder(model))(x, *params)
  np.testing.assert_allclose(found(params), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.long
def test_the_loss_is_above_that_of_any_image_in_the_ball(classifier):
  model, params, x, labels = classifier
  objective, aim = losses.CrossEntropy(ProbedEncoder(model)), losses.Aim(labels)
  loss, certified_loss = jax.jit(objective), jax.jit(supervised.certified_loss, static_argnums=0)
  for radius in (0.01, 0.1):
    bound = certified_loss(model, params, x, labels, radius)
    x_adv = attacks.pgd(
      objective, jax.random.key(2), x, radius=radius, num_steps=10, args=(aim, *params)
    )
    rng = np.random.default_rng(3)
    corners = jnp.clip(x + radius * jnp.asarray(rng.choice([-1.0, 1.0], x.shape), x.dtype), 0, 1)
    for image in (x, x_adv, corners):
      assert np.all(bound >= loss(image, aim, *params))


def test_a_ball_of_one_image_has_its_loss(classifier):
  model, params, x, labels = classifier
  logits = np.float64(jax.jit(ProbedEncoder(model))(x, *params))
  expected = scipy.special.logsumexp(logits, axis=1) - logits[np.arange(8), labels]
  certified_loss = jax.jit(supervised.certified_loss, static_argnums=0)
  found = certified_loss(model, params, x, labels, 0.0)
  np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)  # rounding is counted


def config_of(workdir, **changes) -> supervised.SupervisedConfig:
  """Batches that are too small to be split over devices."""
  attack = '--certify --certify_method=ibp --radii=0,0.02 --num_examples=200 --pgd_steps=5'
  attack = f'{attack} --batch_size=25 --check_examples=0'
  values = {'workdir': str(workdir), 'probe': attack, 'hidden_units': 32, 'batch_size': 30}
  values |= {'latent_dim': 8, 'labels_per_class': 100, 'num_steps': 400, 'learning_rate': 5e-3}
  values |= {'radius': 0.05, 'pgd_steps': 1, 'growth': 0.8, 'checkpoint_every': 400}
  return flags.from_dict(supervised.SupervisedConfig, values | changes)


def certified_accuracy(workdir, weight) -> float:
  """Of a classifier that is trained with this weight, at radius 0.02."""
  result = supervised.run(config_of(workdir, certified_weight=weight), signals.StopSignal())
  assert result['certified']['method'] == 'ibp'
  assert np.all(np.array(result['certified']['accuracy']) <= result['accuracy'])
  assert result['accuracy'][0] > 0.4  # chance is a tenth
  json_files.read(workdir / 'result.json', records.Supervised)
  return result['certified']['accuracy'][1]


@pytest.mark.long
def test_training_on_the_bound_makes_certificates(tmp_path):
  assert certified_accuracy(tmp_path, 1.0) > 0.25


@pytest.mark.slow
def test_training_without_the_bound_makes_none(tmp_path):
  assert certified_accuracy(tmp_path, 0.0) < 0.05


@pytest.mark.long
def test_without_a_weight_no_bound_is_computed(tmp_path, monkeypatch):
  monkeypatch.setattr(supervised, 'certified_loss', lambda *_: pytest.fail('bounded'))
  probe = '--radii=0 --num_examples=25 --pgd_steps=5 --check_examples=0'
  config = config_of(tmp_path, num_steps=2, probe=probe)
  supervised.run(config, signals.StopSignal())
  config = config_of(tmp_path / 'other', num_steps=2, certified_weight=0.5)
  with pytest.raises(pytest.fail.Exception, match='bounded'):
    supervised.run(config, signals.StopSignal())


def test_what_cannot_be_bounded_is_refused_before_training(tmp_path):
  config = config_of(tmp_path / 'w', certified_weight=0.5, covariance='full', probe='')
  with pytest.raises(ArgumentError, match=r'certified_weight: cannot certify .* covariance'):
    supervised.run(config, signals.StopSignal())
  assert not (tmp_path / 'w').exists()
