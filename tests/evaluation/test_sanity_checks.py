"""Each check passes on a sound claim, and fails on a planted fault."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from se_vae.attacks import losses
from se_vae.evaluation import attack_suite, sanity_checks, verdicts

X = np.full((4, 2, 2, 1), 0.5, np.float32)
RADIUS = np.array([0.0, 0.1, 0.2, np.inf])


def moved():
  """Each image at the very edge of its ball; the last, which is robust, as it was."""
  offset = np.where(np.isfinite(RADIUS), RADIUS, 0.0).astype(np.float32)
  return X + offset[:, None, None, None]


def passed(check, **claim):
  """Whether a claim, which has only what the check reads, passes; the check is not skipped."""
  verdict = check(SimpleNamespace(**claim))[0]
  assert verdict is not None
  return verdict


def curve(accuracy, interval=None):
  return SimpleNamespace(accuracy=np.array(accuracy), interval=lambda: interval)


def classifier(robust=None, norm='linf', **fields):
  """A classifier of the images X of which `robust(attacks, radius)` examples stay robust."""
  return SimpleNamespace(
    x=X,
    norm=norm,
    bounds=(0.0, 1.0),
    diameter=1.0,
    logits_fn=None,
    robust=lambda attacks, radius, rows: rows[: robust(attacks, radius)],
    **fields,
  )


def legal(images, radius=RADIUS, norm='linf'):
  log = SimpleNamespace(images=images, radius=radius)
  return passed(sanity_checks.legality, classifier=classifier(norm=norm), attack_log=log)


def test_1_legality():
  assert legal(moved())
  for row, pixel in ((1, 0.60001), (2, -0.01), (3, 0.51), (0, 0.500001)):
    images = moved()
    images[row, 0, 0, 0] = pixel
    assert not legal(images)
  assert legal(X + 0.05, np.full(4, 0.1), 'l2')
  assert not legal(X + 0.051, np.full(4, 0.1), 'l2')
  # Each image has a distance of its own.
  images = X.copy()
  images[1, 1, 0, 0] = 0.6
  assert legal(images, np.array([0.0, 0.1, 0.0, 0.0]), 'l2')


def test_1_legality_says_by_how_much():
  log = SimpleNamespace(images=X + np.float32(0.25), radius=np.array([0.1, 0.2, 0.25, np.inf]))
  found = sanity_checks.legality(SimpleNamespace(classifier=classifier(), attack_log=log))
  text = 'maximal excess over the radius 2.5e-01, pixels in [0.75, 0.75]'
  assert found == (False, text, {'excess': 0.25, 'lowest': 0.75, 'highest': 0.75})


def test_1_pixels_are_legal_at_the_bounds_alone():
  for offset, expected in ((0.5, True), (0.501, False), (-0.5, True), (-0.501, False)):
    assert legal(X + np.float32(offset), np.ones(4)) is expected


def test_1_the_room_for_rounding_is_a_unit_of_the_largest_pixel():
  radii = np.array([0.0, 0.5])
  unit = 2.0**-21  # of float32 at 4
  for norm, units in (('linf', 1.0), ('l2', 3.0)):
    found = sanity_checks.allowed_distances(radii, 9, norm, (-4.0, 2.0))
    np.testing.assert_allclose(found, [units * unit, 0.5 + 5e-7 + units * unit], rtol=1e-12)


def test_1_legality_of_what_is_not_a_number():
  images = moved()
  images[1, 0, 0, 0] = np.nan
  assert not legal(images)


def test_2_rescoring():
  def agrees(wrong, clean_accuracy):
    """Of four images, one is misclassified as it is, and one at radius 0.1."""
    log = SimpleNamespace(radius=np.array([0.0, np.inf, 0.1, np.inf]))
    claim = {'attack_log': log, 'wrong': wrong, 'clean_accuracy': clean_accuracy}
    return passed(sanity_checks.rescoring, **claim)

  misclassified = np.array([True, False, True, False])
  assert agrees(misclassified, 0.75)
  assert not agrees(~misclassified, 0.75)
  assert not agrees(misclassified, 0.5)
  assert not agrees(misclassified, 1.0)


def test_2_rescoring_says_how_many_differ():
  log = SimpleNamespace(radius=np.array([0.0, np.inf, 0.1, np.inf]))
  wrong = np.array([False, False, False, True])
  claim = SimpleNamespace(attack_log=log, wrong=wrong, clean_accuracy=1.0)
  text = '3 images differ; clean accuracy 1.0000, at radius 0 0.7500'
  values = {'differ': 3, 'clean_accuracy': 1.0, 'accuracy_at_zero': 0.75}
  assert sanity_checks.rescoring(claim) == (False, text, values)


def test_3_monotone():
  def monotone(accuracy, interval):
    claim = {'radii': np.array([0.0, 0.1, 0.2]), 'curves': {'pgd': curve(accuracy, interval)}}
    return passed(sanity_checks.monotone, **claim)

  interval = np.array([[0.8, 1.0], [0.4, 0.6], [0.4, 0.6]])
  assert monotone([0.9, 0.5, 0.55], interval)
  assert not monotone([0.9, 0.5, 0.7], interval)
  # Small rises add up.
  assert not monotone([0.5, 0.58, 0.65], np.array([[0.4, 0.6]] * 3))
  # A small rise counts against the least before it, and not against what comes after.
  assert monotone([0.9, 0.95, 0.3], np.array([[0.8, 1.0], [0.8, 1.0], [0.2, 0.4]]))


def test_3_monotone_says_how_much_it_rises():
  claim = SimpleNamespace(
    radii=np.array([0.0, 0.1, 0.2]),
    curves={'pgd': curve([0.75, 0.25, 0.5], np.array([[0.5, 1.0], [0.0, 0.5], [0.2, 0.9]]))},
  )
  values = {'radii': [0.0, 0.1, 0.2], 'accuracy': [0.75, 0.25, 0.5]}
  assert sanity_checks.monotone(claim) == (True, 'maximal rise 0.2500', values)
  claim.radii = claim.radii[:2]
  claim.curves = {'pgd': curve([0.25, 0.75], np.array([[0.0, 0.5], [0.5, 1.0]]))}
  assert sanity_checks.monotone(claim)[0] is False


@pytest.mark.parametrize(
  ('accuracy', 'expected'),
  [
    ({0.5: 0.01, 0.75: 0.01, 1.0: 0.01}, True),
    ({0.5: 0.02, 0.75: 0.02, 1.0: 0.02}, False),
    ({0.5: 0.0}, True),
    ({0.5: 0.12, 0.75: 0.0}, True),
    ({0.5: 0.2, 0.75: 0.0}, False),
    ({0.5: 0.1, 0.75: 0.1, 1.0: 0.1}, False),
  ],
)
def test_4_large_radius(accuracy, expected):
  found = sanity_checks.large_radius(
    SimpleNamespace(
      classifier=classifier(lambda _, radius: round(100 * accuracy[radius])),
      suite=SimpleNamespace(attacks=()),
      attack_log=SimpleNamespace(radius=np.full(100, np.inf)),
      largest_share=0.12,
      rows=np.arange(100),
      count=100,
    )
  )
  assert found[0] == expected
  for radius, value in accuracy.items():  # each once, beside its own accuracy
    assert found[1].count(f'{value:.4f} at radius {radius:g}') == 1
  assert found[2]['radii'] == list(accuracy) and found[2]['accuracy'] == list(accuracy.values())


def test_4_only_what_was_robust_at_half_the_range_is_attacked():
  """Of 10 examples the first 8 are in the sample, and 5 of them were robust beyond radius 1."""
  radius = np.array([np.inf, 1.0, 1.01, np.inf, 0.0, 1.3, np.inf, 0.6, np.inf, np.inf])
  tried = []

  def robust(attacks, radius, rows):
    tried.append((radius, rows.tolist()))
    return rows[:1]

  attacked = classifier()
  attacked.robust, attacked.diameter = robust, 2.0
  claim = SimpleNamespace(
    classifier=attacked,
    suite=SimpleNamespace(attacks=()),
    attack_log=SimpleNamespace(radius=radius),
    largest_share=0.5,
    rows=np.arange(8),
    count=8,
  )
  passed, text, values = sanity_checks.large_radius(claim)
  assert tried == [(1.0, [0, 2, 3, 5, 6]), (1.5, [0]), (2.0, [0])]
  assert not passed  # an eighth is robust to the end
  assert text.endswith('; the most frequent class has 0.5000 of the examples')
  assert values == {
    'radii': [1.0, 1.5, 2.0],
    'accuracy': [0.125, 0.125, 0.125],
    'largest_share': 0.5,
  }


def test_5_iterative():
  def at_least_as_strong(pgd, fgsm, count=1000):
    curves = {'pgd': curve(pgd), 'fgsm': curve(fgsm)}
    return passed(sanity_checks.iterative, middle_radius=0.1, curves=curves, count=count)

  assert at_least_as_strong([0.9, 0.4], [0.9, 0.6])
  assert at_least_as_strong([0.9, 0.405], [0.9, 0.4])
  assert not at_least_as_strong([0.9, 0.406], [0.9, 0.4])
  assert at_least_as_strong([0.9, 0.41], [0.9, 0.4], count=100)  # one example
  assert not at_least_as_strong([0.9, 0.42], [0.9, 0.4], count=100)


@pytest.mark.parametrize(('pgd', 'expected'), [(0.125, '0.0000'), (0.5, '0.2500')])
def test_5_iterative_says_how_much_stronger_one_step_is(pgd, expected):
  curves = {'pgd': curve([0.5, pgd]), 'fgsm': curve([0.75, 0.25])}
  claim = SimpleNamespace(middle_radius=0.1, curves=curves, count=1000)
  _, text, values = sanity_checks.iterative(claim)
  assert text == f'one step is stronger by at most {expected}'
  assert values == {'one_step': [0.75, 0.25]}


def converged(more_steps, more_restarts, count):
  """The judgement where twice the steps, or the restarts, misclassify so many more examples."""
  pgd = attack_suite.PGD(name='pgd', objective=jnp.sum, num_steps=3)
  other = attack_suite.PGD(name='other', objective=jnp.sum, num_steps=7)
  rows = np.arange(count // 2)
  more = {(6,): more_steps, (3, 7): more_restarts}

  def left(attacks, radius):
    assert radius == 0.1
    return len(rows) - more[tuple(attack.num_steps for attack in attacks)]

  claim = SimpleNamespace(
    middle_radius=0.1,
    robust_rows=rows,
    count=count,
    suite=attack_suite.Suite((pgd, other), doubled=('pgd',)),
    redrawn=classifier(left),
  )
  return sanity_checks.converged(claim)


@pytest.mark.parametrize('more', [(5, 0), (0, 5)])
def test_6_converged(more):
  passed, text, values = converged(4, 3, 1000)
  assert passed and text == (
    'of 1000 examples, doubling steps misclassifies 4 more, doubling restarts 3'
  )
  assert values == {'more_steps': 4, 'more_restarts': 3, 'count': 1000}
  assert converged(*more, 1000)[0] is False
  assert converged(1, 1, 20)[0] is True  # one example is always allowed
  assert converged(2, 0, 20)[0] is False


@pytest.mark.parametrize('before', [0, 1])
def test_7_gradient_free(before):
  """Square misclassifies `before` examples in the suite, and the others when it runs again."""

  def beaten_by_at_most(more, count):
    found_by_square = np.arange(count) < before
    return passed(
      sanity_checks.gradient_free,
      classifier=classifier(),
      attack_log=SimpleNamespace(
        names=('clean', 'square'),
        attack=np.where(found_by_square, 1, -1),
        radius=np.where(found_by_square, 0.1, np.inf),
      ),
      middle_radius=0.1,
      rows=np.arange(count),
      robust_rows=np.arange(before, count),
      count=count,
      num_queries=10,
      redrawn=classifier(lambda *_: count - more),
    )

  assert beaten_by_at_most(2, 1000)
  assert not beaten_by_at_most(3, 1000)
  assert not beaten_by_at_most(2, 100)
  assert beaten_by_at_most(1, 100)
  assert beaten_by_at_most(1, 2)


def test_7_what_square_found_within_the_radius_counts_and_nothing_else():
  """Of six examples, Square has found two within the radius, and another attack the third."""
  claim = SimpleNamespace(
    classifier=classifier(),
    attack_log=SimpleNamespace(
      names=('clean', 'square', 'pgd', 'transfer'),
      attack=np.array([1, 1, 1, 2, -1, 3, 1]),
      radius=np.array([0.05, 0.1, 0.2, 0.1, np.inf, 0.1, 0.1]),
    ),
    middle_radius=0.1,
    rows=np.arange(6),
    robust_rows=np.array([2, 4]),
    count=6,
    num_queries=10,
    redrawn=classifier(
      lambda attacks, radius: 1 if (attacks[0].num_steps, radius) == (10, 0.1) else 0
    ),
  )
  text = 'Square alone misclassifies 3 of 6'
  assert sanity_checks.gradient_free(claim) == (False, text, {'more': 3, 'count': 6})


@pytest.mark.parametrize('name', ['noise', 'signs'])
def test_8_each_baseline_is_weaker(name):
  curves = {each: curve([0.9, 0.3]) for each in ('pgd', 'noise', 'signs')}
  claim = {'surrogate': None, 'middle_radius': 0.1, 'count': 1000}
  assert passed(sanity_checks.weaker, curves=curves, **claim)
  curves[name] = curve([0.9, 0.294])
  assert not passed(sanity_checks.weaker, curves=curves, **claim)


def test_8_weaker():
  weak = curve([0.9, 0.8])
  claim = {'curves': {'pgd': curve([0.9, 0.3]), 'noise': weak, 'signs': weak}}
  claim |= {'middle_radius': 0.1, 'count': 1000}
  assert passed(sanity_checks.weaker, surrogate=None, **claim)
  claim |= {'surrogate': 'another', 'transfer_accuracy': lambda: np.array([0.9, 0.2])}
  result, figure, values = sanity_checks.weaker(SimpleNamespace(**claim))
  assert not result
  assert figure == 'transfer is stronger by at most 0.1000 (noise, signs, transfer)'
  assert values == {'noise': [0.9, 0.8], 'signs': [0.9, 0.8], 'transfer': [0.9, 0.2]}


def test_8_what_is_weaker_is_stronger_by_nothing():
  curves = {'pgd': curve([0.5]), 'noise': curve([0.75]), 'signs': curve([0.625])}
  claim = SimpleNamespace(curves=curves, middle_radius=0.1, count=1000, surrogate=None)
  passed, text, _ = sanity_checks.weaker(claim)
  assert passed and text == 'signs is stronger by at most 0.0000 (noise, signs)'


@pytest.mark.parametrize(('count', 'expected'), [(100, True), (101, True), (150, False)])
def test_8_one_example_is_allowed(count, expected):
  curves = {'pgd': curve([0.5]), 'noise': curve([0.5 - 1.0 / 101]), 'signs': curve([0.5])}
  claim = {'curves': curves, 'middle_radius': 0.1, 'count': count, 'surrogate': None}
  assert passed(sanity_checks.weaker, **claim) is expected


@pytest.mark.parametrize('kind', ['zero', 'NaN or Inf', 'tied', 'saturated', 'not finite'])
def test_9_gradients(kind):
  def healthy(defects):
    """Of 400 examples, so many have a defect of this kind."""
    defective = np.arange(400) < defects
    logits = np.tile(np.float32([[1.0, 0.0, 0.0], [0.0, 1.0, 0.0]]), (200, 1))
    wrong = {
      'tied': [1.0, 1.0, 0.0],
      'saturated': [200.0, 0.0, 1.0],
      'not finite': [9.0, np.nan, 1.0],
    }
    if kind in wrong:
      logits[defective] = wrong[kind]
    none = np.zeros(400, bool)
    flags = {name: defective if name == kind else none for name in ('zero', 'NaN or Inf')}
    attacked = classifier(
      args=(),
      labels=np.zeros(400, np.int32),
      targets=None,
      attack=lambda *_: (None, None),
      apply=lambda *_: logits,
      in_batches=lambda *_: flags,
    )
    pgd = attack_suite.PGD(name='pgd', objective=jnp.sum, aim=lambda *_: None)
    return sanity_checks.healthy_gradients(
      SimpleNamespace(
        classifier=attacked,
        suite=attack_suite.Suite((pgd,), doubled=()),
        correct=np.ones(400, bool),
        rows=np.arange(400),
        count=400,
        middle_radius=0.1,
      )
    )

  assert healthy(4)[0]
  result, figure, _ = healthy(8)
  assert not result and figure.startswith(f'worst share 0.0200 ({kind}, ')


def test_9_gradients_are_those_of_the_objective_where_an_image_is_wrong_too():
  """Of four images, the gradient is zero at the first and NaN at the second; the last is wrong."""
  x = np.float32([[-1.0, 1.0], [4.0, 0.0], [4.0, 1.0], [4.0, -1.0]])

  def objective(x, aim):
    slope = jax.lax.stop_gradient(jnp.where(x[:, 1] == 0.0, jnp.nan, x[:, 1]))
    return slope * jnp.maximum(x[:, 0], 0.0)

  def logits(x, *_):
    return np.stack([x[:, 0], 0.5 * np.ones(len(x), np.float32)], axis=1)

  attacked = classifier(
    args=(),
    labels=np.array([9, 1, 0, 0, 1]),
    targets=None,
    attack=lambda attack, radius, attempt, rows: (x[rows - 1 + attempt], None),
    apply=lambda _, x: logits(x),
    in_batches=lambda function, batch: function(batch),
  )
  until = losses.UntilMisclassified(objective, logits)

  def aim(_, rows, attempt):
    assert attempt == 0
    return losses.Aim(jnp.asarray(attacked.labels[rows]))

  attack = attack_suite.PGD(name='pgd', objective=until, aim=aim)
  noise = attack_suite.Noise(name='noise')
  claim = SimpleNamespace(
    classifier=attacked,
    suite=attack_suite.Suite((attack, noise), doubled=()),
    correct=np.array([False, True, True, True, True]),
    rows=np.arange(5),
    count=5,
    middle_radius=0.1,
  )
  passed, text, values = sanity_checks.healthy_gradients(claim)
  assert values == {
    'logits': {'tied': 0.0, 'saturated': 0.0, 'not finite': 0.0},
    'pgd': {'zero': 0.25, 'NaN or Inf': 0.25},
  }
  assert not passed and text == 'worst share 0.2500 (NaN or Inf, pgd)'


def gives(again, reordered):
  """A classifier with these logits; `reordered` are those of the reverse batch, in order again."""
  x = np.arange(4.0)

  def apply(_, batch):
    if np.array_equal(batch, x):
      return again
    np.testing.assert_array_equal(batch, x[::-1])
    return reordered[::-1]

  found = classifier(apply=apply)
  found.x = x
  return found


def test_10_deterministic():
  logits = np.random.default_rng(0).normal(size=(4, 3))

  def agrees(*results):
    claim = {'classifier': gives(*results), 'logits': logits, 'rows': np.arange(4)}
    return passed(sanity_checks.deterministic, **claim)

  assert agrees(logits, logits * (1.0 + 5e-5))
  assert not agrees(logits, logits * (1.0 + 2e-4))
  assert not agrees(logits + 1e-12, logits)
  assert not agrees(logits, logits[::-1])


def test_10_deterministic_says_what_changes():
  logits = np.array([[0.5, 0.0], [0.1, 0.1], [0.25, 0.0], [0.0, 0.0]])
  again, reordered = logits.copy(), logits.copy()
  again[:3, 0] += 1.0
  reordered[0, 1] -= 0.0625

  def judge(rows, logits):
    attacked = gives(again, reordered)
    claim = {'classifier': attacked, 'logits': logits, 'rows': np.asarray(rows)}
    return sanity_checks.deterministic(SimpleNamespace(**claim))

  def text(bits, change):
    return (
      f'{bits} examples differ when repeated; reordering changes logits by {change} of the maximum'
    )

  assert judge(range(4), logits) == (False, text(3, '1.2e-01'), {'differ': 3, 'reordered': 0.125})
  assert judge([3], logits) == (True, text(0, '0.0e+00'), {'differ': 0, 'reordered': 0.0})
  nothing = np.zeros_like(logits)
  assert judge([0], nothing)[2]['reordered'] == 0.0  # of logits that are all 0


def mean_of_minima(images, wrong, radii, accuracy, interval, config, count=4):
  reported = curve(accuracy, interval)
  reported.radii, reported.correct = radii, np.empty((2, count))
  return passed(
    sanity_checks.mean_of_minima,
    classifier=classifier(),
    attack_log=SimpleNamespace(images=images),
    wrong=wrong,
    curve=reported,
    config=config,
  )


def test_11_mean_of_minima():
  """Of four images, one is misclassified as it is, one within 0.1, one within 0.2 and one not."""
  accuracy = np.array([0.5, 0.25])
  sound = {
    'images': moved(),
    'wrong': np.array([True, True, True, False]),
    'radii': np.array([0.1, 0.2]),
    'accuracy': accuracy,
    'interval': np.stack([accuracy - 0.1, accuracy + 0.1], axis=1),
    'config': {'attacks': {}, 'norm': 'linf', 'bounds': [0, 1], 'seed': 0},
  }

  def agrees(**fault):
    return mean_of_minima(**sound | fault)

  assert agrees()
  # A minimum of means, in which attacks share the examples, is another number.
  assert not agrees(accuracy=np.array([0.5, 0.5]))
  assert not agrees(interval=sound['interval'] + 0.2)
  assert not agrees(count=5)
  assert not agrees(count=3)
  assert not agrees(wrong=~sound['wrong'])
  second = np.arange(4)[:, None, None, None] == 1
  assert agrees(images=np.where(second, X + np.float32(0.05), moved()))
  assert not agrees(images=np.where(second, X + np.float32(0.15), moved()))
  for missing in ('seed', 'attacks', 'norm', 'bounds'):
    config = {name: value for name, value in sound['config'].items() if name != missing}
    assert not agrees(config=config)


def test_11_says_what_is_missing():
  reported = curve([0.75], np.array([[0.5, 1.0]]))
  reported.radii, reported.correct = np.array([0.1]), np.empty((1, 4))
  claim = SimpleNamespace(
    classifier=classifier(),
    attack_log=SimpleNamespace(images=X),
    wrong=np.array([True, True, False, False]),
    curve=reported,
    config={'norm': 'linf', 'seed': 0},
  )
  text = 'differs by 0.2500 from the mean of minima over n = 4; not reported: attacks, bounds'
  values = {'error': 0.25, 'count': 4, 'missing': ['attacks', 'bounds']}
  assert sanity_checks.mean_of_minima(claim) == (False, text, values)


def test_11_measures_l2():
  images = X + np.float32(0.05)  # a distance of 0.1 in l2
  accuracy = np.array([1.0, 0.0])
  interval = np.stack([accuracy, accuracy], axis=1)
  config = {'attacks': {}, 'norm': 'l2', 'bounds': [0, 1], 'seed': 0}
  figures = images, np.ones(4, bool), np.array([0.06, 0.1]), accuracy, interval
  assert mean_of_minima(*figures, config)
  assert not mean_of_minima(*figures, config | {'norm': 'linf'})


@pytest.mark.parametrize(
  ('fault', 'defect'),
  [
    ({'clean_accuracy': 0.12}, 'clean accuracy is that of a constant'),
    ({'scale': 0.01}, 'no active dimension'),
    ({'scale': 1e-6}, 'no active dimension; the latent scale is not in [0.001, 1000]'),
    ({'scale': 1e6}, 'the latent scale is not in [0.001, 1000]'),
    ({'error': 1.0}, 'reconstructions are worse than the mean image'),
    ({'error': np.nan}, 'reconstructions are worse than the mean image'),
  ],
)
def test_12_informative(fault, defect):
  representation, x = np.random.default_rng(0).normal(size=(2, 100, 8))

  def judge(clean_accuracy=0.9, scale=1.0, error=0.1, reconstruct_fn='decoder'):
    encoder = classifier(apply=lambda _, x: x + error)
    encoder.x = x
    return sanity_checks.informative(
      SimpleNamespace(
        classifier=encoder,
        clean_accuracy=clean_accuracy,
        largest_share=0.12,
        representation=scale * representation,
        reconstruct_fn=reconstruct_fn,
        rows=np.arange(100),
      )
    )

  latents = scipy.stats.moment(representation, order=2, axis=0)
  _, text, values = judge(scale=2.0)
  assert values['active_dimensions'] == 8.0
  assert values['latent_scale'] == pytest.approx(2.0 * latents.sum() ** 0.5)
  assert values['squared_error'] == pytest.approx(8 * 0.1**2)
  assert values['variance'] == pytest.approx(np.var(x, axis=0).sum())
  assert text == ', '.join(f'{key.replace("_", " ")} {value:.4g}' for key, value in values.items())
  # One dimension, the limits of the latent scale, and no better than the mean image.
  assert judge(scale=np.arange(8) == 3)[0]
  assert not judge(scale=0.9999e3 / latents.sum() ** 0.5)[1].endswith('1000]')
  assert judge(scale=1.0001e3 / latents.sum() ** 0.5)[1].endswith('1000]')
  assert '[0.001' not in judge(scale=1.01e-3 / latents.sum() ** 0.5)[1]
  assert '[0.001' in judge(scale=0.99e-3 / latents.sum() ** 0.5)[1]
  worse = (np.var(x, axis=0).sum() / 8) ** 0.5
  assert judge(error=0.99 * worse)[0] and not judge(error=1.01 * worse)[0]
  assert judge()[0] and list(judge()[2])[3:] == ['squared_error', 'variance']
  assert judge(reconstruct_fn=None)[0] and len(judge(reconstruct_fn=None)[2]) == 3
  result, figure, _ = judge(**fault)
  assert not result and figure.endswith(f'; {defect}')


# ---------------------------------------------------------------------------------------------
# JSON values and summary
# ---------------------------------------------------------------------------------------------


SQUARE = 'Square does not beat gradients'


def checks():
  return (
    verdicts.SanityCheck(7, SQUARE, 'pass', 'Square alone misclassifies 2 of 1000', {'more': 2}),
    verdicts.SanityCheck(7, SQUARE, 'fail', 'Square alone misclassifies 30 of 1000', {'more': 30}),
    verdicts.SanityCheck(6, 'attack has converged', 'skipped', 'nothing to attack', {}),
  )


def test_json_round_trip():
  for check, passed in zip(checks(), (True, False, None), strict=True):
    content = json.loads(json.dumps(check.to_json()))
    assert list(content) == ['number', 'name', 'verdict', 'passed', 'figure', 'values']
    assert content['passed'] is passed is check.passed
    assert verdicts.SanityCheck.from_json(content) == check


def test_checks_of_older_files_have_passed_alone():
  old = {'number': 6, 'name': 'attack has converged', 'passed': False, 'figure': '5 of 200'}
  assert verdicts.SanityCheck.from_json(old).verdict == 'fail'
  assert verdicts.SanityCheck.from_json(old | {'passed': True}).verdict == 'pass'
  assert verdicts.summary([old]) == (
    'checks: 0 passed, 1 failed (6: attack has converged), 0 skipped'
  )
  with pytest.raises(ValueError, match='verdict must be'):
    verdicts.SanityCheck.from_json(old | {'verdict': 'perhaps'})


def test_the_summary_counts_verdicts_and_names_what_did_not_pass():
  expected = (
    'checks: 1 passed, 1 failed (7: Square does not beat gradients), '
    '1 skipped (6: attack has converged)'
  )
  assert verdicts.summary(checks()) == expected
  assert verdicts.summary([check.to_json() for check in checks()]) == expected
  assert verdicts.summary([]) == 'checks: not run'


def test_reading_checks_does_not_load_jax():
  code = (
    'import sys\nfrom se_vae.evaluation import verdicts\n'
    'verdicts.summary([])\nsys.exit("jax" in sys.modules)'
  )
  subprocess.run([sys.executable, '-c', code], check=True)


def test_13_certificates_are_compared_with_all_that_was_found():
  """Two examples are certified within 0.1. What misleads them comes from attacks or from noise."""

  def judge(radius=(np.inf, np.inf), offset=0.0, noise=(True, True)):
    radius, attacked = np.array(radius), classifier()
    attacked.x = X[:2]
    log = SimpleNamespace(
      names=('clean', 'pgd'),
      radius=radius,
      images=X[:2] + np.float32(offset),
      attack=np.where(np.isfinite(radius), 1, -1),
    )
    return sanity_checks.certificates_hold(
      SimpleNamespace(
        attack_log=log,
        classifier=attacked,
        certificate=SimpleNamespace(radius=np.float32([0.1, 0.1])),
        correct=np.ones(2, bool),
        middle_radius=0.1,
        rows=np.arange(2),
        curves={'noise': SimpleNamespace(radii=[0.1], correct=np.array([noise]))},
      )
    )

  assert judge() == (
    True,
    'holds for all; 1.0000 of the examples are certified beyond radius 0',
    {'examples': [], 'attacks': []},
  )
  assert judge(radius=(0.2, np.inf), offset=0.15)[0]
  verdict, _, values = judge(noise=(True, False))
  assert not verdict and values == {'examples': [1], 'attacks': ['noise']}
  verdict, text, values = judge(radius=(0.2, np.inf), offset=0.05)  # it is nearer than its radius
  assert not verdict and values == {'examples': [0], 'attacks': ['pgd']}
  assert text == (
    '1 examples are misclassified within their certified radius: example 0 by pgd at radius 0.05, '
    'certified up to 0.1'
  )


def test_13_clean_errors_and_the_first_attack_that_misleads_are_named():
  """Examples 0 and 1 are wrong as they are, of which the log has the second alone."""
  count = 5
  attacked = classifier()
  attacked.x = np.full((count, 2, 2, 1), 0.5, np.float32)

  def judge(certified, middle_radius=0.1):
    log = SimpleNamespace(
      names=('clean', 'pgd', 'square'),
      radius=np.array([np.inf, 0.0, 0.1, 0.1, np.inf]),
      images=attacked.x + np.float32([0.0, 0.0, 0.1, 0.1, 0.0])[:, None, None, None],
      attack=np.array([-1, 0, 2, 1, -1]),
    )
    return sanity_checks.certificates_hold(
      SimpleNamespace(
        attack_log=log,
        classifier=attacked,
        certificate=SimpleNamespace(radius=np.float32(certified)),
        correct=np.array([False, False, True, True, True]),
        middle_radius=middle_radius,
        rows=np.arange(1, count),
        curves={
          'pgd': SimpleNamespace(
            radii=[0.0, 0.1], correct=np.array([[0, 1, 1, 1], [0, 0, 0, 0]], bool)
          )
        },
      )
    )

  for certified in (0.0, 0.05):
    found = {'examples': [0], 'attacks': ['clean']}
    assert judge([certified, -1.0, 0.0, 0.0, 0.0], 0.0)[2] == found
  passed, text, values = judge([-np.inf, 0.0, 0.1, 0.1, 0.15])
  assert not passed
  assert values == {'examples': [1, 2, 3, 4], 'attacks': ['clean', 'square', 'pgd', 'pgd']}
  assert text == (
    '4 examples are misclassified within their certified radius: example 1 by clean at radius 0, '
    'certified up to 0'
  )
  # The raw curves are not of this claim where no radius is above 0.
  assert judge([-np.inf, 0.0, 0.05, 0.1, 0.1], 0.0)[2] == {
    'examples': [1, 3],
    'attacks': ['clean', 'pgd'],
  }
  passed, text, _ = judge([-np.inf, -1.0, 0.0, 0.05, 0.05])
  assert passed
  assert text == 'holds for all; 0.4000 of the examples are certified beyond radius 0'


@pytest.mark.parametrize(
  ('check', 'claim', 'reason'),
  [
    ('monotone', {'radii': np.array([0.1])}, 'nothing to compare: there is one radius'),
    ('iterative', {'middle_radius': 0.0}, 'no radius is above 0'),
    ('converged', {'middle_radius': 0.0}, 'no radius is above 0'),
    ('converged', {'robust_rows': np.arange(0)}, 'of the first 4 examples none is robust at'),
    ('gradient_free', {'classifier': classifier(norm='l2')}, 'Square is for linf, and the norm is'),
    ('gradient_free', {'middle_radius': 0.0}, 'no radius is above 0'),
    ('gradient_free', {'robust_rows': np.arange(0)}, 'none is robust at radius 0.25'),
    ('weaker', {'middle_radius': 0.0}, 'no radius is above 0'),
    ('healthy_gradients', {'correct': np.zeros(4, bool)}, 'none of the first 4 examples is right'),
    ('certificates_hold', {'certificate': None}, 'no certificates were asked for'),
  ],
)
def test_a_check_with_nothing_to_do_says_so(check, claim, reason):
  every = {
    'radii': np.array([0.0, 0.25]),
    'middle_radius': 0.25,
    'robust_rows': np.arange(2),
    'count': 4,
    'rows': np.arange(4),
    'classifier': classifier(),
    'attack_log': SimpleNamespace(
      names=('clean', 'square'), attack=np.array([-1, -1, -1, 0]), radius=np.full(4, np.inf)
    ),
  }
  verdict, text, values = getattr(sanity_checks, check)(SimpleNamespace(**every | claim))
  assert verdict is None and reason in text and values == {}


def test_checks_are_numbered_in_order(monkeypatch):
  judgements = {True: 'pass', False: 'fail', None: 'skipped'}
  checks = {
    verdict: lambda claim, passed=passed: (passed, f'{claim} {passed}', {'a': 1})
    for passed, verdict in judgements.items()
  }
  monkeypatch.setattr(sanity_checks, 'CHECKS', checks)
  assert sanity_checks.run_checks('of a claim') == tuple(
    verdicts.SanityCheck(number, verdict, verdict, f'of a claim {passed}', {'a': 1})
    for number, (passed, verdict) in enumerate(judgements.items(), start=1)
  )
