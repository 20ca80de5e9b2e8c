"""A result is of one checkpoint, one data set and some settings, wherever its files are."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest

from experiments import figure1, identity, pretrain, probe, probe_settings, supervised, sweep
from experiments.cli import flags, provenance, signals, workdirs
from se_vae import training
from se_vae.config import ArgumentError
from se_vae.storage import checkpoints
from tests.experiments.scheduled import ALONE

DTYPE_PROMOTION = 'standard'  # optax takes part

RUN = {'objective': 'vae', 'hidden_units': 16, 'latent_dim': 4, 'num_steps': 20, 'log_every': 10}
RUN |= {'checkpoint_every': 10, 'tensorboard': False, 'num_devices': 1}
ATTACK = {'radii': (0.0, 0.1), 'pgd_steps': 2, 'num_examples': 20, 'check_examples': 0}


def train(workdir: str | Path, **changes) -> dict:
  config = flags.from_dict(pretrain.PretrainConfig, {'workdir': str(workdir), **RUN, **changes})
  return pretrain.run(config, signals.StopSignal())


def attack(workdir: str | Path, **changes) -> dict:
  config = probe_settings.ProbeConfig(workdir=str(workdir), **{**ATTACK, **changes})
  return probe.run(config, signals.StopSignal())


def contents(directory: Path) -> dict[str, str]:
  """Digests and times of all files but locks."""
  return {
    str(path.relative_to(directory)): f'{path.stat().st_mtime_ns} {digest(path)}'
    for path in directory.rglob('*')
    if path.is_file() and not path.name.endswith('lock')
  }


def digest(path: Path) -> str:
  return hashlib.sha256(path.read_bytes()).hexdigest()


def flip_a_byte(path: Path) -> None:
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(bytes(content))


@pytest.fixture(scope='module')
def original(tmp_path_factory) -> Path:
  """A run with a result of the probe, in the directory 'run'."""
  directory = tmp_path_factory.mktemp('original')
  with pytest.MonkeyPatch.context() as patch:
    patch.chdir(directory)
    train('run')
    attack('run')
  return directory / 'run'


@pytest.fixture
def run(original, tmp_path, monkeypatch) -> Path:
  """A copy of the run, under the same relative path."""
  monkeypatch.chdir(tmp_path)
  shutil.copytree(original, 'run')
  return Path('run')


def damage_the_last(run: Path) -> None:
  flip_a_byte(checkpoints.steps(run / 'checkpoints')[0][1])


def damage_all(run: Path) -> None:
  for _, path in checkpoints.steps(run / 'checkpoints'):
    flip_a_byte(path)


def remove_all(run: Path) -> None:
  shutil.rmtree(run / 'checkpoints')


@pytest.mark.long
@pytest.mark.parametrize('result', ['whole', 'missing', 'damaged'])
@pytest.mark.parametrize(
  ('damage', 'refusal'),
  [
    (damage_the_last, r'workdir: .*damaged.*run experiments\.pretrain again'),
    (remove_all, r'workdir: .*run experiments\.pretrain there first: .*there is no checkpoint'),
  ],
)
def test_a_result_without_its_checkpoint_is_made_again(
  run, original, capsys, monkeypatch, damage, refusal, result
):
  """By training, from the newest good checkpoint. The probe waits for that."""
  damage(run)
  if result == 'missing':
    (run / 'result.json').unlink()
  elif result == 'damaged':
    (run / 'result.json').write_bytes(b'{')
  with pytest.raises(ArgumentError, match=refusal):
    attack(run)
  train(run)
  printed = capsys.readouterr().err
  assert 'so it is made again' in printed or result != 'whole'
  for name in ('result.json', 'metrics.jsonl', 'samples.png'):
    assert digest(run / name) == digest(original / name)
  newest, expected = (checkpoints.steps(path / 'checkpoints')[0] for path in (run, original))
  assert checkpoints.load(newest[1]).path.name == expected[1].name
  monkeypatch.setattr(probe, 'fit', pytest.fail)  # its result is of this very checkpoint
  attack(run)


@pytest.mark.long
def test_no_good_checkpoint_is_an_error_with_a_way_out(run, original):
  damage_all(run)
  with pytest.raises(ArgumentError, match='none of its 2 checkpoints is good'):
    attack(run)
  with pytest.raises(checkpoints.CheckpointError, match=r'checkpoints: none .*remove this dir'):
    train(run)
  remove_all(run)
  train(run)
  assert digest(run / 'result.json') == digest(original / 'result.json')


@pytest.mark.long
@pytest.mark.parametrize('name', ['result.json', 'config.json'])
@pytest.mark.parametrize('content', [None, b'{'])
def test_a_lost_file_is_made_again_without_training(run, original, monkeypatch, name, content):
  (run / name).unlink()
  if content is not None:
    (run / name).write_bytes(content)
  monkeypatch.setattr(training.loop, 'train_steps', pytest.fail)
  train(run)
  assert digest(run / name) == digest(original / name)


@pytest.mark.long
def test_a_finished_run_and_its_attack_are_not_repeated_elsewhere(run, tmp_path, monkeypatch):
  before = contents(run)
  moved = tmp_path / 'moved'
  run.rename(moved)
  monkeypatch.setattr(training, 'run', pytest.fail)
  monkeypatch.setattr(probe, 'fit', pytest.fail)
  for spelling in (moved, os.path.relpath(moved), moved / '..' / 'moved'):
    train(spelling, num_devices=2)
    assert attack(spelling, batch_size=7, strict=True)['config']['workdir'] == str(spelling)
  assert contents(moved) == before
  monkeypatch.undo()
  changed = attack(moved, radii=(0.0, 0.2))
  assert changed['radii'] == [0.0, 0.2]


def test_an_attack_on_another_encoder_or_other_data_is_another(run):
  path = run / 'probe_digit.json'
  result = json.loads(path.read_text())
  assert identity.finished(path, result) == result
  assert result['checkpoint'] == checkpoints.steps(run / 'checkpoints')[0][1].name
  for change in (
    {'checkpoint': 'another'},
    {'surrogate_checkpoint': 'another'},
    {'data': {'digest': 'another'}},
    {'config': result['config'] | {'seed': 1}},
  ):
    assert identity.finished(path, result | change) is None


def test_a_result_of_an_older_version_is_not_attacked_again(run):
  """It has another name for the step size, and does not name the encoder's file."""
  path = run / 'probe_digit.json'
  now = json.loads(path.read_text())
  old = json.loads(path.read_text())
  del old['checkpoint'], old['surrogate_checkpoint']
  del old['config']['relative_step_size'], old['config']['output'], old['config']['cache_dir']
  old['config'] |= {'workdir': 'elsewhere', 'pgd_step_size': None}
  old['pretraining'] |= {'workdir': 'elsewhere', 'device_data_limit': 1024}
  path.write_text(json.dumps(old))
  found = identity.finished(path, now)
  assert found is not None and found['accuracy'] == now['accuracy']
  for part, change in (('config', {'relative_step_size': 0.1}), ('pretraining', {'gamma': 2.0})):
    assert identity.finished(path, now | {part: now[part] | change}) is None


def test_other_data_is_refused_for_a_finished_run_too(run):
  config = json.loads((run / 'config.json').read_text())
  config['data']['digest'] = 'another'
  (run / 'config.json').write_text(json.dumps(config))
  with pytest.raises(ArgumentError, match=r'dataset: .*other data than the run'):
    train(run)


def test_checkpoints_are_saved_at_the_steps_that_were_asked_for(run, tmp_path, monkeypatch):
  saved, save = [], checkpoints.save

  def noted(directory, step, *rest, **options):
    if directory.name == 'checkpoints':
      saved.append(step)
    return save(directory, step, *rest, **options)

  monkeypatch.setattr(checkpoints, 'save', noted)
  train(tmp_path / 'often', checkpoint_every=7)
  assert saved == [7, 14, 20]
  assert digest(tmp_path / 'often' / 'metrics.jsonl') == digest(run / 'metrics.jsonl')


def test_with_an_output_the_probe_only_reads_the_run(run, tmp_path):
  before = sorted(run.rglob('*')), contents(run), run.stat().st_mtime_ns
  run.chmod(0o555)
  output = tmp_path / 'deep' / 'output'
  result = attack(run, output=str(output), seed=1)
  run.chmod(0o755)
  assert (sorted(run.rglob('*')), contents(run), run.stat().st_mtime_ns) == before
  names = {path.name for path in output.iterdir()}
  assert names >= {'probe_digit.json', 'probe_digit.npz', 'probe_digit.png', 'robustness.json'}
  assert json.loads((output / 'probe_digit.json').read_text()) == json.loads(json.dumps(result))
  with pytest.raises(ArgumentError, match='workdir: is required'):
    probe.run(probe_settings.ProbeConfig(output=str(output)), signals.StopSignal())
  with (
    workdirs.lock(output, name='.probe.lock'),
    pytest.raises(ArgumentError, match=r'output: .*in use'),
  ):
    attack(run, output=str(output))


def make_directory_of(owner: str, path: Path) -> None:
  """Leaves in a directory what identifies its owner."""
  path.mkdir()
  metadata = {
    'experiments.pretrain': {'config': {}, 'model': {}},
    'experiments.supervised': {'config': {}},
    'se_vae.save_model': {'model': {}},
  }
  if owner in metadata:
    checkpoints.save(path / 'checkpoints', 1, {'params': 0.0}, metadata[owner])
  elif owner == 'a supervised result':
    (path / 'result.json').write_text('{"radii": [0.1]}')
  else:
    (path / f'{owner.removeprefix("experiments.")}.json').write_text('{}')


BINARIES = {
  'experiments.pretrain': train,
  'experiments.probe': attack,
  'experiments.figure1': lambda path: figure1.run(
    figure1.Figure1Config(placement=ALONE, workdir=str(path)), signals.StopSignal()
  ),
  'experiments.sweep': lambda path: sweep.run(
    sweep.SweepConfig(vary='gamma=1', placement=ALONE),
    pretrain.PretrainConfig(workdir=str(path)),
    signals.StopSignal(),
  ),
  'experiments.supervised': lambda path: supervised.run(
    supervised.SupervisedConfig(workdir=str(path)), signals.StopSignal()
  ),
}


OWNERS = (
  'experiments.pretrain',
  'experiments.supervised',
  'experiments.figure1',
  'experiments.sweep',
  'se_vae.save_model',
  'a supervised result',
)
OWN = {(binary, binary) for binary in BINARIES} | {
  ('experiments.probe', 'experiments.pretrain'),
  ('experiments.supervised', 'a supervised result'),
}


@pytest.mark.parametrize(
  ('binary', 'owner'),
  [(binary, owner) for binary in BINARIES for owner in OWNERS if (binary, owner) not in OWN],
)
def test_a_directory_of_another_binary_is_refused_in_a_line(binary, owner, tmp_path):
  path = tmp_path / 'w'
  make_directory_of(owner, path)
  before = contents(path)
  named = owner if '.' in owner else 'experiments.supervised'
  with pytest.raises(ArgumentError, match=f'workdir: .* is a directory of {named}, not') as error:
    BINARIES[binary](path)
  assert 'choose another' in str(error.value) and len(str(error.value)) < 300
  assert contents(path) == before


def test_the_commit_is_recorded_and_is_no_setting(run, monkeypatch):
  config = json.loads((run / 'config.json').read_text())
  assert config['commit'] == provenance.commit()
  (run / 'result.json').unlink()
  (run / 'config.json').write_text(json.dumps(config | {'commit': 'another'}))
  train(run)
  assert json.loads((run / 'config.json').read_text()) == config


def git(directory: Path, *arguments: str) -> None:
  name = ('-c', 'user.name=n', '-c', 'user.email=e')
  subprocess.run(('git', '-C', str(directory), *name, *arguments), check=True)


@pytest.mark.skipif(shutil.which('git') is None, reason='needs git')
def test_the_commit_is_of_the_tree_that_holds_the_package(tmp_path, monkeypatch):
  package = tmp_path / 'package'
  package.mkdir()
  (package / '__init__.py').touch()
  assert provenance.commit(package) is None
  git(tmp_path, 'init', '--quiet')
  assert provenance.commit(package) is None  # not tracked: somebody else's repository
  git(tmp_path, 'add', '.')
  git(tmp_path, 'commit', '--quiet', '--message=first')
  clean = provenance.commit(package)
  assert clean is not None and len(clean) == 40
  (package / '__init__.py').write_text('x = 1')
  assert provenance.commit(package) == f'{clean}-dirty'
  monkeypatch.setenv('GIT_DIR', '/nowhere')
  assert provenance.commit(package) == f'{clean}-dirty'
  first = provenance.changes(package)
  (package / '__init__.py').write_text('x = 2')
  assert provenance.changes(package) not in (first, None)  # two states of one dirty tree
  (package / '__init__.py').write_text('x = 1')
  assert provenance.changes(package) == first
  monkeypatch.setenv('PATH', '')
  assert provenance.commit(package) is None and provenance.changes(package) is None
