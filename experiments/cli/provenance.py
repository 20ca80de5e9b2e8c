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
  head = _git(package, 'rev-parse', 'HEAD')
  changed = _git(package, 'status', '--porcelain', '--untracked-files=no', '--', *_CODE)
  if head is None or changed is None:
    return None
  return head + ('-dirty' if changed else '')


def changes(package: Path = Path(se_vae.__file__).parent) -> str | None:
  """Returns the SHA-256 of how tracked code differs from its commit; None where git knows nothing.

  Args:
    package: as for `commit`.
  """
  diff = _git(package, 'diff', 'HEAD', '--', *_CODE)
  return None if diff is None else hashlib.sha256(diff.encode(errors='surrogateescape')).hexdigest()


def _git(package: Path, *arguments: str) -> str | None:
  """Returns what a command of git prints, or None unless git tracks the package."""
  environment = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
  # Without the optional locks, git writes nothing.
  git = ('git', '--no-optional-locks', '-C', str(package))
  try:
    for command in (('ls-files', '--error-unmatch', '__init__.py'), arguments):
      done = subprocess.run(
        (*git, *command),
        env=environment,
        capture_output=True,
        encoding='utf-8',
        errors='surrogateescape',
        timeout=10,
        check=True,
      )
  except (OSError, subprocess.SubprocessError):
    return None
  return done.stdout.strip()
