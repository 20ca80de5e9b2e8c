"""Pretrained encoders: their files, what loads them, and how one is made."""

from __future__ import annotations

import functools
import shutil

import jax
import numpy as np
import pytest

from se_vae import data, load_pretrained
from se_vae.config import ArgumentError
from se_vae.data.transforms import pixels
from se_vae.evaluation import linear_probe
from se_vae.models import vae
from se_vae.storage import checkpoints, model_store, pretrained


@functools.partial(jax.jit, static_argnums=0)
def encoded_and_decoded(model, params, images, decoded):
  """The means of all images, and those of some of them decoded."""
  return model.encode(params, images).mean, model.decode(params, model.encode(params, decoded).mean)


@pytest.mark.long
@pytest.mark.parametrize('name', pretrained.names())
def test_every_encoder_is_small_and_tells_classes_apart(name):
  (path,) = (pretrained.workdir(name) / model_store.CHECKPOINTS).iterdir()
  assert path.stat().st_size <= 2_000_000
  model, params = load_pretrained(name)
  assert {leaf.dtype for leaf in jax.tree.leaves(params)} == {np.dtype('float32')}
  color = 'color' in name
  digits = data.load('color_mnist_5k' if color else 'mnist_5k')
  task = 'color' if color else 'digit'
  images, tested = pixels(digits.train.images[:1000]), pixels(digits.test.images[:300])
  means, decoded = map(
    np.asarray, encoded_and_decoded(model, params, np.concatenate([images, tested]), tested)
  )
  labels, expected = digits.train.labels[task][:1000], digits.test.labels[task][:300]
  probe = linear_probe.fit_probe(means[:1000], labels, digits.num_classes[task])
  assert linear_probe.accuracy(probe, means[1000:], expected) > 0.8
  if 'clusters' in name:
    return  # the decoder is not trained
  assert np.mean((decoded - tested) ** 2) < 0.5 * np.var(tested)  # images come back


def test_an_unknown_name_gives_the_list():
  with pytest.raises(ArgumentError, match=f'name: must be one of {pretrained.names()[0]}, .*got'):
    load_pretrained('resnet')


def test_a_damaged_file_is_named(tmp_path, monkeypatch):
  name = pretrained.names()[0]
  shutil.copytree(pretrained.workdir(name), tmp_path / name)
  monkeypatch.setattr(pretrained, '_FOLDER', tmp_path)
  (path,) = (tmp_path / name / model_store.CHECKPOINTS).iterdir()
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)
  with pytest.raises(checkpoints.CheckpointError, match=f'{path.name}: damaged'):
    load_pretrained(name)


def test_another_file_does_not_take_the_place_of_an_encoder(tmp_path, monkeypatch):
  """Also where its name fits its content: the binaries take the newest file of a directory."""
  first, second = pretrained.names()[:2]
  place = tmp_path / first / model_store.CHECKPOINTS
  shutil.copytree(pretrained.workdir(second) / model_store.CHECKPOINTS, place)
  own = next((pretrained.workdir(first) / model_store.CHECKPOINTS).iterdir())
  monkeypatch.setattr(pretrained, '_FOLDER', tmp_path)
  with pytest.raises(checkpoints.CheckpointError, match='cannot be read'):
    pretrained.find(first)
  shutil.copy(own, place)
  with pytest.raises(checkpoints.CheckpointError, match='does not belong to this package'):
    pretrained.find(first)


def test_a_saved_model_is_no_run_to_export(tmp_path):
  arguments = {'image_shape': (2, 2, 1), 'latent_dim': 3, 'num_layers': 1, 'hidden_units': 4}
  params = vae.make_vae(**arguments).init(jax.random.key(0))
  model_store.save_model(tmp_path / 'model', params, **arguments)
  with pytest.raises(ArgumentError, match=r'source: .*model holds no training run'):
    pretrained.export(tmp_path / 'model', tmp_path / 'encoder')
  assert not (tmp_path / 'encoder').exists()


def test_an_export_is_the_run_in_half_precision(tmp_path):
  model = vae.make_vae((2, 2, 1), latent_dim=3, num_layers=1, hidden_units=4)
  params = model.init(jax.random.key(0))
  arguments = {'image_shape': [2, 2, 1], 'latent_dim': 3, 'num_layers': 1, 'hidden_units': 4}
  metadata = {
    'model': arguments,
    'data': {'source': 'IDX files in /home/me/data', 'digest': 'abc'},
    'config': {
      'dataset': 'mnist',
      'workdir': '/home/me/run',
      'data_dir': '/home/me/data',
      'gamma': 2.0,
    },
  }
  checkpoints.save(tmp_path / 'run' / 'checkpoints', 7, {'params': params, 'more': 1}, metadata)
  pretrained.export(tmp_path / 'run', tmp_path / 'encoder')
  saved = model_store.load_saved(tmp_path / 'encoder')
  jax.tree.map(
    lambda half, full: np.testing.assert_array_equal(
      half, np.asarray(full).astype(np.float16).astype(np.float32)
    ),
    saved.params,
    params,
  )
  assert saved.metadata['step'] == 7 and saved.metadata['config']['gamma'] == 2.0
  assert saved.metadata['data'] == {'source': 'mnist', 'digest': 'abc'}
  assert '/home' not in str(saved.metadata)
