"""The results: the manifest's faults, the page of synthetic rows, this repository's own rows."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import yaml

from experiments import results
from experiments.cli import signals
from experiments.cli.flags import UsageError
from experiments.reproduction import building, claims, document, manifest, plan, rows
from se_vae.config import ArgumentError
from se_vae.storage import json_files
from tests.experiments.scheduled import ALONE

DTYPE_PROMOTION = 'standard'  # optax takes part

ROOT = Path(__file__).parents[2]
TINY = '--dataset=mnist_5k --hidden_units=16 --latent_dim=4 --num_steps=20 --log_every=10'
TINY += ' --num_devices=1'
ATTACK = '--radii=0,0.1 --num_examples=20 --pgd_steps=2 --check_examples=0'
CONTENT = {
  'revision': 2,
  'introduction': 'What this is.\n\n- a list that is\n- not filled\n',
  'encoders': {
    'vae': {'flags': f'{TINY} --objective=vae', 'minutes': 1},
    'se': {'flags': f'{TINY} --pgd_steps=2 --freeze_decoder', 'init_from': 'vae', 'minutes': 2},
  },
  'rows': {
    'plain': {
      'title': 'A VAE',
      'encoder': 'vae',
      'probe': ATTACK,
      'seeds': [0, 1],
      'minutes': 3,
      'expected': {0.0: 0.5, 0.1: 0.25},
      'tolerance': 0.01,
    },
    'smooth': {
      'title': 'Smoothed',
      'encoder': 'se',
      'probe': ATTACK,
      'seeds': [0, 1],
      'minutes': 4,
      'tolerance': 0.01,
    },
  },
  'sections': [
    {
      'title': 'First',
      'text': 'Both.',
      'rows': ['plain', 'smooth'],
      'figure': {
        'file': 'curves.png',
        'panels': [{'title': 'both', 'rows': ['plain', 'smooth'], 'labels': ['a', 'b']}],
      },
      'claims': [{'claim': 'Smoothing helps.', 'holds_if': ['smooth > plain at 0.1']}],
    },
    {
      'title': 'Second',
      'text': 'Against a number.',
      'rows': ['plain'],
      'figure': {
        'file': 'against.png',
        'radii': [0.0, 0.1],
        'panels': [
          {'title': 't', 'rows': ['plain', 'smooth'], 'at': [1, 10], 'axis': 'x', 'scale': 'log'}
        ],
      },
    },
  ],
}


CLASSIFIER = {
  'title': 'A classifier',
  'supervised': '--num_steps=2',
  'probe': '',
  'seeds': [0],
  'minutes': 1,
  'tolerance': 0.1,
}


def write(directory: Path, content: dict) -> Path:
  """A directory of results with this manifest."""
  folder = directory / 'results'
  folder.mkdir(exist_ok=True)
  (folder / 'manifest.yaml').write_text(yaml.safe_dump(content, sort_keys=False))
  return folder


def changed(*path, value=None) -> dict:
  """The content with one value replaced."""
  content = copy.deepcopy(CONTENT)
  place = content
  for key in path[:-1]:
    place = place[key]
  place[path[-1]] = value
  return content


def measured(name: str, *accuracies: list[float], revision: int = 2, checks=()) -> rows.Measured:
  """A row that nobody measured."""
  seeds = [
    {
      'seed': seed,
      'radii': [0.0, 0.1],
      'accuracy': accuracy,
      'interval': [[value - 0.01, value + 0.01] for value in accuracy],
      'num_examples': 100,
      'checks': list(checks),
      'held_out': {'elbo': 80.0 + seed, 'active_latents': 7},
      'versions': {'jax': '0.10.2'},
    }
    for seed, accuracy in enumerate(accuracies)
  ]
  return {
    'name': name,
    'title': f'Row {name}',
    'revision': revision,
    'objective': 'se' if name == 'smooth' else 'vae',
    'task': 'digit',
    'dataset': 'mnist_5k',
    'data': 'abc',
    'validation': False,
    'attack': 'worst_case',
    'settings': {'pgd_steps': 40},
    'radii': [0.0, 0.1],
    'commands': [],
    'machine': 'a machine',
    'seeds': seeds,
  }


FAILED = {'number': 7, 'name': 'Square is weaker', 'verdict': 'fail', 'figure': '5 of 200'}
PASSED = {'number': 1, 'name': 'images are legal', 'verdict': 'pass', 'figure': 'all'}


@pytest.fixture
def folder(tmp_path) -> Path:
  """Results with two synthetic rows."""
  folder = write(tmp_path, CONTENT)
  save(folder, measured('plain', [0.9, 0.1], [0.8, 0.2], revision=1))
  save(folder, measured('smooth', [0.9, 0.7], [0.8, 0.5], checks=[PASSED, FAILED]))
  return folder


def save(folder: Path, row: rows.Measured) -> None:
  """Writes a row as one that the commands of now gave."""
  planned = plan.Plan(page(folder).manifest, folder).shown()
  rows.write(folder, {**row, 'commands': planned.commands(row['name'], 0)})


def page(folder: Path) -> document.Document:
  return document.Document(manifest.load(folder / 'manifest.yaml'), folder)


def config_of(folder: Path, **changes) -> results.ResultsConfig:
  workdir = str(folder.parent / 'runs')
  return results.ResultsConfig(
    results=str(folder), placement=ALONE, **{'workdir': workdir, **changes}
  )


def test_a_table_has_means_and_half_the_range_of_the_seeds(folder):
  plain = next(line for line in page(folder).text().splitlines() if '`plain`' in line)
  assert plain == '| A VAE† | 2 | .850 ± .050 | .150 ± .050 | 80 | 7 | not run | `plain` |'


def test_every_failed_check_is_listed_with_its_reason(folder):
  text = page(folder).text()
  assert '2 passed, failed: 7' in text
  for seed in (0, 1):
    line = f'`smooth`, seed {seed}: check 7 (Square is weaker) fails: 5 of 200'
    assert line in ' '.join(text.split())


def test_rows_of_older_code_are_marked(folder):
  text = page(folder).text()
  assert '| A VAE† |' in text and '| Smoothed |' in text and '† Measured by older code' in text
  assert 'Smoothed / A VAE† at 0.1' in text  # in claims too


def test_rows_of_other_settings_are_marked(folder):
  content = changed('encoders', 'se', 'flags', value=f'{TINY} --gamma=2')
  assert '| Smoothed† |' in page(write(folder.parent, content)).text()
  content = changed('rows', 'smooth', 'seeds', value=[0, 1, 2])
  assert '| Smoothed† |' in page(write(folder.parent, content)).text()


@pytest.mark.parametrize(
  ('features', 'width'), [('fma avx2 avx512f', ' (AVX-512)'), ('fma avx2', ' (AVX2)'), ('fma', '')]
)
def test_the_machine_is_named_with_the_width_of_its_vectors(tmp_path, features, width):
  cpuinfo = tmp_path / 'cpuinfo'
  core = f'processor\t: 0\nmodel name\t: Some CPU\nflags\t\t: fpu {features}\n\n'
  cpuinfo.write_text(core * 2)
  assert rows.machine(cpuinfo).startswith(f'Some CPU{width}, ')
  assert rows.machine(tmp_path / 'none').count(', ') == 2


def test_a_file_of_another_row_is_refused(folder):
  (folder / 'rows' / 'plain.json').rename(folder / 'rows' / 'smooth.json')
  with pytest.raises(json_files.JsonError, match='of the row plain'):
    page(folder).text()
  with pytest.raises(UsageError, match='of the row plain'):
    results.run('render', config_of(folder), signals.StopSignal())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'seeds': []}, 'no seeds'),
    ({'objective': 'magic'}, "no objective 'magic'"),
    ({'attack': 'magic'}, "no attack 'magic'"),
    ({'accuracy': [0.9, 7.0]}, r'seed 0: accuracies must be in \[0, 1\]'),
    ({'accuracy': [None, 0.1]}, r'seed 0: accuracies must be in \[0, 1\]'),
    ({'accuracy': [0.9, 0.2]}, r'within their intervals, got 0.2 in \[0.09, 0.11\]'),
  ],
)
def test_values_that_no_row_can_have_are_refused(folder, change, message):
  row = measured('plain', [0.9, 0.1])
  if 'accuracy' in change:
    row['seeds'][0] |= change
  else:
    row |= change
  save(folder, row)
  with pytest.raises(UsageError, match=rf'plain\.json.*{message}'):
    results.run('render', config_of(folder), signals.StopSignal())


def test_radii_keep_all_their_digits():
  content = {'radii': [8 / 255], 'accuracy': [2 / 3], 'certified': {'radii': [8 / 255]}}
  expected = {'radii': [8 / 255], 'accuracy': [0.66667], 'certified': {'radii': [8 / 255]}}
  assert rows._rounded(content) == expected


def test_rows_measured_at_fewer_radii_than_the_manifest_has_now_are_shown(tmp_path):
  content = changed('rows', 'plain', 'probe', value=f'{ATTACK} --radii=0,0.1,0.2')
  content['rows']['smooth']['probe'] = f'{ATTACK} --radii=0,0.1,0.2'
  content['sections'][0]['claims'][0]['holds_if'] = ['smooth > plain at 0.2']
  content['sections'][1]['figure']['radii'] = [0.2]
  folder = write(tmp_path, content)
  rows.write(folder, measured('plain', [0.9, 0.1]))
  rows.write(folder, measured('smooth', [0.9, 0.7]))
  results.run('render', config_of(folder), signals.StopSignal())
  text = (tmp_path / 'RESULTS.md').read_text()
  assert 'A VAE† | 1 | .900 | .100 |' in text and '**not measured**' in text
  assert not (folder / 'figures' / 'against.png').exists() and 'against.png' not in text


def test_rows_that_are_missing_are_listed_with_their_command(folder):
  assert 'Not measured' not in page(folder).text()
  (folder / 'rows' / 'smooth.json').unlink()
  text = page(folder).text()
  # Two seeds of: the VAE (1 minute), the smoothed encoder (2) and the attack (4).
  assert '| Smoothed | 14 | `make results ROWS=smooth` |' in text
  assert 'not measured' in text and 'curves.png' not in text
  (folder / 'rows' / 'plain.json').unlink()
  assert 'Second' not in page(folder).text()


def test_the_readme_has_the_rows_of_the_summary(folder):
  write(folder.parent, CONTENT | {'summary': ['smooth', 'plain']})
  readme = folder.parent / 'README.md'
  readme.write_text('Before.\n\n<!-- results -->\nold\n<!-- end of results -->\n\nAfter.\n')
  results.run('render', config_of(folder), signals.StopSignal())
  lines = readme.read_text().splitlines()
  assert lines[0] == 'Before.' and lines[-1] == 'After.' and 'old' not in lines
  assert '| Smoothed | .850 ± .050 | .600 ± .100 | 2 | 100 | 2 passed, failed: 7 |' in lines
  assert lines.index('| A VAE† | .850 ± .050 | .150 ± .050 | 2 | 100 | not run |') == 7
  (folder / 'rows' / 'plain.json').unlink()
  before = readme.read_text()
  results.run('render', config_of(folder), signals.StopSignal())
  assert readme.read_text() == before
  save(folder, measured('plain', [0.9, 0.1], [0.8, 0.2]))
  readme.write_text('No marks.\n')
  with pytest.raises(UsageError, match='end of results'):
    results.run('render', config_of(folder), signals.StopSignal())


def test_figures_are_drawn_and_shown(folder):
  drawn = page(folder).draw()
  assert [path.name for path in drawn] == ['curves.png', 'against.png']
  for path in drawn:
    assert path.read_bytes().startswith(b'\x89PNG')
    assert f'results/figures/{path.name}' in page(folder).text()


def test_a_figure_has_the_panels_whose_rows_were_measured(folder, monkeypatch):
  content = copy.deepcopy(CONTENT)
  panels = content['sections'][1]['figure']['panels']
  content['rows']['other'] = content['rows']['smooth']
  panels.append({**panels[0], 'title': 'not measured', 'rows': ['plain', 'other']})
  write(folder.parent, content)
  drawn = []
  monkeypatch.setattr(document.ablations, 'save', lambda file, panels, radii: drawn.extend(panels))
  page(folder).draw()
  assert [panel.title for panel in drawn] == [panels[0]['title']]


def test_certified_accuracies_stand_below_the_table(folder):
  row = measured('smooth', [0.9, 0.7])
  certified = {'method': 'crown', 'radii': [0.0, 0.1], 'accuracy': [0.9, 0.6]}
  row['seeds'][0]['certified'] = {**certified, 'interval': [(0.8, 1.0), (0.5, 0.7)]}
  save(folder, row)
  assert '`smooth` certified (crown): .900 at 0, .600 at 0.1' in page(folder).text()
  assert rows.certified_at(row, 0.1) == [0.6] and rows.certified_at(row, 0.2) is None


@pytest.mark.parametrize(
  ('comparisons', 'expected'),
  [
    (['smooth > plain at 0.1'], 'yes'),
    (['plain > smooth at 0.1'], 'no'),
    (['plain < smooth at 0.1'], 'yes'),
    (['smooth > plain at 0.1 by 0.4'], 'partly'),  # 0.6 for seed 0, 0.3 for seed 1
    (['smooth > plain at 0.1', 'plain > smooth at 0.1'], 'partly'),
    (['smooth > 0.6 at 0.1'], 'partly'),
    (['plain < 0.3 at 0.1'], 'yes'),
    (['smooth > plain at 0'], 'no'),  # they are equal
    (['smooth > 0.79 at 0'], 'yes'),
    (['other > plain at 0'], 'not measured'),
    (['late > plain at 0'], 'not measured'),  # no seed in common
  ],
)
def test_a_claim_is_judged_seed_by_seed(comparisons, expected):
  known = {
    'plain': measured('plain', [0.9, 0.1], [0.8, 0.2]),
    'smooth': measured('smooth', [0.9, 0.7], [0.8, 0.5]),
    'late': measured('late', [0.9, 0.7]),
  }
  known['late']['seeds'][0]['seed'] = 7
  found, lines = claims.verdict([claims.parse(text) for text in comparisons], known.get)
  assert found == expected
  if comparisons == ['smooth > plain at 0.1']:
    assert lines == ['Row smooth / Row plain at 0.1: 0.700 / 0.100, 0.500 / 0.200']


def test_a_comparison_takes_every_name_that_a_row_may_have():
  assert claims.parse('v0.1 > se.2 at 0')[:2] == ('v0.1', 'se.2')
  assert claims.parse('v0.1 > 0.2 at 0')[:2] == ('v0.1', 0.2)
  assert claims.parse('v0.1 < 0.2 at 0')[:2] == (0.2, 'v0.1')


def test_seeds_that_one_row_lacks_are_not_compared():
  known = {
    'plain': measured('plain', [0.9, 0.1]),
    'smooth': measured('smooth', [0.9, 0.7], [0.8, 0.0]),
  }
  found, lines = claims.verdict([claims.parse('smooth > plain at 0.1')], known.get)
  assert found == 'yes' and lines[0].endswith(': 0.700 / 0.100')


@pytest.mark.parametrize(
  'text', ['a > b', 'a >= b at 0', 'a > b at 0.1.2', 'a > b at 0 and more', '0.2 < 0.5 at 0']
)
def test_what_is_no_comparison_is_refused(text):
  with pytest.raises(ArgumentError, match=r'comparison|number'):
    claims.parse(text)


@pytest.mark.parametrize(
  ('content', 'message'),
  [
    (changed('encoders', 'vae', 'init_from', value='se'), 'starts with itself'),
    (changed('encoders', 'se', 'init_from', value='other'), 'other, which is no encoder'),
    (changed('rows', 'plain', 'encoder', value='other'), 'other is no encoder'),
    (changed('rows', 'plain', 'supervised', value='--num_steps=2'), 'and not both'),
    (changed('rows', 'plain', 'seeds', value=[0, 0]), 'seeds, each once'),
    (changed('rows', 'plain', 'seeds', value=[]), 'seeds, each once'),
    (changed('rows', 'plain', 'tolerance', value='much'), 'tolerance'),
    (changed('sections', 0, 'rows', value=['other']), 'other is no row'),
    (changed('sections', 1, 'figure', 'panels', 0, 'at', value=[1]), 'one value for each row'),
    (changed('revision'), 'revision'),
    (changed('rows', 'plain', 'tolerance', value=float('inf')), 'tolerance must be in'),
    (changed('rows', 'plain', 'expected', value={'clean': 0.5}), 'a radius and an accuracy'),
    (changed('rows', 'plain', 'expectd', value={}), 'expectd is no key of a row'),
    (changed('rows', '../up', value=CONTENT['rows']['plain']), 'is not a valid name'),
    (changed('rows', '30', value=CONTENT['rows']['plain']), 'is not a valid name: use a letter'),
    (changed('encoders', 'data', value=CONTENT['encoders']['vae']), 'is not a valid name'),
    (changed('encoders', 'vae', 'flags', value=f'{TINY} --seed=7'), '--seed is set automatically'),
    (changed('rows', 'plain', 'probe', value='--output=x'), '--output is set automatically'),
    (changed('sections', 0, 'figure', 'file', value='../up.png'), 'no name of a PNG'),
    (changed('sections', 0, 'claims', 0, 'holds_if', value=[]), 'needs comparisons'),
    (CONTENT | {'summary': ['other']}, 'summary: other is no row'),
    (changed('rows', 'plain', value=CLASSIFIER | {'surrogate': 'vae'}), 'has no surrogate'),
    (changed('encoders', 'vae', 'flags', value='--title="a'), 'encoder vae: No closing quotation'),
    (changed('sections', 0, 'figure', 'panels', value=[]), 'needs panels'),
    (
      changed(
        'sections',
        1,
        'figure',
        'panels',
        value=[s['figure']['panels'][0] for s in CONTENT['sections']],
      ),
      'or none has',
    ),
  ],
)
def test_a_wrong_manifest_is_refused(tmp_path, content, message):
  with pytest.raises(ArgumentError, match=message):
    manifest.load(write(tmp_path, content) / 'manifest.yaml')


def test_a_name_that_stands_twice_is_refused(tmp_path):
  path = write(tmp_path, CONTENT) / 'manifest.yaml'
  path.write_text(path.read_text() + 'revision: 3\n')
  with pytest.raises(ArgumentError, match='revision is there twice'):
    manifest.load(path)


def test_no_manifest_and_no_yaml_are_errors(tmp_path):
  with pytest.raises(ArgumentError, match=r'manifest\.yaml'):
    manifest.load(tmp_path / 'manifest.yaml')
  (tmp_path / 'manifest.yaml').write_bytes(b'\xff\xfe\xff')
  with pytest.raises(ArgumentError, match=r'manifest\.yaml'):
    manifest.load(tmp_path / 'manifest.yaml')
  (tmp_path / 'manifest.yaml').write_text('{')
  with pytest.raises(ArgumentError, match=r'manifest\.yaml'):
    manifest.load(tmp_path / 'manifest.yaml')


def test_the_list_has_costs_and_commands(folder, capsys):
  results.run('list', config_of(folder), signals.StopSignal())
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == 'plain: A VAE; seeds 0, 1; 8 core-minutes'
  assert lines[-1] == '2 rows, 20 core-minutes'  # the VAEs are trained once


# The results of this repository.


def committed() -> document.Document:
  return page(ROOT / 'results')


def test_the_page_and_the_readme_are_those_of_the_rows():
  page = committed()
  assert page.text() == (ROOT / 'RESULTS.md').read_text()
  readme = (ROOT / 'README.md').read_text()
  assert document.between_marks(readme, 'results', page.summary()) == readme


@pytest.mark.long
def test_every_row_of_the_manifest_has_settings_that_can_be_used(tmp_path):
  found = committed().manifest
  planned = plan.Plan(found, tmp_path)
  results.check_radii(planned)
  for name, row in found.rows.items():
    for seed in row['seeds']:
      assert planned.job(name, seed).workdir.name == f'seed{seed}'


def test_measured_rows_are_what_the_manifest_expects():
  page = committed()
  assert page.measured.keys() == {path.stem for path in (ROOT / 'results' / 'rows').iterdir()}
  for name, row in page.measured.items():
    entry = page.manifest.rows[name]
    assert [seed['seed'] for seed in row['seeds']] == entry['seeds'], name
    assert row['title'] == entry['title'], name  # no mark of older code or settings
    found = list(rows.differences(row, entry['expected'], 5.1e-4))  # expected has three digits
    assert found and all(agrees for *_, agrees in found), name
    for radius, expected in entry['expected'].items():  # a check of one seed agrees too
      away = np.abs(rows.at_radius(row, float(radius)) - expected)
      assert away.max() <= entry['tolerance'], name
    assert all(seed['commit'] and 'dirty' not in str(seed['commit']) for seed in row['seeds']), name


# Rows of several seeds, and commands.


@pytest.mark.parametrize('before_is_first', [True, False])
def test_a_joined_row_shows_the_commands_of_its_first_seed(before_is_first):
  one, other = measured('plain', [0.9, 0.1]), measured('plain', [0.8, 0.2], [0.7, 0.1])
  other['seeds'], one['commands'], other['commands'] = other['seeds'][1:], ['of 0'], ['of 1']
  found = rows.joined(one, other) if before_is_first else rows.joined(other, one)
  assert found['commands'] == ['of 0'] and rows.seeds_of(found) == [0, 1]


def test_a_row_has_a_radius_if_all_seeds_have_it():
  row = measured('plain', [0.9, 0.1], [0.8, 0.2])
  row['seeds'][1]['radii'] = [0.0, 0.2]
  assert rows.has_radii(row, [0.0]) and not rows.has_radii(row, [0.1])


@pytest.mark.parametrize(
  ('place', 'value'),
  [
    (('radii',), [0.0, 0.2]),
    (('task',), 'color'),
    (('data', 'digest'), 'other'),
    (('evaluation', 'attack'), 'standard'),
    (('config', 'pgd_steps'), 1),
    (('pretraining', 'validation'), True),
  ],
)
def test_seeds_that_differ_in_more_than_the_seed_are_no_row(place, value):
  attacked = {
    'config': {'pgd_steps': 40},
    'pretraining': {'objective': 'vae', 'dataset': 'mnist', 'validation': False},
    'task': 'digit',
    'data': {'digest': 'a'},
    'evaluation': {'attack': 'worst_case'},
    'radii': [0.0, 0.1],
    'accuracy': [0.9, 0.1],
    'interval': [[0.0, 1.0]] * 2,
    'num_examples': 9,
    'checks': [],
    'versions': {},
  }
  other = copy.deepcopy(attacked)
  *parents, last = place
  inner = other
  for name in parents:
    inner = inner[name]
  inner[last] = value
  row = rows.measured('r', 'R', 1, [], {0: ({}, attacked), 1: ({}, copy.deepcopy(attacked))})
  assert rows.seeds_of(row) == [0, 1]
  with pytest.raises(ArgumentError, match='seed 1 has'):
    rows.measured('r', 'R', 1, [], {0: ({}, attacked), 1: ({}, other)})


def test_commands_name_the_directory_of_the_data(tmp_path):
  content = changed('encoders', 'vae', 'flags', value='--dataset=mnist --num_steps=1')
  found = manifest.load(write(tmp_path, content) / 'manifest.yaml')
  planned = plan.Plan(found, tmp_path, data_dir=str(tmp_path))
  assert all(f'--data_dir={tmp_path}' in command for command in planned.commands('plain', 0))
  assert '--data_dir' not in planned.commands('smooth', 0)[-1]  # embedded digits


def test_rows_without_a_section_are_built_last(tmp_path):
  content = changed('sections', 0, 'rows', value=['plain'])
  found = manifest.load(write(tmp_path, content) / 'manifest.yaml')
  assert list(building._groups(found, ['smooth', 'plain'])) == [['plain'], ['smooth']]
