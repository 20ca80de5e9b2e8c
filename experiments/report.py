r"""Writes one self-contained HTML page about a run, several runs side by side, or a figure.

  python -m experiments.report --workdir=runs/se --compare=runs/vae

The page, `report.html` in --workdir or --output, needs no network: it contains its pictures and
charts. A run is a directory of experiments.pretrain, with the results of experiments.probe in it; a
directory of experiments.figure1 stands for all of its runs. No other file is written.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments import figure1, pretrain, recording
from experiments.cli import app, flags
from experiments.cli.flags import UsageError
from experiments.visual import plots, report_page
from experiments.visual.report_page import Picture, Probe, Run, Series, Style, Table
from se_vae.config import setting, validate
from se_vae.evaluation.verdicts import SanityCheck
from se_vae.storage import atomic_files

FIGURE = 'figure1.json'

_PICTURES = {
  'reconstructions': (
    'Reconstructions',
    "rows: held-out images; selected x'; reconstructions of the images; reconstructions of x'",
  ),
  'samples': ('Samples', 'a hundred images decoded from samples of the prior'),
  'traversals': (
    'Traversals',
    'the first held-out image, decoded with one latent a row varied from -3 to 3; the latent with '
    'the largest variance comes first',
  ),
}
_ADVERSARIAL = (
  'images that are misclassified within some radius, in ascending order of it; rows: images; '
  'adversarial images; reconstructions of the images; reconstructions of the adversarial images'
)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a run, or of a figure.')
  compare: tuple[str, ...] | None = setting(None, 'Directories to show beside it.')
  output: str | None = setting(None, "The page to write; 'report.html' in --workdir if not given.")


def main() -> None:
  """Entry point."""
  print(run(flags.from_flags(ReportConfig)))


def run(config: ReportConfig) -> Path:
  """Writes the page; returns its path.

  Raises:
    UsageError: for a wrong flag or a damaged file, before anything is written.
  """
  validate(config)
  directories = [_directory('--workdir', config.workdir)]
  directories += [_directory('--compare', name) for name in config.compare or ()]
  output = _check_output(Path(config.output) if config.output else directories[0] / 'report.html')
  atomic_files.write(output, render(directories).encode(errors='surrogateescape'))
  return output


def _directory(flag: str, name: str | None) -> Path:
  if not name:
    raise UsageError(f'{flag}: is required; the directory of a run, or of a figure')
  path = Path(name)
  if not path.is_dir():
    raise UsageError(f'{flag}: {path} is not a directory')
  if not runs_in(path):
    raise UsageError(f'{flag}: {path} holds no run; experiments.pretrain makes one')
  return path


def _check_output(path: Path) -> Path:
  if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
    raise UsageError(f'--output: {path.parent} is not a writable directory')
  mark = report_page.GENERATOR.encode()
  if path.exists() and not (path.is_file() and mark in path.read_bytes()[:1000]):
    raise UsageError(f'--output: {path} is not a report, and is not overwritten')
  return path


def runs_in(directory: Path) -> list[Path]:
  """The directory itself if it is a run's, else the runs in it, in the order of their names."""
  candidates = [directory] if (directory / recording.CONFIG).exists() else directory.iterdir()
  return sorted(path for path in candidates if (path / recording.CONFIG).exists())


def render(directories: Sequence[Path]) -> str:
  """The page about these directories.

  Raises:
    UsageError: for a damaged file; names it.
  """
  paths = list(dict.fromkeys(path for directory in directories for path in runs_in(directory)))
  configs, environments = zip(*map(_load_config, paths), strict=True)
  styles = report_page.styles(config['objective'] for config in configs)
  figures = [path / FIGURE for path in directories if (path / FIGURE).exists()]
  return report_page.render(
    title=', '.join(_labels(directories)),
    runs=list(map(_load_run, paths, _labels(paths), styles, configs, environments)),
    figures=list(map(_load_figure, figures)),
    unfinished=[str(d) for d in directories if d not in paths and not (d / FIGURE).exists()],
    defaults=flags.to_dict(pretrain.PretrainConfig()),
  )


def _labels(paths: Sequence[Path]) -> list[str]:
  """The directories' own names, or their whole paths where names repeat."""
  names = [path.resolve().name for path in paths]
  return names if len(set(names)) == len(names) else [str(path) for path in paths]


@contextlib.contextmanager
def _damage_named(path: Path) -> Iterator[None]:
  """Raises a UsageError that names the file, if what the context reads is not what a run writes."""
  try:
    yield
  except (ValueError, LookupError, TypeError, AttributeError, ArithmeticError, RecursionError) as e:
    reason = ' '.join(f'{type(e).__name__}: {e}'.split())[:200]
    raise UsageError(f'{path}: is damaged ({reason})') from None


def _load_config(directory: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """The settings of a run, and its versions, devices and data."""
  path = directory / recording.CONFIG
  with _damage_named(path):
    content = json.loads(path.read_text())
    config = flags.to_dict(pretrain.stored_config(content['config']))
    texts = {name: str(config[name]) for name in ('dataset', 'objective')}
    environment = {
      **dict(content['versions']),
      'devices': content['devices'],
      'data': content['data']['source'],
      'digest of the data': content['data']['digest'],
    }
    return config | texts | {'num_steps': int(config['num_steps'])}, environment


def _load_run(
  path: Path, label: str, style: Style, config: dict[str, Any], environment: dict[str, Any]
) -> Run:
  rows = _load_rows(path / recording.METRICS)
  step, test = _load_result(path / recording.RESULT)
  num_steps = config['num_steps']
  state = f'finished: {num_steps:,} steps'
  if step != num_steps:
    test, step = None, int(rows[-1]['step']) if rows else 0
    state = f'not finished: {step:,} of {num_steps:,} steps'
    not_finite = path / recording.NOT_FINITE
    if not_finite.exists():
      with _damage_named(not_finite):
        state += f'; step {int(json.loads(not_finite.read_text())["step"]):,} was not finite'
  pictures = [(path / f'{name}.png', *words) for name, words in _PICTURES.items()]
  probes = []
  for file in sorted(path.glob('probe_*.json')):
    probe = _load_probe(file)
    probes.append(probe)
    title = f'Adversarial images, {probe.task} probe, {probe.attack}'
    pictures.append((file.with_name(f'{file.stem}_images.png'), title, _ADVERSARIAL))
  drawn = [_load_picture(*picture) for picture in pictures if picture[0].exists()]
  return Run(label, style, config, environment, state, rows, test, probes, drawn)


def _load_rows(path: Path) -> list[dict[str, float]]:
  """The rows of metrics.jsonl, without a last one that is half written."""
  if not path.exists():
    return []
  with _damage_named(path):
    *lines, _ = path.read_text().split('\n')
    rows = map(json.loads, lines)
    return [{'step': row['step'], **_floats(row)} for row in rows]


def _load_result(path: Path) -> tuple[int, dict[str, float] | None]:
  """The step and the figures of a trained model; step 0 without the file."""
  if not path.exists():
    return 0, None
  with _damage_named(path):
    content = json.loads(path.read_text())
    return int(content['step']), _floats(content['test'])


def _load_picture(path: Path, title: str, text: str) -> Picture:
  with _damage_named(path):
    return report_page.picture(path.read_bytes(), title, text)


def _floats(values: Mapping[str, Any]) -> dict[str, float]:
  for name, value in values.items():
    if isinstance(value, bool) or not isinstance(value, int | float):
      raise TypeError(f'{name} is {value!r}')
  return dict(values)


def _load_probe(path: Path) -> Probe:
  with _damage_named(path):
    content = json.loads(path.read_text())
    joint, shift = content.get('joint'), content.get('moves')
    checks = [SanityCheck.from_json(check) for check in content['checks']]
    return Probe(
      task=str(content['task']),
      attack=str(content['config']['attack']),
      num_examples=int(content['num_examples']),
      step=int(content['step']),
      accuracy=_accuracy(content),
      joint=(' and '.join(map(str, joint['tasks'])), _accuracy(joint)) if joint else None,
      latent_shift=_latent_shift(shift) if shift else None,
      checks=checks,
      summary=plots.checks_summary({'checks': checks}),
    )


def _accuracy(content: Any) -> Series:
  low, high = zip(*content['interval'], strict=True)
  return report_page.series(content['radii'], content['accuracy'], low, high)


def _latent_shift(content: Any) -> Series:
  low, *_, high = content['quantiles'].values()
  return report_page.series(content['radii'], content['mean'], low, high)


def _load_figure(path: Path) -> tuple[list[Table], str]:
  """The panels of a figure, and what it says of the optimizer."""
  with _damage_named(path):
    content = json.loads(path.read_text())
    panels = [figure1.Panel(**panel) for panel in content['panels']]
    curves = [figure1.curves_of(panel, content['results']) for panel in panels]
    tables = [report_page.panel(p.title, c) for p, c in zip(panels, curves, strict=True)]
    return tables, str(content.get('optimizer', ''))


if __name__ == '__main__':
  flags.define_flags(ReportConfig)
  app.run(main)
