"""Logs of values: what they know is not computed again, and other computations are refused."""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.evaluation import latent_shift, states
from se_vae.parallel import sharding
from tests.evaluation.linear_classifier import SHAPE

DTYPE_PROMOTION = 'standard'  # optax takes part

COUNT = 11
X = np.random.default_rng(0).uniform(0.2, 0.8, size=(COUNT, *SHAPE)).astype(np.float32)


def squares(x, scale):
  return scale * x.reshape(len(x), -1) ** 2


def opposite(x, scale):
  return jnp.stack([x.mean(axis=(1, 2, 3)), scale * x.std(axis=(1, 2, 3))], axis=1)


def shift(path, function=squares, *, x=X, scale=2.0, **options):
  defaults = {'radii': (0.1, 0.02), 'num_steps': 3, 'restarts': 2, 'batch_size': 4}
  options = {'mesh': sharding.data_mesh(1), **defaults, **options}
  return latent_shift.max_latent_shift(
    function, x, args=(np.float32(scale),), state_path=path, **options
  )


def joint(path, function=opposite, *, x=X, labels=0, scale=2.0, **options):
  defaults = {'radii': (0.1, 0.02), 'num_steps': 3, 'batch_size': 4}
  options = {'mesh': sharding.data_mesh(1), **defaults, **options}
  labels = np.full((COUNT, 2), labels)
  args = ((np.float32(scale),), (np.float32(1.0),))
  curve = latent_shift.joint_accuracy(
    (function, function), x, labels, args=args, state_path=path, **options
  )
  return curve.correct


def interrupted(compute, path, *, at, **options):
  """The progress up to the interruption."""
  told = []

  def progress(done, total):
    told.append((done, total))
    if len(told) == at:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    compute(path, progress=progress, **options)
  return told


@pytest.mark.parametrize('compute', [shift, joint])
@pytest.mark.parametrize('at', [1, 2, 3, 5, 9])
def test_an_interrupted_call_goes_on_after_its_last_batch(tmp_path, compute, at):
  path, told = tmp_path / 'state.npz', []
  expected = compute(None)
  before = interrupted(compute, path, at=at)
  done, total = before[-1]
  assert before[0][0] == 0 and total == COUNT * {shift: 5, joint: 3}[compute]
  np.testing.assert_array_equal(compute(path, progress=lambda *state: told.append(state)), expected)
  assert told[0] == (done, total) and told[-1] == (total, total)


def test_a_finished_call_computes_nothing_again(tmp_path, monkeypatch):
  path = tmp_path / 'state.npz'
  expected = shift(path)
  monkeypatch.setattr(latent_shift.attack_suite, 'run', pytest.fail)
  np.testing.assert_array_equal(shift(path), expected)


def test_other_batches_and_devices_go_on_with_the_same_values(tmp_path):
  path, expected = tmp_path / 'state.npz', shift(None)
  interrupted(shift, path, at=4)
  found = shift(path, batch_size=5, mesh=sharding.data_mesh(4))
  np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
  'change',
  [
    {'x': X[::-1]},
    {'scale': 2.1},
    {'seed': 1},
    {'radii': (0.1,)},
    {'num_steps': 4},
    {'restarts': 3},
    {'norm': 'l2'},
    {'bounds': (0.0, 2.0)},
    {'function': lambda x, scale: 1.001 * squares(x, scale)},
  ],
)
def test_the_state_of_another_latent_shift_is_refused(tmp_path, change):
  path = tmp_path / 'state.npz'
  shift(path)
  with pytest.raises(states.StateError, match='belongs to another computation; remove it') as error:
    shift(path, **change)
  assert error.value.path == path


@pytest.mark.parametrize('change', [{'labels': 1}, {'scale': 2.1}, {'seed': 1}])
def test_the_state_of_another_joint_attack_is_refused(tmp_path, change):
  path = tmp_path / 'state.npz'
  joint(path)
  with pytest.raises(states.StateError, match='belongs to another computation'):
    joint(path, **change)


def rounding(function):
  """A function that agrees with another one where pixels are round."""
  return lambda x, scale: function(jnp.round(16.0 * x) / 16.0, scale)


def test_a_state_is_of_functions_that_agree_off_the_images(tmp_path):
  x, path = np.round(16.0 * X) / np.float32(16.0), tmp_path / 'state.npz'
  shift(path, x=x)
  with pytest.raises(states.StateError, match='belongs to another computation'):
    shift(path, rounding(squares), x=x)
  other = tmp_path / 'other.npz'
  joint(other, x=x)
  with pytest.raises(states.StateError, match='belongs to another computation'):
    joint(other, rounding(opposite), x=x)


@pytest.mark.parametrize('compute', [shift, joint])
def test_a_path_that_cannot_be_written_is_refused(tmp_path, compute):
  with pytest.raises(ValueError, match='state_path: must be a file in a directory that exists'):
    compute(tmp_path / 'missing' / 'state.npz')


def test_a_log_is_saved_every_so_often(tmp_path, monkeypatch):
  """So that a kill, which ends no context, loses little."""
  path, mesh = tmp_path / 'state.npz', sharding.data_mesh(1)
  monkeypatch.setattr(states, 'SAVE_EVERY', 0.0)
  known = []

  def progress(done):
    known.append((done, len(np.load(path)['values']) if path.exists() else 0))

  log = states.ValueLog(path, 'of this', np.zeros(1))
  function = functools.partial(jnp.sum, axis=(1, 2, 3))
  log.map_batches(mesh, function, X, 4, progress)
  assert known == [(0, 0), (4, 4), (8, 8), (COUNT, COUNT)]
