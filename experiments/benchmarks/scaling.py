"""Predicts how training scales to many devices, on paper.

  python -m experiments.benchmarks.scaling

Prints Markdown tables: what a step takes, where splitting a batch stops paying (these two are in
docs/scale.md), and for each chip the predicted time of a step when a batch is split over 1 to 1,024
devices, when every device has as many examples, and when every device trains runs of its own.
`cost_model` has the model. Nothing is measured.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from etils import epy

from experiments.cli import app, flags, messages
from se_vae.config import TrainConfig, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from experiments.benchmarks import cost_model, flops
  from experiments.benchmarks.cost_model import Bytes, Chip
  from se_vae.models import vae
  from se_vae.models.vae import VAE

_DEVICES = tuple(2**power for power in range(11))
_RUNS = (1, 4, 16, 64, 256)


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
  """The flags of this binary."""

  latent_dim: int = setting(64, 'Latent dimensions.', at_least=1)
  hidden_units: int = setting(200, 'Units of each of the 4 layers of the MLP.', at_least=1)
  conv_channels: int = setting(200, 'Channels of each of the 4 layers of the ConvNet.', at_least=1)
  pgd_steps: int = setting(20, 'Gradient steps L of the selection.', at_least=1)
  batch_sizes: tuple[int, ...] = setting((64, 256), 'Batch sizes.', at_least=1)
  num_examples: int = setting(60_000, 'Training images of 28 x 28 pixels.', at_least=1)


def main() -> None:
  """Entry point."""
  print(tables(flags.from_flags(ScalingConfig)))


def tables(config: ScalingConfig) -> str:
  """Returns the tables, with headings, without a newline at the end.

  Raises:
    ArgumentError: for settings that are wrong.
  """
  validate(config)
  return '\n\n'.join(_sections(config))


@dataclasses.dataclass(frozen=True)
class _Case:
  """A network with the settings of its training and the bytes of a run."""

  name: str
  model: VAE
  train: TrainConfig
  bytes: Bytes

  def step(self, chip: Chip, batch_size: int, num_devices: int) -> float:
    """Returns the seconds of a step."""
    return cost_model.step_seconds(
      chip, self.model, self.train, batch_size, num_devices, self.bytes.all_reduce
    )

  def runs(self, chip: Chip, batch_size: int, runs: int) -> float:
    """Returns the seconds of a step of each of `runs` runs on one device."""
    return cost_model.compute_seconds(chip, self.model, self.train, batch_size, runs)


def _cases(config: ScalingConfig) -> Iterator[_Case]:
  train = TrainConfig(objective='se', pgd_steps=config.pgd_steps)
  warm = dataclasses.replace(train, warm_start=True)
  for arch, name in (
    ('mlp', f'MLP-{config.hidden_units}'),
    ('convnet', f'ConvNet-{config.conv_channels}'),
  ):
    model = vae.make_vae(
      (28, 28, 1),
      arch=arch,
      latent_dim=config.latent_dim,
      hidden_units=config.hidden_units,
      conv_channels=config.conv_channels,
    )
    yield _Case(name, model, train, cost_model.count_bytes(model, warm, config.num_examples))


def _sections(config: ScalingConfig) -> Iterator[str]:
  cases, batch_sizes = list(_cases(config)), config.batch_sizes
  chips = (cost_model.H100, cost_model.V5E)
  yield '### What a step takes'
  yield _counts(cases, batch_sizes)
  yield '### Where splitting a batch stops paying'
  yield _best_splits(cases, chips, batch_sizes)
  for chip in chips:
    for case in cases:
      yield f'### {case.name} on {chip.name}'
      yield _strong_and_weak(case, chip, batch_sizes)
    yield f'### Runs side by side on one {chip.name}'
    yield _populations(cases, chip, batch_sizes[0])


def _counts(cases: list[_Case], batch_sizes: tuple[int, ...]) -> str:
  """Returns what a step takes, a row for each quantity."""
  columns = [_quantities(case, batch_sizes) for case in cases]
  rows = ([name, *(_number(column[name]) for column in columns)] for name in columns[0])
  return messages.markdown_table(('', *(case.name for case in cases)), rows)


def _quantities(case: _Case, batch_sizes: tuple[int, ...]) -> dict[str, float]:
  count, batch_size = case.bytes, batch_sizes[0]
  cold = cost_model.device_memory(count._replace(warm_start=0), batch_size)
  return {
    f'operations of a step, batch {size}, GFLOP': flops.train_step(case.model, case.train, size)
    / 1e9
    for size in batch_sizes
  } | {
    'parameters, MB': count.parameters / 1e6,
    "the optimiser's state, MB": count.optimizer / 1e6,
    'the all-reduce of a step, MB': count.all_reduce / 1e6,
    'activations of an example, MB': count.activations / 1e6,
    f'memory of one device, batch {batch_size}, MB': cold / 1e6,
    'a warm start on each device, and in a checkpoint, MB': count.warm_start / 1e6,
    'a checkpoint without a warm start, MB': (count.checkpoint - count.warm_start) / 1e6,
  }


def _strong_and_weak(case: _Case, chip: Chip, batch_sizes: tuple[int, ...]) -> str:
  """Returns times of steps for each number of devices, and how much faster images go by."""
  share = batch_sizes[0]

  def split(batch_size: int, num_devices: int) -> str:
    if batch_size % num_devices:
      return ''
    one, seconds = (case.step(chip, batch_size, count) for count in (1, num_devices))
    return f'{_number(1e6 * seconds)} ({one / seconds:.2f})'

  def grown(num_devices: int) -> list[str]:
    one = case.step(chip, share, 1)
    seconds = case.step(chip, share * num_devices, num_devices)
    input_rate = share * num_devices * case.model.image_shape[0] ** 2 / seconds
    return [f'{_number(1e6 * seconds)} ({num_devices * one / seconds:.1f})', _megabytes(input_rate)]

  header = ['devices', 'all-reduce, us']
  header += [f'batch {batch_size}: us (speed-up)' for batch_size in batch_sizes]
  header += [f'{share} a device: us (speed-up)', 'its input, MB/s']
  rows = []
  for count in _DEVICES:
    all_reduce = 1e6 * cost_model.all_reduce_seconds(chip, count, case.bytes.all_reduce)
    splits = (split(batch_size, count) for batch_size in batch_sizes)
    rows.append([f'{count:,}', _number(all_reduce), *splits, *grown(count)])
  return messages.markdown_table(header, rows)


def _best_splits(cases: list[_Case], chips: tuple[Chip, ...], batch_sizes: tuple[int, ...]) -> str:
  """Returns over how many devices a batch gives the fastest step, and when half of them idle."""

  def cells(case: _Case, chip: Chip, batch_size: int) -> list[str]:
    splits = [count for count in _DEVICES if batch_size % count == 0]
    seconds = {count: case.step(chip, batch_size, count) for count in splits}
    fastest = min(splits, key=seconds.__getitem__)
    efficient = [count for count in splits if seconds[1] >= 0.5 * count * seconds[count]]
    name = f'{case.name}, batch {batch_size}, {chip.name}'
    speed_up = seconds[1] / seconds[fastest]
    return [name, str(fastest), f'{speed_up:.2f}', str(max(efficient))]

  header = ('', 'devices of the fastest step', 'its speed-up', 'most devices at half their speed')
  rows = (cells(case, chip, size) for chip in chips for case in cases for size in batch_sizes)
  return messages.markdown_table(header, rows)


def _populations(cases: list[_Case], chip: Chip, batch_size: int) -> str:
  """Returns times of steps of several runs on a device, and how much faster all runs get on."""

  def cell(case: _Case, runs: int) -> str:
    one, seconds = (case.runs(chip, batch_size, count) for count in (1, runs))
    return f'{_number(1e6 * seconds)} ({runs * one / seconds:.1f})'

  header = ['runs on a device', *(f'{case.name}: us (speed-up)' for case in cases)]
  return messages.markdown_table(
    header, ([str(runs), *(cell(case, runs) for case in cases)] for runs in _RUNS)
  )


def _number(value: float) -> str:
  """Returns three digits, and all digits before the point."""
  return f'{value:,.0f}' if value >= 100.0 else f'{value:.3g}'


def _megabytes(rate: float) -> str:
  return _number(rate / 1e6)


if __name__ == '__main__':
  flags.define_flags(ScalingConfig)
  app.run(main)
