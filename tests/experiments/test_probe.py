"""The probe binary: its files, its verdict and its exit code, interrupted and resumed."""

from __future__ import annotations

import csv
import dataclasses
import json
import signal

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import pretrain, probe, probe_settings, supervised
from experiments.benchmarks import attack_comparison
from experiments.cli import flags, signals
from experiments.cli.flags import UsageError
from experiments.visual import probe_results
from se_vae.config import ArgumentError
from se_vae.evaluation import linear_probe, robustness, sanity_checks
from se_vae.storage import checkpoints, pretrained
from tests.experiments.tiny_run import train

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part

RADII = (0.0, 0.05, 0.3)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return train(tmp_path_factory.mktemp('run'), dataset='mnist_5k', num_steps=40)


@pytest.fixture(scope='module')
def config(workdir):
  return probe_settings.ProbeConfig(
    workdir=str(workdir), radii=RADII, pgd_steps=4, num_examples=48, num_queries=20
  )


@pytest.fixture(scope='module')
def result(config):
  return probe.run(config, signals.StopSignal())


def test_the_evidence_lies_beside_the_curve(workdir, result):
  assert [check['number'] for check in result['checks']] == list(range(1, 14))
  written = json.loads((workdir / 'robustness.json').read_text())
  assert written == {'digit': json.loads((workdir / 'probe_digit.json').read_text())}
  assert written['digit']['accuracy'] == result['accuracy']
  saved = np.load(workdir / 'probe_digit.npz')
  offsets = np.abs(np.float64(saved['images']) - prepared_images(workdir))
  radius = saved['broken_radius']
  allowed = np.where(np.isfinite(radius), radius, 0.0)[:, None, None, None]
  assert np.all(offsets <= allowed + np.spacing(np.float32(1.0)))
  assert saved['images'].min() >= 0.0 and saved['images'].max() <= 1.0
  np.testing.assert_array_equal(saved['correct'], radius[None] > np.array(RADII)[:, None])
  with Image.open(workdir / 'probe_digit_images.png') as picture:
    assert picture.size[1] == 2 * 28 * 4  # original, adversarial, and both reconstructed
    assert picture.size[0] > 10 * 2 * 28  # the images, beside the labels of the rows
  assert not list(workdir.glob('*.state.npz'))
  fitted = linear_probe.LinearProbe(saved['probe_weights'], saved['probe_bias'])
  prepared = probe.prepare(probe_settings.ProbeConfig(workdir=str(workdir), num_examples=48))
  classifier = linear_probe.ProbedEncoder(prepared.model)
  predicted = classifier(prepared.images, prepared.params, fitted).argmax(axis=1)
  assert np.mean(predicted == prepared.labels) == result['accuracy'][0]


def prepared_images(workdir):
  return probe.prepare(probe_settings.ProbeConfig(workdir=str(workdir), num_examples=48)).images


def test_attacks_and_certificates_are_in_full_float32(monkeypatch, config, tmp_path):
  """A GPU would round the factors of products to 10 bits by default."""

  class Reached(Exception):
    pass

  def evaluate(*_, **__):
    raise Reached(jax.config.jax_default_matmul_precision)

  monkeypatch.setattr(robustness, 'evaluate', evaluate)
  monkeypatch.setattr(supervised, '_train', lambda *_: (linear_probe.ProbedEncoder(None), None))
  of_probe = dataclasses.replace(config, output=str(tmp_path / 'probe'))
  of_classifier = supervised.SupervisedConfig(workdir=str(tmp_path / 'classifier'))
  for binary, settings in ((probe, of_probe), (supervised, of_classifier)):
    with pytest.raises(Reached, match='highest'):
      binary.run(settings, signals.StopSignal())


class DuringTheAttack(signals.StopSignal):
  """A SIGTERM that comes during the second attempt of the attack."""

  looks = 0

  def requested(self):
    self.looks += 1
    return signal.SIGTERM if self.looks > 4 else None


def test_an_interrupted_attack_goes_on(config, workdir, result):
  again = dataclasses.replace(config, num_queries=19)
  with pytest.raises(signals.Interrupted):
    probe.run(again, DuringTheAttack())
  (state,) = workdir.glob('*.state.npz')
  assert np.load(state)['done'] == 1
  resumed = probe.run(again, signals.StopSignal())
  assert resumed['accuracy'] == result['accuracy'] and resumed['cost'] == result['cost']
  assert not list(workdir.glob('*.state.npz'))


@pytest.mark.parametrize('damage', [b'', b'not an attack log', None])
def test_a_damaged_or_foreign_state_is_warned_about_and_started_afresh(
  config, workdir, result, capsys, monkeypatch, damage
):
  again = dataclasses.replace(config, check_examples=0)
  (workdir / 'probe_digit.json').unlink(missing_ok=True)
  with pytest.raises(signals.Interrupted):
    probe.run(again, DuringTheAttack())
  (state,) = workdir.glob('*.state.npz')
  if damage is None:
    monkeypatch.setattr(robustness, '_fingerprint', lambda *_: 'another')
  else:
    state.write_bytes(damage)
  assert probe.run(again, signals.StopSignal())['accuracy'] == result['accuracy']
  assert 'warning: ' in (error := capsys.readouterr().err) and 'starting afresh' in error
  assert not list(workdir.glob('*.state.npz'))


@pytest.fixture(scope='module')
def colored(tmp_path_factory):
  """Two runs on coloured digits, with different seeds."""
  paths = [tmp_path_factory.mktemp(name) for name in ('first', 'second')]
  for seed, path in enumerate(paths):
    train(path, num_steps=40, seed=seed)
  return paths


def test_surrogate_joint_attack_and_latent_shift_are_written_too(colored, capsys, monkeypatch):
  workdir, surrogate = colored
  config = probe_settings.ProbeConfig(
    workdir=str(workdir),
    surrogate=str(surrogate),
    joint=True,
    moves=True,
    radii=RADII,
    pgd_steps=4,
    num_examples=48,
    num_queries=20,
    check_examples=16,
  )
  monkeypatch.setattr(flags, 'from_flags', lambda _: config)
  probe.main()
  output = capsys.readouterr().out
  assert 'digit and color together (checks: not run): ' in output
  assert 'mean latent shift, squared W2: ' in output
  result = json.loads((workdir / 'probe_digit.json').read_text())
  transfer = result['checks'][7]['values']['transfer']
  assert len(transfer) == len(RADII) and transfer[0] == result['checks'][2]['values']['accuracy'][0]
  assert result['surrogate']['seed'] == 1

  # One image must mislead both probes, which is never easier than the easier of the two.
  joint, moves = result['joint'], result['moves']
  assert joint['tasks'] == ['digit', 'color'] and joint['accuracy'][0] > result['accuracy'][0]
  assert np.all(np.diff(joint['accuracy']) <= 0.0)
  quantiles = np.array(list(moves['quantiles'].values()))
  assert moves['mean'][0] < 1e-6 * moves['mean'][1] < 1e-6 * moves['mean'][2]  # float32
  assert quantiles.shape == (5, len(RADII)) and np.all(np.diff(quantiles[:, 1:], axis=0) > 0.0)

  with (workdir / 'probe_digit.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [float(row['joint_accuracy']) for row in rows] == joint['accuracy']
  assert [[float(row['joint_low']), float(row['joint_high'])] for row in rows] == joint['interval']
  with (workdir / 'probe_digit_moves.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [float(row['mean_squared_w2']) for row in rows] == moves['mean']
  assert [float(row['quantile_0.95']) for row in rows] == moves['quantiles']['0.95']
  with Image.open(workdir / 'probe_digit.png') as picture:
    assert picture.size[0] > 2 * picture.size[1]  # two panels


@pytest.mark.parametrize('flag', ['joint', 'moves'])
def test_a_signal_stops_the_other_attacks_too(colored, flag, monkeypatch):
  stop = signals.StopSignal()
  stop.signum = signal.SIGINT
  monkeypatch.setattr(robustness, 'evaluate', pytest.fail)
  config = probe_settings.ProbeConfig(
    workdir=str(colored[0]), radii=(0.1,), pgd_steps=4, num_examples=16, **{flag: True}
  )
  with pytest.raises(signals.Interrupted):
    probe.run(config, stop)


def test_a_signal_stops_the_checks_too(config, monkeypatch, workdir):
  stop, real = signals.StopSignal(), sanity_checks.run_checks

  def signalled(*operands, **options):
    stop.signum = signal.SIGTERM
    return real(*operands, **options)

  monkeypatch.setattr(sanity_checks, 'run_checks', signalled)
  with pytest.raises(signals.Interrupted):
    probe.run(dataclasses.replace(config, num_queries=21), stop)
  (state,) = workdir.glob('*.state.npz')  # the attacks are not repeated
  state.unlink()


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'surrogate': 'nowhere'}, 'surrogate: holds no pretrained encoder'),
    ({'surrogate': 'itself'}, 'surrogate: is the encoder that is attacked'),
    ({'surrogate': 'colored'}, r'surrogate: takes images of shape \(28, 28, 3\)'),
    ({'surrogate': 'resnet'}, r'surrogate: .*resnet is neither a directory nor .*\(mnist_mlp_vae'),
    ({'surrogate': 'color_mnist_mlp_vae_latent128'}, r'surrogate: takes images of shape'),
    ({'surrogate': 'colored', 'check_examples': 0}, 'surrogate: .*check_examples above 0'),
    ({'joint': True}, 'joint: needs several tasks; mnist_5k has digit alone'),
  ],
)
def test_what_does_not_fit_is_refused_before_anything_is_fitted(
  config, workdir, colored, tmp_path, monkeypatch, change, message
):
  places = {'nowhere': tmp_path, 'itself': workdir / '.', 'colored': colored[0]}
  if 'surrogate' in change:
    change = change | {'surrogate': str(places.get(change['surrogate'], change['surrogate']))}
  monkeypatch.setattr(probe, 'fit', pytest.fail)
  with pytest.raises(ArgumentError, match=message):
    probe.run(dataclasses.replace(config, **change), signals.StopSignal())


@pytest.mark.slow
@pytest.mark.parametrize('attack', ['standard', 'worst_case'])
def test_an_undefended_encoder_is_not_robust(tmp_path, attack):
  network = {'hidden_units': 100, 'latent_dim': 16}
  train(tmp_path, dataset='mnist_5k', **network, num_steps=800)
  config = probe_settings.ProbeConfig(
    workdir=str(tmp_path), attack=attack, radii=(0.0, 0.3), num_examples=100, check_examples=0
  )
  clean, attacked = probe.run(config, signals.StopSignal())['accuracy']
  assert clean > 0.7 and attacked <= 0.02


@pytest.mark.parametrize(('strict', 'passed', 'code'), [(True, False, 1), (True, True, 0)])
def test_a_failed_check_is_an_exit_code_where_that_is_asked_for(
  config, result, monkeypatch, capsys, strict, passed, code
):
  verdict = 'pass' if passed else 'fail'
  checks = [{**check, 'verdict': verdict, 'passed': passed} for check in result['checks']]
  monkeypatch.setattr(flags, 'from_flags', lambda _: dataclasses.replace(config, strict=strict))
  monkeypatch.setattr(probe, 'run', lambda *_: {**result, 'checks': checks})
  if code:
    with pytest.raises(SystemExit) as error:
      probe.main()
    assert error.value.code == code
  else:
    probe.main()
  output = capsys.readouterr().out
  assert ('FAIL' in output) != passed and 'representation is informative' in output
  summary = 'checks: 13 passed, 0 failed, 0 skipped\n' if passed else '13 failed'
  assert summary in output.splitlines(keepends=True)[-1]


def test_the_comparison_says_what_is_missing(workdir, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'foolbox', None)
  with pytest.raises(UsageError, match='pip install torch foolbox'):
    attack_comparison.run(
      attack_comparison.ComparisonConfig(workdir=str(workdir)), signals.StopSignal()
    )


def test_a_pretrained_encoder_is_attacked_on_other_data_and_left_as_it_is(tmp_path):
  name = 'mnist_mlp_se_smoothed_latent128'
  config = probe_settings.ProbeConfig(
    pretrained=name,
    output=str(tmp_path / 'out'),
    dataset='mnist_5k',
    num_examples=100,
    radii=(0.0, 0.1),
    pgd_steps=10,
    check_examples=0,
  )
  run = tmp_path / 'run'
  run.mkdir()
  (run / 'config.json').write_text('{}')
  before = sorted(pretrained.workdir(name).rglob('*'))
  clean, attacked = probe.run(config, signals.StopSignal())['accuracy']
  assert clean > 0.8 and attacked > 0.5
  assert sorted(pretrained.workdir(name).rglob('*')) == before
  assert probe_results.as_text(json.loads((tmp_path / 'out' / 'probe_digit.json').read_text()))
  for changes, message in (
    ({'pretrained': 'resnet'}, f'pretrained: must be one of .*{name}'),
    ({'output': None}, 'pretrained: is in place of a run in workdir, and needs output'),
    ({'dataset': 'color_mnist_5k'}, 'dataset: has images of shape'),
    ({'output': str(run)}, 'output: .*run holds another run'),
  ):
    with pytest.raises(ArgumentError, match=message):
      probe.run(dataclasses.replace(config, **changes), signals.StopSignal())


@pytest.mark.parametrize(
  ('dataset', 'size'), [('mnist_5k', None), ('folder:pictures', 28), (None, 28)]
)
def test_the_size_of_images_is_that_of_sets_that_have_many(tmp_path, monkeypatch, dataset, size):
  monkeypatch.setattr(pretrain, 'load_dataset', lambda stored, output: stored)
  trained = {'dataset': 'folder:others', 'image_size': 28}
  config = probe_settings.ProbeConfig(workdir=str(tmp_path), dataset=dataset)
  stored = probe._load_dataset(config, {'config': trained}, tmp_path)
  assert (stored.dataset, stored.image_size) == (dataset or 'folder:others', size)


def test_a_pretrained_encoder_is_a_surrogate_by_its_name(config, tmp_path, monkeypatch):
  first, second = pretrained.names()[:2]
  config = dataclasses.replace(config, output=str(tmp_path / 'out'), surrogate=first)
  result = probe.run(config, signals.StopSignal())
  (_, checkpoint), *_ = checkpoints.steps(pretrained.workdir(first) / 'checkpoints')
  assert result['surrogate_checkpoint'] == checkpoint.name
  assert result['surrogate']['latent_dim'] == 128 and result['config']['surrogate'] == first
  assert len(result['checks'][7]['values']['transfer']) == len(RADII)

  # The checkpoint counts, whichever way it is named.
  monkeypatch.setattr(probe, 'fit', lambda *_: pytest.fail('fitted again'))
  place = str(pretrained.workdir(first))
  assert probe.run(dataclasses.replace(config, surrogate=place), signals.StopSignal()) == result
  with pytest.raises(pytest.fail.Exception, match='fitted again'):
    probe.run(dataclasses.replace(config, surrogate=second), signals.StopSignal())
  itself = {'workdir': None, 'pretrained': first, 'dataset': 'mnist_5k'}
  with pytest.raises(ArgumentError, match='surrogate: is the encoder that is attacked'):
    probe.prepare(dataclasses.replace(config, **itself))
