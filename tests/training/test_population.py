"""Populations: each member is its single run, whatever the devices and the other members are."""

from __future__ import annotations

import dataclasses
import functools
import math

import jax
import numpy as np
import pytest

from se_vae import data, training
from se_vae.config import ArgumentError
from se_vae.parallel import sharding
from se_vae.training import loop
from tests.training.small_runs import (
  BATCH,
  CONFIG,
  IMAGES,
  ROW,
  assert_close,
  assert_same,
  drawn,
  tiny,
)

DTYPE_PROMOTION = 'standard'  # optax takes part

MODEL = tiny(num_layers=2)
BASE = dataclasses.replace(CONFIG, num_steps=23)
CONFIGS = [
  BASE,
  dataclasses.replace(BASE, gamma=5.0, radius=0.1),
  dataclasses.replace(BASE, learning_rate=3e-3, obs_var=0.2, num_steps=17),
]
SEEDS = [0, 1, 1]
DIVERGES = dataclasses.replace(BASE, learning_rate=1e30)
OPTIONS = {'batch_size': BATCH, 'steps_per_row': ROW}

fit = functools.partial(training.fit, images=IMAGES, **OPTIONS)
fit_population = functools.partial(training.fit_population, images=IMAGES, **OPTIONS)


@functools.cache
def singles(num_devices: int = 1):
  """What `fit` gives for each member."""
  mesh = sharding.data_mesh(num_devices)
  pairs = zip(CONFIGS, SEEDS, strict=True)
  return [jax.device_get(fit(MODEL, config, seed=seed, mesh=mesh)) for config, seed in pairs]


@pytest.mark.long
@pytest.mark.parametrize('num_groups', [None, pytest.param(1, marks=pytest.mark.slow), 2])
def test_members_of_a_loop_are_their_single_runs_bit_for_bit(num_groups):
  """Parameters and rows: three members on three devices, on one, and on two, one of which has one.

  The last member ends before the others.
  """
  mesh = None if num_groups is None else sharding.population_mesh(num_groups)
  assert_same(fit_population(MODEL, CONFIGS, seeds=SEEDS, mesh=mesh), singles())


@pytest.mark.long
@pytest.mark.parametrize(
  'settings',
  [{'warm_start': True, 'pgd_steps': 1}, {'optimizer': 'sgd', 'norm': 'l2', 'ramp': 0.5}],
)
def test_members_with_other_settings_are_their_single_runs(settings):
  found, expected = both(tiny(num_layers=1), settings)
  assert_same(found, expected)


@pytest.mark.slow
def test_convnets_agree_with_their_single_runs():
  """The compiler fuses the loop over members differently: 1e-7 here."""
  settings = {'objective': 'vae', 'encoder_noise': 0.1}
  found, expected = both(tiny(arch='convnet', num_layers=1), settings)
  assert_close(found, expected, rtol=1e-5)


def both(model, settings):
  """Two members on one device, and their single runs."""
  config = dataclasses.replace(BASE, num_steps=7, **settings)
  configs = [config, dataclasses.replace(config, learning_rate=1e-3)]
  found = fit_population(model, configs, seeds=[2, 3], mesh=sharding.population_mesh(1))
  expected = [fit(model, own, seed=seed) for own, seed in zip(configs, (2, 3), strict=True)]
  return found, jax.device_get(expected)


@pytest.mark.long
@pytest.mark.parametrize('num_groups', [1, pytest.param(2, marks=pytest.mark.slow)])
def test_members_at_once_agree_with_their_single_runs(num_groups):
  """Batched products are rounded differently: 4e-7 here, with room for 23 steps elsewhere."""
  mesh = sharding.population_mesh(num_groups)
  found = fit_population(MODEL, CONFIGS, seeds=SEEDS, mesh=mesh, vectorize='vmap')
  for (params, rows), (expected, expected_rows) in zip(found, singles(), strict=True):
    assert_close(params, expected, rtol=1e-4)
    assert [row['step'] for row in rows] == [row['step'] for row in expected_rows]
    for row, expected_row in zip(rows, expected_rows, strict=True):
      for name, value in expected_row.items():
        np.testing.assert_allclose(row[name], value, rtol=1e-4, err_msg=name)


@pytest.mark.long
def test_members_whose_batches_are_split_agree_with_their_single_runs_on_as_many_devices():
  found = fit_population(MODEL, CONFIGS, seeds=SEEDS, mesh=sharding.population_mesh(2, 2))
  assert_close(found, singles(2), rtol=1e-4)


@pytest.mark.long
def test_members_can_start_with_given_parameters():
  model, config = tiny(), dataclasses.replace(BASE, num_steps=3, freeze_decoder=True)
  params = jax.device_get(drawn(model))
  first, second = fit_population(model, [config] * 2, seeds=[0, 1], params=params)
  assert_same(first, jax.device_get(fit(model, config, seed=0, params=params)))
  assert_same([first[0]['decoder'], second[0]['decoder']], [params['decoder']] * 2)
  trees = (params, first[0], second[0])
  assert len({tree['encoder']['params']['Dense_0']['kernel'].tobytes() for tree in trees}) == 3


@pytest.mark.long
def test_one_program_serves_all_numbers():
  model, compiled = MODEL, []
  configs = [dataclasses.replace(config, num_steps=3) for config in CONFIGS]
  fit_population(model, configs, seeds=[0, 1, 2])
  jax.monitoring.register_event_duration_secs_listener(
    lambda event, *_, **__: compiled.append(event) if 'backend_compile' in event else None
  )
  others = [dataclasses.replace(config, gamma=2.0, num_steps=4) for config in configs]
  fit_population(model, others, seeds=[3, 4, 5])
  assert compiled == []


def yielded(start: training.PopulationProgress | None = None, seconds: float = 1e3):
  """What `run_population` yields, in host memory, from the start or from another's members."""
  firsts = [
    training.first_state(MODEL, config, seed, num_examples=len(IMAGES))
    for config, seed in zip(CONFIGS, SEEDS, strict=True)
  ]
  states, windows = [jax.device_get(state) for state, *_ in firsts], None
  if start is not None:
    states, windows, _ = zip(*start.members(), strict=True)
  for progress in training.run_population(
    training.TrainStep(MODEL),
    states,
    [(config, key) for config, (_, key, _) in zip(CONFIGS, firsts, strict=True)],
    IMAGES,
    [data.batch_stream(seed, BATCH, len(IMAGES)) for seed in SEEDS],
    num_steps=[config.num_steps for config in CONFIGS],
    steps_per_row=ROW,
    steps_per_checkpoint=8,
    windows=windows,
    mesh=sharding.population_mesh(2),
    seconds_per_dispatch=seconds,
  ):
    yield progress._replace(states=jax.tree.map(np.array, progress.states))


@pytest.mark.long
def test_dispatches_end_at_rows_checkpoints_and_last_steps():
  assert [progress.step for progress in yielded()] == [1, 8, 10, 16, 17, 20, 23]


def test_a_population_resumed_after_any_dispatch_is_the_uninterrupted_one():
  whole = list(yielded())
  by_step = {progress.step: progress for progress in yielded(seconds=0.0)}
  assert list(by_step) == list(range(1, 24))
  for step in (8, 13):
    resumed = list(yielded(by_step[step]))
    expected = [progress for progress in whole if any(progress.rows) and progress.step > step]
    assert [p.rows for p in resumed if any(p.rows)] == [p.rows for p in expected]
    assert_same(resumed[-1].members(), whole[-1].members())


def test_a_member_that_has_ended_keeps_its_state():
  last = list(yielded())[-1].members()
  assert [int(member.state.step) for member in last] == [23, 23, 17]
  assert [member.row is None for member in last] == [False, False, True]
  params = [member.state.params for member in last]
  assert_same(params, [params for params, _ in singles()])


def test_a_member_that_is_not_finite_is_named():
  with pytest.raises(training.NotFiniteError) as error:
    fit_population(MODEL, [BASE, DIVERGES, BASE], seeds=[4, 1, 5])
  with pytest.raises(training.NotFiniteError) as single:
    fit(MODEL, DIVERGES, seed=1)
  assert str(error.value) == f'member 1 (seed 1): {single.value}'
  assert error.value.member == 'member 1 (seed 1)' and single.value.member == ''
  assert error.value.step == single.value.step > 0
  assert not all(map(math.isfinite, error.value.metrics.values()))
  assert_same(error.value.examples, single.value.examples)


@pytest.mark.long
@pytest.mark.parametrize('vectorize', ['loop', 'vmap'])
def test_the_others_are_trained_to_their_ends(vectorize):
  configs = [CONFIGS[0], DIVERGES, CONFIGS[2]]
  mesh = sharding.population_mesh(1)
  found = fit_population(
    MODEL, configs, seeds=SEEDS, mesh=mesh, vectorize=vectorize, return_errors=True
  )
  assert isinstance(found[1], training.NotFiniteError)
  compare = assert_same if vectorize == 'loop' else functools.partial(assert_close, rtol=1e-4)
  compare([found[0], found[2]], [singles()[0], singles()[2]])


def test_a_population_that_fails_as_a_whole_ends():
  errors = fit_population(MODEL, [DIVERGES] * 3, seeds=[0, 1, 2], return_errors=True)
  assert [type(error) for error in errors] == [training.NotFiniteError] * 3


@pytest.mark.parametrize(
  ('configs', 'seeds', 'message'),
  [
    ([], [], 'configs: needs at least one member'),
    ([BASE, BASE], [0], 'seeds: needs one for each of the 2 configs, got 1'),
    (
      [BASE, dataclasses.replace(BASE, pgd_steps=4, schedule='constant', gamma=3.0)],
      [0, 1],
      'pgd_steps, schedule: must be the same in the whole population, got pgd_steps 3, 4; '
      "schedule 'cosine', 'constant'",
    ),
    (
      [BASE, dataclasses.replace(BASE, relative_step_size=0.5)],
      [0, 1],
      'relative_step_size: must be the same in the whole population, got relative_step_size None',
    ),
  ],
)
def test_members_that_do_not_fit_together_are_refused(configs, seeds, message):
  with pytest.raises(ArgumentError) as error:
    fit_population(MODEL, configs, seeds=seeds)
  assert message in str(error.value)


def test_fit_s_own_arguments_are_checked():
  with pytest.raises(ArgumentError, match='steps_per_row: must be >= 1, got 0'):
    fit_population(MODEL, CONFIGS, seeds=SEEDS, steps_per_row=0)
  with pytest.raises(ArgumentError, match=r"mesh: needs the axes \('population', 'data'\)"):
    fit_population(MODEL, CONFIGS, seeds=SEEDS, mesh=sharding.data_mesh(1))
  frozen = dataclasses.replace(BASE, freeze_decoder=True)
  with pytest.raises(ArgumentError, match='params: is needed for freeze_decoder'):
    fit_population(MODEL, [frozen], seeds=[0])
  with pytest.raises(ValueError, match=r"vectorize must be one of .*, got 'pmap'"):
    fit_population(MODEL, CONFIGS, seeds=SEEDS, vectorize='pmap')


def test_states_of_different_steps_are_refused():
  first, second = (progress.members() for progress in list(yielded())[:2])
  mixed = [first[0].state, second[1].state]
  with pytest.raises(ValueError, match=r'the states must be at the same step, got \[1, 8\]'):
    next(
      training.run_population(
        training.TrainStep(MODEL),
        mixed,
        [(config, jax.random.key(0)) for config in CONFIGS[:2]],
        IMAGES,
        [data.batch_stream(seed, BATCH, len(IMAGES)) for seed in (0, 1)],
        num_steps=[23, 23],
        steps_per_row=ROW,
        mesh=sharding.population_mesh(1),
      )
    )


@pytest.mark.long
def test_members_of_one_seed_have_their_clusters_from_one_search(monkeypatch):
  config = dataclasses.replace(BASE, objective='clusters', num_steps=2, gamma=1.0)
  searched, search = [], data.spectral_clusters

  def counting(images, num_clusters, **options):
    searched.append(options['seed'])
    return search(images, num_clusters, **options)

  monkeypatch.setattr(data, 'spectral_clusters', counting)
  fit_population(MODEL, [config] * 3, seeds=[0, 1, 0])
  assert searched == [0, 1]


@pytest.mark.parametrize('vectorize', ['loop', 'vmap'])
def test_members_are_taken_as_asked(monkeypatch, vectorize):
  real, seen = loop.train_steps, set()

  def train_steps(*args):
    seen.add(args[-1])
    return real(*args)

  monkeypatch.setattr(loop, 'train_steps', train_steps)
  config = dataclasses.replace(BASE, num_steps=1)
  mesh = sharding.population_mesh(1)
  fit_population(MODEL, [config], seeds=[0], mesh=mesh, vectorize=vectorize)
  assert seen == {vectorize}
