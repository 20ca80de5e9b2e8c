"""The comparison of attacked encoders: its table is the files', and its front cannot be beaten."""

import csv
import itertools
import json

import numpy as np
import pytest

from experiments import compare
from experiments.cli.flags import UsageError
from experiments.visual import pareto, plots
from tests.experiments.test_report import RADII, write_probe, write_run


def write(directory, **probe):
  write_run(directory)
  return write_probe(directory, **probe)


def config(*runs, output, **changes):
  return compare.CompareConfig(runs=tuple(map(str, runs)), output=str(output), **changes)


def test_the_table_has_means_over_seeds_and_half_their_range(tmp_path, capsys):
  alone = write(tmp_path / 'seed0' / 'vae')
  first = write(tmp_path / 'seed0' / 'se', accuracy=[0.9, 0.8, 0.5, 0.2])
  second = write(tmp_path / 'seed1' / 'se', accuracy=[0.8, 0.6, 0.4, 0.2])
  found = compare.run(config(tmp_path / 'seed0', tmp_path / 'seed1', output=tmp_path / 'out'))
  assert [each.name for each in found] == ['se', 'vae']
  with (tmp_path / 'out' / 'compare.csv').open() as file:
    se, vae = csv.DictReader(file)
  means = np.mean([first['accuracy'], second['accuracy']], axis=0)
  assert se['seeds'] == '2' and vae['seeds'] == '1'
  assert [se[f'at {radius:g}'] for radius in RADII] == [
    f'{mean:.3f} ± {half:.3f}' for mean, half in zip(means, [0.05, 0.1, 0.05, 0.0], strict=True)
  ]
  assert [vae[f'at {radius:g}'] for radius in RADII] == [f'{v:.3f}' for v in alone['accuracy']]
  tests = [
    json.loads((tmp_path / seed / 'se' / 'result.json').read_text())['test']
    for seed in ('seed0', 'seed1')
  ]
  assert se['elbo'] == f'{np.mean([test["elbo"] for test in tests]):.1f}'
  assert se['active_latents'] == '7.0' and se['squared_error'] == '-'
  assert '2 passed' in se['checks'] and '2 failed' in se['checks']
  assert se['checks'] in capsys.readouterr().out
  assert (tmp_path / 'out' / 'compare.png').read_bytes().startswith(b'\x89PNG')


def test_clean_accuracy_is_that_at_radius_0(tmp_path):
  curve = {'accuracy': [0.7, 0.9], 'interval': [[0.6, 0.8], [0.8, 1.0]]}
  write(tmp_path / 'runs' / 'se', radii=[0.1, 0.0], **curve)
  points = []
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(pareto, 'save', lambda file, found, *_: points.extend(found))
    compare.run(config(tmp_path / 'runs', output=tmp_path / 'out'))
  assert [(point.clean, point.robust) for point in points] == [(0.9, 0.7)]
  write(tmp_path / 'attacked' / 'se', radii=[0.1, 0.2], **curve)
  with pytest.raises(UsageError, match=r'--probe: .* must have 0'):
    compare.run(config(tmp_path / 'attacked', output=tmp_path / 'out'))


def test_an_objective_that_does_not_train_the_decoder_has_no_elbo(tmp_path):
  write(tmp_path / 'runs' / 'vae')
  write(tmp_path / 'runs' / 'contrastive')
  path = tmp_path / 'runs' / 'contrastive' / 'result.json'
  result = json.loads(path.read_text())
  result['config']['objective'] = 'contrastive'
  path.write_text(json.dumps(result))
  found = compare.run(config(tmp_path / 'runs', output=tmp_path / 'out'))
  assert np.isnan(found[0].mean('elbo')) and np.isfinite(found[1].mean('elbo'))
  with (tmp_path / 'out' / 'compare.csv').open() as file:
    first, _ = csv.DictReader(file)
  assert (first['encoder'], first['elbo'], first['active_latents']) == ('contrastive', '-', '7.0')
  with (tmp_path / 'alone.png').open('wb') as file:  # where no encoder has an ELBO
    pareto.save(file, [pareto.Point('a', 0.9, np.nan, 0.5, 0.5, 0.5)], 'accuracy', '')


def test_no_point_of_the_front_is_beaten():
  rng = np.random.default_rng(0)
  for _ in range(50):
    points = rng.integers(0, 6, (12, 2)) / 5.0
    beaten = [
      any((other >= point).all() and (other != point).any() for other in points) for point in points
    ]
    best = pareto.front(*points.T)
    assert {tuple(points[i]) for i in best} == {
      tuple(point) for point, lost in zip(points, beaten, strict=True) if not lost
    }
    assert len(best) == len({tuple(points[i]) for i in best})


def test_names_of_close_points_do_not_cover_each_other():
  figure = plots.new_figure(6.0, 4.0)
  axis = figure.subplots()
  shown = [(f'encoder {i}', 0.9 + 0.001 * i, 0.7) for i in range(6)]
  axis.plot([value for _, value, _ in shown], [0.7] * 6, 'o')
  figure.draw_without_rendering()
  pareto.label(axis, shown)
  boxes = [text.get_window_extent() for text in axis.texts]
  assert [text.get_text() for text in axis.texts] == [name for name, *_ in shown]
  assert not any(a.overlaps(b) for a, b in itertools.combinations(boxes, 2))
  assert all(axis.bbox.contains(*corner) for box in boxes for corner in (box.min, box.max))


def change(path, **values) -> None:
  path.write_text(json.dumps(json.loads(path.read_text()) | values))


def test_only_seeds_of_one_encoder_are_averaged(tmp_path):
  for seed in (0, 1):
    write(tmp_path / f'seed{seed}' / 'se')
    change(tmp_path / f'seed{seed}' / 'se' / 'probe_digit.json', checkpoint=f'checkpoint_{seed}')
    change(tmp_path / f'seed{seed}' / 'se' / 'result.json', checkpoint=f'checkpoint_{seed}')
  options = config(tmp_path / 'seed0', tmp_path / 'seed1', output=tmp_path / 'out')
  result = tmp_path / 'seed1' / 'se' / 'result.json'
  own = json.loads(result.read_text())['config']
  change(result, config=own | {'seed': 1, 'workdir': 'elsewhere', 'init_from': 'other'})
  (found,) = compare.run(options)
  assert len(found.probes) == 2
  change(result, config=own | {'gamma': 7.0, 'covariance': 'full'})
  with pytest.raises(UsageError, match=r'no seeds of one encoder: .*covariance.* differ'):
    compare.run(options)
  change(result, config=own, checkpoint='checkpoint_2')  # trained on since
  with pytest.raises(
    UsageError, match='was made from checkpoint_1, but the run now has checkpoint_2'
  ):
    compare.run(options)
  twice = config(tmp_path / 'seed0', tmp_path / 'seed0', output=tmp_path / 'out')
  with pytest.raises(UsageError, match='are one run, or copies of one'):
    compare.run(twice)


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'runs': None}, '--runs: is required'),
    ({'runs': ('nowhere',)}, '--runs: nowhere is not a directory'),
    ({'probe': 'color'}, '--runs: no run in .* has a probe_color.json'),
    ({'radius': 0.15}, '--radius: must be one of 0.0, 0.05, 0.1, 0.3, got 0.15'),
    ({'output': None}, '--output: is required'),
  ],
)
def test_what_cannot_be_compared_is_told_in_a_line(tmp_path, changes, message):
  write(tmp_path / 'runs' / 'se')
  options = {'runs': (str(tmp_path / 'runs'),), 'output': str(tmp_path / 'out')} | changes
  with pytest.raises(UsageError, match=message):
    compare.run(compare.CompareConfig(**options))
  assert not (tmp_path / 'out').exists()


def test_damaged_files_and_other_radii_are_named(tmp_path):
  write(tmp_path / 'runs' / 'se')
  other = {'radii': [0.0, 0.2], 'accuracy': [0.9, 0.1], 'interval': [[0.8, 1.0], [0.0, 0.2]]}
  write(tmp_path / 'runs' / 'vae', **other)
  with pytest.raises(
    UsageError, match=r'vae/probe_digit.json .* radii \[0.0, 0.2\] and \[0.0, 0.05'
  ):
    compare.run(config(tmp_path / 'runs', output=tmp_path / 'out', radius=0.0))
  (tmp_path / 'runs' / 'vae' / 'probe_digit.json').write_text('{}')
  with pytest.raises(UsageError, match=r'vae/probe_digit.json: damaged'):
    compare.run(config(tmp_path / 'runs', output=tmp_path / 'out'))


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'num_examples': 7}, 'different attacks: num_examples 7 and'),
    ({'data': {'source': 'here', 'digest': 'other'}}, 'different attacks: data other and same'),
    ({'config': {'pgd_steps': 1}}, 'different attacks: pgd_steps 1 and'),
    ({'config': {'attack': 'worst_case'}}, 'different attacks: attack worst_case and standard'),
    ({'config': {'seed': 5, 'workdir': 'elsewhere'}}, None),
    ({'config': {'check_examples': 7, 'joint': True, 'num_queries': 3, 'certify': True}}, None),
  ],
)
def test_different_attacks_are_not_compared(tmp_path, changes, message):
  for name in ('se', 'vae'):
    write(tmp_path / 'runs' / name, data={'source': 'here', 'digest': 'same'})
  path = tmp_path / 'runs' / 'vae' / 'probe_digit.json'
  own = json.loads(path.read_text())
  change(path, **changes | {'config': own['config'] | changes.get('config', {})})
  options = config(tmp_path / 'runs', output=tmp_path / 'out')
  if message is None:
    assert len(compare.run(options)) == 2
  else:
    with pytest.raises(UsageError, match=message):
      compare.run(options)
