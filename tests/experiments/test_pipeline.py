"""End to end, as a user runs it: pretrain, checkpoint, probe; killed and resumed."""

from __future__ import annotations

import csv
import dataclasses
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

import se_vae
from experiments import pretrain, probe, probe_settings
from experiments.cli import devices, flags, signals
from se_vae import data, training
from se_vae.config import ArgumentError
from se_vae.storage import checkpoints, pretrained
from tests.experiments.tiny_run import unexamined

DTYPE_PROMOTION = 'standard'  # optax takes part

ROOT = Path(__file__).parents[2]
TINY = {'hidden_units': 16, 'latent_dim': 4, 'pgd_steps': 2, 'num_steps': 30, 'log_every': 10}
TINY |= {'tensorboard': False}  # test_watch.py is about it
TINY |= {'dataset': 'color_mnist_5k'}  # for all, so that they share programs
OLD = ROOT / 'tests' / 'storage' / 'old_checkpoint'  # of gray images


def config(workdir: Path, **changes) -> pretrain.PretrainConfig:
  return flags.from_dict(pretrain.PretrainConfig, {'workdir': str(workdir), **TINY, **changes})


def command(binary: str, **flags) -> list[str]:
  arguments = [f'--{name}={value}' for name, value in flags.items()]
  return [sys.executable, '-m', f'experiments.{binary}', *arguments]


def rows(workdir: Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def picture_size(path: Path) -> tuple[int, int]:
  with Image.open(path) as picture:
    return picture.size


@pytest.fixture(scope='module')
def trained(tmp_path_factory) -> Path:
  """A coloured Smooth Encoder after a short training."""
  workdir = tmp_path_factory.mktemp('run')
  pretrain.run(config(workdir, num_steps=60), signals.StopSignal())
  return workdir


def check_fit_gives_the_same(workdir: Path, params=None) -> None:
  """As the binary that left this directory, from these parameters or fresh ones."""
  model, expected = se_vae.load_model(workdir)
  values = json.loads((workdir / 'result.json').read_text())['config']
  train_config = pretrain.stored_config(values).train
  images = data.load('color_mnist_5k').train.images
  options = {'steps_per_row': values['log_every'], 'mesh': devices.mesh_for(values['batch_size'])}
  fitted, losses = se_vae.fit(model, train_config, images, params=params, **options)
  jax.tree.map(np.testing.assert_array_equal, fitted, expected)
  assert [row['loss'] for row in losses] == [row['loss'] for row in rows(workdir)]


@pytest.mark.long
def test_fit_gives_the_parameters_of_the_binary(trained):
  check_fit_gives_the_same(trained)


def test_pretrain_writes_what_it_promises(trained):
  result = json.loads((trained / 'result.json').read_text())
  written = rows(trained)
  assert [row['step'] for row in written] == list(range(10, 61, 10))
  assert written[-1]['loss'] < written[0]['loss']
  assert result['step'] == 60 and np.isfinite(result['test']['elbo'])
  saved = json.loads((trained / 'config.json').read_text())
  assert saved['config']['gamma'] == 1.0 and 'jax' in saved['versions']
  width, height = picture_size(trained / 'reconstructions.png')
  assert width > 2 * 28 * 10 and height == 2 * 28 * 4  # the rows have labels
  assert picture_size(trained / 'samples.png') == (2 * 28 * 10, 2 * 28 * 10)
  assert picture_size(trained / 'traversals.png') == (2 * 28 * 10, 2 * 28 * 4)


def test_an_encoder_loads_in_a_notebook(trained):
  model, params = se_vae.load_model(trained)
  q = model.encode(params, np.zeros((2, 28, 28, 3), np.float32))
  assert q.mean.shape == (2, 4) and np.isfinite(q.mean).all()


def test_probe_writes_what_it_promises(trained):
  settings = probe_settings.ProbeConfig(
    workdir=str(trained),
    task='color',
    radii=(0.0, 0.1),
    pgd_steps=3,
    num_examples=50,
    check_examples=0,
  )
  result = probe.run(settings, signals.StopSignal())
  with np.load(trained / 'probe_color.npz') as saved:
    assert saved['correct'].shape == (2, 50)
    np.testing.assert_allclose(saved['correct'].mean(axis=1), result['accuracy'])
  assert result['accuracy'][0] > 0.5  # seven balanced colours: chance is 1 / 7
  for accuracy, (low, high) in zip(result['accuracy'], result['interval'], strict=True):
    assert low <= accuracy <= high
  with (trained / 'probe_color.csv').open() as file:
    table = list(csv.DictReader(file))
  assert [float(row['radius']) for row in table] == [0.0, 0.1]
  assert [float(row['accuracy']) for row in table] == result['accuracy']
  assert picture_size(trained / 'probe_color.png')[0] > 100
  # Another batch size is another sequence of dispatches, and the same result.
  (trained / 'probe_color.json').unlink()  # or it would be given back
  again = probe.run(dataclasses.replace(settings, batch_size=7), signals.StopSignal())
  np.testing.assert_array_equal(again['accuracy'], result['accuracy'])


def test_probe_refuses_what_the_run_cannot_answer(tmp_path):
  stop = signals.StopSignal()
  run = str(shutil.copytree(OLD, tmp_path / 'run'))
  with pytest.raises(ArgumentError, match='task: mnist_5k has no task color'):
    probe.run(probe_settings.ProbeConfig(workdir=run, task='color'), stop)
  with pytest.raises(ArgumentError, match='num_examples: must be at most the 1000'):
    probe.run(probe_settings.ProbeConfig(workdir=run, num_examples=1001), stop)
  with pytest.raises(ArgumentError, match='workdir: holds no pretrained encoder'):
    probe.run(probe_settings.ProbeConfig(workdir=str(tmp_path / 'empty')), stop)


def test_a_finished_run_is_not_repeated_and_other_settings_are_refused(trained):
  stop = signals.StopSignal()
  before = (trained / 'result.json').stat().st_mtime_ns
  settings = config(trained, num_steps=60)
  assert pretrain.run(settings, stop)['step'] == 60
  assert (trained / 'result.json').stat().st_mtime_ns == before
  with pytest.raises(ArgumentError, match=r'gamma: .*gamma was 1.0, now 2.0'):
    pretrain.run(flags.replace(settings, gamma=2.0), stop)


def test_an_interrupted_run_ends_bitwise_equal(trained, tmp_path):
  """Stopped at every dispatch and resumed each time, against never stopped."""
  settings = config(tmp_path, num_steps=60)
  for _ in range(2):
    stop = signals.StopSignal()
    stop.signum = signal.SIGTERM
    with pytest.raises(signals.Interrupted):
      pretrain.run(settings, stop)
  pretrain.run(settings, signals.StopSignal())
  assert rows(tmp_path) == rows(trained)
  results = [json.loads((path / 'result.json').read_text())['test'] for path in (tmp_path, trained)]
  assert results[0] == results[1]
  one, other = (
    checkpoints.load_latest(path / 'checkpoints', on_damage=pytest.fail).tensors
    for path in (trained, tmp_path)
  )
  assert one.keys() == other.keys()
  for name, array in one.items():
    np.testing.assert_array_equal(array, other[name], err_msg=name)


@pytest.mark.long
def test_a_resumed_run_keeps_its_clusters(tmp_path, monkeypatch):
  """They come from the checkpoint, whatever clustering finds the second time."""
  straight, broken = tmp_path / 'straight', tmp_path / 'broken'
  changes = {'objective': 'clusters', 'num_steps': 20, 'num_devices': 1}
  found = np.arange(4000, dtype=np.int32) % 4
  monkeypatch.setattr(data, 'spectral_clusters', lambda images, count, **_: found[: len(images)])
  stop = signals.StopSignal()
  stop.signum = signal.SIGTERM
  with pytest.raises(signals.Interrupted):
    pretrain.run(config(broken, **changes), stop)
  with unexamined():
    pretrain.run(config(straight, **changes), signals.StopSignal())
    found = np.zeros_like(found)
    pretrain.run(config(broken, **changes), signals.StopSignal())
  assert rows(broken) == rows(straight)


def test_metrics_of_a_killed_run_have_no_gap_and_no_repeat(tmp_path):
  """Rows after the last checkpoint, and half a row, are written again."""
  stop = signals.StopSignal()
  stop.signum = signal.SIGTERM
  with pytest.raises(signals.Interrupted):
    pretrain.run(config(tmp_path), stop)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 20, "loss": 0.0}\n{"step": 3')
  with unexamined():
    pretrain.run(config(tmp_path), signals.StopSignal())
  assert [row['step'] for row in rows(tmp_path)] == [10, 20, 30]
  assert all(row['loss'] != 0.0 for row in rows(tmp_path))


def test_a_loss_that_is_not_finite_stops_the_run_and_keeps_the_checkpoint(tmp_path):
  settings = config(tmp_path, learning_rate=1e30)
  with pytest.raises(training.NotFiniteError, match=r'step [0-9]+ is not finite'):
    pretrain.run(settings, signals.StopSignal())
  assert not (tmp_path / 'result.json').exists()
  report = json.loads((tmp_path / 'not_finite.json').read_text())
  expected = data.batch_indices(0, report['step'], 1, settings.batch_size, 4000)[0]
  assert report['examples'] == expected.tolist()
  assert None in report['metrics'].values()  # JSON has no NaN or infinity


@pytest.mark.slow
def test_full_covariance_encoders_train_and_are_probed(tmp_path):
  pretrain.run(config(tmp_path, covariance='full', num_steps=20), signals.StopSignal())
  losses = [row['loss'] for row in rows(tmp_path)]
  assert losses[-1] < losses[0]
  result = probe.run(
    probe_settings.ProbeConfig(
      workdir=str(tmp_path), radii=(0.0, 0.1), pgd_steps=2, num_examples=20, check_examples=0
    ),
    signals.StopSignal(),
  )
  assert 0.0 <= result['accuracy'][1] <= result['accuracy'][0] <= 1.0


@pytest.mark.slow  # test_faults.py sends SIGTERM, and test_app.py has the codes of both
def test_ctrl_c_saves_and_the_same_command_goes_on(tmp_path):
  """The binary itself, interrupted as from a terminal."""
  line = command('pretrain', workdir=tmp_path, **{**TINY, 'num_steps': 100_000})
  env = {
    **os.environ,
    'JAX_NUM_CPU_DEVICES': str(jax.device_count()),
  }  # the programs of this process
  process = subprocess.Popen(line, cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
  deadline = time.monotonic() + 90
  while not (tmp_path / 'metrics.jsonl').exists() or not rows(tmp_path):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.05)
  process.send_signal(signal.SIGINT)
  _, stderr = process.communicate(timeout=60)
  assert process.returncode == 128 + signal.SIGINT, stderr
  assert 'SIGINT: saved. Run the same command again' in stderr
  (step, _), *_ = checkpoints.steps(tmp_path / 'checkpoints')
  assert step == rows(tmp_path)[-1]['step'] > 0


@pytest.mark.slow
def test_a_kept_program_changes_no_bit(tmp_path):
  """Without a cache, filling one, and with a full one."""
  cache = {'compilation_cache_dir': tmp_path / 'cache'}
  metrics = []
  for name, options in (('none', {}), ('empty', cache), ('full', cache)):
    line = command('pretrain', workdir=tmp_path / name, **TINY, **options)
    subprocess.run(line, cwd=ROOT, check=True, capture_output=True)
    metrics.append(rows(tmp_path / name))
  assert len(list((tmp_path / 'cache').iterdir())) > 10
  assert metrics[0] == metrics[1] == metrics[2]


@pytest.mark.parametrize(
  'binary', ['pretrain', 'probe', 'figure1', 'sweep', 'supervised', 'benchmarks.speed']
)
def test_help_waits_for_nothing_heavy(binary):
  code = f"""
import runpy, sys
sys.argv[1:] = ['--help']
try:
  runpy.run_module('experiments.{binary}', run_name='__main__', alter_sys=True)
finally:
  print('loaded:', {{'jax', 'numpy', 'flax', 'matplotlib', 'PIL'}} & set(sys.modules))
"""
  shown = subprocess.run([sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True)
  assert shown.returncode == 0, shown.stderr
  assert '--compilation_cache_dir' in shown.stdout and '--workdir' in shown.stdout
  assert shown.stdout.splitlines()[-1] == 'loaded: set()'


def test_no_data_is_answered_at_once(tmp_path, monkeypatch):
  monkeypatch.setenv('HOME', str(tmp_path))
  monkeypatch.delenv('XDG_CACHE_HOME', raising=False)
  started = time.monotonic()
  with pytest.raises(ArgumentError, match='data_dir') as error:
    pretrain.prepare(config(tmp_path / 'w', dataset='mnist'))
  assert time.monotonic() - started < 5.0
  assert '_5k' in str(error.value) and 'IDX' in str(error.value)
  assert os.listdir(tmp_path) == []


@pytest.mark.long
def test_importing_touches_no_backend():
  # JAX refuses another number of devices once a backend is there.
  code = (
    'import se_vae, jax; [getattr(se_vae, name) for name in se_vae.__all__];'
    'jax.config.update("jax_num_cpu_devices", 3); print(len(jax.devices("cpu")))'
  )
  output = subprocess.run(
    [sys.executable, '-c', code], cwd=ROOT, capture_output=True, text=True, check=True
  )
  assert output.stdout.strip() == '3'


def test_mnist_files_load_in_canonical_order(mnist_dir):
  dataset = data.load('mnist', data_dir=str(mnist_dir))
  assert dataset.train.images.shape == (60_000, 28, 28, 1)
  assert len(jax.devices()) == 4


@pytest.fixture(scope='module')
def smoothed(trained, tmp_path_factory) -> Path:
  """`trained` again, its decoder frozen, interrupted once."""
  workdir = tmp_path_factory.mktemp('smoothed')
  settings = config(workdir, init_from=str(trained), freeze_decoder=True)
  stop = signals.StopSignal()
  stop.signum = signal.SIGTERM
  with pytest.raises(signals.Interrupted):
    pretrain.run(settings, stop)
  with pytest.MonkeyPatch.context() as patch:  # from here on the source is not needed
    patch.setattr(pretrain, '_load_source', pytest.fail)
    with unexamined():
      pretrain.run(settings, signals.StopSignal())
  return workdir


@pytest.mark.long
def test_a_run_starts_with_the_parameters_of_another_and_keeps_its_decoder(trained, smoothed):
  before, after = (
    checkpoints.load_latest(workdir / 'checkpoints', on_damage=pytest.fail).tensors
    for workdir in (trained, smoothed)
  )
  names = [name for name in before if name.startswith('params/')]
  for name in names:
    same = before[name].tobytes() == after[name].tobytes()
    assert same == name.startswith('params/decoder/'), name
  # Its first ten steps are on from the last fifty of the other, not from the beginning.
  assert rows(smoothed)[0]['loss'] < rows(trained)[1]['loss'] < rows(trained)[0]['loss']


@pytest.mark.long
def test_fit_smooths_as_the_binary_does(trained, smoothed):
  model, params = se_vae.load_model(trained)
  before = jax.tree.map(np.array, params)
  check_fit_gives_the_same(smoothed, params)
  jax.tree.map(np.testing.assert_array_equal, params, before)  # they are the caller's
  frozen = se_vae.TrainConfig(freeze_decoder=True, num_steps=1)
  with pytest.raises(ValueError, match='params: is needed for freeze_decoder'):
    se_vae.fit(model, frozen, np.zeros((64, 28, 28, 3), np.uint8))


@pytest.mark.slow
def test_smoothing_a_trained_encoder_makes_it_more_robust():
  """With a third of the steps, beyond the intervals of 500 examples, and the decoder as it was."""
  dataset = data.load('mnist_5k')
  x, labels = dataset.test.images[:500] / np.float32(255), dataset.test.labels['digit'][:500]
  model = se_vae.make_vae((28, 28, 1), latent_dim=8, hidden_units=64, num_layers=2)
  settings = se_vae.TrainConfig(objective='vae', num_steps=600)
  before, _ = se_vae.fit(model, settings, dataset.train.images)
  settings = se_vae.TrainConfig(gamma=10.0, pgd_steps=2, num_steps=200, freeze_decoder=True)
  after, _ = se_vae.fit(model, settings, dataset.train.images, params=before)
  jax.tree.map(np.testing.assert_array_equal, after['decoder'], before['decoder'])
  found = []
  for params in (before, after):
    means = se_vae.encoder_means(model, params, dataset.train.images)
    probe = se_vae.fit_probe(means, dataset.train.labels['digit'], num_classes=10)
    classifier, args = se_vae.ProbedEncoder(model), (params, probe)
    found.append(
      se_vae.adversarial_accuracy(classifier, x, labels, radii=(0.0, 0.1), num_steps=10, args=args)
    )
  ((_, before_interval), (_, after_interval)) = (curve.interval() for curve in found)
  assert after_interval[0] > before_interval[1]


@pytest.mark.long
def test_a_run_records_where_its_parameters_came_from(trained, smoothed):
  (_, newest), *_ = checkpoints.steps(trained / 'checkpoints')
  expected = {'workdir': str(trained), 'step': 60, 'checkpoint': newest.name}
  for name in ('config.json', 'result.json'):
    assert json.loads((smoothed / name).read_text())['source'] == expected


@pytest.mark.long
def test_a_run_starts_from_a_pretrained_encoder_by_its_name(tmp_path):
  name = 'mnist_mlp_vae_latent128'
  changes = {'dataset': 'mnist_5k', 'latent_dim': 128, 'hidden_units': 200}
  changes |= {'objective': 'vae', 'num_steps': 2, 'num_devices': 1}
  settings = config(tmp_path, init_from=name, freeze_decoder=True, **changes)
  assert flags.absolute(flags.to_dict(settings))['init_from'] == name
  with unexamined():
    pretrain.run(settings, signals.StopSignal())
  source = json.loads((tmp_path / 'result.json').read_text())['source']
  (_, expected), *_ = checkpoints.steps(pretrained.workdir(name) / 'checkpoints')
  assert source == {'workdir': name, 'step': 20000, 'checkpoint': expected.name}
  (_, before), (_, after) = se_vae.load_pretrained(name), se_vae.load_model(tmp_path)
  jax.tree.map(np.testing.assert_array_equal, after['decoder'], before['decoder'])
  pretrain.prepare(settings)  # the same run
  with pytest.raises(ArgumentError, match='init_from: not what'):
    pretrain.prepare(flags.replace(settings, init_from='mnist_mlp_se_smoothed_latent128'))
  with pytest.raises(ArgumentError, match=f'init_from: x is neither a directory nor .* \\({name}'):
    pretrain.prepare(flags.replace(settings, init_from='x', workdir=str(tmp_path / 'new')))


@pytest.mark.long
def test_a_run_whose_source_was_trained_anew_is_refused(trained, smoothed, tmp_path):
  """Else an encoder would pass for one that was smoothed from the new source."""
  settings = config(smoothed, init_from=str(trained), freeze_decoder=True)
  kept = shutil.move(trained / 'checkpoints', tmp_path / 'kept')
  try:
    assert pretrain.finished(settings) is not None  # a source that was removed is not missed
    shutil.copytree(smoothed / 'checkpoints', trained / 'checkpoints')
    assert pretrain.finished(settings) is None
    with pytest.raises(ArgumentError, match=r'init_from: .* no longer has the encoder that'):
      pretrain.prepare(settings)
  finally:
    shutil.rmtree(trained / 'checkpoints', ignore_errors=True)
    shutil.move(kept, trained / 'checkpoints')
  assert pretrain.finished(settings) is not None


def test_what_init_from_refuses(trained, smoothed, tmp_path):
  smoothing = {'workdir': str(smoothed), 'freeze_decoder': True}
  settings = config(tmp_path / 'w', init_from=str(trained))
  for changes, message in (
    (
      {'latent_dim': 3, 'hidden_units': 8},
      r'latent_dim, hidden_units: .*latent_dim 4 there, 3',
    ),
    ({'arch': 'convnet'}, 'arch: not that of init_from'),
    ({'dataset': 'mnist_5k'}, 'dataset: not that of init_from'),
    ({'init_from': str(tmp_path)}, 'init_from: .*there is no checkpoint'),
    ({'init_from': None, 'freeze_decoder': True}, 'freeze_decoder: needs init_from'),
    (smoothing, None),
    # Another path to the same checkpoint is no other setting.
    ({**smoothing, 'init_from': os.path.relpath(trained)}, None),
    ({**smoothing, 'init_from': 'x'}, 'init_from: not what'),
    ({**smoothing, 'init_from': str(smoothed)}, 'init_from: not what'),
  ):
    if message is None:
      pretrain.prepare(flags.replace(settings, **changes))
    else:
      with pytest.raises(ArgumentError, match=message):
        pretrain.prepare(flags.replace(settings, **changes))
  # What an MLP does not use may differ.
  pretrain.prepare(flags.replace(settings, conv_channels=3))
  assert not (tmp_path / 'w').exists()


@pytest.mark.long
def test_a_run_of_an_older_version_goes_on(tmp_path):
  """Its settings had an absolute step size. A new run takes the same steps, but for rounding."""
  shutil.copytree(OLD, tmp_path / 'old')
  stored = json.loads((OLD / 'config.json').read_text())['config']
  assert stored['pgd_step_size'] == 0.05
  settings = pretrain.stored_config(stored)
  for name in ('old', 'new'):
    changes = {'workdir': str(tmp_path / name), 'num_steps': 5, 'num_devices': 1}
    with unexamined():
      assert pretrain.run(flags.replace(settings, **changes), signals.StopSignal())['step'] == 5
  went_on, straight = rows(tmp_path / 'old'), rows(tmp_path / 'new')
  assert went_on[:3] == rows(OLD)
  assert [row['step'] for row in went_on] == [1, 2, 3, 4, 5]
  for ours, theirs in zip(straight, went_on, strict=True):
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
      assert ours[name] == pytest.approx(value, rel=1e-3), name
