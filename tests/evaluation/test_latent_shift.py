"""The joint attack on several classifiers, and the largest latent shift."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae.attacks.losses import Aim
from se_vae.evaluation import latent_shift, robustness
from se_vae.parallel import sharding
from tests.evaluation.linear_classifier import RADII, SHAPE, closed_form, examples, linear

DTYPE_PROMOTION = 'standard'  # optax takes part


def wavy(x):
  """A representation with many largest shifts, of which an attack finds one."""
  return jnp.sin(27.0 * x.reshape(len(x), -1))


@pytest.mark.long
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


@pytest.mark.parametrize(
  ('logits', 'expected'),
  [
    ([0.0, 0.0], [1.0, 0.0]),  # of equal logits, the first class counts
    ([np.inf, 0.0], [0.0, 0.0]),
    ([np.nan, 0.0], [0.0, 0.0]),
  ],
)
def test_a_joint_attack_and_an_evaluation_agree_on_what_is_wrong(logits, expected):
  """Labels 0 and 1, each beside a classifier that is always wrong."""
  x, wrong = np.full((1, *SHAPE), 0.5, np.float32), jnp.float32([1.0, 0.0])
  constant = lambda x, logits: jnp.broadcast_to(logits, (len(x), 2))  # noqa: E731
  args = ((jnp.float32(logits),), (wrong,))
  for label, accuracy in enumerate(expected):
    found = latent_shift.joint_accuracy(
      (constant, constant), x, np.array([[label, 1]]), radii=(0.0,), args=args
    )
    assert found.accuracy == [accuracy]


def test_labels_that_a_classifier_does_not_have_are_refused():
  x, labels, args = examples()
  num_classes = linear(x[:1], *args).shape[1]
  for wrong in (-1, num_classes, num_classes + 1):
    both = np.stack([labels, np.where(labels == 0, wrong, labels)], axis=1)
    message = rf'labels: must lie in \[0, {num_classes}\) for logits_fns\[1\]'
    with pytest.raises(ValueError, match=message):
      latent_shift.joint_accuracy((linear, linear), x, both, args=(args, args), radii=RADII)


@pytest.mark.parametrize(
  'x',
  [np.zeros(4, np.float32), np.zeros((0, 4), np.float32), np.zeros((2, 4), int)],
  ids=['one pixel each', 'none', 'integers'],
)
def test_images_of_another_kind_are_refused(x):
  message = r'x: must be float images \[N, \.\.\.\], at least one, got'
  with pytest.raises(ValueError, match=message):
    latent_shift.max_latent_shift(jnp.sin, x, radii=(0.1,))
  with pytest.raises(ValueError, match=message):
    latent_shift.joint_accuracy((jnp.sin,), x, np.zeros((2, 1), int), radii=(0.1,), args=((),))


def test_images_may_be_rows():
  shift = latent_shift.max_latent_shift(
    lambda x: x, np.full((2, 4), 0.5, np.float32), radii=(0.1,), num_steps=3
  )
  np.testing.assert_allclose(shift, [[0.04, 0.04]], rtol=1e-5)


@pytest.mark.parametrize(
  ('rows', 'columns', 'tuples'),
  [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)],
)
def test_there_is_one_label_and_one_tuple_for_each_classifier(rows, columns, tuples):
  x, _, args = examples()
  labels = np.zeros((len(x) + rows, 2 + columns), int)
  with pytest.raises(ValueError, match=r'labels, args: must be \[N, 2\] and 2 tuples'):
    latent_shift.joint_accuracy(
      (linear, linear), x, labels, args=(args,) * (2 + tuples), radii=RADII
    )


def test_classifiers_of_a_joint_attack_give_logits():
  x, labels, args = examples()
  with pytest.raises(ValueError, match=r'logits_fns\[1\]: must give floats \[B, K\] with K >= 2'):
    latent_shift.joint_accuracy(
      (linear, lambda x: x), x, np.stack([labels, labels], axis=1), args=(args, ()), radii=RADII
    )


def test_one_attack_of_40_steps_from_the_seed_0_unless_said():
  x = np.random.default_rng(0).uniform(size=(6, *SHAPE)).astype(np.float32)
  named = {'num_steps': 40, 'restarts': 1, 'seed': 0, 'norm': 'linf', 'bounds': (0.0, 1.0)}
  default, expected, *others = (
    latent_shift.max_latent_shift(wavy, x, radii=(0.3,), **options)
    for options in ({}, named, {'seed': 1}, {'restarts': 2})
  )
  np.testing.assert_array_equal(default, expected)
  assert all((other != expected).any() for other in others)


def test_progress_is_in_attacks_of_an_example():
  x, _, args = examples()
  told: list[tuple[int, int]] = []
  options = dict(radii=(0.1, 0.2), num_steps=1, restarts=2, batch_size=4, args=args)
  latent_shift.max_latent_shift(linear, x, progress=lambda *counts: told.append(counts), **options)
  total = (1 + 2 * 2) * len(x)  # once without a ball, and twice in each
  assert {every for _, every in told} == {total}
  finished = [done for done, _ in told]
  assert finished[0] == 0 and finished[-1] == total and finished == sorted(finished)


def test_restarts_and_larger_balls_only_add():
  x = np.random.default_rng(0).uniform(size=(8, *SHAPE)).astype(np.float32)

  def shift(restarts, radii=(0.3,)):
    return latent_shift.max_latent_shift(wavy, x, radii=radii, num_steps=1, restarts=restarts)

  found = np.concatenate([shift(restarts) for restarts in (1, 2, 3, 4)])
  assert (np.diff(found, axis=0) >= 0.0).all() and (found[-1] > found[0]).any()
  along = shift(1, radii=np.linspace(0.05, 0.5, 10))
  assert (np.diff(along, axis=0) >= 0.0).all()
  assert (np.diff(along, axis=0) == 0.0).any()  # a larger ball had found less for itself


def test_a_value_that_is_no_number_counts_as_infinite():
  x, aim = np.full((1, *SHAPE), 0.5, np.float32), Aim(np.zeros(1, np.int32))
  values = latent_shift.maximal_values(
    lambda x, aim: jnp.full(len(x), jnp.nan), x, aim, np.zeros(1), radii=(0.1,), num_steps=1
  )
  assert values == np.inf


@pytest.mark.long
def test_the_default_generator_changes_no_attack():
  x, labels, args = examples()

  def attacked():
    options = dict(radii=(0.1,), num_steps=1, batch_size=4)
    shift = latent_shift.max_latent_shift(linear, x, args=args, **options)
    found = robustness.evaluate(linear, x, labels, args=args, check_examples=0, **options)
    return shift, found.attack_log.images

  expected = attacked()
  with jax.default_prng_impl('rbg'):
    for one, other in zip(attacked(), expected, strict=True):
      np.testing.assert_array_equal(one, other)


def test_parameters_may_lie_on_one_device_of_several():
  """As those that `fit` returns do."""
  x, labels, args = examples()
  args = jax.device_put(args, jax.devices()[0])
  options = dict(radii=(0.1,), num_steps=1, mesh=sharding.data_mesh(2))
  joint = latent_shift.joint_accuracy((linear,), x, labels[:, None], args=(args,), **options)
  shift = latent_shift.max_latent_shift(linear, x, args=args, **options)
  assert joint.correct.shape == shift.shape == (1, len(x))


def test_bounds_of_the_pixels_are_those_that_are_given():
  x = np.full((1, *SHAPE), 1.5, np.float32)
  shift = latent_shift.max_latent_shift(
    lambda x: x.sum(axis=(1, 2)), x, radii=(0.1,), num_steps=5, bounds=(0.0, 2.0)
  )
  np.testing.assert_allclose(shift, [[1.6**2]], rtol=1e-5)  # 16 pixels, each 0.1 up or down
