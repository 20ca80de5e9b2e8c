"""`--labels_per_class` of probe and supervised: which labels are used, files, and refusals."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest

from experiments import identity, probe, probe_settings, report, supervised
from experiments.cli import flags, signals
from experiments.visual import probe_results
from se_vae import data
from se_vae.config import ArgumentError
from se_vae.evaluation import linear_probe
from se_vae.training import input_pipeline
from tests.experiments.tiny_run import ATTACK, TINY, train

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return train(tmp_path_factory.mktemp('run'))


@pytest.fixture(scope='module')
def config(workdir):
  return probe_settings.ProbeConfig(workdir=str(workdir), **ATTACK)


@pytest.fixture(scope='module')
def result(config):
  few = dataclasses.replace(config, labels_per_class=3, joint=True, seed=5)
  return probe.run(few, signals.StopSignal())


def test_the_probe_is_fitted_to_these_examples_alone(config, workdir, result):
  prepared = probe.prepare(config)
  means = probe.train_means(prepared, prepared.model, prepared.params)
  labels = prepared.dataset.train.labels['digit']
  rows = data.few_labels(labels, 10, 3, seed=5)
  expected = linear_probe.fit_probe(means[rows], labels[rows], 10)
  with np.load(workdir / 'probe_digit_3_labels.npz') as saved:
    np.testing.assert_array_equal(saved['probe_weights'], expected.weights)
    np.testing.assert_array_equal(saved['probe_bias'], expected.bias)
  accuracy = linear_probe.accuracy(expected, means[rows], labels[rows])
  assert result['train_accuracy'] == accuracy
  assert result['joint']['tasks'] == ('digit', 'color')


def test_few_and_all_labels_stand_beside_each_other(config, workdir, result, capsys):
  everything = probe.run(config, signals.StopSignal())
  both = json.loads((workdir / 'robustness.json').read_text())
  assert both == {
    name: json.loads((workdir / f'probe_{name}.json').read_text())
    for name in ('digit', 'digit_3_labels')
  }
  assert both['digit_3_labels']['config']['labels_per_class'] == 3
  assert both['digit']['train_accuracy'] == everything['train_accuracy'] != result['train_accuracy']
  assert ': digit (3 labels a class) probe on 40 test images' in probe_results.as_text(result)
  assert ': digit probe on 40 test images' in probe_results.as_text(everything)
  report.run(report.ReportConfig(workdir=str(workdir)))
  page = (workdir / 'report.html').read_text()
  for task in ('digit', 'digit (3 labels a class)'):
    assert f'color_mnist_5k, {task} probe, standard attack' in page


def test_a_result_of_as_many_labels_alone_is_given_back(config, workdir, result, monkeypatch):
  monkeypatch.setattr(probe, 'fit', lambda *_: pytest.fail('fitted again'))
  few = dataclasses.replace(config, labels_per_class=3, joint=True, seed=5)
  assert probe.run(few, signals.StopSignal())['checkpoint'] == result['checkpoint']
  with pytest.raises(pytest.fail.Exception, match='fitted again'):
    probe.run(dataclasses.replace(few, labels_per_class=4), signals.StopSignal())


def test_a_result_from_before_there_was_the_flag_still_stands(config, workdir):
  now = json.loads(json.dumps(probe.run(config, signals.StopSignal())))
  old = json.loads(json.dumps(now))
  del old['config']['labels_per_class']
  place = workdir / 'old.json'
  place.write_text(json.dumps(old))
  assert identity.finished(place, now) is not None
  assert identity.digest({'config': old['config']}) == identity.digest({'config': now['config']})
  few = now | {'config': now['config'] | {'labels_per_class': 3}}
  assert identity.finished(place, few) is None
  place.unlink()


def test_more_labels_than_there_are_are_refused_before_anything_is_fitted(config, monkeypatch):
  monkeypatch.setattr(probe, 'train_means', pytest.fail)
  with pytest.raises(ArgumentError, match=r'labels_per_class: must be in \[1, 400\]'):
    probe.run(dataclasses.replace(config, labels_per_class=401), signals.StopSignal())


def supervised_config(path, **changes) -> supervised.SupervisedConfig:
  attack = '--radii=0 --num_examples=50 --pgd_steps=1 --check_examples=0'
  values = {'workdir': str(path), 'probe': attack, 'pgd_steps': 1, 'radius': 0.0, **TINY}
  values |= {'labels_per_class': 2, 'batch_size': 20, 'num_steps': 5, 'checkpoint_every': 5}
  values |= {'seed': 5}
  return flags.from_dict(supervised.SupervisedConfig, values | changes)


def test_a_classifier_trains_on_these_examples_alone(tmp_path, monkeypatch):
  seen, real = [], input_pipeline.read_chunk

  def read_chunk(mesh, images, examples):
    seen.append(examples)
    return real(mesh, images, examples)

  monkeypatch.setattr(input_pipeline, 'read_chunk', read_chunk)
  result = supervised.run(supervised_config(tmp_path), signals.StopSignal())
  labels = data.load('mnist_5k').train.labels['digit']
  rows = data.few_labels(labels, 10, 2, seed=5)
  steps = np.concatenate(seen)  # each is an epoch
  np.testing.assert_array_equal(np.sort(steps, axis=1), np.tile(rows, (len(steps), 1)))
  assert len(steps) >= 5
  assert 'digit (2 labels a class) classifier, trained with labels, on 50' in (
    probe_results.as_text(result, 'classifier, trained with labels,')
  )


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'batch_size': 21}, 'batch_size: must be at most the 20 labelled examples; got 21'),
    ({'labels_per_class': 401}, r'labels_per_class: must be in \[1, 400\]'),
    ({'probe': '--labels_per_class=3'}, '--probe: --labels_per_class changes nothing here'),
  ],
)
def test_what_a_classifier_is_refused_before_training(tmp_path, change, message):
  with pytest.raises(ArgumentError, match=message):
    supervised.run(supervised_config(tmp_path / 'w', **change), signals.StopSignal())
  assert not (tmp_path / 'w').exists()
