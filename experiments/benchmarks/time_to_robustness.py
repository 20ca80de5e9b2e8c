r"""What a robust encoder costs: the seconds from random weights to an attacked encoder.

  python -m experiments.benchmarks.time_to_robustness --workdir=runs/two_minutes

Trains a VAE, smooths its encoder, fits a linear probe and attacks it with every attack, as
`experiments.pretrain` (twice) and `experiments.probe` do, in one process. --vae, --smooth and
--probe hold their flags. Prints the seconds of each stage and the accuracies with their sanity
checks, and writes them to `time_to_robustness.json`. The runs are in `vae` and `smoothed` of the
work directory, which must be new: a stage that was finished before would take no time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import shlex
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypeVar

from etils import epy

from experiments import pretrain, probe, probe_settings
from experiments.cli import app, devices, flags, messages, provenance, signals, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import ArgumentError, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from experiments.visual import probe_results
  from se_vae.evaluation import linear_probe

Config = TypeVar('Config')

_VAE = '--objective=vae --obs_var=0.03 --num_steps=4000'
_SMOOTH = (
  '--objective=se --coupling=balanced --gamma=300 --obs_var=0.03 --ramp=0.5 --pgd_steps=2 '
  '--learning_rate=0.002 --freeze_decoder --num_steps=6000'
)
_PROBE = '--attack=worst_case --num_examples=1000 --radii=0,0.05,0.1,0.2'


@dataclasses.dataclass(frozen=True)
class RobustnessConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of everything that this binary writes; new.')
  dataset: str = setting('mnist', 'Data set of the encoder and of the probe.')
  data_dir: str | None = setting(None, 'Directory of the data, as in experiments.pretrain.')
  validation: bool = setting(
    False, 'Hold out a sixth of the training set and attack it in place of the test set.'
  )
  vae: str = setting(_VAE, 'Flags of pretrain for the VAE.')
  smooth: str = setting(_SMOOTH, 'Flags of pretrain for the smoothing of its encoder.')
  probe: str = setting(_PROBE, 'Flags of probe.')
  seed: int = setting(0, 'Seed of the training and of the attack.', at_least=0, at_most=2**31 - 1)
  num_devices: int | None = setting(
    None, 'Devices of the training, as in experiments.pretrain.', at_least=1, at_most=1024
  )


# Flags of probe that are for its files and its other curves.
_UNUSED = ('pretrained', 'output', 'dataset', 'cache_dir', 'surrogate', 'joint', 'moves', 'strict')


class Stopwatch:
  """Seconds of the stages of a program.

  Attributes:
    seconds: those of each stage that has ended, by name.
    cpu_seconds: the CPU seconds of all threads together, which depend less on what else the machine
      does.
  """

  def __init__(self) -> None:
    self.seconds: dict[str, float] = {}
    self.cpu_seconds: dict[str, float] = {}
    self._began, self._cpu_began = time.perf_counter(), time.process_time()

  def end(self, stage: str) -> None:
    """Ends a stage, which began where the one before ended; does nothing if it has ended."""
    if stage not in self.seconds:
      now, cpu_now = time.perf_counter(), time.process_time()
      self.seconds[stage], self._began = now - self._began, now
      self.cpu_seconds[stage], self._cpu_began = cpu_now - self._cpu_began, cpu_now


def main() -> None:
  """Entry point."""
  config = flags.from_flags(RobustnessConfig)
  with signals.StopSignal(saves=False).listening() as stop:
    result = run(config, stop)
  rows = _rows(result['seconds'], result['cpu_seconds'])
  print(messages.markdown_table(('stage', 'seconds', 'CPU seconds'), rows))
  print(probe_results.as_text(result))


def run(config: RobustnessConfig, stop: signals.StopSignal) -> dict[str, Any]:
  """Trains, probes and attacks; writes the result's JSON, and returns it.

  Raises:
    ArgumentError: for wrong settings, or a work directory that is not new.
    Interrupted: when `stop` says so; nothing is kept.
  """
  watch = Stopwatch()
  validate(config)
  workdir = workdirs.check_workdir(config.workdir)
  vae_dir, smoothed_dir = workdir / 'vae', workdir / 'smoothed'
  if vae_dir.exists() or smoothed_dir.exists():
    raise ArgumentError('workdir', f'{workdir} must be new: what is there would take no time')
  of_all: dict[str, Any] = {'data_dir': config.data_dir, 'seed': config.seed}
  of_training: dict[str, Any] = of_all | {
    'dataset': config.dataset,
    'validation': config.validation,
    'num_devices': config.num_devices,
  }
  vae = _parse(pretrain.PretrainConfig, 'vae', config.vae, of_training | {'workdir': vae_dir})
  of_smoothed = {'workdir': smoothed_dir}
  given = of_training | of_smoothed | {'init_from': vae_dir}
  smooth = _parse(pretrain.PretrainConfig, 'smooth', config.smooth, given)
  attack = _parse(probe_settings.ProbeConfig, 'probe', config.probe, of_all | of_smoothed)
  for name in probe_settings.given(attack, _UNUSED):
    raise UsageError(f'--probe: --{name} cannot be used here')
  if (vae.model, vae.data) != (smooth.model, smooth.data):
    raise UsageError('--smooth: networks and data must be those of --vae')

  devices.use_all_cores(max(vae.batch_size, attack.batch_size), config.num_devices)
  dataset = pretrain.prepare(vae)
  with flags.errors_begin_with('--smooth'):
    pretrain.check_batch_size(smooth.batch_size, dataset)
  with flags.errors_begin_with('--probe'):
    probe.check_fits(attack, dataset, smooth.model)
  watch.end('imports and data')
  with workdirs.lock(workdir, 'time_to_robustness.*'), _nothing_kept(vae_dir, smoothed_dir):
    pretrain.run(vae, stop, 'VAE')
    watch.end('VAE')
    pretrain.run(smooth, stop, 'smoothing')
    watch.end('smoothing')
    prepared = probe.prepare(attack)
    means = probe.train_means(prepared, prepared.model, prepared.params)
    fitted = probe.fit(attack, prepared, means)
    watch.end('probe')

    def progress(done: int, total: int) -> None:
      if done == total:  # what follows are checks
        watch.end('attack')
      stop.check()

    outcome = probe.evaluate(
      attack,
      prepared.mesh,
      linear_probe.ProbedEncoder(prepared.model),
      prepared.images,
      prepared.labels,
      args=(prepared.params, fitted),
      reconstruct_fn=linear_probe.Reconstruction(prepared.model),
      progress=progress,
    )
    if attack.check_examples:
      watch.end('checks')
    result = {
      **probe_results.claim(attack.task, outcome),
      'seconds': watch.seconds,
      'cpu_seconds': watch.cpu_seconds,
      'config': flags.to_dict(config),
      'evaluation': outcome.config,
      'pretraining': prepared.metadata['config'],
      'checkpoint': prepared.checkpoint,
      'data': prepared.dataset.provenance(),
      'versions': devices.versions(),
      'commit': provenance.commit(),
      'devices': devices.device_kinds(),
      'cores': devices.num_cores(),
    }
    workdirs.write_json(workdir / 'time_to_robustness.json', result)
  return result


@contextlib.contextmanager
def _nothing_kept(*directories: Path) -> Iterator[None]:
  """Removes directories after an error or an interruption, so that the command can start again."""
  try:
    yield
  except BaseException:
    for directory in directories:
      shutil.rmtree(directory, ignore_errors=True)
    raise


def _parse(config_type: type[Config], flag: str, text: str, given: dict[str, Any]) -> Config:
  """Returns the settings of another binary from the flags in a text, and those that are given.

  Raises:
    UsageError: for a flag that is wrong, or given too.
  """
  with flags.errors_begin_with(f'--{flag}'):
    given_words = shlex.split(text)
  names = {word.lstrip('-').partition('=')[0].removeprefix('no') for word in given_words}
  if taken := sorted(names & given.keys()):
    raise UsageError(f'--{flag}: --{taken[0]} is set by this binary')
  values = {name: value for name, value in given.items() if value is not None}
  words = [f'--{name}={value}' for name, value in values.items()]
  return flags.parse(config_type, shlex.join([*given_words, *words]), f'--{flag}')


def _rows(*columns: dict[str, float]) -> Iterator[list[str]]:
  """Yields each stage with its entries, then the sums up to the end of the training and of all."""
  stages, trained = list(columns[0]), ('imports and data', 'VAE', 'smoothing')
  groups = {stage: [stage] for stage in stages}
  groups |= {'until the encoder is trained': list(trained), 'all': stages}
  for name, group in groups.items():
    yield [name, *(f'{sum(column[stage] for stage in group):.1f}' for column in columns)]


if __name__ == '__main__':
  flags.define_flags(RobustnessConfig)
  app.run(main)
