"""The leaderboard: which results it refuses; its page and figure are those of the entries."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path

import pytest

from experiments import leaderboard as binary
from experiments import pretrain, supervised
from experiments.cli.flags import UsageError, to_dict
from experiments.reproduction import document, leaderboard, manifest, rows
from tests.experiments.test_report import write_probe, write_run
from tests.experiments.test_results import CONTENT, ROOT, changed, measured, write

RADII = [0.0, 0.1, 0.2]
ACCURACY = [0.9, 0.7, 0.4]
CHECKS = [
  {'number': number, 'name': f'check {number}', 'verdict': 'pass', 'figure': 'all', 'values': {}}
  for number in range(1, 13)
]


def attacked(
  directory: Path, seed: int = 0, accuracy: Sequence[float] = ACCURACY, **changes
) -> dict:
  """An admissible result of a probe, with some values changed, in the directory of its run."""
  write_run(directory, seed=seed)
  result = write_probe(directory)
  result |= {
    'radii': RADII,
    'accuracy': accuracy,
    'interval': [[value - 0.01, value + 0.01] for value in accuracy],
    'checks': CHECKS,
    'data': {'source': 'files', 'digest': leaderboard.DATA},
    'evaluation': {'attack': 'worst_case'},
    'versions': {'jax': '0.10.2'},
    'pretraining': to_dict(pretrain.PretrainConfig()) | {'seed': seed, 'init_from': '/mine/vae'},
    'config': {**result['config'], 'restarts': 1},
  }
  for path, value in changes.items():
    *parents, last = path.split('__')
    place = result
    for key in parents:
      place = place[key]
    place[last] = value
  (directory / 'probe_digit_worst_case.json').write_text(json.dumps(result))
  return result


def config_of(folder: Path, *directories: Path, **changes) -> binary.LeaderboardConfig:
  page = folder.parent / 'page.md'
  if not page.exists():
    page.write_text('# Title\n\n<!-- leaderboard -->\nold\n<!-- end of leaderboard -->\n\nRules.\n')
  values = {
    'workdir': tuple(map(str, directories)) or None,
    'results': str(folder),
    'page': str(page),
    'figure': str(folder.parent / 'figure.png'),
    **({'name': 'mine', 'title': 'Mine'} if directories else {}),
  }
  return binary.LeaderboardConfig(**values | changes)


def test_an_entry_stands_on_the_page_and_in_the_figure(tmp_path):
  folder = write(tmp_path, changed('rows', 'smooth', 'leaderboard', value=True))
  weak = measured('smooth', [0.8, 0.5, 0.1], checks=CHECKS)
  weak |= {'data': leaderboard.DATA, 'settings': dict.fromkeys(rows.STRENGTH, 1000)}
  weak['settings']['relative_step_size'] = None
  weak['seeds'][0] |= {'radii': RADII, 'interval': [[0, 1]] * 3, 'num_examples': 1000}
  rows.write(folder, weak)
  attacked(tmp_path / 'a', 0)
  attacked(tmp_path / 'b', 1, accuracy=[0.8, 0.6, 0.4])
  config = config_of(folder, tmp_path / 'a', tmp_path / 'b', link='https://example.org/mine')
  entries = binary.run('add', config)
  assert [entry['name'] for entry in entries] == ['mine', 'smooth']
  text = (tmp_path / 'page.md').read_text()
  assert text.startswith('# Title\n') and text.endswith('Rules.\n') and 'old' not in text
  mine = next(line for line in text.splitlines() if 'Mine' in line)
  assert mine.startswith(
    '| 1 | [Mine](https://example.org/mine) | no | .850 ± .050 | .650 ± .050 | .400 ± .000 |'
  )
  assert mine.endswith('| 2 | 1,000 | 24 passed |')
  assert (tmp_path / 'figure.png').read_bytes().startswith(b'\x89PNG')
  stored = json.loads((folder / 'leaderboard' / 'mine.json').read_text())
  assert [seed['seed'] for seed in stored['seeds']] == [0, 1]
  assert '--gamma=1.0' in stored['commands'][0] and 'workdir' not in stored['commands'][0]
  assert '--init_from=vae ' in stored['commands'][0]
  before = text
  binary.run('render', config_of(folder))
  assert (tmp_path / 'page.md').read_text() == before


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'data__digest': 'abc'}, 'the data must be MNIST'),
    ({'pretraining__validation': True}, 'held out'),
    ({'task': 'color'}, 'task must be digit'),
    ({'evaluation__attack': 'standard'}, 'must be worst_case'),
    ({'num_examples': 999}, 'at least 1000'),
    ({'radii': [0.0, 0.1, 0.3]}, 'must have 0.2'),
    ({'config__pgd_steps': 39}, '--pgd_steps must be at least 40'),
    ({'config__check_examples': 1}, '--check_examples must be at least 200'),
    ({'config__relative_step_size': 1e-9}, '--relative_step_size must not be given'),
    ({'accuracy': [0.9, 0.7, 1.4]}, 'must be in'),
    ({'interval': [[0.89, 0.91], [0.39, 0.41], [0.39, 0.41]]}, 'within their intervals'),
    ({'pretraining': {'seed': 0}}, 'pretraining has no dataset, validation, objective'),
    ({'pretraining__seed': [0]}, 'pretraining.seed must be an integer'),
    (
      {'checks': [{'number': 1, 'name': 'a', 'figure': 'b', 'passed': True}]},
      'check 1 must pass; it is missing',
    ),
    ({'accuracy': [0.9, 0.3, 0.4]}, 'must not rise'),
    (
      {
        'certified': {
          'method': 'crown',
          'radii': RADII,
          'accuracy': [0.9, 0.8, 0.1],
          'interval': [[0.0, 1.0]] * 3,
        }
      },
      'certified accuracy at 0.1 is above',
    ),
    ({'config__num_queries': 999}, '--num_queries must be at least 1000'),
    ({'checks': []}, 'check 1 must pass; it is missing'),
    *(
      (
        {'checks': [c | {'verdict': 'fail'} if c['number'] == n else c for c in CHECKS]},
        f'check {n} must',
      )
      for n in (1, 2, 3, 10, 11)
    ),
  ],
)
def test_the_rules_are_checked_before_anything_is_written(tmp_path, changes, message):
  folder = write(tmp_path, CONTENT)
  attacked(tmp_path / 'a', **changes)
  config = config_of(folder, tmp_path / 'a')
  before = Path(config.page).read_text()
  with pytest.raises(UsageError, match=message):
    binary.run('add', config)
  assert not (folder / 'leaderboard').exists() and Path(config.page).read_text() == before


def test_a_check_of_an_attack_may_fail_and_is_shown(tmp_path):
  folder = write(tmp_path, CONTENT)
  attacked(tmp_path / 'a', checks=[*CHECKS[:6], {**CHECKS[6], 'verdict': 'fail'}, *CHECKS[7:]])
  binary.run('add', config_of(folder, tmp_path / 'a'))
  assert '11 passed, failed: 7' in (tmp_path / 'page.md').read_text()


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'name': None}, '--workdir, --name, --title'),
    ({'name': '../up'}, '--name'),
    ({'title': 'a | b'}, '--title'),
    ({'title': 'a\rb'}, '--title'),
    ({'workdir': ('nowhere',)}, 'has no probe_digit_worst_case.json'),
    ({'page': 'nowhere.md'}, '--page'),
    ({'figure': 'nowhere/figure.png'}, '--figure: .*nowhere is not a directory'),
    ({'link': 'javascript:alert(1)'}, 'https://'),
    ({'name': 'plain'}, 'there is an entry plain'),
  ],
)
def test_wrong_flags_are_named(tmp_path, flags, message):
  folder = write(tmp_path, CONTENT)
  attacked(tmp_path / 'a')
  with pytest.raises(UsageError, match=message):
    binary.run('add', config_of(folder, tmp_path / 'a', **flags))
  assert not (folder / 'leaderboard').exists()  # or the name would be taken


def test_a_seed_that_is_there_twice_is_refused(tmp_path):
  folder = write(tmp_path, CONTENT)
  attacked(tmp_path / 'a')
  shutil.copytree(tmp_path / 'a', tmp_path / 'b')
  with pytest.raises(UsageError, match='seed 0 is there twice'):
    binary.run('add', config_of(folder, tmp_path / 'a', tmp_path / 'b'))


def test_damaged_results_are_told_in_a_line(tmp_path):
  folder = write(tmp_path, CONTENT)
  attacked(tmp_path / 'a')
  (tmp_path / 'a' / 'probe_digit_worst_case.json').write_text('{')
  with pytest.raises(UsageError, match=r'--workdir: .*no JSON'):
    binary.run('add', config_of(folder, tmp_path / 'a'))


def test_a_page_without_marks_is_refused_before_anything_is_written(tmp_path):
  folder = write(tmp_path, CONTENT)
  attacked(tmp_path / 'a')
  config = config_of(folder, tmp_path / 'a')
  Path(config.page).write_text('# Title\n')
  with pytest.raises(UsageError, match='end of leaderboard'):
    binary.run('add', config)
  assert not (folder / 'leaderboard').exists()


def test_an_entry_is_not_overwritten(tmp_path):
  folder = write(tmp_path, CONTENT)
  attacked(tmp_path / 'a')
  binary.run('add', config_of(folder, tmp_path / 'a'))
  with pytest.raises(UsageError, match='there is an entry mine'):
    binary.run('add', config_of(folder, tmp_path / 'a'))


def test_rows_of_the_manifest_obey_the_rules_too(tmp_path):
  folder = write(tmp_path, changed('rows', 'smooth', 'leaderboard', value=True))
  rows.write(folder, measured('smooth', [0.9, 0.7]))
  with pytest.raises(UsageError, match=r'smooth is no entry.*must be MNIST'):
    binary.run('render', config_of(folder))


def classifier(directory: Path, seed: int = 0, probe: str = '--attack=worst_case') -> None:
  """An admissible result of supervised."""
  result = attacked(directory, seed)
  for path in directory.iterdir():
    path.unlink()
  config = to_dict(supervised.SupervisedConfig(seed=seed, probe=probe))
  del result['pretraining']
  (directory / 'result.json').write_text(json.dumps({**result, 'config': config}))


def test_a_classifier_is_marked_and_its_attack_is_that_of_its_probe_flag(tmp_path):
  folder = write(tmp_path, CONTENT)
  classifier(tmp_path / 'a')
  binary.run('add', config_of(folder, tmp_path / 'a'))
  assert '| a | Mine | yes |' in (tmp_path / 'page.md').read_text()  # no place
  classifier(tmp_path / 'b', probe='--attack=worst_case --pgd_steps=1')
  with pytest.raises(UsageError, match='--pgd_steps must be at least 40'):
    binary.run('add', config_of(folder, tmp_path / 'b', name='weak'))


def test_a_classifier_does_not_pass_as_a_seed_of_an_encoder(tmp_path):
  folder = write(tmp_path, CONTENT)
  attacked(tmp_path / 'a', 0)
  classifier(tmp_path / 'b', 1)
  with pytest.raises(UsageError, match='seed 1 has objective supervised'):
    binary.run('add', config_of(folder, tmp_path / 'a', tmp_path / 'b'))


def test_the_committed_page_is_that_of_the_entries():
  found = manifest.load(ROOT / 'results' / 'manifest.yaml')
  listed = leaderboard.entries(found, ROOT / 'results')
  text = (ROOT / 'docs' / 'leaderboard.md').read_text()
  assert leaderboard.page(text, listed) == text
  for row in listed:
    assert row['data'] == leaderboard.DATA and row['attack'] == 'worst_case', row['name']
    assert min(seed['num_examples'] for seed in row['seeds']) >= leaderboard.LEAST_IMAGES
    assert document.checks_of(row) != 'not run'


def test_the_figure_has_the_points_of_the_table(tmp_path, monkeypatch):
  row = measured('smooth', [0.9, 0.7, 0.4], [0.8, 0.5, 0.2])
  for seed in row['seeds']:
    seed |= {'radii': RADII, 'certified': {'radii': RADII, 'accuracy': [0.6, 0.3, 0.1]}}
  drawn = []
  monkeypatch.setattr(
    leaderboard.leaderboard_plot, 'save', lambda file, panels: drawn.extend(panels)
  )
  leaderboard.draw(tmp_path / 'figure.png', [row])
  found = [
    (title, point.mark, round(point.clean, 6), round(point.robust, 6), round(point.certified, 6))
    for title, (point,) in drawn
  ]
  assert found == [('radius 0.1', '1', 0.85, 0.6, 0.3), ('radius 0.2', '1', 0.85, 0.3, 0.1)]
