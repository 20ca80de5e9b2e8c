"""`--task=parity`, `thickness` and `slant`: like any other task, but for `--joint`."""

from __future__ import annotations

import pytest

from experiments import probe, probe_settings, supervised
from experiments.cli import flags, signals
from se_vae import data
from se_vae.config import ArgumentError
from tests.experiments.tiny_run import ATTACK, TINY, train

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return train(tmp_path_factory.mktemp('run'))


@pytest.mark.parametrize(('task', 'joint'), [('thickness', True), ('slant', False)])
def test_a_derived_task_is_probed_and_attacked(workdir, task, joint):
  config = probe_settings.ProbeConfig(workdir=str(workdir), task=task, joint=joint, **ATTACK)
  result = probe.run(config, signals.StopSignal())
  assert result['task'] == task and result['train_accuracy'] > 0.4  # chance is a third
  assert result['data']['digest'] == data.load('color_mnist_5k').digest
  assert (workdir / f'probe_{task}.json').exists()
  if joint:
    assert result['joint']['tasks'] == ('digit', 'color')


def test_a_classifier_of_a_derived_task_is_not_attacked_as_one_of_another(tmp_path):
  # Thickness and slant have as many classes, so that the parameters fit.
  attack = '--task={} --radii=0 --num_examples=50 --pgd_steps=1 --check_examples=0'
  values = {'workdir': str(tmp_path), 'pgd_steps': 1, 'radius': 0.0, **TINY}
  values |= {'batch_size': 30, 'checkpoint_every': 20}
  first, second = (
    flags.from_dict(supervised.SupervisedConfig, {**values, 'probe': attack.format(task)})
    for task in ('thickness', 'slant')
  )
  result = supervised.run(first, signals.StopSignal())
  assert result['task'] == 'thickness' and result['accuracy'][0] > 0.4  # chance is a third
  with pytest.raises(ArgumentError, match='task was thickness, now slant'):
    supervised.run(second, signals.StopSignal())


def test_a_set_without_digits_has_none(digits_as_labels):
  config = probe_settings.ProbeConfig(task='slant')
  with pytest.raises(ArgumentError, match=r'task: clothes has no task slant; its tasks are label$'):
    probe.check_fits(config, digits_as_labels)
  with pytest.raises(ArgumentError, match=r'tasks are digit, parity, thickness, slant$'):
    probe.check_fits(probe_settings.ProbeConfig(task='color'), data.load('mnist_5k'))
  with pytest.raises(ArgumentError, match='joint: needs several tasks; mnist_5k has digit alone'):
    probe.check_fits(probe_settings.ProbeConfig(task='parity', joint=True), data.load('mnist_5k'))


@pytest.fixture
def digits_as_labels() -> data.Dataset:
  digits = data.load('mnist_5k')
  train, test = (
    data.Split(split.images, {'label': split.labels['digit']})
    for split in (digits.train, digits.test)
  )
  return data.Dataset('clothes', train, test, {'label': 10}, 'here', 'digest', 'digest')
