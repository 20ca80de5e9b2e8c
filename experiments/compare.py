r"""Compares attacked encoders: a table, and their robust accuracy against clean accuracy and ELBO.

  python -m experiments.compare --runs=runs/sweep/seed0,runs/sweep/seed1 --output=runs/compared

Each directory of --runs holds runs of experiments.pretrain with the results of experiments.probe in
them. Runs of one name in several directories are seeds of one encoder, and are averaged. Writes
compare.md, compare.csv and compare.png to --output.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from etils import epy

from experiments import identity, pretrain, probe_settings, recording, records
from experiments.cli import app, flags, messages, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import numpy as np

  from experiments.visual import pareto, plots
  from se_vae.storage import atomic_files, json_files

# Settings of a probe that leave its curve as it is.
_WITHOUT_EFFECT = {'certify': False, 'check_examples': None, 'joint': None, 'moves': None}
_HELD_OUT = ('elbo', 'squared_error', 'active_latents')


@dataclasses.dataclass(frozen=True)
class CompareConfig:
  """The flags of this binary."""

  runs: tuple[str, ...] | None = setting(
    None, 'Directories of runs. Runs of one name in several of them are seeds of one encoder.'
  )
  probe: str = setting(
    'digit', "Which result of probe: its file is probe_NAME.json, as in 'digit_worst_case'."
  )
  radius: float = setting(0.1, 'Radius of the accuracy in the figure.', at_least=0)
  output: str | None = setting(None, 'Directory of the table and the figure.')


@dataclasses.dataclass(frozen=True)
class Encoder:
  """One encoder, from one run a seed.

  Attributes:
    name: of its directories.
    probes: the results of probe, at the same radii.
    held_out: the figures of held-out images that pretrain measured.
  """

  name: str
  probes: Sequence[dict[str, Any]]
  held_out: Sequence[dict[str, float]]

  @property
  def certified(self) -> np.ndarray | None:
    """Certified accuracy `[seeds, R]`; None unless every seed has it."""
    found = [probe['certified']['accuracy'] for probe in self.probes if 'certified' in probe]
    return np.array(found) if len(found) == len(self.probes) else None

  @property
  def accuracy(self) -> np.ndarray:
    """Adversarial accuracy `[seeds, R]`."""
    return np.array([probe['accuracy'] for probe in self.probes])

  def mean(self, name: str) -> float:
    """A figure of held-out images, averaged over the seeds."""
    return float(np.mean([figures[name] for figures in self.held_out]))


def main() -> None:
  """Entry point."""
  run(flags.from_flags(CompareConfig))


def run(config: CompareConfig) -> list[Encoder]:
  """Writes the table and the figure, prints the table, and returns the encoders.

  Raises:
    UsageError: for a wrong flag, or where there is nothing to compare, before anything is written.
  """
  validate(config)
  encoders = list(_encoders(config))
  radii = encoders[0].probes[0]['radii']
  if config.radius not in radii:
    raise UsageError(f'--radius: must be one of {", ".join(map(str, radii))}, got {config.radius}')
  if 0.0 not in radii:
    raise UsageError('--probe: the figure needs clean accuracy, so the radii of probe must have 0')
  if not config.output:
    raise UsageError('--output: is required: the directory of the table and the figure')
  output = workdirs.check_directory('output', config.output)
  output.mkdir(parents=True, exist_ok=True)
  clean, at = radii.index(0.0), radii.index(config.radius)
  points = [
    pareto.Point(
      each.name,
      clean=float(each.accuracy[:, clean].mean()),
      elbo=each.mean('elbo'),
      robust=float(each.accuracy[:, at].mean()),
      lowest=float(each.accuracy[:, at].min()),
      highest=float(each.accuracy[:, at].max()),
    )
    for each in encoders
  ]
  with atomic_files.replacing(output / 'compare.png') as file:
    summary = plots.checks_summary(*(probe for each in encoders for probe in each.probes))
    pareto.save(file, points, f'accuracy at radius {config.radius:g}', summary)
  header, *rows = _table(encoders, radii)
  text = messages.markdown_table(header, rows)
  atomic_files.write(output / 'compare.md', f'{text}\n'.encode())
  workdirs.write_csv(output / 'compare.csv', [header, *rows])
  print(text)
  return encoders


def _encoders(config: CompareConfig) -> Iterator[Encoder]:
  """The encoders in the order of their names."""
  if not config.runs:
    raise UsageError('--runs: is required: directories with runs of pretrain that were probed')
  file = f'probe_{config.probe}.json'
  found: dict[str, list[Path]] = {}
  for name in config.runs:
    if not Path(name).is_dir():
      raise UsageError(f'--runs: {name} is not a directory')
    for path in sorted(Path(name).iterdir()):
      if (path / file).exists() and (path / recording.RESULT).exists():
        found.setdefault(path.name, []).append(path)
  if not found:
    raise UsageError(f'--runs: no run in {", ".join(config.runs)} has a {file}')
  first: tuple[Path, records.Probe] | None = None
  for name, paths in sorted(found.items()):
    try:
      probes = [json_files.read(path / file, records.Probe) for path in paths]
      results = [json_files.read(path / recording.RESULT, records.Result) for path in paths]
    except json_files.JsonError as error:
      raise UsageError(f'--runs: {error}') from None
    _check_seeds(paths, file, probes, results)
    for path, probe in zip(paths, probes, strict=True):
      first = (path, probe) if first is None else first
      _check_attack(path / file, probe, first[0] / file, first[1])
    held_out = [_held_out(result) for result in results]
    yield Encoder(name, [dict(probe) for probe in probes], held_out)


def _check_attack(path: Path, probe: records.Probe, first: Path, other: records.Probe) -> None:
  """Raises UsageError unless two results are of one attack on the same images."""
  own, others = _attack(probe), _attack(other)
  # Old results do not say of which data they are.
  if names := [name for name in own.keys() & others.keys() if own[name] != others[name]]:
    values = '; '.join(f'{name} {own[name]} and {others[name]}' for name in sorted(names))
    raise UsageError(f'--runs: {path} and {first} are of different attacks: {values}')


def _attack(probe: records.Probe) -> dict[str, Any]:
  """Returns what results that stand side by side have in common; the seed may differ."""
  config = {**flags.to_dict(probe_settings.ProbeConfig()), **probe['config'], **_WITHOUT_EFFECT}
  if config['attack'] == 'standard':
    config['num_queries'] = None
  settings = {
    name: value for name, value in identity.settings({'config': config}).items() if name != 'seed'
  }
  data = {'data': probe['data']['digest']} if 'data' in probe else {}
  counts = {'radii': probe['radii'], 'num_examples': probe['num_examples']}
  return settings | data | counts


def _check_seeds(
  paths: Sequence[Path],
  file: str,
  probes: Sequence[records.Probe],
  results: Sequence[records.Result],
) -> None:
  """Raises UsageError unless each probe is of its run, and the runs are seeds of one encoder."""
  attacked = [probe.get('checkpoint') for probe in probes]
  trained = [result.get('checkpoint') for result in results]
  for path, own, other in zip(paths, attacked, trained, strict=True):
    if None not in (own, other) and own != other:
      made = f'{path / file} was made from {own}, but the run now has {other}'
      raise UsageError(f'--runs: {made}; probe it again')
  named = [name for name in trained if name is not None]
  if len(set(named)) < len(named):
    raise UsageError(f'--runs: {", ".join(map(str, paths))} are one run, or copies of one')
  settings = [pretrain.settings_of_encoder(result['config']) for result in results]
  for path, values in zip(paths, settings, strict=True):
    names = [name for name in values if values[name] != settings[0].get(name)]
    if names:
      raise UsageError(
        f'--runs: {path} and {paths[0]} have one name and are no seeds of one encoder: '
        f'{", ".join(names)} differ'
      )


def _held_out(result: records.Result) -> dict[str, float]:
  """The figures of held-out images, NaN where there are none or they mean nothing."""
  figures = recording.meaningful(result['config'].get('objective', ''), result['test'])
  return {key: figures.get(key, np.nan) for key in _HELD_OUT}


def _table(encoders: Sequence[Encoder], radii: Sequence[float]) -> Iterator[list[str]]:
  """The header, and a row for each encoder; half the range of the seeds beside their mean."""
  any_certified = any(each.certified is not None for each in encoders)
  certified = [f'certified at {radius:g}' for radius in radii] if any_certified else []
  attacked = [f'at {radius:g}' for radius in radii]
  yield ['encoder', 'seeds', *_HELD_OUT, *attacked, *certified, 'checks']
  for each in encoders:
    means = (each.mean(name) for name in _HELD_OUT)
    held_out = ['-' if np.isnan(mean) else f'{mean:.1f}' for mean in means]
    shown = list(_over_seeds(each.accuracy))
    if certified:
      shown += [''] * len(radii) if each.certified is None else _over_seeds(each.certified)
    yield [each.name, str(len(each.probes)), *held_out, *shown, plots.checks_summary(*each.probes)]


def _over_seeds(accuracy: np.ndarray) -> Iterator[str]:
  """The mean of accuracies `[seeds, R]` at each radius; half their range if there are several."""
  for values in accuracy.T:
    half = (values.max() - values.min()) / 2.0
    yield f'{values.mean():.3f}' + (f' ± {half:.3f}' if len(values) > 1 else '')


if __name__ == '__main__':
  flags.define_flags(CompareConfig)
  app.run(main)
