"""Plots of adversarial accuracy and of latent shifts against the radius of the attack."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import tempfile
import textwrap
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np

from se_vae.evaluation import verdicts

if TYPE_CHECKING:
  from matplotlib.axes import Axes
  from matplotlib.figure import Figure

_LABELS = {
  'vae': 'VAE',
  'se': 'SE',
  'avae': 'AVAE',
  'se_avae': 'SE-AVAE',
  'tc_vae': 'TC-VAE',
  'lipschitz': 'Lipschitz',
  'contrastive': 'contrastive',
  'clusters': 'clusters',
  'supervised': 'with labels',
}
_COLORS = {
  'vae': '#d95f02',
  'se': '#1b6ca8',
  'avae': '#2a8c3c',
  'se_avae': '#7b3fb5',
  'tc_vae': '#8c564b',
  'lipschitz': '#c2185b',
  'contrastive': '#71767d',
  'clusters': '#b8860b',
  'supervised': '#333333',
}
_STYLES = ('-', '--', ':', '-.')


@dataclasses.dataclass(frozen=True)
class Curve:
  """Adversarial accuracy of one objective, from one result a seed.

  Attributes:
    objective: one of `se_vae.config.OBJECTIVES`, or 'supervised'.
    results: what `experiments.probe` returned for each seed, at the same radii.
    variant: tells curves of one objective apart, such as a latent size; may be empty.
  """

  objective: str
  results: Sequence[dict[str, Any]]
  variant: str = ''

  @property
  def label(self) -> str:
    """The legend's text."""
    return f'{_LABELS[self.objective]} {self.variant}'.strip()

  @property
  def radii(self) -> np.ndarray:
    """Radii of the attack, `[R]`."""
    return np.array(self.results[0]['radii'])

  @property
  def accuracy(self) -> np.ndarray:
    """Adversarial accuracy, averaged over the seeds, `[R]`."""
    return np.mean([result['accuracy'] for result in self.results], axis=0)

  @property
  def interval(self) -> np.ndarray:
    """Lowest and highest end of the seeds' own 95 % intervals, `[R, 2]`: no seed lies outside."""
    intervals = np.array([result['interval'] for result in self.results])
    return np.stack([intervals[..., 0].min(axis=0), intervals[..., 1].max(axis=0)], axis=-1)

  @property
  def certified(self) -> np.ndarray | None:
    """Certified accuracy, averaged over the seeds, `[R]`; None unless every seed has it."""
    found = [result['certified']['accuracy'] for result in self.results if 'certified' in result]
    return np.mean(found, axis=0) if len(found) == len(self.results) else None

  @property
  def checks(self) -> str:
    """The summary of the sanity checks of all seeds."""
    return checks_summary(*self.results)


def task_name(task: str, labels_per_class: int | None) -> str:
  """A task, with the number of labels of each class where a classifier has not had all of them.

  Example:
    >>> task_name('digit', 10)
    'digit (10 labels a class)'
  """
  return task if labels_per_class is None else f'{task} ({labels_per_class} labels a class)'


def checks_summary(*results: dict[str, Any]) -> str:
  """The summary line of the sanity checks of these results, such as 'checks: not run'."""
  return verdicts.summary([check for result in results for check in result.get('checks', ())])


def new_figure(width: float, height: float) -> Figure:
  """Returns an empty figure of this size in inches.

  Matplotlib would write a list of the fonts it finds into the home directory. It goes into a
  temporary one, which the import alone needs, unless MPLCONFIGDIR names another.
  """
  with contextlib.ExitStack() as stack:
    if 'MPLCONFIGDIR' not in os.environ:
      os.environ['MPLCONFIGDIR'] = stack.enter_context(tempfile.TemporaryDirectory())
      stack.callback(os.environ.pop, 'MPLCONFIGDIR')
    from matplotlib.figure import Figure  # slow to import
  return Figure(figsize=(width, height), layout='constrained')


def save(
  file: BinaryIO,
  panels: Sequence[tuple[str, Sequence[Curve]]],
  latent_shifts: dict[str, Any] | None = None,
) -> None:
  """Draws panels side by side into a PNG file, each with the verdict of its curves' checks.

  Args:
    file: where to write.
    panels: title and curves of each panel.
    latent_shifts: the radii, means and quantiles that `experiments.probe` writes, for a last panel.
  """
  count = len(panels) + (latent_shifts is not None)
  captions = [
    '\n'.join(textwrap.fill(line, 68, subsequent_indent='  ') for line in caption(curves))
    for _, curves in panels
  ]
  height = 3.6 + 0.13 * max(text.count('\n') + 1 for text in captions)
  figure = new_figure(4.2 * count, height)
  axes = figure.subplots(1, count, squeeze=False)[0]
  for axis, (title, curves), text in zip(axes, panels, captions, strict=False):
    draw(axis, curves)
    axis.set(title=title, ylim=(-0.02, 1.02))
    axis.tick_params(labelleft=axis is axes[0])
    axis.annotate(
      text,
      (0.0, 0.0),
      xycoords='axes fraction',
      xytext=(0, -36),
      textcoords='offset points',
      va='top',
      fontsize=7.5,
      parse_math=False,
    )
  axes[0].set_ylabel('adversarial accuracy, 95 % interval')
  if latent_shifts is not None:
    _draw_latent_shifts(axes[-1], latent_shifts)
  for axis in axes:
    axis.set_xlabel('attack radius (l-inf, pixels in [0, 1])')
    axis.locator_params(axis='x', nbins=7)  # or the numbers touch
    axis.grid(alpha=0.3)
    certified = any('certified' in text for text in axis.get_legend_handles_labels()[1])
    # Curves fall, so the band leaves the upper right corner free.
    look = {'loc': 'upper right', 'fontsize': 'small'} if certified else {'loc': 'best'}
    axis.legend(frameon=certified, **look)
  figure.savefig(file, dpi=150, format='png')


def draw(axis: Axes, curves: Sequence[Curve]) -> None:
  """Draws curves with their intervals, and certified ones with what is between the two shaded."""
  variants = list(dict.fromkeys(curve.variant for curve in curves))
  for curve in curves:
    color, style = _look(curve.objective, variants.index(curve.variant), len(variants))
    dots: dict[str, Any] = {'ms': 3.5, 'color': color}
    radii, order = np.unique(curve.radii, return_index=True)  # they may have any order
    accuracy, interval = curve.accuracy[order], curve.interval[order]
    axis.plot(radii, accuracy, style, marker='o', label=curve.label, **dots)
    axis.fill_between(radii, *interval.T, color=color, alpha=0.2, linewidth=0)
    if curve.certified is not None:
      certified = curve.certified[order]
      label = f'{curve.label}, certified'
      axis.plot(radii, certified, ':', marker='^', label=label, **dots)
      label = f'{curve.label}: the true accuracy is in this band'
      band: dict[str, Any] = {'color': color, 'alpha': 0.13, 'hatch': '///', 'linewidth': 0}
      axis.fill_between(radii, certified, accuracy, label=label, **band)


def caption(curves: Sequence[Curve]) -> list[str]:
  """The checks' verdict of every curve, or one line where all curves have the same."""
  if len({curve.checks for curve in curves}) == 1:
    return [curves[0].checks]
  return [f'{curve.label}, {curve.checks}' for curve in curves]


def _look(objective: str, number: int, count: int) -> tuple[Any, str]:
  """Colour and line of a variant: colours tell objectives apart, or variants if they are many."""
  if count <= len(_STYLES):
    return _COLORS[objective], _STYLES[number]
  from matplotlib import colormaps

  return colormaps['viridis'](number / (count - 1) * 0.9), _STYLES[objective == 'vae']


def _draw_latent_shifts(axis: Any, shifts: dict[str, Any]) -> None:
  radii, levels = shifts['radii'], list(shifts['quantiles'])
  lowest, highest = (shifts['quantiles'][level] for level in (levels[0], levels[-1]))
  band = f'{float(levels[0]):.0%} to {float(levels[-1]):.0%} of the images'.replace('%', ' %')
  axis.plot(radii, shifts['mean'], marker='o', ms=3.5, color='k', label='mean')
  axis.fill_between(radii, lowest, highest, color='k', alpha=0.15, linewidth=0, label=band)
  axis.set(title='latent shift under attack', ylabel='squared W2')
