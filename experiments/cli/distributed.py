"""Binaries that several processes run together: their flags, how they join and how they end."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import ipaddress
import os
import re
import socket
import sys
import threading
import traceback
from collections.abc import Iterator
from typing import NoReturn

from etils import epy

from experiments.cli import app, signals
from experiments.cli.messages import warn
from se_vae.config import ArgumentError, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax

  from se_vae.parallel import connections, processes


_WEEK = 7 * 24 * 3600  # in seconds; JAX counts some times in 32 bits
_JAX_LATER = 60  # seconds that JAX waits longer than we do


@dataclasses.dataclass(frozen=True)
class Cluster:
  """The flags of a binary that several processes may run together, each on its own devices."""

  distributed: bool = setting(
    False, 'Train together with the other processes of a SLURM job, Kubernetes job or TPU pod.'
  )
  coordinator: str | None = setting(None, 'host:port of process 0, where there is no scheduler.')
  num_processes: int | None = setting(
    None, 'How many processes there are.', at_least=1, at_most=65_536
  )  # process 0 keeps a record of each
  process_id: int | None = setting(None, 'The number of this one, from 0.', at_least=0)
  join_timeout: int = setting(
    60, 'Seconds to wait for the others at the start.', at_least=1, at_most=_WEEK
  )
  heartbeat_timeout: int = setting(
    100, 'Seconds of silence after which a process is taken for dead.', at_least=10, at_most=_WEEK
  )


def check_cluster(cluster: Cluster) -> None:
  """Checks the flags against their limits and each other.

  Raises:
    ArgumentError: naming the flag or the setting.
  """
  validate(cluster)
  named = {name: getattr(cluster, name) for name in ('coordinator', 'num_processes', 'process_id')}
  missing = [name for name, value in named.items() if value is None]
  if cluster.coordinator is None or cluster.num_processes is None or cluster.process_id is None:
    if len(missing) < len(named):
      raise ArgumentError(missing, 'must be given too')
    return
  if not re.fullmatch(r'.+:[0-9]{1,5}', cluster.coordinator):
    raise ArgumentError('coordinator', f'must be host:port; got {cluster.coordinator!r}')
  if cluster.process_id >= cluster.num_processes:
    raise ArgumentError('process_id', f'must be below num_processes; got {cluster.process_id}')


@contextlib.contextmanager
def joined(cluster: Cluster) -> Iterator[None]:
  """Joins the other processes that the flags name, if any. Must be entered before JAX is used.

  Some errors are not raised by all processes together: a bug, an accelerator out of memory, the
  death of another process. They end this process at once, because at an ordinary exit the processes
  would wait for each other.

  Raises:
    ArgumentError: if the flags contradict each other, the port is in use, or the environment does
      not describe the processes.
  """
  check_cluster(cluster)
  if not cluster.distributed and cluster.coordinator is None:
    yield
    return
  _check_port(cluster)
  _warn_of_loopback(cluster)
  _join(cluster)
  watch = connections.watch(cluster.heartbeat_timeout, functools.partial(_lost, cluster))
  shared: tuple[type[Exception], ...] = (ArgumentError, signals.Interrupted, *app.failures())
  try:
    yield
  except shared:
    raise
  except (MemoryError, jax.errors.JaxRuntimeError) as error:
    _leave_broken(error, watch.is_lost())
  except SystemExit as error:
    _leave(error.code if isinstance(error.code, int) else 1)
  except BaseException as error:
    if isinstance(error, ValueError) and 'Gloo' in str(error):  # of a result that JAX waits for
      _leave_broken(error, watch.is_lost())
    _leave(1, traceback.format_exc())


def _check_port(cluster: Cluster) -> None:
  """Raises ArgumentError if process 0 cannot listen: JAX would end with a segmentation fault."""
  if cluster.coordinator is None or cluster.process_id != 0:
    return
  with socket.socket() as listener:
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as JAX's own does
    try:
      listener.bind(('', int(cluster.coordinator.rpartition(':')[2])))
    except (OSError, OverflowError) as error:
      raise ArgumentError(
        'coordinator', f'cannot listen at {cluster.coordinator}: {error}'
      ) from None


def _warn_of_loopback(cluster: Cluster) -> None:
  """Tells process 0 if its name for itself is of no use to others, as on Debian: 127.0.1.1."""
  if cluster.coordinator is None or cluster.process_id != 0:
    return
  host = cluster.coordinator.rpartition(':')[0].strip('[]')
  address = connections.own_address(cluster.coordinator)
  if address is None or host in ('localhost', address):
    return
  if ipaddress.ip_address(address).is_loopback:
    warn(
      f'--coordinator: {host} is {address} on this host, where no other host can connect; '
      'if there are others, give the address that they use'
    )


def _join(cluster: Cluster) -> None:
  """Joins the other processes, and ends this one if they do not come in time."""
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
    processes.join(
      cluster.coordinator,
      cluster.num_processes,
      cluster.process_id,
      # JAX would abort with a stack trace.
      timeout=cluster.join_timeout + _JAX_LATER,
      heartbeat_timeout=cluster.heartbeat_timeout + _JAX_LATER,
    )
  except ValueError as error:
    raise ArgumentError('distributed', str(error)) from None
  except RuntimeError as error:  # as of a scheduler that does not answer
    _leave(1, f'error: cannot join the other processes: {" ".join(str(error).split())}')
  finally:
    late.cancel()


def _lost(cluster: Cluster, process: int) -> NoReturn:
  """Ends this process because another is silent."""
  _leave(
    1,
    f'error: lost process {process}: silent for {cluster.heartbeat_timeout} s '
    '(--heartbeat_timeout); what was saved before stays. Run the same commands again to go on.',
  )


def _leave_broken(error: BaseException, is_lost: bool) -> NoReturn:
  """Ends this process after an error of JAX, which does not say whose fault it is."""
  if is_lost:
    threading.Event().wait()  # for `_lost`, which knows
  lost = f'lost the other processes, or a device: {" ".join(str(error).split())}'
  _leave(1, f'error: {app.out_of_memory(error) or lost}')


def _leave(code: int, message: str = '') -> NoReturn:
  """Ends the process without waiting for the others."""
  print(message, end='\n' if message else '', file=sys.stderr, flush=True)
  sys.stdout.flush()
  os._exit(code)
