"""Planted fakes and faults: each misleading classifier and each faulty evaluation is flagged."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.evaluation import attack_suite
from se_vae.evaluation.attack_log import AttackLog
from tests.evaluation.linear_classifier import (
  CLASSES,
  RADII,
  assert_legal,
  closed_form,
  evaluate,
  examples,
  failed,
  latents,
  linear,
)

DTYPE_PROMOTION = 'standard'  # optax takes part

# ---------------------------------------------------------------------------------------------
# Planted fakes: each is misclassified by some attack, or flagged
# ---------------------------------------------------------------------------------------------


def scaled(x, *args):
  """Saturates the cross-entropy: its gradient underflows."""
  return 1e4 * linear(x, *args)


def rounded(x, *args):
  """The gradient of a step function is zero."""
  return linear(jnp.round(8.0 * x) / 8.0, *args)


@jax.custom_jvp
def masked(x, *args):
  """Answers as `linear`, but lies about its gradient."""
  return linear(x, *args)


@masked.defjvp
def masked_jvp(primals, tangents):
  return masked(*primals), jnp.zeros((primals[0].shape[0], CLASSES))


def constant(x, *args):
  return jnp.zeros_like(linear(x, *args)) + jnp.asarray([1.0, 0.0, 0.0])[None]


@jax.custom_jvp
def draw(logits):
  def sample(values):
    return np.asarray(NOISE.normal(size=values.shape), np.float32)

  return jax.pure_callback(sample, jax.ShapeDtypeStruct(logits.shape, logits.dtype), logits)


@draw.defjvp
def draw_jvp(primals, tangents):
  return draw(*primals), jnp.zeros_like(primals[0])


NOISE = np.random.default_rng(0)


def noisy(x, *args):
  logits = linear(x, *args)
  return logits + 0.5 * draw(logits)


@pytest.mark.slow
def test_scaled_logits_are_flagged_and_misclassified():
  standard = evaluate(scaled)
  assert 9 in failed(standard)
  worst = evaluate(scaled, attack='worst_case', latents_fn=latents)
  assert 9 in failed(worst)
  np.testing.assert_array_equal(worst.curve.correct, closed_form())


@pytest.mark.slow
@pytest.mark.parametrize('fake', [rounded, masked])
def test_masked_gradients_are_flagged_and_misclassified_without_gradients(fake):
  standard = evaluate(fake)
  assert {7, 9} <= failed(standard)
  worst = evaluate(fake, attack='worst_case')
  assert {7, 9} <= failed(worst)
  assert worst.curve.accuracy[-1] < standard.curve.accuracy[-1] - 0.1
  assert_legal(worst.attack_log, examples()[0])


@pytest.mark.long
def test_a_noisy_encoder_is_flagged():
  assert {2, 10} <= failed(evaluate(noisy))


@pytest.mark.long
def test_a_constant_encoder_is_flagged():
  result = evaluate(constant)
  assert {4, 12} <= failed(result)
  assert result.curve.accuracy[0] == result.curve.accuracy[-1] > 0.0  # as robust as can be


@pytest.mark.slow
def test_a_stronger_surrogate_is_flagged():
  """Examples made for a copy that does not mask its gradient mislead the one that does."""
  result = evaluate(masked, surrogate=(linear, examples()[2]))
  assert 8 in failed(result)
  assert 'transfer' in result.checks[7].values
  assert 8 not in failed(evaluate(surrogate=(scaled, examples()[2])))


# ---------------------------------------------------------------------------------------------
# Planted faults of the evaluation itself: the checks that must fail, and no others
# ---------------------------------------------------------------------------------------------


def ball_too_large(real, attack, key, x, aim, index, radius, *rest, **options):
  return real(attack, key, x, aim, index, jnp.float32(1.02) * radius, *rest, **options)


def pixels_not_clipped(real, *operands, norm, bounds):
  return real(*operands, norm=norm, bounds=(-0.2, 1.2))


def idle_at_one_radius(real, attack, key, x, aim, index, radius, *rest, **options):
  """As if the table of steps had a zero at this radius: every attack leaves the image alone."""
  if np.isclose(radius, RADII[-1]):
    return x
  return real(attack, key, x, aim, index, radius, *rest, **options)


@dataclasses.dataclass(frozen=True)
class Negative:
  objective: Any

  def __call__(self, *operands):
    return -self.objective(*operands)


def wrong_sign(real, attack, *operands, **options):
  """PGD descends where it should ascend."""
  if isinstance(attack, attack_suite.PGD):
    attack = dataclasses.replace(attack, objective=Negative(attack.objective))
  return real(attack, *operands, **options)


@pytest.mark.long
@pytest.mark.parametrize(
  ('fault', 'expected'),
  [
    (ball_too_large, {1, 11}),
    (pixels_not_clipped, {1}),
    (idle_at_one_radius, {3}),
    # Images are robust at large radii, FGSM, Square and noise are stronger, and restarts help.
    (wrong_sign, {4, 5, 6, 7, 8}),
  ],
)
def test_a_faulty_attack_is_flagged(fault, expected, monkeypatch):
  monkeypatch.setattr(attack_suite, 'run', functools.partial(fault, attack_suite.run))
  assert failed(evaluate(latents_fn=latents)) == expected


def test_an_attack_that_has_not_converged_is_flagged():
  """Ten steps of a fiftieth of the radius: one long step and Square go further."""
  result = evaluate(latents_fn=latents, relative_step_size=0.02)
  assert failed(result) == {5, 6, 7}


def test_a_claim_that_forgets_which_clean_images_are_misclassified_is_flagged(monkeypatch):
  def robust(self, radii):
    return (self.radius[None] > np.asarray(radii)[:, None]) | (self.attack == 0)[None]

  monkeypatch.setattr(AttackLog, 'robust', robust)
  assert failed(evaluate(latents_fn=latents)) == {11}


def test_an_image_that_is_recorded_at_too_large_a_radius_is_flagged(monkeypatch):
  """The log is consistent in itself: only the images' distances tell."""
  real = AttackLog.record

  def late(self, rows, images, *, radius, **options):
    real(self, rows, images, radius=np.where(radius == RADII[1], RADII[2], radius), **options)

  monkeypatch.setattr(AttackLog, 'record', late)
  assert failed(evaluate(latents_fn=latents)) == {11}
