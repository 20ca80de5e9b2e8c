"""What is installed works without the repository."""

from __future__ import annotations

import ast
import importlib.metadata
import re
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

import se_vae
from tests.clean_environment import ROOT, make_clone, make_environment, run
from tests.tools import licences


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
  path = tmp_path_factory.mktemp('wheel')
  pip = (sys.executable, '-m', 'pip', 'wheel', '--no-deps', '--quiet', '--wheel-dir', path)
  run(*pip, make_clone(path / 'clone'), cwd=path)  # what a build leaves behind stays there
  (wheel,) = path.glob('*.whl')
  return wheel


@pytest.fixture(scope='module')
def python(wheel, tmp_path_factory):
  """Python where nothing but the wheel and what it needs is installed."""
  python = make_environment(tmp_path_factory.mktemp('environment') / 'venv')
  run(python, '-m', 'pip', 'install', '--quiet', wheel, cwd=wheel.parent)
  return python


@pytest.mark.long
def test_the_wheel_holds_the_library_and_its_licence(wheel):
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


@pytest.mark.long
def test_the_wheel_works_outside_the_repository(python, tmp_path):
  code = (
    'import numpy as np\n'
    'import se_vae\n'
    "images = se_vae.data.load('mnist_5k').train.images\n"
    'model = se_vae.make_vae((28, 28, 1), latent_dim=2, hidden_units=4, num_layers=1)\n'
    "config = se_vae.TrainConfig(objective='vae', num_steps=2)\n"
    'params, rows = se_vae.fit(model, config, images, steps_per_row=1)\n'
    'assert np.isfinite(rows[-1]["loss"])\n'
    "se_vae.load_pretrained('mnist_mlp_vae_latent128')\n"
    'print(se_vae.__file__, len(images), len(rows))'
  )
  library, count, rows = run(python, '-c', code, cwd=tmp_path).split()
  (site,) = python.parents[1].glob('lib/python*/site-packages')
  assert Path(library).parent == site / 'se_vae' and (count, rows) == ('4000', '2')
  assert (site / 'se_vae' / 'py.typed').exists()


@pytest.mark.slow
def test_the_readme_runs_as_it_stands_where_the_wheel_is_installed(python, tmp_path):
  blocks = re.findall(r'```python\n(.*?)```', (ROOT / 'README.md').read_text(), re.DOTALL)
  (tmp_path / 'readme.py').write_text(''.join(blocks))
  assert 'checks: ' in run(python, 'readme.py', cwd=tmp_path)


@pytest.mark.long
def test_the_notebook_installs_the_package_where_it_is_missing(wheel, tmp_path):
  """As in Colab, from a wheel beside the notebook; where the package is, nothing happens."""
  first, *_ = (
    cell
    for cell in nbformat.read(ROOT / 'notebooks' / 'smooth_encoders.ipynb', as_version=4).cells
    if cell.cell_type == 'code'
  )
  (tmp_path / 'ipython').mkdir()
  (tmp_path / 'cell.ipy').write_text(first.source)
  (tmp_path / wheel.name).symlink_to(wheel)
  python = make_environment(tmp_path / 'venv')
  found = (python, '-c', "import importlib.util as u; print(u.find_spec('se_vae') is not None)")
  before = run(*found, cwd=tmp_path)
  ipython = (python, '-m', 'IPython', '--ipython-dir', tmp_path / 'ipython')
  printed = [run(*ipython, 'cell.ipy', cwd=tmp_path) for _ in range(2)]
  assert (before, run(*found, cwd=tmp_path)) == ('False\n', 'True\n')
  assert 'restart the kernel' in printed[0] and not printed[1]


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
  """Without what the environment happens to have. What only tools and extras need is optional."""
  required = {re.match(r'[\w-]+', line).group() for line in licences.requirements('')}
  folders = [ROOT / 'se_vae', ROOT / 'experiments']
  if group:
    required |= {re.match(r'[\w-]+', line).group() for line in licences.requirements(group)}
    folders = [ROOT / 'tests']
  found = set().union(*(imported(path) for folder in folders for path in folder.rglob('*.py')))
  provided = importlib.metadata.packages_distributions()
  optional = {'torch', 'torchattacks', 'foolbox', 'cosmic_ray', 'auto_LiRPA', 'ray'}
  missing = {
    name
    for name in found - sys.stdlib_module_names - optional
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
