"""Figure 1: its files, what its presets train, and the verdicts beside its curves."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments import figure1, probe, report
from experiments.cli import app, signals
from experiments.cli.flags import to_dict
from experiments.visual import plots
from se_vae import training
from se_vae.evaluation import verdicts
from se_vae.storage import checkpoints
from tests.experiments.scheduled import ALONE

DTYPE_PROMOTION = 'standard'  # optax takes part
pytestmark = pytest.mark.usefixtures('shallow')


def contents(workdir: Path) -> dict[str, bytes]:
  """All files of the encoders and attacks of a figure, but for locks."""
  return {
    str(path.relative_to(workdir)): path.read_bytes()
    for directory in workdir.glob('*_seed0')
    for path in directory.rglob('*')
    if path.is_file() and not path.name.endswith('lock')
  }


@pytest.fixture
def tiny(monkeypatch) -> figure1.Preset:
  """A quick preset of seconds: all encoders are small MLPs on colour images, and share programs."""
  small = {'hidden_units': 16, 'latent_dim': 4, 'pgd_steps': 2, 'log_every': 10}
  small |= {'tensorboard': False, 'num_devices': 1}
  preset = figure1.PRESETS['quick']
  encoders = tuple(
    dataclasses.replace(
      pair, color=True, num_steps=20, overrides=small, arch='mlp', latent_dims=(4,)
    )
    for pair in preset.encoders
  )
  attack = {'num_examples': 20, 'pgd_steps': 2, 'radii': (0.0, 0.1), 'check_examples': 0}
  preset = dataclasses.replace(preset, encoders=encoders, attack=attack)
  monkeypatch.setitem(figure1.PRESETS, 'quick', preset)
  return preset


def test_a_panel_has_the_curves_of_its_encoders_and_its_task():
  common = {'latent_dim': 64, 'radii': [0.0], 'interval': [[0.0, 1.0]], 'checks': []}
  names = [(e, t, o) for e in ('a', 'b') for t in ('digit', 'color') for o in ('vae', 'se')]
  results = [
    common | {'encoders': e, 'task': t, 'objective': o, 'accuracy': [i / 10]}
    for i, (e, t, o) in enumerate(names)
  ]
  curves = figure1.curves_of(figure1.Panel('A panel', 'a', 'color'), results)
  found = [(curve.objective, curve.accuracy.tolist()) for curve in curves]
  assert found == [('vae', [0.2]), ('se', [0.3])]


@pytest.mark.long
def test_figure1_end_to_end_and_again(tiny, tmp_path, monkeypatch, capsys):
  settings = figure1.Figure1Config(placement=ALONE, workdir=str(tmp_path))
  first = figure1.run(settings, signals.StopSignal())
  with Image.open(tmp_path / 'figure1.png') as picture:
    assert picture.width > 1000
  with (tmp_path / 'figure1.csv').open() as file:
    table = list(csv.DictReader(file))
  assert len(table) == 4 * 2 * 2  # panels x objectives x radii
  assert {(row['encoders'], row['task']) for row in table} == {
    ('mnist_mlp', 'digit'),
    ('color_mlp', 'digit'),
    ('color_mlp', 'color'),
    ('mnist_convnet', 'digit'),
  }
  text = (tmp_path / 'figure1.md').read_text()
  assert '(d) MNIST, digit task, ConvNet' in text
  printed = capsys.readouterr().out
  assert text in printed and printed.endswith('\nchecks: not run\n')
  # Neither the checks that were not run nor the optimiser that is not the paper's go unsaid.
  assert {row['checks'] for row in table} == {'checks: not run'}
  assert {result['checks_summary'] for result in first['results']} == {'checks: not run'}
  assert text.count('| checks: not run |') == 4 * 2
  assert 'the choice of this project. The paper trains with SGD' in first['optimizer']
  assert first['optimizer'] in text
  assert json.loads((tmp_path / 'figure1.json').read_text()) == json.loads(json.dumps(first))

  # What is finished is not run again, wherever it lies: a training or an attack would raise.
  monkeypatch.setattr(training, 'run', pytest.fail)
  monkeypatch.setattr(probe, 'fit', pytest.fail)
  drawn = (tmp_path / 'figure1.png').read_bytes()  # and drawing is not tested again
  monkeypatch.setattr(plots, 'save', lambda file, _: file.write(drawn))
  second = figure1.run(settings, signals.StopSignal())
  assert second['results'] == first['results']
  before = contents(tmp_path)
  shutil.copytree(tmp_path, tmp_path / 'moved')
  monkeypatch.chdir(tmp_path)
  moved = figure1.run(figure1.Figure1Config(placement=ALONE, workdir='moved'), signals.StopSignal())
  for here, there in zip(moved['results'], first['results'], strict=True):
    config = here['config'] | {'workdir': there['config']['workdir']}
    assert here | {'config': config} == there
  assert contents(tmp_path / 'moved') == contents(tmp_path) == before

  # The results of an encoder whose checkpoint is damaged are not published.
  directory = Path('moved', 'mnist_mlp_se_latent4_seed0')
  ((_, checkpoint),) = checkpoints.steps(directory / 'checkpoints')
  checkpoint.write_bytes(checkpoint.read_bytes()[:-1])
  capsys.readouterr()
  with pytest.raises(app.RunsFailedError, match='1 of 6 runs failed'):
    figure1.run(figure1.Figure1Config(placement=ALONE, workdir='moved'), signals.StopSignal())
  told = capsys.readouterr().err
  assert 'failed: mnist_mlp se, latent size 4, seed 0: ' in told and 'Traceback' not in told
  assert re.search(f'{directory}.*remove this directory', told)

  page = report.run(report.ReportConfig(workdir=str(tmp_path))).read_text()
  for number in ('(a)', '(b)', '(c)', '(d)', '6 runs side by side', 'finished: 20 steps'):
    assert number in page


def pieces_of(workdir: Path, preset: str, **options) -> list[figure1.Piece]:
  settings = figure1.Figure1Config(placement=ALONE, workdir=str(workdir), preset=preset, **options)
  return list(figure1._pieces(settings, figure1._with_overrides(settings), workdir))


@pytest.mark.parametrize(
  ('flags', 'count'),
  [({}, 26), ({'latent_dims': (64,), 'seeds': 2}, 12), ({'latent_dims': (9, 9), 'seeds': 1}, 6)],
)
def test_a_preset_names_every_encoder_once(tmp_path, flags, count):
  pieces = pieces_of(tmp_path, 'cpu', **flags)
  settings = [to_dict(piece.job.pretraining) for piece in pieces]
  assert len({values['workdir'] for values in settings}) == len(pieces) == count
  for piece, values in zip(pieces, settings, strict=True):
    identity = piece.identity
    assert values['workdir'].endswith(f'latent{identity["latent_dim"]}_seed{identity["seed"]}')
    colored = identity['encoders'] == 'color_mlp'
    assert values['dataset'] == ('color_mnist' if colored else 'mnist')


@pytest.mark.parametrize(
  ('preset', 'optimizers', 'text'),
  [
    ('quick', {'adam'}, 'Optimizer: Adam, cosine schedule, learning rate 0.001: the choice of '),
    ('cpu', {'adam'}, 'The paper trains with SGD.'),
    ('paper', {'sgd'}, 'Optimizer: SGD with momentum 0.9, constant schedule'),
  ],
)
def test_every_preset_says_whose_optimizer_it_trains_with(tmp_path, preset, optimizers, text):
  settings = [piece.job.pretraining for piece in pieces_of(tmp_path, preset)]
  assert {to_dict(each)['optimizer'] for each in settings} == optimizers
  assert text in figure1._optimizer_text(settings)


def test_a_panel_says_the_verdict_of_every_curve():
  checks = [
    {'number': 1, 'name': 'legal', 'passed': True, 'figure': 'all', 'values': {}},
    {'number': 6, 'name': 'converged', 'passed': False, 'figure': '9 more', 'values': {}},
  ]
  unchecked = {'radii': [0.0, 0.1], 'accuracy': [1.0, 0.5], 'interval': [[0.9, 1.0], [0.4, 0.6]]}
  vae = plots.Curve('vae', [{**unchecked, 'checks': []}])
  both = plots.Curve('se', [{**unchecked, 'checks': checks}] * 2)
  np.testing.assert_array_equal(both.accuracy, [1.0, 0.5])
  assert vae.checks == 'checks: not run'
  assert both.checks == verdicts.summary(checks * 2)
  assert both.checks == 'checks: 2 passed, 2 failed (6: converged, 2 times), 0 skipped'
  assert plots.caption([vae, both]) == ['VAE, checks: not run', f'SE, {both.checks}']
  assert plots.caption([vae, plots.Curve('se', [unchecked])]) == ['checks: not run']
