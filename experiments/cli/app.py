"""What every binary does around its work: its flags, its errors and its exit codes."""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable

from absl import app, logging
from absl import flags as absl_flags
from etils import epy

from experiments.cli import flags
from experiments.cli.flags import UsageError
from experiments.cli.signals import Interrupted
from experiments.cli.workdirs import check_directory
from se_vae.config import ArgumentError, setting

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

  from se_vae.parallel import processes
  from se_vae.storage import checkpoints

# The flags defined here belong to every binary, and are listed by its --help.
absl_flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """The flags that every binary has; no result depends on them."""

  compilation_cache_dir: str | None = setting(
    None, 'Directory that keeps compiled programs for later runs on this host.'
  )


def run(main: Callable[[], None]) -> None:
  """Runs a binary: 2 for a usage error, 1 for a failure, 130 or 143 when interrupted."""
  flags.define_flags(RuntimeConfig)
  app.run(functools.partial(_guarded, main), flags_parser=_parse_flags)


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
  if not absl_flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # JAX tells at length which platforms it did not find
  try:
    if len(argv) > 1:
      raise UsageError(f'unexpected argument {argv[1]!r}; settings are given as --flag=value')
    _use_compilation_cache(flags.from_flags(RuntimeConfig).compilation_cache_dir)
    main()
  except ArgumentError as error:
    print(f'error: {flags.error_line(error)}', file=sys.stderr)
    sys.exit(2)
  except failures() as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(1)
  except Interrupted as interrupted:
    kept = 'saved. Run the same command again to go on.' if interrupted.saved else 'nothing is kept'
    print(f'{interrupted}: {kept}', file=sys.stderr)
    sys.exit(128 + interrupted.signum)


def failures() -> tuple[type[Exception], ...]:
  """What can go wrong with the machine or the numbers: told in a line, not in a traceback."""
  return (OSError, ArithmeticError, checkpoints.CheckpointError, processes.OtherProcessError)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return list(absl_flags.FLAGS(argv))
  except absl_flags.Error as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(2)


def _use_compilation_cache(directory: str | None) -> None:
  """Keeps every compiled program in `directory`, however small, and looks for it there first.

  XLA compiles for the very CPU that it runs on: a directory is for one host.
  """
  if directory is None:
    return
  check_directory('--compilation_cache_dir', directory)
  jax.config.update('jax_compilation_cache_dir', directory)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
