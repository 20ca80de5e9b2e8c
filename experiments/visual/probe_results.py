"""A probe's result as JSON, as text and as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.cli import workdirs
from experiments.visual import image_grids, plots
from se_vae.evaluation import verdicts
from se_vae.evaluation.attack_log import AttackLog
from se_vae.evaluation.certificates import Certificate
from se_vae.evaluation.linear_probe import LinearProbe
from se_vae.evaluation.metrics import AdversarialAccuracy
from se_vae.evaluation.robustness import Evaluation
from se_vae.storage import atomic_files

# Patterns of the files that `write` writes to a directory.
PATTERNS = ('probe_*', 'robustness.json')

# Quantiles of the latent shift, over the examples.
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

# Examples on a page of images.
_PAGE = 12


def claim(task: str, outcome: Evaluation) -> dict[str, Any]:
  """The curve of a task, its sanity checks and what is certified, as JSON values."""
  return {
    'task': task,
    'num_examples': outcome.curve.correct.shape[1],
    **curve(outcome.curve),
    'checks': [check.to_json() for check in outcome.checks],
    **_certified(outcome.certificate),
  }


def _certified(certificate: Certificate | None) -> dict[str, Any]:
  if certificate is None:
    return {}
  return {'certified': {'method': str(certificate.method), **curve(certificate.curve)}}


def curve(accuracy: AdversarialAccuracy) -> dict[str, Any]:
  """Adversarial accuracy against radius with its 95 % intervals, as JSON values."""
  return {
    'radii': accuracy.radii.tolist(),
    'accuracy': accuracy.accuracy.tolist(),
    'interval': accuracy.interval().tolist(),
  }


def latent_shift(radii: Sequence[float], shift: np.ndarray) -> dict[str, Any]:
  """Mean and quantiles over the examples of latent shifts `[R, N]`, as JSON values."""
  quantiles = np.quantile(shift, _QUANTILES, axis=1)
  return {
    'radii': list(radii),
    'mean': shift.mean(axis=1).tolist(),
    'quantiles': dict(zip(map(str, _QUANTILES), quantiles.tolist(), strict=True)),
  }


def as_text(result: dict[str, Any], attacked: str = 'probe') -> str:
  """Lines of text: the curves, every sanity check, and the summary of the checks.

  Args:
    result: the JSON of a probe's or of a supervised classifier's result.
    attacked: what was attacked, for the header.
  """
  config, attack = result['config'], result['evaluation']['attack']
  task = plots.task_name(result['task'], config.get('labels_per_class'))
  lines = [
    f'{config.get("pretrained") or config["workdir"]}: {task} {attacked} on '
    f'{result["num_examples"]} test images',
    f'radius  adversarial accuracy [95 % interval], {attack}',
  ]
  for radius, accuracy, (low, high) in zip(
    result['radii'], result['accuracy'], result['interval'], strict=True
  ):
    lines.append(f'{radius:6.3f}  {accuracy:.3f} [{low:.3f}, {high:.3f}]')
  if 'certified' in result:
    values = ' '.join(f'{value:.3f}' for value in result['certified']['accuracy'])
    lines.append(f'certified ({result["certified"]["method"]}): {values}')
  if 'joint' in result:
    values = ' '.join(f'{value:.3f}' for value in result['joint']['accuracy'])
    lines.append(f'{" and ".join(result["joint"]["tasks"])} together (checks: not run): {values}')
  if 'moves' in result:
    values = ' '.join(f'{value:.3g}' for value in result['moves']['mean'])
    lines.append(f'mean latent shift, squared W2: {values}')
  for check in map(verdicts.SanityCheck.from_json, result.get('checks', ())):
    verdict = 'FAIL' if check.verdict == 'fail' else check.verdict
    lines.append(f'{verdict:7}  {check.number:2d} {check.name}: {check.figure}')
  return '\n'.join([*lines, plots.checks_summary(result)])


def write(
  stem: Path,
  result: dict[str, Any],
  outcome: Evaluation,
  probe: LinearProbe,
  images: np.ndarray,
  labels: np.ndarray,
  reconstruct: Callable[[np.ndarray], np.ndarray],
) -> None:
  """Writes all files of a result. The JSON file comes last: if it is there, all others are.

  Args:
    stem: path of the files without suffix.
    result: the result's JSON.
    outcome: the evaluation that it is of.
    probe: the linear probe.
    images: clean images `[N, H, W, C]` in [0, 1].
    labels: `[N]`.
    reconstruct: maps images to their reconstructions.
  """
  # Files of another attack may be here, and must not stand beside these if writing is cut off.
  for name in ('.json', '_images.png', '_moves.csv'):
    stem.with_name(f'{stem.name}{name}').unlink(missing_ok=True)
  drawn = {'': result} | ({'joint_': result['joint']} if 'joint' in result else {})
  columns: dict[str, Sequence[float]] = {'radius': result['radii']}
  for prefix, found in drawn.items():
    low, high = zip(*found['interval'], strict=True)
    columns |= {f'{prefix}accuracy': found['accuracy'], f'{prefix}low': low, f'{prefix}high': high}
  if 'certified' in result:
    low, high = zip(*result['certified']['interval'], strict=True)
    columns |= {'certified': result['certified']['accuracy']}
    columns |= {'certified_low': low, 'certified_high': high}
  _write_csv(stem.with_suffix('.csv'), columns)
  moves = result.get('moves')
  if moves:
    quantiles = {f'quantile_{level}': values for level, values in moves['quantiles'].items()}
    columns = {'radius': moves['radii'], 'mean_squared_w2': moves['mean'], **quantiles}
    _write_csv(stem.with_name(f'{stem.name}_moves.csv'), columns)

  log, accuracy = dict(vars(outcome.attack_log)), outcome.curve
  del log['next_row']  # no attempt is under way
  names = {'radius': 'broken_radius'}  # its name in files
  arrays = {names.get(name, name): array for name, array in log.items()}
  arrays |= {'radii': accuracy.radii, 'correct': accuracy.correct, 'labels': labels}
  if outcome.certificate is not None:
    arrays['certified_radius'] = outcome.certificate.radius
  arrays |= {'probe_weights': probe.weights, 'probe_bias': probe.bias}
  with atomic_files.replacing(stem.with_suffix('.npz')) as file:
    np.savez_compressed(file, **arrays)
  objective = result['pretraining']['objective']
  curves = [plots.Curve(objective, [found], name.strip('_')) for name, found in drawn.items()]
  with atomic_files.replacing(stem.with_suffix('.png')) as file:
    task = plots.task_name(result['task'], result['config'].get('labels_per_class'))
    plots.save(file, [(f'{task} probe', curves)], moves)
  chosen = _examples(outcome.attack_log)
  if len(chosen):
    rows = [images[chosen], outcome.attack_log.images[chosen]]
    page = np.stack([*rows, *map(reconstruct, rows)])
    image_grids.save(stem.with_name(f'{stem.name}_images.png'), page, image_grids.ROWS)
  path = stem.with_name('robustness.json')
  name = stem.name.removeprefix('probe_')
  workdirs.write_json(path, {**(workdirs.read_json(path, dict[str, Any]) or {}), name: result})
  workdirs.write_json(stem.with_suffix('.json'), result)


def _write_csv(path: Path, columns: Mapping[str, Sequence[float]]) -> None:
  workdirs.write_csv(path, [tuple(columns), *zip(*columns.values(), strict=True)])


def _examples(log: AttackLog) -> np.ndarray:
  """Up to `_PAGE` examples that only an attack misclassifies, evenly from small to large radii."""
  attacked = np.flatnonzero((log.radius > 0.0) & np.isfinite(log.radius))
  order = attacked[np.argsort(log.radius[attacked], kind='stable')]
  if not len(order):
    return order
  return order[np.unique(np.linspace(0, len(order) - 1, _PAGE).astype(int))]
