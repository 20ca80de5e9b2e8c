"""`evaluate` against a closed form, after interruptions, with nothing to attack, on bad input."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.attacks import losses
from se_vae.evaluation import attack_suite, attacked_classifier, robustness, verdicts
from se_vae.evaluation.attack_log import AttackLog
from se_vae.parallel import sharding
from tests.evaluation.linear_classifier import (
  COUNT,
  RADII,
  SHAPE,
  assert_legal,
  closed_form,
  evaluate,
  examples,
  failed,
  latents,
  linear,
  skipped,
)

DTYPE_PROMOTION = 'standard'  # optax takes part


@functools.cache
def honest(attack):
  return evaluate(attack=attack, latents_fn=latents)


@pytest.mark.long
def test_worst_case_is_the_closed_form_of_a_linear_encoder_and_probe():
  result = honest('worst_case')
  np.testing.assert_array_equal(result.curve.correct, closed_form())
  counts = result.curve.correct.sum(axis=1)
  assert counts[0] > 40 and counts[-1] < 5 and np.all(np.diff(counts) < 0)
  assert_legal(result.attack_log, examples()[0])


def test_every_attack_of_a_suite_stays_in_its_ball():
  """All images, not only those in the log."""
  x, labels, args = examples()
  mesh, options = sharding.data_mesh(1), dict(norm='linf', num_steps=10, num_queries=150)
  classifier, _ = attacked_classifier.prepare(
    linear,
    x,
    labels,
    radii=(0.1,),
    seed=0,
    norm='linf',
    bounds=(0.0, 1.0),
    batch_size=16,
    args=args,
    mesh=mesh,
    latents_fn=latents,
  )
  build = functools.partial(attack_suite.worst_case, linear, latents, classes=3, num_classes=3)
  suite = build(restarts=1, **options)
  assert suite == build(restarts=1, **options)  # or every evaluation would compile anew
  assert len({attack.name for attack in suite.attacks}) == len(suite.attacks) == 15
  for attack in suite.attacks:
    for attempt in range(attack.restarts):
      images, correct = classifier.attack(attack, 0.1, attempt, np.arange(COUNT))
      offset = np.abs(images.astype(np.float64) - x)
      assert offset.max() <= 0.1 * (1.0 + 1e-6) + np.spacing(np.float32(1.0)), attack.name
      assert images.min() >= 0.0 and images.max() <= 1.0, attack.name
      predicted = np.argmax(linear(jnp.asarray(images), *args), axis=1)
      np.testing.assert_array_equal(correct, predicted == labels, attack.name)


@pytest.mark.parametrize('attack', ['standard', 'worst_case'])
def test_an_honest_evaluation_passes_all_checks(attack):
  result = honest(attack)
  assert [check.number for check in result.checks] == list(range(1, 14))
  assert result.passed and skipped(result) == {13}, result.checks
  assert repr(result).endswith('checks: 12 passed, 0 failed, 1 skipped (13: certificates hold))')
  for each in (result, result.curve, result.attack_log, result.checks):
    assert '\n' not in repr(each) and 'array' not in repr(each)


def test_worst_case_is_at_most_standard():
  assert np.all(honest('worst_case').curve.correct <= honest('standard').curve.correct)


def test_the_attack_log_says_what_found_each_image_and_at_what_cost():
  log = honest('standard').attack_log
  x, labels, args = examples()
  predicted = np.argmax(linear(jnp.asarray(log.images), *args), axis=1)
  misclassified = np.isfinite(log.radius)
  np.testing.assert_array_equal(predicted != labels, misclassified)
  np.testing.assert_array_equal(log.attack >= 0, misclassified)
  np.testing.assert_array_equal(log.images[~misclassified], x[~misclassified])
  np.testing.assert_array_equal(log.attack == 0, log.radius == 0.0)
  # Ten gradients at every radius but 0, up to the one that misclassifies the example.
  radii_attacked = [sum(0.0 < radius <= limit for radius in RADII) for limit in log.radius]
  np.testing.assert_array_equal(log.gradients, 10 * np.array(radii_attacked))
  np.testing.assert_array_equal(log.forwards, 1 + 2 * np.array(radii_attacked))


@pytest.mark.long
@pytest.mark.parametrize(
  ('batch_size', 'devices'), [(7, 1), (8, 4), pytest.param(48, 1, marks=pytest.mark.slow)]
)
def test_batches_and_devices_do_not_matter(batch_size, devices):
  whole = honest('standard').attack_log
  mesh = sharding.data_mesh(devices)
  options = dict(latents_fn=latents, check_examples=0)
  log = evaluate(batch_size=batch_size, mesh=mesh, **options).attack_log
  np.testing.assert_array_equal(log.radius, whole.radius)
  np.testing.assert_allclose(log.images, whole.images, atol=1e-6)


def test_an_attack_is_traced_once_for_all_radii_and_batches():
  traces = []

  def counting(x, *args):
    traces.append(x.shape)
    return linear(x, *args)

  evaluate(counting, radii=(0.02,))
  first = len(traces)
  evaluate(counting, radii=RADII)
  assert len(traces) - first <= 2 and first > 0  # the shape of two images' logits, twice
  assert set(traces) == {(16, *SHAPE), (2, *SHAPE)}


def test_an_interrupted_evaluation_ends_with_the_same_result(tmp_path):
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
  for name, value in vars(honest('standard').attack_log).items():
    np.testing.assert_array_equal(getattr(result.attack_log, name), value)
  with pytest.raises(ValueError, match='belongs to another computation'):
    evaluate(latents_fn=latents, state_path=path, seed=1)
  path.write_bytes(path.read_bytes()[:100])
  with pytest.raises(ValueError, match='is not a state'):
    AttackLog.load(path, '', np.zeros(1))


def test_a_state_belongs_to_what_the_functions_compute(tmp_path):
  """Parameters may be closed over; other devices and batch sizes round differently."""
  _, _, (encoder, probe, bias) = examples()

  def closed(scale, offset=0.0):
    return {
      'logits_fn': lambda x: linear(x, scale * encoder, probe, bias),
      'latents_fn': lambda x: latents(x, encoder + offset, probe, bias),
      'args': (),
    }

  options = dict(state_path=tmp_path / 'state.npz', check_examples=0)
  log = evaluate(**closed(1.0), **options).attack_log
  calls = []
  resumed = evaluate(
    **closed(1.0),
    **options,
    batch_size=7,
    mesh=sharding.data_mesh(4),
    progress=lambda *done: calls.append(done),
  )
  assert set(calls) == {(len(RADII) - 1, len(RADII) - 1)}  # nothing was attacked again
  np.testing.assert_array_equal(resumed.attack_log.images, log.images)
  for other in (closed(1.001), closed(1.0, offset=0.001)):
    with pytest.raises(ValueError, match='belongs to another computation'):
      evaluate(**other, **options)


def test_a_state_belongs_to_its_labels(tmp_path):
  options = dict(state_path=tmp_path / 'state.npz', check_examples=0, radii=(0.0, 0.05))
  evaluate(**options)
  with pytest.raises(ValueError, match='belongs to another computation'):
    evaluate(labels=(examples()[1] + 1) % 3, **options)


def test_a_state_belongs_to_what_the_functions_compute_off_the_images(tmp_path):
  """A classifier that rounds its input computes the same where the input is round."""

  def rounding(x, *args):
    return linear(jnp.round(16.0 * x) / 16.0, *args)

  options = dict(state_path=tmp_path / 'state.npz', check_examples=0, radii=(0.0, 0.05))
  options['x'] = np.round(16.0 * examples()[0]) / np.float32(16.0)
  evaluate(**options)
  with pytest.raises(ValueError, match='belongs to another computation'):
    evaluate(rounding, **options)


def test_states_with_dots_in_their_names_are_apart(tmp_path):
  for radius in (0.05, 0.1):
    evaluate(state_path=tmp_path / f'at_{radius}', check_examples=5, radii=(radius,))
  found = {path.name for path in tmp_path.iterdir()}
  assert found == {'at_0.05', 'at_0.05.checks.npz', 'at_0.1', 'at_0.1.checks.npz'}


def test_the_attacks_of_the_worst_case_suite():
  suite = attack_suite.worst_case(
    linear,
    latents,
    classes=3,
    num_classes=5,
    norm='linf',
    num_steps=7,
    restarts=4,
    num_queries=9,
    relative_step_size=0.3,
  )
  found = {attack.name: attack for attack in suite.attacks}
  names = ('cross_entropy', 'margin', 'dlr')
  tries = {'noise': 1, 'extreme_noise': 1, 'fgsm': 1, 'square': 1}
  tries |= {'candidates': 5 + 2}  # five grey images, and one of each other class
  tries |= {'apgd_targeted': 4, 'latent_centroid': 2, 'latent_encoding': 2, 'latent_w2': 4}
  tries |= {f'{kind}_{name}': 4 for kind in ('pgd', 'apgd') for name in names}
  assert {name: attack.restarts for name, attack in found.items()} == tries
  assert suite.doubled == (*(f'apgd_{name}' for name in names), 'apgd_targeted')
  assert {found[f'pgd_{name}'].relative_step_size for name in names} == {0.3}
  assert {found[f'apgd_{name}'].num_steps for name in names} == {7}
  assert found['square'].num_steps == 9
  towards, away = losses.LatentTarget(latents), losses.LatentShift(latents)
  starts = [found[f'latent_{name}'].start_objective for name in ('centroid', 'encoding', 'w2')]
  assert starts == [towards, towards, away]


def test_apgd_starts_where_pgd_on_the_start_objective_ends():
  attack = attack_suite.APGD(
    name='apgd',
    num_steps=3,
    objective=lambda x, aim: jnp.zeros(len(x)),  # flat: the attack stays where it starts
    start_objective=lambda x, aim: x.sum(axis=1),
  )
  x, options = jnp.full((2, 3), 0.5), {'norm': 'linf', 'bounds': (0.0, 1.0), 'args': (None,)}
  x_adv = attack(jax.random.key(0), x, radius=0.1, index=jnp.arange(2), **options)
  np.testing.assert_allclose(x_adv, x + 0.1, rtol=1e-6)


def test_every_attempt_has_random_draws_of_its_own():
  keys = [
    attack_suite.attempt_key(jax.random.key(0), attack_suite.Noise(name=name), radius, attempt)
    for name in 'ab'
    for radius in (0.1, 0.2)
    for attempt in (0, 1)
  ]
  assert len({np.asarray(jax.random.key_data(key)).tobytes() for key in keys}) == 8


def test_an_evaluation_passes_unless_a_check_fails():
  checks = [
    verdicts.SanityCheck(number, 'name', verdict, 'figure', {})
    for number, verdict in enumerate(('pass', 'skipped', 'fail'))
  ]
  assert robustness.Evaluation(None, None, tuple(checks[:2]), {}).passed
  assert not robustness.Evaluation(None, None, tuple(checks), {}).passed


def test_the_config_says_what_was_run_and_checks_take_as_many_examples_as_asked():
  result = evaluate(check_examples=10, radii=(0.0, 0.05), latents_fn=latents)
  assert result.config['attacks'] == {'pgd_cross_entropy': {'steps': 10, 'tries': 1}}
  assert result.checks[2].values['accuracy'][0] == result.curve.correct[0, :10].mean()
  assert result.checks[5].values['count'] == 10


def test_the_diameter_of_a_pixel_box():
  x, labels, args = examples()
  options = dict(radii=(0.1,), args=args, bounds=(-1.0, 1.0))
  for norm, expected in (('linf', 2.0), ('l2', 8.0)):  # 2 sqrt(16)
    found, _ = attacked_classifier.prepare(linear, x, labels, norm=norm, **options)
    assert found.diameter == pytest.approx(expected)


def test_interrupted_checks_ask_for_no_answer_twice(tmp_path, monkeypatch):
  """But for the few attacks whose images they need."""
  path, attacked, in_checks = tmp_path / 'state.npz', [], set()
  real = attack_suite.run

  def run(attack, *operands, **options):
    attacked.append(attack.name)
    return real(attack, *operands, **options)

  def interrupt_at(count):
    def progress(done, total):
      if len(attacked) >= count:
        in_checks.add(done == total)
        raise KeyboardInterrupt

    return progress

  monkeypatch.setattr(attack_suite, 'run', run)
  options = dict(latents_fn=latents, radii=(0.0, 0.05, 0.1), state_path=path)
  whole = evaluate(**options)
  batches = list(attacked)
  path.unlink()
  path.with_suffix('.checks.npz').unlink()
  attacked.clear()
  for count in range(5, len(batches), 5):
    with pytest.raises(KeyboardInterrupt):
      evaluate(**options, progress=interrupt_at(count))
  result = evaluate(**options)
  assert result.checks == whole.checks and in_checks == {False, True}
  answered = [name for name in attacked if name != 'health']
  assert answered == [name for name in batches if name != 'health']


@pytest.mark.parametrize('path', ['.', 'missing/state.npz'])
def test_a_state_that_cannot_be_written_is_refused_before_any_work(path, tmp_path):
  with pytest.raises(ValueError, match='state_path: must be a file in a directory that exists'):
    evaluate(logits_fn=None, state_path=tmp_path / path)


def test_checks_that_have_nothing_to_attack_are_skipped():
  """No example is robust at radius 1, and no attack does anything at radius 0."""
  result = evaluate(radii=(0.0, 1.0))
  assert result.curve.accuracy[1] == 0.0 and result.passed
  assert skipped(result) == {6, 7, 13}
  reason = f'nothing to attack: of the first {COUNT} examples none is robust at radius 1'
  assert result.checks[5].figure == result.checks[6].figure == reason
  assert skipped(evaluate(radii=(0.0,))) == {3, 5, 6, 7, 8, 13}


def test_checks_attack_at_a_radius_above_0_even_if_hardly_any_example_is_misclassified_there():
  result = evaluate(radii=(0.0, 0.02))
  assert result.curve.accuracy[1] > 0.5
  assert skipped(result) == {13}


def test_an_image_counts_from_the_smallest_radius_that_it_is_within(monkeypatch):
  """An attack at 0.1 that stays within 0.05 shows that the attack at 0.05 has missed an image."""
  real = attack_suite.run

  def late(attack, key, x, aim, index, radius, *rest, **options):
    radius = {0.05: 0.0, 0.1: 0.05}.get(round(float(radius), 6), float(radius))
    return real(attack, key, x, aim, index, jnp.float32(radius), *rest, **options)

  expected = evaluate(latents_fn=latents, check_examples=0).curve.accuracy
  monkeypatch.setattr(attack_suite, 'run', late)
  result = evaluate(latents_fn=latents, check_examples=0)
  assert not np.any(result.attack_log.radius == 0.1)
  np.testing.assert_array_equal(result.curve.accuracy[[1, 2]], expected[[1, 2]])
  assert_legal(result.attack_log, examples()[0])


# ---------------------------------------------------------------------------------------------
# What must raise
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'labels': np.full(COUNT, 2**32)}, r'labels: must lie in \[0, 3\)'),
    ({'labels': np.full(COUNT, 3)}, r'labels: must lie in \[0, 3\)'),
    ({'labels': np.zeros(COUNT, int)}, 'labels: must be of at least two classes'),
    ({'labels': np.zeros(COUNT)}, 'x, labels: must be float and integer'),
    ({'x': np.full((COUNT, *SHAPE), 1.5, np.float32)}, 'x: must lie in'),
    ({'x': np.full((COUNT, *SHAPE), np.nan, np.float32)}, 'x: must lie in'),
    ({'x': np.zeros((COUNT, *SHAPE), np.uint8)}, 'x, labels: must be float and integer'),
    ({'x': np.zeros((0, *SHAPE), np.float32), 'labels': np.zeros(0, int)}, 'N >= 1'),
    ({'radii': (0.0, 1.1)}, 'at most the pixel range 1'),
    ({'radii': (-0.1,)}, 'radii: must be finite and >= 0'),
    ({'radii': 0.1}, 'radii: must be finite and >= 0, at least one in a list, got 0.1'),
    ({'attack': 'best'}, 'attack: must be one of standard, worst_case'),
    ({'norm': 'l1'}, 'norm: must be one of'),
    ({'num_queries': 0}, 'num_queries: must be >= 1'),
    ({'check_examples': -1}, 'check_examples: must be an integer >= 0'),
    ({'check_examples': 2.5}, 'check_examples: must be an integer >= 0, got 2.5'),
    ({'seed': 2**32}, r'seed: must be an integer in \[0, 2\*\*31\)'),
    ({'seed': 1.5}, 'seed: must be an integer'),
    ({'logits_fn': lambda x, *_: jnp.ones((x.shape[0], 1))}, 'K >= 2'),
    ({'logits_fn': lambda *_: jnp.ones((1, 3))}, 'logits_fn: must give floats'),
    ({'logits_fn': lambda x, *_: jnp.ones((x.shape[0], 3, 1))}, r'logits_fn: .* K >= 2'),
    ({'logits_fn': lambda x, *_: jnp.ones((x.shape[0], 3), int)}, 'logits_fn: must give floats'),
    ({'logits_fn': lambda x, *_: (x, x)}, 'logits_fn: must give floats'),
    ({'latents_fn': lambda *_: jnp.ones((1, 3))}, 'latents_fn: must give floats'),
    ({'reconstruct_fn': lambda x, *_: x[:1]}, 'reconstruct_fn: must give floats'),
    ({'surrogate': (lambda x: x[:1], ())}, 'surrogate: must give floats'),
    ({'bounds': (1.0, 0.0)}, 'bounds: must be'),
    ({'relative_step_size': 0.0}, 'relative_step_size: must be finite and > 0'),
    ({'relative_step_size': np.nan}, 'relative_step_size: must be finite and > 0'),
    ({'logits_fn': lambda x, *_: jnp.full((x.shape[0], 3), jnp.nan)}, 'logits_fn: must be finite'),
    (
      {'latents_fn': lambda x, *_: jnp.full((x.shape[0], 3), jnp.nan)},
      'latents_fn: must be finite',
    ),
  ],
)
def test_wrong_arguments_raise(change, message):
  with pytest.raises(ValueError, match=message):
    evaluate(**change)


@pytest.mark.long
@pytest.mark.parametrize('attack', ['standard', pytest.param('worst_case', marks=pytest.mark.slow)])
def test_two_classes_and_l2_work(attack):
  x, _, (encoder, probe, bias) = examples()
  args = (encoder, probe[:, :2], bias[:2])
  y = np.argmax(linear(jnp.asarray(x), *args), axis=1)
  result = evaluate(labels=y, args=args, norm='l2', attack=attack, latents_fn=latents)
  weights = np.float64(encoder) @ np.float64(probe[:, 0] - probe[:, 1])
  distance = np.abs(np.float64(x.reshape(COUNT, 16)) @ weights + bias[0] - bias[1])
  far = distance > 1.05 * np.outer(RADII, [np.linalg.norm(weights)])
  assert np.all(result.curve.correct[far])  # out of reach even without bounds
  assert result.curve.accuracy[-1] < 1.0
  assert {1, 2, 3} & failed(result) == set()
  assert skipped(result) == {7, 13}
  assert result.checks[6].figure == 'Square is for linf, and the norm is l2'
  assert 'dlr' not in ' '.join(result.attack_log.names) and 'square' not in result.attack_log.names
