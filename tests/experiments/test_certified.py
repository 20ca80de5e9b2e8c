"""`probe --certify`: the certified curve in every file, in the figure, the report and compare."""

from __future__ import annotations

import csv
import dataclasses
import json

import numpy as np
import pytest

from experiments import (
  compare,
  identity,
  pretrain,
  probe,
  probe_settings,
  records,
  supervised,
  sweep,
)
from experiments.cli import signals
from experiments.visual import plots, probe_results, report_page
from se_vae import certification, make_vae
from se_vae.config import ArgumentError, ModelConfig
from se_vae.evaluation import certifiers
from se_vae.storage import json_files
from tests.experiments.scheduled import ALONE
from tests.experiments.test_report import RADII, render, shown, write_probe, write_run
from tests.experiments.test_report_charts import drawn, points_of, scales
from tests.experiments.tiny_run import train

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part

CERTIFIED = {
  'method': 'crown',
  'radii': RADII,
  'accuracy': [0.1, 0.08, 0.04, 0.02],
  'interval': [[0.08, 0.13], [0.06, 0.11], [0.03, 0.06], [0.01, 0.04]],
}


@pytest.fixture(scope='module')
def workdir(tmp_path_factory):
  return train(tmp_path_factory.mktemp('run'), dataset='mnist_5k', num_steps=40)


@pytest.fixture(scope='module')
def config(workdir):
  return probe_settings.ProbeConfig(
    workdir=str(workdir), radii=(0.0, 0.01, 0.1), pgd_steps=4, num_examples=48, num_queries=20
  )


@pytest.fixture(scope='module')
def result(config):
  return probe.run(dataclasses.replace(config, certify=True), signals.StopSignal())


def test_every_file_of_a_probe_has_the_certificates(workdir, result):
  certified = result['certified']
  assert certified['method'] == 'crown' and certified['radii'] == result['radii']
  assert np.all(np.array(certified['accuracy']) <= result['accuracy'])
  assert 0.0 < certified['accuracy'][1] < 1.0
  assert result['checks'][12]['verdict'] == 'pass'
  assert json_files.read(workdir / 'probe_digit.json', records.Probe)['certified'] == certified
  saved = np.load(workdir / 'probe_digit.npz')
  assert saved['certified_radius'].shape == (48,)
  np.testing.assert_array_equal(
    (saved['certified_radius'][None] >= np.float32(result['radii'])[:, None]).mean(axis=1),
    certified['accuracy'],
  )
  assert np.all(saved['certified_radius'] < saved['broken_radius'])
  with (workdir / 'probe_digit.csv').open() as file:
    rows = list(csv.DictReader(file))
  assert [float(row['certified']) for row in rows] == certified['accuracy']
  assert [[float(row['certified_low']), float(row['certified_high'])] for row in rows] == certified[
    'interval'
  ]
  line = 'certified (crown): ' + ' '.join(f'{value:.3f}' for value in certified['accuracy'])
  assert line in probe_results.as_text(result).splitlines()


def test_a_finished_result_is_given_back_with_its_certificates(config, result, monkeypatch):
  monkeypatch.setattr(probe, 'fit', pytest.fail)
  again = dataclasses.replace(config, certify=True)
  assert probe.run(again, signals.StopSignal())['certified'] == result['certified']


def test_without_the_flag_nothing_is_certified_or_named(config, workdir, result, tmp_path):
  output = tmp_path / 'out'
  plain = probe.run(dataclasses.replace(config, output=str(output)), signals.StopSignal())
  assert plain.keys() == result.keys() - {'certified'}
  assert plain['accuracy'] == result['accuracy']
  assert 'certified_by' not in plain['evaluation']
  assert plain['checks'][12]['verdict'] == 'skipped'
  assert 'certified_radius' not in np.load(output / 'probe_digit.npz')
  assert (output / 'probe_digit.csv').read_text().splitlines()[0] == 'radius,accuracy,low,high'


def test_a_result_from_before_there_were_certificates_still_stands(workdir, result):
  path = workdir / 'probe_digit.json'
  old, now = json.loads(path.read_text()), json.loads(path.read_text())
  now['config'] |= {'certify': False, 'certify_method': None, 'certify_slope_steps': 0}
  for name in ('certify', 'certify_method', 'certify_slope_steps'):
    del old['config'][name]
  place = workdir / 'old.json'
  place.write_text(json.dumps(old))
  assert identity.finished(place, now) is not None
  for change in ({'certify': True}, {'certify': True, 'certify_method': 'ibp'}):
    assert identity.finished(place, now | {'config': now['config'] | change}) is None
  place.unlink()


def test_an_attack_goes_on_from_its_state_whether_it_is_certified_or_not(result):
  attack = {'config': dict(result['config'])}
  plain = {'config': attack['config'] | {'certify': False, 'certify_method': None}}
  assert attack['config']['certify'] and identity.digest(attack) == identity.digest(plain)
  other = {'config': attack['config'] | {'seed': 7}}
  assert identity.digest(other) != identity.digest(attack)


def test_what_cannot_be_certified_is_refused_before_anything_is_fitted(config, monkeypatch):
  def refused(*_):
    raise TypeError('cannot certify Mine')

  monkeypatch.setattr(probe, 'fit', pytest.fail)
  monkeypatch.setattr(certifiers, 'encoder_of', refused)
  with pytest.raises(ArgumentError, match='certify: cannot certify Mine'):
    probe.run(dataclasses.replace(config, certify=True), signals.StopSignal())
  with pytest.raises(ArgumentError, match='certify_method: needs certify'):
    probe.run(dataclasses.replace(config, certify_method='ibp'), signals.StopSignal())
  for change in ({}, {'certify': True, 'certify_method': 'ibp'}):
    change = change | {'certify_slope_steps': 3}
    with pytest.raises(ArgumentError, match='certify_slope_steps: needs certify, by crown'):
      probe.run(dataclasses.replace(config, **change), signals.StopSignal())


def test_the_method_has_the_slope_steps(config):
  model = make_vae((4, 4, 1), latent_dim=2)
  change = {'certify': True, 'certify_slope_steps': 3}
  method = probe._method(dataclasses.replace(config, **change), model)
  assert method == certification.Method('crown', 3) and str(method) == 'crown, 3 slope steps'
  assert probe._method(config, model) is None


@pytest.mark.parametrize('binary', ['sweep', 'supervised'])
def test_what_cannot_be_certified_is_refused_before_training(tmp_path, binary):
  model = ModelConfig(covariance='full')
  settings = {'workdir': str(tmp_path), 'model': model}
  with pytest.raises(ArgumentError, match=r'--probe: --certify: cannot certify .* covariance'):
    if binary == 'sweep':
      config = sweep.SweepConfig(vary='seed=0', probe='--certify', placement=ALONE)
      base = dataclasses.replace(pretrain.PretrainConfig(), **settings)
      sweep.run(config, base, signals.StopSignal())
    else:
      config = supervised.SupervisedConfig(probe='--certify', **settings)
      supervised.run(config, signals.StopSignal())
  assert not list(tmp_path.iterdir())


def test_the_methods_of_the_flag_are_those_of_the_library():
  assert probe_settings.CERTIFICATES == certification.METHODS


def test_the_figure_shades_what_is_between_the_certified_and_the_attacked_curve(tmp_path):
  certified = {'radii': RADII, 'accuracy': [0.9, 0.8, 0.6, 0.3], 'certified': CERTIFIED}
  certified['interval'] = [[value - 0.05, value + 0.05] for value in certified['accuracy']]
  figure = plots.new_figure(4.0, 3.0)
  axis = figure.subplots()
  curve = plots.Curve('se', [certified])
  np.testing.assert_array_equal(curve.certified, CERTIFIED['accuracy'])
  plots.draw(axis, [curve])
  _, labels = axis.get_legend_handles_labels()
  assert labels == ['SE', 'SE, certified', 'SE: the true accuracy is in this band']
  _, band = axis.collections
  vertices = band.get_paths()[0].vertices
  for values in (CERTIFIED['accuracy'], certified['accuracy']):
    for point in zip(RADII, values, strict=True):
      assert np.isclose(vertices, point).all(axis=1).any()
  # One seed without certificates, and there is none of the mean.
  del certified['certified']
  assert plots.Curve('se', [certified, {**certified, 'certified': CERTIFIED}]).certified is None


def test_the_report_has_a_row_and_a_band_for_it(tmp_path):
  run = write_run(tmp_path / 'se')
  result = write_probe(run, certified=CERTIFIED)
  page = render(run)
  cells = [
    '{} [ {} , {} ]'.format(*(shown(v, '.3f') for v in (value, *interval)))
    for value, interval in zip(CERTIFIED['accuracy'], CERTIFIED['interval'], strict=True)
  ]
  assert page.row('se, certified') == ['se, certified', *cells]
  assert any('the true accuracy is in the shaded band' in item for item in page.items)
  chart = next(a['src'] for tag, a in page.elements if a.get('class') == 'chart')
  picture = drawn(chart)
  x_scale, y_scale = scales(picture)
  line = np.polyval(y_scale, points_of(picture, 'line_1')[:, 1])
  np.testing.assert_allclose(line, CERTIFIED['accuracy'], atol=1e-4)
  band = points_of(picture, 'band_1')
  found = np.stack([np.polyval(x_scale, band[:, 0]), np.polyval(y_scale, band[:, 1])], axis=1)
  for point in zip(RADII, result['accuracy'], strict=True):
    assert np.isclose(found, point, atol=1e-3).all(axis=1).any()


def test_a_panel_of_a_figure_has_it_too():
  result = {'radii': RADII, 'accuracy': [0.9, 0.8, 0.6, 0.3], 'certified': CERTIFIED}
  result['interval'] = [[value, value] for value in result['accuracy']]
  table = report_page.panel('MNIST', [plots.Curve('se', [result])])
  assert [row.label for row in table.rows] == ['SE', 'SE, certified']
  assert [cell[0] for cell in table.rows[1].cells] == CERTIFIED['accuracy']


def test_radii_of_a_certified_curve_may_have_any_order():
  result = {'radii': [0.1, 0.0], 'accuracy': [0.5, 0.9], 'interval': [[0.5, 0.5], [0.9, 0.9]]}
  result['certified'] = {'method': 'crown', 'radii': [0.1, 0.0], 'accuracy': [0.2, 0.85]}
  table = report_page.panel('MNIST', [plots.Curve('se', [result])])
  assert [[cell[0] for cell in row.cells] for row in table.rows] == [[0.9, 0.5], [0.85, 0.2]]


def test_compare_has_columns_where_runs_have_it(tmp_path):
  for name, probed in (('se', {'certified': CERTIFIED}), ('vae', {})):
    write_run(tmp_path / 'runs' / name)
    write_probe(tmp_path / 'runs' / name, **probed)
  output = tmp_path / 'out'
  compare.run(compare.CompareConfig(runs=(str(tmp_path / 'runs'),), output=str(output)))
  with (output / 'compare.csv').open() as file:
    se, vae = csv.DictReader(file)
  names = [f'certified at {radius:g}' for radius in RADII]
  assert [se[name] for name in names] == [f'{value:.3f}' for value in CERTIFIED['accuracy']]
  assert [vae[name] for name in names] == [''] * len(RADII)
