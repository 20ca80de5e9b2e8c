"""Requests to stop (Ctrl-C, SIGTERM), honoured at a point of the binary's choice."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):
  """The user or the scheduler asked the process to stop.

  Attributes:
    signum: the number of the signal.
    saved: whether finished work has been saved.
  """

  def __init__(self, signum: int, saved: bool = True) -> None:
    super().__init__(signal.Signals(signum).name)
    self.signum = signum
    self.saved = saved


class StopSignal:
  """Remembers a request to stop (Ctrl-C, SIGTERM) until the binary looks for it.

  Args:
    saves: whether the same command goes on afterwards from what the binary has finished.
    second_ends: whether a second signal ends the process at once. A process that others stop may
      get several signals that mean the same.

  Attributes:
    signum: the number of the signal; None if there was none.
    saves: whether the same command goes on afterwards.
    patience: seconds in which the binary must look. Afterwards the process ends with what was saved
      before, because a device at work cannot be interrupted.
  """

  def __init__(self, saves: bool = True, second_ends: bool = True) -> None:
    self.signum: int | None = None
    self.patience = 10.0
    self.saves, self._second_ends = saves, second_ends
    self._honoured = threading.Event()

  def requested(self) -> int | None:
    """Returns the signal's number, or None. From then on the binary has all the time it needs."""
    if self.signum is not None:
      self._honoured.set()
    return self.signum

  def check(self) -> None:
    """Raises Interrupted if there was a request."""
    signum = self.requested()
    if signum is not None:
      raise Interrupted(signum, self.saves)

  @contextlib.contextmanager
  def listening(self) -> Iterator[StopSignal]:
    """Listens for signals while the context is open."""

    def handler(signum: int, _: FrameType | None) -> None:
      self.signum = signum

    # Python runs handlers between two of its instructions, and not while it waits for the device.
    # It writes the signal's number to the wakeup descriptor at once, and a thread reads it there.
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    wakeup = signal.set_wakeup_fd(writer)
    watcher = threading.Thread(target=self._watch, args=(reader,), daemon=True)
    watcher.start()
    previous = {
      number: signal.signal(number, handler) for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
      yield self
    finally:
      self._honoured.set()
      signal.set_wakeup_fd(wakeup)
      for number, old in previous.items():
        signal.signal(number, old)
      os.close(writer)  # the watcher reads the end of the file
      watcher.join()
      os.close(reader)

  def _watch(self, reader: int) -> None:
    """Ends the process at a second signal, or if a first one is not honoured in time."""
    for signum in os.read(reader, 1):
      self.signum = signum
      began, listening = time.monotonic(), True
      # The binary may need more patience than it did when the signal came.
      while listening and not self._honoured.is_set():
        remaining = began + self.patience - time.monotonic()
        if remaining <= 0.0:
          kept = 'what was saved before stays. Run the same command again to go on.'
          print(
            f'\n{signal.Signals(signum).name}: a step takes longer than {self.patience:g} s and '
            f'was not waited for; {kept if self.saves else "nothing is kept"}',
            file=sys.stderr,
            flush=True,
          )
          os._exit(128 + signum)
        ready, _, _ = select.select([reader], [], [], remaining)
        listening = not ready or self._hear_again(reader)
      while listening:
        listening = self._hear_again(reader)

  def _hear_again(self, reader: int) -> bool:
    """Waits for another signal; returns False if there will be none."""
    for signum in os.read(reader, 1):
      if self._second_ends:
        os._exit(128 + signum)
      return True
    return False
