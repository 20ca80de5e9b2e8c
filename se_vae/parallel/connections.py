"""What several hosts need and JAX has no public interface for: an address, and a watch on silence.

This is the only module that uses private names of JAX. It imports them where several processes need
them, so that a single one does not depend on them.
"""

from __future__ import annotations

import atexit
import contextlib
import socket
import threading
import time
from collections.abc import Callable
from typing import Any

import jax
from jax.extend import backend

# Keys of JAX's key-value store, which process 0 serves.
_ALIVE, _LOST = 'se_vae/alive', 'se_vae/lost'
_LEFT = 'left'
_SECONDS_PER_BEAT = 5.0


def own_address(coordinator: str) -> str | None:
  """Returns the address of this host on the way to `host:port`, or None if there is no way.

  Nothing is sent. If the coordinator is this host, it is the address that `host` stands for here.

  Example:
    >>> own_address('127.0.0.1:1234')
    '127.0.0.1'
  """
  host, _, port = coordinator.rpartition(':')
  try:
    found = socket.getaddrinfo(host.strip('[]'), int(port), type=socket.SOCK_DGRAM)
    family, kind, protocol, _, target = found[0]
    with socket.socket(family, kind, protocol) as route:
      route.connect(target)
      address: str = route.getsockname()[0]
  except (OSError, ValueError):
    return None
  return address


def listen_on_the_way_to_the_coordinator() -> None:
  """Makes CPU devices listen at the address that other hosts reach.

  JAX takes the address that the host's name has. On Debian and its relatives that is 127.0.1.1, at
  which no other host can connect. Call it after `jax.distributed.initialize`, and before JAX is
  used. GPUs and TPUs choose for themselves.
  """
  from jax._src import distributed, xla_bridge
  from jax._src.lib import _jax  # type: ignore[attr-defined]

  if jax.config.jax_cpu_collectives_implementation != 'gloo':  # type: ignore[attr-defined]
    return

  def make_client() -> object:
    state = distributed.global_state
    return xla_bridge.make_cpu_client(
      _jax.make_gloo_tcp_collectives(
        distributed_client=state.client, hostname=own_address(state.coordinator_address or '')
      )
    )

  backend.register_backend_factory('cpu', make_client, priority=0, fail_quietly=False)


class Silence:
  """How long other processes have been silent, by this process's clock.

  Args:
    others: the numbers of the processes.
    now: the time in seconds, from which their silence counts.
  """

  def __init__(self, others: set[int], now: float) -> None:
    self._heard = dict.fromkeys(others, now)
    self._values = dict.fromkeys(others, '')

  def hear(self, process: int, value: str, now: float) -> None:
    """Records the value that a process shows. An unchanged value counts as silence."""
    if process in self._heard and value != self._values[process]:
      self._values[process] = value
      self._heard[process] = float('inf') if value == _LEFT else now

  def longer_than(self, seconds: float, now: float) -> list[int]:
    """Returns the processes that have been silent for longer, and have not said that they leave."""
    return sorted(process for process, heard in self._heard.items() if now - heard > seconds)


class Watch:
  """Notices in every process that one is silent.

  Every process shows a new value from time to time. Process 0, which serves the store, looks at all
  of them, and all others look at process 0 and at what it tells of the others.

  Args:
    store: JAX's key-value store.
    own: the number of this process.
    num_processes: how many there are.
    timeout: seconds of silence after which a process is lost.
    on_lost: takes the number of a lost process, and must end this one. It runs in a thread of its
      own, in process 0 last, because the store ends with it.
  """

  def __init__(
    self, store: Any, own: int, num_processes: int, timeout: float, on_lost: Callable[[int], None]
  ) -> None:
    self._store, self._own, self._timeout, self._on_lost = store, own, timeout, on_lost
    self._others = set(range(1, num_processes)) if own == 0 else {0}
    self._pause = min(_SECONDS_PER_BEAT, timeout / 5.0)
    self._silence = Silence(self._others, time.monotonic())
    self._lost: list[int] = []
    self._told, self._stopped = threading.Event(), threading.Event()
    # The store may keep a thread waiting for long; the other looks at the clock alone.
    self._threads = [
      threading.Thread(target=target, daemon=True) for target in (self._beat, self._look)
    ]
    for thread in self._threads:
      thread.start()

  def is_lost(self) -> bool:
    """Returns whether a process is lost. Connections then break, because the others end too."""
    return bool(self._lost)

  def leave(self) -> None:
    """Tells the others that this process leaves, and stops."""
    self.stop()
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store may have ended
      self._show(_LEFT)

  def stop(self) -> None:
    """Stops without telling the other processes."""
    self._stopped.set()
    for thread in self._threads:
      thread.join(self._pause)

  def _beat(self) -> None:
    count = 0
    while not self._stopped.is_set():
      count += 1
      with contextlib.suppress(jax.errors.JaxRuntimeError):  # the silence counts
        self._show(str(count))
        self._listen()
      self._stopped.wait(self._pause)

  def _show(self, value: str) -> None:
    self._store.key_value_set(f'{_ALIVE}/{self._own}', value, allow_overwrite=True)

  def _listen(self) -> None:
    if self._own == 0:
      for key, value in self._store.key_value_dir_get(_ALIVE):
        self._silence.hear(int(key.rpartition('/')[2]), value, time.monotonic())
      if self._lost and not self._told.is_set():
        self._store.key_value_set(f'{_LOST}/0', str(self._lost[0]))
        self._told.set()
    else:
      value = self._store.key_value_try_get(f'{_ALIVE}/0')
      self._silence.hear(0, value, time.monotonic())
      self._lost.extend(int(value) for _, value in self._store.key_value_dir_get(_LOST))

  def _look(self) -> None:
    while not self._lost and not self._stopped.wait(self._pause / 4.0):
      self._lost.extend(self._silence.longer_than(self._timeout, time.monotonic()))
    if self._lost and self._own == 0 and len(self._others) > 1:
      self._told.wait(2.0 * self._pause)
      time.sleep(1.5 * self._pause)  # the others have listened once more
    if self._lost:
      self._on_lost(self._lost[0])


def watch(timeout: float, on_lost: Callable[[int], None]) -> Watch:
  """Returns a watch on all processes that JAX has joined, which leaves when this process exits.

  JAX watches too, but ends the others with a stack trace, so its timeout must be longer.

  Args:
    timeout: seconds of silence after which a process is lost.
    on_lost: as `Watch` takes it.
  """
  from jax._src import distributed

  store = distributed.global_state.client
  found = Watch(store, jax.process_index(), jax.process_count(), timeout, on_lost)
  atexit.register(found.leave)  # runs before JAX's own, which waits for the other processes
  return found
