"""Which devices a binary uses."""

from __future__ import annotations

import jax
import pytest

from experiments import pretrain
from experiments.cli import devices, signals
from se_vae.config import ArgumentError

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
