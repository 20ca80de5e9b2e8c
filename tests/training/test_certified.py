"""Training on certified bounds: what they hold for, and that they become smaller."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import attacks, evaluation, training
from se_vae.certification import Method
from se_vae.config import ArgumentError
from se_vae.training import certified, losses, selection
from se_vae.training.step import at_step
from tests.training.small_runs import (
  BATCH,
  CONFIG,
  KEY,
  ROW,
  assert_close,
  batch,
  drawn,
  jitted_step,
  plain,
  run,
  start,
)

DTYPE_PROMOTION = 'standard'  # optax takes part
X = batch(0)
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(BATCH))
INTERVAL = dataclasses.replace(CONFIG, gamma=2.0, radius=0.05, selection='interval')
LINEAR = dataclasses.replace(INTERVAL, selection='linear')


def terms_of(config, x_adv, params=None):
  """Terms `[B]` of the objective, for given x'."""
  model = plain()
  params = drawn(model) if params is None else params
  return losses.entry(config).terms(model, params, KEYS, X, x_adv)


@pytest.mark.long
@pytest.mark.parametrize(
  ('norm', 'coupling'),
  [
    ('linf', 'paper'),
    ('l2', 'balanced'),
    pytest.param('linf', 'balanced', marks=pytest.mark.slow),
    pytest.param('l2', 'paper', marks=pytest.mark.slow),
  ],
)
def test_no_image_of_the_ball_has_a_smaller_bound(norm, coupling):
  """Neither random ones nor those that PGD selects, and the linear bound is the tighter one."""
  radius = {'linf': 0.05, 'l2': 0.3}[norm]
  change = {'norm': norm, 'coupling': coupling, 'radius': radius}
  interval, linear = (dataclasses.replace(config, **change) for config in (INTERVAL, LINEAR))
  model, params = plain(), drawn(plain())
  q_a = model.encode(params, X)
  images = [X, training.select(model, interval, params, KEY, X, q_a)]
  for i in range(5):
    noise = {'linf': 0.05, 'l2': 0.3 / 4.0}[norm]  # there are 4 x 4 pixels
    images.append(attacks.noise(jax.random.key(i), X, radius=noise))
  found = [terms_of(dataclasses.replace(interval, selection='pgd'), x)['elbo'] for x in images]
  lowest = np.min(found, axis=0)
  by_interval, by_line = (terms_of(config, X)['certified_elbo'] for config in (interval, linear))
  assert (by_interval <= by_line + 1e-4 * np.abs(by_line)).all()
  assert (by_line <= lowest + 1e-4 * np.abs(lowest)).all()
  assert np.mean(by_line - by_interval) > 0.01 * np.mean(lowest - by_interval)


def test_the_objective_is_the_weighted_mean_of_both_bounds():
  x_adv = jnp.clip(X + 0.05, 0.0, 1.0)
  plain = terms_of(dataclasses.replace(INTERVAL, selection='pgd'), x_adv)
  alone = terms_of(INTERVAL, x_adv)
  mixed = terms_of(dataclasses.replace(INTERVAL, certified_weight=0.25), x_adv)
  np.testing.assert_allclose(alone['elbo'], alone['certified_elbo'], rtol=1e-6)
  for name in plain.keys() - {'squared_w2', 'squared_error'}:
    expected = 0.75 * plain[name] + 0.25 * alone[name]
    np.testing.assert_allclose(mixed[name], expected, rtol=1e-5, atol=1e-4, err_msg=name)
  for name in ('squared_w2', 'squared_error', 'certified_elbo'):
    np.testing.assert_array_equal(mixed[name], alone[name])


def test_a_share_of_the_ball_lies_around_the_selected_image_inside_the_whole():
  config = dataclasses.replace(INTERVAL, radius=0.2, certified_radius=0.1, certified_share=0.25)
  x_adv = jnp.asarray(np.random.default_rng(0).uniform(X - 0.2, X + 0.2), jnp.float32)
  whole = certified.region(dataclasses.replace(config, certified_share=1.0), X, x_adv).box
  np.testing.assert_allclose(whole.lower, np.maximum(X - 0.1, 0.0), atol=1e-7)
  np.testing.assert_allclose(whole.upper, np.minimum(X + 0.1, 1.0), atol=1e-7)
  box = certified.region(config, X, x_adv).box
  assert (box.lower >= whole.lower - 1e-6).all() and (box.upper <= whole.upper + 1e-6).all()
  near = jnp.clip(x_adv, X - 0.075, X + 0.075)
  np.testing.assert_allclose(box.upper, jnp.minimum(near + 0.025, 1.0), atol=1e-6)
  np.testing.assert_allclose(box.lower, jnp.maximum(near - 0.025, 0.0), atol=1e-6)


def test_a_smaller_certified_radius_or_share_has_a_larger_bound():
  x_adv = jnp.clip(X + 0.05, 0.0, 1.0)
  whole = terms_of(INTERVAL, x_adv)['certified_elbo']
  for change in ({'certified_radius': 0.02}, {'certified_share': 0.5}):
    part = terms_of(dataclasses.replace(INTERVAL, **change), x_adv)['certified_elbo']
    assert (part > whole).all()


def test_radius_zero_is_the_bound_of_the_image_itself():
  config = dataclasses.replace(INTERVAL, radius=0.0)
  terms = terms_of(config, X)
  plain = terms_of(dataclasses.replace(config, selection='pgd'), X)
  np.testing.assert_allclose(terms['elbo'], plain['elbo'], rtol=1e-4)


@pytest.mark.long
def test_huge_bounds_leave_the_objective_and_its_gradient_finite():
  """At the beginning of a run, those of the log-variances would overflow as variances."""
  model = plain(num_layers=2)
  params = jax.tree.map(lambda leaf: 4.0 * leaf, drawn(model))
  box = evaluation.latent_box(
    model, params, np.asarray(X), radius=1.0, certifier=evaluation.Certifier(method=Method('ibp'))
  )
  assert box.log_var.upper.max() > 90.0  # exp(90) is infinite in float32
  value_and_gradient = jax.value_and_grad(training.loss, argnums=2, has_aux=True)
  (value, _), gradient = jax.jit(value_and_gradient, static_argnums=0)(
    model, dataclasses.replace(INTERVAL, radius=1.0), params, KEY, X
  )
  assert np.isfinite(value) and all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradient))


def test_there_is_an_attack_only_where_its_bound_has_a_weight():
  model, params = plain(), drawn(plain())

  def selected(**change):
    config = dataclasses.replace(INTERVAL, **change)
    inputs = selection.Batch(model, config, params, KEY, X, jnp.arange(BATCH))
    return losses.entry(config).select(inputs)

  np.testing.assert_array_equal(selected(), X)
  q_a = model.encode(params, X)
  expected = training.select(model, INTERVAL, params, KEY, X, q_a)
  for change in ({'certified_weight': 0.5}, {'certified_share': 0.5}):
    np.testing.assert_allclose(selected(**change), expected, atol=1e-6)
  assert np.abs(expected - X).max() > 0.04


@pytest.mark.long
@pytest.mark.parametrize(
  'config',
  [
    INTERVAL,
    pytest.param(dataclasses.replace(LINEAR, certified_weight=0.5), marks=pytest.mark.slow),
  ],
)
def test_four_devices_train_as_one(config):
  model = plain()
  state = start(model, config)
  (one, alone), (four, spread) = (run(model, config, state, n, rows=1)[0] for n in (1, 4))
  assert_close(four.params, one.params, rtol=1e-4)
  for key, value in alone.items():
    np.testing.assert_allclose(spread[key], value, rtol=1e-4, atol=1e-5, err_msg=key)


@pytest.mark.long
def test_training_makes_the_certified_shift_smaller():
  """And smaller than training on selected x' does, from the same weights."""
  model, params = plain(), drawn(plain())
  changes = {'gamma': 30.0, 'num_steps': 60}
  images = np.asarray(np.round(X * 255), np.uint8)
  shifts = []
  for config in (INTERVAL, dataclasses.replace(INTERVAL, selection='pgd')):
    config = dataclasses.replace(config, **changes)
    trained, _ = training.fit(
      model, config, images, batch_size=BATCH, steps_per_row=ROW, params=params
    )
    shifts.append(evaluation.certified_latent_shift(model, trained, np.asarray(X), radii=(0.05,)))
  before = evaluation.certified_latent_shift(model, params, np.asarray(X), radii=(0.05,))
  assert np.mean(shifts[0]) < 0.5 * np.mean(before)
  assert np.mean(shifts[0]) < np.mean(shifts[1])


def test_the_ramp_raises_gamma_and_radius_in_equal_steps_up_to_their_values():
  config = dataclasses.replace(INTERVAL, gamma=8.0, radius=0.4, ramp=0.5, num_steps=8)
  assert at_step(config, jnp.int32(0)).certified_radius is None
  config = dataclasses.replace(config, certified_radius=0.2)
  for step, share in ((0, 0.25), (1, 0.5), (3, 1.0), (7, 1.0)):
    now = at_step(config, jnp.int32(step))
    numbers = [now.gamma, now.radius, now.certified_radius]
    np.testing.assert_allclose(numbers, np.multiply([8.0, 0.4, 0.2], share), rtol=1e-6)
    assert (now.obs_var, now.objective) == (config.obs_var, config.objective)
  for step in (0, 5):
    now = at_step(dataclasses.replace(config, ramp=0.0), jnp.int32(step))
    assert (now.gamma, now.radius) == (8.0, jnp.float32(0.4))


def test_a_step_of_the_ramp_is_a_step_with_its_gamma_and_radius():
  model = plain()
  config = dataclasses.replace(CONFIG, gamma=8.0, radius=0.4, ramp=0.5, num_steps=8)
  state, step = start(model, config), jitted_step()
  ramped = step(model, config, state, KEY, X)
  fixed = step(model, dataclasses.replace(config, gamma=2.0, radius=0.1, ramp=0.0), state, KEY, X)
  for a, b in zip(*map(jax.tree.leaves, (ramped, fixed)), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'selection': 'interval', 'objective': 'vae'}, "selection: needs objective 'se'"),
    ({'certified_weight': 0.5}, "certified_weight: needs selection 'interval' or 'linear'"),
    ({'certified_radius': 0.1}, "certified_radius: needs selection 'interval' or 'linear'"),
    (
      {'selection': 'interval', 'norm': 'l2', 'certified_share': 0.5},
      "certified_share: needs norm 'linf'",
    ),
    ({'selection': 'box'}, 'selection: must be one of pgd, interval, linear'),
    ({'ramp': 1.5}, 'ramp: must be <= 1'),
    ({'ramp': 0.5, 'objective': 'vae'}, 'ramp: needs objective'),
    ({'selection': 'interval', 'certified_radius': 7.0}, 'certified_radius: must be <= 1 for norm'),
    ({'selection': 'interval', 'warm_start': True}, 'warm_start: needs a certified_weight'),
  ],
)
def test_wrong_settings_are_refused(change, message):
  with pytest.raises(ArgumentError, match=message):
    training.TrainConfig(**change)


def test_an_encoder_that_cannot_be_certified_is_named():
  model = plain(covariance='full')
  with pytest.raises(TypeError, match="cannot certify MLPEncoder with covariance='full'"):
    training.loss(model, INTERVAL, drawn(model), KEY, X)
