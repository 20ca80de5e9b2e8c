"""Curves of adversarial accuracy against radius, and pages of images."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, BinaryIO

import numpy as np

_LABELS = {'vae': 'VAE', 'se': 'SE'}
_COLORS = {'vae': '#d95f02', 'se': '#1b6ca8'}
_STYLES = ('-', '--', ':', '-.')


@dataclasses.dataclass(frozen=True)
class Curve:
  """Results of one objective, one for each seed.

  Attributes:
    objective: 'vae' or 'se'.
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
    """`[R]`."""
    return np.array(self.results[0]['radii'])

  @property
  def accuracy(self) -> np.ndarray:
    """Mean over the seeds, `[R]`."""
    return np.mean([result['accuracy'] for result in self.results], axis=0)

  @property
  def interval(self) -> np.ndarray:
    """Lowest and highest end of the seeds' own 95 % intervals, `[R, 2]`: no seed lies outside."""
    intervals = np.array([result['interval'] for result in self.results])
    return np.stack([intervals[..., 0].min(axis=0), intervals[..., 1].max(axis=0)], axis=-1)


def save(
  file: BinaryIO,
  panels: Sequence[tuple[str, Sequence[Curve]]],
  moves: dict[str, Any] | None = None,
) -> None:
  """Draws panels (title, curves) side by side into a PNG file; the moves of the encoding last."""
  from matplotlib.backends.backend_agg import FigureCanvasAgg  # slow to import
  from matplotlib.figure import Figure

  count = len(panels) + (moves is not None)
  figure = Figure(figsize=(4.2 * count, 3.6), layout='constrained')
  FigureCanvasAgg(figure)
  axes = figure.subplots(1, count, squeeze=False)[0]
  for axis, (title, curves) in zip(axes, panels, strict=False):
    variants = sorted({curve.variant for curve in curves}, key=lambda name: (len(name), name))
    for curve in curves:
      color, style = _look(curve.objective, variants.index(curve.variant), len(variants))
      axis.plot(
        curve.radii, curve.accuracy, style, marker='o', ms=3.5, color=color, label=curve.label
      )
      axis.fill_between(curve.radii, *curve.interval.T, color=color, alpha=0.2, linewidth=0)
    axis.set(title=title, ylim=(-0.02, 1.02))
    axis.tick_params(labelleft=axis is axes[0])
  axes[0].set_ylabel('adversarial accuracy')
  if moves is not None:
    _draw_moves(axes[-1], moves)
  for axis in axes:
    axis.set_xlabel('attack radius (l-inf, pixels in [0, 1])')
    axis.grid(alpha=0.3)
    axis.legend(frameon=False)
  figure.savefig(file, dpi=150, format='png')


def _look(objective: str, number: int, count: int) -> tuple[Any, str]:
  """Colour and line of a variant: colours tell objectives apart, or variants if they are many."""
  if count <= len(_STYLES):
    return _COLORS[objective], _STYLES[number]
  from matplotlib import colormaps

  return colormaps['viridis'](number / (count - 1) * 0.9), _STYLES[objective == 'vae']


def _draw_moves(axis: Any, moves: dict[str, Any]) -> None:
  radii, levels = moves['radii'], list(moves['quantiles'])
  lowest, highest = (moves['quantiles'][level] for level in (levels[0], levels[-1]))
  band = f'{levels[0]} to {levels[-1]} of the images'
  axis.plot(radii, moves['mean'], marker='o', ms=3.5, color='k', label='mean')
  axis.fill_between(radii, lowest, highest, color='k', alpha=0.15, linewidth=0, label=band)
  axis.set(title='largest move of the encoding', ylabel='squared W2')


def save_images(file: BinaryIO, rows: Sequence[np.ndarray], scale: int = 2) -> None:
  """Rows of images `[N, H, W, C]` in [0, 1] as one PNG file, each pixel `scale` wide."""
  from PIL import Image

  grid = np.concatenate([np.concatenate(list(row), axis=1) for row in rows], axis=0)
  pixels = np.round(np.clip(grid, 0.0, 1.0) * 255.0).astype(np.uint8)
  pixels = pixels.repeat(scale, axis=0).repeat(scale, axis=1)
  if pixels.shape[-1] not in (1, 3):
    raise ValueError(f'images must have 1 or 3 channels, got {pixels.shape[-1]}')
  Image.fromarray(pixels[..., 0] if pixels.shape[-1] == 1 else pixels).save(file, 'PNG')
