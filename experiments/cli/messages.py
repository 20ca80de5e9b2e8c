"""What a binary tells its user as it goes: progress, warnings, tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_LINE = '{desc}: {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}'


def progress_bar(total: int, description: str, *, initial: int = 0, unit: str = 'step') -> Any:
  """A bar with rate and time left on a terminal, and a line every now and then in a log file."""
  terminal = sys.stderr.isatty()
  return tqdm(
    total=total,
    initial=initial,
    desc=description,
    unit=unit,
    file=sys.stderr if terminal else _Lines(),
    dynamic_ncols=terminal,
    bar_format=None if terminal else _LINE,
    mininterval=0.2 if terminal else 15.0,
    smoothing=0.1,
  )


class _Lines:
  """A file that puts every state of a bar into a line of its own, instead of over the last."""

  def write(self, text: str) -> None:
    line = text.strip('\r\n ')
    if line:
      sys.stderr.write(f'{line}\n')

  def flush(self) -> None:
    sys.stderr.flush()


def warn(message: str) -> None:
  """Tells the user of something that the run can go on without."""
  print(f'warning: {message}', file=sys.stderr)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """The lines of a Markdown table."""
  header = list(header)
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
