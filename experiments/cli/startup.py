"""What a binary does before its first import: safe streams, and no traceback for Ctrl-C."""

from __future__ import annotations

import codecs
import io
import os
import signal
import sys
from types import FrameType
from typing import Any, NoReturn

_ESCAPE = 'se_vae_escape'


def prepare() -> None:
  """Lets Ctrl-C end the process without a traceback, and makes standard output and error safe.

  An exception from a signal handler in the middle of an import would become an ImportError, or
  crash an extension module; so the process ends at once until the binary listens to signals.
  """
  signal.signal(signal.SIGINT, _end)
  codecs.register_error(_ESCAPE, _escape)
  _open_closed_descriptors()
  sys.stdout = _text(1, sys.stdout, BrokenPipeError)
  sys.stderr = _text(2, sys.stderr, OSError)


def _end(signum: int, _: FrameType | None) -> NoReturn:
  os.write(2, f'{signal.Signals(signum).name}\n'.encode())
  os._exit(128 + signum)


def _open_closed_descriptors() -> None:
  """Opens the null device where the parent closed a stream: a file would take its number."""
  while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    os.set_inheritable(descriptor, True)
  os.close(descriptor)


def _escape(error: UnicodeError) -> tuple[str | bytes, int]:
  """Gives the bytes of a path as they are, and escapes letters that the encoding does not have."""
  try:
    return codecs.lookup_error('surrogateescape')(error)
  except UnicodeError:
    return codecs.backslashreplace_errors(error)


class _Descriptor(io.FileIO):
  """A descriptor that drops what it cannot write, so that a lost reader does not end a run."""

  dropped: type[OSError]

  def write(self, data: Any, /) -> int:
    try:
      return super().write(data)
    except self.dropped:
      return len(data)
    except OSError:
      self.dropped = OSError  # the binary tells it once, and then cannot write what is left
      raise


def _text(number: int, stream: Any, dropped: type[OSError]) -> io.TextIOWrapper:
  """Returns a text stream like `stream`, which escapes what its encoding does not have.

  Args:
    number: its descriptor.
    stream: the stream that it replaces; None if the descriptor was closed.
    dropped: the errors that it does not raise.
  """
  descriptor = _Descriptor(number, 'w', closefd=False)
  descriptor.dropped = dropped
  return io.TextIOWrapper(
    io.BufferedWriter(descriptor),
    encoding=getattr(stream, 'encoding', 'utf-8'),
    errors=_ESCAPE,
    line_buffering=number == 2 or descriptor.isatty(),
  )
