"""What targeted attacks aim at, worked out by hand, and what the attacks of a suite cost."""

from __future__ import annotations

import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.attacks import losses
from se_vae.evaluation import attack_suite, targets

# Images of two equal rows, and representations whose second coordinate says nothing.
LEVELS = np.array([0.0, 0.1, 0.5, 0.6, 1.0], np.float32)
X = np.broadcast_to(LEVELS[:, None, None], (5, 2, 1))
LATENTS = np.stack([10.0 * LEVELS, np.full(5, 7.0, np.float32)], axis=1)
LABELS = np.array([0, 0, 1, 1, 3])
ROWS = np.arange(5)


@pytest.fixture(params=[2, 1000], ids=['in parts', 'at once'])
def found(request, monkeypatch):
  """Targets of five examples of three classes, of a classifier that knows five."""
  monkeypatch.setattr(targets, '_ROWS_AT_ONCE', request.param)
  return targets.Targets(X, LABELS, LATENTS, 5, (0.0, 1.0))


def test_the_nearest_come_first_and_the_own_class_never(found):
  np.testing.assert_allclose(found.centroids, [[0.5, 7.0], [5.5, 7.0], [10.0, 7.0]], rtol=1e-6)
  nearest = [[1, 2], [1, 2], [0, 2], [2, 0], [1, 0]]
  np.testing.assert_array_equal(found.nearest_centroids, nearest)
  np.testing.assert_array_equal(found.nearest_examples, [[2, 4], [2, 4], [1, 4], [4, 1], [3, 1]])


def test_attempts_aim_at_every_other_class(found):
  others = np.stack([targets.other_class(found, ROWS, attempt).target for attempt in range(4)])
  for column, own in zip(others.T, LABELS, strict=True):
    assert set(column) == set(range(5)) - {own}


def test_attempts_aim_at_centroids_and_encodings(found):
  centroids = [targets.other_centroid(found, ROWS, attempt).latent for attempt in range(2)]
  np.testing.assert_allclose(centroids[0][:, 0], [5.5, 5.5, 0.5, 10.0, 5.5], rtol=1e-6)
  np.testing.assert_allclose(centroids[1][:, 0], [10.0, 10.0, 10.0, 0.5, 0.5], rtol=1e-6)
  encodings = targets.other_encoding(found, ROWS, 0).latent
  np.testing.assert_allclose(encodings[:, 0], [5.0, 5.0, 1.0, 10.0, 6.0], rtol=1e-6)
  np.testing.assert_array_equal(targets.own_encoding(found, ROWS, 0).latent, LATENTS)


def test_attempts_aim_at_greys_and_then_at_images(found):
  images = np.stack([targets.other_image(found, ROWS[:1], attempt).image for attempt in range(7)])
  levels = np.float32([0.0, 0.25, 0.5, 0.75, 1.0, 0.5, 1.0])
  np.testing.assert_array_equal(images, np.broadcast_to(levels[:, None, None, None], (7, 1, 2, 1)))
  pixels = targets.Targets(X, LABELS, X, 5, (0.0, 1.0))  # of a classifier without representation
  np.testing.assert_array_equal(pixels.latents, X[..., 0])


def test_the_cost_of_an_attempt_is_its_passes():
  def objective(x_adv, aim):
    return jnp.zeros(len(x_adv))

  climbing = {'name': 'a', 'objective': losses.Margin(objective)}
  start = losses.Margin(objective)
  for attack, cost in [
    (attack_suite.Noise(name='a'), (1, 0)),
    (attack_suite.OtherImage(name='a'), (1, 0)),
    (attack_suite.FGSM(**climbing), (1, 1)),
    (attack_suite.PGD(**climbing, num_steps=7), (2, 7)),
    (attack_suite.APGD(**climbing, num_steps=7), (1, 8)),
    (attack_suite.APGD(**climbing, num_steps=7, start_objective=start), (2, 15)),
    (attack_suite.Square(**climbing, num_steps=7), (8, 0)),
  ]:
    assert attack.cost == cost
