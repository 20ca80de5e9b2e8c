"""A probe's result as text and as files: curves, sanity checks, attack log, adversarial images."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cli import workdirs
from experiments.visual import plots
from se_vae.evaluation import sanity_checks
from se_vae.evaluation.attack_log import AttackLog
from se_vae.evaluation.robustness import Evaluation
from se_vae.storage import atomic_files

# Patterns of the files that `write` writes to a directory.
PATTERNS = ('probe_*', 'robustness.json')

# Examples on a page of images.
_PAGE = 12


def as_text(result: dict[str, Any]) -> str:
  """Lines of text: the curves, every sanity check, and the summary of the checks."""
  config = result['config']
  lines = [
    f'{config["workdir"]}: {config["task"]} probe on {result["num_examples"]} test images',
    f'radius  adversarial accuracy [95 % interval], {config["attack"]}',
  ]
  for radius, accuracy, (low, high) in zip(
    result['radii'], result['accuracy'], result['interval'], strict=True
  ):
    lines.append(f'{radius:6.3f}  {accuracy:.3f} [{low:.3f}, {high:.3f}]')
  if 'joint' in result:
    values = ' '.join(f'{value:.3f}' for value in result['joint']['accuracy'])
    lines.append(f'{" and ".join(result["joint"]["tasks"])} together, without checks: {values}')
  if 'moves' in result:
    values = ' '.join(f'{value:.3g}' for value in result['moves']['mean'])
    lines.append(f'mean latent shift, squared W2: {values}')
  for check in map(sanity_checks.SanityCheck.from_json, result['checks']):
    verdict = 'FAIL' if check.verdict == 'fail' else check.verdict
    lines.append(f'{verdict:7}  {check.number:2d} {check.name}: {check.figure}')
  return '\n'.join([*lines, sanity_checks.summary(result['checks'])])


def write(
  stem: Path,
  result: dict[str, Any],
  outcome: Evaluation,
  images: np.ndarray,
  labels: np.ndarray,
  reconstruct: Callable[[np.ndarray], np.ndarray],
) -> None:
  """Writes all files of a result. The JSON file comes last: if it is there, all others are.

  Args:
    stem: path of the files without suffix.
    result: the result's JSON.
    outcome: the evaluation that it is of.
    images: clean images `[N, H, W, C]` in [0, 1].
    labels: `[N]`.
    reconstruct: maps images to their reconstructions.
  """
  curves = {'': result} | ({'joint_': result['joint']} if 'joint' in result else {})
  columns: dict[str, Sequence[float]] = {'radius': result['radii']}
  for prefix, found in curves.items():
    low, high = zip(*found['interval'], strict=True)
    columns |= {f'{prefix}accuracy': found['accuracy'], f'{prefix}low': low, f'{prefix}high': high}
  _write_csv(stem.with_suffix('.csv'), columns)
  moves = result.get('moves')
  if moves:
    quantiles = {f'quantile_{level}': values for level, values in moves['quantiles'].items()}
    columns = {'radius': moves['radii'], 'mean_squared_w2': moves['mean'], **quantiles}
    _write_csv(stem.with_name(f'{stem.name}_moves.csv'), columns)

  curve, log = outcome.curve, vars(outcome.attack_log)
  arrays = {('broken_' if name == 'radius' else '') + name: log[name] for name in log}
  with atomic_files.replacing(stem.with_suffix('.npz')) as file:
    np.savez_compressed(file, radii=curve.radii, correct=curve.correct, labels=labels, **arrays)
  objective = result['pretraining']['objective']
  drawn = [plots.Curve(objective, [found], name.strip('_')) for name, found in curves.items()]
  with atomic_files.replacing(stem.with_suffix('.png')) as file:
    plots.save(file, [(f'{result["task"]} probe', drawn)], moves=moves)
  chosen = _examples(outcome.attack_log)
  if len(chosen):
    rows = [images[chosen], outcome.attack_log.images[chosen]]
    with atomic_files.replacing(stem.with_name(f'{stem.name}_images.png')) as file:
      plots.save_images(file, [*rows, *map(reconstruct, rows)])
  path = stem.with_name('robustness.json')
  name = stem.name.removeprefix('probe_')
  workdirs.write_json(path, {**(workdirs.read_json(path) or {}), name: result})
  workdirs.write_json(stem.with_suffix('.json'), result)


def _write_csv(path: Path, columns: Mapping[str, Sequence[float]]) -> None:
  workdirs.write_csv(path, [tuple(columns), *zip(*columns.values(), strict=True)])


def _examples(log: AttackLog) -> np.ndarray:
  """Up to `_PAGE` examples that only an attack misclassifies, evenly from small to large radii."""
  attacked = np.flatnonzero((log.radius > 0.0) & np.isfinite(log.radius))
  order = attacked[np.argsort(log.radius[attacked], kind='stable')]
  return (
    order[np.unique(np.linspace(0, len(order) - 1, _PAGE).astype(int))] if len(order) else order
  )
