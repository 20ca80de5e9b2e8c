"""The probe binary: its files, its verdict and its exit code, interrupted and resumed."""

from __future__ import annotations

import dataclasses
import json
import signal

import numpy as np
import pytest
from PIL import Image

from experiments import attack_comparison, pretrain, probe, runtime, settings
from experiments.settings import UsageError

DTYPE_PROMOTION = 'standard'  # optax takes part

RADII = (0.0, 0.05, 0.3)


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  path = tmp_path_factory.mktemp('run')
  tiny = {'hidden_units': 16, 'latent_dim': 4, 'pgd_steps': 2, 'num_steps': 40}
  config = pretrain.PretrainConfig(workdir=str(path), objective='vae', **tiny)
  pretrain.run(config, runtime.StopSignal())
  return path


@pytest.fixture(scope='module')
def config(workdir):
  return probe.ProbeConfig(
    workdir=str(workdir), radii=RADII, pgd_steps=4, num_examples=48, num_queries=20
  )


@pytest.fixture(scope='module')
def result(config):
  return probe.run(config, runtime.StopSignal())


def test_the_evidence_lies_beside_the_curve(workdir, result):
  assert [check['number'] for check in result['checks']] == list(range(1, 13))
  written = json.loads((workdir / 'robustness.json').read_text())
  assert written == {'digit': json.loads((workdir / 'probe_digit.json').read_text())}
  assert written['digit']['accuracy'] == result['accuracy']
  saved = np.load(workdir / 'probe_digit.npz')
  offsets = np.abs(np.float64(saved['images']) - prepared_images(workdir))
  broken = saved['broken_radius']
  allowed = np.where(np.isfinite(broken), broken, 0.0)[:, None, None, None]
  assert np.all(offsets <= allowed + np.spacing(np.float32(1.0)))
  assert saved['images'].min() >= 0.0 and saved['images'].max() <= 1.0
  np.testing.assert_array_equal(saved['correct'], broken[None] > np.array(RADII)[:, None])
  with Image.open(workdir / 'probe_digit_images.png') as picture:
    assert picture.size[1] == 2 * 28 * 4  # original, adversarial, and both reconstructed
    assert picture.size[0] % (2 * 28) == 0
  assert not list(workdir.glob('*.state.npz'))


def prepared_images(workdir):
  return probe.prepare(probe.ProbeConfig(workdir=str(workdir), num_examples=48)).images


def test_an_interrupted_attack_goes_on(config, workdir, result):
  stop = runtime.StopSignal()
  stop.signum = signal.SIGTERM
  again = dataclasses.replace(config, batch_size=16)
  with pytest.raises(runtime.Interrupted):
    probe.run(again, stop)
  assert len(list(workdir.glob('*.state.npz'))) == 1
  resumed = probe.run(again, runtime.StopSignal())
  assert resumed['accuracy'] == result['accuracy'] and resumed['cost'] == result['cost']
  assert not list(workdir.glob('*.state.npz'))


@pytest.mark.parametrize(('strict', 'passed', 'code'), [(True, False, 1), (True, True, 0)])
def test_a_failed_check_is_an_exit_code_where_that_is_asked_for(
  config, result, monkeypatch, capsys, strict, passed, code
):
  checks = [{**check, 'passed': passed} for check in result['checks']]
  monkeypatch.setattr(settings, 'from_flags', lambda _: dataclasses.replace(config, strict=strict))
  monkeypatch.setattr(probe, 'run', lambda *_: {**result, 'checks': checks})
  if code:
    with pytest.raises(SystemExit) as error:
      probe.main()
    assert error.value.code == code
  else:
    probe.main()
  output = capsys.readouterr().out
  assert ('FAIL' in output) != passed and 'representation is alive' in output


def test_the_comparison_says_what_is_missing(workdir, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'foolbox', None)
  with pytest.raises(UsageError, match='pip install torch foolbox'):
    attack_comparison.run(
      attack_comparison.ComparisonConfig(workdir=str(workdir)), runtime.StopSignal()
    )
