"""The training step against one written by hand: selection, bound, gradient and noise."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from se_vae import gaussians, training, wasserstein
from se_vae.config import ATTACK_DTYPES, ArgumentError
from se_vae.models import vae
from tests.training.small_runs import (
  BATCH,
  CONFIG,
  IMAGES,
  KEY,
  SHAPE,
  WARM,
  assert_close,
  assert_same,
  batch,
  drawn,
  jitted_step,
  strictly,
  tiny,
)

DTYPE_PROMOTION = 'standard'  # optax takes part


def written_squared_w2(q_a, q_b):
  means = (q_a.mean - q_b.mean) ** 2
  deviations = (jnp.exp(q_a.log_var / 2.0) - jnp.exp(q_b.log_var / 2.0)) ** 2
  return jnp.sum(means + deviations, axis=-1)


def written_selection(model, config, params, key, x):
  """PGD as a Python loop: sign steps of 2.5 radius / L from a uniform start."""
  params, q_a = jax.lax.stop_gradient((params, model.encode(params, x)))
  moved = jax.grad(lambda x_adv: jnp.sum(written_squared_w2(q_a, model.encode(params, x_adv))))
  offsets = [
    jax.random.uniform(jax.random.fold_in(key, i), x.shape[1:], x.dtype, -1.0, 1.0)
    for i in range(len(x))
  ]
  x_adv = x + config.radius * jnp.stack(offsets)
  for i in range(config.pgd_steps + 1):
    if i:
      x_adv = x_adv + 2.5 * config.radius / config.pgd_steps * jnp.sign(moved(x_adv))
    x_adv = jnp.clip(jnp.clip(x_adv, x - config.radius, x + config.radius), 0.0, 1.0)
  return x_adv


def written_loss(params, model, config, x, noise, x_adv):
  """Minus the mean of Sec. 1's ELBO or of Sec. 6's SE-ELBO, as printed."""
  q_a = model.encode(params, x)
  mean_a, log_var_a = q_a.mean, q_a.log_var
  x_mean = model.decode(params, mean_a + jnp.exp(log_var_a / 2.0) * noise)
  v, num_pixels = config.obs_var, math.prod(SHAPE)
  log_likelihood = -jnp.sum((x - x_mean) ** 2, axis=(1, 2, 3)) / (2.0 * v)
  log_likelihood = log_likelihood - num_pixels / 2.0 * math.log(2.0 * math.pi * v)
  if config.objective == 'vae':
    kl = 0.5 * jnp.sum(jnp.exp(log_var_a) + mean_a**2 - 1.0 - log_var_a, axis=1)
    return -jnp.mean(log_likelihood - kl)
  q_b = model.encode(params, x_adv)
  mean_b, log_var_b = q_b.mean, q_b.log_var
  log_2pi = math.log(2.0 * math.pi)
  log_prior = [-0.5 * jnp.sum(q.mean**2 + jnp.exp(q.log_var) + log_2pi, axis=1) for q in (q_a, q_b)]
  var_a, var_b, gamma = jnp.exp(log_var_a), jnp.exp(log_var_b), config.gamma
  u = jnp.sqrt(1.0 + 4.0 * gamma**2 * var_a * var_b)
  cost = (
    gamma / 2.0 * ((mean_a - mean_b) ** 2 + var_a + var_b)
    - ((u - 1.0) - jnp.log(u + 1.0) + jnp.log(2.0 * var_a * var_b)) / 2.0
    - log_2pi
    - 1.0
  )
  return -jnp.mean(log_likelihood + log_prior[0] + log_prior[1] - jnp.sum(cost, axis=1))


@pytest.mark.parametrize('objective', ['vae', 'se'])
def test_step_is_the_step_written_by_hand(objective):
  """In float64, with the same keys: x' and the noise are constants of the gradient."""
  config = dataclasses.replace(
    CONFIG, objective=objective, gamma=1.7, radius=0.15, pgd_steps=2, schedule='constant'
  )
  model = tiny()
  with jax.enable_x64(True):
    params = drawn(model, np.float64)
    x = jnp.asarray(IMAGES[:3] / 255.0)
    optimizer = optax.adam(config.learning_rate)
    step = jnp.int32(11)
    state = training.TrainState(step, params, optimizer.init(params))
    actual, metrics = jitted_step()(model, config, state, KEY, x)

    @jax.jit
    def written_gradient(params, x):
      sample_key, select_key = jax.random.split(jax.random.fold_in(KEY, 11))
      noise = [
        jax.random.normal(jax.random.fold_in(sample_key, i), (3,), x.dtype) for i in range(len(x))
      ]
      x_adv = None
      if objective == 'se':
        x_adv = written_selection(model, config, params, select_key, x)
      return jax.value_and_grad(written_loss)(params, model, config, x, jnp.stack(noise), x_adv)

    value, gradients = written_gradient(params, x)
    updates, opt_state = optimizer.update(gradients, state.opt_state)
    expected = training.TrainState(step + 1, optax.apply_updates(params, updates), opt_state)
  # Float64's rounding, magnified a little by the quotients in Adam.
  assert_close(actual, expected, rtol=1e-9)
  np.testing.assert_allclose(metrics['loss'], value, rtol=1e-12)
  np.testing.assert_allclose(metrics['elbo'], -value, rtol=1e-12)
  norm = np.sqrt(sum(np.sum(np.square(leaf)) for leaf in jax.tree.leaves(gradients)))
  np.testing.assert_allclose(metrics['gradient_norm'], norm, rtol=1e-10)


@strictly
def test_se_elbo_leaves_the_gradient_of_the_decoder_unchanged():
  model, x = tiny(), batch(0)

  @jax.jit
  def gradients(params):
    configs = [dataclasses.replace(CONFIG, objective=name, gamma=3.0) for name in ('vae', 'se')]
    gradient = jax.grad(training.loss, argnums=2, has_aux=True)
    return [
      gradient(model, config, params, KEY, x, x if config.objective == 'vae' else 1.0 - x)[0]
      for config in configs
    ]

  by_vae, by_se = gradients(drawn(model))
  # The same operations, which the compiler may fuse differently.
  assert_close(by_se['decoder'], by_vae['decoder'], rtol=1e-5)
  changed = jax.tree.map(
    lambda a, b: np.abs(a - b).max() > 0.01 * np.abs(b).max(), by_se['encoder'], by_vae['encoder']
  )
  assert all(jax.tree.leaves(changed))


@strictly
def test_a_frozen_decoder_leaves_the_gradient_of_the_encoder_unchanged():
  model, x = tiny(), batch(0)
  gradient = jax.jit(jax.grad(training.loss, argnums=2, has_aux=True), static_argnums=0)
  config = dataclasses.replace(CONFIG, objective='vae')
  free, metrics = gradient(model, config, drawn(model), KEY, x)
  config = dataclasses.replace(config, freeze_decoder=True)
  frozen, frozen_metrics = gradient(model, config, drawn(model), KEY, x)
  # The same sums in two programs: rounding alone.
  assert_close(frozen['encoder'], free['encoder'], rtol=1e-5)
  assert_close(frozen_metrics, metrics, rtol=1e-5)
  assert all(np.any(leaf) for leaf in jax.tree.leaves(free['decoder']))
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(frozen['decoder']))


@strictly
def test_selection_moves_the_encoding_within_the_ball():
  model, x = tiny(), batch(0)

  @jax.jit
  def select(params, x, start):
    q_a = model.encode(params, x)
    x_adv = training.select(model, CONFIG, params, KEY, x, q_a)
    return x_adv, *(
      wasserstein.squared_w2(q_a, model.encode(params, images)) for images in (x_adv, start, x)
    )

  uniform = np.random.default_rng(0).uniform(-CONFIG.radius, CONFIG.radius, x.shape)
  start = np.clip(np.asarray(x) + uniform, 0.0, 1.0).astype(np.float32)
  x_adv, moved, moved_at_random, moved_by_none = select(drawn(model), x, start)
  offset = np.abs(np.asarray(x_adv, np.float64) - np.asarray(x, np.float64))
  assert offset.max() <= np.float32(CONFIG.radius) + np.spacing(np.float32(1.0))
  assert x_adv.min() >= 0.0 and x_adv.max() <= 1.0
  np.testing.assert_array_equal(moved_by_none, 0.0)
  assert (moved > 2.0 * moved_at_random).all() and (moved_at_random > 0.0).all()


@strictly
def test_no_gradient_flows_through_the_selection():
  model, x = tiny(), batch(0)

  def selected(params, x):
    return jnp.sum(training.select(model, CONFIG, params, KEY, x, model.encode(params, x)))

  for gradient in jax.jit(jax.grad(selected, argnums=(0, 1)))(drawn(model), x):
    assert_same(gradient, jax.tree.map(np.zeros_like, gradient))


@pytest.mark.long
def test_a_warm_start_goes_on_from_the_last_offset_of_the_same_example():
  """The store holds x' - x in 127ths of the radius; what other examples left there stays."""
  model = tiny()
  init = jax.jit(training.init_state, static_argnames=('model', 'num_examples'))
  state = init(model, WARM, KEY, num_examples=len(IMAGES))
  assert state.offsets.shape == (24, 16) and state.offsets.dtype == jnp.int8
  before = np.array(state.offsets, np.int64)
  assert before.min() < -100 and before.max() > 100
  examples = jnp.asarray([3, 17, 5])
  x = jnp.asarray(IMAGES[examples] / np.float32(255.0))
  after, _ = jitted_step()(model, WARM, state, KEY, x, examples=examples)
  start = x + WARM.radius * before[examples].reshape(x.shape).astype(np.float32) / 127.0
  q_a = model.encode(state.params, x)
  x_adv = training.select(model, WARM, state.params, KEY, x, q_a, start=start)
  offsets = np.asarray(x_adv - x, np.float64).reshape(3, 16)
  # Half a step of rounding, and float32's.
  assert np.abs(127.0 * offsets / WARM.radius - after.offsets[examples]).max() < 0.5 + 1e-3
  others = np.setdiff1d(np.arange(24), examples)
  np.testing.assert_array_equal(after.offsets[others], before[others])
  assert np.any(after.offsets[examples] != before[examples])


@pytest.mark.long
@strictly
@pytest.mark.parametrize('dtype', ATTACK_DTYPES)
def test_a_bfloat16_attack_selects_nearly_as_well(dtype):
  model, x, params = tiny(), batch(0), drawn(tiny())

  def moved(config):
    q_a = model.encode(params, x)
    x_adv = training.select(model, config, params, KEY, x, q_a)
    return x_adv, wasserstein.squared_w2(q_a, model.encode(params, x_adv))

  config = dataclasses.replace(CONFIG, attack_dtype=dtype)
  assert ('bf16[' in str(jax.make_jaxpr(lambda: moved(config))())) == (dtype == 'bfloat16')
  x_adv, found = jax.jit(lambda: moved(config))()
  assert x_adv.dtype == jnp.float32
  # Eight bits of gradient turn the sign of small entries alone.
  np.testing.assert_allclose(found.mean(), moved(CONFIG)[1].mean(), rtol=0.1)


# ---------------------------------------------------------------------------------------------
# Noise
# ---------------------------------------------------------------------------------------------


class StandardNormal(nn.Module):
  """q(z | x) = N(0, I) for every x."""

  def __call__(self, x):
    zeros = jnp.zeros((x.shape[0], 3))
    return gaussians.DiagonalGaussian(zeros, zeros)


class Latents(nn.Module):
  """Shows z as an image of three pixels."""

  def __call__(self, z):
    return z.reshape(-1, 1, 1, 3)


NOISE_MODEL = vae.VAE(StandardNormal(), Latents(), (1, 1, 3), 3)
NOISE_CONFIG = dataclasses.replace(CONFIG, objective='vae')
NO_PARAMS: dict[str, Any] = {'encoder': {}, 'decoder': {}}


def test_every_step_draws_its_own_noise():
  """The squared error of a black image is the square of the noise."""
  opt_state = training.make_optimizer(NOISE_CONFIG).init(NO_PARAMS)
  x = jnp.zeros((4, 1, 1, 3))

  def draw(step: int) -> float:
    state = training.TrainState(jnp.int32(step), NO_PARAMS, opt_state)
    return float(jitted_step()(NOISE_MODEL, NOISE_CONFIG, state, KEY, x)[1]['squared_error'])

  draws = [draw(step) for step in range(4)]
  assert draws == [draw(step) for step in range(4)]
  assert np.diff(np.sort(draws)).min() > 1e-2


def test_noise_belongs_to_a_place_in_the_batch():
  """Longer batches only add draws: example i has its own key, whatever the batch's size."""
  loss = jax.jit(training.loss, static_argnums=0)
  expected = 0.0
  for size in range(1, 4):
    noise = jax.random.normal(jax.random.fold_in(KEY, size - 1), (3,))
    expected += float(np.sum(np.square(noise)))
    _, metrics = loss(NOISE_MODEL, NOISE_CONFIG, NO_PARAMS, KEY, jnp.zeros((size, 1, 1, 3)))
    np.testing.assert_allclose(float(metrics['squared_error']) * size, expected, rtol=1e-5)


@strictly
def test_the_kl_weight_takes_beta_minus_one_times_the_kl_divergence_off_the_elbo():
  model, x = tiny(), jnp.asarray(IMAGES[:BATCH] / np.float32(255))
  params = drawn(model)
  plain, terms = training.loss(model, dataclasses.replace(CONFIG, objective='vae'), params, KEY, x)
  for beta in (0.0, 4.0):
    weighted, same = training.loss(
      model, dataclasses.replace(CONFIG, objective='vae', kl_weight=beta), params, KEY, x
    )
    by_hand = -(float(terms['log_likelihood']) - beta * float(terms['kl']))
    assert float(weighted) == pytest.approx(by_hand, rel=1e-6)
    assert float(same['elbo']) == float(terms['elbo']) == -float(plain)


@pytest.mark.long
def test_encoder_noise_is_uniform_in_the_box_and_clipped(monkeypatch):
  model, config = tiny(), dataclasses.replace(CONFIG, objective='vae', encoder_noise=0.3)
  seen = []

  def loss(model, config, params, key, x, x_adv, index, targets):
    seen.append(x_adv)
    return sum(jnp.sum(leaf) for leaf in jax.tree.leaves(params)), {}

  monkeypatch.setattr(training.step, 'loss', loss)
  x = jnp.asarray(IMAGES[:BATCH] / np.float32(255))
  nothing = optax.identity()  # in place of an optimiser
  for step in (0, 1):
    state = training.TrainState(jnp.int32(step), drawn(model), nothing.init(None))
    training.train_step(model, config, state, KEY, x, optimizer=nothing)
  offset = np.asarray(seen[0] - x)
  assert np.abs(offset).max() <= 0.3 + 1e-6 and 0.0 <= seen[0].min() <= seen[0].max() <= 1.0
  # 64 pixels are below 0.3: there the noise is never cut off above, and a half of it is positive.
  above = offset[np.asarray(x) < 0.3]
  assert 0.3 < (above > 0.0).mean() < 0.7 and above.max() > 0.25
  assert (np.asarray(seen[1]) != np.asarray(seen[0])).mean() > 0.5


@strictly
def test_noise_is_seen_by_the_encoder_and_not_by_the_likelihood():
  model, config = tiny(), dataclasses.replace(CONFIG, objective='vae', encoder_noise=0.3)
  params, x = drawn(model), jnp.asarray(IMAGES[:BATCH] / np.float32(255))
  noisy = jnp.clip(x + jnp.asarray(np.random.default_rng(2).uniform(-0.3, 0.3, x.shape), x.dtype))
  _, metrics = training.loss(model, config, params, KEY, x, noisy)
  q = model.encode(params, noisy)
  x_mean = model.decode(
    params,
    gaussians.sample_each(q, jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(BATCH))),
  )
  error = np.sum(np.square(np.asarray(x - x_mean, np.float64)), axis=(1, 2, 3))
  assert float(metrics['squared_error']) == pytest.approx(error.mean(), rel=1e-5)
  expected = gaussians.kl_to_standard_normal(q).mean()
  assert float(metrics['kl']) == pytest.approx(float(expected), rel=1e-5)


@pytest.mark.parametrize(
  ('change', 'objectives'),
  [
    ({'kl_weight': 2.0}, "'vae' or 'tc_vae'"),
    ({'encoder_noise': 0.1}, "'vae'"),
    ({'jacobian_weight': 1.0}, "'lipschitz'"),
    ({'temperature': 0.1}, "'contrastive'"),
    ({'objective': 'avae', 'coupling': 'balanced'}, "'se' or 'se_avae'"),
  ],
)
def test_a_setting_of_another_objective_raises(change, objectives):
  name = list(change)[-1]
  with pytest.raises(ArgumentError, match=f'{name}: needs objective {objectives}'):
    training.TrainConfig(**{'objective': 'se'} | change)


def test_a_radius_above_one_needs_the_l2_norm():
  assert training.TrainConfig(radius=3.0, norm='l2').radius == 3.0
  with pytest.raises(ArgumentError, match="radius: must be <= 1 for norm 'linf'"):
    training.TrainConfig(radius=3.0)


@pytest.mark.parametrize('change', [{'objective': 'vae'}, {'radius': 0.0}])
def test_a_warm_start_without_a_selection_raises(change):
  with pytest.raises(ArgumentError, match='warm_start: needs'):
    training.TrainConfig(warm_start=True, **change)


def test_a_warm_start_needs_the_size_of_the_training_set():
  with pytest.raises(ArgumentError, match='num_examples'):
    training.init_state(tiny(), WARM, KEY)
