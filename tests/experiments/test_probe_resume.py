"""An interrupted probe keeps whatever it has computed, and ends with the same files."""

from __future__ import annotations

import dataclasses
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from experiments import probe, probe_settings, supervised
from experiments.cli import flags, messages, signals
from experiments.visual import probe_results
from se_vae.evaluation.attacked_classifier import AttackedClassifier
from se_vae.evaluation.states import ValueLog
from tests.experiments.tiny_run import train
from tests.tools import kills

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part


@dataclasses.dataclass
class Record:
  """What probes did.

  Attributes:
    batches: a name for every batch that an attack or a certificate has computed.
    bars: what every progress bar is called, what it begins with, and its total.
  """

  batches: list[str] = dataclasses.field(default_factory=list)
  bars: list[tuple[str, int, int]] = dataclasses.field(default_factory=list)

  def take(self) -> Record:
    """A copy; from then on the record is empty."""
    taken = Record(list(self.batches), list(self.bars))
    self.batches.clear()
    self.bars.clear()
    return taken


@pytest.fixture(scope='module')
def recorder():
  found = Record()
  map_batches, attack_batches = ValueLog.map_batches, AttackedClassifier.attack_batches
  real_bar = messages.progress_bar

  def counted(function):
    def compute(batch):
      values = function(batch)
      found.batches.append('value')
      return values

    return compute

  def of_values(self, mesh, function, *rest):
    return map_batches(self, mesh, counted(function), *rest)

  def of_attack(*operands):
    for results in attack_batches(*operands):
      found.batches.append('attack')
      yield results

  def progress_bar(total, description, *, initial=0, **options):
    found.bars.append((description, initial, total))
    return real_bar(total, description, initial=initial, **options)

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ValueLog, 'map_batches', of_values)
    patch.setattr(AttackedClassifier, 'attack_batches', of_attack)
    patch.setattr(messages, 'progress_bar', progress_bar)
    yield found


@pytest.fixture
def record(recorder, undisturbed):
  """Empty."""
  recorder.take()
  return recorder


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
  return train(tmp_path_factory.mktemp('trained'))


@pytest.fixture(scope='module')
def undisturbed(trained, recorder, tmp_path_factory):
  """The directory, which the JSON files name, with its files and what was done."""
  workdir = copied(trained, tmp_path_factory.mktemp('probed') / 'run')
  probe.run(config(workdir), signals.StopSignal())
  return workdir, kills.contents(workdir, 'probe'), recorder.take()


def test_files_of_a_second_attack_do_not_stand_beside_the_first_result(
  undisturbed, tmp_path, monkeypatch
):
  workdir = copied(undisturbed[0], tmp_path / 'run')
  (result,) = workdir.glob('probe_*.json')

  def full(*_):
    raise OSError('no space left')

  monkeypatch.setattr(probe_results.plots, 'save', full)
  with pytest.raises(OSError, match='no space left'):
    probe.run(config(workdir, seed=9), signals.StopSignal())
  assert not result.exists()


@dataclasses.dataclass
class After(signals.StopSignal):
  """A SIGTERM that comes when so many batches have been computed."""

  record: Record
  count: int

  def __post_init__(self) -> None:
    super().__init__()

  def requested(self) -> int | None:
    return signal.SIGTERM if len(self.record.batches) >= self.count else None


def config(workdir: Path, **changes) -> probe_settings.ProbeConfig:
  values = {'joint': True, 'moves': True, 'certify': True, 'radii': (0.0, 0.05, 0.2)}
  values |= {'task': 'color', 'pgd_steps': 2, 'restarts': 2, 'num_examples': 40, 'batch_size': 8}
  values |= {'check_examples': 0, 'workdir': str(workdir)}
  return probe_settings.ProbeConfig(**values | changes)


def copied(trained: Path, workdir: Path) -> Path:
  shutil.rmtree(workdir, ignore_errors=True)
  return Path(shutil.copytree(trained, workdir))


STATES = {'joint.state.npz', 'moves.state.npz', 'state.npz', 'state.certificates.npz'}


def states(workdir: Path) -> dict[str, Path]:
  """The files of what is kept, by the end of their names."""
  return {path.name.partition('.')[2]: path for path in workdir.glob('*.state*.npz')}


def test_no_batch_is_computed_twice_and_every_byte_is_the_same(trained, record, undisturbed):
  workdir, expected, whole = undisturbed
  names = ['attack, joint', 'attack, latent shift', 'attack', 'attack, certificates']
  assert [name for name, *_ in whole.bars] == names
  assert not any(initial for _, initial, _ in whole.bars)

  copied(trained, workdir)
  kept, rows = set(), set()
  for count in range(9, len(whole.batches), 9):
    with pytest.raises(signals.Interrupted):
      probe.run(config(workdir), After(record, count))
    assert record.batches == whole.batches[:count]
    kept |= (found := states(workdir)).keys()
    rows |= {int(np.load(found[name])['next_row']) for name in found if name == 'state.npz'}
  probe.run(config(workdir), signals.StopSignal())
  assert kills.contents(workdir, 'probe') == expected
  assert kept == STATES
  assert len(rows) > 1, 'an attempt was interrupted within its batches'
  found = record.take()
  assert found.batches == whole.batches
  for name in names:
    begun = [initial / total for described, initial, total in found.bars if described == name]
    assert begun == sorted(begun) and 0.0 < begun[-1] <= 1.0


def test_damaged_states_are_warned_about_and_started_afresh(trained, record, undisturbed, capsys):
  workdir, expected, whole = undisturbed
  copied(trained, workdir)
  with pytest.raises(signals.Interrupted):
    probe.run(config(workdir), After(record, len(whole.batches) - 1))
  assert states(workdir).keys() == STATES
  for path in states(workdir).values():
    path.write_bytes(path.read_bytes()[:-1])
  record.take()
  probe.run(config(workdir), signals.StopSignal())
  assert kills.contents(workdir, 'probe') == expected
  assert record.take().batches == whole.batches
  assert capsys.readouterr().err.count('is not a state: ') == len(STATES)


def test_a_state_that_a_kill_left_beside_its_result_is_removed(trained, record, tmp_path):
  settings = {'joint': False, 'moves': False, 'certify': False, 'radii': (0.0, 0.05)}
  workdir = copied(trained, tmp_path / 'run')
  with pytest.raises(signals.Interrupted):
    probe.run(config(workdir, **settings), After(record, 1))
  (state,) = states(workdir).values()
  content = state.read_bytes()
  result = probe.run(config(workdir, **settings), signals.StopSignal())
  state.write_bytes(content)
  assert probe.run(config(workdir, **settings), signals.StopSignal()) == result
  assert not states(workdir)


def test_the_attack_of_a_classifier_goes_on_too(record, tmp_path):
  def run(name: str, stop: signals.StopSignal) -> dict:
    attack = '--certify --radii=0,0.05 --pgd_steps=2 --num_examples=40 --batch_size=8'
    values = {'workdir': str(tmp_path / name), 'probe': f'{attack} --check_examples=8'}
    values |= {'dataset': 'mnist_5k', 'hidden_units': 8, 'latent_dim': 4}
    values |= {'num_steps': 2, 'pgd_steps': 1, 'batch_size': 8, 'checkpoint_every': 2}
    return supervised.run(flags.from_dict(supervised.SupervisedConfig, values), stop)

  whole = run('whole', signals.StopSignal())
  batches = record.take().batches
  for count in (3, len(batches) - 2):
    with pytest.raises(signals.Interrupted):
      run('interrupted', After(record, count))
    assert states(tmp_path / 'interrupted')
    (tmp_path / 'interrupted' / '.attack.state.npz.7.tmp').touch()  # as a kill leaves it
  found = run('interrupted', signals.StopSignal())
  assert record.batches == batches
  assert not states(tmp_path / 'interrupted')
  names = [{path.name for path in (tmp_path / name).iterdir()} for name in ('interrupted', 'whole')]
  assert names[0] == names[1]
  assert found == whole | {'config': whole['config'] | {'workdir': found['config']['workdir']}}
