"""Twelve checks of a robustness claim: pure judgements of figures that `audit` gathers.

Most follow Athalye, Carlini and Wagner (2018) and Carlini et al. (2019): what a sound evaluation
shows, and what masked gradients or a faulty evaluation do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from se_vae.attacks.projections import Norm

# Points of accuracy, as shares; a single example is always allowed.
_DOUBLING = 0.005
_SQUARE = 0.002
_TOLERANCE = 0.005
_UNHEALTHY = 0.01
_BROKEN = 0.01


class SanityCheck(NamedTuple):
  """One verdict.

  Attributes:
    number: 1 to 12.
    name: what is asked.
    verdict: 'pass', 'fail' or 'skipped'.
    figure: the answer's reason, in one line.
    values: the numbers behind it, for JSON.
  """

  number: int
  name: str
  verdict: str
  figure: str
  values: dict[str, Any]


def summary(checks: Sequence[Any]) -> str:
  """STUB."""
  if not checks:
    return 'checks: not run'
  found = [c if isinstance(c, dict) else {**c._asdict()} for c in checks]
  verdicts = [c.get('verdict') or ('pass' if c['passed'] else 'fail') for c in found]
  failed = [f'{c["number"]}: {c["figure"]}' for c, v in zip(found, verdicts) if v == 'fail']
  names = f' ({"; ".join(failed)})' if failed else ''
  return f'checks: {verdicts.count("pass")} passed, {len(failed)} failed{names}, {verdicts.count("skipped")} skipped'


class Check(NamedTuple):
  number: int
  name: str
  passed: bool
  figure: str
  values: dict[str, Any]


def legality(
  x: np.ndarray,
  images: np.ndarray,
  radius: np.ndarray,
  norm: Norm,
  bounds: tuple[float, float],
) -> Check:
  """(1) In float64: every image is inside the bounds, and inside its ball to float32's rounding.

  Args:
    x: clean images `[N, ...]`.
    images: adversarial images `[N, ...]`.
    radius: `[N]`; an infinite one, of an example that nothing broke, demands the clean image.
    norm: of the balls.
    bounds: lowest and highest pixel value.
  """
  offset = (np.asarray(images, np.float64) - np.asarray(x, np.float64)).reshape(len(x), -1)
  ulp = float(np.spacing(np.float32(max(map(abs, bounds)))))
  if norm == 'linf':
    length, slack = np.abs(offset).max(axis=1), ulp
  else:
    length, slack = np.linalg.norm(offset, axis=1), ulp * np.sqrt(offset.shape[1])
  allowed = np.where(np.isfinite(radius), radius, 0.0)
  excess = float((length - allowed * (1.0 + 1e-6)).max())
  lowest, highest = float(images.min()), float(images.max())
  inside = bool(excess <= slack and lowest >= bounds[0] and highest <= bounds[1])
  return Check(
    1,
    'images are legal',
    inside,
    f'largest excess over the radius {excess:.1e}, pixels in [{lowest:g}, {highest:g}]',
    {'excess': excess, 'lowest': lowest, 'highest': highest},
  )


def rescoring(
  broken: np.ndarray, wrong: np.ndarray, clean_accuracy: float, accuracy_at_zero: float
) -> Check:
  """(2) A forward pass of its own says the same of every image; radius 0 is the clean accuracy.

  Args:
    broken: bool `[N]`, as recorded.
    wrong: bool `[N]`, the classifier's error on the recorded images.
    clean_accuracy: counted apart.
    accuracy_at_zero: as recorded.
  """
  differ = int(np.sum(broken != wrong))
  return Check(
    2,
    're-scoring agrees',
    differ == 0 and clean_accuracy == accuracy_at_zero,
    f'{differ} images differ; clean accuracy {clean_accuracy:.4f}, at radius 0 '
    f'{accuracy_at_zero:.4f}',
    {'differ': differ, 'clean_accuracy': clean_accuracy, 'accuracy_at_zero': accuracy_at_zero},
  )


def monotone(radii: np.ndarray, accuracy: np.ndarray, interval: np.ndarray) -> Check:
  """(3) The raw curve, each radius attacked apart, does not rise out of its interval.

  Args:
    radii: `[R]`, ascending.
    accuracy: `[R]`.
    interval: `[R, 2]`.
  """
  lowest_so_far = np.minimum.accumulate(accuracy)
  rise = accuracy - lowest_so_far
  high = interval[np.array([int(np.argmin(accuracy[: i + 1])) for i in range(len(radii))]), 1]
  return Check(
    3,
    'raw curve is monotone',
    bool(np.all(accuracy <= high)),
    f'largest rise {rise.max():.4f}',
    {'radii': radii.tolist(), 'accuracy': accuracy.tolist()},
  )


def large_radius(radii: Sequence[float], accuracy: Sequence[float], largest_share: float) -> Check:
  """(4) Beyond half the pixel range every image is in reach of one: accuracy is that of a constant.

  Args:
    radii: `[R]`, ascending, from half the range on, until nothing is left or the range ends.
    accuracy: `[R]`.
    largest_share: of a class among the examples.
  """
  return Check(
    4,
    'nothing survives large radii',
    bool(max(accuracy) <= largest_share and accuracy[-1] <= _BROKEN),
    f'accuracy {accuracy[0]:.4f} at {radii[0]:g} (largest class {largest_share:.4f}), '
    f'{accuracy[-1]:.4f} at {radii[-1]:g}',
    {'radii': list(radii), 'accuracy': list(accuracy), 'largest_share': largest_share},
  )


def iterative(accuracy: np.ndarray, one_step: np.ndarray, count: int) -> Check:
  """(5) Many steps are at least as strong as one, at every radius; both `[R]`."""
  worst = float(np.max(accuracy - one_step))
  return Check(
    5,
    'iterative beats one step',
    worst <= _slack(_TOLERANCE, count),
    f'one step is stronger by at most {max(worst, 0.0):.4f}',
    {'one_step': one_step.tolist()},
  )


def converged(more_steps: int, more_restarts: int, count: int) -> Check:
  """(6) Twice the steps, or the restarts, change accuracy by less than half a point.

  Args:
    more_steps: survivors that twice the steps break.
    more_restarts: survivors that as many restarts again break.
    count: examples, survivors or not.
  """
  change = max(more_steps, more_restarts)
  return Check(
    6,
    'attack has converged',
    change < _DOUBLING * count or change <= 1,
    f'doubling steps breaks {more_steps} more of {count}, doubling restarts {more_restarts}',
    {'more_steps': more_steps, 'more_restarts': more_restarts, 'count': count},
  )


def gradient_free(more: int, count: int) -> Check:
  """(7) Square breaks at most 0.2 points that the gradient attacks did not.

  Args:
    more: examples that only Square breaks; -1 where it does not apply (l2).
    count: examples.
  """
  if more < 0:
    return Check(7, 'Square does not beat gradients', True, 'not run: Square is for linf', {})
  return Check(
    7,
    'Square does not beat gradients',
    more / count <= _slack(_SQUARE, count),
    f'Square alone breaks {more} of {count}',
    {'more': more, 'count': count},
  )


def weaker(accuracy: np.ndarray, others: Mapping[str, np.ndarray], count: int) -> Check:
  """(8) Noise and examples made for other models do not beat the attack at any radius.

  Args:
    accuracy: `[R]`.
    others: accuracy under each of them, `[R]`.
    count: examples.
  """
  excess = {name: float(np.max(accuracy - other)) for name, other in others.items()}
  worst = max(excess, key=lambda name: excess[name])
  return Check(
    8,
    'noise and transfer are weaker',
    excess[worst] <= _slack(_TOLERANCE, count),
    f'{worst} is stronger by at most {max(excess[worst], 0.0):.4f} ({", ".join(others)})',
    {name: other.tolist() for name, other in others.items()},
  )


def healthy_gradients(shares: Mapping[str, Mapping[str, float]]) -> Check:
  """(9) Hardly any gradient is zero, NaN or infinite, and hardly any logits tied or saturated.

  Args:
    shares: for each attack, shares of examples in [0, 1] by kind of trouble.
  """
  attack, kind, share = max(
    ((attack, kind, share) for attack, kinds in shares.items() for kind, share in kinds.items()),
    key=lambda entry: entry[2],
  )
  return Check(
    9,
    'gradients are alive',
    share <= _UNHEALTHY,
    f'worst share {share:.4f} ({kind}, {attack})',
    {attack: dict(kinds) for attack, kinds in shares.items()},
  )


def deterministic(logits: np.ndarray, again: np.ndarray, reordered: np.ndarray) -> Check:
  """(10) The same batch gives the same bits, and another order of it the same logits.

  Args:
    logits: `[N, K]`.
    again: `[N, K]`, of the same call repeated.
    reordered: `[N, K]`, of the batch in reverse, put back in order.
  """
  bits = int(np.sum(np.any(logits != again, axis=1)))
  scale = float(np.abs(logits).max())
  shift = float(np.abs(logits - reordered).max()) / scale if scale > 0.0 else 0.0
  return Check(
    10,
    'forward pass is deterministic',
    bits == 0 and shift <= 1e-4,  # sums in another order, at most
    f'{bits} examples differ when repeated; reordering moves logits by {shift:.1e} of the largest',
    {'differ': bits, 'reordered': shift},
  )


def mean_of_minima(
  accuracy: np.ndarray,
  interval: np.ndarray,
  worst: np.ndarray,
  count: int,
  config: Mapping[str, Any],
) -> Check:
  """(11) What is reported is the mean over examples of each one's worst case, with its particulars.

  Args:
    accuracy: reported, `[R]`.
    interval: reported, `[R, 2]`.
    worst: bool `[R, N]`: whether any legal image that was found breaks example n.
    count: the reported number of examples.
    config: hyper-parameters that are reported.
  """
  expected = 1.0 - worst.mean(axis=1)
  error = float(np.abs(accuracy - expected).max())
  inside = bool(np.all((interval[:, 0] <= accuracy) & (accuracy <= interval[:, 1])))
  missing = sorted({'attacks', 'norm', 'bounds', 'seed'} - set(config))
  return Check(
    11,
    'a mean of minima',
    error < 0.5 / count and inside and count == worst.shape[1] and not missing,
    f'differs by {error:.4f} from the mean of minima over n = {worst.shape[1]}'
    + (f'; not reported: {", ".join(missing)}' if missing else ''),
    {'error': error, 'count': count, 'missing': missing},
  )


def alive(figures: Mapping[str, float], largest_share: float) -> Check:
  """(12) The representation says something: a constant is robust.

  Args:
    figures: `clean_accuracy`, `active_dimensions` of the representation (`GaussianLatents` has two
      for each latent), `latent_scale` (root mean square over examples of the deviation from the
      mean representation) and, where there is a decoder, `squared_error` of a reconstruction and
      `variance` of an image about the mean image.
    largest_share: of a class, the clean accuracy of a constant.
  """
  problems = []
  if not figures['clean_accuracy'] > largest_share:
    problems.append('clean accuracy is that of a constant')
  if not figures['active_dimensions'] >= 1:
    problems.append('no active dimension')
  if not 1e-3 <= figures['latent_scale'] <= 1e3:
    problems.append('latent scale')
  if not figures.get('squared_error', 0.0) <= figures.get('variance', np.inf):
    problems.append('reconstructions are worse than the mean image')
  text = ', '.join(f'{name} {value:.4g}' for name, value in figures.items())
  return Check(
    12,
    'representation is alive',
    not problems,
    '; '.join([text, *problems]),
    dict(figures),
  )


def _slack(share: float, count: int) -> float:
  """The share, or one example of so few."""
  return max(share, 1.0 / count) + 1e-9
