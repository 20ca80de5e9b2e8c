r"""Pretrains, probes and attacks an encoder for every combination of some settings.

  python -m experiments.sweep --workdir=runs/gamma --vary='gamma=0.3,1,3 seed=0,1' --num_steps=4000

All flags of `experiments.pretrain` are here too, and hold for every run; --probe has those of
`experiments.probe`. Leaves a directory for each run, and sweep.json, sweep.csv, sweep.md and
sweep.png with all of them in --workdir. Runs that are finished are not repeated.
"""

from __future__ import annotations

import dataclasses
import itertools
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epy

from experiments import pipeline, pretrain, probe
from experiments.cli import app, devices, flags, messages, signals, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  from experiments.visual import plots
  from se_vae.storage import atomic_files

# What a sweep says for all of its runs.
_SHARED = ('workdir', 'data_dir', 'cache_dir')


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """The flags of this binary, beside those of `experiments.pretrain`."""

  vary: str | None = setting(
    None, "Settings of pretrain and their values: 'gamma=0.3,1,3 seed=0,1' makes six runs."
  )
  probe: str = setting('', "Flags of probe, for every run: '--attack=worst_case --restarts=3'.")


@dataclasses.dataclass(frozen=True)
class Run:
  """One encoder.

  Attributes:
    varied: its own settings.
    pretraining: all of them.
    attack: what attacks it.
  """

  varied: dict[str, Any]
  pretraining: pretrain.PretrainConfig
  attack: probe.ProbeConfig


def main() -> None:
  """Entry point."""
  config = flags.from_flags(SweepConfig)
  base = flags.from_flags(pretrain.PretrainConfig)
  devices.use_all_cores(base.batch_size, base.num_devices)
  with signals.StopSignal().listening() as stop:
    run(config, base, stop)


def run(
  config: SweepConfig, base: pretrain.PretrainConfig, stop: signals.StopSignal
) -> dict[str, Any]:
  """Runs what is not finished, and writes the tables; returns the JSON.

  Raises:
    UsageError: for settings that are wrong, before anything is compiled or written.
    Interrupted: when `stop` says so, after a checkpoint.
  """
  validate(config)
  workdir = workdirs.check_workdir(base.workdir)
  runs = list(runs_of(config, base, workdir))
  for each in runs:
    probe.check_fits(each.attack, pretrain.prepare(each.pretraining))
  with workdirs.lock(workdir, 'sweep.*') as check_place:
    return _run(config, base, workdir, runs, stop, check_place)


def _run(
  config: SweepConfig,
  base: pretrain.PretrainConfig,
  workdir: Path,
  runs: list[Run],
  stop: signals.StopSignal,
  check_place: Callable[[], None],
) -> dict[str, Any]:
  content: dict[str, Any] = {
    'config': {'sweep': flags.to_dict(config), 'pretraining': flags.to_dict(base)},
    'versions': devices.versions(),
    'devices': devices.device_kinds(),
  }
  path = workdir / 'sweep.json'
  before = workdirs.read_json(path, 'results') or {'results': []}
  seconds = {str(result['varied']): result['seconds'] for result in before['results']}
  results: list[dict[str, Any]] = []
  for number, each in enumerate(runs, start=1):
    name = f'[{number}/{len(runs)}] {_label(each.varied)}'
    check_place()  # a run would make it anew
    started, fresh = time.monotonic(), not Path(str(each.pretraining.workdir)).exists()
    encoder, (attacked,) = pipeline.run(each.pretraining, (each.attack,), stop, name)
    if fresh:
      seconds[str(each.varied)] = time.monotonic() - started
    results.append(
      {
        'varied': each.varied,
        'objective': each.pretraining.train.objective,
        'held_out': encoder['test'],
        'seconds': seconds.get(str(each.varied)),  # not known of a run that was interrupted
        **attacked,
      }
    )
    workdirs.write_json(path, {**content, 'results': results})
  groups = list(_over_seeds(results))
  with atomic_files.replacing(workdir / 'sweep.png') as file:
    plots.save(file, [(f'{results[0]["task"]} probe', [curve for _, curve, _ in groups])])
  rows = list(_table(groups))
  workdirs.write_csv(workdir / 'sweep.csv', rows)
  header, *cells = (map(_cell, row) for row in rows)
  text = messages.markdown_table(header, cells)
  atomic_files.write(workdir / 'sweep.md', f'{text}\n'.encode())
  print(text)
  return {**content, 'results': results}


def runs_of(config: SweepConfig, base: pretrain.PretrainConfig, workdir: Path) -> Iterator[Run]:
  """Every combination, the last setting varying fastest.

  Raises:
    UsageError: for flags that do not exist or cannot have such a value.
  """
  attack = probe.parse(config.probe)
  varied = _parse(config.vary)
  for values in itertools.product(*varied.values()):
    own = dict(zip(varied, values, strict=True))
    directory = str(workdir / '_'.join(f'{name}{value}' for name, value in own.items()))
    yield Run(
      own,
      flags.replace(
        base,
        **own,
        workdir=directory,
        cache_dir=base.data.cache_dir or str(workdir / 'data'),
      ),
      dataclasses.replace(attack, workdir=directory),
    )


def _parse(vary: str | None) -> dict[str, tuple[Any, ...]]:
  """The settings that vary, each with its values, parsed as flags of pretrain are."""
  if not vary:
    raise UsageError("--vary: is required: settings and their values, such as 'gamma=0.3,1,3'")
  found = {}
  for item in vary.split():
    name, _, values = item.partition('=')
    if name in _SHARED or name not in _names():
      raise UsageError(f'--vary: {name!r} is no setting of pretrain that can vary')
    if name in found:
      raise UsageError(f'--vary: {name} is there twice')
    parsed = tuple(
      flags.parse_value(pretrain.PretrainConfig, name, value, '--vary')
      for value in values.split(',')
    )
    if len(set(parsed)) < len(parsed):
      raise UsageError(f'--vary: a value of {name} is there twice')
    found[name] = parsed
  return found


def _names() -> set[str]:
  return {*flags.names(pretrain.PretrainConfig)}


def _over_seeds(
  results: list[dict[str, Any]],
) -> Iterator[tuple[dict[str, Any], plots.Curve, list[dict[str, Any]]]]:
  """Settings, curve and results of the runs that differ in nothing but the seed."""
  groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
  for result in results:
    key = tuple((name, value) for name, value in result['varied'].items() if name != 'seed')
    groups.setdefault(key, []).append(result)
  for key, members in groups.items():
    own = dict(key)
    variant = _label({name: value for name, value in own.items() if name != 'objective'})
    yield own, plots.Curve(members[0]['objective'], members, variant), members


def _table(
  groups: list[tuple[dict[str, Any], plots.Curve, list[dict[str, Any]]]],
) -> Iterator[tuple[Any, ...]]:
  """A row for each group, the header first: means over the seeds."""
  own, curve, _ = groups[0]
  figures = ('elbo', 'squared_error', 'active_latents')
  yield (*own, 'seeds', *figures, *(f'at {radius:g}' for radius in curve.radii))
  for own, curve, members in groups:
    held_out = (sum(m['held_out'][f] for m in members) / len(members) for f in figures)
    yield (
      *own.values(),
      len(members),
      *(f'{value:.1f}' for value in held_out),
      *(f'{value:.3f}' for value in curve.accuracy),
    )


def _cell(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _label(varied: dict[str, Any]) -> str:
  return ', '.join(f'{name} {_cell(value)}' for name, value in varied.items())


if __name__ == '__main__':
  flags.define_flags(SweepConfig)
  flags.define_flags(pretrain.PretrainConfig)
  app.run(main)
