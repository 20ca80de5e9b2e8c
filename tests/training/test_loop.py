"""Runs that are cut, resumed and spread out, and what they compile."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import data, training
from se_vae.config import ArgumentError
from se_vae.data.transforms import pixels
from se_vae.parallel import sharding
from tests.training.small_runs import (
  BATCH,
  CONFIG,
  IMAGES,
  KEY,
  ROW,
  TRACES,
  WARM,
  assert_close,
  assert_same,
  batch,
  drawn,
  indices_for,
  jitted_step,
  progress,
  run,
  start,
  tiny,
  whole_run,
)

DTYPE_PROMOTION = 'standard'  # optax takes part


def test_state_starts_at_step_zero():
  model = tiny()
  state = jax.eval_shape(lambda key: training.init_state(model, CONFIG, key), KEY)
  assert state.step.shape == () and state.step.dtype == jnp.int32
  assert jax.tree.structure(state.params) == jax.tree.structure(drawn(model))
  first = jax.jit(lambda: training.init_state(model, CONFIG, KEY))()
  assert first.step == 0
  assert np.abs(first.params['encoder']['params']['Dense_0']['kernel']).max() > 0.1
  assert all(np.all(leaf == 0) for leaf in jax.tree.leaves(first.opt_state))


def test_pixels_are_bytes_over_255():
  levels = np.arange(256, dtype=np.uint8)
  x = pixels(levels)
  assert x.dtype == jnp.float32
  assert x[0] == 0.0 and x[255] == 1.0
  np.testing.assert_allclose(x, levels / 255.0, rtol=1e-7)
  with pytest.raises(TypeError, match='uint8, 0 to 255, got float32'):
    pixels(x)  # they are in [0, 1] already


@pytest.mark.parametrize('objective', ['vae', 'se'])
def test_bound_increases(objective):
  elbos = [metrics['elbo'] for _, metrics in whole_run(objective)]
  assert elbos[-1] > elbos[0] + 3.0  # nats an image; the noise of a window is below one
  assert all(np.isfinite(elbos))


def test_rows_end_at_multiples_and_at_the_end():
  assert [int(state.step) for state, _ in whole_run()] == [10, 20, 30, 40, 47]


def test_a_run_resumed_after_any_dispatch_is_the_uninterrupted_run():
  """Bitwise, state and rows, at the end of a window and within one."""
  whole = whole_run()
  seen = list(progress(tiny(), CONFIG, start(tiny(), CONFIG), seconds=0.0))  # a step a dispatch
  assert [int(state.step) for state, _, _ in seen] == list(range(1, 48))
  assert [row for _, _, row in seen if row] == [row for _, row in whole]
  for state, window, _ in (seen[19], seen[22], seen[45]):
    resumed = run(tiny(), CONFIG, state, window=window)
    expected = [(s, row) for s, row in whole if s.step > state.step]
    assert len(resumed) == len(expected) > 0
    assert_same(resumed, expected)


def test_dispatches_take_about_as_long_as_asked():
  """The first is one step; the others as many as take so long, up to the end of the row."""
  steps = [int(s.step) for s, _, _ in progress(tiny(), CONFIG, start(tiny(), CONFIG))]
  assert steps == [1, 10, 20, 30, 40, 47]


def test_a_step_that_is_not_finite_is_named_with_its_batch():
  config = dataclasses.replace(CONFIG, learning_rate=1e30)
  with pytest.raises(training.NotFiniteError) as error:
    run(tiny(), config, start(tiny(), config))
  step = error.value.step
  assert 0 < step < 47
  assert f'step {step} is not finite' in str(error.value)
  assert not all(map(math.isfinite, error.value.metrics.values()))
  np.testing.assert_array_equal(error.value.examples, indices_for(step, 1)[0])


def test_fit_is_run_from_scratch():
  config = dataclasses.replace(CONFIG, objective='vae', num_steps=12)
  model = tiny()
  params, rows = training.fit(model, config, IMAGES, seed=3, batch_size=BATCH, steps_per_row=ROW)
  init_key, key, _ = jax.random.split(jax.random.key(3), 3)
  state = jax.jit(training.init_state, static_argnums=0)(model, config, init_key)
  outputs = training.run(
    training.TrainStep(model),
    state,
    (config, key),
    IMAGES,
    lambda step, count: data.batch_indices(3, step, count, BATCH, len(IMAGES)),
    num_steps=12,
    steps_per_row=ROW,
    mesh=sharding.data_mesh(1),
  )
  expected = [(int(state.step), row, state.params) for state, _, row in outputs if row]
  assert rows == [{'step': step, **row} for step, row, _ in expected]
  assert [row['step'] for row in rows] == [10, 12]
  assert_same(params, expected[-1][2])


@pytest.mark.long
def test_the_default_generator_changes_no_run():
  config = dataclasses.replace(CONFIG, objective='vae', num_steps=2)

  def fitted():
    return training.fit(tiny(), config, IMAGES, seed=3, batch_size=BATCH)[0]

  expected = fitted()
  with jax.default_prng_impl('rbg'):
    assert_same(fitted(), expected)


@pytest.mark.parametrize(
  ('arguments', 'message'),
  [
    ({'steps_per_row': 0}, 'steps_per_row: must be >= 1, got 0'),
    ({'steps_per_row': 2.5}, 'steps_per_row: must be an integer, got 2.5'),
    ({'batch_size': None}, 'batch_size: must be an integer, got None'),
    ({'batch_size': len(IMAGES) + 1}, 'batch_size: must be <= '),
    (
      {'batch_size': BATCH, 'mesh': sharding.population_mesh(1)},
      r"mesh: needs the axes \('data',\), got",
    ),
  ],
)
def test_fit_names_the_argument_that_is_wrong(arguments, message):
  with pytest.raises(ArgumentError, match=message):
    training.fit(tiny(), CONFIG, IMAGES, **arguments)


def test_finished_run_yields_nothing():
  assert run(tiny(), CONFIG, whole_run()[-1][0]) == []


def test_dispatch_is_its_steps_one_by_one():
  """The parameters after the last, shorter dispatch, and the window's metrics, its averages."""
  model, whole = tiny(), whole_run()
  state = jax.tree.map(jnp.asarray, whole[3][0])
  windows = []
  for step in range(40, 47):
    assert int(state.step) == step
    state, metrics = jitted_step()(model, CONFIG, state, KEY, batch(step))
    windows.append(metrics)
  # One program against seven, which the compiler fuses differently: 8e-7 here.
  assert_close(state, whole[4][0], rtol=2e-5)
  for name, value in whole[4][1].items():
    average = np.mean([metrics[name] for metrics in windows])
    np.testing.assert_allclose(value, average, rtol=1e-4, err_msg=name)


def test_metrics_are_named_and_consistent():
  common = {'loss', 'elbo', 'log_likelihood', 'squared_error', 'gradient_norm'}
  se = whole_run('se')[0][1]
  transport = {'log_prior_a', 'log_prior_b', 'transport_cost', 'normalized_elbo', 'squared_w2'}
  assert set(se) == common | transport
  total = se['log_likelihood'] + se['log_prior_a'] + se['log_prior_b'] - se['transport_cost']
  np.testing.assert_allclose(se['elbo'], total, rtol=1e-5)
  assert se['squared_w2'] > 0.0
  plain = whole_run('vae')[0][1]
  assert set(plain) == common | {'kl'}
  np.testing.assert_allclose(plain['elbo'], plain['log_likelihood'] - plain['kl'], rtol=1e-5)
  for metrics in (se, plain):
    np.testing.assert_allclose(metrics['loss'], -metrics['elbo'], rtol=1e-6)
    # log N(x; x_mean, v I), solved for the squared error.
    constant = -0.5 * 16 * math.log(2.0 * math.pi * CONFIG.obs_var)
    expected = 2.0 * CONFIG.obs_var * (constant - metrics['log_likelihood'])
    np.testing.assert_allclose(metrics['squared_error'], expected, rtol=1e-4)


def test_dispatches_of_any_length_share_one_compilation():
  run(tiny(), CONFIG, whole_run()[0][0], rows=1)
  before = len(TRACES)
  assert before > 0
  lengths = np.diff([int(s.step) for s, _, _ in progress(tiny(), CONFIG, whole_run()[0][0])])
  assert len(set(lengths.tolist())) > 2
  # Only the shapes of a window's metrics are found out anew, by one abstract step.
  assert len(TRACES) - before <= 3


@pytest.mark.long
def test_full_covariance_trains():
  config = dataclasses.replace(CONFIG, num_steps=30)
  windows = run(tiny(covariance='full'), config, start(tiny(covariance='full'), config))
  losses = [metrics['loss'] for _, metrics in windows]
  assert losses[2] < losses[1] < losses[0] - 1.0
  assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(windows[-1][0]))


@pytest.mark.long
@pytest.mark.parametrize(
  ('changes', 'config'),
  [
    ({}, CONFIG),
    ({}, WARM),
    pytest.param(
      {'arch': 'convnet'}, dataclasses.replace(CONFIG, objective='vae'), marks=pytest.mark.slow
    ),
  ],
)
def test_four_devices_train_as_one(changes, config):
  model = tiny(**changes)
  state = start(model, config)
  alone, spread = (run(model, config, state, devices, rows=2) for devices in (1, 4))
  assert int(spread[-1][0].step) == 20
  for (state, metrics), (expected, expected_metrics) in zip(spread, alone, strict=True):
    # The gradient's sum in another order: 1e-7 here, with room for 20 steps of Adam elsewhere.
    assert_close(state.params, expected.params, rtol=1e-4)
    if config.warm_start:  # the sign of a small gradient may turn, and an offset with it
      assert np.mean(state.offsets != expected.offsets) < 0.02
    for name, value in expected_metrics.items():
      np.testing.assert_allclose(metrics[name], value, rtol=1e-4, err_msg=name)


SWEPT = dataclasses.replace(CONFIG, num_steps=3, relative_step_size=1.0)


@pytest.mark.long
@pytest.mark.parametrize(
  ('changes', 'sweep'),
  [
    (
      {},
      (
        {'gamma': 3.0},
        {'obs_var': 0.3},
        {'radius': 0.1},
        {'learning_rate': 1e-3},
        {'relative_step_size': 0.5},
        {'num_steps': 4},
      ),
    ),
    (
      {'objective': 'vae', 'optimizer': 'sgd'},
      ({'kl_weight': 4.0}, {'encoder_noise': 0.1}, {'momentum': 0.5}),
    ),
    pytest.param({'objective': 'lipschitz'}, ({'jacobian_weight': 1.0},), marks=pytest.mark.slow),
    pytest.param({'objective': 'contrastive'}, ({'temperature': 0.1},), marks=pytest.mark.slow),
  ],
)
def test_a_sweep_over_numbers_compiles_once(changes, sweep):
  """Runs of `fit` that differ in numbers alone compile nothing after the first."""
  model, compiled = tiny(), []
  first = dataclasses.replace(SWEPT, **changes)
  fit = functools.partial(training.fit, model, images=IMAGES, batch_size=BATCH, steps_per_row=ROW)
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  )
  reference, _ = fit(first)
  assert compiled
  for change in sweep:
    del compiled[:]
    params, _ = fit(dataclasses.replace(first, **change))
    assert compiled == [], change
    differs = jax.tree.map(lambda a, b: np.any(a != b), params, reference)
    assert any(jax.tree.leaves(differs)), change
