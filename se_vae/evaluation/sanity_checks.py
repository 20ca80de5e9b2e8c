"""Twelve sanity checks of an evaluation: what each one demands of its figures.

The functions judge figures that `sanity_evidence` measures. Most follow Athalye, Carlini and Wagner
(2018) and Carlini et al. (2019), who list what a sound evaluation shows, and what masked gradients
or a faulty evaluation do not.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

# Tolerances in accuracy, as shares of the examples; a single example is always allowed.
_DOUBLING = 0.005
_SQUARE = 0.002
_TOLERANCE = 0.005
_UNHEALTHY = 0.01
_ROBUST_AT_LARGE_RADII = 0.01

NAMES = (
  'images are legal',
  're-scoring agrees',
  'raw curve is monotone',
  'no image is robust at large radii',
  'iterative beats one step',
  'attack has converged',
  'Square does not beat gradients',
  'noise and transfer are weaker',
  'gradients are healthy',
  'forward pass is deterministic',
  'a mean of minima',
  'representation is informative',
)


class SanityCheck(NamedTuple):
  """The result of one check.

  Attributes:
    number: 1 to 12.
    name: the statement that is checked.
    verdict: 'pass', 'fail' or 'skipped'.
    figure: the reason for the verdict, in one line.
    values: the numbers behind it, as JSON values.
  """

  number: int
  name: str
  verdict: str
  figure: str
  values: dict[str, Any]

  @property
  def passed(self) -> bool | None:
    """None if the check was skipped."""
    return {'pass': True, 'fail': False, 'skipped': None}[self.verdict]

  def to_json(self) -> dict[str, Any]:
    """JSON values: `number, name, verdict, passed, figure, values`."""
    content = self._asdict()
    values = content.pop('values')
    figure = content.pop('figure')
    return {**content, 'passed': self.passed, 'figure': figure, 'values': values}

  @classmethod
  def from_json(cls, content: Mapping[str, Any]) -> SanityCheck:
    """What `to_json` gave, in files of older versions too, which have `passed` alone.

    Raises:
      KeyError, TypeError, ValueError: for values that are no check.
    """
    verdict = content.get('verdict') or ('pass' if content['passed'] else 'fail')
    if verdict not in ('pass', 'fail', 'skipped'):
      raise ValueError(f'verdict must be pass, fail or skipped, got {verdict!r}')
    number, name, figure = int(content['number']), str(content['name']), str(content['figure'])
    return cls(number, name, verdict, figure, dict(content.get('values', {})))


def summary(checks: Iterable[SanityCheck | Mapping[str, Any]]) -> str:
  """One line that counts the verdicts, and names the checks that failed or were skipped.

  Example:
    >>> summary([skipped(7, 'Square is for linf')])
    'checks: 0 passed, 0 failed, 1 skipped (7: Square does not beat gradients)'

  Args:
    checks: checks, or their JSON values; of several evaluations one after the other too.
  """
  found = [
    each if isinstance(each, SanityCheck) else SanityCheck.from_json(each) for each in checks
  ]
  if not found:
    return 'checks: not run'
  parts = []
  for verdict, word in (('pass', 'passed'), ('fail', 'failed'), ('skipped', 'skipped')):
    named = [f'{check.number}: {check.name}' for check in found if check.verdict == verdict]
    times = {name: named.count(name) for name in named}  # more than one for several evaluations
    texts = (name if count == 1 else f'{name}, {count} times' for name, count in times.items())
    names = f' ({"; ".join(texts)})' if named and verdict != 'pass' else ''
    parts.append(f'{len(named)} {word}{names}')
  return f'checks: {", ".join(parts)}'


def skipped(number: int, reason: str) -> SanityCheck:
  """A check that does not apply, or that had nothing to attack."""
  return SanityCheck(number, NAMES[number - 1], 'skipped', reason, {})


def _judged(number: int, passed: bool, figure: str, values: Mapping[str, Any]) -> SanityCheck:
  verdict = 'pass' if passed else 'fail'
  return SanityCheck(number, NAMES[number - 1], verdict, figure, dict(values))


def legality(
  x: np.ndarray,
  images: np.ndarray,
  radius: np.ndarray,
  norm: str,
  bounds: tuple[float, float],
) -> SanityCheck:
  """(1) In float64, every image is inside the bounds, and inside its ball to float32's rounding.

  Args:
    x: clean images `[N, ...]`.
    images: adversarial images `[N, ...]`.
    radius: `[N]`; at an infinite one, of a robust example, the image must be the clean one.
    norm: of the balls.
    bounds: lowest and highest pixel value.
  """
  radius = np.where(np.isfinite(radius), radius, 0.0)
  distances = _distances(x, images, norm)
  excess = float((distances - radius).max())
  lowest, highest = float(images.min()), float(images.max())
  in_ball = bool(np.all(distances <= allowed_distances(radius, x[0].size, norm, bounds)))
  return _judged(
    1,
    in_ball and lowest >= bounds[0] and highest <= bounds[1],
    f'maximal excess over the radius {excess:.1e}, pixels in [{lowest:g}, {highest:g}]',
    {'excess': excess, 'lowest': lowest, 'highest': highest},
  )


def rescoring(
  misclassified: np.ndarray, wrong: np.ndarray, clean_accuracy: float, accuracy_at_zero: float
) -> SanityCheck:
  """(2) A second forward pass agrees on every image, and radius 0 is the clean accuracy.

  Args:
    misclassified: bool `[N]`, as recorded.
    wrong: bool `[N]`, whether the second pass misclassifies the recorded image.
    clean_accuracy: counted apart, in [0, 1].
    accuracy_at_zero: as recorded, in [0, 1].
  """
  differ = int(np.sum(misclassified != wrong))
  return _judged(
    2,
    differ == 0 and clean_accuracy == accuracy_at_zero,
    f'{differ} images differ; clean accuracy {clean_accuracy:.4f}, at radius 0 '
    f'{accuracy_at_zero:.4f}',
    {'differ': differ, 'clean_accuracy': clean_accuracy, 'accuracy_at_zero': accuracy_at_zero},
  )


def monotone(radii: np.ndarray, accuracy: np.ndarray, interval: np.ndarray) -> SanityCheck:
  """(3) The raw curve, each radius attacked on its own, does not rise out of its interval.

  Args:
    radii: `[R]`, ascending.
    accuracy: `[R]`.
    interval: `[R, 2]`.
  """
  rise = accuracy - np.minimum.accumulate(accuracy)
  high = interval[np.array([int(np.argmin(accuracy[: i + 1])) for i in range(len(radii))]), 1]
  return _judged(
    3,
    bool(np.all(accuracy <= high)),
    f'maximal rise {rise.max():.4f}',
    {'radii': radii.tolist(), 'accuracy': accuracy.tolist()},
  )


def large_radius(
  radii: Sequence[float], accuracy: Sequence[float], largest_share: float
) -> SanityCheck:
  """(4) Beyond half the pixel range, where one image is in reach of all, accuracy is a constant's.

  Args:
    radii: `[R]`, ascending, from half the range on, until no example is robust or the range ends.
    accuracy: `[R]`.
    largest_share: share of the most frequent class among the examples.
  """
  return _judged(
    4,
    bool(max(accuracy) <= largest_share and accuracy[-1] <= _ROBUST_AT_LARGE_RADII),
    f'accuracy {accuracy[0]:.4f} at {radii[0]:g} (most frequent class {largest_share:.4f}), '
    f'{accuracy[-1]:.4f} at {radii[-1]:g}',
    {'radii': list(radii), 'accuracy': list(accuracy), 'largest_share': largest_share},
  )


def iterative(accuracy: np.ndarray, one_step: np.ndarray, count: int) -> SanityCheck:
  """(5) Many steps are at least as strong as one at every radius; both accuracies are `[R]`."""
  worst = float(np.max(accuracy - one_step))
  return _judged(
    5,
    worst <= _slack(_TOLERANCE, count),
    f'one step is stronger by at most {max(worst, 0.0):.4f}',
    {'one_step': one_step.tolist()},
  )


def converged(more_steps: int, more_restarts: int, count: int) -> SanityCheck:
  """(6) Twice the steps, or the restarts, change accuracy by less than half a point.

  Args:
    more_steps: robust examples that an attack with twice the steps misclassifies.
    more_restarts: robust examples that as many restarts again misclassify.
    count: all examples.
  """
  change = max(more_steps, more_restarts)
  return _judged(
    6,
    change < _DOUBLING * count or change <= 1,
    f'of {count} examples, doubling steps misclassifies {more_steps} more, doubling restarts '
    f'{more_restarts}',
    {'more_steps': more_steps, 'more_restarts': more_restarts, 'count': count},
  )


def gradient_free(more: int, count: int) -> SanityCheck:
  """(7) Square misclassifies at most 0.2 points that the gradient attacks do not.

  Args:
    more: examples that only Square misclassifies.
    count: all examples.
  """
  return _judged(
    7,
    more / count <= _slack(_SQUARE, count),
    f'Square alone misclassifies {more} of {count}',
    {'more': more, 'count': count},
  )


def weaker(accuracy: np.ndarray, others: Mapping[str, np.ndarray], count: int) -> SanityCheck:
  """(8) Noise and images made for other models do not beat the attack at any radius.

  Args:
    accuracy: `[R]`.
    others: accuracy under each of them, `[R]`.
    count: number of examples.
  """
  excess = {name: float(np.max(accuracy - other)) for name, other in others.items()}
  worst = max(excess, key=lambda name: excess[name])
  return _judged(
    8,
    excess[worst] <= _slack(_TOLERANCE, count),
    f'{worst} is stronger by at most {max(excess[worst], 0.0):.4f} ({", ".join(others)})',
    {name: other.tolist() for name, other in others.items()},
  )


def healthy_gradients(shares: Mapping[str, Mapping[str, float]]) -> SanityCheck:
  """(9) Hardly any gradient is zero, NaN or infinite, and hardly any logits tied or saturated.

  Args:
    shares: for each attack, shares of examples in [0, 1] by kind of defect.
  """
  attack, kind, share = max(
    ((attack, kind, share) for attack, kinds in shares.items() for kind, share in kinds.items()),
    key=lambda entry: entry[2],
  )
  return _judged(
    9,
    share <= _UNHEALTHY,
    f'worst share {share:.4f} ({kind}, {attack})',
    {attack: dict(kinds) for attack, kinds in shares.items()},
  )


def deterministic(logits: np.ndarray, again: np.ndarray, reordered: np.ndarray) -> SanityCheck:
  """(10) The same batch gives the same bits, and another order of it the same logits.

  Args:
    logits: `[N, K]`.
    again: `[N, K]`, of the same call repeated.
    reordered: `[N, K]`, of the batch in reverse, put back in order.
  """
  bits = int(np.sum(np.any(logits != again, axis=1)))
  scale = float(np.abs(logits).max())
  change = float(np.abs(logits - reordered).max()) / scale if scale > 0.0 else 0.0
  return _judged(
    10,
    bits == 0 and change <= 1e-4,  # sums in another order, at most
    f'{bits} examples differ when repeated; reordering changes logits by {change:.1e} of the '
    'maximum',
    {'differ': bits, 'reordered': change},
  )


def mean_of_minima(
  x: np.ndarray,
  images: np.ndarray,
  wrong: np.ndarray,
  radii: np.ndarray,
  accuracy: np.ndarray,
  interval: np.ndarray,
  count: int,
  config: Mapping[str, Any],
) -> SanityCheck:
  """(11) The reported accuracy is the mean over examples of each one's worst case, with its config.

  Each image's distance from its original is measured here, in float64. An example counts as
  misclassified at every radius from that distance on if the classifier is wrong on the image.

  Args:
    x: clean images `[N, ...]`.
    images: adversarial images `[N, ...]`.
    wrong: bool `[N]`, whether the classifier misclassifies them.
    radii: `[R]`.
    accuracy: reported, `[R]`.
    interval: reported, `[R, 2]`.
    count: reported number of examples.
    config: hyper-parameters that are reported.
  """
  missing = sorted({'attacks', 'norm', 'bounds', 'seed'} - set(config))
  norm, bounds = config.get('norm', 'linf'), config.get('bounds', (0.0, 1.0))
  limits = allowed_distances(np.asarray(radii), x[0].size, norm, bounds)
  worst = wrong[None] & (_distances(x, images, norm)[None] <= limits[:, None])
  error = float(np.abs(accuracy - (1.0 - worst.mean(axis=1))).max())
  inside = bool(np.all((interval[:, 0] <= accuracy) & (accuracy <= interval[:, 1])))
  return _judged(
    11,
    error < 0.5 / count and inside and count == len(x) and not missing,
    f'differs by {error:.4f} from the mean of minima over n = {len(x)}'
    + (f'; not reported: {", ".join(missing)}' if missing else ''),
    {'error': error, 'count': count, 'missing': missing},
  )


def informative(figures: Mapping[str, float], largest_share: float) -> SanityCheck:
  """(12) The representation carries information; a constant would be robust.

  Args:
    figures: `clean_accuracy`, `active_dimensions` of the representation (`GaussianLatents` has two
      for each latent), `latent_scale` (root mean square over examples of the deviation from the
      mean representation) and, where there is a decoder, `squared_error` of a reconstruction and
      `variance` of an image about the mean image.
    largest_share: share of the most frequent class, the clean accuracy of a constant.
  """
  defects = []
  if not figures['clean_accuracy'] > largest_share:
    defects.append('clean accuracy is that of a constant')
  if not figures['active_dimensions'] >= 1:
    defects.append('no active dimension')
  if not 1e-3 <= figures['latent_scale'] <= 1e3:
    defects.append('latent scale')
  if not figures.get('squared_error', 0.0) <= figures.get('variance', np.inf):
    defects.append('reconstructions are worse than the mean image')
  text = ', '.join(f'{name} {value:.4g}' for name, value in figures.items())
  return _judged(12, not defects, '; '.join([text, *defects]), figures)


def _distances(x: np.ndarray, images: np.ndarray, norm: str) -> np.ndarray:
  """Distance of each image from its original, `[N]`, in float64."""
  offset = (np.asarray(images, np.float64) - np.asarray(x, np.float64)).reshape(len(x), -1)
  return np.abs(offset).max(axis=1) if norm == 'linf' else np.linalg.norm(offset, axis=1)


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


def _slack(share: float, count: int) -> float:
  """The share, or one example of so few."""
  return max(share, 1.0 / count) + 1e-9
