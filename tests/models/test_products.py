"""The products of `products` against plain ones, through every transformation."""

import re

import jax
import jax.numpy as jnp
import numpy as np
from jax.test_util import check_grads

from se_vae.models import products
from tests.oracles import in_float64


def plain(kernel, features):
  return kernel.T @ features


def arguments(batch=()):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(*batch, *shape))) for shape in ((3, 4), (3, 5)))


@in_float64
def test_value_and_derivatives_are_those_of_the_plain_product():
  args = arguments()
  np.testing.assert_allclose(jax.jit(products.product)(*args), plain(*args), rtol=1e-14)
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(4, 5)))
  for derivative in (jax.grad, jax.jacfwd):
    ours, theirs = (
      derivative(lambda *args, f=f: jnp.sum(jnp.sin(f(*args)) * weights), (0, 1))(*args)
      for f in (products.product, plain)
    )
    jax.tree.map(
      lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-14), ours, theirs
    )
  check_grads(lambda *args: jnp.sin(products.product(*args)), args, order=2)


@in_float64
def test_it_can_be_mapped():
  kernel, features = arguments(batch=(2,))
  expected = jnp.stack([plain(kernel[i], features[i]) for i in range(2)])
  mapped = jax.vmap(products.product)(kernel, features)
  np.testing.assert_allclose(mapped, expected, rtol=1e-14)
  gradient = jax.grad(lambda kernel, h, f: jnp.sum(f(kernel, h) ** 2))
  one_kernel = jax.vmap(lambda h: gradient(kernel[0], h, products.product))(features)
  np.testing.assert_allclose(
    one_kernel, jnp.stack([gradient(kernel[0], h, plain) for h in features]), rtol=1e-12
  )


def test_a_loop_transposes_nothing():
  def loop(h, kernel):
    move = jax.grad(lambda h: jnp.sum(jnp.cos(products.product(kernel, h))))
    return jax.lax.fori_loop(0, 5, lambda _, h: h + move(h), h)

  program = jax.jit(loop).lower(jnp.ones((8, 2)), jnp.ones((8, 8))).compile().as_text()
  program = re.sub(r'metadata={.*?}', '', program)
  products_found = re.findall(r'lhs_contracting_dims={(.)}, rhs_contracting_dims={(.)}', program)
  assert products_found == [('1', '0')] * 2  # rows times columns, there and back
  body = re.search(r'body=%([\w.]+)', program).group(1)
  assert 'transpose' in program  # the copy is made, ...
  assert 'transpose' not in re.search(rf'^%{re.escape(body)} .*?^}}', program, re.M | re.S).group(0)
