"""What is installed works without the repository."""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

from tests import licences

ROOT = Path(__file__).parents[1]


def run(*line: str | Path, cwd: Path) -> str:
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


@pytest.mark.slow
def test_the_wheel_works_outside_the_repository(tmp_path):
  source = tmp_path / 'source'
  source.mkdir()
  for name in ('README.md', 'setup.cfg', 'pyproject.toml', 'se_vae', 'experiments'):
    (source / name).symlink_to(ROOT / name)  # what a build leaves behind stays here
  pip = (sys.executable, '-m', 'pip', '--disable-pip-version-check')
  wheel_options = ('--no-deps', '--no-build-isolation', '--quiet', '--wheel-dir', tmp_path)
  run(*pip, 'wheel', *wheel_options, source, cwd=tmp_path)
  (wheel,) = tmp_path.glob('*.whl')
  with zipfile.ZipFile(wheel) as archive:
    assert 'se_vae/py.typed' in archive.namelist()

  # An environment with the dependencies of this one, but without the repository's own entry.
  run(sys.executable, '-m', 'venv', '--without-pip', tmp_path / 'venv', cwd=tmp_path)
  site = next((tmp_path / 'venv' / 'lib').glob('python*')) / 'site-packages'
  (site / 'dependencies.pth').write_text(sysconfig.get_path('purelib') + '\n')
  run(*pip, 'install', '--no-deps', '--no-index', '--quiet', '--target', site, wheel, cwd=tmp_path)
  python = tmp_path / 'venv' / 'bin' / 'python'
  code = (
    'import se_vae, experiments\n'
    'from se_vae import data\n'
    "print(se_vae.__file__, experiments.__file__, len(data.load('mnist_5k').train.images))"
  )
  library, binaries, count = run(python, '-c', code, cwd=tmp_path).split()
  assert Path(library).parent == site / 'se_vae' and Path(binaries).parent == site / 'experiments'
  assert (site / 'se_vae' / 'py.typed').exists() and count == '4000'
  line = [python, '-m', 'experiments.pretrain', '--help']
  done = subprocess.run(line, cwd=tmp_path, capture_output=True, text=True)
  assert '--init_from' in done.stdout + done.stderr


def test_build_lists_the_direct_dependencies_and_their_licences():
  """Names and ranges; a licence's wording may change from one release to the next."""
  build = (ROOT / 'BUILD.md').read_text()
  for line in licences.table()[2:]:
    assert line.rsplit('|', 2)[0] + '| ' in build, line
