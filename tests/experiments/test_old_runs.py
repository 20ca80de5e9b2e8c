"""Runs of version 0.2.0.dev0, before packages were laid out by concept, are still used."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import numpy as np
import pytest

from experiments import pretrain, probe, probe_settings, records
from experiments.cli import flags
from se_vae import make_vae, save_model
from se_vae.config import ArgumentError
from se_vae.storage import json_files

OLD = Path(__file__).parents[1] / 'storage' / 'old_checkpoint'


def test_the_probe_takes_the_encoder_and_the_data_of_an_old_run(tmp_path):
  workdir = shutil.copytree(OLD, tmp_path / 'run')
  settings = probe_settings.ProbeConfig(workdir=str(workdir), num_examples=7)
  prepared = probe.prepare(settings)
  assert prepared.metadata['step'] == 3
  assert prepared.images.shape == (7, 28, 28, 1)
  assert np.all(prepared.labels == prepared.dataset.test.labels['digit'][:7])
  assert prepared.model.encode(prepared.params, prepared.images).mean.shape == (7, 2)


@pytest.mark.parametrize(
  'data', [{'dataset': 'mnist', 'data_dir': 'relative/gone'}, {'dataset': 'folder:relative/gone'}]
)
def test_data_that_are_not_where_the_run_had_them_have_a_way_out(tmp_path, monkeypatch, data):
  workdir = shutil.copytree(OLD, tmp_path / 'run')
  moved = flags.replace(pretrain.PretrainConfig(), **data)
  monkeypatch.setattr(pretrain, 'stored_config', lambda _: moved)
  with pytest.raises(ArgumentError, match=r"^data_dir: .*'relative/gone'.*name the directory"):
    probe.prepare(probe_settings.ProbeConfig(workdir=str(workdir)))


@pytest.mark.parametrize(
  ('pattern', 'kind'),
  [
    ('tests/experiments/old_results/figure1.json', records.Figure),
    ('tests/experiments/old_results/probe_*.json', records.Probe),
    ('tests/experiments/old_results/sweep_gamma.json', records.Sweep),
    ('tests/storage/old_checkpoint/config.json', records.Run),
    ('tests/storage/old_checkpoint/result.json', records.Result),
  ],
)
def test_files_of_earlier_versions_have_the_types_that_are_read(pattern, kind):
  paths = list(Path(__file__).parents[2].glob(pattern))
  assert paths
  for path in paths:
    json_files.read(path, kind)


def test_a_saved_model_is_no_run_to_probe(tmp_path):
  arguments = {'image_shape': (2, 2, 1), 'latent_dim': 1, 'num_layers': 1, 'hidden_units': 1}
  params = make_vae(**arguments).init(jax.random.key(0))
  save_model(tmp_path, params, **arguments)
  with pytest.raises(ArgumentError, match=r'workdir: .* is a directory of se_vae\.save_model, not'):
    probe.prepare(probe_settings.ProbeConfig(workdir=str(tmp_path)))


def test_settings_that_were_ignored_are_ignored():
  stored = {'objective': 'vae', 'attack_dtype': 'bfloat16', 'selection_distance': 'symmetric_kl'}
  assert pretrain.stored_config(stored).train.attack_dtype == 'float32'
  stored['objective'] = 'se'
  assert pretrain.stored_config(stored).train.attack_dtype == 'bfloat16'
