r"""Our attacks beside Foolbox's, on one MLP encoder and its probe: who breaks more, how fast.

  python -m experiments.foolbox_comparison --workdir=runs/se --num_examples=1000

Needs `pip install torch foolbox`, which nothing else here does. Writes `foolbox_TASK.json` into
the work directory, and prints one line for each radius: accuracy under Foolbox's PGD, under an
ensemble of its attacks, under our PGD (each radius attacked apart, as Foolbox does), and under
`standard` and `worst_case`. Seconds include compilation, and ours all checks.
"""

from __future__ import annotations

import dataclasses
import importlib
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments import probe, runtime, settings
from experiments.settings import UsageError, setting
from se_vae import probing, robustness, suite, vae


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a pretraining run of an MLP.')
  data_dir: str | None = setting(None, "Directory of the data; the run's own if not given.")
  task: str = setting('digit', 'What the probe predicts.', choices=probe.TASKS)
  radii: tuple[float, ...] = setting(
    (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3), 'linf radii.', at_least=0, at_most=1
  )
  pgd_steps: int = setting(40, 'Gradient steps of every attack.', at_least=1)
  restarts: int = setting(1, 'Random starts of our untargeted attacks.', at_least=1)
  num_examples: int = setting(1000, 'Test images, in canonical order.', at_least=1)
  batch_size: int = setting(250, 'Images at a time, on both sides.', at_least=1)
  worst_case: bool = setting(True, 'Run the ensembles too, and not the two PGDs alone.')
  seed: int = setting(0, 'Seed of all random starts.', at_least=0, at_most=2**31 - 1)


def main() -> None:
  """Entry point."""
  config = settings.from_flags(ComparisonConfig)
  runtime.use_all_cores(config.batch_size)
  result = run(config)
  print(f'{"radius":>8}' + ''.join(f'{name:>20}' for name in result['accuracy']))
  for i, radius in enumerate(config.radii):
    print(f'{radius:8.3f}' + ''.join(f'{row[i]:20.4f}' for row in result['accuracy'].values()))
  print(f'{"seconds":>8}' + ''.join(f'{value:20.1f}' for value in result['seconds'].values()))


def run(config: ComparisonConfig) -> dict[str, Any]:
  """Compares; returns the result's JSON.

  Raises:
    UsageError: for settings that are wrong, a model that is no MLP, or where Foolbox is missing.
  """
  settings.check(config)
  try:
    foolbox, torch = (importlib.import_module(name) for name in ('foolbox', 'torch'))
  except ImportError as error:
    raise UsageError(f'this comparison needs pip install torch foolbox: {error}') from None
  names = {field.name for field in dataclasses.fields(probe.ProbeConfig)}
  shared = {name: value for name, value in vars(config).items() if name in names}
  probing_config = probe.ProbeConfig(**shared)
  problem = probe.prepare(probing_config)
  fitted, _ = probe.fit(probing_config, problem)
  x, labels = problem.images, problem.labels
  network = _torch_network(torch, problem.model, problem.params, fitted)
  _check_same(torch, network, problem, fitted)

  accuracy: dict[str, list[float]] = {}
  seconds: dict[str, float] = {}
  torch.manual_seed(config.seed)
  model = foolbox.PyTorchModel(network, bounds=(0, 1))
  step = 2.5 / config.pgd_steps
  attacks = foolbox.attacks
  pgd = attacks.LinfPGD(rel_stepsize=step, steps=config.pgd_steps)
  ensembles = {'foolbox PGD': [pgd]}
  if config.worst_case:
    ensembles['foolbox ensemble'] = [
      pgd,
      attacks.LinfBasicIterativeAttack(rel_stepsize=step, steps=config.pgd_steps),
      attacks.LinfFastGradientAttack(random_start=True),
      attacks.LinfDeepFoolAttack(steps=config.pgd_steps),
      attacks.LinfAdditiveUniformNoiseAttack(),
    ]
  for name, ensemble in ensembles.items():
    started = time.monotonic()
    correct = np.ones((len(config.radii), len(x)), bool)
    for start in range(0, len(x), config.batch_size):
      some = slice(start, start + config.batch_size)
      batch = torch.from_numpy(np.moveaxis(x[some], -1, 1).copy())
      target = torch.from_numpy(labels[some].astype(np.int64))
      for attack in ensemble:
        broken = attack(model, batch, target, epsilons=list(config.radii))[2]
        correct[:, some] &= ~broken.numpy()
    seconds[name] = time.monotonic() - started
    accuracy[name] = correct.mean(axis=1).tolist()

  options: dict[str, Any] = {
    'radii': config.radii,
    'num_steps': config.pgd_steps,
    'batch_size': config.batch_size,
    'args': (problem.params, fitted),
    'mesh': problem.mesh,
  }
  classifier = probing.ProbedEncoder(problem.model)
  started = time.monotonic()
  key = jax.random.key(config.seed)
  curve = robustness.adversarial_accuracy(classifier, key, x, labels, **options)
  seconds['our PGD'] = time.monotonic() - started
  accuracy['our PGD'] = curve.accuracy.tolist()
  for attack in suite.SUITES if config.worst_case else suite.SUITES[:1]:
    started = time.monotonic()
    outcome = robustness.evaluate(
      classifier,
      x,
      labels,
      attack=attack,
      restarts=config.restarts,
      seed=config.seed,
      latents_fn=probing.GaussianLatents(problem.model),
      **options,
    )
    seconds[f'our {attack}'] = time.monotonic() - started
    accuracy[f'our {attack}'] = outcome.curve.accuracy.tolist()
  result = {
    'radii': list(config.radii),
    'num_examples': len(x),
    'accuracy': accuracy,
    'seconds': seconds,
    'config': settings.to_dict(config),
    'versions': runtime.versions() | {'torch': torch.__version__, 'foolbox': foolbox.__version__},
  }
  runtime.write_json(problem.workdir / f'foolbox_{config.task}.json', result)
  return result


def _torch_network(
  torch: Any, model: vae.VAE, params: vae.Params, fitted: probing.LinearProbe
) -> Any:
  """The encoder's mean and the probe in PyTorch, from NHWC weights."""
  dense = params['encoder']['params']
  names = [name for name in dense if name.startswith('Dense')]
  if len(names) + 1 != len(dense):
    raise UsageError('--workdir: this comparison rebuilds MLP encoders only')
  head = next(dense[name] for name in dense if name not in names)['Dense_0']
  weights = [
    (dense[f'Dense_{i}']['kernel'], dense[f'Dense_{i}']['bias']) for i in range(len(names))
  ]
  mean = slice(0, model.latent_dim)
  weights += [(head['kernel'][:, mean], head['bias'][mean]), (fitted.weights, fitted.bias)]
  layers: list[Any] = [_channels_last(torch), torch.nn.Flatten()]
  for number, (kernel, bias) in enumerate(weights):
    layer = torch.nn.Linear(*kernel.shape)
    layer.weight.data = torch.from_numpy(np.array(kernel).T.copy())
    layer.bias.data = torch.from_numpy(np.array(bias))
    layers += [layer, torch.nn.ReLU()] if number < len(names) else [layer]
  return torch.nn.Sequential(*layers).eval()


def _channels_last(torch: Any) -> Any:
  class ChannelsLast(torch.nn.Module):
    def forward(self, x: Any) -> Any:
      return x.permute(0, 2, 3, 1)

  return ChannelsLast()


def _check_same(
  torch: Any, network: Any, problem: probe.Prepared, fitted: probing.LinearProbe
) -> None:
  """Both sides must attack one function."""
  x = problem.images[:100]
  with torch.no_grad():
    theirs = network(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
  ours = np.asarray(probing.ProbedEncoder(problem.model)(jnp.asarray(x), problem.params, fitted))
  np.testing.assert_allclose(theirs, ours, atol=1e-3)


if __name__ == '__main__':
  settings.define_flags(ComparisonConfig)
  runtime.run(main)
