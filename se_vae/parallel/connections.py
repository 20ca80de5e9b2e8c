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
    """Takes note of the value that a process shows. A value that it had before is silence."""
    if process in self._heard and value != self._values[process]:
      self._values[process] = value
      self._heard[process] = float('inf') if value == _LEFT else now

  def longer_than(self, seconds: float, now: float) -> list[int]:
    """Returns the processes that have been silent for longer, and have not said that they leave."""
    return sorted(process for process, heard in self._heard.items() if now - heard > seconds)


def watch(timeout: float, on_lost: Callable[[int], None]) -> Callable[[], bool]:
  """Calls `on_lost` in every process, if one is silent for `timeout` seconds.

  JAX watches too, but a process that it takes for dead ends with a stack trace, so its timeout must
  be longer. All other processes watch process 0. It watches all, and tells the others. It is the
  last to call `on_lost`, because the store ends with it.

  Args:
    timeout: seconds.
    on_lost: takes the number of the silent process, and must end this one. It runs in a thread of
      its own.

  Returns:
    A function that says whether a process is lost, so that `on_lost` is called soon. Connections
    break meanwhile, as the others end.
  """
  from jax._src import distributed

  client: Any = distributed.global_state.client
  own = jax.process_index()
  others = set(range(1, jax.process_count())) if own == 0 else {0}
  pause, stopped = min(_SECONDS_PER_BEAT, timeout / 5.0), threading.Event()
  silence, told = Silence(others, time.monotonic()), threading.Event()
  lost: list[int] = []

  def beat() -> None:
    """Talks to the store, and may wait for it for long."""
    count = 0
    while not stopped.is_set():
      count += 1
      try:
        client.key_value_set(f'{_ALIVE}/{own}', str(count), allow_overwrite=True)
        if own == 0:
          found = client.key_value_dir_get(_ALIVE)
        else:
          found = [(f'{_ALIVE}/0', client.key_value_try_get(f'{_ALIVE}/0'))]
          lost.extend(int(value) for _, value in client.key_value_dir_get(_LOST))
        for key, value in found:
          silence.hear(int(key.rpartition('/')[2]), value, time.monotonic())
        if own == 0 and lost and not told.is_set():
          client.key_value_set(f'{_LOST}/0', str(lost[0]))
          told.set()
      except jax.errors.JaxRuntimeError:
        pass  # the silence counts
      stopped.wait(pause)

  def look() -> None:
    """Looks at the clock, and waits for nothing else."""
    while not lost and not stopped.wait(pause / 4.0):
      lost.extend(silence.longer_than(timeout, time.monotonic()))
    if lost and own == 0 and len(others) > 1:
      told.wait(2.0 * pause)
      time.sleep(1.5 * pause)  # the others have looked once more
    if lost:
      on_lost(lost[0])

  def leave() -> None:
    stopped.set()
    for thread in threads:
      thread.join(pause)
    with contextlib.suppress(jax.errors.JaxRuntimeError):  # the store may have ended
      client.key_value_set(f'{_ALIVE}/{own}', _LEFT, allow_overwrite=True)

  threads = [threading.Thread(target=target, daemon=True) for target in (beat, look)]
  for thread in threads:
    thread.start()
  atexit.register(leave)  # runs before JAX's own, which waits for the other processes
  return lambda: bool(lost)
