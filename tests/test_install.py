"""What is installed works without the repository."""

from __future__ import annotations

import ast
import importlib.metadata
import os
import re
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

import se_vae
from tests.tools import licences

ROOT = Path(__file__).parents[1]


def run(*line: str | Path, cwd: Path) -> str:
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def test_the_wheel_works_outside_the_repository(tmp_path):
  source = tmp_path / 'source'
  source.mkdir()
  for name in ('README.md', 'LICENSE', 'setup.cfg', 'pyproject.toml', 'se_vae'):
    (source / name).symlink_to(ROOT / name)  # what a build leaves behind stays here
  pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
  wheel_options = ('--no-deps', '--no-build-isolation', '--quiet', '--wheel-dir', tmp_path)
  run(*pip, 'wheel', *wheel_options, source, cwd=tmp_path)
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    names = {*archive.namelist()}
    assert 'se_vae/py.typed' in names
    # The binaries run from a clone: their package's name is too common to be taken elsewhere.
    assert {name.split('/')[0] for name in names if '.dist-info/' not in name} == {'se_vae'}
    (licence,) = (name for name in names if name.endswith('/LICENSE'))
    assert archive.read(licence) == (ROOT / 'LICENSE').read_bytes()
    (metadata,) = (name for name in names if name.endswith('/METADATA'))
    stated = archive.read(metadata).decode()
  assert f'\nVersion: {se_vae.__version__}\n' in stated and '\nLicense: Apache-2.0\n' in stated

  # An environment with the dependencies of this one, but without the repository's own entry.
  run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv', cwd=tmp_path)
  site = next((tmp_path / 'venv' / 'lib').glob('python*')) / 'site-packages'
  (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
  run(*pip, 'install', '--no-deps', '--no-index', '--quiet', '--target', site, wheel, cwd=tmp_path)
  python = tmp_path / 'venv' / 'bin' / 'python'
  code = (
    'import numpy as np\n'
    'import se_vae\n'
    "images = se_vae.data.load('mnist_5k').train.images\n"
    'model = se_vae.make_vae((28, 28, 1), latent_dim=2, hidden_units=4, num_layers=1)\n'
    "config = se_vae.TrainConfig(objective='se', pgd_steps=1, num_steps=2)\n"
    'params, rows = se_vae.fit(model, config, images, steps_per_row=1)\n'
    'assert np.isfinite(rows[-1]["loss"])\n'
    'print(se_vae.__file__, len(images), len(rows))'
  )
  library, count, rows = run(python, '-c', code, cwd=tmp_path).split()
  assert Path(library).parent == site / 'se_vae' and (count, rows) == ('4000', '2')
  assert (site / 'se_vae' / 'py.typed').exists()


def imported(path: Path) -> set[str]:
  """The top-level packages that a module imports, wherever in it."""
  names = set()
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      names |= {alias.name for alias in node.names}
    elif isinstance(node, ast.ImportFrom):
      names.add(str(node.module))
  return {name.split('.')[0] for name in names} - {'se_vae', 'experiments', 'tests'}


@pytest.mark.parametrize('group', ['', 'test'])
def test_what_is_imported_is_required(group):
  """Without what the environment happens to have. Foolbox and AutoAttack are optional, by name."""
  required = {re.match(r'[\w-]+', line).group() for line in licences.requirements('')}
  folders = [ROOT / 'se_vae', ROOT / 'experiments']
  if group:
    required |= {re.match(r'[\w-]+', line).group() for line in licences.requirements(group)}
    folders = [ROOT / 'tests']
  found = set().union(*(imported(path) for folder in folders for path in folder.rglob('*.py')))
  provided = importlib.metadata.packages_distributions()
  missing = {
    name
    for name in found - sys.stdlib_module_names - {'torch', 'torchattacks', 'foolbox', 'cosmic_ray'}
    if not {canonical(package) for package in provided.get(name, ())} & {*map(canonical, required)}
  }
  assert not missing


def canonical(package: str) -> str:
  return re.sub(r'[-_.]+', '-', package).lower()


def test_build_lists_the_direct_dependencies_and_their_licences():
  """Names and ranges; a licence's wording may change from one release to the next."""
  build = (ROOT / 'BUILD.md').read_text()
  for line in licences.table()[2:]:
    assert line.rsplit('|', 2)[0] + '| ' in build, line


def test_the_lock_has_a_hash_for_every_package_and_names_no_index():
  lines = (ROOT / 'requirements.txt').read_text().splitlines()
  packages = [line for line in lines if re.match(r'[a-z0-9]', line)]
  assert len(packages) > 100
  assert all('==' in line and line.endswith('\\') for line in packages)  # a hash comes next
  assert not [line for line in lines if '://' in line or line.startswith('--')]


@pytest.mark.parametrize('python', ['false', 'nonsense'])
def test_make_names_the_supported_versions_where_a_python_is_none_of_them(python):
  line = ('make', '--silent', 'lint', f'PYTHON={python}', 'VENV=.venv-none')
  done = subprocess.run(line, cwd=ROOT, capture_output=True, text=True)
  assert done.returncode == 2 and not done.stdout
  message = done.stderr.splitlines()[0]
  assert message.startswith(f'error: {python} is not a Python that runs')
  assert all(version in message for version in ('3.11', '3.12', '3.13', '3.14'))
