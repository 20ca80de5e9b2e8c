"""Sweeps, and the supervised ceiling: what they write and refuse, resumed and repeated."""

from __future__ import annotations

import contextlib
import csv
import dataclasses
import json
import shutil
import signal
import types
from pathlib import Path

import numpy as np
import pytest

from experiments import population, pretrain, probe, report, supervised, sweep
from experiments.cli import flags, signals, workdirs
from experiments.cli.flags import from_dict, to_dict
from experiments.scheduling import placement
from se_vae import training
from se_vae.config import ArgumentError
from se_vae.storage import checkpoints
from tests.experiments.scheduled import ALONE, assert_same_runs

DTYPE_PROMOTION = 'standard'  # optax takes part

# As in test_identity.py and test_probe.py, so that they share programs.
TINY = {'hidden_units': 16, 'latent_dim': 4, 'pgd_steps': 2, 'num_steps': 20, 'log_every': 10}
BASE = from_dict(pretrain.PretrainConfig, {**TINY, 'tensorboard': False})
ATTACK = '--radii=0,0.1 --num_examples=20 --pgd_steps=2 --check_examples=0'


def config_of(vary: str | None, attack: str = ATTACK) -> sweep.SweepConfig:
  return sweep.SweepConfig(vary=vary, probe=attack, placement=ALONE)


def stopped() -> signals.StopSignal:
  stop = signals.StopSignal()
  stop.signum = signal.SIGTERM
  return stop


@pytest.fixture(scope='module')
def swept(tmp_path_factory) -> Path:
  """Two seeds of one encoder, interrupted once."""
  workdir = tmp_path_factory.mktemp('sweep')
  arguments = config_of('objective=vae seed=3,4'), dataclasses.replace(BASE, workdir=str(workdir))
  with pytest.raises(signals.Interrupted):
    sweep.run(*arguments, stopped())
  sweep.run(*arguments, signals.StopSignal())
  return workdir


@pytest.mark.long
def test_a_sweep_writes_its_runs_and_the_means_over_seeds(swept):
  content = json.loads((swept / 'sweep.json').read_text())
  results = content['results']
  assert [result['varied'] for result in results] == [
    {'objective': 'vae', 'seed': 3},
    {'objective': 'vae', 'seed': 4},
  ]
  for result in results:
    directory = swept / f'objectivevae_seed{result["varied"]["seed"]}'
    alone = json.loads((directory / 'probe_digit.json').read_text())
    assert result['accuracy'] == alone['accuracy'] and alone['pretraining']['objective'] == 'vae'
    assert result['held_out'] == json.loads((directory / 'result.json').read_text())['test']
  # The first was interrupted: nobody knows how long it takes.
  assert results[0]['seconds'] is None and results[1]['seconds'] > 0.0
  with (swept / 'sweep.csv').open() as file:
    (row,) = csv.DictReader(file)
  assert row['objective'] == 'vae' and row['seeds'] == '2' and 'seed' not in row
  mean = np.mean([result['accuracy'] for result in results], axis=0)
  np.testing.assert_allclose([float(row['at 0']), float(row['at 0.1'])], mean, atol=5.1e-4)
  ends = np.array([result['interval'] for result in results])
  for i, radius in enumerate(('0', '0.1')):
    assert float(row[f'low at {radius}']) == pytest.approx(ends[:, i, 0].min(), abs=5.1e-4)
    assert float(row[f'high at {radius}']) == pytest.approx(ends[:, i, 1].max(), abs=5.1e-4)
  assert row['checks'] == 'checks: not run'
  assert all(result['checks_summary'] == 'checks: not run' for result in results)
  elbo = np.mean([result['held_out']['elbo'] for result in results])
  assert float(row['elbo']) == pytest.approx(elbo, abs=0.051)
  caption, _, header, rule, line = (swept / 'sweep.md').read_text().splitlines()
  assert (
    'adversarial accuracy' in caption
    and header.count('|') == rule.count('|') == line.count('|')
    and '| vae | 2 |' in line
  )
  assert line.endswith('| checks: not run |')
  assert (swept / 'sweep.png').stat().st_size > 1000


@pytest.mark.long
def test_finished_runs_are_not_repeated_and_their_seconds_are_kept(swept, monkeypatch, capsys):
  monkeypatch.setattr(training, 'run', pytest.fail)
  monkeypatch.setattr(probe, 'fit', pytest.fail)
  before = json.loads((swept / 'sweep.json').read_text())
  base = dataclasses.replace(BASE, workdir=str(swept))
  sweep.run(config_of('objective=vae seed=3,4'), base, signals.StopSignal())
  assert capsys.readouterr().out.endswith('\nchecks: not run\n')
  assert json.loads((swept / 'sweep.json').read_text())['results'] == before['results']


@pytest.mark.long
def test_seconds_and_rows_of_other_settings_are_not_kept(swept, tmp_path, monkeypatch):
  monkeypatch.setattr(training, 'run', pytest.fail)
  monkeypatch.setattr(probe, 'fit', pytest.fail)
  workdir = tmp_path / 'sweep'
  shutil.copytree(swept, workdir)
  before = json.loads((workdir / 'sweep.json').read_text())
  base = dataclasses.replace(BASE, workdir=str(workdir))

  def seconds(content) -> list[float | None]:
    (workdir / 'sweep.json').write_text(json.dumps(content))
    again = sweep.run(config_of('objective=vae seed=3,4'), base, signals.StopSignal())
    return [result['seconds'] for result in again['results']]

  expected = [result['seconds'] for result in before['results']]
  assert any(expected) and seconds(before) == expected  # another place of the same sweep
  config = before['config']
  other = {**config['pretraining'], 'num_steps': 7}
  assert seconds({**before, 'config': {**config, 'pretraining': other}}) == [None, None]
  foreign = {**before, 'results': [{'varied': {}, 'seconds': 1.0}]}
  assert seconds(foreign) == [None, None]  # without what a row has, the file is made anew


def test_every_combination_is_a_variant(tmp_path):
  vary = config_of('gamma=0.5,2 warm_start=true,false')
  variants = list(sweep.variants_of(vary, BASE, tmp_path))
  settings = [to_dict(each.job.pretraining) for each in variants]
  assert [(each['gamma'], each['warm_start']) for each in settings] == [
    (0.5, True),
    (0.5, False),
    (2.0, True),
    (2.0, False),
  ]
  assert len({each.job.pretraining.workdir for each in variants}) == 4
  for each, values in zip(variants, settings, strict=True):
    assert values['num_steps'] == TINY['num_steps']
    assert [a.workdir for a in each.job.attacks] == [each.job.pretraining.workdir]


def test_paths_that_vary_are_absolute_and_the_names_are_as_typed(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  vary = config_of('init_from=runs/a,runs/b gamma=0.12345678,0.12345679')
  variants = list(sweep.variants_of(vary, BASE, tmp_path))
  sources = [to_dict(each.job.pretraining)['init_from'] for each in variants]
  assert sources == [str(tmp_path / 'runs' / name) for name in 'aabb']
  assert variants[0].varied['init_from'] == 'runs/a'
  assert len({each.job.name for each in variants}) == 4


def test_a_variant_s_directory_has_a_name_of_its_own_below_the_work_directory(tmp_path):
  ordinary = {'gamma': 0.3, 'warm_start': True, 'dataset': 'mnist_5k', 'learning_rate': 1e-05}
  name = 'gamma0.3_warm_startTrue_datasetmnist_5k_learning_rate1e-05'
  assert sweep.directory_name(ordinary) == name
  assert sweep.directory_name({'init_from': '../../x'}) == 'init_from..-..-x~1b9c19271b32'
  places = ['/x', '../../../x', 'x/y', 'x-y', 'x~y', '..', 'x y', 'x\0', 'x' * 300, 'x' * 301, 'ü']
  places += ['a_dataset', 'a']
  variants = [
    {'init_from': place, 'dataset': dataset}
    for place in places
    for dataset in ('b', 'b_datasetb', '_datasetb')
  ]
  names = {sweep.directory_name(varied) for varied in variants}
  assert len(names) == len(variants)
  for name in names:
    assert Path(name).parts == (name,) and '\0' not in name and len(name) < 256
  (variant,) = sweep.variants_of(config_of('init_from=../../../x'), BASE, tmp_path)
  assert Path(str(variant.job.pretraining.workdir)).resolve().parent == tmp_path.resolve()


@pytest.mark.parametrize(
  ('vary', 'attack', 'message'),
  [
    (None, '', "--vary: is required: .*'gamma="),
    ('gama=1', '', "--vary: 'gama' is no setting"),
    ('workdir=x', '', "--vary: 'workdir' is no setting .* vary"),
    ('gamma=1 gamma=2', '', '--vary: gamma is there twice'),
    ('gamma=1,1.0', '', '--vary: a value of gamma is there twice'),
    ('gamma=x', '', '--vary: .*gamma=x'),
    ('gamma=-1', '', '--vary: --gamma: must be >= 0'),
    ('gamma=', '', '--vary: .*gamma='),
    ('gamma=1', '--radi=2', "--probe: Unknown command line flag 'radi'"),
    ('gamma=1', "--task='digit", '--probe: No closing quotation'),
    ('gamma=1', 'digit', "--probe: unexpected argument 'digit'"),
    ('gamma=1', '--workdir=x', '--probe: --workdir is a flag of its own'),
    ('gamma=1', '--task=color', '--probe: --task: mnist_5k has no task color'),
    ('gamma=1', '--num_examples=1001', '--probe: --num_examples: must be at most the 1000'),
    ('gamma=1', '--output=x', '--probe: --output changes nothing here'),
    ('gamma=1', '--surrogate=nowhere', '--probe: --surrogate: .*nowhere is neither a directory'),
    ('gamma=1', '--surrogate=color_mnist_mlp_vae_latent128', '--probe: --surrogate: takes images'),
  ],
)
def test_what_a_sweep_refuses_before_it_writes(tmp_path, vary, attack, message):
  base = dataclasses.replace(BASE, workdir=str(tmp_path / 'w'))
  with pytest.raises(ArgumentError, match=message):
    sweep.run(config_of(vary, attack), base, signals.StopSignal())
  assert not (tmp_path / 'w').exists()


@pytest.mark.parametrize('vary', ['pgd_steps=1,2 seed=0,1', 'arch=mlp,convnet'])
def test_what_cannot_vary_in_a_population_is_named(tmp_path, vary):
  base = dataclasses.replace(BASE, workdir=str(tmp_path / 'w'))
  config = dataclasses.replace(config_of(vary), vectorize=True)
  with pytest.raises(ArgumentError) as refused:
    sweep.run(config, base, signals.StopSignal())
  message = f'--vectorize: --{vary.partition("=")[0]}: must be the same in all runs of a population'
  assert flags.name_flags(refused.value) == message
  assert not (tmp_path / 'w').exists()


# ---------------------------------------------------------------------------------------------
# Several processes, and several encoders in one program
# ---------------------------------------------------------------------------------------------

VARY = 'objective=vae seed=3,4'  # as in `swept`
FIRST, SECOND = 'objectivevae_seed3', 'objectivevae_seed4'


@pytest.mark.long
def test_the_shards_of_a_job_array_make_one_sweep(swept, tmp_path, capsys):
  base = dataclasses.replace(BASE, workdir=str(tmp_path))
  for index, finished in ((1, {SECOND}), (0, {FIRST, SECOND})):
    config = dataclasses.replace(config_of(VARY), shard=f'{index}/2')
    sweep.run(config, base, signals.StopSignal())
    assert {path.name for path in tmp_path.glob('objective*')} == finished
    assert ('1 of 2 variants are not finished' in capsys.readouterr().out) == (index == 1)
  assert_same_runs(tmp_path, swept, {FIRST, SECOND})
  assert (tmp_path / 'sweep.csv').read_bytes() == (swept / 'sweep.csv').read_bytes()


@pytest.mark.long
def test_a_run_that_another_process_works_on_is_waited_for_and_not_repeated(
  swept, tmp_path, monkeypatch, capsys
):
  """The other process holds the lock of the first run, and finishes it while this one waits."""
  monkeypatch.setattr(training, 'run', pytest.fail)
  shutil.copytree(swept / SECOND, tmp_path / SECOND)
  with contextlib.ExitStack() as other:
    other.enter_context(workdirs.lock(tmp_path / FIRST))

    def finish(_: float) -> None:
      shutil.copytree(swept / FIRST, tmp_path / FIRST, dirs_exist_ok=True)
      other.close()

    monkeypatch.setattr(placement, 'time', types.SimpleNamespace(sleep=finish))
    base = dataclasses.replace(BASE, workdir=str(tmp_path))
    sweep.run(config_of(VARY), base, signals.StopSignal())
  assert f'{tmp_path / FIRST} is in use by process ' in capsys.readouterr().err
  assert_same_runs(tmp_path, swept, {FIRST, SECOND})
  assert (tmp_path / 'sweep.csv').read_bytes() == (swept / 'sweep.csv').read_bytes()


@pytest.mark.long
def test_a_population_trains_what_runs_of_their_own_train(swept, tmp_path, capsys):
  config = dataclasses.replace(config_of(VARY), vectorize=True)
  base = dataclasses.replace(BASE, workdir=str(tmp_path))
  sweep.run(config, base, signals.StopSignal())
  assert 'population of 2: ' in capsys.readouterr().err
  for run in (FIRST, SECOND):
    mine, theirs = (
      [json.loads(line) for line in (path / run / 'metrics.jsonl').read_text().splitlines()]
      for path in (tmp_path, swept)
    )
    for row, expected in zip(mine, theirs, strict=True):
      assert row == pytest.approx(expected, rel=1e-3, abs=1e-3)  # rounding
    assert (tmp_path / run / 'probe_digit.json').exists()
  with pytest.MonkeyPatch.context() as patch:  # nothing is left to do
    patch.setattr(population, 'train_population', pytest.fail)
    patch.setattr(probe, 'fit', pytest.fail)
    sweep.run(config, base, signals.StopSignal())


def supervised_config(workdir: Path, **changes) -> supervised.SupervisedConfig:
  sizes = {'hidden_units': 16, 'latent_dim': 8, 'pgd_steps': 2, 'num_steps': 120}
  attack = '--radii=0,0.05 --num_examples=200 --pgd_steps=5 --check_examples=0'
  options = {**sizes, 'radius': 0.05, 'learning_rate': 1e-2, 'probe': attack, **changes}
  return from_dict(supervised.SupervisedConfig, {'workdir': str(workdir), **options})


def test_a_supervised_run_may_go_on_with_other_checkpoints():
  assert supervised._settings({'checkpoint_every': 5}) == supervised._settings({})
  assert supervised._settings({'num_steps': 5}) != supervised._settings({})


@pytest.mark.long
def test_a_supervised_classifier_learns_and_ends_as_if_never_interrupted(
  tmp_path, monkeypatch, capsys
):
  straight = supervised.run(supervised_config(tmp_path / 'a'), signals.StopSignal())
  clean, attacked = straight['accuracy']
  assert clean > 0.4 and 0.2 < attacked <= clean  # chance is a tenth
  with pytest.raises(signals.Interrupted):
    supervised.run(supervised_config(tmp_path / 'b'), stopped())
  with pytest.raises(ArgumentError, match=r'workdir: .*other settings'):
    supervised.run(supervised_config(tmp_path / 'b', radius=0.1), signals.StopSignal())
  resumed = supervised.run(supervised_config(tmp_path / 'b'), signals.StopSignal())
  assert resumed['accuracy'] == straight['accuracy']
  one, other = (checkpoints.steps(tmp_path / name / 'checkpoints')[0] for name in 'ab')
  assert one[0] == 120 and one[1].name == other[1].name  # which holds the SHA-256

  with monkeypatch.context() as patch:  # what is finished is not attacked again
    patch.setattr(probe, 'evaluate', lambda *_, **__: pytest.fail('attacked'))
    patch.chdir(tmp_path)
    assert supervised.run(supervised_config(Path('b')), signals.StopSignal()) == resumed
    # What is printed names the failed checks, with the curve and its intervals.
    check = {'number': 7, 'name': 'Square is weaker', 'verdict': 'fail', 'figure': '9 of 200'}
    result = tmp_path / 'b' / 'result.json'
    honest = result.read_bytes()
    result.write_text(json.dumps(resumed | {'checks': [check]}))
    patch.setattr(flags, 'from_flags', lambda _: supervised_config(tmp_path / 'b'))
    supervised.main()
    header, _, _, attacked_line, failed, summary = capsys.readouterr().out.splitlines()
    assert header.endswith('b: digit classifier, trained with labels, on 200 test images')
    low, high = resumed['interval'][1]
    assert attacked_line == f' 0.050  {attacked:.3f} [{low:.3f}, {high:.3f}]'
    assert failed == 'FAIL      7 Square is weaker: 9 of 200'
    assert summary == 'checks: 0 passed, 1 failed (7: Square is weaker), 0 skipped'
    report.run(report.ReportConfig(workdir=str(tmp_path / 'b')))
    assert capsys.readouterr().out == f'{tmp_path / "b" / "report.html"}\n{summary}\n'
    result.write_bytes(honest)
    with pytest.raises(pytest.fail.Exception):
      supervised.run(supervised_config(Path('b'), probe='--radii=0.1'), signals.StopSignal())

  # Nor is it given back without its checkpoint.
  other[1].write_bytes(b'')
  again = supervised.run(supervised_config(tmp_path / 'b'), signals.StopSignal())
  assert again['accuracy'] == resumed['accuracy'] and again['checkpoint'] == resumed['checkpoint']
