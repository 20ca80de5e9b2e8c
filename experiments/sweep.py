r"""Pretrains, probes and attacks an encoder for every combination of some settings.

  python -m experiments.sweep --workdir=runs/gamma --vary='gamma=0.3,1,3 seed=0,1' --num_steps=4000

All flags of `experiments.pretrain` are flags of this binary too, and hold for every variant;
--probe holds flags of `experiments.probe`. Writes a directory for each variant, and sweep.json,
sweep.csv, sweep.md and sweep.png with all of them to --workdir. Every curve stands beside the
summary of its sanity checks. Finished variants are not repeated.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from etils import epy

from experiments import pretrain, probe, probe_settings, records
from experiments.cli import app, devices, flags, messages, signals, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import numpy as np

  from experiments.visual import plots
  from se_vae.storage import atomic_files

# Settings that the variants of a sweep share.
_SHARED = ('workdir', 'data_dir', 'cache_dir')

_CAPTION = (
  'Means over the seeds: the ELBO of held-out images, in nats, their squared error, the number of '
  'active latents, and the adversarial accuracy at each l-inf radius'
)


@dataclasses.dataclass(frozen=True)
class SweepConfig:
  """The flags of this binary, beside those of `experiments.pretrain`."""

  vary: str | None = setting(
    None, "Settings of pretrain and their values: 'gamma=0.3,1,3 seed=0,1' makes six variants."
  )
  probe: str = setting('', "Flags of probe, for every variant: '--attack=worst_case --restarts=3'.")


@dataclasses.dataclass(frozen=True)
class Variant:
  """One encoder of a sweep.

  Attributes:
    varied: the settings that vary, with this encoder's values.
    pretraining: all settings of its training.
    attack: the settings of its probe and of the attack on it.
  """

  varied: dict[str, Any]
  pretraining: pretrain.PretrainConfig
  attack: probe_settings.ProbeConfig


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
  """Runs every variant that is not finished, and writes the tables; returns the JSON's content.

  Raises:
    ArgumentError: for wrong settings, before anything is compiled or written.
    Interrupted: when `stop` has a signal, after a checkpoint.
  """
  validate(config)
  workdir = workdirs.check_workdir(base.workdir, workdirs.SWEEP)
  variants = list(variants_of(config, base, workdir))
  for each in variants:
    dataset = pretrain.prepare(each.pretraining)
    with flags.errors_begin_with('--probe'):
      probe.check_fits(each.attack, dataset, each.pretraining.model)
  with workdirs.lock(workdir, 'sweep.*') as check_place:
    content: dict[str, Any] = {
      'config': {'sweep': flags.to_dict(config), 'pretraining': flags.to_dict(base)},
      'versions': devices.versions(),
      'devices': devices.device_kinds(),
    }
    path = workdir / 'sweep.json'
    before = workdirs.read_json(path, records.Sweep)
    known = before['results'] if before is not None else []
    seconds = {str(result['varied']): result['seconds'] for result in known}
    results: list[dict[str, Any]] = []
    for number, each in enumerate(variants, start=1):
      name = f'[{number}/{len(variants)}] {_label(each.varied)}'
      check_place()  # raises if the directory has vanished, which the variant would make anew
      started, fresh = time.monotonic(), not Path(str(each.pretraining.workdir)).exists()
      encoder = pretrain.run(each.pretraining, stop, name)
      attacked = probe.run(each.attack, stop, f'{name}, attack on {each.attack.task}')
      if fresh:
        seconds[str(each.varied)] = time.monotonic() - started
      results.append(
        {
          'varied': each.varied,
          'objective': each.pretraining.train.objective,
          'held_out': encoder['test'],
          'seconds': seconds.get(str(each.varied)),  # None for a variant that was interrupted
          **attacked,
          'checks_summary': plots.checks_summary(attacked),
        }
      )
      workdirs.write_json(path, {**content, 'results': results})
    groups = list(_over_seeds(results))
    with atomic_files.replacing(workdir / 'sweep.png') as file:
      plots.save(file, [(f'{results[0]["task"]} probe', [curve for _, curve in groups])])
    workdirs.write_csv(workdir / 'sweep.csv', _table(groups, with_intervals=True))
    header, *rows = (map(_cell, row) for row in _table(groups, with_intervals=False))
    text = f'{_CAPTION}\n\n{messages.markdown_table(header, rows)}'
    atomic_files.write(workdir / 'sweep.md', f'{text}\n'.encode())
    print(f'{text}\n{plots.checks_summary(*results)}')
    return {**content, 'results': results}


def variants_of(
  config: SweepConfig, base: pretrain.PretrainConfig, workdir: Path
) -> Iterator[Variant]:
  """Every combination of the values in --vary; the last setting varies fastest.

  Raises:
    UsageError: for flags that do not exist or cannot have such a value.
  """
  attack = probe_settings.parse(config.probe)
  cache_dir = base.data.cache_dir or str(workdir.absolute() / 'data')
  varied = _parse(config.vary)
  for values in itertools.product(*varied.values()):
    own = dict(zip(varied, values, strict=True))
    directory = str(workdir / directory_name(own))
    with flags.errors_begin_with('--vary'):
      pretraining = flags.replace(base, **own, workdir=directory, cache_dir=cache_dir)
    places: dict[str, Any] = {
      'workdir': directory,
      'data_dir': base.data.data_dir,
      'cache_dir': cache_dir,
    }
    yield Variant(own, pretraining, dataclasses.replace(attack, **places))


def directory_name(varied: dict[str, Any]) -> str:
  """Returns the name of a variant's directory: one part of a path, another for other values.

  A name that could be anything else is shortened to what is safe, with a digest of the values.
  """
  name = '_'.join(f'{setting}{value}' for setting, value in varied.items())
  ambiguous = any(f'_{setting}' in str(value) for setting in varied for value in varied.values())
  if re.fullmatch(r'[\w.:+-]{1,200}', name, re.ASCII) and not ambiguous:
    return name
  safe = re.sub(r'[^\w.:+-]+', '-', name, flags=re.ASCII)[:200]
  return f'{safe}~{hashlib.sha256(json.dumps(varied).encode()).hexdigest()[:12]}'


def _parse(vary: str | None) -> dict[str, tuple[Any, ...]]:
  """The settings that vary, each with its values, parsed as flags of pretrain."""
  if not vary:
    raise UsageError("--vary: is required: settings and their values, such as 'gamma=0.3,1,3'")
  known = flags.names(pretrain.PretrainConfig)
  found = {}
  for item in vary.split():
    name, _, values = item.partition('=')
    if name in _SHARED or name not in known:
      raise UsageError(f'--vary: {name!r} is no setting of pretrain that can vary')
    if name in found:
      raise UsageError(f'--vary: {name} is there twice')
    with flags.errors_begin_with('--vary'):
      parsed = tuple(
        flags.parse_values(pretrain.PretrainConfig, [f'--{name}={value}'])[name]
        for value in values.split(',')
      )
    if len(set(parsed)) < len(parsed):
      raise UsageError(f'--vary: a value of {name} is there twice')
    found[name] = parsed
  return found


def _over_seeds(results: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], plots.Curve]]:
  """The varied settings but the seed, each with the curve of the variants that share them."""
  groups: dict[tuple[Any, ...], list[dict[str, Any]]] = {}
  for result in results:
    key = tuple((name, value) for name, value in result['varied'].items() if name != 'seed')
    groups.setdefault(key, []).append(result)
  for key, members in groups.items():
    variant = _label({name: value for name, value in key if name != 'objective'})
    yield dict(key), plots.Curve(members[0]['objective'], members, variant)


def _table(
  groups: list[tuple[dict[str, Any], plots.Curve]], *, with_intervals: bool
) -> Iterator[tuple[Any, ...]]:
  """A row for each group, the header first: means over the seeds, and the summary of the checks."""
  own, curve = groups[0]
  figures = ('elbo', 'squared_error', 'active_latents')
  radii = [f'{radius:g}' for radius in curve.radii]
  ends = [f'{end} at {radius}' for radius in radii for end in ('low', 'high') if with_intervals]
  yield (*own, 'seeds', *figures, *(f'at {radius}' for radius in radii), *ends, 'checks')
  for own, curve in groups:
    held_out = (np.mean([result['held_out'][name] for result in curve.results]) for name in figures)
    intervals = curve.interval.ravel() if with_intervals else ()
    yield (
      *own.values(),
      len(curve.results),
      *(f'{value:.1f}' for value in held_out),
      *(f'{value:.3f}' for value in (*curve.accuracy, *intervals)),
      curve.checks,
    )


def _cell(value: Any) -> str:
  return f'{value:g}' if isinstance(value, float) else str(value)


def _label(varied: dict[str, Any]) -> str:
  return ', '.join(f'{name} {_cell(value)}' for name, value in varied.items())


if __name__ == '__main__':
  flags.define_flags(SweepConfig)
  flags.define_flags(pretrain.PretrainConfig)
  app.run(main)
