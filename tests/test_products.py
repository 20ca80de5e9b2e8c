"""The products of `products` against plain ones, through every transformation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.test_util import check_grads

from se_vae import products
from tests.oracles import in_float64

FORMS = {
  # name: (function, its activations' shape, the same as a plain product of rows)
  'enter': (products.enter, (5, 3), lambda x, kernel: (x @ kernel).T),
  'through': (products.through, (3, 5), lambda h, kernel: (h.T @ kernel).T),
}


def arguments(shape, batch=()):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(*batch, *s))) for s in (shape, (3, 4)))


@pytest.mark.parametrize('name', FORMS)
@in_float64
def test_value_and_derivatives_are_those_of_the_plain_product(name):
  function, shape, plain = FORMS[name]
  args = arguments(shape)
  np.testing.assert_allclose(jax.jit(function)(*args), plain(*args), rtol=1e-14)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=plain(*args).shape))
  for derivative in (jax.grad, jax.jacfwd):
    ours, theirs = (
      derivative(lambda *args, f=f: jnp.sum(jnp.sin(f(*args)) * weights), (0, 1))(*args)
      for f in (function, plain)
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), ours, theirs
    )
  check_grads(lambda *args: jnp.sin(function(*args)), args, order=2)


@pytest.mark.parametrize('name', FORMS)
@in_float64
def test_it_can_be_mapped(name):
  function, shape, plain = FORMS[name]
  x, kernel = arguments(shape, batch=(2,))
  expected = jnp.stack([plain(x[i], kernel[i]) for i in range(2)])
  np.testing.assert_allclose(jax.vmap(function)(x, kernel), expected, rtol=1e-14)
  gradient = jax.grad(lambda x, k, f: jnp.sum(f(x, k) ** 2), argnums=1)
  one_kernel = jax.vmap(lambda x: gradient(x, kernel[0], function))(x)
  np.testing.assert_allclose(
    one_kernel, jnp.stack([gradient(x[i], kernel[0], plain) for i in range(2)]), rtol=1e-12
  )


def test_a_loop_transposes_nothing():
  def loop(h, kernel):
    move = jax.grad(lambda h: jnp.sum(jnp.cos(products.through(h, kernel))))
    return jax.lax.fori_loop(0, 5, lambda _, h: h + move(h), h)

  program = jax.jit(loop).lower(jnp.ones((8, 2)), jnp.ones((8, 8))).compile().as_text()
  program = re.sub(r'metadata={.*?}', '', program)
  products_found = re.findall(r'lhs_contracting_dims={(.)}, rhs_contracting_dims={(.)}', program)
  assert products_found == [('1', '0')] * 2  # rows times columns, there and back
  body = re.search(r'body=%([\w.]+)', program).group(1)
  assert 'transpose' in program  # the copy is made, ...
  assert 'transpose' not in re.search(rf'^%{re.escape(body)} .*?^}}', program, re.M | re.S).group(0)
