"""The binary that counts the seconds to a robust encoder; no test asserts a time."""

from __future__ import annotations

import dataclasses
import json
import signal

import numpy as np
import pytest

from experiments import pretrain, probe_settings
from experiments.benchmarks import time_to_robustness
from experiments.benchmarks.time_to_robustness import RobustnessConfig
from experiments.cli import flags, signals
from se_vae.config import ArgumentError
from se_vae.storage import model_store

DTYPE_PROMOTION = 'standard'  # optax takes part
pytestmark = [pytest.mark.long, pytest.mark.usefixtures('shallow')]

TINY = '--latent_dim=3 --hidden_units=8 --num_steps=3'
STAGES = ['imports and data', 'VAE', 'smoothing', 'probe', 'attack', 'checks']


def tiny(tmp_path, **changes) -> RobustnessConfig:
  config = RobustnessConfig(
    workdir=str(tmp_path / 'runs'),
    dataset='mnist_5k',
    vae=f'--objective=vae {TINY}',
    smooth=f'--objective=se --pgd_steps=1 --freeze_decoder {TINY}',
    probe='--num_examples=40 --check_examples=10 --pgd_steps=2 --radii=0,0.1',
    num_devices=1,
  )
  return dataclasses.replace(config, **changes)


def test_a_row_has_every_stage_and_the_curve_with_its_checks(tmp_path):
  config, runs = tiny(tmp_path, seed=3), tmp_path / 'runs'
  runs.mkdir()
  (runs / '.time_to_robustness.json.7.tmp').touch()  # as a kill leaves it
  result = time_to_robustness.run(config, signals.StopSignal())
  assert not list(runs.glob('.*.tmp'))
  assert json.loads((runs / 'time_to_robustness.json').read_text()) == result
  assert list(result['seconds']) == STAGES and min(result['seconds'].values()) > 0.0
  assert result['radii'] == [0.0, 0.1] and result['num_examples'] == 40
  assert [check['number'] for check in result['checks']] == list(range(1, 14))
  assert result['config']['seed'] == result['pretraining']['seed'] == 3
  (_, before), (_, after) = (
    model_store.load_saved(runs / name)[:2] for name in ('vae', 'smoothed')
  )
  kernels = [params['decoder']['params']['Dense_0']['kernel'] for params in (before, after)]
  np.testing.assert_array_equal(*kernels)
  kernels = [params['encoder']['params']['Dense_0']['kernel'] for params in (before, after)]
  assert np.abs(kernels[0] - kernels[1]).max() > 0.0
  assert list(result['cpu_seconds']) == STAGES and min(result['cpu_seconds'].values()) >= 0.0
  with pytest.raises(ArgumentError, match='must be new'):
    time_to_robustness.run(config, signals.StopSignal())


def test_an_interruption_keeps_nothing(tmp_path):
  stop = signals.StopSignal(saves=False)
  stop.signum = signal.SIGTERM
  with pytest.raises(signals.Interrupted) as interruption:
    time_to_robustness.run(tiny(tmp_path), stop)
  assert not interruption.value.saved
  assert not list((tmp_path / 'runs').glob('*/*'))
  again = signals.StopSignal(saves=False)
  again.signum = signal.SIGTERM
  with pytest.raises(signals.Interrupted):  # and not that the directory must be new
    time_to_robustness.run(tiny(tmp_path), again)


def test_stages_are_added_up():
  seconds = dict(zip(STAGES, (1.0, 2.0, 4.0, 8.0, 16.0, 32.0), strict=True))
  rows = list(time_to_robustness._rows(seconds, dict.fromkeys(STAGES, 1.5)))
  assert rows[1] == ['VAE', '2.0', '1.5'] and len(rows) == len(STAGES) + 2
  assert rows[-2:] == [['until the encoder is trained', '7.0', '4.5'], ['all', '63.0', '9.0']]


def test_without_checks_the_attack_is_the_last_stage(tmp_path):
  config = tiny(tmp_path, probe='--num_examples=20 --check_examples=0 --pgd_steps=1 --radii=0.1')
  result = time_to_robustness.run(config, signals.StopSignal())
  assert list(result['seconds']) == STAGES[:-1] and result['checks'] == []


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'vae': '--seed=2'}, '--vae: --seed is set by this binary'),
    ({'smooth': '--init_from=there'}, '--smooth: --init_from is set by this binary'),
    ({'probe': '--workdir=there'}, '--probe: --workdir is set by this binary'),
    ({'vae': '--objective=none'}, '--vae: --objective: must be one of'),
    ({'smooth': '--gamma=-1'}, '--smooth: --gamma: must be >= 0'),
    ({'vae': "--objective='vae"}, '--vae: No closing quotation'),
    ({'smooth': f'{TINY} --latent_dim=5'}, '--smooth: networks and data must be those of --vae'),
    ({'smooth': f'{TINY} --batch_size=4001'}, '--smooth: --batch_size: must be'),
    ({'smooth': f'{TINY} --data_seed=5'}, '--smooth: networks and data must be'),
    ({'probe': '--joint'}, '--probe: --joint cannot be used here'),
    ({'probe': '--output=there'}, '--probe: --output cannot be used here'),
    ({'probe': '--num_examples=1001'}, '--probe: --num_examples: must be at most the 1000'),
  ],
)
def test_a_wrong_flag_is_named_before_anything_is_written(tmp_path, change, message):
  with pytest.raises(ArgumentError) as error:
    time_to_robustness.run(tiny(tmp_path, **change), signals.StopSignal())
  assert str(error.value).startswith(message)
  assert not (tmp_path / 'runs').exists()


def test_the_recipe_smooths_the_vae_that_it_trains():
  config = RobustnessConfig()
  vae = flags.parse(pretrain.PretrainConfig, config.vae, '--vae')
  text = f'{config.smooth} --init_from=.'
  smooth = flags.parse(pretrain.PretrainConfig, text, '--smooth')
  assert smooth.model == vae.model and smooth.train.obs_var == vae.train.obs_var
  assert smooth.train.freeze_decoder and smooth.train.objective == 'se'
  probe = flags.parse(probe_settings.ProbeConfig, config.probe, '--probe')
  assert probe.attack == 'worst_case' and 0.1 in probe.radii
