"""Thirteen sanity checks of an evaluation: one function a check, all of them in `CHECKS`.

Most follow Athalye, Carlini and Wagner (2018) and Carlini et al. (2019), who list what a sound
evaluation shows, and what masked gradients or a faulty evaluation do not. Each function measures
its figures on a `Claim` and judges them: it returns whether the check passed (None if it does not
apply or had nothing to attack), the reason in one line, and the numbers behind it.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from se_vae import attacks
from se_vae.attacks import losses
from se_vae.attacks.losses import Aim, Model, UntilMisclassified
from se_vae.evaluation import attack_suite
from se_vae.evaluation.claims import Claim
from se_vae.evaluation.metrics import active_latents
from se_vae.evaluation.verdicts import SanityCheck

Judgement = tuple[bool | None, str, Mapping[str, Any]]

# Tolerances in accuracy, as shares of the examples; a single example is always allowed.
_DOUBLING = 0.005
_SQUARE = 0.002
_TOLERANCE = 0.005
_UNHEALTHY = 0.01
_ROBUST_AT_LARGE_RADII = 0.01

# Radii of check 4, as shares of the radius at which every image is in reach of every other.
_LARGE = (0.5, 0.75, 1.0)

_NO_RADIUS = 'nothing to attack: no radius is above 0'


def run_checks(claim: Claim) -> tuple[SanityCheck, ...]:
  """The results of all checks, in order."""
  results = []
  for number, (name, check) in enumerate(CHECKS.items(), start=1):
    passed, figure, values = check(claim)
    verdict = {True: 'pass', False: 'fail', None: 'skipped'}[passed]
    results.append(SanityCheck(number, name, verdict, figure, dict(values)))
  return tuple(results)


def legality(claim: Claim) -> Judgement:
  """In float64, every image is inside the bounds, and inside its ball to float32's rounding.

  The image of a robust example must be the clean one.
  """
  classifier, images = claim.classifier, claim.attack_log.images
  x, norm, bounds = classifier.x, classifier.norm, classifier.bounds
  radius = np.where(np.isfinite(claim.attack_log.radius), claim.attack_log.radius, 0.0)
  distances = _distances(x, images, norm)
  excess = float((distances - radius).max())
  lowest, highest = float(images.min()), float(images.max())
  in_ball = bool(np.all(distances <= allowed_distances(radius, x[0].size, norm, bounds)))
  return (
    in_ball and lowest >= bounds[0] and highest <= bounds[1],
    f'maximal excess over the radius {excess:.1e}, pixels in [{lowest:g}, {highest:g}]',
    {'excess': excess, 'lowest': lowest, 'highest': highest},
  )


def rescoring(claim: Claim) -> Judgement:
  """A second forward pass agrees on every image, and radius 0 is the clean accuracy."""
  radius = claim.attack_log.radius
  differ = int(np.sum(np.isfinite(radius) != claim.wrong))
  clean_accuracy, accuracy_at_zero = claim.clean_accuracy, float((radius > 0.0).mean())
  return (
    differ == 0 and clean_accuracy == accuracy_at_zero,
    f'{differ} images differ; clean accuracy {clean_accuracy:.4f}, at radius 0 '
    f'{accuracy_at_zero:.4f}',
    {'differ': differ, 'clean_accuracy': clean_accuracy, 'accuracy_at_zero': accuracy_at_zero},
  )


def monotone(claim: Claim) -> Judgement:
  """The raw curve, each radius attacked on its own, does not rise out of its interval."""
  radii = claim.radii
  if len(radii) < 2:
    return None, 'nothing to compare: there is one radius', {}
  accuracy, interval = claim.curves['pgd'].accuracy, claim.curves['pgd'].interval()
  rise = accuracy - np.minimum.accumulate(accuracy)
  high = interval[np.array([int(np.argmin(accuracy[: i + 1])) for i in range(len(radii))]), 1]
  return (
    bool(np.all(accuracy <= high)),
    f'maximal rise {rise.max():.4f}',
    {'radii': radii.tolist(), 'accuracy': accuracy.tolist()},
  )


def large_radius(claim: Claim) -> Judgement:
  """Beyond half the pixel range, where one image is in reach of all, accuracy is a constant's.

  The radii grow until no example is robust or the range ends.
  """
  radii, accuracy = [], []
  diameter, largest_share = claim.classifier.diameter, claim.largest_share
  left = claim.rows[claim.attack_log.radius[claim.rows] > _LARGE[0] * diameter]
  for share in _LARGE:
    left = claim.classifier.robust(claim.suite.attacks, share * diameter, left)
    radii.append(share * diameter)
    accuracy.append(len(left) / claim.count)
    if not len(left):
      break
  curve = zip(accuracy, radii, strict=True)
  reached = ', '.join(f'{value:.4f} at radius {radius:g}' for value, radius in curve)
  return (
    max(accuracy) <= largest_share and accuracy[-1] <= _ROBUST_AT_LARGE_RADII,
    f'accuracy {reached}; the most frequent class has {largest_share:.4f} of the examples',
    {'radii': radii, 'accuracy': accuracy, 'largest_share': largest_share},
  )


def iterative(claim: Claim) -> Judgement:
  """Many steps are at least as strong as one at every radius."""
  if not claim.middle_radius:
    return None, _NO_RADIUS, {}
  one_step = claim.curves['fgsm'].accuracy
  worst = float(np.max(claim.curves['pgd'].accuracy - one_step))
  return (
    worst <= _slack(_TOLERANCE, claim.count),
    f'one step is stronger by at most {max(worst, 0.0):.4f}',
    {'one_step': one_step.tolist()},
  )


def converged(claim: Claim) -> Judgement:
  """Twice the steps, or the restarts, change accuracy by less than half a point."""
  radius, rows, count = claim.middle_radius, claim.robust_rows, claim.count
  if not radius or not len(rows):
    return None, _nothing_left(claim), {}
  doubled = [
    dataclasses.replace(attack, num_steps=2 * attack.num_steps)
    for attack in claim.suite.attacks
    if attack.name in claim.suite.doubled
  ]
  more_steps, more_restarts = (
    len(rows) - len(claim.redrawn.robust(tried, radius, rows))
    for tried in (doubled, claim.suite.gradient_attacks)
  )
  change = max(more_steps, more_restarts)
  return (
    change < _DOUBLING * count or change <= 1,
    f'of {count} examples, doubling steps misclassifies {more_steps} more, doubling restarts '
    f'{more_restarts}',
    {'more_steps': more_steps, 'more_restarts': more_restarts, 'count': count},
  )


def gradient_free(claim: Claim) -> Judgement:
  """Square misclassifies at most 0.2 points that the gradient attacks do not.

  The number is an upper bound: an image that Square misclassified at a smaller radius counts, since
  the gradient attacks did not try it again.
  """
  if claim.classifier.norm != 'linf':
    return None, f'Square is for linf, and the norm is {claim.classifier.norm}', {}
  radius, rows, log, count = claim.middle_radius, claim.robust_rows, claim.attack_log, claim.count
  found_by_square = np.array([name == 'square' for name in log.names])[log.attack[claim.rows]]
  before = int(np.sum(found_by_square & (log.radius[claim.rows] <= radius)))
  if not radius or not before + len(rows):
    return None, _nothing_left(claim), {}
  square = attack_suite.square_margin(claim.classifier.logits_fn, claim.num_queries)
  more = before + len(rows) - len(claim.redrawn.robust((square,), radius, rows))
  return (
    more / count <= _slack(_SQUARE, count),
    f'Square alone misclassifies {more} of {count}',
    {'more': more, 'count': count},
  )


def weaker(claim: Claim) -> Judgement:
  """Noise and images made for other models do not beat the attack at any radius."""
  if not claim.middle_radius:
    return None, _NO_RADIUS, {}
  others = {name: claim.curves[name].accuracy for name in ('noise', 'signs')}
  if claim.surrogate is not None:
    others['transfer'] = claim.transfer_accuracy()
  accuracy = claim.curves['pgd'].accuracy
  excess = {name: float(np.max(accuracy - other)) for name, other in others.items()}
  worst = max(excess, key=lambda name: excess[name])
  return (
    excess[worst] <= _slack(_TOLERANCE, claim.count),
    f'{worst} is stronger by at most {max(excess[worst], 0.0):.4f} ({", ".join(others)})',
    {name: other.tolist() for name, other in others.items()},
  )


def healthy_gradients(claim: Claim) -> Judgement:
  """Hardly any gradient is zero, NaN or infinite, and hardly any logits tied or saturated."""
  classifier = claim.classifier
  rows = claim.rows[claim.correct[claim.rows]]
  if not len(rows):
    return None, f'none of the first {claim.count} examples is right', {}
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
  worst, kind, name = max(
    ((share, kind, name) for name, kinds in shares.items() for kind, share in kinds.items()),
    key=lambda entry: entry[0],
  )
  return worst <= _UNHEALTHY, f'worst share {worst:.4f} ({kind}, {name})', shares


def deterministic(claim: Claim) -> Judgement:
  """A batch gives the same logits when repeated, and but for rounding when reordered."""
  classifier, rows = claim.classifier, claim.rows
  forward = functools.partial(classifier.apply, classifier.logits_fn)
  logits, again = claim.logits[rows], forward(classifier.x)[rows]
  reordered = forward(classifier.x[::-1])[::-1][rows]
  bits = int(np.sum(np.any(logits != again, axis=1)))
  scale = float(np.abs(logits).max())
  change = float(np.abs(logits - reordered).max()) / scale if scale > 0.0 else 0.0
  return (
    bits == 0 and change <= 1e-4,  # sums in another order, at most
    f'{bits} examples differ when repeated; reordering changes logits by {change:.1e} of the '
    'maximum',
    {'differ': bits, 'reordered': change},
  )


def mean_of_minima(claim: Claim) -> Judgement:
  """The reported accuracy is the mean over examples of each one's worst case, with its config.

  Each image's distance from its original is measured here, in float64. An example counts as
  misclassified at every radius from that distance on if the classifier is wrong on the image.
  """
  x, config, accuracy = claim.classifier.x, claim.config, claim.curve.accuracy
  interval, count = claim.curve.interval(), claim.curve.correct.shape[1]
  missing = sorted({'attacks', 'norm', 'bounds', 'seed'} - set(config))
  norm, bounds = config.get('norm', 'linf'), config.get('bounds', (0.0, 1.0))
  limits = allowed_distances(np.asarray(claim.curve.radii), x[0].size, norm, bounds)
  distances = _distances(x, claim.attack_log.images, norm)
  worst = claim.wrong[None] & (distances[None] <= limits[:, None])
  error = float(np.abs(accuracy - (1.0 - worst.mean(axis=1))).max())
  inside = bool(np.all((interval[:, 0] <= accuracy) & (accuracy <= interval[:, 1])))
  return (
    error < 0.5 / count and inside and count == len(x) and not missing,
    f'differs by {error:.4f} from the mean of minima over n = {len(x)}'
    + (f'; not reported: {", ".join(missing)}' if missing else ''),
    {'error': error, 'count': count, 'missing': missing},
  )


def informative(claim: Claim) -> Judgement:
  """The representation carries information; a constant would be robust.

  `GaussianLatents` has two dimensions for each latent. The scale of the latents is the root mean
  square over examples of the deviation from the mean representation.
  """
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
  defects = []
  if not figures['clean_accuracy'] > claim.largest_share:
    defects.append('clean accuracy is that of a constant')
  if not figures['active_dimensions'] >= 1:
    defects.append('no active dimension')
  if not 1e-3 <= figures['latent_scale'] <= 1e3:
    defects.append('the latent scale is not in [0.001, 1000]')
  if not figures.get('squared_error', 0.0) <= figures.get('variance', np.inf):
    defects.append('reconstructions are worse than the mean image')
  text = ', '.join(f'{name.replace("_", " ")} {value:.4g}' for name, value in figures.items())
  return not defects, '; '.join([text, *defects]), figures


def certificates_hold(claim: Claim) -> Judgement:
  """No image within an example's certified radius is misclassified, whatever found it.

  The images are the clean ones, those of the log, whose distances are measured in float64, and
  those of the raw curves. One counterexample shows that the certificate or the attack is wrong.
  """
  if claim.certificate is None:
    return None, 'nothing to check: no certificates were asked for', {}
  certified, log, x = claim.certificate.radius, claim.attack_log, claim.classifier.x
  # Attacks compute with float32's radii, and certificates speak about these.
  radius = np.minimum(
    log.radius.astype(np.float32), _distances(x, log.images, claim.classifier.norm)
  )
  radius = np.where(np.isfinite(log.radius), radius, np.inf)
  found = [('clean', 0.0, np.flatnonzero(~claim.correct & (certified >= 0.0)))]
  for number, name in enumerate(log.names):
    rows = np.flatnonzero((log.attack == number) & (radius <= certified))
    found += [(name, float(radius[row]), np.array([row])) for row in rows]
  for name, curve in claim.curves.items() if claim.middle_radius else ():
    for at, correct in zip(curve.radii, curve.correct, strict=True):
      found.append((name, at, claim.rows[~correct & (np.float32(at) <= certified[claim.rows])]))
  first = {int(row): (name, at) for name, at, rows in reversed(found) for row in rows}
  values = {'examples': sorted(first), 'attacks': [first[row][0] for row in sorted(first)]}
  if not first:
    share = float(np.mean(certified > 0.0))
    return True, f'holds for all; {share:.4f} of the examples are certified beyond radius 0', values
  row = min(first)
  name, at = first[row]
  text = (
    f'{len(first)} examples are misclassified within their certified radius: example {row} by '
    f'{name} at radius {at:.6g}, certified up to {certified[row]:.6g}'
  )
  return False, text, values


CHECKS: dict[str, Callable[[Claim], Judgement]] = {
  'images are legal': legality,
  're-scoring agrees': rescoring,
  'raw curve is monotone': monotone,
  'no image is robust at large radii': large_radius,
  'iterative beats one step': iterative,
  'attack has converged': converged,
  'Square does not beat gradients': gradient_free,
  'noise and transfer are weaker': weaker,
  'gradients are healthy': healthy_gradients,
  'forward pass is deterministic': deterministic,
  'a mean of minima': mean_of_minima,
  'representation is informative': informative,
  'certificates hold': certificates_hold,
}


def allowed_distances(
  radii: np.ndarray, size: int, norm: str, bounds: Sequence[float]
) -> np.ndarray:
  """The distances up to which an image counts as inside its ball: radii and float32's rounding.

  Args:
    radii: of any shape.
    size: numbers in an image.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
  """
  ulp = float(np.spacing(np.float32(max(map(abs, bounds)))))
  return radii * (1.0 + 1e-6) + (ulp if norm == 'linf' else ulp * np.sqrt(size))


def _distances(x: np.ndarray, images: np.ndarray, norm: str) -> np.ndarray:
  """Distance of each image from its original, `[N]`, in float64."""
  offset = (np.asarray(images, np.float64) - np.asarray(x, np.float64)).reshape(len(x), -1)
  return np.abs(offset).max(axis=1) if norm == 'linf' else np.linalg.norm(offset, axis=1)


def _slack(share: float, count: int) -> float:
  """The share, or one example of so few."""
  return max(share, 1.0 / count) + 1e-9


def _nothing_left(claim: Claim) -> str:
  """Why the checks that attack robust examples have none."""
  if not claim.middle_radius:
    return _NO_RADIUS
  return (
    f'nothing to attack: of the first {claim.count} examples none is robust at radius '
    f'{claim.middle_radius:g}'
  )


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
