"""Other implementations of the training step, each in a process of its own, to time ours beside.

A peer has a method `run(steps)`, which trains, and a method `loss_and_norms(x, start, noise)`, by
which `disagreement` finds whether it takes our step. In one process PyTorch's threads and JAX's
would get in each other's way, and JAX would have the several devices of ours.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import multiprocessing
import os
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import plain_jax, torch_twin, workloads
from experiments.benchmarks.workloads import Case, Workload
from experiments.cli import devices
from se_vae import attacks, data, gaussians, training
from se_vae.config import ArgumentError
from se_vae.data.transforms import pixels
from se_vae.gaussians import DiagonalGaussian
from se_vae.models.vae import VAE, Params
from se_vae.training import TrainConfig

# The loss and the norms of its gradient may differ by these shares. Where a unit's input or a
# pixel's gradient is of the size of rounding, a ReLU or a sign step may go either way; one unit of
# a small network changes a norm by 1e-3.
_LOSS_TOLERANCE, _NORM_TOLERANCE = 1e-4, 1e-2


class Peer(Protocol):
  """An implementation of the training step."""

  def run(self, steps: int) -> None:
    """Trains for so many steps, and waits for the last one."""

  def loss_and_norms(
    self, x: np.ndarray, start: np.ndarray, noise: np.ndarray
  ) -> tuple[float, dict[str, float]]:
    """Returns the loss of a step, and the norm of its gradient in each network's weights.

    Args:
      x: images `[B, H, W, C]` in [0, 1].
      start: where the selection starts, `[B, H, W, C]`.
      noise: `[B, D]`, standard normal, of z_a.
    """


class Kind(NamedTuple):
  """A kind of peer.

  Attributes:
    title: its name in the tables.
    form: of a `torch_twin.Twin`; None for JAX.
    archs: the networks that it has.
    objectives: what it trains.
  """

  title: str
  form: str | None
  archs: tuple[str, ...] = ('mlp', 'convnet')
  objectives: tuple[str, ...] = ('vae', 'se')


class Chosen(NamedTuple):
  """A peer with its case, its layout of memory and its number of threads."""

  name: str
  case: Case
  memory_format: str
  num_threads: int


KINDS = {
  'jax': Kind('plain JAX', None),
  'torch': Kind('PyTorch, eager', 'eager'),
  'torch_written': Kind("PyTorch, the attack's gradient by hand", 'written', ('mlp',), ('se',)),
  'torch_compiled': Kind('PyTorch, torch.compile', 'compiled'),
}


def check(names: Sequence[str]) -> None:
  """Raises ArgumentError if a peer of these names cannot run here."""
  if any(KINDS[name].form for name in names):
    torch_twin.load(devices.num_cores())
  if 'torch_compiled' in names and not torch_twin.can_compile():
    raise ArgumentError('peers', 'torch_compiled needs a C++ compiler, g++ or clang++')


@contextlib.contextmanager
def processes() -> Iterator[dict[str, Executor]]:
  """Starts a process for the peers in JAX, and one for those in PyTorch, when they are used."""
  # Fresh ones: a fork of this process would have JAX's locks, and none of its threads.
  context = multiprocessing.get_context('spawn')
  with (
    tempfile.TemporaryDirectory() as directory,
    ProcessPoolExecutor(1, context) as of_jax,
    ProcessPoolExecutor(1, context, _compile_into, (directory,)) as of_torch,
  ):
    yield {name: of_torch if kind.form else of_jax for name, kind in KINDS.items()}


def _compile_into(directory: str) -> None:
  """Makes PyTorch compile everything anew, and leave nothing behind."""
  os.environ['TORCHINDUCTOR_CACHE_DIR'] = directory


def steps(executors: dict[str, Executor], name: str, case: Case) -> Iterator[Workload]:
  """Yields the steps of one kind of peer: of a ConvNet in PyTorch, in either layout of memory.

  Yields nothing for networks and objectives that the kind does not have.

  Raises:
    AssertionError: if they are not our steps.
  """
  kind = KINDS[name]
  if case.arch not in kind.archs or case.objective not in kind.objectives:
    return
  has_formats = case.arch == 'convnet' and kind.form is not None
  for memory_format in torch_twin.FORMATS if has_formats else torch_twin.FORMATS[:1]:
    chosen = Chosen(name, case, memory_format, devices.num_cores())
    first_seconds, (loss_error, norm_error) = executors[name].submit(_begin, chosen).result()
    if not (loss_error < _LOSS_TOLERANCE and norm_error < _NORM_TOLERANCE):
      errors = f'{loss_error:.1e} and {norm_error:.1e}'
      raise AssertionError(f'loss and gradient of {kind.title} differ from ours by {errors}')

    def run(steps: int, chosen: Chosen = chosen) -> None:
      executors[name].submit(_run, chosen, steps).result()

    layout = f', {memory_format}' if has_formats else ''
    yield Workload(
      f'{case.name}: {kind.title}{layout}',
      run,
      workloads.operations_of(case),
      first_seconds=first_seconds,
      cpu_clock=lambda: executors[name].submit(time.process_time).result(),
    )


def _begin(chosen: Chosen) -> tuple[float, tuple[float, float]]:
  """Returns the seconds of a peer's first step, compilation included, and its errors."""
  peer, benched = _peer(chosen)
  began = time.perf_counter()
  peer.run(1)
  seconds = time.perf_counter() - began
  peer = make(chosen.name, benched, chosen.memory_format)  # with the weights of before that step
  rows = benched.host_images[benched.host_indices[0]]
  return seconds, disagreement(peer, benched.model, benched.params, benched.config, rows)


def _run(chosen: Chosen, steps: int) -> None:
  _peer(chosen)[0].run(steps)


@functools.lru_cache
def _peer(chosen: Chosen) -> tuple[Peer, workloads.Benched]:
  if KINDS[chosen.name].form:
    torch_twin.load(chosen.num_threads)
  benched = workloads.Benched(chosen.case, data.load('mnist_5k').train.images)
  return make(chosen.name, benched, chosen.memory_format), benched


def make(name: str, benched: workloads.Benched, memory_format: str = torch_twin.FORMATS[0]) -> Peer:
  """Returns a peer with the weights and the data of a case."""
  arguments = (
    benched.model,
    benched.params,
    benched.config,
    benched.host_images,
    benched.host_indices,
  )
  form = KINDS[name].form
  if form is None:
    return plain_jax.PlainJax(*arguments)
  torch = importlib.import_module('torch')
  return torch_twin.Twin(torch, *arguments, form=form, memory_format=memory_format)


def disagreement(
  peer: Peer, model: VAE, params: Params, config: TrainConfig, images: np.ndarray
) -> tuple[float, float]:
  """Returns the relative errors of a peer's loss, and of the norms of its gradient.

  Args:
    peer: with these parameters.
    model: the model.
    params: its parameters.
    config: the settings of the step.
    images: uint8 `[B, H, W, C]`, one batch.
  """
  key, index = jax.random.key(4), jnp.arange(len(images))
  x = pixels(images)
  zeros = jnp.zeros((len(images), model.latent_dim), x.dtype)
  noise = gaussians.sample_each(DiagonalGaussian(zeros, zeros), attacks.example_keys(key, index))
  start = attacks.noise(jax.random.key(5), x, radius=config.radius)
  gradient_of = jax.value_and_grad(training.loss, argnums=2, has_aux=True)

  @jax.jit
  def ours(params: Params, x: jax.Array, start: jax.Array) -> tuple[jax.Array, Params]:
    x_adv = None
    if config.objective == 'se':
      q_a = model.encode(params, x)
      x_adv = training.select(model, config, params, key, x, q_a, start=start)
    (loss, _), gradients = gradient_of(model, config, params, key, x, x_adv)
    return loss, {name: optax.tree.norm(part) for name, part in gradients.items()}

  loss, norms = ours(params, x, start)
  their_loss, their_norms = peer.loss_and_norms(*map(np.asarray, (x, start, noise)))
  expected = np.array([float(loss), *map(float, norms.values())])
  found = np.array([their_loss, *(their_norms[name] for name in norms)])
  loss_error, *norm_errors = np.abs(found - expected) / np.abs(expected)
  return float(loss_error), float(max(norm_errors))
