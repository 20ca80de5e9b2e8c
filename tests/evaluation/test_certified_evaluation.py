"""`evaluate(certify=True)`: the certified curve is below the attacked one, and check 13 says so."""

from __future__ import annotations

import dataclasses
import functools

import flax.linen as nn
import jax
import numpy as np
import pytest

from se_vae import ArgumentError, DiagonalGaussian, GaussianLatents, LinearProbe, ProbedEncoder
from se_vae.certification import Method
from se_vae.evaluation import certificates, certifiers, robustness
from se_vae.models.vae import VAE, make_vae
from se_vae.parallel import sharding
from tests.evaluation.small_model import SHAPE, model_and_params

DTYPE_PROMOTION = 'standard'  # optax takes part

RADII = (0.3, 0.0, 0.1, 0.02)
COUNT = 24
X = np.random.default_rng(1).uniform(size=(COUNT, *SHAPE)).astype(np.float32)
RNG = np.random.default_rng(2)
PROBE = LinearProbe(*(RNG.normal(size=size).astype(np.float32) for size in ((2, 3), (3,))))


@functools.cache
def labels():
  """What the classifier says, but for the first two, which are wrong."""
  model, params = model_and_params()
  found = np.asarray(ProbedEncoder(model)(X, params, PROBE)).argmax(axis=1)
  return np.where(np.arange(COUNT) < 2, (found + 1) % 3, found)


def evaluate(**options):
  model, params = model_and_params()
  defaults = {'radii': RADII, 'num_steps': 5, 'num_queries': 20, 'batch_size': 8, 'certify': True}
  defaults |= {'mesh': sharding.data_mesh(1), 'args': (params, PROBE), 'check_examples': 0}
  options = {**defaults, **options}
  x, y = options.pop('x', X), options.pop('labels', labels())
  return robustness.evaluate(options.pop('logits_fn', ProbedEncoder(model)), x, y, **options)


def check_13(result):
  check = result.checks[-1]
  assert check.number == 13
  return check


@functools.cache
def honest(norm='linf'):
  checks = COUNT if norm == 'linf' else 0  # one norm's checks suffice
  return evaluate(
    norm=norm, check_examples=checks, latents_fn=GaussianLatents(model_and_params()[0])
  )


@pytest.mark.long
@pytest.mark.parametrize('norm', ['linf', 'l2'])
def test_the_certified_curve_is_below_the_attacked_one(norm):
  result = honest(norm)
  certificate = result.certificate
  certified, attacked = certificate.curve, result.curve
  np.testing.assert_array_equal(certified.radii, RADII)
  assert (attacked.correct | ~certified.correct).all()
  assert 0.0 < certified.accuracy[2] <= attacked.accuracy[2] < certified.accuracy[1] < 1.0
  np.testing.assert_array_equal(
    certified.correct, certificate.radius[None] >= np.float32(RADII)[:, None]
  )
  assert (certificate.radius[:2] == -1.0).all() and (certificate.radius[2:] >= 0.0).all()
  assert certificate.radius.max() <= np.float32(0.3)
  between = ~np.isin(certificate.radius, np.float32((-1.0, *RADII)))
  assert between.any(), 'bisection goes on between the radii'
  assert result.config['certified_by'] == {'name': 'crown', 'slope_steps': 0}
  assert 'Certificate(crown, n = 24' in repr(result)


def test_the_curve_and_the_radii_are_those_of_the_library():
  certificate, arguments = honest().certificate, (*model_and_params(), PROBE, X, labels())
  accuracy = certificates.certified_accuracy(*arguments, radii=RADII)
  np.testing.assert_array_equal(certificate.curve.correct, accuracy.correct)
  radius = certificates.certified_radius(*arguments, most=0.3, num_steps=12)
  # Five halvings of an interval of 0.2 at most, and twelve of 0.3.
  np.testing.assert_allclose(certificate.radius, radius, atol=0.2 / 2**5 + 1e-4)


def test_the_progress_of_certificates_does_not_go_back():
  told = []
  evaluate(certificate_progress=lambda *state: told.append(state))
  total = COUNT * (3 + 5)  # rounds: over four radii, then within an interval
  assert told == sorted(told) and told[0] == (0, total) and told[-1] == (total, total)
  assert len(set(told)) > 8


def test_an_honest_certificate_passes_check_13():
  check = check_13(honest())
  assert check.verdict == 'pass', check
  assert check.figure == 'holds for all; 0.9167 of the examples are certified beyond radius 0'


def test_a_probe_of_another_function_is_refused_before_the_attack():
  class Negated(LinearProbe):
    pass

  _, params = model_and_params()
  args = (params, Negated(PROBE.weights, PROBE.bias))
  with pytest.raises(ArgumentError, match='probe: must be a LinearProbe, got Negated'):
    evaluate(args=args, progress=lambda done, total: pytest.fail('attacked'))


def test_a_method_is_no_name():
  with pytest.raises(ArgumentError, match="certify: must be True, False or a Method, got 'ibp'"):
    evaluate(certify='ibp')


def test_check_13_is_skipped_where_nothing_is_certified():
  result = evaluate(certify=False, check_examples=COUNT)
  assert result.certificate is None and 'certified_by' not in result.config
  assert check_13(result).verdict == 'skipped'


@pytest.mark.parametrize(
  ('row', 'radius', 'attack'),
  [(0, 0.0, 'clean'), (None, 0.3, 'pgd_cross_entropy'), (None, 0.05, None)],
)
def test_a_certificate_that_is_too_large_is_flagged(monkeypatch, row, radius, attack):
  """Of an example that is misclassified as it is, or by the attack; or of none."""
  log = honest().attack_log
  row = np.argmax(np.isfinite(log.radius) & (log.radius > 0.1)) if row is None else row
  real = certificates.certify

  def faulty(*operands, **options):
    found = real(*operands, **options)
    changed = found.radius.copy()
    changed[row] = radius
    return dataclasses.replace(found, radius=changed)

  monkeypatch.setattr(certificates, 'certify', faulty)
  check = check_13(evaluate(check_examples=COUNT))
  if attack is None:
    assert check.verdict == 'pass'
    return
  assert check.verdict == 'fail' and check.values == {'examples': [row], 'attacks': [attack]}
  text = f'1 examples are misclassified within their certified radius: example {row} by {attack} at'
  assert check.figure.startswith(text)


def test_an_unsound_rule_is_flagged(monkeypatch):
  """The ball is too small, so its certificates are of smaller radii than they say."""
  real = certifiers.Certifier.region

  def too_small(self, x, radius):
    return real(self, x, 0.1 * radius)

  monkeypatch.setattr(certifiers.Certifier, 'region', too_small)
  fewer = {'x': X[:20], 'labels': labels()[:20]}  # of another shape, or nothing is traced again
  check = check_13(evaluate(check_examples=20, **fewer))
  assert check.verdict == 'fail' and len(check.values['examples']) > 5


class Unknown(nn.Module):
  @nn.compact
  def __call__(self, x):
    h = nn.gelu(nn.Dense(5)(x.reshape(len(x), -1)))
    return DiagonalGaussian(nn.Dense(2)(h), nn.Dense(2)(h))


def zeros_of(model):
  """Parameters of the right shapes."""
  shapes = jax.eval_shape(model.init, jax.random.key(0))
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


def test_what_has_no_certificate_is_refused_before_any_work(monkeypatch):
  model, params = model_and_params()
  full = make_vae(SHAPE, latent_dim=2, hidden_units=5, num_layers=1, covariance='full')
  unknown = VAE(Unknown(), model.decoder, image_shape=SHAPE, latent_dim=2)
  monkeypatch.setattr(robustness.attacked_classifier, 'prepare', pytest.fail)
  for changes, message in (
    ({'logits_fn': lambda x, *_: x}, 'certify: needs a ProbedEncoder, .* got <lambda>'),
    ({'args': (params,)}, 'certify: needs a ProbedEncoder, with its parameters and probe as args'),
    (
      {'logits_fn': ProbedEncoder(unknown), 'args': (zeros_of(unknown), PROBE)},
      'certify: .*Unknown',
    ),
    ({'logits_fn': ProbedEncoder(full), 'args': (zeros_of(full), PROBE)}, 'certify: .*covariance'),
  ):
    with pytest.raises(ArgumentError, match=message):
      evaluate(**changes)


def test_the_method_suits_the_size_of_the_encoder():
  def certifier(shape, method=None, **options):
    model = make_vae(shape, latent_dim=2, **options)
    args = zeros_of(model), PROBE
    return certifiers.certifier_for(ProbedEncoder(model), args, shape, method=method)

  mlp = certifier((28, 28, 1))
  assert (mlp.method.name, mlp.batch_size) == ('crown', 32)
  convnet = {'arch': 'convnet', 'conv_channels': 32}
  assert certifier((28, 28, 1), **convnet).method.name == 'crown_ibp'
  chosen = certifier((28, 28, 1), Method('crown'), **convnet)
  assert (chosen.method.name, chosen.batch_size) == ('crown', 1)


def test_an_example_that_is_decided_is_not_asked_for_again():
  truth, asked = np.array([-1.0, 0.0, 0.07, 0.5]), []

  def is_certified(rows, radius):
    asked.append(len(rows))
    return radius <= truth[rows].astype(np.float32)

  radius = certifiers.largest_radius(is_certified, 4, (0.1, 0.0, 0.05, 0.2), num_steps=3)
  np.testing.assert_array_equal(radius[[0, 3]], np.float32([-1.0, 0.2]))
  assert (radius <= np.maximum(truth, -1.0)).all()
  assert 0.0 <= truth[2] - radius[2] <= 0.05 / 2**3 + 1e-7
  assert asked[0] == 4 and asked[-3:] == [2, 2, 2]
