"""Which devices a binary uses."""

from __future__ import annotations

import dataclasses

import jax
import pytest

from experiments import pretrain, probe, probe_settings
from experiments.cli import devices, signals
from se_vae.config import ArgumentError, ModelConfig, TrainConfig
from se_vae.models import vae

DTYPE_PROMOTION = 'standard'  # optax takes part


@pytest.mark.parametrize(
  ('batch_size', 'num_devices', 'expected'), [(64, None, 4), (64, 2, 2), (48, None, 3), (6, 3, 3)]
)
def test_as_many_devices_as_divide_the_batch_or_as_many_as_asked_for(
  batch_size, num_devices, expected
):
  assert devices.mesh_for(batch_size, num_devices).size == expected


@pytest.mark.parametrize(
  ('num_members', 'num_devices', 'expected'), [(3, None, 3), (9, None, 4), (9, 2, 2), (1, 4, 1)]
)
def test_a_population_takes_a_device_for_each_member(num_members, num_devices, expected):
  assert devices.population_mesh(num_members, num_devices).devices.shape == (expected, 1)


def test_a_population_needs_the_devices_asked_for():
  with pytest.raises(ArgumentError, match='num_devices: must be <= 4, the devices here; got 5'):
    devices.population_mesh(8, 5)


def test_accelerators_share_every_batch_and_idle_ones_are_told_of(monkeypatch, capsys):
  """The smallest share is a CPU's alone."""
  monkeypatch.setattr(jax, 'default_backend', lambda: 'gpu')
  mesh = devices.mesh_for(48)
  assert mesh.size == 4 and len(devices.device_kinds(mesh)) == 4
  devices.warn_of_idle_devices(mesh, 48)
  assert capsys.readouterr().err == ''
  mesh = devices.mesh_for(66)
  assert mesh.size == 3 and len(devices.device_kinds(mesh)) == 3
  devices.warn_of_idle_devices(mesh, 66)
  assert capsys.readouterr().err == (
    'warning: --batch_size: 66 examples are shared by 3 of 4 devices, as many as divide them\n'
  )


def test_a_batch_is_a_multiple_of_the_processes(monkeypatch):
  monkeypatch.setattr(jax, 'process_count', lambda: 3)
  with pytest.raises(ArgumentError, match='batch_size: must be a multiple of the 3 processes'):
    devices.mesh_for(64)


@pytest.mark.parametrize(
  ('batch_size', 'num_devices', 'message'),
  [
    (64, 3, 'batch_size, num_devices: 64 examples cannot be split evenly over 3 devices'),
    (64, 8, 'num_devices: must be <= 4, the devices here; got 8'),
  ],
)
def test_devices_that_do_not_fit_are_named_before_anything_is_written(
  tmp_path, batch_size, num_devices, message
):
  config = pretrain.PretrainConfig(
    workdir=str(tmp_path / 'w'), batch_size=batch_size, num_devices=num_devices
  )
  with pytest.raises(ArgumentError) as error:
    pretrain.run(config, signals.StopSignal())
  assert str(error.value) == message
  assert list(tmp_path.iterdir()) == []


def test_linear_bounds_that_do_not_fit_are_refused_before_training(monkeypatch):
  """2 x 3 rows for each of 8 images, at 16 pixels, the widest layer, before and after a layer."""
  needed = 2 * 4 * (2 * 3 * 8) * 16
  config = pretrain.PretrainConfig(
    model=ModelConfig(latent_dim=3, hidden_units=8),
    train=TrainConfig(selection='linear'),
    batch_size=16,
  )
  mesh = devices.mesh_for(16, 2)  # on a CPU its devices share the memory

  def check(here, **changes):
    monkeypatch.setattr(devices, '_host_memory', lambda: here)
    own = dataclasses.replace(config, **changes)
    devices.check_bounds_of_selection(own.train, own.model, (4, 4, 1), own.batch_size, mesh)

  check(2 * needed)
  with pytest.raises(ArgumentError, match='selection, batch_size, hidden_units: linear needs at'):
    check(2 * needed - 1)
  check(0, train=TrainConfig(selection='interval'))


def test_crown_that_does_not_fit_is_refused_before_the_attack(monkeypatch):
  """Two bounds of each of 2 x 2 x 4 units of the second layer, at the 4 x 4 x 4 of the first."""
  model = vae.make_vae((8, 8, 1), arch='convnet', latent_dim=3, conv_channels=4, num_layers=2)
  config = probe_settings.ProbeConfig(certify=True, certify_method='crown', batch_size=32)
  needed = 2 * 4 * (2 * 16 * 64) * devices.mesh_for(config.batch_size).size
  monkeypatch.setattr(devices, '_host_memory', lambda: needed)
  assert probe._method(config, model).name == 'crown'
  monkeypatch.setattr(devices, '_host_memory', lambda: needed - 1)
  with pytest.raises(ArgumentError, match='certify_method: crown needs at least'):
    probe._method(config, model)
  smaller = dataclasses.replace(config, certify_method='crown_ibp')
  assert probe._method(smaller, model).name == 'crown_ibp'
