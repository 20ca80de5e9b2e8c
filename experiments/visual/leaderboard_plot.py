"""Robust accuracy against clean accuracy, an encoder a point, with the certified one beside it.

Points have short marks, because names are long and points lie close together. The names stand
below.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import BinaryIO, NamedTuple

from experiments.visual import pareto, plots

_UNSUPERVISED, _SUPERVISED = '#1b6ca8', '#71767d'


class Point(NamedTuple):
  """An encoder at one radius: means over its seeds.

  Attributes:
    mark: stands beside the point, such as its place.
    name: stands below the panels, behind the mark.
    clean: accuracy without an attack.
    robust: adversarial accuracy.
    certified: certified accuracy, or None.
    labels: whether labels were used in training.
  """

  mark: str
  name: str
  clean: float
  robust: float
  certified: float | None
  labels: bool


def save(file: BinaryIO, panels: Sequence[tuple[str, Sequence[Point]]]) -> None:
  """Writes a PNG with a panel for each radius.

  Args:
    file: to write to.
    panels: the title of each panel, and its points, which are the same encoders in all panels.
  """
  names = [f'{point.mark}  {point.name}' for point in panels[0][1]]
  figure = plots.new_figure(6.4 * len(panels), 5.0 + 0.17 * len(names))
  axes = figure.subplots(1, len(panels), squeeze=False)[0]
  for axis, (title, points) in zip(axes, panels, strict=True):
    for labels, color, name in (
      (False, _UNSUPERVISED, 'no labels in training'),
      (True, _SUPERVISED, 'trained with labels'),
    ):
      own = [point for point in points if point.labels == labels]
      if own:
        axis.plot([p.clean for p in own], [p.robust for p in own], 'o', color=color, label=name)
    certified = [(p.clean, p.certified, p.robust) for p in points if p.certified is not None]
    for clean, lower, upper in certified:
      axis.plot([clean, clean], [lower, upper], ':', color='k', lw=0.8)
    if certified:
      lower_ends = [lower for _, lower, _ in certified]
      clean_ends = [clean for clean, _, _ in certified]
      axis.plot(clean_ends, lower_ends, '^', color='k', ms=5, label='certified')
    axis.set(title=title, xlabel='clean accuracy', ylabel='accuracy, worst case')
    axis.margins(0.1)  # for the marks
    axis.grid(alpha=0.3)
    if points:
      axis.legend(frameon=True, fontsize='small', loc='best')
  figure.supxlabel('\n'.join(names), x=0.05, ha='left', fontsize=8.5, parse_math=False)
  figure.draw_without_rendering()  # the layout is final now, and labels can be placed in it
  for axis, (_, points) in zip(axes, panels, strict=True):
    pareto.label(axis, [(point.mark, point.clean, point.robust) for point in points])
  figure.savefig(file, dpi=150, format='png')
