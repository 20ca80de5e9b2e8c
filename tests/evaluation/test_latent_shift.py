"""The joint attack on several classifiers, and the largest latent shift."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.evaluation import latent_shift
from se_vae.parallel import sharding
from tests.evaluation.linear_classifier import RADII, SHAPE, closed_form, examples, linear

DTYPE_PROMOTION = 'standard'  # optax takes part


def test_a_joint_attack_is_no_stronger_than_either_alone():
  x, labels, (encoder, probe, bias) = examples()
  second = (encoder, -probe, -bias)
  other = np.argmax(linear(jnp.asarray(x), *second), axis=1)
  options = dict(radii=RADII, num_steps=10, batch_size=16, mesh=sharding.data_mesh(1))
  joint = latent_shift.joint_accuracy(
    (linear, linear),
    x,
    np.stack([labels, other], axis=1),
    args=((encoder, probe, bias), second),
    **options,
  )
  alone = [
    latent_shift.joint_accuracy((linear,), x, y[:, None], args=(args,), **options).correct
    for y, args in ((labels, (encoder, probe, bias)), (other, second))
  ]
  np.testing.assert_array_equal(alone[0], closed_form())
  # One image must mislead both, which is harder, and one image can mislead opposite probes.
  assert np.all(joint.correct >= alone[0]) and np.all(joint.correct >= alone[1])
  assert joint.correct.sum() > alone[0].sum()
  with pytest.raises(ValueError, match=r'labels, args: must be \[N, 2\]'):
    latent_shift.joint_accuracy((linear, linear), x, labels, args=((), ()), **options)


def test_the_largest_shift_of_a_one_dimensional_representation_is_exact():
  x = np.full((3, *SHAPE), 0.5, np.float32)
  total = lambda x, scale: scale * x.sum(axis=(1, 2))  # noqa: E731
  shift = latent_shift.max_latent_shift(
    total, x, radii=(0.2, 0.0, 0.1), args=(np.float32(2.0),), num_steps=10
  )
  expected = (2.0 * 16 * np.array([0.2, 0.0, 0.1])) ** 2
  np.testing.assert_allclose(shift, np.repeat(expected[:, None], 3, axis=1), rtol=1e-5)
