"""What every binary does around its work: flags, devices, signals, errors, progress and files."""

from __future__ import annotations

import contextlib
import dataclasses
import fcntl
import functools
import importlib.metadata
import json
import os
import platform
import re
import signal
import sys
import threading
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from absl import app, flags, logging
from etils import epy
from tqdm import tqdm

from experiments import settings
from experiments.settings import UsageError, setting

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

  from se_vae import checkpoints, sharding

_PACKAGES = ('jax', 'jaxlib', 'flax', 'optax', 'numpy', 'scikit-learn', 'se_vae')

# Below this many examples a device's share of a batch is too small to be worth a device.
_SMALLEST_SHARE = 16


# The flags defined here belong to every binary, and are listed by its --help.
flags.disclaim_key_flags()


@dataclasses.dataclass(frozen=True)
class RuntimeConfig:
  """The flags that every binary has; no result depends on them."""

  compilation_cache_dir: str | None = setting(
    None, 'Directory that keeps compiled programs for later runs on this host.'
  )


class Interrupted(Exception):
  """The user or the scheduler asked the process to stop; finished work has been saved."""

  def __init__(self, signum: int) -> None:
    super().__init__(signal.Signals(signum).name)
    self.signum = signum


def run(main: Callable[[], None]) -> None:
  """Runs a binary: 2 for a usage error, 1 for a failure, 130 or 143 when interrupted."""
  settings.define_flags(RuntimeConfig)
  app.run(functools.partial(_guarded, main), flags_parser=_parse_flags)


def _guarded(main: Callable[[], None], argv: list[str]) -> None:
  if not flags.FLAGS['verbosity'].present:
    logging.set_verbosity(logging.WARNING)  # JAX tells at length which platforms it did not find
  try:
    if len(argv) > 1:
      raise UsageError(f'unexpected argument {argv[1]!r}; settings are given as --flag=value')
    _use_compilation_cache(settings.from_flags(RuntimeConfig).compilation_cache_dir)
    main()
  except UsageError as error:
    print(f'error: {error}', file=sys.stderr)
    sys.exit(2)
  except _failures() as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(1)
  except Interrupted as interrupted:
    print(f'{interrupted}: saved. Run the same command again to go on.', file=sys.stderr)
    sys.exit(128 + interrupted.signum)


def _failures() -> tuple[type[Exception], ...]:
  """What can go wrong with the machine or the numbers: told in a line, not in a traceback."""
  return (OSError, ArithmeticError, checkpoints.CheckpointError, sharding.OtherProcessError)


def _parse_flags(argv: list[str]) -> list[str]:
  try:
    return list(flags.FLAGS(argv))
  except flags.Error as error:
    print(f'error: {" ".join(str(error).split())}', file=sys.stderr)
    sys.exit(2)


def _use_compilation_cache(directory: str | None) -> None:
  """Keeps every compiled program in `directory`, however small, and looks for it there first.

  XLA compiles for the very CPU that it runs on: a directory is for one host.
  """
  if directory is None:
    return
  _check_directory('--compilation_cache_dir', directory)
  jax.config.update('jax_compilation_cache_dir', directory)
  jax.config.update('jax_persistent_cache_min_compile_time_secs', 0.0)
  jax.config.update('jax_persistent_cache_min_entry_size_bytes', -1)


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The flags of a binary that several processes may run together, each on its own devices."""

  distributed: bool = setting(
    False, 'Train together with the other processes of a SLURM job, Kubernetes job or TPU pod.'
  )
  coordinator: str | None = setting(None, 'host:port of process 0, where there is no scheduler.')
  num_processes: int | None = setting(None, 'How many processes there are.', at_least=1)
  process_id: int | None = setting(None, 'The number of this one, from 0.', at_least=0)
  join_timeout: int = setting(60, 'Seconds to wait for the others at the start.', at_least=1)
  heartbeat_timeout: int = setting(
    100, 'Seconds of silence after which a process is taken for dead.', at_least=10
  )


def check_cluster(cluster: Cluster) -> None:
  """Raises UsageError for flags that contradict each other."""
  settings.check(cluster)
  named = {name: getattr(cluster, name) for name in ('coordinator', 'num_processes', 'process_id')}
  missing = [f'--{name}' for name, value in named.items() if value is None]
  if cluster.coordinator is None or cluster.num_processes is None or cluster.process_id is None:
    if len(missing) < len(named):
      raise UsageError(f'{", ".join(missing)}: must be given too')
    return
  if not re.fullmatch(r'.+:[0-9]{1,5}', cluster.coordinator):
    raise UsageError(f'--coordinator: must be host:port; got {cluster.coordinator!r}')
  if cluster.process_id >= cluster.num_processes:
    raise UsageError(f'--process_id: must be below --num_processes; got {cluster.process_id}')


@contextlib.contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
  """One process alone, or one of several while the context is open. Precedes any use of JAX.

  An error that not all of them raise together (a bug, an accelerator out of memory, the death of
  another process) ends this process at once: at an ordinary exit it would wait for the others, and
  they for it.

  Raises:
    UsageError: for flags that contradict each other, or where the scheduler has said nothing.
  """
  check_cluster(cluster)
  if not cluster.distributed and cluster.coordinator is None:
    yield
    return
  _join(cluster)
  shared: tuple[type[Exception], ...] = (UsageError, Interrupted, *_failures())
  try:
    yield
  except shared:
    raise
  except jax.errors.JaxRuntimeError as error:
    _leave(1, f'error: lost the other processes, or a device: {" ".join(str(error).split())}')
  except SystemExit as error:
    _leave(error.code if isinstance(error.code, int) else 1)
  except BaseException:
    _leave(1, traceback.format_exc())


def _join(cluster: Cluster) -> None:
  late = threading.Timer(
    cluster.join_timeout,
    _leave,
    (
      1,
      f'error: {cluster.coordinator or "the coordinator"} did not bring all processes together '
      f'within {cluster.join_timeout} s (--join_timeout); is each running, and can it be reached?',
    ),
  )
  late.daemon = True
  late.start()
  try:
    sharding.join(
      cluster.coordinator,
      cluster.num_processes,
      cluster.process_id,
      timeout=cluster.join_timeout + 60,  # JAX would abort with a stack trace
      heartbeat_timeout=cluster.heartbeat_timeout,
    )
  except ValueError as error:
    raise UsageError(f'--distributed: {error}') from None
  finally:
    late.cancel()


def _leave(code: int, message: str = '') -> None:
  """Ends the process without taking leave of the others."""
  print(message, end='\n' if message else '', file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)


def use_all_cores(batch_size: int, num_devices: int | None = None) -> None:
  """Splits the host into one JAX device a core, as far as the batch allows, or into `num_devices`.

  XLA's CPU backend runs the small matrix products of this project faster side by side on several
  devices than each spread over all cores. Must run before JAX is first used; leaves accelerators
  alone, and any number of host devices that the user chose.
  """
  chosen: int = jax.config.jax_num_cpu_devices  # type: ignore[attr-defined]
  if chosen > 0 or 'host_platform_device_count' in os.environ.get('XLA_FLAGS', ''):
    return
  jax.config.update('jax_num_cpu_devices', num_devices or _even_split(batch_size, num_cores()))


def num_cores() -> int:
  """How many cores this process may use."""
  affinity = getattr(os, 'sched_getaffinity', None)
  return len(affinity(0)) if affinity else os.cpu_count() or 1


def mesh_for(batch_size: int, num_devices: int | None = None) -> Any:
  """The data mesh over `num_devices` devices of each process, or as many as divide the batch.

  Raises:
    UsageError: if they do not divide it, or are not there. Compiles nothing.
  """
  num_processes, most = jax.process_count(), jax.local_device_count()
  if batch_size % num_processes:
    raise UsageError(
      f'--batch_size: must be a multiple of the {num_processes} processes; got {batch_size}'
    )
  share = batch_size // num_processes
  if num_devices is None:
    num_devices = _even_split(share, most)
  elif num_devices > most:
    raise UsageError(f'--num_devices: must be <= {most}, the devices here; got {num_devices}')
  elif share % num_devices:
    raise UsageError(
      f'--batch_size, --num_devices: {batch_size} examples cannot be split evenly over '
      f'{num_processes * num_devices} devices'
    )
  return sharding.data_mesh(num_devices)


def _even_split(batch_size: int, most: int) -> int:
  most = max(1, min(most, batch_size // _SMALLEST_SHARE))
  return next(count for count in range(most, 0, -1) if batch_size % count == 0)


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
  """Makes the directory if need be, and keeps every other process out of it.

  The system drops the lock of a process that dies, however it dies.

  Raises:
    UsageError: if another process is at work there; names it.
  """
  workdir.mkdir(parents=True, exist_ok=True)
  with (workdir / '.lock').open('a+') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      file.seek(0)
      owner = file.read().strip() or 'another process'
      raise UsageError(f'--workdir: {workdir} is in use by {owner}') from None
    file.truncate(0)
    file.write(f'process {os.getpid()} on {platform.node()}')
    file.flush()
    yield


class StopSignal:
  """Remembers a request to stop (Ctrl-C, SIGTERM), to be honoured at a point of one's choice."""

  def __init__(self) -> None:
    self.signum: int | None = None

  def check(self) -> None:
    """Raises Interrupted if a request has come in."""
    if self.signum is not None:
      raise Interrupted(self.signum)

  @contextlib.contextmanager
  def listening(self) -> Iterator[StopSignal]:
    """Listens while the context is open; a second request kills the process at once."""

    def handler(signum: int, _: FrameType | None) -> None:
      if self.signum is not None:
        sys.exit(128 + signum)
      self.signum = signum

    previous = {
      number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
      yield self
    finally:
      for number, old in previous.items():
        signal.signal(number, old)


def progress_bar(total: int, description: str, *, initial: int = 0, unit: str = 'step') -> Any:
  """A bar with rate and time left on a terminal, and a line every now and then in a log file."""
  terminal = sys.stderr.isatty()
  return tqdm(
    total=total,
    initial=initial,
    desc=description,
    unit=unit,
    dynamic_ncols=terminal,
    ascii=not terminal,
    mininterval=0.2 if terminal else 15.0,
    smoothing=0.1,
  )


def warn(message: str) -> None:
  """Tells the user of something that the run can go on without."""
  print(f'warning: {message}', file=sys.stderr)


def versions() -> dict[str, str]:
  """The versions that a result may depend on."""
  found = {'python': platform.python_version()}
  for package in _PACKAGES:
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
      found[package] = importlib.metadata.version(package)
  return found


def devices() -> list[str]:
  """The kinds of the devices, of all processes."""
  return [device.device_kind for device in jax.devices()]


def read_json(path: Path) -> Any:
  """The content of a JSON file."""
  return json.loads(path.read_text())


def write_json(path: Path, content: Any) -> None:
  """Writes a JSON file, whole or not at all."""
  write_atomically(
    path, lambda temporary: temporary.write_text(json.dumps(content, indent=2) + '\n')
  )


def write_atomically(path: Path, write: Callable[[Path], Any]) -> None:
  """Lets `write` fill a temporary file, and puts that in the place of `path`."""
  temporary = path.with_name(
    f'.{os.getpid()}.{path.name}'
  )  # keeps the suffix, which names a format
  try:
    write(temporary)
    os.replace(temporary, path)
  finally:
    temporary.unlink(missing_ok=True)


def check_workdir(workdir: str | None) -> Path:
  """The work directory as a path, if it is or can become a writable directory."""
  if not workdir:
    raise UsageError('--workdir: is required; everything the run writes goes there')
  return _check_directory('--workdir', workdir)


def _check_directory(flag: str, directory: str) -> Path:
  path = Path(directory)
  nearest = next(parent for parent in (path, *path.absolute().parents) if parent.exists())
  if not nearest.is_dir():
    raise UsageError(f'{flag}: {nearest} is not a directory')
  if not os.access(nearest, os.W_OK):
    raise UsageError(f'{flag}: {nearest} is not writable')
  return path
