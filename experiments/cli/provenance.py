"""The commit of the source tree that runs, where git knows it."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import se_vae


def commit(package: Path = Path(se_vae.__file__).parent) -> str | None:
  """Returns the commit that holds a package, with '-dirty' if tracked code differs from it.

  Code is the package and what stands beside it in `experiments`.

  Args:
    package: the directory of the package. None is returned unless git tracks it: an installed
      package may lie in a directory of somebody else's repository.
  """
  environment = {name: value for name, value in os.environ.items() if not name.startswith('GIT_')}
  # Without the optional locks, git writes nothing.
  git = ('git', '--no-optional-locks', '-C', str(package))

  def output(*arguments: str) -> str:
    done = subprocess.run(
      (*git, *arguments), env=environment, capture_output=True, text=True, timeout=10, check=True
    )
    return done.stdout.strip()

  try:
    output('ls-files', '--error-unmatch', '__init__.py')
    changed = output('status', '--porcelain', '--untracked-files=no', '--', '.', '../experiments')
    return output('rev-parse', 'HEAD') + ('-dirty' if changed else '')
  except (OSError, subprocess.SubprocessError):
    return None
