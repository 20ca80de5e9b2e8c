"""From the manifest to runs: the settings of every training and attack, and their command lines."""

from __future__ import annotations

import dataclasses
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path

from experiments import pretrain, probe_settings, supervised
from experiments.cli import flags
from experiments.reproduction.manifest import Manifest
from experiments.scheduling import jobs


@dataclasses.dataclass(frozen=True)
class Plan:
  """Where the rows of a manifest are built, and from which data.

  Attributes:
    manifest: the manifest.
    workdir: the directory of all runs.
    data_dir: the directory of the MNIST files; None to download them, and for embedded sets.
  """

  manifest: Manifest
  workdir: Path
  data_dir: str | None = None

  def pretraining(self, encoder: str, seed: int) -> pretrain.PretrainConfig:
    """The settings of an encoder's training.

    Raises:
      UsageError: for flags that are wrong; it names the encoder.
    """
    return flags.parse(
      pretrain.PretrainConfig, shlex.join(self._pretrain(encoder, seed)), f'encoder {encoder}'
    )

  def attack(self, row: str, seed: int) -> probe_settings.ProbeConfig:
    """The settings of the probe of a row that has an encoder, and of the attack on it.

    Raises:
      UsageError: for flags that are wrong; it names the row.
    """
    return flags.parse(probe_settings.ProbeConfig, shlex.join(self._probe(row, seed)), f'row {row}')

  def classifier(self, row: str, seed: int) -> supervised.SupervisedConfig:
    """The settings of the classifier of a row that has none.

    Raises:
      UsageError: for flags that are wrong; it names the row.
    """
    return flags.parse(
      supervised.SupervisedConfig, shlex.join(self._supervised(row, seed)), f'row {row}'
    )

  def job(self, row: str, seed: int) -> jobs.AttackedJob:
    """What is done for a seed of a row, after its encoders; its name begins with 'ROW,'."""
    name = f'{row}, seed {seed}'
    if 'supervised' in self.manifest.rows[row]:
      return jobs.SupervisedJob(name, self.classifier(row, seed))
    encoder = str(self.manifest.rows[row].get('encoder'))
    return jobs.Job(name, self.pretraining(encoder, seed), (self.attack(row, seed),))

  def waves(self, rows: Sequence[str]) -> Iterator[list[jobs.AttackedJob]]:
    """The jobs of rows in groups: what one group does, the next ones may need.

    The first groups train encoders, and the last ones attack.
    """
    depths: dict[tuple[str, int], int] = {}
    for row in rows:
      for name in self.manifest.encoders_of(row):
        for seed in self.manifest.rows[row]['seeds']:
          depths[name, seed] = len(self.manifest.chain(name))
    for depth in sorted(set(depths.values())):
      yield [
        jobs.Job(f'{name}, seed {seed}', self.pretraining(name, seed), ())
        for (name, seed), own in depths.items()
        if own == depth
      ]
    # Two attacks on one encoder at a time would wait for each other's lock.
    waves: list[dict[Path, jobs.AttackedJob]] = []
    for row in rows:
      for seed in self.manifest.rows[row]['seeds']:
        job = self.job(row, seed)
        free = (wave for wave in waves if job.workdir not in wave)
        wave = next(free, None)
        if wave is None:
          waves.append(wave := {})
        wave[job.workdir] = job
    yield from (list(wave.values()) for wave in waves)

  def shown(self) -> Plan:
    """The plan as pages show it: with the usual work directory, and without that of the data."""
    return Plan(self.manifest, Path('runs/results'))

  def commands(self, row: str, seed: int) -> list[str]:
    """The command lines that build a seed of a row."""
    lines = [['pretrain', *self._pretrain(name, seed)] for name in self.manifest.encoders_of(row)]
    if 'supervised' in self.manifest.rows[row]:
      lines.append(['supervised', *self._supervised(row, seed)])
    else:
      lines.append(['probe', *self._probe(row, seed)])
    return [shlex.join(['python', '-m', f'experiments.{name}', *rest]) for name, *rest in lines]

  def encoder_directory(self, encoder: str, seed: int) -> Path:
    """The work directory of an encoder."""
    return self.workdir / encoder / f'seed{seed}'

  def row_directory(self, row: str, seed: int) -> Path:
    """The directory of the attack of a row, or of its classifier."""
    return self.workdir / 'rows' / row / f'seed{seed}'

  def _pretrain(self, encoder: str, seed: int) -> list[str]:
    entry = self.manifest.encoders[encoder]
    given = shlex.split(entry['flags'])
    if (before := entry.get('init_from')) is not None:
      given.append(f'--init_from={self.encoder_directory(before, seed)}')
    return [
      f'--workdir={self.encoder_directory(encoder, seed)}',
      f'--seed={seed}',
      *self._places(given),
      '--notensorboard',
      *given,
    ]

  def _probe(self, row: str, seed: int) -> list[str]:
    entry = self.manifest.rows[row]
    encoder = str(entry.get('encoder'))
    given = [f'--seed={seed}', *shlex.split(entry['probe'])]
    if (surrogate := entry.get('surrogate')) is not None:
      given.append(f'--surrogate={self.encoder_directory(surrogate, seed)}')
    trained_on = shlex.split(self.manifest.encoders[encoder]['flags'])
    return [
      f'--workdir={self.encoder_directory(encoder, seed)}',
      f'--output={self.row_directory(row, seed)}',
      *self._places(trained_on),
      *given,
    ]

  def _supervised(self, row: str, seed: int) -> list[str]:
    entry = self.manifest.rows[row]
    given = shlex.split(entry.get('supervised', ''))
    return [
      f'--workdir={self.row_directory(row, seed)}',
      f'--seed={seed}',
      *self._places(given),
      *given,
      f'--probe={entry["probe"]}',
    ]

  def _places(self, given: Sequence[str]) -> list[str]:
    """Where the data are; the embedded sets have no directory."""
    cache = [f'--cache_dir={self.workdir / "data"}']
    embedded = any(flag.startswith('--dataset=') and flag.endswith('_5k') for flag in given)
    named = any(flag.startswith('--dataset=') for flag in given)
    return (
      cache
      if embedded or not named or self.data_dir is None
      else [*cache, f'--data_dir={self.data_dir}']
    )
