r"""How fast training, the attacks and the binaries' start are, beside what this machine can do.

  python -m experiments.benchmarks.speed --workdir=runs/benchmark
  python -m experiments.benchmarks.speed --workdir=runs/benchmark --sections=steps,peers \
    --objectives=vae,se --archs=mlp

Prints Markdown tables, and writes them into the work directory as `benchmark.md`, with every
measurement in `benchmark.json`. The sections:

  steps       a training step as a run takes it: many to a dispatch, on the devices of a run
  growth      the same for other L, batch and latent sizes
  profile     what an SE step consists of, each piece timed alone
  peers       the same steps in plain JAX and in PyTorch, if that is installed: eager, with the
              attack's gradient written out, and compiled; in other processes, with as many threads
              as cores; each is checked to give our loss and gradient
  evaluation  the paper's PGD on a probe
  worst_case  the suite `worst_case` beside AutoAttack with the same steps and queries, on a
              pretrained encoder; needs `pip install torch` and `pip install --no-deps torchattacks`
  startup     --help of each binary, and the time to the first training step

Operations are those of `flops`, and the roofline is the best rate of a float32 matrix product, over
some sizes, on one device and on all side by side. On a shared machine everything varies: in every
repeat everything is measured once, in turn, shares and ratios are taken within it, and the tables
give medians with the lowest and the highest. CPU milliseconds, of all threads together, vary least
on one core (`taskset -c 0`), where no thread waits for another.
"""

from __future__ import annotations

import dataclasses
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Executor
from pathlib import Path
from typing import Any

from etils import epy

from experiments.cli import app, devices, flags, messages, signals, workdirs
from se_vae.config import ARCHS, OBJECTIVES, SELECTIONS, ArgumentError, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import numpy as np

  from experiments.benchmarks import peers, workloads, worst_case
  from se_vae import data
  from se_vae.storage import atomic_files

SECTIONS = ('steps', 'growth', 'profile', 'peers', 'evaluation', 'worst_case', 'startup')
_BINARIES = ('pretrain', 'probe', 'figure1', 'benchmarks.speed')
_EVALUATION_STEPS = 40
_OPTIONAL = ('torch', 'torchattacks')
_PEERS = ('jax', 'torch', 'torch_written', 'torch_compiled')

_STEP_HEADER = (
  'training step',
  'ms',
  'CPU, ms',
  'GFLOP',
  'GFLOP/s',
  'of the roofline',
  'temporary MiB',
  'compiled in, s',
)
_WORST_CASE_HEADER = (
  'worst case',
  'images a second',
  'times ours',
  'CPU, ms an image',
  'times ours',
  'accuracy',
  'passes an image',
  'first batch, s',
)
_COMPARED_HEADERS: dict[str, tuple[str, ...]] = {
  'piece': ('piece of the step', 'ms', 'of the step', 'of the roofline'),
  'peer': (
    *('peer of the step', 'ms', 'times ours', 'of the roofline'),
    *('CPU, ms', 'times ours', 'first step, s'),
  ),
}


@dataclasses.dataclass(frozen=True)
class BenchmarkConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of everything that this binary writes.')
  sections: tuple[str, ...] = setting(
    ('steps', 'profile', 'evaluation', 'startup'), 'What to measure.', choices=SECTIONS
  )
  archs: tuple[str, ...] = setting(ARCHS, 'Architectures.', choices=ARCHS)
  objectives: tuple[str, ...] = setting(OBJECTIVES, 'Training objectives.', choices=OBJECTIVES)
  selections: tuple[str, ...] = setting(
    ('pgd',), 'Selections of se, in the section steps.', choices=SELECTIONS
  )
  peers: tuple[str, ...] = setting(
    _PEERS, 'Other implementations of the step, in the section peers.', choices=_PEERS
  )
  batch_sizes: tuple[int, ...] = setting((64, 256), 'Batch sizes of the MLP.', at_least=1)
  conv_batch_sizes: tuple[int, ...] = setting((64,), 'Batch sizes of the ConvNet.', at_least=1)
  latent_dim: int = setting(64, 'Latent dimensions.', at_least=1)
  hidden_units: int = setting(200, 'Units of each of the 4 layers of an MLP.', at_least=1)
  conv_channels: int = setting(32, 'Channels of each of the 4 layers of a ConvNet.', at_least=1)
  pgd_steps: int = setting(20, 'Gradient steps L of the selection.', at_least=1)
  growth_pgd_steps: tuple[int, ...] = setting((1, 5, 20), 'L, for growth.', at_least=1)
  growth_batch_sizes: tuple[int, ...] = setting(
    (64, 128, 256), 'Batch sizes, for growth.', at_least=1
  )
  growth_latent_dims: tuple[int, ...] = setting(
    (32, 64, 128), 'Latent dimensions, for growth.', at_least=1
  )
  roofline_sizes: tuple[int, ...] = setting(
    (512, 1024, 2048), 'Sizes of square matrix products.', at_least=1, at_most=16_384
  )  # matrices of 1 GiB
  num_examples: int = setting(
    1000, 'Test images of the evaluation and of the worst case.', at_least=1, at_most=1000
  )
  attack_radius: float = setting(0.1, 'linf radius of the worst case.', at_least=0, at_most=1)
  attack_steps: int = setting(40, 'Gradient steps of each attack of the worst case.', at_least=1)
  attack_queries: int = setting(1000, 'Queries of Square in the worst case.', at_least=1)
  repeats: int = setting(5, 'Turns of every measurement.', at_least=1)
  seconds: float = setting(0.5, 'How long a measurement takes, or one step of it.', above=0)


def main() -> None:
  """Entry point."""
  config = flags.from_flags(BenchmarkConfig)
  largest = (*config.batch_sizes, *config.conv_batch_sizes, *config.growth_batch_sizes)
  devices.use_all_cores(max(*largest, worst_case.BATCH_SIZE))
  with signals.StopSignal(saves=False).listening() as stop:
    run(config, stop)


def run(config: BenchmarkConfig, stop: signals.StopSignal) -> dict[str, Any]:
  """Measures, prints and writes; returns the result's JSON.

  Raises:
    ArgumentError: for settings that are wrong, or where what is asked for needs a package or a
      compiler that is missing.
    AssertionError: if a peer does not take our step.
    Interrupted: when `stop` says so; nothing is kept.
  """
  validate(config)
  workdir = workdirs.check_workdir(config.workdir)
  dataset = data.load('mnist_5k')
  images = len(dataset.train.images)
  for name in ('batch_sizes', 'conv_batch_sizes', 'growth_batch_sizes'):
    if max(getattr(config, name)) > images:
      raise ArgumentError(name, f'must be at most the {images} training images')
  compared = 'peers' in config.sections
  if compared:
    peers.check(config.peers)
  if 'worst_case' in config.sections:
    worst_case.check()
  with workdirs.lock(workdir, 'benchmark.*'):
    startup = _startup(workdir, config.repeats, stop) if 'startup' in config.sections else {}
    with peers.processes() as executors:
      rates, rows = _measure(config, dataset, executors, stop)
      attacked = _worst_case(config, executors['torch'], stop)
    result = {
      'roofline': rates,
      'rows': rows,
      'worst_case': attacked,
      'startup': startup,
      'config': flags.to_dict(config),
      'versions': devices.versions(*_OPTIONAL),
      'devices': devices.device_kinds(),
      'cores': devices.num_cores(),
    }
    tables = '\n\n'.join(_tables(result))
    atomic_files.write(workdir / 'benchmark.md', f'{tables}\n'.encode())
    workdirs.write_json(workdir / 'benchmark.json', result)
  print(tables)
  return result


def _cases(config: BenchmarkConfig) -> dict[workloads.Case, set[str]]:
  """Returns every kind of step to be timed, with the sections that show it."""
  cases: dict[workloads.Case, set[str]] = {}

  def add(section: str, **changes: Any) -> None:
    if section in config.sections:
      cases.setdefault(_case(config, **changes), set()).add(section)

  for arch in config.archs:
    for batch_size in config.batch_sizes if arch == 'mlp' else config.conv_batch_sizes:
      for objective in config.objectives:
        for section in ('steps', 'peers', 'profile')[: 3 if objective == 'se' else 2]:
          add(section, arch=arch, objective=objective, batch_size=batch_size)
      for selection in config.selections if 'se' in config.objectives else ():
        add('steps', arch=arch, objective='se', batch_size=batch_size, selection=selection)
  base = {'arch': 'mlp', 'objective': 'se', 'batch_size': config.growth_batch_sizes[0]}
  for name, values in (
    ('pgd_steps', config.growth_pgd_steps),
    ('batch_size', config.growth_batch_sizes),
    ('latent_dim', config.growth_latent_dims),
  ):
    for value in values:
      add('growth', **base | {name: value})
  return cases


def _case(config: BenchmarkConfig, **changes: Any) -> workloads.Case:
  fields = {field.name for field in dataclasses.fields(workloads.Case)}
  return workloads.Case(**{k: v for k, v in vars(config).items() if k in fields} | changes)


def _workloads(
  config: BenchmarkConfig, dataset: data.Dataset, executors: dict[str, Executor]
) -> Iterator[tuple[str, str, workloads.Workload]]:
  """Yields the kind of each workload, the name of its case, and the workload."""
  for case, sections in _cases(config).items():
    benched = workloads.Benched(case, dataset.train.images)
    yield 'step', case.name, benched.train_steps()
    for piece in benched.pieces() if 'profile' in sections else ():
      yield 'piece', case.name, piece
    for name in config.peers if 'peers' in sections else ():
      for workload in peers.steps(executors, name, case):
        yield 'peer', case.name, workload
  if 'evaluation' in config.sections:
    for arch in config.archs:
      case = _case(config, arch=arch, objective='se', batch_size=1)
      workload = workloads.evaluation(case, dataset, config.num_examples, _EVALUATION_STEPS)
      yield 'evaluation', case.name, workload


def _measure(
  config: BenchmarkConfig,
  dataset: data.Dataset,
  executors: dict[str, Executor],
  stop: signals.StopSignal,
) -> tuple[dict[str, list[float]], list[dict[str, Any]]]:
  """Returns the rates of products, and a row for each workload, both repeat by repeat."""
  timed: list[tuple[workloads.Workload, int]] = []
  rows: list[dict[str, Any]] = []
  for kind, case, workload in _workloads(config, dataset, executors):
    workload.run(1)
    timed.append((workload, workloads.steps_that_take(workload, config.seconds)))
    described = {
      name: getattr(workload, name)
      for name in ('name', 'operations', 'temp_bytes', 'first_seconds')
    }
    rows.append({'kind': kind, 'case': case, **described, 'seconds': [], 'cpu_seconds': []})
    stop.check()
  roofline = workloads.Roofline(config.roofline_sizes)
  rates: dict[str, list[float]] = {product.name: [] for product in roofline.products}
  total = config.repeats * (len(timed) + 1)
  with messages.progress_bar(total, 'benchmark', unit='measurement') as progress:
    for _ in range(config.repeats):
      for name, rate in roofline.measure().items():
        rates[name].append(rate)
      progress.update()
      for (workload, steps), row in zip(timed, rows, strict=True):
        timing = workloads.time_steps(workload, steps)
        row['seconds'].append(timing.seconds)
        row['cpu_seconds'].append(timing.cpu_seconds)
        progress.update()
        stop.check()
  best = np.max(list(rates.values()), axis=0)
  for row in rows:
    if row['operations'] is not None:
      row['share'] = (row['operations'] / np.array(row['seconds']) / best).tolist()
  return rates, rows


def _worst_case(
  config: BenchmarkConfig, torch_process: Executor, stop: signals.StopSignal
) -> dict[str, dict[str, Any]]:
  """Returns what `worst_case.compare` does; nothing if that is not asked for."""
  if 'worst_case' not in config.sections:
    return {}
  budget = worst_case.Budget(
    config.num_examples, config.attack_radius, config.attack_steps, config.attack_queries
  )
  total = 2 * (config.repeats + 1)
  with messages.progress_bar(total, 'worst case', unit='attack') as progress:

    def after_each() -> None:
      progress.update()
      stop.check()

    return worst_case.compare(budget, config.repeats, torch_process, after_each)


def _startup(workdir: Path, repeats: int, stop: signals.StopSignal) -> dict[str, list[float]]:
  """Returns the seconds until a binary answers --help, and until a run has taken its first step."""
  seconds: dict[str, list[float]] = {}
  names = ('no cache', 'empty cache', 'warm cache')
  progress = messages.progress_bar(repeats * (len(_BINARIES) + len(names)), 'start', unit='start')
  with progress, tempfile.TemporaryDirectory(dir=workdir) as directory:
    for repeat in range(repeats):
      for binary in _BINARIES:
        began = time.perf_counter()
        shown = subprocess.run([*_command(binary), '--help'], capture_output=True, check=False)
        stop.check()  # Ctrl-C reaches the other process too
        if b'--workdir' not in shown.stdout:
          raise OSError(f'experiments.{binary} --help shows no flags')
        seconds.setdefault(f'{binary} --help', []).append(time.perf_counter() - began)
        progress.update()
      cache = f'--compilation_cache_dir={directory}/cache{repeat}'
      for name, flag in zip(names, ([], [cache], [cache]), strict=True):
        run = Path(directory) / f'{name}{repeat}'
        taken = _first_step(run, flag, stop)
        seconds.setdefault(f'first step, {name}', []).append(taken)
        progress.update()
        stop.check()
  return seconds


def _command(binary: str) -> list[str]:
  return [sys.executable, '-m', f'experiments.{binary}']


def _first_step(workdir: Path, extra: Sequence[str], stop: signals.StopSignal) -> float:
  """Returns the seconds until the metrics of the first training step are on disk."""
  flags = [f'--workdir={workdir}', '--num_steps=1', '--log_every=1', *extra]
  metrics, began = workdir / 'metrics.jsonl', time.perf_counter()
  with subprocess.Popen(
    [*_command('pretrain'), *flags], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
  ) as process:
    while not (metrics.exists() and metrics.stat().st_size):
      if process.poll() is not None:
        stop.check()
        raise OSError(f'experiments.pretrain ended with exit code {process.returncode}')
      time.sleep(0.005)
    seconds = time.perf_counter() - began
  return seconds


def _tables(result: dict[str, Any]) -> Iterator[str]:
  """Yields Markdown tables of the result's JSON."""
  rates, rows = result['roofline'], result['rows']
  best = np.max(list(rates.values()), axis=0) / 1e9
  yield f'Roofline: {_range(best)} GFLOP/s, on {result["cores"]} cores; ' + ', '.join(
    f'{name} {np.median(values) / 1e9:.0f}' for name, values in rates.items()
  )
  steps = {row['case']: row for row in rows if row['kind'] == 'step'}
  if steps:
    yield messages.markdown_table(_STEP_HEADER, map(_step, steps.values()))
  for kind, header in _COMPARED_HEADERS.items():
    if cells := [_compared(row, steps[row['case']]) for row in rows if row['kind'] == kind]:
      yield messages.markdown_table(header, cells)
  evaluated = [row for row in rows if row['kind'] == 'evaluation']
  if evaluated:
    thousands = result['config']['num_examples'] * _EVALUATION_STEPS / 1e3
    rates_of = ([row['name'], _range(thousands / np.array(row['seconds']))] for row in evaluated)
    yield messages.markdown_table(('attack', 'thousand images x steps a second'), rates_of)
  if result['worst_case']:
    count, sides = result['config']['num_examples'], result['worst_case']
    ours, *_ = sides.values()
    attacked = (_side(name, side, count, ours) for name, side in sides.items())
    yield messages.markdown_table(_WORST_CASE_HEADER, attacked)
  if result['startup']:
    yield messages.markdown_table(
      ('start', 's'), ([name, _range(taken)] for name, taken in result['startup'].items())
    )


def _step(row: dict[str, Any]) -> list[str]:
  seconds, operations = np.array(row['seconds']), row['operations']
  counted = ['', '', '']
  if operations is not None:
    rate = _range(operations / seconds / 1e9)
    counted = [f'{operations / 1e9:.3g}', rate, _percent(row['share'])]
  return [
    row['name'],
    _range(1e3 * seconds),
    _range(1e3 * np.array(row['cpu_seconds'])),
    *counted,
    '' if row['temp_bytes'] is None else f'{row["temp_bytes"] / 2**20:.1f}',
    f'{row["first_seconds"]:.1f}',
  ]


def _compared(row: dict[str, Any], step: dict[str, Any]) -> list[str]:
  """Returns the cells of a piece or a peer beside the step that it belongs to."""
  seconds = np.array(row['seconds'])
  ratio = seconds / np.array(step['seconds'])
  share = _percent(row['share']) if 'share' in row else ''
  if row['kind'] == 'piece':
    return [row['name'], _range(1e3 * seconds), _percent(ratio), share]
  cpu_seconds = np.array(row['cpu_seconds'])
  return [
    row['name'],
    _range(1e3 * seconds),
    _range(ratio),
    share,
    _range(1e3 * cpu_seconds),
    _range(cpu_seconds / np.array(step['cpu_seconds'])),
    f'{row["first_seconds"]:.1f}',
  ]


def _side(name: str, side: dict[str, Any], num_examples: int, ours: dict[str, Any]) -> list[str]:
  """Returns the cells of one side of the worst case."""
  seconds, cpu_seconds = np.array(side['seconds']), np.array(side['cpu_seconds'])
  return [
    name,
    _range(num_examples / seconds),
    _range(seconds / np.array(ours['seconds'])),
    _range(1e3 * cpu_seconds / num_examples),
    _range(cpu_seconds / np.array(ours['cpu_seconds'])),
    f'{side["accuracy"]:.3f}',
    f'{side["passes"]:.0f}',
    f'{side["first_batch"]:.1f}',
  ]


def _range(values: Any) -> str:
  """Returns the median, and the lowest to the highest."""
  median, low, high = (f'{value:#.3g}'.rstrip('.') for value in _summary(values))
  return f'{median} ({low} to {high})'


def _percent(values: Any) -> str:
  median, low, high = (f'{100.0 * value:.0f}' for value in _summary(values))
  return f'{median} % ({low} to {high})'


def _summary(values: Any) -> tuple[float, float, float]:
  return float(np.median(values)), float(np.min(values)), float(np.max(values))


if __name__ == '__main__':
  flags.define_flags(BenchmarkConfig)
  app.run(main)
