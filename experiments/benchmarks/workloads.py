"""What the benchmark times: training steps as a run takes them, their pieces, attacks, products."""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from experiments.benchmarks import flops
from experiments.cli import devices
from se_vae import data, training
from se_vae.data.transforms import pixels
from se_vae.evaluation import linear_probe, robustness
from se_vae.gaussians import DiagonalGaussian
from se_vae.models import vae
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding
from se_vae.training import TrainConfig, input_pipeline

# Batches that a workload goes round.
_ROWS = 1000
_ROOFLINE_SECONDS = 0.1

# The objectives with an attack in each step.
_SELECTING = ('se', 'se_avae', 'contrastive', 'clusters')


@dataclasses.dataclass(frozen=True)
class Case:
  """One kind of training step."""

  arch: str
  objective: str
  batch_size: int
  latent_dim: int
  pgd_steps: int
  hidden_units: int
  conv_channels: int
  selection: str = 'pgd'

  @property
  def name(self) -> str:
    """The case's name in the tables."""
    size = f'ConvNet {self.conv_channels}' if self.arch == 'convnet' else f'MLP {self.hidden_units}'
    attack = f', L {self.pgd_steps}' if self.objective in _SELECTING else ''
    if self.selection != 'pgd':
      attack = f', {self.selection}'
    kind = f'{size} {self.objective.upper()}'
    return f'{kind}, batch {self.batch_size}, latent {self.latent_dim}{attack}'

  def model(self, image_shape: tuple[int, int, int]) -> VAE:
    """Returns the networks."""
    return vae.make_vae(
      image_shape,
      arch=self.arch,
      latent_dim=self.latent_dim,
      hidden_units=self.hidden_units,
      conv_channels=self.conv_channels,
    )

  def train_config(self) -> TrainConfig:
    """Returns the settings of the step: the defaults, but for objective, selection and L."""
    return TrainConfig(objective=self.objective, selection=self.selection, pgd_steps=self.pgd_steps)


@dataclasses.dataclass(frozen=True)
class Workload:
  """Something to be timed.

  Attributes:
    name: for the tables.
    run: does so many steps, and waits for the last one.
    operations: useful floating-point operations of a step; None where they are not counted.
    temp_bytes: memory that the compiled program takes for intermediate values; None if unknown.
    first_seconds: of the first step, compilation included; None if it was not measured.
    cpu_clock: CPU seconds so far of the process that does the steps.
  """

  name: str
  run: Callable[[int], Any]
  operations: int | None = None
  temp_bytes: int | None = None
  first_seconds: float | None = None
  cpu_clock: Callable[[], float] = time.process_time


class Timing(NamedTuple):
  """What a step takes: seconds, and CPU seconds, of all threads together.

  CPU seconds do not depend on what else a core does. Threads that wait for each other may count.
  """

  seconds: float
  cpu_seconds: float


class Stopwatch:
  """Measures the time since it was made, with the CPU seconds of a clock."""

  def __init__(self, cpu_clock: Callable[[], float] = time.process_time) -> None:
    self._cpu_clock = cpu_clock
    self._cpu_began, self._began = cpu_clock(), time.perf_counter()

  def read(self, steps: int = 1) -> Timing:
    """Returns the time as the mean over so many steps."""
    seconds, cpu_seconds = time.perf_counter() - self._began, self._cpu_clock() - self._cpu_began
    return Timing(seconds / steps, cpu_seconds / steps)


def time_steps(workload: Workload, steps: int) -> Timing:
  """Returns what a step takes, as the mean over `steps` of them."""
  stopwatch = Stopwatch(workload.cpu_clock)
  workload.run(steps)
  return stopwatch.read(steps)


def steps_that_take(workload: Workload, seconds: float) -> int:
  """Returns how many steps take about `seconds`, for a workload that has run before."""
  steps = 1
  while (took := time_steps(workload, steps).seconds * steps) < seconds / 4.0 and steps < _ROWS:
    steps *= 2
  return int(np.clip(steps * seconds / took, 1, _ROWS))


class Benched:
  """A case with its arrays in place on the devices that a run would use."""

  def __init__(self, case: Case, images: np.ndarray) -> None:
    """Args: the case, and a training set, uint8 `[N, H, W, C]`."""
    self.case = case
    self.model = case.model(images.shape[1:])
    self.config = case.train_config()
    self.mesh = devices.mesh_for(case.batch_size)
    init_key, key = jax.random.split(jax.random.key(0))
    state = jax.jit(training.init_state, static_argnums=0)(self.model, self.config, init_key)
    self.state = training.add_targets(state, self.model, self.config, images, seed=0)
    self.params = jax.device_get(self.state.params)
    self.host_indices = data.batch_indices(0, 0, _ROWS, case.batch_size, len(images))
    self.host_images = images
    self.key, self.images = sharding.replicate(self.mesh, (key, images))
    self.indices = sharding.split(self.mesh, self.host_indices, axis=1)

  def train_steps(self) -> Workload:
    """Returns whole steps, many to a dispatch, as `training.run` takes them."""
    step, args, images = training.TrainStep(self.model), (self.config, self.key), self.host_images
    window = training.empty_window(step, self.state, args, images)
    carry = sharding.replicate_copy(self.mesh, (self.state, window))
    chunk_steps = input_pipeline.steps_per_chunk(images, self.case.batch_size, at_most=_ROWS)
    chunk = input_pipeline.read_chunk(self.mesh, images, self.host_indices[:chunk_steps])
    arrays = (args, chunk.images, chunk.examples)
    began = time.perf_counter()
    lowered = training.train_steps.lower(step, self.mesh, *carry, *arrays, np.int32(1))
    compiled = lowered.compile()
    first_seconds = time.perf_counter() - began

    def run(steps: int) -> None:
      nonlocal carry
      for start in range(0, steps, chunk_steps):
        carry = compiled(*carry, *arrays, np.int32(min(chunk_steps, steps - start)))
      jax.block_until_ready(carry)

    is_counted = self.case.objective in flops.COUNTED
    operations = (
      flops.train_step(self.model, self.config, self.case.batch_size) if is_counted else None
    )
    memory = compiled.memory_analysis()
    temp_bytes = None if memory is None else memory.temp_size_in_bytes
    return Workload(self.case.name, run, operations, temp_bytes, first_seconds)

  def pieces(self) -> list[Workload]:
    """Returns the attack, the gradient with x' given, the update and the all-reduce, each alone."""
    model, config, batch_size = self.model, self.config, self.case.batch_size
    optimizer = training.make_optimizer(config)
    params = self.state.params
    of_attack = batch_size * config.pgd_steps * flops.selection_step(model)
    of_gradient = flops.train_step(model, config, batch_size) - of_attack

    def attack(batch: _Batch, total: jax.Array) -> jax.Array:
      zeros = jnp.zeros((len(batch.index), model.latent_dim))
      q_a = DiagonalGaussian(zeros, zeros)
      x_adv = training.select(model, config, params, batch.key, batch.x, q_a, index=batch.index)
      return total + jnp.sum(x_adv)

    def gradient(batch: _Batch, _: Params) -> Params:
      x_adv = batch.other if config.objective == 'se' else None
      arguments = (model, config, params, batch.key, batch.x, x_adv)
      gradients, _ = jax.grad(training.loss, argnums=2, has_aux=True)(*arguments, index=batch.index)
      return gradients

    def update(_: _Batch, carry: tuple[Params, Params, Any]) -> tuple[Params, Params, Any]:
      gradients, params, opt_state = carry
      updates, opt_state = optimizer.update(gradients, opt_state, params)
      return gradients, optax.apply_updates(params, updates), opt_state

    def all_reduce(_: _Batch, gradients: Params) -> Params:
      return sharding.mean_over_devices(gradients)

    name, update_carry = self.case.name, (params, params, self.state.opt_state)
    return [
      Workload(f'{name}: attack', self._loop(attack, jnp.zeros(())), of_attack),
      Workload(f'{name}: gradient', self._loop(gradient, params), of_gradient),
      Workload(f'{name}: optimiser', self._loop(update, update_carry)),
      Workload(f'{name}: all-reduce', self._loop(all_reduce, params)),
    ]

  def _loop(self, step: Callable[[Any, Any], Any], carry: Any) -> Callable[[int], Any]:
    """Returns a function that runs many steps on all devices in one dispatch."""
    shape = self.images.shape[1:]

    def on_device(
      carry: Any, key: jax.Array, rows: jax.Array, indices: jax.Array, count: jax.Array
    ) -> Any:
      index = sharding.positions(indices.shape[1])

      def body(i: jax.Array, carry: Any) -> Any:
        x, other = (
          pixels(rows[indices[j]]).reshape(len(index), *shape) for j in (i, _ROWS - 1 - i)
        )
        return step(_Batch(jax.random.fold_in(key, i), x, other, index), carry)

      return jax.lax.fori_loop(0, count, body, carry)

    rows = self.images.reshape(len(self.images), -1)
    arrays = (sharding.replicate(self.mesh, carry), self.key, rows, self.indices)
    loop = jax.jit(sharding.per_device(self.mesh, on_device, (None, None, None, 1, None)))
    return lambda steps: jax.block_until_ready(loop(*arrays, np.int32(steps)))


@dataclasses.dataclass(frozen=True)
class _Batch:
  """What one step of a piece gets; only what it uses is computed."""

  key: jax.Array
  x: jax.Array
  other: jax.Array  # in the place of x'
  index: jax.Array


def operations_of(case: Case) -> int:
  """Returns the useful floating-point operations of a step on the embedded digits."""
  model = case.model(data.load('mnist_5k').train.images.shape[1:])
  return flops.train_step(model, case.train_config(), case.batch_size)


def evaluation(case: Case, dataset: data.Dataset, num_examples: int, num_steps: int) -> Workload:
  """Returns the paper's PGD on a probe of an untrained encoder; a step attacks all images."""
  x = dataset.test.images[:num_examples].astype(np.float32) / 255.0
  labels = dataset.test.labels['digit'][:num_examples]
  model = case.model(x.shape[1:])
  weights = jax.random.normal(jax.random.key(1), (case.latent_dim, 10))
  args = (jax.jit(model.init)(jax.random.key(0)), linear_probe.LinearProbe(weights, jnp.zeros(10)))
  attack = functools.partial(
    robustness.adversarial_accuracy,
    linear_probe.ProbedEncoder(model),
    x,
    labels,
    radii=(0.1,),
    seed=2,
    num_steps=num_steps,
    batch_size=min(256, num_examples),
    args=args,
    mesh=devices.mesh_for(min(256, num_examples)),
  )
  name = f'{case.name.split(",")[0].rsplit(" ", 1)[0]}, {len(x)} images, {num_steps} steps'
  return Workload(name, lambda steps: [attack() for _ in range(steps)])


def _products(sizes: Sequence[int]) -> Iterator[Workload]:
  """Yields square float32 products, on one device, and one a device side by side."""
  for count in sorted({1, jax.device_count()}):
    mesh = sharding.data_mesh(count)
    for size in sizes:
      a, b = sharding.split(mesh, np.ones((2, count, size, size), np.float32) / size, axis=1)
      product = jax.jit(jnp.matmul)

      def run(steps: int, product: Any = product, a: jax.Array = a, b: jax.Array = b) -> None:
        for _ in range(steps):
          result = product(a, b)
        jax.block_until_ready(result)

      yield Workload(f'{count} x {size}^3', run, 2 * count * size**3)


class Roofline:
  """The best rate of a matrix product that this machine shows at the moment."""

  def __init__(self, sizes: Sequence[int]) -> None:
    """Compiles products of these sizes."""
    self.products = list(_products(sizes))
    for product in self.products:
      product.run(1)
    self.steps = [steps_that_take(product, _ROOFLINE_SECONDS) for product in self.products]

  def measure(self) -> dict[str, float]:
    """Returns the operations a second of each product, by name."""
    return {
      product.name: (product.operations or 0) / time_steps(product, steps).seconds
      for product, steps in zip(self.products, self.steps, strict=True)
    }
