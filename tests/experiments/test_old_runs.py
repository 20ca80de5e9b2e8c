"""Runs of version 0.2.0.dev0, before packages were laid out by concept, are still used."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import pretrain, probe
from experiments.cli import flags
from se_vae.config import ArgumentError

OLD = Path(__file__).parents[1] / 'storage' / 'old_checkpoint'


def test_the_probe_takes_the_encoder_and_the_data_of_an_old_run(tmp_path):
  workdir = shutil.copytree(OLD, tmp_path / 'run')
  settings = probe.ProbeConfig(workdir=str(workdir), num_examples=7)
  prepared = probe.prepare(settings)
  assert prepared.metadata['step'] == 3
  assert prepared.images.shape == (7, 28, 28, 1)
  assert np.all(prepared.labels == prepared.dataset.test.labels['digit'][:7])
  assert prepared.model.encode(prepared.params, prepared.images).mean.shape == (7, 2)


def test_data_that_are_not_where_the_run_had_them_have_a_way_out(tmp_path, monkeypatch):
  workdir = shutil.copytree(OLD, tmp_path / 'run')
  moved = flags.replace(pretrain.PretrainConfig(), dataset='mnist', data_dir='relative/gone')
  monkeypatch.setattr(pretrain, 'stored_config', lambda _: moved)
  with pytest.raises(ArgumentError, match=r"data_dir: 'relative/gone' .*name the directory"):
    probe.prepare(probe.ProbeConfig(workdir=str(workdir)))
