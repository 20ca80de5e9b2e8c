"""Each check passes on a sound claim, and fails on a planted fault."""

from __future__ import annotations

import json
import subprocess
import sys
from types import SimpleNamespace

import jax.numpy as jnp
import numpy as np
import pytest

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


def test_3_monotone():
  def monotone(accuracy, interval):
    claim = {'radii': np.array([0.0, 0.1, 0.2]), 'curves': {'pgd': curve(accuracy, interval)}}
    return passed(sanity_checks.monotone, **claim)

  interval = np.array([[0.8, 1.0], [0.4, 0.6], [0.4, 0.6]])
  assert monotone([0.9, 0.5, 0.55], interval)
  assert not monotone([0.9, 0.5, 0.7], interval)
  # Small rises add up.
  assert not monotone([0.5, 0.58, 0.65], np.array([[0.4, 0.6]] * 3))


@pytest.mark.parametrize(
  ('accuracy', 'expected'),
  [
    ({0.5: 0.01, 0.75: 0.01, 1.0: 0.01}, True),
    ({0.5: 0.02, 0.75: 0.02, 1.0: 0.02}, False),
    ({0.5: 0.0}, True),
    ({0.5: 0.1, 0.75: 0.0}, True),
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


def test_5_iterative():
  def at_least_as_strong(pgd, fgsm, count=1000):
    curves = {'pgd': curve(pgd), 'fgsm': curve(fgsm)}
    return passed(sanity_checks.iterative, middle_radius=0.1, curves=curves, count=count)

  assert at_least_as_strong([0.9, 0.4], [0.9, 0.6])
  assert at_least_as_strong([0.9, 0.405], [0.9, 0.4])
  assert not at_least_as_strong([0.9, 0.406], [0.9, 0.4])
  assert at_least_as_strong([0.9, 0.41], [0.9, 0.4], count=100)  # one example


def converged(more_steps, more_restarts, count):
  """The verdict where twice the steps, or the restarts, misclassify so many more examples."""
  pgd = attack_suite.PGD(name='pgd', objective=jnp.sum, num_steps=3)
  rows = np.arange(count // 2)
  more = {6: more_steps, 3: more_restarts}
  return passed(
    sanity_checks.converged,
    middle_radius=0.1,
    robust_rows=rows,
    count=count,
    suite=attack_suite.Suite((pgd,), doubled=('pgd',)),
    redrawn=classifier(lambda attacks, _: len(rows) - more[attacks[0].num_steps]),
  )


@pytest.mark.parametrize('more', [(5, 0), (0, 5)])
def test_6_converged(more):
  assert converged(4, 4, 1000)
  assert not converged(*more, 1000)
  assert converged(1, 1, 20)  # one example is always allowed
  assert not converged(2, 0, 20)


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
  result, figure, _ = sanity_checks.weaker(SimpleNamespace(**claim))
  assert not result and figure.startswith('transfer')


@pytest.mark.parametrize('kind', ['zero', 'NaN or Inf', 'tied', 'saturated', 'not finite'])
def test_9_gradients(kind):
  def healthy(defects):
    """Of 400 examples, so many have a defect of this kind."""
    defective = np.arange(400) < defects
    logits = np.tile(np.float32([1.0, 0.0]), (400, 1))
    wrong = {'tied': [0.0, 0.0], 'saturated': [200.0, 0.0], 'not finite': [9.0, np.nan]}
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

  assert healthy(2)[0]
  result, figure, _ = healthy(8)
  assert not result and figure.startswith(f'worst share 0.0200 ({kind}, ')


def test_10_deterministic():
  logits = np.random.default_rng(0).normal(size=(4, 3))

  def agrees(again, reordered):
    """`reordered` are the logits of the batch in reverse, put back in order."""

    def apply(_, x):
      return again if x is X else reordered[::-1]

    claim = {'classifier': classifier(apply=apply), 'logits': logits, 'rows': np.arange(4)}
    return passed(sanity_checks.deterministic, **claim)

  assert agrees(logits, logits * (1.0 + 5e-5))
  assert not agrees(logits, logits * (1.0 + 2e-4))
  assert not agrees(logits + 1e-12, logits)
  assert not agrees(logits, logits[::-1])


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
  assert not agrees(wrong=~sound['wrong'])
  second = np.arange(4)[:, None, None, None] == 1
  assert agrees(images=np.where(second, X + np.float32(0.05), moved()))
  assert not agrees(images=np.where(second, X + np.float32(0.15), moved()))
  del sound['config']['seed']
  assert not agrees()


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
    ({'clean_accuracy': 0.1}, 'clean accuracy is that of a constant'),
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

  assert judge()[0] and judge(radius=(0.2, np.inf), offset=0.15)[0]
  verdict, _, values = judge(noise=(True, False))
  assert not verdict and values == {'examples': [1], 'attacks': ['noise']}
  verdict, _, values = judge(radius=(0.2, np.inf), offset=0.05)  # it is nearer than its radius
  assert not verdict and values == {'examples': [0], 'attacks': ['pgd']}
