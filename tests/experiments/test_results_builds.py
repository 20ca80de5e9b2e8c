"""Results that are built with tiny networks: rows, checks, interruptions, early errors."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from experiments import results
from experiments.cli import app, signals
from experiments.cli.flags import UsageError
from experiments.reproduction import building, manifest, plan, rows
from se_vae.config import ArgumentError
from tests.experiments.test_results import (
  ATTACK,
  CONTENT,
  TINY,
  changed,
  config_of,
  measured,
  page,
  save,
  write,
)

DTYPE_PROMOTION = 'standard'  # optax takes part
pytestmark = pytest.mark.usefixtures('shallow')


@pytest.mark.parametrize(
  ('content', 'flags', 'message'),
  [
    (CONTENT, {'rows': ('other',)}, 'other: no such row'),
    (changed('encoders', 'vae', 'flags', value='--no_flag=1'), {}, 'encoder vae'),
    (changed('encoders', 'se', 'flags', value='--gamma=-1'), {}, 'encoder se.*--gamma'),
    (changed('rows', 'plain', 'probe', value='--radii=2'), {}, 'row plain.*--radii'),
    (
      changed('sections', 0, 'claims', value=[{'claim': 'c', 'holds_if': ['plain > x at 0']}]),
      {},
      'x is no row',
    ),
    (
      changed('sections', 0, 'claims', 0, 'holds_if', value=['plain > smooth at 0.2']),
      {},
      'plain is not attacked at radius 0.2',
    ),
    (changed('rows', 'plain', 'expected', value={0.3: 0.5}), {}, 'plain is not attacked at'),
    (changed('rows', 'smooth', 'probe', value=f'{ATTACK} --task=color'), {}, 'row smooth: --task'),
    (changed('rows', 'smooth', 'probe', value='--radii=0,0.1 --num_examples=9999'), {}, 'smooth'),
    (changed('rows', 'smooth', 'surrogate', value='vae'), {}, 'smooth: --surrogate'),
    (CONTENT, {'seeds': 1}, '--seeds'),
    (CONTENT, {'rows': ()}, '--rows|rows: needs'),
  ],
)
def test_errors_come_before_anything_is_trained(tmp_path, content, flags, message):
  folder = write(tmp_path, content)
  with pytest.raises(ArgumentError, match=message):
    results.run('build', config_of(folder, **flags), signals.StopSignal())
  assert not (tmp_path / 'runs' / 'vae').exists()


@pytest.fixture(scope='module')
def built(tmp_path_factory) -> Path:
  """Results that were built with tiny networks."""
  folder = write(tmp_path_factory.mktemp('built'), CONTENT)
  assert results.run('build', config_of(folder), signals.StopSignal())
  return folder


@pytest.mark.long
def test_a_build_writes_rows_and_the_page(built):
  row = rows.read(built, 'smooth')
  assert row is not None and [seed['seed'] for seed in row['seeds']] == [0, 1]
  for seed in row['seeds']:
    directory = built.parent / 'runs' / 'rows' / 'smooth' / f'seed{seed["seed"]}'
    probed = json.loads((directory / 'probe_digit.json').read_text())
    np.testing.assert_allclose(seed['accuracy'], probed['accuracy'], atol=1e-5)
    assert probed['pretraining']['seed'] == seed['seed']
    assert probed['pretraining']['init_from'].endswith(f'vae/seed{seed["seed"]}')
  assert row['revision'] == 2 and row['objective'] == 'se' and row['dataset'] == 'mnist_5k'
  text = (built.parent / 'RESULTS.md').read_text()
  assert text == page(built).text()
  assert (built / 'figures' / 'curves.png').exists()


@pytest.mark.long
def test_the_commands_of_a_row_are_those_that_were_run(built):
  row = rows.read(built, 'smooth')
  assert row is not None
  binaries = [command.split()[2] for command in row['commands']]
  assert binaries == ['experiments.pretrain', 'experiments.pretrain', 'experiments.probe']
  assert '--init_from=runs/results/vae/seed0' in row['commands'][1]
  assert '--workdir=runs/results/se/seed0' in row['commands'][2]


@pytest.mark.long
def test_what_is_finished_is_not_done_again(built):
  def times() -> dict[Path, int]:
    found = (built.parent / 'runs').rglob('*.json')
    return {path: path.stat().st_mtime_ns for path in found}

  before = times()
  assert results.run('build', config_of(built, rows=('plain',)), signals.StopSignal())
  assert times() == before and len(before) > 8


@pytest.mark.long
def test_without_names_a_build_does_what_is_missing(built, tmp_path, monkeypatch):
  folder = Path(shutil.copytree(built, tmp_path / 'results'))
  asked = []
  monkeypatch.setattr(building, 'build', lambda where, planned, chosen, *rest: asked.append(chosen))
  results.run('build', config_of(folder), signals.StopSignal())
  (folder / 'rows' / 'plain.json').unlink()
  results.run('build', config_of(folder), signals.StopSignal())
  write(tmp_path, changed('encoders', 'se', 'flags', value=f'{TINY} --gamma=2'))
  results.run('build', config_of(folder), signals.StopSignal())
  results.run('build', config_of(folder, rows=('smooth',)), signals.StopSignal())
  assert asked == [[], ['plain'], ['plain', 'smooth'], ['smooth']]


@pytest.mark.long
def test_a_seed_that_is_added_to_a_row_is_built_alone(built, tmp_path):
  folder = write(tmp_path, CONTENT)
  before = rows.read(built, 'plain')
  assert before is not None
  rows.write(folder, {**before, 'machine': 'another machine', 'seeds': before['seeds'][:1]})
  assert results.run('build', config_of(folder, rows=('plain',)), signals.StopSignal())
  row = rows.read(folder, 'plain')
  assert row is not None
  assert row['seeds'][0] == before['seeds'][0]
  assert row['seeds'][1]['accuracy'] == before['seeds'][1]['accuracy']
  assert row['commands'] == before['commands']
  assert row['machine'] == f'another machine; {before["machine"]}'
  assert sorted(path.name for path in (tmp_path / 'runs' / 'vae').iterdir()) == ['seed1']
  assert '†' not in (tmp_path / 'RESULTS.md').read_text()


def test_seeds_of_other_data_do_not_join_a_row():
  one, other = measured('plain', [0.9, 0.1]), measured('plain', [0.8, 0.2], [0.7, 0.1])
  other['seeds'] = other['seeds'][1:]
  assert rows.seeds_of(rows.joined(other, one)) == [0, 1]
  with pytest.raises(ArgumentError, match='new seeds have data def, and those in its file abc'):
    rows.joined(one, {**other, 'data': 'def'})


@pytest.mark.parametrize(
  ('changes', 'in_part'),
  [({}, True), ({'revision': 1}, False), ({'commands': ['other']}, False)],
)
def test_seeds_of_older_code_are_not_kept(tmp_path, changes, in_part):
  folder = write(tmp_path, CONTENT)
  save(folder, measured('plain', [0.9, 0.1]))
  row = rows.read(folder, 'plain')
  assert row is not None
  rows.write(folder, {**row, **changes})
  assert (page(folder).in_part('plain') is not None) == in_part
  save(folder, measured('plain', [0.9, 0.1], [0.8, 0.2]))
  assert page(folder).in_part('plain') is None and page(folder).in_part('smooth') is None


@pytest.mark.long
def test_a_check_compares_the_means_with_what_is_expected(built, tmp_path, capsys):
  row = rows.read(built, 'plain')
  assert row is not None
  means = [rows.at_radius(row, radius).mean() for radius in (0.0, 0.1)]
  for shift, agrees in ((0.005, True), (0.02, False)):
    expected = {0.0: float(means[0]), 0.1: float(means[1]) + shift}
    folder = write(tmp_path, changed('rows', 'plain', 'expected', value=expected))
    runs = shutil.copytree(built.parent / 'runs', tmp_path / f'runs{shift}')
    (runs / 'results.json').unlink()  # it says that they are no check
    config = config_of(folder, rows=('plain',), workdir=str(runs))
    assert results.run('check', config, signals.StopSignal()) == agrees
    assert ('DIFFERS' in capsys.readouterr().out) != agrees
  assert not (tmp_path / 'RESULTS.md').exists()


def test_a_check_of_rows_without_numbers_is_refused(tmp_path):
  with pytest.raises(UsageError, match='smooth: these rows have no expected numbers yet'):
    results.run('check', config_of(write(tmp_path, CONTENT)), signals.StopSignal())


@pytest.mark.long
def test_a_check_builds_anew(built, tmp_path, capsys):
  row = rows.read(built, 'plain')
  assert row is not None
  expected = {0.0: row['seeds'][0]['accuracy'][0]}
  folder = write(tmp_path, changed('rows', 'plain', 'expected', value=expected))
  config = config_of(folder, rows=('plain',), seeds=1)
  assert results.run('check', config, signals.StopSignal())  # bit for bit, on one machine
  assert (tmp_path / 'runs' / 'vae' / 'seed0' / 'result.json').exists()
  assert not (tmp_path / 'runs' / 'vae' / 'seed1').exists()
  with pytest.raises(ArgumentError, match='has a finished check'):
    results.run('check', config, signals.StopSignal())


def test_a_check_of_code_that_was_edited_since_is_not_taken_up(tmp_path, monkeypatch):
  folder = write(tmp_path, changed('rows', 'plain', 'expected', value={0.0: 0.5}))
  config = config_of(folder, rows=('plain',), seeds=1)
  stop = signals.StopSignal()
  monkeypatch.setattr(results.building, 'build', lambda *_: stop.check())
  stop.signum = signal.SIGINT
  for edited in ('one state', 'another'):
    monkeypatch.setattr(results.provenance, 'commit', lambda: 'abc-dirty')
    monkeypatch.setattr(results.provenance, 'changes', lambda edited=edited: edited)
    error = app.Interrupted if edited == 'one state' else ArgumentError
    with pytest.raises(error):
      results.run('check', config, stop)


@pytest.mark.long
def test_runs_of_another_revision_are_not_taken_up(built, tmp_path):
  folder = write(tmp_path, changed('revision', value=3))
  config = config_of(folder, workdir=str(built.parent / 'runs'))
  with pytest.raises(ArgumentError, match='runs of other code'):
    results.run('build', config, signals.StopSignal())


def test_a_damaged_ledger_is_an_error(tmp_path):
  # Without it nothing says of which revision the runs are.
  (tmp_path / building.LEDGER).write_text('{')
  with pytest.raises(ArgumentError, match=r'results\.json: damaged.*remove the directory'):
    building.claim(tmp_path, {'revision': 2})
  assert (tmp_path / building.LEDGER).read_text() == '{'


@pytest.mark.long
def test_a_classifier_is_a_row(tmp_path):
  content = changed(
    'rows',
    'plain',
    value={
      'title': 'With labels',
      'supervised': '--dataset=mnist_5k --hidden_units=16 --latent_dim=4 --num_steps=20',
      'probe': ATTACK,
      'seeds': [3],
      'minutes': 1,
      'tolerance': 0.1,
    },
  )
  folder = write(tmp_path, content)
  assert results.run('build', config_of(folder, rows=('plain',)), signals.StopSignal())
  row = rows.read(folder, 'plain')
  assert row is not None and row['objective'] == rows.LABELS
  assert row['seeds'][0]['seed'] == 3 and row['seeds'][0]['held_out'] == {}
  line = next(line for line in page(folder).text().splitlines() if '`plain`' in line)
  assert line.split(' | ')[-4:-2] == ['', '']  # neither an ELBO nor latents


@pytest.mark.long
def test_a_run_that_fails_stops_only_what_needs_it(built, tmp_path, capsys):
  content = changed('encoders', 'se', 'flags', value=f'{TINY} --learning_rate=1e30')
  for row in content['rows'].values():
    row['seeds'] = [0]
  folder = write(tmp_path, content)
  runs = shutil.copytree(built.parent / 'runs', tmp_path / 'runs')
  for directory in (runs / 'se', runs / 'rows'):
    shutil.rmtree(directory)
  with pytest.raises(app.RunsFailedError):
    results.run('build', config_of(folder), signals.StopSignal())
  assert rows.read(folder, 'plain') is not None and rows.read(folder, 'smooth') is None
  assert 'se, seed 0' in capsys.readouterr().err
  assert '`make results ROWS=smooth`' in (tmp_path / 'RESULTS.md').read_text()


@pytest.mark.long
def test_a_build_that_is_interrupted_keeps_what_is_finished(built, tmp_path):
  content = changed('encoders', 'se', 'flags', value=f'{TINY} --gamma=2')  # not built before
  content['sections'] = [
    {'title': 'one', 'text': '', 'rows': [name]} for name in ('plain', 'smooth')
  ]
  folder = write(tmp_path, content)
  stop = signals.StopSignal()
  stop.signum = signal.SIGTERM  # heard when the next encoder trains
  config = config_of(folder, workdir=str(shutil.copytree(built.parent / 'runs', tmp_path / 'runs')))
  shutil.rmtree(tmp_path / 'runs' / 'se')
  with pytest.raises(signals.Interrupted):
    results.run('build', config, stop)
  assert rows.read(folder, 'plain') is not None and rows.read(folder, 'smooth') is None
  assert '`plain`' in (tmp_path / 'RESULTS.md').read_text()


def test_two_attacks_on_one_encoder_follow_each_other(tmp_path):
  content = changed('rows', 'smooth', 'encoder', value='vae')
  found = manifest.load(write(tmp_path, content) / 'manifest.yaml')
  waves = list(plan.Plan(found, tmp_path).waves(['plain', 'smooth']))
  names = [[job.name for job in wave] for wave in waves]
  assert names == [
    ['vae, seed 0', 'vae, seed 1'],
    ['plain, seed 0', 'plain, seed 1'],
    ['smooth, seed 0', 'smooth, seed 1'],
  ]


@pytest.mark.long
def test_the_machine_of_a_row_is_named_with_its_accelerators(built):
  found = plan.Plan(page(built).manifest, built.parent / 'runs')
  outcome = found.job('plain', 0).finished()
  of_gpus = outcome.attacked[0] | {'devices': ['NVIDIA H100', 'NVIDIA H100']}
  row = rows.measured('plain', 'Plain', 2, [], {0: (outcome.encoder, of_gpus)})
  assert row['machine'] == f'{rows.machine()}, NVIDIA H100'
  row = rows.measured('plain', 'Plain', 2, [], {0: (outcome.encoder, outcome.attacked[0])})
  assert row['machine'] == rows.machine()


@pytest.mark.long
def test_seeds_that_differ_in_more_are_no_row(built):
  found = plan.Plan(page(built).manifest, built.parent / 'runs')
  outcomes = {}
  for name, seed in (('plain', 0), ('smooth', 1)):
    outcome = found.job(name, seed).finished()
    outcomes[seed] = outcome.encoder, outcome.attacked[0]
  with pytest.raises(ArgumentError, match='seed 1 has objective se, and others vae'):
    rows.measured('both', 'Both', 2, [], outcomes)


def test_each_seed_has_radii_of_its_own():
  row = measured('plain', [0.9, 0.1], [0.8, 0.2])
  row['seeds'][1]['radii'] = [0.1, 0.0]
  assert rows.at_radius(row, 0.1).tolist() == [0.1, 0.8]
  with pytest.raises(KeyError):
    rows.at_radius(row, 0.2)


@pytest.mark.long
def test_runs_of_other_flags_are_not_taken_for_those_of_now(built, tmp_path, capsys):
  folder = write(tmp_path, changed('encoders', 'vae', 'flags', value=f'{TINY} --obs_var=7'))
  runs = shutil.copytree(built.parent / 'runs', tmp_path / 'runs')
  for name in ('plain', 'smooth'):  # of this encoder, and of one that starts from it
    with pytest.raises(app.RunsFailedError):
      results.run('build', config_of(folder, rows=(name,), workdir=str(runs)), signals.StopSignal())
    assert 'obs_var was 0.1, now 7.0' in capsys.readouterr().err
    assert rows.read(folder, name) is None


@pytest.mark.parametrize('action', ['build', 'check'])
def test_the_end_of_a_build_is_told_whatever_comes_of_the_page(
  action, tmp_path, monkeypatch, capsys
):
  content = changed('rows', 'plain', 'expected', value={0.0: 0.5})
  folder = write(tmp_path, content)

  def render(*_):
    raise UsageError('--results: README.md: it has no marks')

  def build(where, planned, chosen, stop, done):
    done('plain', measured('plain', [0.5, 0.2]))
    raise app.RunsFailedError('not finished: smooth')

  monkeypatch.setattr(results.building, 'build', build)
  monkeypatch.setattr(results, 'render', render)
  with pytest.raises(app.RunsFailedError, match='not finished: smooth'):
    results.run(action, config_of(folder, rows=('plain',)), signals.StopSignal())
  told = capsys.readouterr()
  if action == 'build':
    assert 'README.md' in told.err
  else:
    assert '| plain | 0 | 0.500' in told.out
