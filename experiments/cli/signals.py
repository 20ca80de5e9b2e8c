"""Requests to stop (Ctrl-C, SIGTERM), honoured at a point of the binary's choice."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
from collections.abc import Iterator
from types import FrameType


class Interrupted(Exception):
  """The user or the scheduler asked the process to stop.

  Attributes:
    signum: how.
    saved: whether finished work has been saved.
  """

  def __init__(self, signum: int, saved: bool = True) -> None:
    super().__init__(signal.Signals(signum).name)
    self.signum = signum
    self.saved = saved


class StopSignal:
  """Remembers a request to stop (Ctrl-C, SIGTERM), to be honoured at a point of one's choice.

  Args:
    saves: whether what is finished by then is saved.

  Attributes:
    signum: of the request; None if there is none.
    patience: seconds to wait for that point. The process ends without it afterwards, with what was
      saved before: a device at work cannot be interrupted.
  """

  def __init__(self, saves: bool = True) -> None:
    self.signum: int | None = None
    self.patience = 10.0
    self._saves = saves
    self._honoured = threading.Event()

  def requested(self) -> int | None:
    """The request, if there is one; who is told of it may take all the time that saving needs."""
    if self.signum is not None:
      self._honoured.set()
    return self.signum

  def check(self) -> None:
    """Raises Interrupted if a request has come in."""
    signum = self.requested()
    if signum is not None:
      raise Interrupted(signum, self._saves)

  @contextlib.contextmanager
  def listening(self) -> Iterator[StopSignal]:
    """Listens while the context is open; a second request kills the process at once."""

    def handler(signum: int, _: FrameType | None) -> None:
      self.signum = signum

    # Python runs handlers between two of its instructions, not while the device is waited for. The
    # interpreter writes the signal's number to the wakeup descriptor at once, for a thread to read.
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
    """Ends the process for a second request, and for a first that is not honoured in time."""
    for signum in os.read(reader, 1):
      self.signum = signum
      again, _, _ = select.select([reader], [], [], self.patience)
      if not again and not self._honoured.is_set():
        print(
          f'\n{signal.Signals(signum).name}: a step takes longer than {self.patience:g} s and was '
          'not waited for; what was saved before stays. Run the same command again to go on.',
          file=sys.stderr,
          flush=True,
        )
        os._exit(128 + signum)
      for second in os.read(reader, 1):
        os._exit(128 + second)
