"""An environment with the dependencies of this one, but without the package."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

ROOT = Path(__file__).parents[1]

# pip installs what is here already, and asks no index. "0" is how the variable spells the option.
_OFFLINE = {'PIP_NO_INDEX': '1', 'PIP_NO_BUILD_ISOLATION': '0'}


def run(*line: str | Path, cwd: Path, commands: Path | None = None) -> str:
  """Returns what a command prints, which finds the package only where it is installed.

  Args:
    *line: the command and its arguments.
    cwd: where it runs.
    commands: a directory of commands that come before those on the path.
  """
  environment = {name: value for name, value in os.environ.items() if name != 'PYTHONPATH'}
  environment |= _OFFLINE
  if commands is not None:
    environment['PATH'] = f'{commands}{os.pathsep}{environment["PATH"]}'
  done = subprocess.run(line, cwd=cwd, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stdout + done.stderr
  return done.stdout


def make_environment(path: Path) -> Path:
  """Makes a virtual environment, with pip, and returns the path of its Python."""
  run(sys.executable, '-m', 'venv', '--without-pip', path, cwd=path.parent)
  (site,) = path.glob('lib/python*/site-packages')
  for entry in Path(sysconfig.get_path('purelib')).iterdir():
    if 'se_vae' not in entry.name:
      (site / entry.name).symlink_to(entry)
  python = path / 'bin' / 'python'
  pip = path / 'bin' / 'pip'
  pip.write_text(f'#!/bin/sh\nexec {python} -m pip "$@"\n')
  pip.chmod(0o755)
  return python


def make_clone(path: Path) -> Path:
  """Makes a directory like a fresh clone; what is written to it does not come here."""
  path.mkdir()
  for name in ('README.md', 'LICENSE', 'setup.cfg', 'pyproject.toml', 'se_vae', 'experiments'):
    (path / name).symlink_to(ROOT / name)
  shutil.copytree(ROOT / 'results', path / 'results')
  return path
