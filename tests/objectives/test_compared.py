"""The objectives to compare with, against sums written out in NumPy."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
import scipy.stats

from se_vae import objectives
from se_vae.gaussians import DiagonalGaussian, FullGaussian
from tests import oracles
from tests.oracles import in_float64

# ---------------------------------------------------------------------------------------------
# Total correlation
# ---------------------------------------------------------------------------------------------


def encodings(count, dim=3, seed=0):
  rng = np.random.default_rng(seed)
  mean, stddev = rng.normal(size=(count, dim)), rng.uniform(0.5, 1.5, size=(count, dim))
  z = mean + stddev * rng.normal(size=(count, dim))
  return DiagonalGaussian(jnp.asarray(mean), jnp.asarray(2.0 * np.log(stddev))), jnp.asarray(z)


tc_elbo = oracles.quick_jit(objectives.tc_elbo, static_argnames='num_examples')
info_nce = oracles.quick_jit(objectives.info_nce)


@pytest.mark.parametrize('num_examples', (1, 60_000))
@in_float64
def test_the_parts_of_the_kl_term_are_mixtures_of_the_batch(num_examples):
  rng = np.random.default_rng(1)
  (q, z), (x, x_mean) = encodings(5), jnp.asarray(rng.normal(size=(2, 5, 4)))
  terms = tc_elbo(x, x_mean, q, z, q, obs_var=0.3, num_examples=num_examples)
  density = scipy.stats.norm(np.asarray(q.mean), np.asarray(q.stddev)).logpdf
  for i in range(5):
    logs = density(np.asarray(z)[i])  # [M, D]
    weight = np.log(5.0 * num_examples)
    joint = scipy.special.logsumexp(logs.sum(axis=1)) - weight
    product = (scipy.special.logsumexp(logs, axis=0) - weight).sum()
    prior = scipy.stats.norm.logpdf(np.asarray(z)[i]).sum()
    expected = {
      'mutual_information': logs[i].sum() - joint,
      'total_correlation': joint - product,
      'dimensionwise_kl': product - prior,
    }
    for name, value in expected.items():
      np.testing.assert_allclose(getattr(terms, name)[i], value, rtol=1e-11, err_msg=name)
    parts = sum(expected.values())
    np.testing.assert_allclose(terms.elbo[i], terms.log_likelihood[i] - parts, rtol=1e-11)


@in_float64
def test_the_sampled_elbo_has_the_mean_of_the_elbo():
  count = 4000
  one, _ = encodings(1)
  q = jax.tree.map(lambda leaf: np.repeat(leaf, count, axis=0), one)
  x = np.zeros((count, 4))

  @oracles.quick_jit
  def elbos(q, one):
    z = q.sample(jax.random.key(0))
    sampled = objectives.tc_elbo(x, x, q, z, one, obs_var=0.3).elbo
    return sampled, objectives.elbo(x[:1], x[:1], one, obs_var=0.3).elbo[0]

  sampled, exact = elbos(q, one)
  assert abs(np.mean(sampled) - exact) < 4.0 * np.std(sampled) / np.sqrt(count)


@in_float64
def test_one_encoding_carries_no_information_and_no_correlation():
  (q, z), x = encodings(1), jnp.zeros((1, 4))
  terms = tc_elbo(x, x, q, z, q, obs_var=0.3)
  np.testing.assert_allclose(terms.mutual_information, 0.0, atol=1e-12)
  np.testing.assert_allclose(terms.total_correlation, 0.0, atol=1e-12)


@in_float64
def test_no_gradient_depends_on_the_size_of_the_data_set():
  (q, z), x = encodings(4), jnp.zeros((4, 2))

  def correlation(q, num_examples):
    terms = objectives.tc_elbo(x, x, q, z, q, obs_var=0.3, num_examples=num_examples)
    return jnp.sum(terms.total_correlation)

  small, large = (
    oracles.quick_jit(jax.grad(correlation), static_argnums=1)(q, n) for n in (1, 60_000)
  )
  for a, b in zip(jax.tree.leaves(small), jax.tree.leaves(large), strict=True):
    np.testing.assert_allclose(a, b, rtol=1e-9)
    assert np.any(a)


def test_tc_elbo_refuses_what_does_not_fit():
  q = DiagonalGaussian(jnp.zeros((2, 3)), jnp.zeros((2, 3)))
  full = FullGaussian(jnp.zeros((2, 3)), jnp.zeros((2, 3, 3)))
  x, z = jnp.zeros((2, 5)), jnp.zeros((2, 3))
  for q_a, q_b in ((full, full), (q, full), (full, q)):
    with pytest.raises(TypeError, match='needs factorised encodings'):
      objectives.tc_elbo(x, x, q_a, z, q_b, obs_var=0.1)
  for shape in ((2, 4), (2, 2), (3,), (2, 3, 3)):
    other = DiagonalGaussian(jnp.zeros(shape), jnp.zeros(shape))
    with pytest.raises(AssertionError, match=r'q_all needs means \[M, 3\]'):
      objectives.tc_elbo(x, x, q, z, other, obs_var=0.1)


@in_float64
def test_first_and_second_derivatives_match_finite_differences():
  rng = np.random.default_rng(6)
  (q, z), (x, x_mean) = encodings(2, dim=2), jnp.asarray(rng.normal(size=(2, 2, 3)))
  positives = jnp.arange(2, dtype=jnp.int32)

  def every_function(x, x_mean, q, z, obs_var, temperature):
    terms = objectives.tc_elbo(x, x_mean, q, z, q, obs_var=obs_var)
    nce = objectives.info_nce(z, q.mean, positives=positives, temperature=temperature)
    return terms, nce

  check = oracles.DerivativeCheck(every_function, (x, x_mean, q, z, 0.5, 0.7))
  check(x, x_mean, q, z, 0.5, 0.7)


# ---------------------------------------------------------------------------------------------
# Jacobian norm
# ---------------------------------------------------------------------------------------------


@in_float64
def test_the_estimates_average_to_the_squared_norm_of_the_jacobian():
  """Over all vectors of signs, exactly; through an activation and for images."""
  rng = np.random.default_rng(2)
  weights = jnp.asarray(rng.normal(size=(6, 4)))

  def function(x):
    return jnp.tanh(x.reshape(len(x), -1) @ weights)

  x = jnp.asarray(rng.normal(size=(3, 2, 3, 1)))
  estimate = oracles.quick_jit(lambda signs: objectives.squared_jacobian_norm(function, x, signs))
  vectors = [np.broadcast_to(v, (3, 4)) for v in itertools.product((-1.0, 1.0), repeat=4)]
  mean = np.mean([estimate(signs) for signs in vectors], axis=0)
  jacobian = oracles.quick_jit(jax.vmap(jax.jacobian(lambda one: function(one[None])[0])))(x)
  np.testing.assert_allclose(mean, np.sum(np.square(jacobian), axis=(1, 2, 3, 4)), rtol=1e-12)


def test_signs_of_another_shape_are_refused():
  for shape in ((2, 2), (2, 4)):
    with pytest.raises(AssertionError, match='signs must have shape'):
      objectives.squared_jacobian_norm(lambda x: x, jnp.zeros((2, 3)), jnp.ones(shape))


# ---------------------------------------------------------------------------------------------
# Contrastive
# ---------------------------------------------------------------------------------------------


@in_float64
def test_info_nce_is_the_cross_entropy_of_cosine_similarities():
  rng = np.random.default_rng(3)
  queries, candidates = rng.normal(size=(4, 5)), rng.normal(size=(7, 5))
  positives = np.array([6, 0, 3, 3])
  unit = [v / np.linalg.norm(v, axis=1, keepdims=True) for v in (queries, candidates)]
  expected = -scipy.special.log_softmax(unit[0] @ unit[1].T / 0.2, axis=1)[range(4), positives]
  for scale in (1.0, 1e-4):
    value = info_nce(scale * queries, candidates, positives=positives, temperature=0.2)
    np.testing.assert_allclose(value, expected, rtol=1e-12)


def test_info_nce_of_vectors_of_length_zero_has_a_finite_gradient():
  zeros, positives = jnp.zeros((3, 2)), jnp.arange(3, dtype=jnp.int32)

  def total(z):
    return jnp.sum(objectives.info_nce(z, z, positives=positives, temperature=0.1))

  value, gradient = oracles.quick_jit(jax.value_and_grad(total))(zeros)
  np.testing.assert_allclose(value, 3.0 * np.log(3.0), rtol=1e-6)
  assert np.all(np.isfinite(gradient))


def test_info_nce_refuses_what_does_not_fit():
  z, positives = jnp.zeros((3, 2)), jnp.arange(3)
  for shape in ((3, 4), (3, 1), (2,), (3, 2, 1)):
    for queries, candidates in ((z, jnp.zeros(shape)), (jnp.zeros(shape), z)):
      with pytest.raises(AssertionError, match='do not fit'):
        objectives.info_nce(queries, candidates, positives=positives, temperature=0.1)
  for bad in (positives[:2], jnp.arange(4), positives[:, None]):
    with pytest.raises(AssertionError, match=r'positives must be \[3\]'):
      objectives.info_nce(z, z, positives=bad, temperature=0.1)
