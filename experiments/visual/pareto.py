"""Robust accuracy against what it costs: clean accuracy and the ELBO, an encoder a point."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, BinaryIO, NamedTuple

import numpy as np

from experiments.visual import plots


class Point(NamedTuple):
  """An encoder.

  Attributes:
    name: its label.
    clean: accuracy without an attack.
    elbo: ELBO of held-out images, in nats; NaN where the decoder was not trained.
    robust: adversarial accuracy, the mean over the seeds.
    lowest: the lowest seed's.
    highest: the highest seed's.
  """

  name: str
  clean: float
  elbo: float
  robust: float
  lowest: float
  highest: float


def front(costs: Sequence[float], gains: Sequence[float]) -> list[int]:
  """Returns the points that no other beats in both, from the largest of the first value down.

  Both values are to be large. Of equal points the first is kept.

  Example:
    >>> front([0.9, 0.8, 0.95, 0.7], [0.3, 0.5, 0.1, 0.4])
    [2, 0, 1]
  """
  best, found = -np.inf, []
  for i in sorted(range(len(costs)), key=lambda i: (-costs[i], -gains[i])):
    if gains[i] > best:
      best = gains[i]
      found.append(i)
  return found


def save(file: BinaryIO, points: Sequence[Point], title: str, caption: str) -> None:
  """Writes a PNG of two panels, against clean accuracy and against the ELBO, with the fronts.

  Args:
    file: to write to.
    points: the encoders.
    title: of the vertical axis.
    caption: below the panels, such as the summary of the sanity checks.
  """
  figure = plots.new_figure(11.0, 4.8)
  panels = {
    'clean accuracy': [(point, point.clean) for point in points],
    'ELBO of held-out images (nats)': [(p, p.elbo) for p in points if np.isfinite(p.elbo)],
  }
  axes = figure.subplots(1, 2, sharey=True)
  for axis, (name, shown) in zip(axes, panels.items(), strict=True):
    _draw(axis, [point for point, _ in shown], [value for _, value in shown])
    axis.set_xlabel(name)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel(title)
  figure.supxlabel(caption, fontsize=7.5, parse_math=False)
  figure.draw_without_rendering()  # the layout is final now, and labels can be placed in it
  for axis, shown in zip(axes, panels.values(), strict=True):
    label(axis, [(point.name, value, point.robust) for point, value in shown])
  figure.savefig(file, dpi=150, format='png')


def _draw(axis: Any, points: Sequence[Point], values: Sequence[float]) -> None:
  robust = [point.robust for point in points]
  below = [point.robust - point.lowest for point in points]
  above = [point.highest - point.robust for point in points]
  axis.errorbar(values, robust, yerr=[below, above], fmt='o', color='#1b6ca8', ms=5, elinewidth=1)
  axis.margins(0.12)  # for the labels
  best = front(values, robust)
  axis.step([values[i] for i in best], [robust[i] for i in best], where='pre', color='#d95f02')


# Where a label may stand beside its point: alignment, and offset in points. The first is the best.
_PLACES = tuple(
  (side, 4 * sign, up)
  for up in (3, -10, 12, -19, 21, -28)
  for side, sign in (('left', 1), ('right', -1))
)


def label(axis: Any, shown: Sequence[tuple[str, float, float]]) -> None:
  """Writes the names of points where they fit: inside the axes, and clear of earlier labels.

  Args:
    axis: the axes, whose layout is final.
    shown: name and place of each point.
  """
  taken: list[Any] = []
  for name, x, y in shown:
    text = axis.annotate(
      name,
      (x, y),
      (0, 0),
      textcoords='offset points',
      fontsize=7.5,
      parse_math=False,
    )
    text.set_in_layout(False)
    for side, right, up in _PLACES:
      text.set(ha=side, position=(right, up))
      box = text.get_window_extent()
      inside = all(axis.bbox.contains(*corner) for corner in (box.min, box.max))
      if inside and not any(box.overlaps(other) for other in taken):
        break
    else:
      side, right, up = _PLACES[0]
      text.set(ha=side, position=(right, up))
      box = text.get_window_extent()
    taken.append(box)
