"""The commit of the source tree that runs, where git knows it."""

from __future__ import annotations

import hashlib
import os
import subprocess
from pathlib import Path

import se_vae

_CODE = ('.', '../experiments')


def commit(package: Path = Path(se_vae.__file__).parent) -> str | None:
  """Returns the commit that holds a package, with '-dirty' if tracked code differs from it.

  Code is the package and what stands beside it in `experiments`.

  Args:
    package: the directory of the package. None is returned unless git tracks it: an installed
      package may lie in a directory of somebody else's repository.
  """
  try:
    _git(package, 'ls-files', '--error-unmatch', '__init__.py')
    changed = _git(package, 'status', '--porcelain', '--untracked-files=no', '--', *_CODE)
    return _git(package, 'rev-parse', 'HEAD') + ('-dirty' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return None


def changes(package: Path = Path(se_vae.__file__).parent) -> str | None:
  """Returns the SHA-256 of how tracked code differs from its commit; None where git knows nothing.

  Args:
    package: as for `commit`.
  """
  try:
    _git(package, 'ls-files', '--error-unmatch', '__init__.py')
    return hashlib.sha256(
      _git(package, 'diff', 'HEAD', '--', *_CODE).encode(errors='surrogateescape')
    ).hexdigest()
  except (OSError, subprocess.SubprocessError):
    return None


def _git(package: Path, *arguments: str) -> str:
  environment = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
  # Without the optional locks, git writes nothing.
  done = subprocess.run(
    ('git', '--no-optional-locks', '-C', str(package), *arguments),
    env=environment,
    capture_output=True,
    encoding='utf-8',
    errors='surrogateescape',
    timeout=10,
    check=True,
  )
  return done.stdout.strip()
