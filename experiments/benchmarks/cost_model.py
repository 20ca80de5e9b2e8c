"""What a training step takes on many devices: operations, bytes, messages, and the time they need.

Operations and bytes are counted from the architecture, and tests compare them with compiled
programs and files. Times are predictions from published figures of chips, and no measurement: each
kernel takes as long as its operations at the peak rate, or as its bytes at the peak bandwidth, but
not less than a kernel must. So a step is at least this long.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Sequence
from typing import NamedTuple

import jax

from experiments.benchmarks import flops
from se_vae import training
from se_vae.models import networks
from se_vae.models.vae import VAE
from se_vae.training import TrainConfig

_FLOAT = 4  # bytes
# Beside the linear layers: distance, its gradient, step and projection in each step of the
# selection; sampling, loss, and their gradients once.
_SELECTION_KERNELS, _LOSS_KERNELS = 4, 10
# Adam reads gradient, parameter and two averages, and writes the last three.
_UPDATE_ARRAYS = 7


@dataclasses.dataclass(frozen=True)
class Chip:
  """Published figures of an accelerator, in operations, bytes and seconds.

  Devices form islands with fast links, and islands are connected by a network.

  Attributes:
    name: for the tables.
    rate: operations a second, in the precision that JAX takes by default for float32 products.
    memory_bandwidth: bytes a second.
    memory: bytes.
    kernel: seconds that the smallest of many kernels in a row takes.
    island: devices with fast links between them.
    is_torus: whether an island is a square of devices that are linked to their neighbours, and not
      all to one switch.
    link_bandwidth: bytes a second that a device sends within its island.
    collective: seconds that every all-reduce takes.
    link: seconds for each step of a message within an island.
    network_bandwidth: bytes a second that a device sends to other islands.
    network: seconds for each step of a message between islands.
  """

  name: str
  rate: float
  memory_bandwidth: float
  memory: float
  kernel: float
  island: int
  is_torus: bool
  link_bandwidth: float
  collective: float
  link: float
  network_bandwidth: float
  network: float


# docs/scale.md has the source of each figure, and says which are assumptions.
H100 = Chip(
  'H100',
  rate=494.7e12,
  memory_bandwidth=3.35e12,
  memory=80e9,
  kernel=2e-6,
  island=8,
  is_torus=False,
  link_bandwidth=450e9,
  collective=4.4e-6,
  link=0.52e-6,
  network_bandwidth=50e9,
  network=5e-6,
)
V5E = Chip(
  'TPU v5e',
  rate=197e12,
  memory_bandwidth=819e9,
  memory=16e9,
  kernel=1e-6,
  island=256,
  is_torus=True,
  link_bandwidth=200e9,
  collective=0.0,
  link=1e-6,
  network_bandwidth=3.125e9,
  network=20e-6,
)


class Layer(NamedTuple):
  """A linear layer: operations for an example, weights, and values in and out for an example."""

  operations: int
  weights: int
  values: int


def encoder_layers(model: VAE) -> list[Layer]:
  """Returns the layers of the encoder."""
  operations, shape = flops.encoder_layers(model), model.image_shape
  head = 2 * model.latent_dim
  if isinstance(model.encoder, networks.ConvEncoder):
    sizes = [height * width for height, width in networks.feature_sizes(shape, len(operations) - 1)]
    channels = (shape[2], *model.encoder.channels)
    levels = [size * width for size, width in zip(sizes, channels, strict=True)]
    return _layers(operations, (*levels, head), (*sizes[1:], 1))
  levels = [math.prod(shape), *model.encoder.hidden]
  return _layers(operations, (*levels, head), [1] * len(operations))


def decoder_layers(model: VAE) -> list[Layer]:
  """Returns the layers of the decoder."""
  operations, shape = flops.decoder_layers(model), model.image_shape
  if isinstance(model.decoder, networks.ConvDecoder):
    sizes = [height * width for height, width in networks.feature_sizes(shape, len(operations) - 1)]
    channels = (shape[2], *model.decoder.channels)
    levels = [size * width for size, width in zip(sizes, channels, strict=True)]
    return _layers(operations, (model.latent_dim, *levels[::-1]), (1, *sizes[:0:-1]))
  levels = [model.latent_dim, *model.decoder.hidden, math.prod(shape)]
  return _layers(operations, levels, [1] * len(operations))


def _layers(
  operations: Sequence[int], levels: Sequence[int], positions: Sequence[int]
) -> list[Layer]:
  """Returns layers between levels of values; a convolution uses its weights at each position."""
  return [
    Layer(count, count // (2 * places), sum(ends))
    for count, ends, places in zip(operations, itertools.pairwise(levels), positions, strict=True)
  ]


# ---------------------------------------------------------------------------------------------
# Bytes
# ---------------------------------------------------------------------------------------------


class Bytes(NamedTuple):
  """Bytes of a run, on each device but for the last two.

  Attributes:
    parameters: of the model; their gradients take as many.
    optimizer: the state of the optimiser.
    warm_start: the offsets of all examples, which every device holds.
    activations: what an example's gradient keeps from the forward pass.
    all_reduce: the message of the one all-reduce of a step.
    checkpoint: the arrays of a checkpoint.
  """

  parameters: int
  optimizer: int
  warm_start: int
  activations: int
  all_reduce: int
  checkpoint: int


def count_bytes(model: VAE, config: TrainConfig, num_examples: int) -> Bytes:
  """Returns the bytes of a run. Nothing is computed: shapes alone are used.

  Args:
    model: the model.
    config: the settings of its training.
    num_examples: N, the size of the training set.
  """
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(
    lambda key: training.init_state(model, config, key, num_examples=num_examples), key
  )
  x = jax.ShapeDtypeStruct((1, *model.image_shape), 'float32')
  _, metrics = jax.eval_shape(
    lambda params, key, x: training.loss(model, config, params, key, x, x), state.params, key, x
  )
  parameters, terms = _size(state.params), _size(metrics)
  # The sums of a row and the metrics of a bad step, each with the norm of the gradient; two counts.
  window = 2 * (terms + _FLOAT) + 2 * _FLOAT
  encodings = 2 if config.objective == 'se' else 1
  values = sum(layer.values for layer in encoder_layers(model)) * encodings
  values += sum(layer.values for layer in decoder_layers(model))
  return Bytes(
    parameters=parameters,
    optimizer=_size(state.opt_state),
    warm_start=_size(state.offsets),
    activations=_FLOAT * values // 2,  # the end of a layer is the beginning of the next
    all_reduce=parameters + terms,
    checkpoint=_size(state) + window,
  )


def device_memory(count: Bytes, examples: int) -> int:
  """Returns the bytes on a device with a share of so many examples, without its input.

  These are parameters, their gradients and the optimiser's state; the message, which is a copy of
  the gradients; the warm start; and activations.
  """
  state = 2 * count.parameters + count.optimizer + count.all_reduce
  return state + count.warm_start + examples * count.activations


def _size(tree: object) -> int:
  return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


# ---------------------------------------------------------------------------------------------
# Seconds
# ---------------------------------------------------------------------------------------------


def compute_seconds(
  chip: Chip, model: VAE, config: TrainConfig, examples: float, runs: int = 1
) -> float:
  """Returns the seconds of a step without communication, of objective 'vae' or 'se' with PGD.

  Args:
    chip: the device.
    model: the model.
    config: the settings of its training.
    examples: the device's share of the batch.
    runs: independent runs that share the device's kernels.
  """

  def kernel(operations: float, values: float) -> float:
    seconds = max(operations / chip.rate, _FLOAT * values / chip.memory_bandwidth)
    return max(chip.kernel, runs * seconds)

  def pass_over(layers: Sequence[Layer]) -> float:
    return sum(
      kernel(examples * layer.operations, layer.weights + examples * layer.values)
      for layer in layers
    )

  encoder, decoder = encoder_layers(model), decoder_layers(model)
  is_se = config.objective == 'se'
  # Forward, in the weights, and in the inputs but for those of the first layer.
  encoding = 3 * pass_over(encoder) - pass_over(encoder[:1])
  seconds = (2 if is_se else 1) * encoding + 3 * pass_over(decoder) + _LOSS_KERNELS * chip.kernel
  if is_se:
    step = 2 * pass_over(encoder) + _SELECTION_KERNELS * chip.kernel
    seconds += config.pgd_steps * step
  parameters = sum(layer.weights for layer in (*encoder, *decoder))
  return seconds + kernel(0.0, _UPDATE_ARRAYS * parameters)


def all_reduce_seconds(chip: Chip, num_devices: int, size: int) -> float:
  """Returns the seconds of an all-reduce of `size` bytes over a power of two of devices.

  Within each island the message is reduced in parts, one part for each device; the parts are
  reduced between islands, and spread again.
  """
  if num_devices == 1:
    return 0.0
  local, islands = min(num_devices, chip.island), max(1, num_devices // chip.island)
  latency = chip.collective + 2 * _steps(chip, local) * chip.link
  latency += 2 * math.log2(islands) * chip.network
  sent = 2 * (local - 1) / local * size / chip.link_bandwidth
  sent += 2 * (islands - 1) / islands * (size / local) / chip.network_bandwidth
  return latency + sent


def _steps(chip: Chip, num_devices: int) -> int:
  """Returns the steps of a message across an island, one way."""
  if not chip.is_torus:
    return num_devices - 1
  side = 2 ** (int(math.log2(num_devices)) // 2)
  sides = (side, num_devices // side)
  whole = math.isqrt(chip.island)  # a whole row is closed to a ring
  return sum(length // 2 if length == whole else length - 1 for length in sides)


def step_seconds(
  chip: Chip, model: VAE, config: TrainConfig, batch_size: int, num_devices: int, size: int
) -> float:
  """Returns the seconds of a step whose batch is split over devices; `size` is the all-reduce's."""
  compute = compute_seconds(chip, model, config, batch_size / num_devices)
  return compute + all_reduce_seconds(chip, num_devices, size)
