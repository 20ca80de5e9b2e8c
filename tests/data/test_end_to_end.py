"""Any TFDS set, end to end: shapes beyond MNIST's, streamed as it is read, interrupted, probed."""

from __future__ import annotations

import dataclasses
import signal
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import pretrain, probe, probe_settings
from experiments.cli import flags, signals
from se_vae.config import ArgumentError
from se_vae.storage import checkpoints
from se_vae.training import input_pipeline
from tests.data.tiny_tfds import write_tfds

DTYPE_PROMOTION = 'standard'  # optax takes part
pytestmark = [pytest.mark.long, pytest.mark.usefixtures('shallow')]

TINY = {
  'dataset': 'tfds:objects',
  'conv_channels': 2,
  'hidden_units': 8,
  'latent_dim': 4,
  'pgd_steps': 1,
  'num_steps': 13,
  'log_every': 5,
  'batch_size': 32,
  'tensorboard': False,
  'num_devices': 1,
}


def prepared(directory: Path, shape: tuple[int, ...], num_classes: int, declared=None) -> Path:
  """A set of noise on a grey that tells the class."""
  rng = np.random.default_rng(0)
  examples = {}
  for split, each in (('train', 8), ('test', 2)):
    labels = np.repeat(np.arange(num_classes), each)
    greys = (200 * labels / num_classes).astype(np.uint8)
    noise = rng.integers(0, 50, (len(labels), *shape), np.uint8)
    examples[split] = greys[:, None, None, None] + noise, labels
  shape = declared or shape
  write_tfds(directory, examples, name='objects', num_classes=num_classes, image_shape=shape)
  return directory


@pytest.fixture(scope='module')
def cifar_like(tmp_path_factory) -> Path:
  """As CIFAR-10: [32, 32, 3], 10 classes."""
  return prepared(tmp_path_factory.mktemp('cifar'), (32, 32, 3), 10)


def config(workdir: Path, data_dir: Path, **changes) -> pretrain.PretrainConfig:
  values = {'workdir': str(workdir), 'data_dir': str(data_dir), **TINY, **changes}
  return flags.from_dict(pretrain.PretrainConfig, values)


def bits(workdir: Path) -> dict[str, bytes]:
  arrays = checkpoints.load_latest(workdir / 'checkpoints', on_damage=pytest.fail).tensors
  metrics = {'metrics': (workdir / 'metrics.jsonl').read_bytes()}
  return metrics | {name: array.tobytes() for name, array in arrays.items()}


def run_probe(workdir: Path, **changes) -> dict:
  few = {'radii': (0.0, 0.1), 'pgd_steps': 1, 'check_examples': 0, 'l2': 1e-4}
  settings = {'workdir': str(workdir), 'task': 'label', **few, **changes}
  return probe.run(probe_settings.ProbeConfig(**settings), signals.StopSignal())


@pytest.fixture(scope='module')
def trained(cifar_like, tmp_path_factory) -> Path:
  """A run that was not interrupted."""
  workdir = tmp_path_factory.mktemp('trained')
  pretrain.run(config(workdir, cifar_like), signals.StopSignal())
  return workdir


def test_a_run_that_was_interrupted_is_the_uninterrupted_run(
  trained, cifar_like, tmp_path, monkeypatch
):
  """To the bit, with chunks of three steps, where a row has five, and stops after steps 1 and 2."""
  monkeypatch.setattr(input_pipeline, '_CHUNK_BYTES', 3 * TINY['batch_size'] * 32 * 32 * 3)
  settings = config(tmp_path, cifar_like)
  for _ in range(2):
    stop = signals.StopSignal()
    stop.signum = signal.SIGTERM
    with pytest.raises(signals.Interrupted):
      pretrain.run(settings, stop)
  pretrain.run(settings, signals.StopSignal())
  assert bits(tmp_path) == bits(trained)
  with Image.open(tmp_path / 'samples.png') as picture:
    assert picture.size == (2 * 32 * 10, 2 * 32 * 10) and picture.mode == 'RGB'


def test_the_probe_knows_the_labels_of_any_set(trained):
  result = run_probe(trained)
  assert result['num_examples'] == 20
  assert result['accuracy'][0] > 0.3  # the grey tells the class; chance is 0.1
  with pytest.raises(ArgumentError, match='task: tfds:objects has no task digit'):
    run_probe(trained, task='digit')


@pytest.mark.slow
def test_a_convnet_takes_large_images_of_odd_sides_and_more_classes(tmp_path, shallow, monkeypatch):
  """Also where the set does not promise their size."""
  data_dir = prepared(tmp_path / 'set', (37, 50, 1), 12, declared=(None, None, 1))
  workdir = tmp_path / 'run'
  monkeypatch.setattr(pretrain, 'model_arguments', shallow)  # of all four layers
  changes = {'arch': 'convnet', 'objective': 'vae', 'num_steps': 3}
  result = pretrain.run(config(workdir, data_dir, **changes), signals.StopSignal())
  assert np.isfinite(result['test']['elbo'])
  with Image.open(workdir / 'traversals.png') as picture:
    assert picture.size == (2 * 50 * 10, 2 * 37 * 4)


def test_what_cannot_be_is_said_before_anything_is_written(cifar_like, tmp_path):
  workdir = tmp_path / 'w'
  settings = config(workdir, cifar_like, cache_dir=str(tmp_path / 'cache'))
  for changed, message in (
    ({'dataset': 'tfds:others'}, "data_dir: .*the TFDS set 'others', prepared"),
    ({'data_dir': None}, 'data_dir: '),
    ({'batch_size': 81}, 'batch_size: must be at most the 80 training examples'),
  ):
    with pytest.raises(ArgumentError, match=message):
      pretrain.prepare(flags.replace(settings, **changed))
  assert not workdir.exists()
  pretrain.prepare(flags.replace(settings, warm_start=True))


def test_a_class_without_examples_is_named(trained, cifar_like, monkeypatch):
  dataset = pretrain.load_dataset(config(trained, cifar_like).data, trained)
  fewer = dataclasses.replace(dataset, num_classes={'label': 12})
  monkeypatch.setattr(pretrain, 'load_dataset', lambda *_: fewer)
  with pytest.raises(ArgumentError, match=r'task: .* no training example of label 10, 11'):
    run_probe(trained)
