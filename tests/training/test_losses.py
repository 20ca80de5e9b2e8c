"""The table of objectives: each is its function of the model, and a user's function is one too."""

import collections
import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import gaussians, objectives, training, wasserstein
from se_vae.config import OBJECTIVES, SELECTION_DISTANCES, ArgumentError
from se_vae.parallel import sharding
from se_vae.training import losses, selection
from tests.training.small_runs import (
  BATCH,
  CONFIG,
  IMAGES,
  KEY,
  ROW,
  assert_close,
  assert_same,
  batch,
  drawn,
  jitted_step,
  run,
  start,
  tiny,
)

DTYPE_PROMOTION = 'standard'  # optax takes part
OTHERS = [name for name in OBJECTIVES if name not in ('vae', 'se')]
# Spread over devices in every run of the tests: loss and selection of the one need the whole batch,
# and those of the other the clusters of its examples.
SPREAD = ('contrastive', 'clusters')
MODEL = tiny()
PARAMS = drawn(MODEL)
X, X_ADV = batch(0), 1.0 - batch(0)
KEYS = jax.vmap(jax.random.fold_in, (None, 0))(KEY, jnp.arange(BATCH))


def config_for(objective, **changes):
  kind = {'tc_vae': {'kl_weight': 4.0}, 'lipschitz': {'jacobian_weight': 0.3}}.get(objective, {})
  return dataclasses.replace(CONFIG, objective=objective, gamma=2.0, **kind | changes)


jitted_loss = jax.jit(training.loss, static_argnums=0)
jitted_gradient = jax.jit(
  jax.value_and_grad(training.loss, argnums=2, has_aux=True), static_argnums=0
)


def means_of(model, params, config):
  return jitted_loss(model, config, params, KEY, X, X_ADV)[1]


def assert_means(metrics, terms):
  """The metrics are the batch means of terms `[B]`, which were computed one by one."""
  for name, values in terms.items():
    np.testing.assert_allclose(metrics[name], np.mean(values), rtol=1e-5, err_msg=name)


def test_the_table_has_every_name():
  assert tuple(losses.OBJECTIVES) == OBJECTIVES


@pytest.mark.parametrize('coupling', ['paper', 'balanced'])
def test_se_avae_and_avae_are_their_bounds(coupling):
  q_a, q_b = MODEL.encode(PARAMS, X), MODEL.encode(PARAMS, X_ADV)
  x_mean = MODEL.decode(PARAMS, gaussians.sample_each(q_a, KEYS))
  q_cycle = MODEL.encode(PARAMS, x_mean)
  numbers = {'gamma': 2.0, 'obs_var': CONFIG.obs_var}
  both = objectives.se_avae_elbo(X, x_mean, q_a, q_b, q_cycle, **numbers, coupling=coupling)
  metrics = means_of(MODEL, PARAMS, config_for('se_avae', coupling=coupling))
  assert_means(metrics, {**both._asdict(), 'loss': -both.elbo})
  assert_means(metrics, {'squared_w2': wasserstein.squared_w2(q_a, q_b)})
  alone = objectives.avae_elbo(X, x_mean, q_a, q_cycle, **numbers)
  assert_means(means_of(MODEL, PARAMS, config_for('avae')), alone._asdict())


def test_no_gradient_flows_through_the_decoded_image():
  """The decoder's gradient is that of the ELBO; the encoder's is another."""
  plain = jitted_gradient(MODEL, config_for('vae'), PARAMS, KEY, X)[1]
  cycle = jitted_gradient(MODEL, config_for('avae'), PARAMS, KEY, X)[1]
  assert_close(cycle['decoder'], plain['decoder'], rtol=1e-5)
  assert any(
    np.abs(a - b).max() > 0.01 * np.abs(b).max()
    for a, b in zip(*map(jax.tree.leaves, (cycle['encoder'], plain['encoder'])), strict=True)
  )


def test_the_tc_vae_weighs_the_total_correlation():
  q = MODEL.encode(PARAMS, X)
  z = gaussians.sample_each(q, KEYS)
  terms = objectives.tc_elbo(X, MODEL.decode(PARAMS, z), q, z, q, obs_var=CONFIG.obs_var)
  metrics = means_of(MODEL, PARAMS, config_for('tc_vae'))
  assert_means(metrics, {**terms._asdict(), 'loss': -terms.elbo + 3.0 * terms.total_correlation})


def test_the_lipschitz_penalty_estimates_the_jacobian_of_the_encoder_mean():
  """The mean over many keys is the squared norm, within four standard errors."""
  config = config_for('lipschitz')
  terms = jax.jit(lambda keys: losses.entry(config).terms(MODEL, PARAMS, keys, X, X))
  draws = [terms(jax.random.split(jax.random.key(i), BATCH)) for i in range(200)]
  norms = np.array([each['squared_jacobian_norm'] for each in draws])
  jacobian = jax.jit(jax.vmap(jax.jacobian(lambda x: MODEL.encode(PARAMS, x[None]).mean[0])))(X)
  exact = np.sum(np.square(jacobian), axis=(1, 2, 3, 4))
  assert (np.abs(norms.mean(0) - exact) < 4.0 * norms.std(0) / np.sqrt(200) + 1e-6 * exact).all()
  first = draws[0]
  expected = -first['elbo'] + 0.3 * first['squared_jacobian_norm']
  np.testing.assert_allclose(first['loss'], expected, rtol=1e-6)


def test_the_contrastive_loss_needs_no_decoder():
  config = config_for('contrastive')
  (_, metrics), gradient = jitted_gradient(MODEL, config, PARAMS, KEY, X, X_ADV)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient['decoder']))
  means = [np.asarray(MODEL.encode(PARAMS, images).mean) for images in (X, X_ADV)]
  unit = [mean / np.linalg.norm(mean, axis=1, keepdims=True) for mean in means]
  logits = unit[1] @ unit[0].T / config.temperature
  attacked = np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)
  assert_means(metrics, {'attacked_loss': attacked})
  assert metrics['loss'] == pytest.approx(metrics['clean_loss'] + metrics['attacked_loss'])
  view = np.asarray(MODEL.encode(PARAMS, selection.shifted(KEYS, X)).mean)
  logits = view / np.linalg.norm(view, axis=1, keepdims=True) @ unit[0].T / config.temperature
  clean = np.log(np.exp(logits).sum(axis=1)) - np.diag(logits)
  assert_means(metrics, {'clean_loss': clean})


def test_noise_is_of_the_given_size_and_none_is_no_change():
  def noisy(size):
    config = dataclasses.replace(CONFIG, objective='vae', encoder_noise=size)
    return selection.noisy(selection.Batch(MODEL, config, PARAMS, KEY, middle, jnp.arange(BATCH)))

  middle = jnp.full_like(X, 0.5)
  np.testing.assert_array_equal(noisy(0.0), middle)
  offset = np.asarray(noisy(0.25) - middle)
  assert np.abs(offset).max() <= 0.25
  # Uniform draws: the mean of their squares, and four of its standard errors.
  squares = (offset / 0.25) ** 2
  assert abs(squares.mean() - 1.0 / 3.0) < 4.0 * (4.0 / 45.0 / squares.size) ** 0.5


@pytest.mark.parametrize(
  ('changes', 'attacks'),
  [
    ({}, True),
    ({'selection': 'interval', 'certified_weight': 0.5}, True),
    ({'selection': 'interval', 'certified_share': 0.5}, True),
    ({'selection': 'interval'}, False),
    ({'selection': 'linear'}, False),
  ],
)
def test_nothing_is_attacked_where_only_certificates_count(changes, attacks):
  config = config_for('se', **changes)
  numbers = {'key': KEY, 'x': X, 'places': jnp.arange(BATCH)}
  found = selection.furthest_or_certified(selection.Batch(MODEL, config, PARAMS, **numbers))
  attacked = training.select(MODEL, config, PARAMS, KEY, X, MODEL.encode(PARAMS, X))
  assert (attacked != X).any()
  np.testing.assert_array_equal(found, attacked if attacks else X)


def test_the_noise_of_an_example_belongs_to_its_place_in_the_batch():
  config = dataclasses.replace(CONFIG, objective='vae', encoder_noise=0.3)
  places = jnp.arange(BATCH, dtype=jnp.int32)

  def noisy(some):
    return selection.noisy(selection.Batch(MODEL, config, PARAMS, KEY, X[some], places[some]))

  np.testing.assert_array_equal(noisy(slice(None))[4:], noisy(slice(4, None)))


def test_shifted_images_are_windows_of_padded_ones():
  """All 25 of them, each as often as the others."""
  image, count = np.asarray(X[0]), 2500
  keys = jax.random.split(KEY, count)
  moved = np.asarray(selection.shifted(keys, jnp.broadcast_to(image, (count, *image.shape))))
  padded = np.pad(image, ((2, 2), (2, 2), (0, 0)))
  height, width, _ = image.shape
  windows = {
    padded[top : top + height, left : left + width].tobytes(): (top, left)
    for top in range(5)
    for left in range(5)
  }
  assert len(windows) == 25
  found = collections.Counter(windows[one.tobytes()] for one in moved)
  expected = count / 25
  assert len(found) == 25
  assert all(abs(times - expected) < 4.0 * expected**0.5 for times in found.values())


def test_the_contrastive_view_is_in_the_ball_around_a_shifted_image():
  config = config_for('contrastive', radius=0.1)
  index = jnp.arange(BATCH)
  x_adv = selection.confused_view(selection.Batch(MODEL, config, PARAMS, KEY, X, index))
  view_key = jax.random.split(KEY)[0]
  view = selection.shifted(jax.vmap(jax.random.fold_in, (None, 0))(view_key, index), X)
  assert np.abs(x_adv - view).max() <= 0.1 + 1e-6 and 0.0 <= x_adv.min() <= x_adv.max() <= 1.0
  confusion = selection.Confusion(MODEL)
  means, temperature = MODEL.encode(PARAMS, X).mean, jnp.float32(0.5)
  before, after = (confusion(x, PARAMS, means, index, temperature) for x in (view, x_adv))
  assert (after > before).all()


def test_the_loss_of_clusters_is_a_softmax_of_cosines_with_the_axes():
  config = config_for('clusters', temperature=0.2)
  targets = jnp.arange(BATCH) % MODEL.latent_dim
  (loss, metrics), gradient = jitted_gradient(MODEL, config, PARAMS, KEY, X, X_ADV, targets=targets)
  means = np.asarray(MODEL.encode(PARAMS, X_ADV).mean)
  logits = means / np.linalg.norm(means, axis=1, keepdims=True) / 0.2
  right = logits[np.arange(BATCH), targets]
  cross_entropy = np.mean(np.log(np.exp(logits).sum(axis=1)) - right)
  np.testing.assert_allclose(metrics['cross_entropy'], cross_entropy, rtol=1e-5)
  squared_lengths = np.sum(means**2, axis=1) / MODEL.latent_dim
  np.testing.assert_allclose(loss, cross_entropy + np.mean((squared_lengths - 1.0) ** 2), rtol=1e-5)
  assert metrics['cluster_accuracy'] == np.mean(means.argmax(axis=1) == targets)
  largest = np.asarray(MODEL.encode(PARAMS, X).mean).argmax(axis=1)
  assert set(largest) == {0, 2}
  for cluster in range(MODEL.latent_dim):
    terms = losses.clusters(MODEL, PARAMS, KEYS, X, X, config, jnp.full(BATCH, cluster))
    np.testing.assert_array_equal(terms['cluster_accuracy'], largest == cluster)
  assert not any(np.any(leaf) for leaf in jax.tree.leaves(gradient['decoder']))


def test_misassigned_images_are_in_the_ball_and_have_a_larger_loss():
  config = config_for('clusters', radius=0.1, pgd_steps=8)
  targets = jnp.arange(BATCH) % MODEL.latent_dim
  numbers = (jnp.arange(BATCH), None, targets)
  x_adv = selection.misassigned(selection.Batch(MODEL, config, PARAMS, KEY, X, *numbers))
  assert np.abs(x_adv - X).max() <= 0.1 + 1e-6 and 0.0 <= x_adv.min() <= x_adv.max() <= 1.0
  clean, attacked = (
    jitted_loss(MODEL, config, PARAMS, KEY, X, x, targets=targets)[1]['cross_entropy']
    for x in (X, x_adv)
  )
  assert attacked > clean


@pytest.mark.long
def test_a_step_takes_the_clusters_of_its_examples():
  model, config = MODEL, config_for('clusters', pgd_steps=1)
  state = start(model, config)
  with pytest.raises(ArgumentError, match='targets, examples'):
    training.train_step(model, config, state, KEY, X)
  clustered = training.add_targets(state, model, config, IMAGES, 0)
  assert clustered.targets.shape == (len(IMAGES),)
  examples = jnp.arange(BATCH)[::-1]
  step = jitted_step()
  after, metrics = step(model, config, clustered, KEY, X, examples=examples)
  assert_same(after.targets, clustered.targets)
  moved = clustered._replace(targets=clustered.targets[examples])
  _, expected = step(model, config, moved, KEY, X, examples=jnp.arange(BATCH))
  np.testing.assert_allclose(metrics['loss'], expected['loss'], rtol=1e-6)
  other = clustered._replace(targets=(clustered.targets + 1) % model.latent_dim)
  assert step(model, config, other, KEY, X, examples=examples)[1]['loss'] != metrics['loss']


def test_other_objectives_have_no_targets():
  model, config = MODEL, config_for('vae')
  state = start(model, config)
  assert training.add_targets(state, model, config, IMAGES, 0) is state


def test_clusters_need_more_images_than_latents():
  model, config = MODEL, config_for('clusters')
  state = start(model, config)
  with pytest.raises(ArgumentError, match='latent_dim'):
    training.add_targets(state, model, config, IMAGES[: model.latent_dim], 0)


def test_clusters_are_found_of_fewer_images_than_neighbours():
  model, config = MODEL, config_for('clusters')
  images = np.concatenate([IMAGES] * 2)[: model.latent_dim + 1]
  state = start(model, config)
  targets = training.add_targets(state, model, config, images, 0).targets
  assert targets.shape == images.shape[:1] and targets.max() < model.latent_dim


@pytest.mark.long
@pytest.mark.parametrize(
  'name',
  [pytest.param(name, marks=() if name in SPREAD else pytest.mark.slow) for name in OTHERS],
)
def test_four_devices_train_as_one(name):
  """Also where the loss needs the whole batch."""
  model, config = MODEL, config_for(name, optimizer='sgd', learning_rate=1e-3)
  state = start(model, config)
  state = training.add_targets(state, model, config, IMAGES, 0)
  (one, alone), (four, spread) = (run(model, config, state, n, rows=1)[0] for n in (1, 4))
  # Sums in another order, through ten steps.
  assert_close(four.params, one.params, rtol=1e-4)
  for key, value in alone.items():
    np.testing.assert_allclose(spread[key], value, rtol=1e-4, atol=1e-5, err_msg=key)
  changed = [
    np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (one.params, state.params)), strict=True)
  ]
  assert any(changed)


@pytest.mark.parametrize(
  ('norm', 'distance'),
  [
    *(('linf', distance) for distance in SELECTION_DISTANCES),
    ('l2', 'squared_w2'),
    *(pytest.param('l2', other, marks=pytest.mark.slow) for other in SELECTION_DISTANCES[1:]),
  ],
)
def test_the_selection_maximises_the_chosen_distance_in_the_chosen_ball(distance, norm):
  config = config_for('se', selection_distance=distance, norm=norm, radius=0.3, pgd_steps=8)
  q_a = MODEL.encode(PARAMS, X)
  x_adv = training.select(MODEL, config, PARAMS, KEY, X, q_a)
  offset = np.asarray(x_adv - X).reshape(BATCH, -1)
  length = np.abs(offset).max(axis=1) if norm == 'linf' else np.linalg.norm(offset, axis=1)
  assert (length <= 0.3 * (1.0 + 1e-5)).all() and (length > 0.2).all()
  assert 0.0 <= x_adv.min() <= x_adv.max() <= 1.0
  written = {
    'squared_w2': lambda a, b: (a.mean - b.mean) ** 2 + (a.stddev - b.stddev) ** 2,
    'mean_distance': lambda a, b: (a.mean - b.mean) ** 2,
    'symmetric_kl': lambda a, b: (
      0.5 * (a.var / b.var + b.var / a.var + (a.mean - b.mean) ** 2 * (1 / a.var + 1 / b.var) - 2.0)
    ),
  }[distance]
  found = written(q_a, MODEL.encode(PARAMS, x_adv)).sum(axis=1)
  shift = training.EncodingShift(MODEL, distance)
  np.testing.assert_allclose(shift(x_adv, PARAMS, q_a), found, rtol=1e-4)
  rng = np.random.default_rng(0)
  for _ in range(5):  # random points of the ball are not nearly as far
    noise = rng.uniform(-1.0, 1.0, offset.shape)
    scale = np.abs(noise).max(1) if norm == 'linf' else np.linalg.norm(noise, axis=1)
    other = X + (0.3 * noise / scale[:, None]).reshape(X.shape).astype(np.float32)
    assert 2.0 * shift(jnp.clip(other, 0.0, 1.0), PARAMS, q_a).mean() < found.mean()


def test_an_unknown_distance_is_refused():
  with pytest.raises(ValueError, match='distance must be one of squared_w2'):
    training.EncodingShift(MODEL, 'w1')


# ---------------------------------------------------------------------------------------------
# A user's objective
# ---------------------------------------------------------------------------------------------


def mine(model, params, keys, x, x_adv):
  """The SE-ELBO by hand."""
  q_a, q_b = model.encode(params, x), model.encode(params, x_adv)
  x_mean = model.decode(params, gaussians.sample_each(q_a, keys))
  terms = objectives.se_elbo(x, x_mean, q_a, q_b, gamma=2.0, obs_var=0.1)
  return {'elbo': terms.elbo, 'cost': terms.transport_cost}


@pytest.mark.long
@pytest.mark.parametrize('num_devices', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_function_trains_like_the_objective_that_it_is(num_devices):
  model = MODEL
  changes = {'gamma': 2.0, 'num_steps': 12}
  mesh = sharding.data_mesh(num_devices)
  options = {'batch_size': BATCH, 'steps_per_row': ROW, 'mesh': mesh}
  named, named_rows = training.fit(model, dataclasses.replace(CONFIG, **changes), IMAGES, **options)
  own, own_rows = training.fit(
    model, dataclasses.replace(CONFIG, objective=mine, **changes), IMAGES, **options
  )
  assert_close(own, named, rtol=1e-4)  # other programs: rounding through Adam
  assert own_rows[-1].keys() == {'step', 'loss', 'elbo', 'cost', 'gradient_norm'}
  assert own_rows[-1]['loss'] == pytest.approx(named_rows[-1]['loss'], rel=1e-4)
  assert own_rows[-1]['cost'] == pytest.approx(named_rows[-1]['transport_cost'], rel=1e-3)


def test_a_functions_loss_is_minimised():
  config = dataclasses.replace(CONFIG, objective=lambda m, p, k, x, x_adv: {'loss': x[:, 0, 0, 0]})
  value, metrics = training.loss(MODEL, config, PARAMS, KEY, X)
  assert float(value) == float(metrics['loss']) == pytest.approx(float(X[:, 0, 0, 0].mean()))
  assert_same(metrics.keys(), {'loss'})


@pytest.mark.parametrize(
  ('terms', 'error', 'message'),
  [
    ({'bound': jnp.zeros(BATCH)}, TypeError, "a dict with 'loss' or 'elbo'"),
    (jnp.zeros(BATCH), TypeError, "a dict with 'loss' or 'elbo'"),
    ({'elbo': jnp.zeros(())}, AssertionError, r'elbo must be \[8\], got \(\)'),
    ({'loss': jnp.zeros(BATCH), 'kl': jnp.zeros((8, 3))}, AssertionError, r'kl must be \[8\]'),
  ],
)
def test_a_function_that_returns_something_else_is_refused(terms, error, message):
  config = dataclasses.replace(CONFIG, objective=lambda *_: terms)
  with pytest.raises(error, match=message):
    training.loss(MODEL, config, PARAMS, KEY, X)


def test_clusters_of_brightness_do_not_see_colours():
  model, config = MODEL, config_for('clusters', clusters_of='brightness')
  gray = np.random.default_rng(1).integers(1, 256, (40, 4, 4, 1)).astype(np.uint8)
  colors = np.eye(3, dtype=np.uint8)[np.arange(40) % 3][:, None, None]
  state = start(model, config)

  def clusters(images, **changes):
    return training.add_targets(
      state, model, dataclasses.replace(config, **changes), images, 0
    ).targets

  assert_same(clusters(gray * colors), clusters(gray, clusters_of='pixels'))
  by_pixels = clusters(gray * colors, clusters_of='pixels')
  assert np.any(by_pixels != clusters(gray * colors))


def test_the_signs_of_the_jacobian_penalty_do_not_depend_on_x64():
  config = config_for('lipschitz', jacobian_weight=30.0)
  expected = means_of(MODEL, PARAMS, config)
  with jax.enable_x64(True):
    found = means_of(MODEL, PARAMS, config)
  np.testing.assert_allclose(found['loss'], expected['loss'], rtol=1e-5)
