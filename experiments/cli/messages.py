"""What a binary prints for its user: progress, warnings and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm

_LINE = '{desc}: {n_fmt}/{total_fmt}, {elapsed} gone, {remaining} left, {rate_fmt}{postfix}'


def progress_bar(total: int, description: str, *, initial: int = 0, unit: str = 'step') -> Any:
  """Returns a progress bar for a terminal, or one that writes a line every 15 s to a log file.

  Args:
    total: the number of units of work.
    description: what the bar is called.
    initial: how many units are done already.
    unit: the name of a unit.
  """
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
  """A file that writes every state of a bar on a line of its own, and not over the last one."""

  def write(self, text: str) -> None:
    line = text.strip('\r\n ')
    if line:
      sys.stderr.write(f'{line}\n')

  def flush(self) -> None:
    sys.stderr.flush()


def warn(message: str) -> None:
  """Prints a warning to standard error."""
  print(f'warning: {message}', file=sys.stderr)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Returns a Markdown table, without a newline at the end."""
  header = list(header)
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
