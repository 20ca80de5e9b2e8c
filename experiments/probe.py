r"""Fits a linear probe on a pretrained encoder's means, and attacks it at a list of radii.

  python -m experiments.probe --workdir=runs/se --task=digit

Reads the newest checkpoint of the run in --workdir and writes beside it `probe_TASK.json`
(accuracies, settings, versions), `.csv` and `.png` (the curve), and `.npz` (every example at every
radius).
"""

from __future__ import annotations

import csv
import dataclasses
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import plots, pretrain, runtime, settings
from experiments.settings import UsageError, setting
from se_vae import checkpoints, data, probing, robustness

TASKS = ('digit', 'color', 'label')


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a pretraining run.')
  data_dir: str | None = setting(None, "Directory of the data; the run's own if not given.")
  task: str = setting('digit', 'What the probe predicts.', choices=TASKS)
  radii: tuple[float, ...] = setting(
    (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3),
    'linf radii of the attack, for pixels in [0, 1].',
    at_least=0,
    at_most=1,
  )
  pgd_steps: int = setting(40, 'Gradient steps of the attack.', at_least=1)
  pgd_step_size: float | None = setting(
    None, 'Step size as a share of the radius; 2.5 / pgd_steps if not given.', above=0
  )
  restarts: int = setting(1, 'Random starts of the attack at each radius.', at_least=1)
  num_examples: int | None = setting(
    None, 'Test examples to attack, in canonical order; all if not given.', at_least=1
  )
  batch_size: int = setting(256, 'Examples attacked at a time; changes no result.', at_least=1)
  standardize: bool = setting(False, 'Standardise each latent before the fit, as in fit_probe.')
  l2: float = setting(1.0, 'Penalty of the probe, as in fit_probe.', above=0)
  seed: int = setting(0, 'Seed of the random starts.', at_least=0, at_most=2**31 - 1)


def main() -> None:
  """Entry point."""
  config = settings.from_flags(ProbeConfig)
  runtime.use_all_cores(config.batch_size)
  with runtime.StopSignal().listening() as stop:
    result = run(config, stop)
  print(f'{config.workdir}: {config.task} probe on {result["num_examples"]} test images')
  print('radius  adversarial accuracy [95 % interval]')
  for radius, accuracy, (low, high) in zip(
    result['radii'], result['accuracy'], result['interval'], strict=True
  ):
    print(f'{radius:6.3f}  {accuracy:.3f} [{low:.3f}, {high:.3f}]')


def run(
  config: ProbeConfig, stop: runtime.StopSignal, description: str = 'attack'
) -> dict[str, Any]:
  """Fits and attacks; returns the result's JSON.

  Raises:
    UsageError: for settings that are wrong, before anything is compiled or written.
    Interrupted: when `stop` says so; an attack is short, and starts again.
  """
  settings.check(config)
  workdir = runtime.check_workdir(config.workdir)
  try:
    model, params, metadata = checkpoints.load_run(workdir)
  except checkpoints.CheckpointError as error:
    raise UsageError(
      f'--workdir: holds no pretrained encoder, run experiments.pretrain there first: {error}'
    ) from None
  pretraining = settings.from_dict(pretrain.PretrainConfig, metadata['config'])
  # A run's directory may have moved since, and with it what it wrote.
  data_dir = config.data_dir or pretraining.data_dir
  pretraining = dataclasses.replace(pretraining, workdir=str(workdir), data_dir=data_dir)
  try:
    data.check(pretraining.dataset, data_dir)
    dataset = pretrain.load_dataset(pretraining)
  except data.DataError as error:
    raise UsageError(str(error)) from None
  _check_task(config, dataset, metadata)

  mesh = runtime.mesh_for(config.batch_size)
  labels = dataset.train.labels[config.task]
  train_means = probing.encoder_means(model, params, dataset.train.images, mesh=mesh)
  probe = probing.fit_probe(
    train_means,
    labels,
    dataset.num_classes[config.task],
    l2=config.l2,
    standardize=config.standardize,
  )

  count = config.num_examples or len(dataset.test.images)
  images = dataset.test.images[:count]
  test_labels = dataset.test.labels[config.task][:count]
  with runtime.progress_bar(count, description, unit='image') as progress:

    def advance(examples: int) -> None:
      progress.update(examples)
      stop.check()

    outcome = robustness.adversarial_accuracy(
      probing.ProbedEncoder(model),
      jax.random.key(config.seed),
      images.astype(np.float32) / 255.0,
      test_labels,
      radii=config.radii,
      num_steps=config.pgd_steps,
      restarts=config.restarts,
      relative_step_size=config.pgd_step_size,
      batch_size=config.batch_size,
      args=(params, probe),
      mesh=mesh,
      progress=advance,
    )
  result = {
    'task': config.task,
    'num_examples': count,
    'radii': list(config.radii),
    'accuracy': outcome.accuracy.tolist(),
    'interval': outcome.interval().tolist(),
    'train_accuracy': probing.accuracy(probe, train_means, labels),
    'config': settings.to_dict(config),
    'pretraining': metadata['config'],
    'step': metadata['step'],
    'data': {'source': dataset.source, 'digest': dataset.digest},
    'versions': runtime.versions(),
    'devices': runtime.devices(),
  }
  _write(workdir / f'probe_{config.task}', result, outcome, test_labels)
  return result


def _check_task(config: ProbeConfig, dataset: data.Dataset, metadata: dict[str, Any]) -> None:
  if config.task not in dataset.num_classes:
    raise UsageError(
      f'--task: {dataset.name} has no {config.task} labels; its tasks are '
      f'{", ".join(dataset.num_classes)}'
    )
  if dataset.digest != metadata['data']['digest']:
    raise UsageError('--data_dir: holds other data than the encoder was trained on')
  available = len(dataset.test.images)
  if config.num_examples is not None and config.num_examples > available:
    raise UsageError(
      f'--num_examples: must be at most the {available} test examples; got {config.num_examples}'
    )


def _write(
  stem: Path, result: dict[str, Any], outcome: robustness.AdversarialAccuracy, labels: np.ndarray
) -> None:
  rows = zip(result['radii'], result['accuracy'], result['interval'], strict=True)

  def write_csv(path: Path) -> None:
    with path.open('w', newline='') as file:
      writer = csv.writer(file)
      writer.writerow(('radius', 'accuracy', 'low', 'high'))
      writer.writerows((radius, accuracy, *interval) for radius, accuracy, interval in rows)

  runtime.write_atomically(stem.with_suffix('.csv'), write_csv)
  runtime.write_atomically(
    stem.with_suffix('.npz'),
    lambda path: np.savez(path, radii=outcome.radii, correct=outcome.correct, labels=labels),
  )
  curve = plots.Curve(result['pretraining']['objective'], [result])
  runtime.write_atomically(
    stem.with_suffix('.png'), lambda path: plots.save(path, [(f'{result["task"]} probe', [curve])])
  )
  runtime.write_json(stem.with_suffix('.json'), result)  # last: its presence says all is there


if __name__ == '__main__':
  settings.define_flags(ProbeConfig)
  runtime.run(main)
