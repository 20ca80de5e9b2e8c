"""Robust accuracy against a setting: lines with bands over the seeds, a panel for each setting."""

from __future__ import annotations

import textwrap
from collections.abc import Callable, Sequence
from typing import BinaryIO, NamedTuple

import numpy as np

from experiments.visual import plots

_COLORS = ('#71767d', '#d95f02', '#1b6ca8', '#2a8c3c', '#7b3fb5')


class Panel(NamedTuple):
  """The rows of one setting.

  Attributes:
    title: of the panel.
    axis: name of the setting.
    at: the value of the setting for each row.
    accuracies: for each row a function from a radius to the accuracies `[seeds]`.
    caption: the summary of the sanity checks.
    scale: of the horizontal axis, 'linear' or 'log'.
  """

  title: str
  axis: str
  at: Sequence[float]
  accuracies: Sequence[Callable[[float], np.ndarray]]
  caption: str
  scale: str = 'linear'


def save(file: BinaryIO, panels: Sequence[Panel], radii: Sequence[float]) -> None:
  """Writes a PNG with a panel for each setting, and in it a line for each radius.

  A line is the mean over the seeds, and the band around it reaches from the lowest to the highest.

  Args:
    file: to write to.
    panels: the panels.
    radii: radii of the attack.
  """
  figure = plots.new_figure(3.9 * len(panels), 4.0)
  axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
  for axis, panel in zip(axes, panels, strict=True):
    for radius, color in zip(radii, _COLORS, strict=False):
      found = [accuracies(radius) for accuracies in panel.accuracies]
      label = 'clean' if radius == 0.0 else f'radius {radius:g}'
      means = [float(each.mean()) for each in found]
      axis.plot(panel.at, means, marker='o', ms=3.5, color=color, label=label)
      lowest, highest = [each.min() for each in found], [each.max() for each in found]
      axis.fill_between(panel.at, lowest, highest, color=color, alpha=0.2, linewidth=0)
    axis.set(title=panel.title, xscale=panel.scale, ylim=(-0.02, 1.02))
    axis.set_xticks(panel.at, [f'{value:g}' for value in panel.at])
    axis.minorticks_off()
    axis.set_xlabel(f'{panel.axis}\n{textwrap.fill(panel.caption, 62)}', fontsize=8)
    axis.grid(alpha=0.3)
  axes[0].set_ylabel('accuracy, range over the seeds')
  axes[0].legend(frameon=False, fontsize='small')
  figure.savefig(file, dpi=150, format='png')
