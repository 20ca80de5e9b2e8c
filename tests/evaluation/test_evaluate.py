"""The evaluation against a closed form, planted fakes, interruptions and bad input."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.evaluation import attack_suite, maxima, robustness
from se_vae.evaluation.attack_log import Ledger
from se_vae.parallel import sharding

DTYPE_PROMOTION = 'standard'  # optax takes part

SHAPE = (4, 4, 1)
CLASSES = 3
COUNT = 48
RADII = (0.0, 0.02, 0.05, 0.1, 0.3)
SMALL = dict(radii=RADII, num_steps=10, num_queries=150, batch_size=16)


@functools.cache
def problem():
  """Images, labels that are mostly right, a linear encoder and a linear probe, in float32."""
  rng = np.random.default_rng(1)
  x = rng.uniform(size=(COUNT, *SHAPE)).astype(np.float32)
  encoder = rng.normal(size=(16, 5)).astype(np.float32)
  probe = rng.normal(size=(5, CLASSES)).astype(np.float32)
  bias = (-0.5 * (encoder @ probe).sum(axis=0)).astype(np.float32)
  clean = np.argmax(x.reshape(COUNT, 16) @ encoder @ probe + bias, axis=1)
  labels = np.where(rng.uniform(size=COUNT) < 0.05, (clean + 1) % CLASSES, clean)
  return x, labels, (encoder, probe, bias)


def latents(x, encoder, probe, bias):
  return x.reshape(x.shape[0], -1) @ encoder


def linear(x, encoder, probe, bias):
  return latents(x, encoder, probe, bias) @ probe + bias[None]


def evaluate(logits_fn=linear, **options):
  x, labels, args = problem()
  options = {'args': args, 'mesh': sharding.data_mesh(1), **SMALL, **options}
  return robustness.evaluate(
    logits_fn, options.pop('x', x), options.pop('labels', labels), **options
  )


def closed_form():
  """Whether each example survives each radius, exactly: the box is maximised pixel by pixel."""
  x, labels, (encoder, probe, bias) = problem()
  x = np.float64(x.reshape(COUNT, 16))
  weights = np.float64(encoder) @ np.float64(probe)
  gap = np.empty((len(RADII), COUNT))
  for i, radius in enumerate(RADII):
    lowest, highest = np.maximum(x - radius, 0.0), np.minimum(x + radius, 1.0)
    for n in range(COUNT):
      towards = weights - weights[:, labels[n], None]
      worst = np.where(towards > 0.0, highest[n, :, None], lowest[n, :, None]) * towards
      margins = worst.sum(axis=0) + bias - bias[labels[n]]
      gap[i, n] = np.delete(margins, labels[n]).max()
  assert np.abs(gap).min() > 1e-4  # no example is decided by float32's rounding
  return gap < 0.0


def assert_legal(ledger, x):
  offset = np.abs(np.float64(ledger.images) - np.float64(x)).reshape(len(x), -1).max(axis=1)
  allowed = np.where(np.isfinite(ledger.radius), ledger.radius, 0.0)
  assert np.all(offset <= allowed + np.spacing(np.float32(1.0)))
  assert ledger.images.min() >= 0.0 and ledger.images.max() <= 1.0


def failed(result):
  return {check.number for check in result.checks if not check.passed}


@functools.cache
def honest(attack):
  return evaluate(attack=attack, latents_fn=latents)


def test_worst_case_is_the_closed_form_of_a_linear_encoder_and_probe():
  result = honest('worst_case')
  np.testing.assert_array_equal(result.curve.correct, closed_form())
  counts = result.curve.correct.sum(axis=1)
  assert counts[0] > 40 and counts[-1] < 5 and np.all(np.diff(counts) < 0)
  assert_legal(result.ledger, problem()[0])


@pytest.mark.parametrize('attack', ['standard', 'worst_case'])
def test_an_honest_evaluation_passes_all_checks(attack):
  result = honest(attack)
  assert [check.number for check in result.checks] == list(range(1, 13))
  assert result.passed, [check for check in result.checks if not check.passed]


def test_worst_case_is_at_most_standard():
  assert np.all(honest('worst_case').curve.correct <= honest('standard').curve.correct)


def test_the_ledger_says_who_did_it_and_at_what_cost():
  ledger = honest('standard').ledger
  x, labels, args = problem()
  predicted = np.argmax(linear(jnp.asarray(ledger.images), *args), axis=1)
  broken = np.isfinite(ledger.radius)
  np.testing.assert_array_equal(predicted != labels, broken)
  np.testing.assert_array_equal(ledger.attack >= 0, broken)
  np.testing.assert_array_equal(ledger.images[~broken], x[~broken])
  np.testing.assert_array_equal(ledger.attack == 0, ledger.radius == 0.0)
  # Ten gradients at every radius but 0, up to that which broke the example.
  radii_tried = [sum(0.0 < radius <= limit for radius in RADII) for limit in ledger.radius]
  np.testing.assert_array_equal(ledger.gradients, 10 * np.array(radii_tried))
  np.testing.assert_array_equal(ledger.forwards, 1 + 2 * np.array(radii_tried))


@pytest.mark.parametrize(('batch_size', 'devices'), [(7, 1), (48, 1), (8, 4)])
def test_batches_and_devices_do_not_matter(batch_size, devices):
  whole = honest('standard').ledger
  mesh = sharding.data_mesh(devices)
  ledger = evaluate(latents_fn=latents, batch_size=batch_size, mesh=mesh).ledger
  np.testing.assert_array_equal(ledger.radius, whole.radius)
  np.testing.assert_allclose(ledger.images, whole.images, atol=1e-6)


def test_an_attack_is_traced_once_for_all_radii_and_batches():
  traces = []

  def counting(x, *args):
    traces.append(x.shape)
    return linear(x, *args)

  evaluate(counting, radii=(0.02,))
  first = len(traces)
  evaluate(counting, radii=RADII)
  assert len(traces) - first <= 2 and first > 0  # the shape of one image's logits, twice
  assert set(traces) == {(16, *SHAPE), (1, *SHAPE)}


def test_an_interrupted_evaluation_goes_on_to_the_same_end(tmp_path):
  path = tmp_path / 'state.npz'
  calls = []

  def interrupt(done, total):
    calls.append(done)
    if len(calls) == 6:
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    evaluate(latents_fn=latents, state_path=path, progress=interrupt)
  resumed = []
  result = evaluate(
    latents_fn=latents, state_path=path, progress=lambda done, _: resumed.append(done)
  )
  assert resumed[0] > 0
  for name, value in vars(honest('standard').ledger).items():
    np.testing.assert_array_equal(getattr(result.ledger, name), value)
  with pytest.raises(ValueError, match='belongs to another evaluation'):
    evaluate(latents_fn=latents, state_path=path, seed=1)
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match='is not a ledger'):
    Ledger.load(path, '')


# ---------------------------------------------------------------------------------------------
# Planted fakes: each is broken or flagged
# ---------------------------------------------------------------------------------------------


def scaled(x, *args):
  """Saturates the cross-entropy: its gradient underflows."""
  return 1e4 * linear(x, *args)


def rounded(x, *args):
  """The gradient of a step function is zero."""
  return linear(jnp.round(8.0 * x) / 8.0, *args)


@jax.custom_jvp
def masked(x, *args):
  """Answers as `linear`, but lies about its gradient."""
  return linear(x, *args)


@masked.defjvp
def masked_jvp(primals, tangents):
  return masked(*primals), jnp.zeros((primals[0].shape[0], CLASSES))


def constant(x, *args):
  return jnp.zeros_like(linear(x, *args)) + jnp.asarray([1.0, 0.0, 0.0])[None]


@jax.custom_jvp
def draw(logits):
  def sample(values):
    return np.asarray(NOISE.normal(size=values.shape), np.float32)

  return jax.pure_callback(sample, jax.ShapeDtypeStruct(logits.shape, logits.dtype), logits)


@draw.defjvp
def draw_jvp(primals, tangents):
  return draw(*primals), jnp.zeros_like(primals[0])


NOISE = np.random.default_rng(0)


def noisy(x, *args):
  logits = linear(x, *args)
  return logits + 0.5 * draw(logits)


@pytest.mark.slow
def test_scaled_logits_are_flagged_and_broken():
  standard = evaluate(scaled)
  assert 9 in failed(standard)
  worst = evaluate(scaled, attack='worst_case', latents_fn=latents)
  assert 9 in failed(worst)
  np.testing.assert_array_equal(worst.curve.correct, closed_form())


@pytest.mark.slow
@pytest.mark.parametrize('fake', [rounded, masked])
def test_masked_gradients_are_flagged_and_broken_without_gradients(fake):
  standard = evaluate(fake)
  assert {7, 9} <= failed(standard)
  worst = evaluate(fake, attack='worst_case')
  assert {7, 9} <= failed(worst)
  assert worst.curve.accuracy[-1] < standard.curve.accuracy[-1] - 0.1
  assert_legal(worst.ledger, problem()[0])


def test_a_noisy_encoder_is_flagged():
  assert {2, 10} <= failed(evaluate(noisy))


def test_a_constant_encoder_is_flagged():
  result = evaluate(constant)
  assert {4, 12} <= failed(result)
  assert result.curve.accuracy[0] == result.curve.accuracy[-1] > 0.0  # as robust as can be


@pytest.mark.slow
def test_a_stronger_surrogate_is_flagged():
  """Examples made for a copy that does not mask its gradient break the one that does."""
  result = evaluate(masked, surrogate=(linear, problem()[2]))
  assert 8 in failed(result)
  assert 'transfer' in result.checks[7].values
  assert 8 not in failed(evaluate(surrogate=(scaled, problem()[2])))


# ---------------------------------------------------------------------------------------------
# Planted faults of the evaluation itself: the checks that must fail, and no others
# ---------------------------------------------------------------------------------------------


def ball_too_large(real, attack, key, x, aim, index, radius, *rest, **options):
  return real(attack, key, x, aim, index, jnp.float32(1.02) * radius, *rest, **options)


def pixels_not_clipped(real, *operands, norm, bounds):
  return real(*operands, norm=norm, bounds=(-0.2, 1.2))


def idle_at_one_radius(real, attack, key, x, aim, index, radius, *rest, **options):
  """As if the table of steps had a zero at this radius: every attack leaves the image alone."""
  if np.isclose(radius, RADII[-1]):
    return x
  return real(attack, key, x, aim, index, radius, *rest, **options)


@dataclasses.dataclass(frozen=True)
class Negative:
  objective: Any

  def __call__(self, *operands):
    return -self.objective(*operands)


def wrong_sign(real, attack, *operands, **options):
  """PGD walks down where it should walk up."""
  if attack.method == 'pgd':
    attack = dataclasses.replace(attack, objective=Negative(attack.objective))
  return real(attack, *operands, **options)


@pytest.mark.parametrize(
  ('fault', 'expected'),
  [
    (ball_too_large, {1}),
    (pixels_not_clipped, {1}),
    (idle_at_one_radius, {3}),
    # It leaves the large radii, falls behind FGSM, Square and noise, and lives on lucky starts.
    (wrong_sign, {4, 5, 6, 7, 8}),
  ],
)
def test_a_faulty_attack_is_flagged(fault, expected, monkeypatch):
  monkeypatch.setattr(attack_suite, 'run', functools.partial(fault, attack_suite.run))
  assert failed(evaluate(latents_fn=latents)) == expected


def test_an_attack_that_has_not_converged_is_flagged():
  """Ten steps of a fiftieth of the radius: one long step and Square go further."""
  result = evaluate(latents_fn=latents, relative_step_size=0.02)
  assert failed(result) == {5, 6, 7}


def test_a_claim_that_forgets_what_was_wrong_before_is_flagged(monkeypatch):
  def survives(self, radii):
    return (self.radius[None] > np.asarray(radii)[:, None]) | (self.attack == 0)[None]

  monkeypatch.setattr(Ledger, 'survives', survives)
  assert failed(evaluate(latents_fn=latents)) == {11}


# ---------------------------------------------------------------------------------------------
# Joint attack and moves of the representation
# ---------------------------------------------------------------------------------------------


def test_a_joint_attack_is_no_stronger_than_either_alone():
  x, labels, (encoder, probe, bias) = problem()
  second = (encoder, -probe, -bias)
  other = np.argmax(linear(jnp.asarray(x), *second), axis=1)
  options = dict(radii=RADII, num_steps=10, batch_size=16, mesh=sharding.data_mesh(1))
  joint = maxima.joint_accuracy(
    (linear, linear),
    x,
    np.stack([labels, other], axis=1),
    args=((encoder, probe, bias), second),
    **options,
  )
  alone = [
    maxima.joint_accuracy((linear,), x, y[:, None], args=(args,), **options).correct
    for y, args in ((labels, (encoder, probe, bias)), (other, second))
  ]
  np.testing.assert_array_equal(alone[0], closed_form())
  # One image must break both: it is harder, and opposite probes can fall to one image.
  assert np.all(joint.correct >= alone[0]) and np.all(joint.correct >= alone[1])
  assert joint.correct.sum() > alone[0].sum()
  with pytest.raises(ValueError, match='2 classifiers need labels'):
    maxima.joint_accuracy((linear, linear), x, labels, args=((), ()), **options)


def test_the_largest_move_of_a_one_dimensional_representation_is_exact():
  x = np.full((3, *SHAPE), 0.5, np.float32)
  total = lambda x, scale: scale * x.sum(axis=(1, 2))  # noqa: E731
  moves = maxima.representation_moves(
    total, x, radii=(0.2, 0.0, 0.1), args=(np.float32(2.0),), num_steps=10
  )
  expected = (2.0 * 16 * np.array([0.2, 0.0, 0.1])) ** 2
  np.testing.assert_allclose(moves, np.repeat(expected[:, None], 3, axis=1), rtol=1e-5)


# ---------------------------------------------------------------------------------------------
# What must raise
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'labels': np.full(COUNT, 3)}, r'labels must lie in \[0, 3\)'),
    ({'labels': np.zeros(COUNT, int)}, 'all of one class'),
    ({'labels': np.zeros(COUNT)}, 'labels integer'),
    ({'x': np.full((COUNT, *SHAPE), 1.5, np.float32)}, 'images must lie in'),
    ({'x': np.full((COUNT, *SHAPE), np.nan, np.float32)}, 'images must lie in'),
    ({'x': np.zeros((COUNT, *SHAPE), np.uint8)}, 'x must be float'),
    ({'x': np.zeros((0, *SHAPE), np.float32), 'labels': np.zeros(0, int)}, 'N >= 1'),
    ({'radii': (0.0, 1.1)}, 'at most the pixel range 1'),
    ({'radii': (-0.1,)}, 'radii must be finite and >= 0'),
    ({'attack': 'best'}, 'attack must be one of standard, worst_case'),
    ({'norm': 'l1'}, 'norm must be one of'),
    ({'num_queries': 0}, 'num_queries must be >= 1'),
    ({'check_examples': -1}, 'check_examples must be >= 0'),
    ({'logits_fn': lambda x, *_: jnp.ones((x.shape[0], 1))}, 'K >= 2'),
    ({'logits_fn': lambda x, *_: jnp.full((x.shape[0], 3), jnp.nan)}, 'not finite'),
    ({'latents_fn': lambda x, *_: jnp.full((x.shape[0], 3), jnp.nan)}, 'not finite'),
  ],
)
def test_wrong_arguments_raise(change, message):
  with pytest.raises(ValueError, match=message):
    evaluate(**change)


@pytest.mark.parametrize('attack', ['standard', pytest.param('worst_case', marks=pytest.mark.slow)])
def test_two_classes_and_l2_work(attack):
  x, _, (encoder, probe, bias) = problem()
  args = (encoder, probe[:, :2], bias[:2])
  y = np.argmax(linear(jnp.asarray(x), *args), axis=1)
  result = evaluate(labels=y, args=args, norm='l2', attack=attack, latents_fn=latents)
  weights = np.float64(encoder) @ np.float64(probe[:, 0] - probe[:, 1])
  distance = np.abs(np.float64(x.reshape(COUNT, 16)) @ weights + bias[0] - bias[1])
  far = distance > 1.05 * np.outer(RADII, [np.linalg.norm(weights)])
  assert np.all(result.curve.correct[far])  # out of reach even without bounds
  assert result.curve.accuracy[-1] < 1.0
  assert {1, 2, 3} & failed(result) == set()
  assert 'dlr' not in ' '.join(result.ledger.names) and 'square' not in result.ledger.names
