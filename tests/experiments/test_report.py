"""The report: its numbers and charts are those of the files, and no text of a file is markup."""

from __future__ import annotations

import dataclasses
import html.parser
import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

from experiments import figure1, pretrain, probe_settings, report, supervised
from experiments.cli.flags import UsageError, to_dict
from experiments.visual import image_grids
from se_vae.evaluation import verdicts

RADII = [0.0, 0.05, 0.1, 0.3]
VOID = {'meta', 'img', 'br'}


class Page(html.parser.HTMLParser):
  """Every element with its attributes, and the tables as rows of cells; checks the nesting."""

  def __init__(self, text: str) -> None:
    super().__init__()
    self.open: list[str] = []
    self.elements: list[tuple[str, dict[str, str | None]]] = []
    self.rows: list[list[str]] = []
    self.numbers: list[tuple[str, str]] = []
    self.items: list[str] = []
    self.feed(text)
    assert self.open == []

  def handle_startendtag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))

  def handle_starttag(self, tag, attrs):
    self.elements.append((tag, dict(attrs)))
    if tag not in VOID:
      self.open.append(tag)
    if tag == 'tr':
      self.rows.append([])
    if tag == 'li':
      self.items.append('')
    if tag in ('th', 'td'):
      self.rows[-1].append('')
    if tag == 'data':
      self.numbers.append((dict(attrs)['value'], ''))

  def handle_endtag(self, tag):
    assert self.open.pop() == tag

  def handle_data(self, data):
    if 'td' in self.open or 'th' in self.open:
      self.rows[-1][-1] = ' '.join(f'{self.rows[-1][-1]} {data}'.split())
    if 'li' in self.open:
      self.items[-1] += data
    if self.open and self.open[-1] == 'data':
      self.numbers[-1] = (self.numbers[-1][0], data)

  def row(self, heading: str) -> list[str]:
    return next(row for row in self.rows if row and row[0].startswith(heading))


def write_run(directory: Path, objective: str = 'se', finished: bool = True, **changes) -> Path:
  """A run's directory as experiments.pretrain leaves it, with numbers told apart at sight."""
  generator = np.random.default_rng([ord(letter) for letter in directory.name + objective])
  directory.mkdir(parents=True)
  config = {'workdir': str(directory), 'objective': objective, 'num_steps': 300, **changes}
  saved = {
    'config': to_dict(pretrain.PretrainConfig()) | config,
    'data': {'source': 'embedded', 'digest': 'abc'},
    'versions': {'python': '3.11', 'jax': '0.10'},
    'devices': ['cpu'],
  }
  (directory / 'config.json').write_text(json.dumps(saved))
  names = ['elbo', 'log_likelihood', 'loss', 'transport_cost' if objective == 'se' else 'kl']
  rows = [
    {'step': step, **{name: float(generator.normal(scale=100.0)) for name in names}}
    for step in (100, 200, 300)
  ]
  lines = [json.dumps(row) + '\n' for row in (rows if finished else rows[:2])]
  (directory / 'metrics.jsonl').write_text(''.join(lines))
  if finished:
    test = {name: float(generator.normal()) for name in ('elbo', 'kl')} | {'active_latents': 7}
    (directory / 'result.json').write_text(json.dumps({'step': 300, 'test': test, **saved}))
    page = generator.uniform(size=(4, 10, 28, 28, 1)).astype(np.float32)
    image_grids.save(directory / 'reconstructions.png', page)
  return directory


def write_probe(directory: Path, **changes) -> dict:
  """A probe's result as experiments.probe leaves it."""
  generator = np.random.default_rng(len(directory.name))
  accuracy = np.sort(generator.uniform(0.1, 0.9, len(RADII)))[::-1].tolist()
  result = {
    'task': 'digit',
    'num_examples': 1000,
    'radii': RADII,
    'accuracy': accuracy,
    'interval': [[value - 0.0312, value + 0.0298] for value in accuracy],
    'checks': [
      {'number': 1, 'name': 'images are legal', 'passed': True, 'figure': 'all', 'values': {}},
      {'number': 6, 'name': 'converged', 'passed': False, 'figure': '9 more', 'values': {}},
    ],
    'config': to_dict(probe_settings.ProbeConfig(workdir=str(directory))),
    'step': 300,
    **changes,
  }
  (directory / 'probe_digit.json').write_text(json.dumps(result))
  return result


def render(*directories: Path) -> Page:
  first, *others = map(str, directories)
  output = report.run(report.ReportConfig(workdir=first, compare=tuple(others) or None))
  return Page(output.read_text())


def shown(value: float, decimals: str) -> str:
  return format(value, decimals).replace('-', '\N{MINUS SIGN}')


@pytest.fixture
def run(tmp_path) -> Path:
  return write_run(tmp_path / 'se')


def test_every_number_is_the_files(run):
  other = write_run(run.parent / 'vae', 'vae')
  result, other_result = write_probe(run), write_probe(other)
  page = render(run, other)
  # Adversarial accuracy: a row a run, a column a radius.
  assert page.row('Radius') == ['Radius', *(f'{radius:g}' for radius in RADII)]
  first = page.rows.index(page.row('Radius')) + 1
  for name, found, row in zip(
    ('se', 'vae'), (result, other_result), page.rows[first : first + 2], strict=True
  ):
    cells = [
      '{} [ {} , {} ]'.format(*(shown(v, '.3f') for v in (value, *interval)))
      for value, interval in zip(found['accuracy'], found['interval'], strict=True)
    ]
    assert row == [name, *cells]
  # Held-out figures, and the last row of training.
  for directory in (run, other):
    test = json.loads((directory / 'result.json').read_text())['test']
    last = json.loads((directory / 'metrics.jsonl').read_text().splitlines()[-1])
    _, held_out, training, _ = [row for row in page.rows if row[0] == directory.name]
    assert held_out[1:] == [*(shown(test[name], '.5g') for name in ('elbo', 'kl')), '7']
    expected = [last.get(name) for name in ('elbo', 'log_likelihood', 'kl', 'transport_cost')]
    assert training[1:] == ['–' if v is None else shown(v, '.5g') for v in expected]  # noqa: RUF001
  # What is shown to a few digits is there to all of them.
  exact = {json.loads(value) for value, _ in page.numbers}
  assert exact >= {*result['accuracy'], *np.ravel(other_result['interval']).tolist(), 7}
  for value, text in page.numbers:
    rounded = float(text.replace('\N{MINUS SIGN}', '-').replace(',', ''))
    assert rounded == pytest.approx(json.loads(value), rel=1e-4, abs=5e-4)


def test_other_data_are_named_and_radii_are_drawn_in_order(run):
  config = to_dict(probe_settings.ProbeConfig(workdir=str(run), dataset='folder:shapes'))
  write_probe(run, config=config, radii=RADII[::-1])
  loaded = report._load_probe(run / 'probe_digit.json')
  assert loaded.dataset == 'folder:shapes' and loaded.accuracy.radii == sorted(RADII)
  output = report.run(report.ReportConfig(workdir=str(run)))
  assert 'folder:shapes, digit probe' in output.read_text()


def test_an_objective_that_does_not_train_the_decoder_has_no_bound(tmp_path):
  page = render(write_run(tmp_path / 'run', 'contrastive'))
  assert ['Run', 'KL from the prior', 'Active latents'] in page.rows


def test_the_page_needs_no_network(run):
  write_probe(run)
  text = render_text(run)
  for tag, attributes in Page(text).elements:
    assert tag not in ('script', 'link', 'iframe', 'object', 'base')
    assert not any(name.startswith('on') for name in attributes)
    for name in ('src', 'href'):
      assert re.match(r'data:image/(png|svg\+xml);base64,|#', attributes.get(name) or '#')
  style = re.search(r'<style>(.*)</style>', text, re.DOTALL).group(1)
  assert 'url(' not in style and '@import' not in style
  assert '://' not in text


def render_text(directory: Path) -> str:
  return report.run(report.ReportConfig(workdir=str(directory))).read_text()


def test_the_page_is_accessible(run):
  write_probe(run)
  page = render(run)
  for tag, attributes in page.elements:
    if tag == 'img':
      assert attributes['alt']
      assert attributes.get('class') == 'chart' or (attributes['width'] and attributes['height'])
    if tag == 'th':
      assert attributes['scope'] in ('row', 'col')
  assert ('html', {'lang': 'en'}) in page.elements
  targets = {attributes.get('id') for _, attributes in page.elements}
  links = [a['href'] for tag, a in page.elements if tag == 'a']
  assert links and all(link.removeprefix('#') in targets for link in links)


def test_nothing_in_a_file_is_markup(tmp_path):
  evil = '<script>alert(1)<script>"><img src=x onerror=alert(2)>'
  run = write_run(tmp_path / evil, dataset=f'tfds:{evil}', data_dir=evil)
  checks = [{'number': 1, 'name': evil, 'passed': True, 'figure': evil, 'values': {}}]
  write_probe(run, task=evil, checks=checks)
  metrics = run / 'metrics.jsonl'
  metrics.write_text(json.dumps({'step': 1, 'elbo': 1.0, evil: 2.0}) + '\n')
  page = render(run)
  assert not [tag for tag, _ in page.elements if tag == 'script']
  assert not [attributes for _, attributes in page.elements if 'onerror' in attributes]
  assert page.row('data_dir')[1] == evil
  assert any(row[0] == evil for row in page.rows)


def test_what_is_not_there_is_said(tmp_path):
  text = render_text(write_run(tmp_path / 'run', finished=False))
  assert 'not finished: 200 of 300 steps' in text
  assert 'run: no probe yet' in text and 'run: no pictures yet' in text
  bare = write_run(tmp_path / 'bare', finished=False)
  (bare / 'metrics.jsonl').unlink()
  (bare / 'not_finite.json').write_text('{"step": 3, "metrics": {}, "examples": []}')
  text = render_text(bare)
  assert 'not finished: 0 of 300 steps; step 3 was not finite' in text
  assert 'bare: no metrics yet' in text


def test_a_half_written_row_is_left_out(run):
  expected = render_text(run)
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 400, "elb')
  assert render_text(run) == expected


def test_settings_that_differ_are_marked(run):
  other = write_run(run.parent / 'strong', gamma=5.0)
  page = render(run, other)
  assert page.row('gamma') == ['gamma ≠', '1.0', '5.0']
  assert page.row('obs_var') == ['obs_var', '0.1', '0.1']
  alone = render(other)
  assert alone.row('gamma') == ['gamma ≠', '5.0']  # not the default
  assert alone.row('radius') == ['radius', '0.2']


def test_checks_are_words_as_well_as_colours(run):
  write_probe(run)
  page = render(run)
  assert ['✓ pass', '1 images are legal', 'all'] in page.rows
  assert ['✗ FAIL', '6 converged', '9 more'] in page.rows


def test_a_check_that_was_skipped_is_no_pass(run):
  check = {'number': 7, 'name': 'Square', 'verdict': 'skipped', 'passed': None}
  write_probe(run, checks=[check | {'figure': 'nothing to attack', 'values': {}}])
  text = render_text(run)
  assert ['– skipped', '7 Square', 'nothing to attack'] in Page(text).rows  # noqa: RUF001
  assert '0 passed, 0 failed, 1 skipped' in text


def test_every_curve_stands_beside_the_verdict_of_its_checks(run):
  other = write_run(run.parent / 'unchecked')
  checks = write_probe(run)['checks']
  write_probe(other, checks=[])
  directories = [str(run), str(other)]
  text = report.run(report.ReportConfig(directories[0], tuple(directories[1:]))).read_text()
  listed = re.search(r'<ul class="verdicts">(.*?)</ul>', text, re.DOTALL).group(1)
  first, second = re.findall(r'<strong>(\w+)</strong>.*?<br>(.*?)</li>', listed, re.DOTALL)
  assert first == ('se', verdicts.summary(checks)) and '1 failed' in first[1]
  assert second == ('unchecked', 'checks: not run')


def test_joint_curves_and_moves(run):
  curve = {'radii': [0.0, 0.1], 'accuracy': [0.5, 0.25], 'interval': [[0.4, 0.6], [0.2, 0.3]]}
  quantiles = {'0.05': [0.0, 1.25], '0.5': [0.0, 2.5], '0.95': [0.0, 5.5]}
  moves = {'radii': [0.0, 0.12], 'mean': [0.0, 3.75], 'quantiles': quantiles}
  write_probe(run, joint={'tasks': ['digit', 'color'], **curve}, moves=moves)
  text = render_text(run)
  assert 'mnist_5k, digit and color probes together' in text
  page = Page(text)
  shifts = page.rows[page.rows.index(['Radius', '0', '0.12']) + 1]
  assert shifts == ['se', '0 [ 0 , 0 ]', '3.75 [ 1.25 , 5.5 ]']


def test_a_figure(tmp_path):
  results = []
  for objective in ('vae', 'se'):
    run = write_run(tmp_path / f'mnist_mlp_{objective}', objective)
    identity = {'encoders': 'mnist_mlp', 'objective': objective, 'latent_dim': 64, 'seed': 0}
    results.append({**write_probe(run), **identity})
  directory = str(tmp_path)
  text = report.run(report.ReportConfig(workdir=directory)).read_text()
  assert 'is a folder of runs without' in text and 'mnist_mlp_vae' in text
  panels = [dataclasses.asdict(figure1.PANELS[2])]
  figure = tmp_path / 'figure1.json'
  figure.write_text(json.dumps({'panels': panels, 'results': results, 'optimizer': 'Adam, ours'}))
  text = report.run(report.ReportConfig(workdir=directory)).read_text()
  assert 'is a folder of runs without' not in text
  assert '(c) MNIST, digit task, MLP' in text and 'Adam, ours' in text
  page = Page(text)
  first = page.rows.index(page.row('Radius')) + 1
  for row, result in zip(page.rows[first : first + 2], results, strict=True):
    assert [cell.split()[0] for cell in row[1:]] == [shown(v, '.3f') for v in result['accuracy']]


def test_a_sweep_is_no_unfinished_figure(run):
  (run.parent / 'sweep.json').write_text('{}')
  text = render_text(run.parent)
  assert 'is a folder of runs without' not in text and 'finished: 300 steps' in text


def write_supervised(directory: Path, **changes) -> dict:
  """A supervised classifier as experiments.supervised leaves it."""
  directory.mkdir()
  result = write_probe(directory)
  (directory / 'probe_digit.json').unlink()
  result |= {
    'config': to_dict(supervised.SupervisedConfig()) | changes,
    'evaluation': {'attack': 'worst_case'},
    'data': {'source': 'embedded', 'digest': 'abc'},
    'versions': {'python': '3.11', 'jax': '0.10'},
    'devices': ['cpu'],
  }
  (directory / 'result.json').write_text(json.dumps(result))
  return result


def test_a_supervised_classifier_alone(tmp_path, capsys):
  result = write_supervised(tmp_path / 'ceiling', growth=0.5)
  page = render(tmp_path / 'ceiling')
  trained = page.row('ceiling')
  assert trained[1:5] == ['supervised', 'mnist_5k', 'mlp', '64'] and '10,000' in trained[-1]
  curve = next(row for row in page.rows if len(row) == 1 + len(RADII) and row[0] == 'ceiling')
  assert [cell.split()[0] for cell in curve[1:]] == [shown(v, '.3f') for v in result['accuracy']]
  assert page.row('growth') == ['growth ≠', '0.5'] and page.row('radius') == ['radius', '0.2']
  assert ['✗ FAIL', '6 converged', '9 more'] in page.rows
  text = (tmp_path / 'ceiling' / 'report.html').read_text()
  assert 'no pictures yet' not in text and 'no metrics yet' not in text
  assert capsys.readouterr().out.splitlines()[-1] == verdicts.summary(result['checks'])


def test_a_supervised_classifier_beside_an_encoder(run):
  write_probe(run)
  result = write_supervised(run.parent / 'ceiling')
  del result['data']  # as in version 0.1.0
  (run.parent / 'ceiling' / 'result.json').write_text(json.dumps(result))
  broken = run.parent / 'broken'
  write_supervised(broken)
  (broken / 'result.json').write_text('{"step": 3}')
  write_supervised(run.parent / 'unknown', gama=1)
  page = render(run, run.parent / 'ceiling', broken, run.parent / 'unknown')
  assert page.row('gamma') == ['gamma ≠', '1.0', 'not given']
  assert page.row('data ') == ['data ≠', 'embedded', 'not given']
  assert page.row('num_steps') == ['num_steps ≠', '300', '10000']
  assert any(item.startswith(f'{broken / "result.json"}: damaged (') for item in page.items)
  assert any('gama' in item for item in page.items)


def test_a_setting_that_an_older_run_does_not_know_is_the_default(run):
  other = write_run(run.parent / 'old')
  saved = json.loads((other / 'config.json').read_text())
  del saved['config']['tensorboard']
  (other / 'config.json').write_text(json.dumps(saved))
  assert render(run, other).row('tensorboard') == ['tensorboard', 'True', 'True']


@pytest.mark.parametrize('content', ['', '[]', '{"config": 3}', '{', 'null', '\x00'])
def test_a_report_needs_the_settings_of_a_run(run, content):
  (run / 'config.json').write_text(content)
  with pytest.raises(UsageError, match=r'no run can be shown: .*config.json: damaged') as error:
    render(run)
  assert '\n' not in str(error.value)
  assert not (run / 'report.html').exists()


@pytest.mark.long
@pytest.mark.parametrize('content', ['', '{"config": 3}'])
def test_what_is_damaged_is_named_and_the_rest_is_shown(run, content, capsys):
  """Each kind of file in turn is damaged; a directory in its place cannot be read at all."""
  other = write_run(run.parent / 'other')
  write_probe(other)
  names = ('result.json', 'probe_digit.json', 'figure1.json', 'reconstructions.png', 'config.json')
  for name in names:
    (run / name).write_text(content)
  (run / 'samples.png').mkdir()
  page = render(other, run)
  assert page.row('Radius')
  assert any(item.startswith(f'{run / "config.json"}: damaged (') for item in page.items)
  shutil.copy(other / 'config.json', run)
  page = render(other, run)
  text = ' '.join(page.items)
  assert any('no result that can be read: 300 of 300 steps' in row for row in page.rows)
  for name in names[:-1]:
    assert f'{run / name}: damaged (' in text
  assert f'{run / "samples.png"}: cannot be read: Is a directory' in text
  assert f'{other / "traversals.png"}: missing' in text
  printed = capsys.readouterr().err
  assert f'warning: {run / "result.json"}: damaged (' in printed and 'left out' in printed


def test_rows_that_are_damaged_are_left_out(run):
  metrics = run / 'metrics.jsonl'
  good = metrics.read_bytes()
  bad = (b'{"step": 1, "elbo": "x"}\n', b'x\n', b'{"elbo": 1.0}\n', b'\xff\x00\n', b'[]\n')
  metrics.write_bytes(b''.join(bad) + good)
  page = render(run)
  (line,) = (item for item in page.items if 'metrics.jsonl' in item)
  assert 'line 1 is damaged (elbo must be a number' in line and '4 more lines' in line
  metrics.write_bytes(good)
  assert render(run).rows == page.rows


def test_only_reports_are_overwritten(run):
  render(run)
  render(run)
  config = report.ReportConfig(workdir=str(run), output=str(run / 'result.json'))
  before = (run / 'result.json').read_text()
  with pytest.raises(UsageError, match=r'--output: .*result.json is not a report'):
    report.run(config)
  assert (run / 'result.json').read_text() == before
  for wrong in (run, run / 'nowhere' / 'page.html'):
    with pytest.raises(UsageError, match='--output'):
      report.run(dataclasses.replace(config, output=str(wrong)))


def test_a_name_that_is_not_utf_8_is_no_error(tmp_path):
  """Such as every name with an umlaut where the locale is ASCII."""
  directory = tmp_path / os.fsdecode('sü'.encode() + b'\xff')
  page = report.run(report.ReportConfig(workdir=str(write_run(directory)))).read_bytes()
  assert 'sü'.encode() + b'\xff' in page


def test_directories_that_are_wrong_are_named(run):
  for workdir, compare, flag in (
    (None, None, '--workdir: is required'),
    (str(run / 'nowhere'), None, '--workdir: .* is not a directory'),
    (str(run), (str(run / 'metrics.jsonl'),), '--compare: .* is not a directory'),
  ):
    with pytest.raises(UsageError, match=flag):
      report.run(report.ReportConfig(workdir=workdir, compare=compare))
  empty = run.parent / 'empty'
  empty.mkdir()
  with pytest.raises(UsageError, match=r'--workdir: .* holds no run'):
    report.run(report.ReportConfig(workdir=str(empty)))
