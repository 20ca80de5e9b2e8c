"""Our worst case beside AutoAttack (torchattacks) with the same steps and queries, in turns.

Both attack one classifier at one radius: the pretrained encoder `ENCODER` with a linear probe that
is fitted to the embedded digits. AutoAttack's four attacks are APGD on the cross-entropy, targeted
APGD, targeted FAB and Square. Ours are those of `evaluation.attack_suite.worst_case`, which has PGD
and APGD on three losses and attacks on the latents beside targeted APGD and Square, and no FAB.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from concurrent.futures import Executor
from typing import Any, NamedTuple

import jax
import numpy as np

import se_vae
from experiments.benchmarks import torch_classifier, torch_twin
from experiments.benchmarks.workloads import Stopwatch, Timing
from experiments.cli import devices
from experiments.probe import PRECISION
from se_vae import data
from se_vae.config import ArgumentError
from se_vae.data.transforms import pixels
from se_vae.evaluation import linear_probe, robustness
from se_vae.models.vae import VAE, Params

ENCODER = 'mnist_mlp_se_smoothed_latent128'
BATCH_SIZE = 250
_SEED = 0


@dataclasses.dataclass(frozen=True)
class Budget:
  """What both sides spend.

  Attributes:
    num_examples: images that are attacked.
    radius: of the linf ball.
    num_steps: gradient steps of each attack, at each of its targets.
    num_queries: forward passes of Square.
  """

  num_examples: int
  radius: float
  num_steps: int
  num_queries: int


class Found(NamedTuple):
  """What an attack found.

  Attributes:
    accuracy: share of the images that are classified correctly after all attacks.
    passes: forward passes through the network, with or without a gradient, as a mean over the
      images.
    timing: what it took.
  """

  accuracy: float
  passes: float
  timing: Timing


Attack = Callable[[Budget], Found]


def check() -> None:
  """Raises ArgumentError unless torchattacks is installed."""
  torch_twin.load(devices.num_cores(), 'sections')
  try:
    importlib.import_module('torchattacks')
  except ImportError as error:
    message = f'worst_case needs `pip install --no-deps torchattacks`: {error}'
    raise ArgumentError('sections', message) from None


def attacks(torch_process: Executor) -> dict[str, Attack]:
  """Returns both sides by name; AutoAttack runs in the process for PyTorch."""

  def theirs(budget: Budget) -> Found:
    return torch_process.submit(_autoattack, budget, devices.num_cores()).result()

  return {'our worst_case': _ours, 'AutoAttack': theirs}


def compare(
  budget: Budget, repeats: int, torch_process: Executor, after_each: Callable[[], Any]
) -> dict[str, dict[str, Any]]:
  """Returns what both sides found, and in how many seconds, turn by turn, as JSON values.

  Args:
    budget: of both sides.
    repeats: turns.
    torch_process: where AutoAttack runs.
    after_each: called after each attack; may raise to stop.
  """
  some = dataclasses.replace(budget, num_examples=min(budget.num_examples, BATCH_SIZE))
  sides = attacks(torch_process)
  results: dict[str, dict[str, Any]] = {}
  for name, attack in sides.items():  # compiles what there is to compile
    results[name] = {'first_batch': attack(some).timing.seconds, 'seconds': [], 'cpu_seconds': []}
    after_each()
  for _ in range(repeats):
    for name, attack in sides.items():
      found = attack(budget)
      results[name]['seconds'].append(found.timing.seconds)
      results[name]['cpu_seconds'].append(found.timing.cpu_seconds)
      results[name] |= {'accuracy': found.accuracy, 'passes': found.passes}
      after_each()
  return results


class Target(NamedTuple):
  """The classifier, and the images `[N, H, W, C]` and labels `[N]` to attack."""

  model: VAE
  params: Params
  probe: linear_probe.LinearProbe
  x: np.ndarray
  labels: np.ndarray


@functools.lru_cache
def target() -> Target:
  """Returns the classifier that both sides attack, with all embedded test digits."""
  dataset = data.load('mnist_5k')
  model, params = se_vae.load_pretrained(ENCODER)
  means = linear_probe.encoder_means(model, params, dataset.train.images)
  probe = linear_probe.fit_probe(means, dataset.train.labels['digit'], num_classes=10)
  x = np.asarray(pixels(dataset.test.images))
  return Target(model, params, probe, x, dataset.test.labels['digit'])


def _ours(budget: Budget) -> Found:
  model, params, probe, x, labels = target()
  stopwatch = Stopwatch()
  with jax.default_matmul_precision(PRECISION):
    found = robustness.evaluate(
      linear_probe.ProbedEncoder(model),
      x[: budget.num_examples],
      labels[: budget.num_examples],
      radii=(budget.radius,),
      attack='worst_case',
      num_steps=budget.num_steps,
      num_queries=budget.num_queries,
      seed=_SEED,
      batch_size=BATCH_SIZE,
      args=(params, probe),
      latents_fn=linear_probe.GaussianLatents(model),
      check_examples=0,
      mesh=devices.mesh_for(BATCH_SIZE),
    )
  timing = stopwatch.read()
  passes = found.attack_log.forwards + found.attack_log.gradients
  return Found(float(found.curve.accuracy[0]), float(passes.mean()), timing)


def _autoattack(budget: Budget, num_threads: int) -> Found:
  """AutoAttack on the same images; runs in a process of its own."""
  torch = torch_twin.load(num_threads)
  torchattacks = importlib.import_module('torchattacks')
  _, _, _, x, labels = target()
  network = _network(num_threads)
  common = {'norm': 'Linf', 'eps': budget.radius, 'seed': _SEED}
  targeted = {'steps': budget.num_steps, 'n_classes': 10}
  attack = torchattacks.MultiAttack(
    [
      torchattacks.APGD(network, loss='ce', steps=budget.num_steps, **common),
      torchattacks.APGDT(network, **targeted, **common),
      torchattacks.FAB(network, multi_targeted=True, **targeted, **common),
      torchattacks.Square(network, n_queries=budget.num_queries, **common),
    ]
  )
  passes, correct = 0, np.zeros(budget.num_examples, bool)

  def count(_: Any, inputs: tuple[Any, ...]) -> None:
    nonlocal passes
    passes += len(inputs[0])

  hook = network.register_forward_pre_hook(count)
  stopwatch = Stopwatch()
  for start in range(0, budget.num_examples, BATCH_SIZE):
    some = slice(start, min(start + BATCH_SIZE, budget.num_examples))
    images = torch.from_numpy(np.moveaxis(x[some], -1, 1).copy())
    classes = torch.from_numpy(labels[some].astype(np.int64))
    found = attack(images, classes)
    wrong = torch_classifier.misclassified(torch, network, budget.radius, images, classes, found)
    correct[some] = ~wrong
  timing = stopwatch.read()
  hook.remove()
  return Found(float(correct.mean()), passes / budget.num_examples, timing)


@functools.lru_cache
def _network(num_threads: int) -> Any:
  model, params, probe, x, _ = target()
  torch = torch_twin.load(num_threads)
  network = torch_classifier.build(torch, model, params, probe)
  torch_classifier.check_same(torch, network, model, params, probe, x[:100])
  return network
