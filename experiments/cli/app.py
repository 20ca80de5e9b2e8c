"""What every binary does around its work: its flags, its errors and its exit codes."""

from __future__ import annotations

import dataclasses
import functools
import os
import signal
import sys
import traceback
import warnings
from collections.abc import Callable, Sequence
from typing import Any, NoReturn

from absl import app, logging
from absl import flags as absl_flags
from etils import epy

from experiments.cli import flags, messages
from experiments.cli.flags import UsageError
from experiments.cli.signals import Interrupted
from experiments.cli.workdirs import check_directory
from se_vae.config import ArgumentError, setting

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

  from se_vae.parallel import processes
  from se_vae.storage import checkpoints, json_files

# The flags defined here belong to every binary, and are listed by its --help.
absl_flags.disclaim_key_flags()

# The flags that decide how much memory a binary needs.
_SIZES = ('batch_size', 'latent_dim', 'hidden_units', 'conv_channels', 'image_size')


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """The flags that every binary has; no result depends on them."""

  compilation_cache_dir: str | None = setting(
    None, 'Directory that keeps compiled programs for later runs on this host.'
  )


class RunsFailedError(Exception):
  """Some of many runs failed. What became of each was printed before."""


def run(main: Callable[..., None], actions: Sequence[str] = ()) -> None:
  """Runs a binary and exits: 2 for a usage error, 1 for a failure, 130 or 143 when interrupted.

  Args:
    main: the binary.
    actions: the actions that the first argument of the command line may name. `main` takes one of
      them, and the first is the default. If there are none, `main` takes no argument.
  """
  flags.define_flags(RuntimeConfig)
  app.run(functools.partial(_guarded, main, actions=actions), flags_parser=_parse_flags)


def _guarded(main: Callable[..., None], argv: list[str], actions: Sequence[str] = ()) -> None:
  if not absl_flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # JAX tells at length which platforms it did not find
  try:
    action = _action(argv[1:], actions)
    use_compilation_cache(flags.from_flags(RuntimeConfig).compilation_cache_dir)
    main(*action)
    sys.stdout.flush()  # a full disk is told in a line as well
  except ArgumentError as error:
    # An argument of the library that is no flag: the command line may be right, and its result bad.
    known = not error.arguments or any(name in absl_flags.FLAGS for name in error.arguments)
    _fail(2 if known else 1, flags.name_flags(error, absl_flags.FLAGS))
  except KeyboardInterrupt:  # before a binary listens to signals, or after it has finished
    print('SIGINT', file=sys.stderr)
    sys.exit(128 + signal.SIGINT)
  except Interrupted as interrupted:
    kept = 'saved. Run the same command again to go on.' if interrupted.saved else 'nothing is kept'
    print(f'{interrupted}: {kept}', file=sys.stderr)
    sys.exit(128 + interrupted.signum)
  except failures() as error:
    _fail(1, str(error))
  except (MemoryError, RuntimeError, AssertionError) as error:  # JAX's errors
    message = out_of_memory(error) or no_platform(error)
    if message is None:
      raise
    _fail(1, message)


def _action(arguments: list[str], actions: Sequence[str]) -> Sequence[str]:
  """The action that the arguments name, as arguments of `main`; none for a binary without any.

  Raises:
    UsageError: for any other argument.
  """
  if not actions and arguments:
    raise UsageError(f'unexpected argument {arguments[0]!r}; settings are given as --flag=value')
  if len(arguments) > 1 or not set(arguments) <= set(actions):
    raise UsageError(
      f'unexpected argument {arguments[-1]!r}; one of {", ".join(actions)} may be given'
    )
  return arguments or actions[:1]


def failures() -> tuple[type[Exception], ...]:
  """Returns the errors of the machine and of the numbers, which are told in one line."""
  return (
    OSError,
    ArithmeticError,
    RunsFailedError,
    checkpoints.CheckpointError,
    json_files.JsonError,
    processes.OtherProcessError,
  )


def out_of_memory(error: BaseException) -> str | None:
  """Returns what to do about an error if the memory of the host or of a device was too small."""
  if not isinstance(error, MemoryError) and 'RESOURCE_EXHAUSTED' not in str(error):
    return None
  names = ', '.join(f'--{name}' for name in _SIZES if name in absl_flags.FLAGS)
  advice = f'; smaller values of {names} need less' if names else ''
  first_line = str(error).strip().partition('\n')[0]
  return f'out of memory{advice}: {first_line}'


def no_platform(error: BaseException) -> str | None:
  """Returns what to do about an error if JAX found no device of the chosen platforms."""
  frames = traceback.extract_tb(error.__traceback__)
  platforms = jax.config.jax_platforms  # type: ignore[attr-defined]
  if not platforms or not frames or not frames[-1].filename.endswith('xla_bridge.py'):
    return None
  cause = str(error).strip().partition('\n')[0]
  return f'JAX_PLATFORMS: JAX finds no device of {platforms} here' + f': {cause}' * bool(cause)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return list(absl_flags.FLAGS([argv[0], *map(_expand_home, argv[1:])]))
  except absl_flags.Error as error:
    _fail(2, str(error))
  except SystemExit:  # of --help and its relatives, which absl ends with 1
    sys.exit(0)


def _expand_home(argument: str) -> str:
  """Returns `--flag=~/path` or `--flag=~/a,~/b` with the home directory.

  Shells leave it as it is there.
  """
  name, equals, value = argument.partition('=')
  return f'{name}{equals}{",".join(map(os.path.expanduser, value.split(",")))}'


def _fail(code: int, message: str) -> NoReturn:
  """Ends the process with an error in one line."""
  print(f'error: {" ".join(message.split())}', file=sys.stderr)
  sys.exit(code)


def use_compilation_cache(directory: str | None) -> None:
  """Keeps every compiled program in `directory`, however small, and looks for it there first.

  Nothing is kept if it is None.

  XLA compiles for the very CPU that it runs on, so a directory is for one host. JAX warns of every
  program that it cannot read or write; the first warning is shown.
  """
  if directory is None:
    return
  check_directory('compilation_cache_dir', directory)
  jax.config.update('jax_compilation_cache_dir', directory)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)
  show, shown = warnings.showwarning, False

  def show_once(message: Warning | str, *where: Any, **more: Any) -> None:
    nonlocal shown
    if 'persistent compilation cache' not in str(message):
      show(message, *where, **more)
    elif not shown:
      shown = True
      text = 'damaged or not writable; such programs are compiled anew each time'
      messages.warn(f'--compilation_cache_dir: {text} (the first: {message})')

  warnings.showwarning = show_once
