r"""Our attacks beside Foolbox's and AutoAttack, on one MLP encoder and its probe.

  python -m experiments.benchmarks.attack_comparison --workdir=runs/se --num_examples=1000
  python -m experiments.benchmarks.attack_comparison --workdir=runs/se --num_examples=10000 \
    --noworst_case --repeats=3   # how fast the two PGDs are

Needs `pip install torch foolbox` and `pip install --no-deps torchattacks`, which nothing else here
does. Writes `attacks_TASK.json` into the work directory, and prints one line for each radius:
accuracy under Foolbox's PGD, an ensemble of its attacks, AutoAttack (torchattacks' `standard`, with
all its own settings), our PGD (each radius apart, as Foolbox does), and our `standard` and
`worst_case`. An adversarial image counts if it is inside the ball and the pixel range.

The two PGDs, and `standard`, which does not attack a misclassified example again, run on one batch
first. Those seconds, compilation included, are stated apart. Then they take turns, and the fastest
turn of each is stated.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from experiments import probe, probe_settings
from experiments.benchmarks import torch_classifier
from experiments.cli import app, devices, flags, messages, signals, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import SUITES, setting, validate
from se_vae.evaluation import linear_probe, robustness

# Images and labels in, `[R, N]` out: who is classified correctly under attack at each radius.
Contender = Callable[[np.ndarray, np.ndarray], np.ndarray]

_PACKAGES = ('torch', 'foolbox', 'torchattacks')
_TIMED = ('foolbox PGD', 'our PGD', 'our standard')


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a pretraining run of an MLP.')
  data_dir: str | None = setting(None, "Directory of the data; the run's own if not given.")
  task: str = setting('digit', 'What the probe predicts.', choices=probe_settings.TASKS)
  radii: tuple[float, ...] = setting(probe_settings.RADII, 'linf radii.', at_least=0, at_most=1)
  pgd_steps: int = setting(
    40, "Gradient steps of ours and of Foolbox's.", at_least=1, at_most=probe_settings.MOST_STEPS
  )
  restarts: int = setting(
    1, 'Random starts of our untargeted attacks.', at_least=1, at_most=probe_settings.MOST_RESTARTS
  )
  num_examples: int = setting(1000, 'Test images, a fair sample of all.', at_least=1)
  batch_size: int = setting(250, 'Images at a time, on both sides.', at_least=1)
  worst_case: bool = setting(True, 'Run the ensembles too, and not the PGDs alone.')
  repeats: int = setting(1, 'Runs of every attack, for its time.', at_least=1)
  seed: int = setting(0, 'Seed of all random starts.', at_least=0, at_most=2**31 - 1)


def main() -> None:
  """Entry point."""
  config = flags.from_flags(ComparisonConfig)
  devices.use_all_cores(config.batch_size)
  exact = jax.default_matmul_precision(probe.PRECISION)
  with signals.StopSignal(saves=False).listening() as stop, exact:
    result = run(config, stop)
  print(f'{"radius":>8}' + ''.join(f'{name:>20}' for name in result['accuracy']))
  for i, radius in enumerate(config.radii):
    print(f'{radius:8.3f}' + ''.join(f'{row[i]:20.4f}' for row in result['accuracy'].values()))
  for name, seconds in result['seconds'].items():
    first = result['first_batch'].get(name)
    print(f'{name}: {min(seconds):.1f} s' + (f', first batch {first:.1f} s' if first else ''))


def run(config: ComparisonConfig, stop: signals.StopSignal) -> dict[str, Any]:
  """Compares; returns the result's JSON.

  Raises:
    ArgumentError: for wrong settings, a model that is no MLP, or where a package is missing.
    Interrupted: when `stop` says so; nothing is kept.
  """
  validate(config)
  try:
    torch, foolbox, torchattacks = (importlib.import_module(name) for name in _PACKAGES)
  except ImportError as error:
    raise UsageError(f'this comparison needs pip install {" ".join(_PACKAGES)}: {error}') from None
  names = {field.name for field in dataclasses.fields(probe_settings.ProbeConfig)}
  shared = {name: value for name, value in vars(config).items() if name in names}
  probing_config = probe_settings.ProbeConfig(**shared)
  prepared = probe.prepare(probing_config)
  means = probe.train_means(prepared, prepared.model, prepared.params)
  fitted = probe.fit(probing_config, prepared, means)
  network = torch_classifier.build(torch, prepared.model, prepared.params, fitted)
  torch_classifier.check_same(
    torch, network, prepared.model, prepared.params, fitted, prepared.images[:100]
  )

  theirs = _theirs(config, torch, foolbox, torchattacks, network, stop)
  ours = _ours(config, prepared, fitted, stop)
  x, labels, some = prepared.images, prepared.labels, slice(config.batch_size)
  timed = {name: (theirs | ours)[name] for name in _TIMED}
  first_batch = {name: _run(attack, x[some], labels[some])[1] for name, attack in timed.items()}
  correct: dict[str, np.ndarray] = {}
  turns: dict[str, list[float]] = {name: [] for name in timed}
  with messages.progress_bar(config.repeats * len(timed), 'timed attacks', unit='run') as progress:
    for _ in range(config.repeats):
      for name, attack in timed.items():
        correct[name], seconds = _run(attack, x, labels)
        turns[name].append(seconds)
        progress.update()
  if config.worst_case:
    others = {name: attack for name, attack in (theirs | ours).items() if name not in timed}
    with messages.progress_bar(len(others), 'ensembles', unit='run') as progress:
      for name, attack in others.items():
        correct[name], seconds = _run(attack, x, labels)
        turns[name] = [seconds]
        progress.update()
  versions = {module.__name__: module.__version__ for module in (torch, foolbox, torchattacks)}
  result = {
    'radii': list(config.radii),
    'num_examples': len(x),
    'accuracy': {name: rows.mean(axis=1).tolist() for name, rows in correct.items()},
    'missed': _missed(correct) if config.worst_case else {},
    'first_batch': first_batch,
    'seconds': turns,
    'config': flags.to_dict(config),
    'versions': devices.versions() | versions,
    'devices': devices.device_kinds(),
    'torch_threads': torch.get_num_threads(),
  }
  workdirs.write_json(prepared.output / f'attacks_{config.task}.json', result)
  return result


def _run(attack: Contender, x: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, float]:
  """Returns who is classified correctly, `[R, N]`, and the seconds that it took."""
  started = time.monotonic()
  return attack(x, labels), time.monotonic() - started


def _missed(correct: dict[str, np.ndarray]) -> dict[str, list[list[int]]]:
  """Returns, for each attack and radius, the examples that only our worst case misses."""
  ours = correct['our worst_case']
  return {
    name: [np.flatnonzero(mine & ~theirs).tolist() for mine, theirs in zip(ours, rows, strict=True)]
    for name, rows in correct.items()
    if not name.startswith('our')
  }


def _ours(
  config: ComparisonConfig,
  prepared: probe.Prepared,
  fitted: linear_probe.LinearProbe,
  stop: signals.StopSignal,
) -> dict[str, Contender]:
  classifier = linear_probe.ProbedEncoder(prepared.model)
  options: dict[str, Any] = {
    'radii': config.radii,
    'num_steps': config.pgd_steps,
    'restarts': config.restarts,
    'seed': config.seed,
    'batch_size': config.batch_size,
    'args': (prepared.params, fitted),
    'mesh': prepared.mesh,
    'progress': lambda *_: stop.check(),
  }

  def pgd(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return robustness.adversarial_accuracy(classifier, x, labels, **options).correct

  def evaluate(attack: str, x: np.ndarray, labels: np.ndarray) -> np.ndarray:
    return robustness.evaluate(
      classifier,
      x,
      labels,
      attack=attack,
      latents_fn=linear_probe.GaussianLatents(prepared.model),
      check_examples=0,
      **options,
    ).curve.correct

  suites = {f'our {name}': functools.partial(evaluate, name) for name in SUITES}
  return {'our PGD': pgd, **suites}


def _theirs(
  config: ComparisonConfig,
  torch: Any,
  foolbox: Any,
  torchattacks: Any,
  network: Any,
  stop: signals.StopSignal,
) -> dict[str, Contender]:
  """Returns the attacks of other libraries, each of which attacks every radius apart."""
  model = foolbox.PyTorchModel(network, bounds=(0, 1))
  steps = {'rel_stepsize': 2.5 / config.pgd_steps, 'steps': config.pgd_steps}
  pgd = foolbox.attacks.LinfPGD(**steps)
  ensemble = [
    pgd,
    foolbox.attacks.LinfBasicIterativeAttack(**steps),
    foolbox.attacks.LinfFastGradientAttack(random_start=True),
    foolbox.attacks.LinfDeepFoolAttack(steps=config.pgd_steps),
    foolbox.attacks.LinfAdditiveUniformNoiseAttack(),
  ]

  def by_foolbox(attack: Any, x: Any, target: Any) -> Sequence[Any]:
    images: Sequence[Any] = attack(model, x, target, epsilons=list(config.radii))[1]
    return images

  def by_autoattack(x: Any, target: Any) -> Sequence[Any]:
    classes = network(x[:1]).shape[1]
    return [
      torchattacks.AutoAttack(network, eps=radius, n_classes=classes, seed=config.seed)(x, target)
      if radius
      else x
      for radius in config.radii
    ]

  def contender(attacks: Sequence[Callable[[Any, Any], Sequence[Any]]]) -> Contender:
    def attack_all(x: np.ndarray, labels: np.ndarray) -> np.ndarray:
      torch.manual_seed(config.seed)
      correct = np.ones((len(config.radii), len(x)), bool)
      for start in range(0, len(x), config.batch_size):
        some = slice(start, start + config.batch_size)
        batch = torch.from_numpy(np.moveaxis(x[some], -1, 1).copy())
        target = torch.from_numpy(labels[some].astype(np.int64))
        for attack in attacks:
          for i, images in enumerate(attack(batch, target)):
            correct[i, some] &= ~torch_classifier.misclassified(
              torch, network, config.radii[i], batch, target, images
            )
          stop.check()
      return correct

    return attack_all

  return {
    'foolbox PGD': contender([functools.partial(by_foolbox, pgd)]),
    'foolbox ensemble': contender([functools.partial(by_foolbox, attack) for attack in ensemble]),
    'AutoAttack': contender([by_autoattack]),
  }


if __name__ == '__main__':
  flags.define_flags(ComparisonConfig)
  app.run(main)
