"""How far a sum of rounded products can be from the exact one.

A sum of n products, in any order, with or without fused multiply-add, differs from the exact sum
by at most `gamma(n)` times the sum of the products' absolute values (Higham, *Accuracy and
Stability of Numerical Algorithms*, 2002, Sec. 3.1). The other modules compute those sums of
absolute values beside the bounds, and move each bound outwards by what the theorem allows. They
count

* the rounding of the bound itself, and
* the rounding of the network, if it is evaluated in the dtype of the bounds and each output of a
  layer is one such sum.

So a bound holds for the exact network and for every such evaluation of it. This assumes that
products are not computed in a narrower type than their factors (as TF32 and bfloat16 are), and that
convolutions are sums of products (Winograd and Fourier forms are not).

Gradients leave out how the slack of interval bounds depends on the weights: it is tiny, and its
gradient would cost as much as that of a bound.

Two conventions keep the other modules short. `gamma` is 12% larger than in the theorem, because
the sums of absolute values are rounded too, each by at most 5.3%, and one is at most inside
another. And `FLOOR` is added to the factors of these sums: this covers underflow, of at most 2^-126
a product in float32, as long as weights, coefficients and activations stay below 2^20.
"""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp

FLOOR = 2.0**-80

# The largest n u, and what then makes up for two sums of absolute values that came out too small:
# 1 / (1 - 0.05 / 0.95) ** 2 < 1.12.
_LARGEST = 0.05
_MARGIN = 1.12


def gamma(num_terms: int, dtype: Any) -> float:
  """Returns a bound on the relative error of a sum of products: n u / (1 - n u), plus 12%.

  Example:
    >>> print(f'{gamma(800, jnp.float32):.1e}')
    5.3e-05

  Args:
    num_terms: n, the number of products, and of all other operations whose rounding is counted.
    dtype: of the sum; u is half its machine epsilon.

  Raises:
    ValueError: if n u > 0.05. In float32 that is n > 838,860.
  """
  product = num_terms * float(jnp.finfo(dtype).eps) / 2.0
  if product > _LARGEST:
    raise ValueError(f'a sum of {num_terms} terms has no useful error bound in {dtype}')
  return _MARGIN * product / (1.0 - product)
