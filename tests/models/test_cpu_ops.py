"""Every implementation against loops in NumPy, the adjoint identity, the choice by platform."""

from __future__ import annotations

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import attacks
from se_vae.models import cpu_ops
from tests import oracles
from tests.oracles import in_float64


# On this platform `conv` is the matrix product: one of all rows, or, where examples outnumber
# channels and the entries of a patch, one for each position.
def conv(x, kernel, stride):
  bias = jnp.zeros(kernel.shape[3], kernel.dtype)
  return cpu_ops.conv(jnp.asarray(x), kernel, bias, stride=stride)


def conv_transpose(y, kernel, stride, image_size):
  bias = jnp.zeros(kernel.shape[2], kernel.dtype)
  return cpu_ops.conv_transpose(jnp.asarray(y), kernel, bias, stride=stride, image_size=image_size)


def native(x, kernel, stride):
  outputs = cpu_ops._conv_native(jnp.moveaxis(jnp.asarray(x), 0, 2), kernel, stride)
  return jnp.moveaxis(outputs, 2, 0)


BATCHES = (2, 28)  # of patches of 27 entries and 4 channels

# (height, width, stride): odd, even, mixed, one pixel, narrower than the kernel.
CASES = [
  (6, 6, 1),
  (6, 6, 2),
  (7, 5, 1),
  (7, 5, 2),
  (4, 7, 2),
  (2, 3, 2),
  (1, 1, 1),
  (1, 1, 2),
  (9, 10, 3),
  (3, 1, 4),
]

# In float64 every result is a sum of at most 9 * 3 products of numbers of size one.
FLOAT64_RTOL = 1e-12


def start_of(length: int, stride: int, row: int, size: int = 3) -> int:
  """The first input position under output `row`, by TensorFlow's definition of SAME padding."""
  rows = (length + stride - 1) // stride
  total_padding = max((rows - 1) * stride + size - length, 0)
  return row * stride - total_padding // 2


def windows(height: int, width: int, stride: int):
  """(row, column, y, x, r, c): output position, the input position under it, kernel position."""
  for row in range((height + stride - 1) // stride):
    for column in range((width + stride - 1) // stride):
      for r in range(3):
        for c in range(3):
          y = start_of(height, stride, row) + r
          x = start_of(width, stride, column) + c
          if 0 <= y < height and 0 <= x < width:
            yield row, column, y, x, r, c


def loop_conv(images: np.ndarray, kernel: np.ndarray, stride: int) -> np.ndarray:
  batch, height, width, _ = images.shape
  rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
  outputs = np.zeros((batch, rows, columns, kernel.shape[3]))
  for row, column, y, x, r, c in windows(height, width, stride):
    outputs[:, row, column] += images[:, y, x] @ kernel[r, c]
  return outputs


def loop_conv_transpose(
  features: np.ndarray, kernel: np.ndarray, stride: int, image_size: tuple[int, int]
) -> np.ndarray:
  images = np.zeros((len(features), *image_size, kernel.shape[2]))
  for row, column, y, x, r, c in windows(*image_size, stride):
    images[:, y, x] += features[:, row, column] @ kernel[r, c].T
  return images


def arrays(height: int, width: int, stride: int, batch: int = 2):
  """Images `[B, H, W, 3]`, a kernel `[3, 3, 3, 4]` and features `[B, h, w, 4]`, in float64."""
  rng = np.random.default_rng(height * 100 + width * 10 + stride)
  rows, columns = (height + stride - 1) // stride, (width + stride - 1) // stride
  return (
    rng.normal(size=(batch, height, width, 3)),
    rng.normal(size=(3, 3, 3, 4)),
    rng.normal(size=(batch, rows, columns, 4)),
  )


@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize(('height', 'width', 'stride'), CASES)
def test_convolution_and_transpose_equal_loops_and_are_adjoint(height, width, stride, batch):
  images, kernel, features = arrays(height, width, stride, batch)

  @oracles.quick_jit
  def results(images, kernel, features):
    outputs = {'conv': conv(images, kernel, stride)}
    if batch == 2:
      outputs['native'] = native(images, kernel, stride)
    return outputs, conv_transpose(features, kernel, stride, (height, width))

  with jax.enable_x64(True):
    outputs, transposed = results(images, kernel, features)
  expected = loop_conv(images, kernel, stride)
  for name, actual in outputs.items():
    np.testing.assert_allclose(actual, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL, err_msg=name)
  expected = loop_conv_transpose(features, kernel, stride, (height, width))
  np.testing.assert_allclose(transposed, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)
  np.testing.assert_allclose(
    np.vdot(outputs['conv'], features), np.vdot(images, transposed), rtol=1e-11
  )


@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize(('height', 'width', 'stride'), [(7, 5, 2), (6, 6, 1), (1, 1, 2)])
def test_gradients_agree_and_are_the_exact_linear_maps(height, width, stride, batch):
  """A convolution is bilinear, so the gradients of <conv(x, k), y> are its adjoints in x and k."""
  images, kernel, features = arrays(height, width, stride, batch)

  @oracles.quick_jit
  def gradients(images, kernel):
    def gradient(conv):
      inner = lambda x, k: jnp.sum(conv(x, k, stride) * features)  # noqa: E731
      return jax.grad(inner, argnums=(0, 1))(images, kernel)

    return [gradient(conv) for conv in ((conv, native) if batch == 2 else (conv,))]

  expected_kernel = np.zeros_like(kernel)
  for row, column, y, x, r, c in windows(height, width, stride):
    expected_kernel[r, c] += images[:, y, x].T @ features[:, row, column]
  expected_images = loop_conv_transpose(features, kernel, stride, (height, width))
  with jax.enable_x64(True):
    for by_images, by_kernel in gradients(images, kernel):
      for actual, expected in ((by_images, expected_images), (by_kernel, expected_kernel)):
        np.testing.assert_allclose(actual, expected, rtol=FLOAT64_RTOL, atol=FLOAT64_RTOL)


@pytest.mark.parametrize('batch', BATCHES)
def test_gradients_of_the_transpose_are_the_exact_linear_maps(batch):
  """<conv_transpose(y, k), x> is <conv(x, k), y>: its gradients in y and k are known above."""
  images, kernel, features = arrays(7, 6, 2, batch)
  inner = lambda y, k: jnp.sum(conv_transpose(y, k, 2, (7, 6)) * images)  # noqa: E731
  expected_kernel = np.zeros_like(kernel)
  for row, column, y, x, r, c in windows(7, 6, 2):
    expected_kernel[r, c] += images[:, y, x].T @ features[:, row, column]
  with jax.enable_x64(True):
    by_features, by_kernel = oracles.quick_jit(jax.grad(inner, argnums=(0, 1)))(features, kernel)
  expected = loop_conv(images, kernel, 2), expected_kernel
  for actual, correct in zip((by_features, by_kernel), expected, strict=True):
    # A sum over up to 28 * 16 positions where the one above is over 27.
    np.testing.assert_allclose(actual, correct, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('batch', BATCHES)
def test_forward_derivatives_are_the_product_rule(batch):
  images, kernel, _ = arrays(7, 6, 2, batch)
  d_images, d_kernel = images[::-1] + 1.0, kernel[::-1] - 1.0
  with jax.enable_x64(True):
    tangent = oracles.quick_jit(
      lambda *args: jax.jvp(lambda x, k: conv(x, k, 2), args[:2], args[2:])[1]
    )(images, kernel, d_images, d_kernel)
  expected = loop_conv(d_images, kernel, 2) + loop_conv(images, d_kernel, 2)
  np.testing.assert_allclose(tangent, expected, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize('batch', BATCHES)
def test_vmap_over_images_and_kernels(batch):
  images, kernel, _ = arrays(7, 6, 2, batch)
  both = np.stack([images, images[::-1]]), np.stack([kernel, kernel[::-1]])
  with jax.enable_x64(True):
    outputs = oracles.quick_jit(jax.vmap(lambda x, k: conv(x, k, 2)))(*both)
    gradient = oracles.quick_jit(jax.vmap(jax.grad(lambda x, k: jnp.sum(conv(x, k, 2)))))(*both)
  for i, (x, k) in enumerate(zip(*both, strict=True)):
    np.testing.assert_allclose(outputs[i], loop_conv(x, k, 2), rtol=1e-11, atol=1e-11)
    ones = np.ones((batch, 4, 3, 4))
    expected = loop_conv_transpose(ones, k, 2, (7, 6))
    np.testing.assert_allclose(gradient[i], expected, rtol=1e-11, atol=1e-11)


def test_implementations_agree_under_grad_in_loops():
  """Gradient ascent on the image in a loop, and the gradient of its result in the kernel."""
  images, kernel, _ = arrays(5, 6, 2)

  def ascended(kernel, conv):
    gradient = jax.grad(lambda x: jnp.sum(jnp.sin(conv(x, kernel, 2))))
    x = jax.lax.fori_loop(0, 3, lambda _, x: x + 0.1 * gradient(x), images)
    return jnp.sum(x**2)

  with jax.enable_x64(True):
    compiled = oracles.quick_jit(jax.value_and_grad(ascended), static_argnums=1)
    chosen_value, chosen = compiled(kernel, conv)
    expected_value, expected = compiled(kernel, native)
  # Three steps through a sine of slopes of about 10 magnify float64's rounding.
  np.testing.assert_allclose(chosen_value, expected_value, rtol=1e-9)
  np.testing.assert_allclose(chosen, expected, rtol=1e-9, atol=1e-9 * np.abs(expected).max())
  assert np.abs(expected).max() > 1.0


@pytest.mark.parametrize('batch', BATCHES)
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 0.1)])
def test_lower_precisions_agree(dtype, tolerance, batch):
  images, kernel, _ = (jnp.asarray(array, dtype) for array in arrays(9, 8, 2, batch))
  outputs = oracles.quick_jit(conv, static_argnums=2)(images, kernel, 2)
  assert outputs.dtype == dtype
  expected = loop_conv(np.asarray(images, np.float64), np.asarray(kernel, np.float64), 2)
  # 27 products of size one, each rounded to 6e-8; or their sum, up to 30, to 8 bits.
  np.testing.assert_allclose(
    np.asarray(outputs, np.float64), expected, rtol=tolerance, atol=tolerance
  )


def test_output_size_is_the_ceiling():
  for size in range(1, 12):
    for stride in (1, 2, 3):
      assert cpu_ops.output_size(size, stride) == len(range(0, size, stride))


def forward_and_backward(x, kernel):
  """A convolution, a transpose, and their gradients, in the loop of an attack."""

  def value(x):
    return jnp.sum(conv_transpose(conv(x, kernel, 2), kernel, 2, x.shape[1:3]) ** 2)

  return jax.lax.fori_loop(0, 3, lambda _, x: x + jax.grad(value)(x), x)


def operations(platform: str) -> set[str]:
  """The names of the StableHLO operations in the program lowered for `platform`."""
  shapes = (
    jax.ShapeDtypeStruct((2, 7, 5, 3), jnp.float32),
    jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32),
  )
  lowered = jax.jit(forward_and_backward).trace(*shapes).lower(lowering_platforms=(platform,))
  return set(re.findall(r'stablehlo\.(\w+)', lowered.as_text()))


@pytest.mark.parametrize('platform', ['cuda', 'rocm', 'tpu'])
def test_accelerators_convolve_natively(platform):
  found = operations(platform)
  assert 'convolution' in found
  assert 'dot_general' not in found


def test_cpu_multiplies_matrices():
  found = operations('cpu')
  assert 'dot_general' in found
  assert 'convolution' not in found


def test_one_program_serves_every_platform():
  shapes = (
    jax.ShapeDtypeStruct((2, 7, 5, 3), jnp.float32),
    jax.ShapeDtypeStruct((3, 3, 3, 4), jnp.float32),
  )
  export = jax.export.export(jax.jit(forward_and_backward), platforms=['cpu', 'cuda', 'tpu'])
  exported = export(*shapes)
  assert exported.platforms == ('cpu', 'cuda', 'tpu')
  text = exported.mlir_module()
  assert 'stablehlo.convolution' in text and 'stablehlo.dot_general' in text


# Linear layers


def dense(kernel, x):
  return cpu_ops.dense(x, kernel, jnp.zeros(kernel.shape[1]))


def plain(kernel, x):
  return x @ kernel


def factors(batch=()):
  rng = np.random.default_rng(0)
  return tuple(jnp.asarray(rng.normal(size=(*batch, *shape))) for shape in ((3, 4), (5, 3)))


def test_a_layer_adds_its_bias_and_applies_its_activation():
  kernel, x = (np.float32(factor) for factor in factors())
  bias = np.arange(4, dtype=np.float32) - 1.5
  outputs = oracles.quick_jit(functools.partial(cpu_ops.dense, activation=jax.nn.relu))(
    x, kernel, bias
  )
  np.testing.assert_allclose(outputs, np.maximum(x @ kernel + bias, 0.0), rtol=1e-5, atol=1e-6)


@in_float64
def test_value_and_derivatives_are_those_of_the_plain_product():
  """The first ones in both modes, and the second ones along a direction in all four pairs."""
  args, along = factors(), jax.tree.map(lambda factor: jnp.cos(3.0 * factor), factors())
  weights = jnp.asarray(np.random.default_rng(1).normal(size=(5, 4)))

  @oracles.quick_jit
  def derivatives(*args):
    def of(f):
      def value(*args):
        return jnp.sum(jnp.sin(f(*args)) * weights)

      def forward(*args):
        return jax.jvp(value, args, along)[1]

      def reverse(*args):
        return sum(map(jnp.vdot, jax.grad(value, (0, 1))(*args), along))

      first = [derivative(value, (0, 1))(*args) for derivative in (jax.grad, jax.jacfwd)]
      slopes = [jax.grad(slope, (0, 1))(*args) for slope in (forward, reverse)]
      return f(*args), first, slopes, [jax.jvp(f, args, along)[1] for f in (forward, reverse)]

    return of(dense), of(plain)

  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-12, atol=1e-13), *derivatives(*args)
  )


@in_float64
def test_a_layer_can_be_mapped():
  kernel, x = factors(batch=(2,))
  gradient = jax.grad(lambda kernel, x, f: jnp.sum(f(kernel, x) ** 2))

  @oracles.quick_jit
  def mapped(kernel, x):
    return jax.vmap(dense)(kernel, x), jax.vmap(lambda x: gradient(kernel[0], x, dense))(x)

  both, one_kernel = mapped(kernel, x)
  kernel, x = np.asarray(kernel), np.asarray(x)
  np.testing.assert_allclose(both, x @ kernel, rtol=1e-14)
  expected = [2.0 * each.T @ (each @ kernel[0]) for each in x]
  np.testing.assert_allclose(one_kernel, expected, rtol=1e-12)


def test_the_loop_of_an_attack_transposes_nothing():
  """The attack is on two layers."""

  def value(x, kernel):
    hidden = cpu_ops.dense(x.reshape(2, 8), kernel, jnp.zeros(8), activation=jax.nn.relu)
    return jnp.sum(jnp.cos(cpu_ops.dense(hidden, kernel, jnp.zeros(8))), axis=1)

  x, kernel = jnp.ones((2, 2, 4)), jnp.ones((8, 8))

  def attack(key, x, kernel):
    return attacks.pgd(value, key, x, radius=0.1, num_steps=5, start=x, args=(kernel,))

  program = oracles.quick_jit(attack).lower(jax.random.key(0), x, kernel).compile().as_text()
  program = re.sub(r'metadata={.*?}', '', program)
  products = re.findall(r'lhs_contracting_dims={(.)}, rhs_contracting_dims={(.)}', program)
  assert len(products) == 4  # there and back through two layers
  body = re.search(r'body=%([\w.]+)', program).group(1)
  assert 'transpose' in program  # the copies of the weights are made, ...
  assert 'transpose' not in re.search(rf'^%{re.escape(body)} .*?^}}', program, re.M | re.S).group(0)
