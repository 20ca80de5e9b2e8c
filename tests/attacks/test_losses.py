"""Losses against NumPy, and what an attack on a misclassified example must not do."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import attacks
from se_vae.attacks import losses
from se_vae.attacks.losses import Aim
from tests import oracles

DTYPE_PROMOTION = 'standard'  # optax takes part

rng = np.random.default_rng(0)
LOGITS = rng.normal(size=(12, 4)).astype(np.float32)
LABELS = rng.integers(4, size=12).astype(np.int32)
TARGET = (LABELS + 1) % 4


def identity(logits):
  return logits


def reference_margin():
  others = np.where(np.eye(4)[LABELS] > 0, -np.inf, LOGITS).max(axis=1)
  return others - LOGITS[np.arange(12), LABELS]


def test_losses_are_what_they_say():
  aim = Aim(LABELS, target=TARGET)
  rows = np.arange(12)
  np.testing.assert_allclose(
    losses.CrossEntropy(identity)(LOGITS, aim),
    np.log(np.exp(LOGITS).sum(axis=1)) - LOGITS[rows, LABELS],
    rtol=1e-5,
  )
  margin = reference_margin()
  np.testing.assert_allclose(losses.Margin(identity)(LOGITS, aim), margin, rtol=1e-6)
  ordered = np.sort(LOGITS, axis=1)[:, ::-1]
  dlr = margin / (ordered[:, 0] - ordered[:, 2])
  np.testing.assert_allclose(losses.DLR(identity)(LOGITS, aim), dlr, rtol=1e-5)
  np.testing.assert_allclose(
    losses.Targeted(identity)(LOGITS, aim),
    LOGITS[rows, TARGET] - LOGITS[rows, LABELS],
    rtol=1e-5,
  )


def test_dlr_is_blind_to_scale_and_refuses_two_classes():
  loss = losses.DLR(identity)
  np.testing.assert_allclose(
    loss(1024.0 * LOGITS + 7.0, Aim(LABELS)), loss(LOGITS, Aim(LABELS)), rtol=1e-3
  )
  with pytest.raises(ValueError, match='at least 3 classes, got 2'):
    loss(LOGITS[:, :2], Aim(LABELS % 2))


def test_dlr_of_equal_logits_is_zero():
  loss = losses.DLR(lambda logits: logits)
  np.testing.assert_array_equal(loss(jnp.zeros((2, 3)), Aim(jnp.zeros(2, jnp.int32))), [0.0, 0.0])


def test_latent_shifts_go_away_and_latent_targets_come_closer():
  x = jnp.asarray(LOGITS)
  to = Aim(LABELS, latent=x[::-1])
  shift, towards = losses.LatentShift(identity), losses.LatentTarget(identity)
  np.testing.assert_allclose(shift(x, to), ((LOGITS - LOGITS[::-1]) ** 2).sum(1), rtol=1e-5)
  options = dict(radius=0.1, num_steps=5, bounds=(-9.0, 9.0), args=(to,))
  attacked = oracles.quick_jit(
    lambda x: [attacks.pgd(loss, jax.random.key(0), x, **options) for loss in (shift, towards)]
  )
  for x_adv, sign in zip(attacked(x), (1.0, -1.0), strict=True):
    assert np.abs(np.asarray(x_adv - x)).max() <= 0.1 + 1e-6
    assert np.all(sign * (shift(x_adv, to) - shift(x, to)) > 0.0)


def test_margin_is_positive_where_the_classifier_is_wrong():
  wrong = ~np.asarray(losses.is_correct(LOGITS, LABELS))
  np.testing.assert_array_equal(reference_margin() > 0.0, wrong)
  assert 0 < wrong.sum() < 12


@pytest.mark.parametrize('bad', [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_not_correct(bad):
  logits = np.array([[bad, 0.0], [1.0, 0.0]], np.float32)
  np.testing.assert_array_equal(losses.is_correct(logits, np.array([0, 0])), [False, True])


def test_the_best_iterate_is_misclassified_if_any_is():
  """Cross-entropy is larger where two classes tie above the label than where one just beats it."""
  plain = losses.CrossEntropy(identity)
  until = losses.UntilMisclassified(plain, identity)
  values, gradients = attacks.values_and_gradients(until, jnp.asarray(LOGITS), (Aim(LABELS),))
  wrong = reference_margin() > 0.0
  np.testing.assert_array_equal(np.isinf(values), wrong)
  np.testing.assert_array_equal((np.asarray(gradients) == 0.0).all(axis=1), wrong)
  expected = plain(LOGITS, Aim(LABELS))
  np.testing.assert_array_equal(np.asarray(values)[~wrong], np.asarray(expected)[~wrong])


def test_joint_is_positive_only_where_all_are_wrong():
  labels = np.stack([LABELS, LABELS[::-1]], axis=1)
  joint = losses.Joint((identity, lambda x, scale: scale * x))
  values = joint(jnp.asarray(LOGITS), Aim(labels), (), (3.0,))
  both = [~np.asarray(losses.is_correct(LOGITS, labels[:, task])) for task in range(2)]
  np.testing.assert_array_equal(np.asarray(values) > 0.0, both[0] & both[1])
  assert (both[0] != both[1]).any() and (both[0] & both[1]).any()


def test_joint_needs_the_arguments_of_each_classifier():
  joint = losses.Joint((identity, identity))
  labels = np.stack([LABELS, LABELS], axis=1)
  for args in (((),), ((), (), ())):
    with pytest.raises(ValueError, match='zip'):
      joint(jnp.asarray(LOGITS), Aim(labels), *args)


def test_equal_losses_are_one_key():
  """An attack is compiled once for each loss of a classifier, not for each object."""
  of_one = (losses.CrossEntropy, losses.Margin, losses.DLR, losses.Targeted, losses.LatentShift)
  for loss in (*of_one, losses.LatentTarget, lambda model: losses.Joint((model,))):
    assert len({loss(identity), loss(identity)}) == 1
    assert len({loss(identity), loss(abs)}) == 2
  wrapped = [losses.UntilMisclassified(losses.Margin(identity), identity) for _ in range(2)]
  assert len(set(wrapped)) == 1


@pytest.mark.parametrize('dtype', [jnp.uint8, jnp.int8, jnp.int32])
def test_labels_may_be_narrower_than_the_number_of_classes(dtype):
  logits = jnp.zeros((2, 300)).at[:, 256].set(5.0).at[0, 100].set(7.0)
  labels = jnp.array([100, 0], dtype)
  np.testing.assert_allclose(losses.margin(logits, labels), [-2.0, 5.0])
  np.testing.assert_array_equal(losses.is_correct(logits, labels), [True, False])
