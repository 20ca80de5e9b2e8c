"""The pages for users: links lead somewhere, code runs, flags exist, no public name is missing."""

import ast
import dataclasses
import functools
import importlib
import itertools
import re
from pathlib import Path

import pytest

import se_vae
from experiments import (
  compare,
  figure1,
  flag_reference,
  leaderboard,
  pretrain,
  probe_settings,
  report,
  results,
  supervised,
  sweep,
)
from experiments.benchmarks import attack_comparison, scaling, speed, time_to_robustness
from experiments.cli import app, distributed, flags
from se_vae import attacks, certification, data, evaluation, training
from se_vae.parallel import sharding

DTYPE_PROMOTION = 'standard'  # optax relies on it
ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')]
TAUGHT = [page for page in PAGES if '```python\n' in page.read_text()]
# Each binary and the settings that are its flags, beside those that all binaries have.
BINARIES = {
  'benchmarks.attack_comparison': [attack_comparison.ComparisonConfig],
  'benchmarks.scaling': [scaling.ScalingConfig],
  'benchmarks.speed': [speed.BenchmarkConfig],
  'benchmarks.time_to_robustness': [time_to_robustness.RobustnessConfig],
  'compare': [compare.CompareConfig],
  'figure1': [figure1.Figure1Config],
  'leaderboard': [leaderboard.LeaderboardConfig],
  'pretrain': [pretrain.PretrainConfig, distributed.Cluster],
  'probe': [probe_settings.ProbeConfig],
  'report': [report.ReportConfig],
  'results': [results.ResultsConfig],
  'supervised': [supervised.SupervisedConfig],
  'sweep': [sweep.SweepConfig, pretrain.PretrainConfig],
}
on_every_page = pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)


def anchors(page):
  """The anchors that GitHub gives the headings of a page."""
  text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
  headings = re.findall(r'^#+ (.*)$', text, flags=re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@on_every_page
def test_links_lead_to_files_and_headings(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
    if not target.startswith('https://'):
      name, _, anchor = target.partition('#')
      path = page.parent / name if name else page
      assert path.exists(), target
      assert not anchor or anchor in anchors(path), target


@on_every_page
def test_files_that_are_named_exist(page):
  folders = 'se_vae|experiments|tests|docs|notebooks|results'
  for name in re.findall(rf'`((?:{folders})/[\w/.-]*)`', page.read_text()):
    assert (ROOT / name).exists(), name


@on_every_page
def test_commands_have_flags_of_their_binary(page):
  for block in re.findall(r'```bash\n(.*?)```', page.read_text(), flags=re.DOTALL):
    for line in block.replace('\\\n', '').splitlines():
      command = re.sub(r"'[^']*'|#.*", '', line).partition('python -m experiments.')[2]
      if command:
        name, *arguments = command.split()
        importlib.import_module(f'experiments.{name}')
        known = flags_of(*BINARIES.get(name, []))
        assert set(re.findall(r'--(\w+)', ' '.join(arguments))) <= known, line


@on_every_page
def test_flags_in_the_text_exist(page):
  if page.stem.lower() != 'changelog':  # it names flags that are gone
    known = flags_of(*itertools.chain(*BINARIES.values()))
    for name in re.findall(r'`--([a-z]\w*)[=`]', page.read_text()):
      assert name in known or name.startswith('xla_'), name


def flags_of(*config_types):
  names = {*itertools.chain(*map(flags.names, (*config_types, app.RuntimeConfig))), 'help'}
  return names | {f'no{name}' for name in names}


def python_of(page):
  """The Python of a page, in order, with what comments `<!-- python ... -->` prepare for it."""
  return ''.join(re.findall(r'(?:```|<!-- )python\n(.*?)(?:```|-->)', page.read_text(), re.DOTALL))


@pytest.mark.long
@pytest.mark.parametrize('page', TAUGHT, ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
  """With few images, few steps and no sanity checks: what a page shows takes minutes as it is.

  On one device, and as many test images as the pages take at the least, so that their attacks and
  certificates share programs.
  """

  def load_few(name, *, load=data.load):
    def few(split, count):
      labels = {task: values[:count] for task, values in split.labels.items()}
      return dataclasses.replace(split, images=split.images[:count], labels=labels)

    dataset = load(name)
    return dataclasses.replace(dataset, train=few(dataset.train, 64), test=few(dataset.test, 20))

  monkeypatch.chdir(tmp_path)
  monkeypatch.setattr(data, 'load', load_few)
  one_device = sharding.data_mesh(1)
  monkeypatch.setattr(sharding, 'data_mesh', lambda *_, **__: one_device)
  few_samples = {'num_selection': 10, 'num_estimation': 100}
  for name, options in (('evaluate', {'check_examples': 0}), ('smoothed_accuracy', few_samples)):
    monkeypatch.setattr(se_vae, name, functools.partial(getattr(se_vae, name), **options))
  run(re.sub(r'((?:num|slope|pgd)_steps)=\d+', r'\1=2', python_of(page)), page)


def run(code, page):
  exec(compile(ast.parse(code), page, 'exec'), {'__name__': page.stem})


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_the_flag_reference_is_that_of_the_settings():
  assert flag_reference.references() in (ROOT / 'docs' / 'flags.md').read_text()


def test_the_api_reference_has_every_public_name():
  pages = {page.stem: page.read_text() for page in (ROOT / 'docs' / 'api').glob('*.rst')}
  listed = re.findall(r'^   ~[\w.]+\.(\w+)$', pages['index'], flags=re.MULTILINE)
  assert sorted([*listed, 'data']) == sorted(se_vae.__all__)
  documented = re.findall(r'automodule:: (\S+)', ''.join(pages.values()))
  for package in (se_vae, attacks, certification, data, evaluation, training):
    for name in package.__all__:
      module = getattr(getattr(package, name), '__module__', None)  # constants have none
      assert not str(module).startswith('se_vae') or module in documented, name
