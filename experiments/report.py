r"""Writes one self-contained HTML page about a run, several runs side by side, or a figure.

  python -m experiments.report --workdir=runs/se --compare=runs/vae

The page, `report.html` in --workdir or --output, needs no network: it contains its pictures and
charts. A run is a directory of experiments.pretrain, with the results of experiments.probe in it,
or of experiments.supervised. A directory of experiments.figure1 or experiments.sweep stands for all
of its runs. No other file is written.
"""

from __future__ import annotations

import dataclasses
import functools
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from experiments import figure1, pretrain, recording, records, supervised
from experiments.cli import app, flags, messages
from experiments.cli.flags import UsageError
from experiments.visual import plots, report_page
from experiments.visual.report_page import Picture, Probe, Run, Series, Style, Table
from se_vae.config import setting, validate
from se_vae.evaluation import verdicts
from se_vae.evaluation.verdicts import SanityCheck
from se_vae.storage import atomic_files, json_files

Part = TypeVar('Part')

FIGURE = 'figure1.json'
SWEEP = 'sweep.json'

_PICTURES = {
  'reconstructions': (
    'Reconstructions',
    "held-out images x, the x' that the attack of training selects, and reconstructions of both",
  ),
  'samples': ('Samples', 'a hundred images decoded from samples of the prior'),
  'traversals': (
    'Traversals',
    'the first held-out image, decoded with one latent a row varied from -3 to 3; the latent with '
    'the largest variance comes first',
  ),
}
_ADVERSARIAL = (
  'test images x that are misclassified under attack only, in ascending order of the radius, '
  "their adversarial images x', and reconstructions of both"
)


@dataclasses.dataclass(frozen=True)
class ReportConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a run, of a figure, or of a sweep.')
  compare: tuple[str, ...] | None = setting(None, 'Directories to show beside it.')
  output: str | None = setting(None, "The page to write; 'report.html' in --workdir if not given.")


def main() -> None:
  """Entry point."""
  run(flags.from_flags(ReportConfig))


def run(config: ReportConfig) -> Path:
  """Writes the page, prints its path and the summary of all checks; returns the path.

  Raises:
    UsageError: for a wrong flag, or if no run can be read, before anything is written.
  """
  validate(config)
  directories = [_directory('--workdir', config.workdir)]
  directories += [_directory('--compare', name) for name in config.compare or ()]
  output = _check_output(Path(config.output) if config.output else directories[0] / 'report.html')
  page, checks = render(directories)
  atomic_files.write(output, page.encode(errors='surrogateescape'))
  print(f'{output}\n{verdicts.summary(checks)}')
  return output


def _directory(flag: str, name: str | None) -> Path:
  if not name:
    raise UsageError(f'{flag}: is required; the directory of a run, of a figure, or of a sweep')
  path = Path(name)
  if not path.is_dir():
    raise UsageError(f'{flag}: {path} is not a directory')
  if not runs_in(path):
    raise UsageError(f'{flag}: {path} holds no run; experiments.pretrain or supervised makes one')
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
  candidates = [directory] if _settings_file(directory).exists() else directory.iterdir()
  return sorted(path for path in candidates if _settings_file(path).exists())


def _settings_file(directory: Path) -> Path:
  """The file with the settings of a run; a supervised classifier has them in its result alone."""
  path = directory / recording.CONFIG
  return path if path.exists() else directory / recording.RESULT


def render(directories: Sequence[Path]) -> tuple[str, list[SanityCheck]]:
  """The page about these directories, which names the files that it leaves out, and its checks.

  Raises:
    UsageError: if the settings of no run can be read.
  """
  reader = _Reader()
  paths = list(dict.fromkeys(path for directory in directories for path in runs_in(directory)))
  configs = {path: reader.read(_settings_file(path), _load_config) for path in paths}
  known = {path: config for path, config in configs.items() if config is not None}
  if not known:
    raise UsageError(f'--workdir: no run can be shown: {reader.damages[0]}')
  styles = report_page.styles(config['objective'] for config, _ in known.values())
  labelled = zip(known.items(), _labels(list(known)), styles, strict=True)
  figures = [path / FIGURE for path in directories if (path / FIGURE).exists()]
  drawn = [reader.read(path, _load_figure) for path in figures]
  runs = [reader.run(path, label, style, *config) for (path, config), label, style in labelled]
  # The checks are shown for each run, so those of the figures' results are the same ones.
  checks = [check for run in runs for probe in run.probes for check in probe.checks]
  page = report_page.render(
    title=', '.join(_labels(directories)),
    runs=runs,
    figures=[figure for figure in drawn if figure is not None],
    unfinished=[str(d) for d in directories if d not in paths and not _is_whole(d)],
    damages=reader.damages,
    defaults=flags.to_dict(
      supervised.SupervisedConfig() if runs[0].supervised else pretrain.PretrainConfig()
    ),
  )
  return page, checks


def _is_whole(directory: Path) -> bool:
  return any((directory / name).exists() for name in (FIGURE, SWEEP))


def _labels(paths: Sequence[Path]) -> list[str]:
  """The directories' own names, or their whole paths where names repeat."""
  names = [path.resolve().name for path in paths]
  return names if len(set(names)) == len(names) else [str(path) for path in paths]


@dataclasses.dataclass(frozen=True)
class _Reader:
  """Reads the files of a report; those that cannot be read are left out.

  Attributes:
    damages: one line about each file that is left out.
  """

  damages: list[str] = dataclasses.field(default_factory=list)

  def read(self, path: Path, load: Callable[[Path], Part], expected: bool = False) -> Part | None:
    """Returns what `load` makes of a file; None if it is missing, damaged or not readable.

    Args:
      path: the file.
      load: raises OSError or ValueError for a file that it cannot read.
      expected: whether a missing file is noted too.
    """
    try:
      return load(path)
    except FileNotFoundError:
      if expected:
        self.leave_out(f'{path}: missing')
    except OSError as error:
      self.leave_out(f'{path}: cannot be read: {error.strerror or error}')
    except json_files.JsonError as error:
      self.leave_out(str(error))
    except ValueError as error:  # lists of different lengths, or no picture
      self.leave_out(f'{path}: damaged ({error})')
    return None

  def leave_out(self, damage: str) -> None:
    """Notes and prints what is wrong with a file."""
    self.damages.append(damage)
    messages.warn(f'{damage}; left out')

  def run(
    self, path: Path, label: str, style: Style, config: dict[str, Any], environment: dict[str, Any]
  ) -> Run:
    """The run in a directory."""
    if config['objective'] == report_page.SUPERVISED:
      attacked = self.read(path / recording.RESULT, _load_classifier)
      state = f'finished: {config["num_steps"]:,} steps'
      shown = [] if attacked is None else [attacked]
      return Run(label, style, config, environment, state, probes=shown)
    result = self.read(path / recording.RESULT, lambda file: json_files.read(file, records.Result))
    num_steps = config['num_steps']
    finished = result is not None and result['step'] == num_steps
    metrics = self.read(path / recording.METRICS, recording.read_rows, expected=finished)
    rows, damage = metrics or ([], '')
    if damage:
      self.leave_out(damage)
    test = None
    if result is not None and finished:
      test = recording.meaningful(config['objective'], result['test'])
    state = f'finished: {num_steps:,} steps'
    if not finished:
      unread = result is None and (path / recording.RESULT).exists()
      state = 'no result that can be read' if unread else 'not finished'
      state += f': {int(rows[-1]["step"]) if rows else 0:,} of {num_steps:,} steps'
      state += self._not_finite(path)
    probes = {file: self.read(file, _load_probe) for file in sorted(path.glob('probe_*.json'))}
    found = {file: probe for file, probe in probes.items() if probe is not None}
    pictures = self._pictures(path, found, finished)
    return Run(label, style, config, environment, state, rows, test, list(found.values()), pictures)

  def _not_finite(self, path: Path) -> str:
    """At which step a run has stopped because a metric was not finite; empty if it has not."""
    row = self.read(path / recording.NOT_FINITE, lambda file: json_files.read(file, records.Row))
    return '' if row is None else f'; step {row["step"]:,} was not finite'

  def _pictures(self, path: Path, probes: dict[Path, Probe], finished: bool) -> list[Picture]:
    """The pictures of a run, and of the attacks on its probes."""
    wanted = [(path / f'{name}.png', *words) for name, words in _PICTURES.items()]
    for file, probe in probes.items():
      title = f'Adversarial images, {probe.task} probe, {probe.attack} attack'
      wanted.append((file.with_name(f'{file.stem}_images.png'), title, _ADVERSARIAL))
    drawn = [
      self.read(
        file,
        functools.partial(_load_picture, title=title, text=text),
        expected=finished and file.stem in _PICTURES,
      )
      for file, title, text in wanted
    ]
    return [picture for picture in drawn if picture is not None]


def _load_config(path: Path) -> tuple[dict[str, Any], dict[str, Any]]:
  """The settings of a run, and its versions, devices and data."""
  content: records.Run | records.Supervised
  if path.name == recording.RESULT:
    content = json_files.read(path, records.Supervised)
    config = {'objective': report_page.SUPERVISED, **_supervised_config(content['config'])}
  else:
    content = json_files.read(path, records.Run)
    with json_files.naming(path):
      config = flags.to_dict(pretrain.stored_config(content['config']))
  data = content.get('data')  # version 0.1.0 did not write it for a supervised classifier
  environment = {
    **content['versions'],
    'devices': content.get('devices'),
    'data': data and data['source'],
    'digest of the data': data and data['digest'],
  }
  return config, environment


def _supervised_config(values: dict[str, Any]) -> dict[str, Any]:
  try:
    return flags.to_dict(flags.from_dict(supervised.SupervisedConfig, values))
  except TypeError as error:  # a setting that does not exist
    raise json_files.JsonError(str(error)) from None


def _load_picture(path: Path, title: str, text: str) -> Picture:
  return report_page.picture(path.read_bytes(), title, text)


def _load_probe(path: Path) -> Probe:
  content = json_files.read(path, records.Probe)
  joint, shift = content.get('joint'), content.get('moves')
  config = content['config']
  return _attacked(content, config['attack'], config.get('labels_per_class'))._replace(
    dataset=config.get('dataset') or '',
    joint=(' and '.join(joint['tasks']), _accuracy(joint)) if joint else None,
    latent_shift=_latent_shift(shift) if shift else None,
  )


def _load_classifier(path: Path) -> Probe:
  content = json_files.read(path, records.Supervised)
  labels_per_class = content['config'].get('labels_per_class')
  return _attacked(content, content['evaluation']['attack'], labels_per_class)


def _attacked(content: records.Attacked, attack: str, labels_per_class: int | None) -> Probe:
  checks = [SanityCheck.from_json(check) for check in content.get('checks', ())]
  certified = content.get('certified')
  return Probe(
    dataset='',
    task=plots.task_name(content['task'], labels_per_class),
    attack=attack,
    num_examples=content['num_examples'],
    step=content['step'],
    accuracy=_accuracy(content),
    joint=None,
    certified=(certified['method'], _accuracy(certified)) if certified else None,
    latent_shift=None,
    checks=checks,
    summary=verdicts.summary(checks),
  )


def _accuracy(curve: records.Curve) -> Series:
  low, high = ([ends[end] for ends in curve['interval']] for end in (0, 1))
  return report_page.series(curve['radii'], curve['accuracy'], low, high)


def _latent_shift(shift: records.LatentShift) -> Series:
  low, *_, high = shift['quantiles'].values()
  return report_page.series(shift['radii'], shift['mean'], low, high)


def _load_figure(path: Path) -> tuple[list[Table], str]:
  """The panels of a figure, and what it says of the optimizer."""
  content = json_files.read(path, records.Figure)
  results = [dict(result) for result in content['results']]
  tables = []
  for each in content['panels']:
    panel = figure1.Panel(each['title'], each['encoders'], each['task'])
    curves = [curve for curve in figure1.curves_of(panel, results) if curve.results]
    tables.append(report_page.panel(panel.title, curves))
  return tables, content.get('optimizer', '')


if __name__ == '__main__':
  flags.define_flags(ReportConfig)
  app.run(main)
