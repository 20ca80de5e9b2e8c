"""An evaluation that is to be checked, and the figures that several sanity checks measure on it."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import numpy as np

from se_vae.attacks import losses
from se_vae.attacks.losses import Model
from se_vae.evaluation import attack_suite
from se_vae.evaluation.attack_log import AttackLog
from se_vae.evaluation.attack_suite import Attack, Suite
from se_vae.evaluation.attacked_classifier import AttackedClassifier
from se_vae.evaluation.certificates import Certificate
from se_vae.evaluation.metrics import AdversarialAccuracy
from se_vae.parallel import sharding


@dataclasses.dataclass(frozen=True, eq=False)
class Claim:
  """An evaluation that is to be checked.

  Attributes:
    classifier: the classifier and its N examples.
    suite: the attacks that the claim rests on.
    attack_log: what they found.
    curve: the reported accuracy at R radii, in any order.
    config: the reported hyper-parameters.
    logits: logits of the clean images `[N, K]`.
    count: the checks that attack do so on the first `count` examples.
    num_steps: gradient steps of PGD.
    num_queries: forward passes of Square.
    representation: clean representations `[N, E]`, or the logits of a classifier without.
    reconstruct_fn: images to reconstructions, if there is a decoder.
    surrogate: another classifier, with its arguments.
    certificate: what is certified of the examples, if that was asked for.
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
  certificate: Certificate | None = None

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
  def correct(self) -> np.ndarray:
    """Whether the classifier is right on each clean image, bool `[N]`."""
    return _correct(self.logits, self.classifier.labels)

  @property
  def clean_accuracy(self) -> float:
    """Accuracy on the clean images."""
    return float(self.correct.mean())

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

  def transfer_accuracy(self) -> np.ndarray:
    """Accuracy on the images that PGD finds for the surrogate, `[R]`."""
    assert self.surrogate is not None
    logits_fn, args = self.surrogate
    classifier = self.classifier
    args = sharding.replicate(classifier.mesh, args)
    surrogate = dataclasses.replace(classifier, logits_fn=logits_fn, args=args)
    # All steps on the cross-entropy: an image just over the other's boundary transfers badly.
    attack = attack_suite.PGD(
      name='transfer', objective=losses.CrossEntropy(logits_fn), num_steps=self.num_steps
    )
    accuracy = []
    for radius in self.radii:
      images, _ = surrogate.attack(attack, float(radius), 0, self.rows)
      logits = classifier.apply(classifier.logits_fn, images)
      accuracy.append(_correct(logits, classifier.labels[self.rows]).mean())
    return np.array(accuracy)

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


def _correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """`losses.is_correct` written anew in NumPy: a check shares no code with what it checks."""
  return np.isfinite(logits).all(axis=1) & (logits.argmax(axis=1) == labels)
