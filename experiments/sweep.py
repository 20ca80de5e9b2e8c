r"""Pretrains, probes and attacks an encoder for every combination of some settings.

  python -m experiments.sweep --workdir=runs/gamma --vary='gamma=0.3,1,3 seed=0,1' --num_steps=4000

All flags of `experiments.pretrain` are flags of this binary too, and hold for every variant;
--probe holds flags of `experiments.probe`. Writes a directory for each variant, and sweep.json,
sweep.csv, sweep.md and sweep.png with all of them to --workdir. Every curve stands beside the
summary of its sanity checks. Finished variants are not repeated.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import itertools
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from etils import epy

from experiments import population, pretrain, probe_settings, recording, records
from experiments.cli import app, devices, flags, messages, signals, workdirs
from experiments.cli.flags import UsageError
from experiments.scheduling import jobs, placement
from se_vae.config import ArgumentError, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import numpy as np

  from experiments.visual import plots
  from se_vae.storage import atomic_files

_PLACES = frozenset({*flags.PLACES, 'num_devices'})
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
  shard: str | None = setting(
    None, "'i/n', for job arrays: run only variants i, i + n, i + 2n and so on; the first i is 0."
  )
  vectorize: bool = setting(
    False,
    'Train all variants at once in one program, as a population. --vary may then name the seed and '
    'the numbers that a compiled step takes. The attacks run afterwards, as without it.',
  )
  placement: placement.PlacementConfig = dataclasses.field(
    default_factory=placement.PlacementConfig
  )


@dataclasses.dataclass(frozen=True)
class Variant:
  """One encoder of a sweep.

  Attributes:
    varied: the settings that vary, with this encoder's values.
    job: its training and the attack on it.
  """

  varied: dict[str, Any]
  job: jobs.Job


def main() -> None:
  """Entry point."""
  config = flags.from_flags(SweepConfig)
  base = flags.from_flags(pretrain.PretrainConfig)
  placement.use_cpu_alone_beside_slots(config.placement)
  # Each member of a population has a device of its own, however small its batch.
  examples = base.batch_size * (devices.num_cores() if config.vectorize else 1)
  asked = [base.num_devices, *_parse(config.vary).get('num_devices', ())]
  devices.use_all_cores(examples, max(filter(None, asked), default=None))
  with signals.StopSignal().listening() as stop:
    run(config, base, stop)


def run(
  config: SweepConfig, base: pretrain.PretrainConfig, stop: signals.StopSignal
) -> dict[str, Any]:
  """Runs every variant that is not finished, and writes the tables; returns the JSON's content.

  Several processes, on one host or on many, may run the same sweep: each takes the variants that
  no other one works on, and all write the same tables.

  Raises:
    ArgumentError: for wrong settings, before anything is compiled or written.
    Interrupted: when `stop` has a signal, after a checkpoint of every run.
    RunsFailedError: if variants failed, after all others.
  """
  validate(config)
  workdir = workdirs.check_directory('workdir', base.workdir)
  workdirs.check_owner('workdir', workdir, workdirs.SWEEP)
  variants = list(variants_of(config, base, workdir))
  mine = [each.job for each in _shard(variants, config.shard)]
  for each in variants:
    each.job.check(attacks_flag='--probe')
  if config.vectorize and mine:  # a shard may be empty
    with flags.errors_begin_with('--vectorize'):
      population.check_fit_together([job.pretraining for job in mine])
  tables = _Tables(config, base, workdir, variants)
  try:
    if config.vectorize:
      _train_together(mine, config, workdir, stop)
    placement.run_all(mine, config.placement, workdir, stop, tables.add)
  except app.RunsFailedError:
    tables.finish()
    raise
  return tables.finish()


def _train_together(
  mine: list[jobs.Job], config: SweepConfig, workdir: Path, stop: signals.StopSignal
) -> None:
  """Trains all encoders that are not finished as one population.

  A member that fails does not stop the others, and fails again as a run of its own.
  """
  members = tuple(job.pretraining for job in mine if pretrain.finished(job.pretraining) is None)
  if len(members) > 1:
    name = f'population of {len(members)}'
    with contextlib.suppress(app.RunsFailedError):
      placement.run_all(
        [jobs.PopulationJob(name, members, workdir)],
        config.placement,
        workdir,
        stop,
        lambda job, outcome: None,
      )


def _result(variant: Variant, outcome: jobs.Outcome) -> dict[str, Any]:
  """What sweep.json says of a variant that is finished."""
  assert outcome.encoder is not None
  (attacked,) = outcome.attacked
  return {
    'varied': variant.varied,
    'objective': variant.job.pretraining.train.objective,
    'held_out': outcome.encoder['test'],
    'seconds': outcome.seconds,
    **attacked,
    'checks_summary': plots.checks_summary(attacked),
  }


class _Tables:
  """The files of the sweep as a whole, which several processes may write in turns."""

  def __init__(
    self,
    config: SweepConfig,
    base: pretrain.PretrainConfig,
    workdir: Path,
    variants: list[Variant],
  ) -> None:
    self._variants = {each.job.name: each for each in variants}
    self._workdir = workdir
    self._content: dict[str, Any] = {
      'config': {
        'sweep': {'vary': config.vary, 'probe': config.probe},
        'pretraining': flags.to_dict(base),
      },
      'versions': devices.versions(),
    }
    self._results: dict[str, dict[str, Any]] = {}

  def add(self, job: jobs.Job, outcome: jobs.Outcome) -> None:
    """Puts a variant that is finished into sweep.json, beside those of other processes."""
    if outcome.encoder is None:
      return
    self._results[job.name] = _result(self._variants[job.name], outcome)
    with self._lock():
      self._write(keep_others=True)

  def finish(self) -> dict[str, Any]:
    """Writes all tables, with every variant that is finished, whoever did it."""
    with self._lock():  # what others finish meanwhile, they add afterwards
      for name, each in self._variants.items():
        if name not in self._results and (outcome := each.job.finished()) is not None:
          self._results[name] = _result(each, outcome)
      content = self._write(keep_others=False)
      if self._results:
        self._write_tables(content['results'])
    missing = len(self._variants) - len(self._results)
    if missing:
      print(f'{missing} of {len(self._variants)} variants are not finished, and not in the tables')
    return content

  def _lock(self) -> contextlib.AbstractContextManager[Any]:
    return workdirs.lock(self._workdir, 'sweep.*', wait=True)

  def _write(self, *, keep_others: bool) -> dict[str, Any]:
    """Writes sweep.json, and returns its content; `keep_others` keeps variants of the file too."""
    path = self._workdir / 'sweep.json'
    before = workdirs.read_json(path, records.Sweep)
    known = {}
    if before is not None and _compared(before) == _compared(self._content):
      known = {str(result['varied']): result for result in before['results']}
    results = []
    for name, each in self._variants.items():
      old, own = known.get(str(each.varied)), self._results.get(name)
      if own is not None:
        # Who did a variant all at once knows how long that takes, and wrote it into the file.
        seconds = own['seconds'] or (old and old['seconds'])
        results.append({**own, 'seconds': seconds})
      elif old is not None and keep_others:
        results.append(dict(old))
    kinds = sorted({kind for result in results for kind in result['devices']})
    content = {**self._content, 'devices': kinds, 'results': results}
    workdirs.write_json(path, content)
    return content

  def _write_tables(self, results: list[dict[str, Any]]) -> None:
    groups = list(_grouped(results))
    (attack,) = next(iter(self._variants.values())).job.attacks  # the same for all of them
    task = plots.task_name(attack.task, attack.labels_per_class)
    with atomic_files.replacing(self._workdir / 'sweep.png') as file:
      plots.save(file, [(f'{task} probe', [curve for _, curve in groups])])
    workdirs.write_csv(self._workdir / 'sweep.csv', _table(groups, with_intervals=True))
    header, *rows = (map(_cell, row) for row in _table(groups, with_intervals=False))
    text = f'{_CAPTION}\n\n{messages.markdown_table(header, rows)}'
    atomic_files.write(self._workdir / 'sweep.md', f'{text}\n'.encode())
    print(f'{text}\n{plots.checks_summary(*results)}')


def _compared(content: Mapping[str, Any]) -> Any:
  """The settings in sweep.json, without places, which hosts may name in their own ways."""
  config = dict(content.get('config') or {})
  if isinstance(pretraining := config.get('pretraining'), dict):
    config['pretraining'] = {k: v for k, v in pretraining.items() if k not in _PLACES}
  return config


def variants_of(
  config: SweepConfig, base: pretrain.PretrainConfig, workdir: Path
) -> Iterator[Variant]:
  """Every combination of the values in --vary; the last setting varies fastest.

  Raises:
    UsageError: for flags that do not exist or cannot have such a value.
  """
  attack = probe_settings.parse(config.probe, unused=('strict',))
  cache_dir = base.data.cache_dir or str(workdir.absolute() / 'data')
  varied = _parse(config.vary)
  for values in itertools.product(*varied.values()):
    own = dict(zip(varied, values, strict=True))
    directory = str(workdir / directory_name(own))
    with flags.errors_begin_with('--vary'):
      given = flags.absolute(own)  # a name keeps the values as they were typed
      pretraining = flags.replace(base, **given, workdir=directory, cache_dir=cache_dir)
    places: dict[str, Any] = {
      'workdir': directory,
      'data_dir': base.data.data_dir,
      'cache_dir': cache_dir,
    }
    job = jobs.Job(_label(own), pretraining, (dataclasses.replace(attack, **places),))
    yield Variant(own, job)


def _shard(variants: list[Variant], shard: str | None) -> list[Variant]:
  """The variants of a shard 'i/n'; all of them if it is None."""
  if shard is None:
    return variants
  found = re.fullmatch(r'(\d{1,6})/(\d{1,6})', shard, re.ASCII)
  index, count = (int(number) for number in found.groups()) if found else (0, 0)
  if not index < count:
    raise ArgumentError('shard', f"must be 'i/n' with 0 <= i < n, got {shard!r}")
  return variants[index::count]


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
    if name in flags.PLACES or name not in known:
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


def _grouped(results: list[dict[str, Any]]) -> Iterator[tuple[dict[str, Any], plots.Curve]]:
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
    measured = [
      recording.meaningful(result['objective'], result['held_out']) for result in curve.results
    ]
    held_out = (np.mean([each.get(name, np.nan) for each in measured]) for name in figures)
    intervals = curve.interval.ravel() if with_intervals else ()
    yield (
      *own.values(),
      len(curve.results),
      *('-' if np.isnan(value) else f'{value:.1f}' for value in held_out),
      *(f'{value:.3f}' for value in (*curve.accuracy, *intervals)),
      curve.checks,
    )


def _cell(value: Any) -> str:
  short = f'{value:g}' if isinstance(value, float) else ''
  return short if short and float(short) == value else str(value)  # another text for other values


def _label(varied: dict[str, Any]) -> str:
  return ', '.join(f'{name} {_cell(value)}' for name, value in varied.items())


if __name__ == '__main__':
  flags.define_flags(SweepConfig)
  flags.define_flags(pretrain.PretrainConfig)
  app.run(main)
