"""Measures the figures of the sanity checks: one function a check, all of them in `CHECKS`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from se_vae import attacks
from se_vae.attacks import losses
from se_vae.attacks.losses import Aim, Model, UntilMisclassified
from se_vae.evaluation import attack_suite, sanity_checks
from se_vae.evaluation.attack_log import AttackLog
from se_vae.evaluation.attack_suite import Attack, Suite
from se_vae.evaluation.attacked_classifier import AttackedClassifier
from se_vae.evaluation.metrics import AdversarialAccuracy, active_latents
from se_vae.evaluation.sanity_checks import SanityCheck
from se_vae.parallel import sharding

# Radii of check 4, as shares of the radius at which every image is in reach of every other.
_LARGE = (0.5, 0.75, 1.0)

_NO_RADIUS = 'nothing to attack: no radius is above 0'


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
  """An evaluation that is to be checked, and the figures that several checks use.

  Attributes:
    classifier: the classifier and its N examples.
    suite: the attacks that the claim rests on.
    attack_log: what they found.
    curve: the reported accuracy at R radii, in any order.
    config: the reported hyper-parameters.
    logits: logits of the clean images `[N, K]`.
    count: checks that attack do so on the first so many examples.
    num_steps: gradient steps of PGD.
    num_queries: forward passes of Square.
    representation: clean representations `[N, E]`, or the logits of a classifier without.
    reconstruct_fn: images to reconstructions, if there is a decoder.
    surrogate: another classifier, with its arguments.
  """

  classifier: AttackedClassifier
  suite: Suite
  attack_log: AttackLog
  curve: AdversarialAccuracy
  config: dict[str, Any]
  logits: np.ndarray
  count: int
  num_steps: int
  num_queries: int
  representation: np.ndarray
  reconstruct_fn: Model | None
  surrogate: tuple[Model, tuple[Any, ...]] | None

  @property
  def rows(self) -> np.ndarray:
    """The examples that checks attack."""
    return np.arange(self.count)

  @property
  def radii(self) -> np.ndarray:
    """The radii, each once, ascending."""
    return np.unique(self.curve.radii)

  @property
  def largest_share(self) -> float:
    """Share of the most frequent class, the accuracy of a constant."""
    labels = self.classifier.labels
    return float(np.bincount(labels).max() / len(labels))

  @property
  def clean_accuracy(self) -> float:
    """Accuracy on the clean images."""
    return float(_correct(self.logits, self.classifier.labels).mean())

  @functools.cached_property
  def wrong(self) -> np.ndarray:
    """Whether the classifier misclassifies each recorded image, bool `[N]`, by another pass."""
    logits = self.classifier.apply(self.classifier.logits_fn, self.attack_log.images)
    return ~_correct(logits, self.classifier.labels)

  @functools.cached_property
  def curves(self) -> dict[str, AdversarialAccuracy]:
    """Raw curves of 'pgd', 'fgsm', 'noise' and 'signs', every radius attacked on its own."""
    logits_fn = self.classifier.logits_fn
    step_size = self.config['relative_step_size']
    (pgd,) = attack_suite.standard(
      logits_fn, num_steps=self.num_steps, restarts=1, relative_step_size=step_size
    ).attacks
    compared: tuple[Attack, ...] = (
      dataclasses.replace(pgd, name='pgd'),
      attack_suite.FGSM(name='fgsm', objective=losses.CrossEntropy(logits_fn)),
      attack_suite.Noise(name='noise'),
      attack_suite.Noise(name='signs', extreme=True),
    )

    def raw_curve(attack: Attack) -> AdversarialAccuracy:
      robust = (self.classifier.robust((attack,), radius, self.rows) for radius in self.radii)
      return AdversarialAccuracy(self.radii, np.stack([np.isin(self.rows, r) for r in robust]))

    return {attack.name: raw_curve(attack) for attack in compared}

  @property
  def middle_radius(self) -> float:
    """The radius at which about half of the clean accuracy is left; 0 if no radius is above 0."""
    radii = self.radii[self.radii > 0.0]
    if not len(radii):
      return 0.0
    accuracy = self.attack_log.robust(radii).mean(axis=1)
    return float(radii[np.argmin(np.abs(accuracy - 0.5 * self.clean_accuracy))])

  @property
  def robust_rows(self) -> np.ndarray:
    """Those of `rows` that are robust at the middle radius: more of them could be misclassified."""
    return self.rows[self.attack_log.radius[self.rows] > self.middle_radius]

  @property
  def redrawn(self) -> AttackedClassifier:
    """The classifier, attacked with random draws that the claim has not used."""
    key = jax.random.fold_in(self.classifier.key, 1)
    return dataclasses.replace(self.classifier, key=key)


def _legality(claim: Claim) -> SanityCheck:
  classifier, log = claim.classifier, claim.attack_log
  return sanity_checks.legality(
    classifier.x, log.images, log.radius, classifier.norm, classifier.bounds
  )


def _rescoring(claim: Claim) -> SanityCheck:
  radius = claim.attack_log.radius
  return sanity_checks.rescoring(
    np.isfinite(radius), claim.wrong, claim.clean_accuracy, float((radius > 0.0).mean())
  )


def _monotone(claim: Claim) -> SanityCheck:
  if len(claim.radii) < 2:
    return sanity_checks.skipped(3, 'nothing to compare: there is one radius')
  pgd = claim.curves['pgd']
  return sanity_checks.monotone(claim.radii, pgd.accuracy, pgd.interval())


def _large_radius(claim: Claim) -> SanityCheck:
  radii, accuracy = [], []
  first, diameter = _LARGE[0], claim.classifier.diameter
  left = claim.rows[claim.attack_log.radius[claim.rows] > first * diameter]
  for share in _LARGE:
    left = claim.classifier.robust(claim.suite.attacks, share * diameter, left)
    radii.append(share * diameter)
    accuracy.append(len(left) / claim.count)
    if not len(left):
      break
  return sanity_checks.large_radius(radii, accuracy, claim.largest_share)


def _iterative(claim: Claim) -> SanityCheck:
  if not claim.middle_radius:
    return sanity_checks.skipped(5, _NO_RADIUS)
  pgd, fgsm = claim.curves['pgd'].accuracy, claim.curves['fgsm'].accuracy
  return sanity_checks.iterative(pgd, fgsm, claim.count)


def _converged(claim: Claim) -> SanityCheck:
  radius, rows = claim.middle_radius, claim.robust_rows
  if not radius or not len(rows):
    return sanity_checks.skipped(6, _nothing_left(claim))
  doubled = [
    dataclasses.replace(attack, num_steps=2 * attack.num_steps)
    for attack in claim.suite.attacks
    if attack.name in claim.suite.doubled
  ]
  more_steps, more_restarts = (
    len(rows) - len(claim.redrawn.robust(tried, radius, rows))
    for tried in (doubled, claim.suite.gradient_attacks)
  )
  return sanity_checks.converged(more_steps, more_restarts, claim.count)


def _gradient_free(claim: Claim) -> SanityCheck:
  if claim.classifier.norm != 'linf':
    return sanity_checks.skipped(7, f'Square is for linf, and the norm is {claim.classifier.norm}')
  radius, rows, log = claim.middle_radius, claim.robust_rows, claim.attack_log
  found_by_square = np.array([name == 'square' for name in log.names])[log.attack[claim.rows]]
  before = int(np.sum(found_by_square & (log.radius[claim.rows] <= radius)))
  if not radius or not before + len(rows):
    return sanity_checks.skipped(7, _nothing_left(claim))
  square = attack_suite.square_margin(claim.classifier.logits_fn, claim.num_queries)
  more = len(rows) - len(claim.redrawn.robust((square,), radius, rows))
  return sanity_checks.gradient_free(before + more, claim.count)


def _weaker(claim: Claim) -> SanityCheck:
  if not claim.middle_radius:
    return sanity_checks.skipped(8, _NO_RADIUS)
  others = {name: claim.curves[name].accuracy for name in ('noise', 'signs')}
  if claim.surrogate is not None:
    others['transfer'] = _transfer(claim, *claim.surrogate)
  return sanity_checks.weaker(claim.curves['pgd'].accuracy, others, claim.count)


def _healthy_gradients(claim: Claim) -> SanityCheck:
  classifier = claim.classifier
  rows = claim.rows[_correct(claim.logits, classifier.labels)[claim.rows]]
  if not len(rows):
    return sanity_checks.skipped(9, f'none of the first {claim.count} examples is right')
  health = attack_suite.Noise(name='health')
  noisy, _ = classifier.attack(health, claim.middle_radius, 0, rows)
  logits = classifier.apply(classifier.logits_fn, noisy)
  top = np.sort(logits, axis=1)[:, ::-1]
  loss = np.asarray(_cross_entropy(jnp.asarray(logits), classifier.labels[rows]))
  finite = np.isfinite(logits).all(axis=1)
  shares = {
    'logits': {
      'tied': float(np.mean(top[:, 0] == top[:, 1])),
      'saturated': float(np.mean(loss == 0.0)),
      'not finite': float(np.mean(~finite)),
    }
  }
  for attack in claim.suite.gradient_attacks:
    objective = attack.objective
    if isinstance(objective, UntilMisclassified):
      objective = objective.objective  # its gradient is zero where the image is misclassified
    gradients = functools.partial(_gradient_flags, objective, classifier.args)
    aim = attack.aim(classifier.targets, rows, 0)
    flags = classifier.in_batches(gradients, (noisy, aim))
    shares[attack.name] = {name: float(flag.mean()) for name, flag in flags.items()}
  return sanity_checks.healthy_gradients(shares)


def _deterministic(claim: Claim) -> SanityCheck:
  classifier, rows = claim.classifier, claim.rows
  forward = functools.partial(classifier.apply, classifier.logits_fn)
  reordered = forward(classifier.x[::-1])[::-1]
  return sanity_checks.deterministic(
    claim.logits[rows], forward(classifier.x)[rows], reordered[rows]
  )


def _mean_of_minima(claim: Claim) -> SanityCheck:
  return sanity_checks.mean_of_minima(
    claim.classifier.x,
    claim.attack_log.images,
    claim.wrong,
    claim.curve.radii,
    claim.curve.accuracy,
    claim.curve.interval(),
    claim.curve.correct.shape[1],
    claim.config,
  )


def _informative(claim: Claim) -> SanityCheck:
  classifier, rows = claim.classifier, claim.rows
  deviation = claim.representation - claim.representation.mean(axis=0)
  figures = {
    'clean_accuracy': claim.clean_accuracy,
    'active_dimensions': float(active_latents(claim.representation)),
    'latent_scale': float(np.sqrt((deviation**2).sum(axis=1).mean())),
  }
  if claim.reconstruct_fn is not None:
    x = classifier.x[rows].reshape(len(rows), -1)
    reconstructed = classifier.apply(claim.reconstruct_fn, classifier.x[rows]).reshape(x.shape)
    figures['squared_error'] = float(((x - reconstructed) ** 2).sum(axis=1).mean())
    figures['variance'] = float(((x - x.mean(axis=0)) ** 2).sum(axis=1).mean())
  return sanity_checks.informative(figures, claim.largest_share)


CHECKS: tuple[Callable[[Claim], SanityCheck], ...] = (
  _legality,
  _rescoring,
  _monotone,
  _large_radius,
  _iterative,
  _converged,
  _gradient_free,
  _weaker,
  _healthy_gradients,
  _deterministic,
  _mean_of_minima,
  _informative,
)


def run_checks(claim: Claim) -> tuple[SanityCheck, ...]:
  """The results of all checks, in order."""
  return tuple(check(claim) for check in CHECKS)


def _nothing_left(claim: Claim) -> str:
  """Why the checks that attack robust examples have none."""
  if not claim.middle_radius:
    return _NO_RADIUS
  return (
    f'nothing to attack: of the first {claim.count} examples none is robust at radius '
    f'{claim.middle_radius:g}'
  )


def _transfer(claim: Claim, logits_fn: Model, args: tuple[Any, ...]) -> np.ndarray:
  """Accuracy on the images that PGD finds for another classifier, `[R]`."""
  classifier = claim.classifier
  args = sharding.replicate(classifier.mesh, args)
  surrogate = dataclasses.replace(classifier, logits_fn=logits_fn, args=args)
  # All steps on the cross-entropy: an image just over the other's boundary transfers badly.
  attack = attack_suite.PGD(
    name='transfer', objective=losses.CrossEntropy(logits_fn), num_steps=claim.num_steps
  )
  accuracy = []
  for radius in claim.radii:
    images, _ = surrogate.attack(attack, float(radius), 0, claim.rows)
    logits = classifier.apply(classifier.logits_fn, images)
    accuracy.append(_correct(logits, classifier.labels[claim.rows]).mean())
  return np.array(accuracy)


@functools.partial(jax.jit, static_argnames='objective')
def _gradient_flags(
  objective: Model, args: tuple[Any, ...], batch: tuple[jax.Array, Aim]
) -> dict[str, jax.Array]:
  """Whether each example's gradient is all zero, and whether any of it is NaN or infinite."""
  x, aim = batch
  gradient = attacks.values_and_gradients(objective, x, (aim, *args))[1]
  pixels = tuple(range(1, x.ndim))
  return {
    'zero': (gradient == 0.0).all(axis=pixels),
    'NaN or Inf': ~jnp.isfinite(gradient).all(axis=pixels),
  }


@jax.jit
def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return losses.CrossEntropy(lambda same: same)(logits, Aim(labels))


def _correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """`losses.is_correct` written anew in NumPy: a check shares no code with what it checks."""
  return np.isfinite(logits).all(axis=1) & (logits.argmax(axis=1) == labels)
