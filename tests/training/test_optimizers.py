"""Update rules and schedules against their formulas, and optimisers that a user hands in."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from se_vae import training
from se_vae.config import OPTIMIZERS, ArgumentError
from tests.training.small_runs import (
  BATCH,
  CONFIG,
  IMAGES,
  KEY,
  assert_close,
  assert_same,
  drawn,
  tiny,
)

DTYPE_PROMOTION = 'standard'  # optax takes part

RATE = 0.01


def updates_of(config: training.TrainConfig, gradients: list[float]) -> list[float]:
  """The updates that successive gradients of one parameter give."""
  optimizer = training.make_optimizer(config)
  params = jnp.zeros(())
  state = optimizer.init(params)
  found = []
  for gradient in gradients:
    update, state = optimizer.update(jnp.float32(gradient), state, params)
    found.append(float(update))
  return found


def config_of(optimizer: str, schedule: str, num_steps: int = 4) -> training.TrainConfig:
  return training.TrainConfig(
    optimizer=optimizer,
    schedule=schedule,
    num_steps=num_steps,
    learning_rate=RATE,
    momentum=0.8,
  )


def test_sgd_accumulates_momentum():
  found = updates_of(config_of('sgd', 'constant'), [2.0, -1.0, 3.0])
  velocities = [2.0, -1.0 + 0.8 * 2.0, 3.0 + 0.8 * (-1.0 + 0.8 * 2.0)]
  np.testing.assert_allclose(found, [-RATE * velocity for velocity in velocities], rtol=1e-6)


def test_adam_corrects_its_bias():
  """Kingma and Ba's rule with their constants, 0.9, 0.999 and 1e-8."""
  gradients = [2.0, -1.0, 0.5]
  first = second = 0.0
  expected = []
  for count, gradient in enumerate(gradients, start=1):
    first = 0.9 * first + 0.1 * gradient
    second = 0.999 * second + 0.001 * gradient**2
    corrected = first / (1.0 - 0.9**count), second / (1.0 - 0.999**count)
    expected.append(-RATE * corrected[0] / (math.sqrt(corrected[1]) + 1e-8))
  found = updates_of(config_of('adam', 'constant'), gradients)
  # 1 - 0.999^t in float32 keeps four digits.
  np.testing.assert_allclose(found, expected, rtol=1e-4)


@pytest.mark.parametrize('optimizer', OPTIMIZERS)
def test_cosine_scales_the_constant_rate_down_to_zero(optimizer):
  gradients = [1.0, 0.5, -2.0, 1.0, 1.0]
  constant = updates_of(config_of(optimizer, 'constant'), gradients)
  cosine = updates_of(config_of(optimizer, 'cosine'), gradients)
  scale = [0.5 * (1.0 + math.cos(math.pi * step / 4)) for step in range(5)]
  np.testing.assert_allclose(cosine, np.multiply(constant, scale), rtol=1e-5, atol=1e-9)
  assert cosine[4] == 0.0 and constant[4] != 0.0


@pytest.mark.parametrize(
  'change',
  [
    {'objective': 'beta'},
    {'optimizer': 'adagrad'},
    {'schedule': 'linear'},
    {'attack_dtype': 'int8'},
  ],
)
def test_unknown_choices_raise(change):
  name, value = next(iter(change.items()))
  with pytest.raises(ArgumentError, match=f'{name}: must be one of .* got {value!r}'):
    training.TrainConfig(**change)


def few_steps(**changes) -> training.TrainConfig:
  return dataclasses.replace(CONFIG, objective='vae', schedule='constant', num_steps=5, **changes)


def test_an_optimizer_that_keeps_parameters_keeps_those_that_it_starts_with():
  """At a tiny rate, schedule-free SGD stays near them."""
  model = tiny()
  given = drawn(model)
  after, _ = training.fit(
    model,
    few_steps(),
    IMAGES,
    batch_size=BATCH,
    params=given,
    optimizer=optax.contrib.schedule_free_sgd(1e-8),
  )
  assert_close(after, given, rtol=1e-4)


@pytest.mark.long
def test_fit_takes_an_optimizer_in_place_of_the_named_one():
  """Also with a schedule of its own; the settings' learning rate is then not used."""
  model = tiny()
  fit = functools.partial(training.fit, model, images=IMAGES, batch_size=BATCH)
  expected, _ = fit(few_steps(optimizer='sgd', learning_rate=1e-3, momentum=0.8))
  optimizer = optax.sgd(optax.constant_schedule(1e-3), momentum=0.8)
  found, _ = fit(few_steps(learning_rate=1e-9), optimizer=optimizer)
  assert_close(found, expected, rtol=1e-6)


@pytest.mark.long
def test_a_frozen_decoder_stays_whatever_the_optimizer():
  """AdamW decays weights whose gradient is zero, too."""
  model = tiny()
  before = drawn(model)
  after, _ = training.fit(
    model,
    few_steps(freeze_decoder=True),
    IMAGES,
    params=before,
    optimizer=optax.adamw(1e-2, weight_decay=0.1),
    batch_size=BATCH,
  )
  assert_same(after['decoder'], before['decoder'])
  changed = jax.tree.map(lambda a, b: np.any(a != b), after['encoder'], before['encoder'])
  assert all(jax.tree.leaves(changed))


@pytest.mark.parametrize('freeze_decoder', [False, True])
def test_the_optimizer_s_state_has_the_names_that_stored_runs_have(freeze_decoder):
  """Otherwise they could not be resumed."""
  model = tiny()
  config = dataclasses.replace(CONFIG, freeze_decoder=freeze_decoder)
  state = jax.eval_shape(lambda: training.init_state(model, config, KEY))
  names = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(state.opt_state)
  }
  params = {
    jax.tree_util.keystr(path, simple=True, separator='/')
    for path, _ in jax.tree_util.tree_leaves_with_path(state.params)
  }
  moments = {f'0/{moment}/{name}' for moment in ('mu', 'nu') for name in params}
  assert names == {'0/count', '1/count'} | moments
