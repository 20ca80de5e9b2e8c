"""What a binary prints for its user: progress, warnings and tables."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from tqdm import tqdm

_TERMINAL = '{l_bar}{bar}| {n_fmt}/{total_fmt}{times}{postfix}'
_LINE = '{desc}: {n_fmt}/{total_fmt}{times}{postfix}'

# Told of the progress of every bar, as (text, done, total), in a process that works for another.
observer: Callable[[str, int, int], None] | None = None


def progress_bar(
  total: int,
  description: str | None,
  *,
  initial: int = 0,
  unit: str = 'step',
  position: int | None = None,
) -> Any:
  """Returns a progress bar for a terminal, or one that writes a line every 15 s to a log file.

  Args:
    total: the number of units of work.
    description: what the bar is called; None for one that is not shown.
    initial: how many units are done already.
    unit: the name of a unit.
    position: the line of the terminal, from 0, for one of several bars, which vanishes at the end.
  """
  terminal = sys.stderr.isatty()
  return _Bar(
    total=total,
    initial=initial,
    desc=description,
    disable=description is None,
    unit=unit,
    file=sys.stderr if terminal else _Lines(),
    dynamic_ncols=terminal,
    bar_format=_TERMINAL if terminal else _LINE,
    mininterval=0.2 if terminal else 15.0,
    smoothing=0.1,
    position=position,
    leave=position is None,
  )


class _Bar(tqdm):
  """A bar that tells times once there are any, and does not tell the same progress twice."""

  _displayed = -1

  @property
  def format_dict(self) -> dict[str, Any]:
    """The values that the format of the bar names."""
    values: dict[str, Any] = super().format_dict
    return {**values, 'times': _times(**values)}

  def update(self, n: float | None = 1) -> bool | None:
    """Adds to the progress, and tells the observer."""
    shown: bool | None = super().update(n)
    if observer is not None and not self.disable:
      observer(self.desc, int(self.n), int(self.total))
    return shown

  def display(self, *args: Any, **kwargs: Any) -> None:
    """Shows the bar unless it has shown this progress already, as tqdm does again at the end."""
    if self.n != self._displayed:
      super().display(*args, **kwargs)
    self._displayed = self.n


def _times(
  n: int, total: int, initial: int, elapsed: float, rate: float | None, unit: str, **_: Any
) -> str:
  """Returns the time gone, the time left and the speed, in words; nothing before the first unit."""
  if n <= initial or elapsed <= 0.0:
    return ''
  rate = rate or (n - initial) / elapsed
  speed = f'{rate:.1f} {unit}s/s' if rate >= 1.0 else f'{1.0 / rate:.1f} s/{unit}'
  gone, left = (tqdm.format_interval(seconds) for seconds in (elapsed, (total - n) / rate))
  return f', {gone} gone, {left} left, {speed}'


class _Lines:
  """A file that writes every state of a bar on a line of its own, and not over the last one."""

  def write(self, text: str) -> None:
    line = text.strip('\r\n ')
    if line:
      sys.stderr.write(f'{line}\n')

  def flush(self) -> None:
    sys.stderr.flush()


def write_line(text: str) -> None:
  """Prints a line to standard error, above the bars that are there."""
  tqdm.write(text, file=sys.stderr)


def warn(message: str) -> None:
  """Prints a warning to standard error."""
  print(f'warning: {message}', file=sys.stderr)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Returns a Markdown table, without a newline at the end."""
  header = list(header)
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)


@contextlib.contextmanager
def advancing_bar(
  description: str, check: Callable[[], None], unit: str = 'attack'
) -> Iterator[Callable[[int, int], None]]:
  """A bar for work that says how much of it is done, and may begin in the middle.

  Args:
    description: what stands before the bar.
    check: called whenever the bar advances, and may raise to stop.
    unit: what is counted.

  Yields:
    A function of the number that is done and of all. The bar appears when it is first called.
  """
  with contextlib.ExitStack() as opened:
    bar: Any = None

    def advance(done: int, total: int) -> None:
      nonlocal bar
      if bar is None:
        bar = opened.enter_context(progress_bar(total, description, initial=done, unit=unit))
      bar.update(done - bar.n)
      if done == total:
        bar.close()
      check()

    yield advance
