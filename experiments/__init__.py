"""Command-line binaries: flags to one frozen configuration, to library calls, to files."""

import sys

if sys.argv[:1] == ['-m']:  # `python -m experiments.NAME` imports this before anything else
  from experiments.cli import startup

  startup.prepare()
