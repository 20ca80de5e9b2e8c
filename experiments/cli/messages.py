"""What a binary prints for its user: progress, warnings and tables."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from typing import Any

from tqdm import tqdm


def progress_bar(
  total: int | None, description: str, *, initial: int = 0, unit: str = 'step'
) -> Any:
  """Returns a progress bar for a terminal, or one that writes a line every 15 s to a log file.

  Args:
    total: the number of units of work; None if it is not known yet.
    description: what the bar is called.
    initial: how many units are done already.
    unit: the name of a unit.
  """
  terminal = sys.stderr.isatty()
  return (_Bar if terminal else _Lines)(
    total=total,
    initial=initial,
    desc=description,
    unit=unit,
    file=sys.stderr,
    dynamic_ncols=terminal,
    leave=terminal,
    bar_format='{desc}: |{bar}| {state}{postfix}' if terminal else '{desc}: {state}{postfix}',
    mininterval=0.2 if terminal else 15.0,
    smoothing=0.1,
  )


class _Bar(tqdm):  # type: ignore[type-arg]
  """A bar whose `state` is what is done, and the pace as soon as there is one."""

  @property
  def format_dict(self) -> dict[str, Any]:
    values = super().format_dict
    n, total, elapsed, unit = (values[name] for name in ('n', 'total', 'elapsed', 'unit'))
    state = f'{n}/{total}' if total else 'started'
    if total and elapsed and n > values['initial']:
      rate = values['rate'] or (n - values['initial']) / elapsed
      left = self.format_interval((total - n) / rate)
      state += f', {self.format_interval(elapsed)} gone, {left} left, {rate:.3g} {unit}/s'
    return values | {'state': state}


class _Lines(_Bar):
  """A bar that writes every new state on a line of its own, and not over the last one."""

  def display(self, msg: str | None = None, pos: int | None = None) -> bool:  # also at the end
    if self.n != getattr(self, '_written', None):
      self._written = self.n
      self.fp.write(f'{self}\n')
      self.fp.flush()
    return False


def warn(message: str) -> None:
  """Prints a warning to standard error."""
  print(f'warning: {message}', file=sys.stderr)


def markdown_table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
  """Returns a Markdown table, without a newline at the end."""
  header = list(header)
  lines = [header, ['---'] * len(header), *rows]
  return '\n'.join(f'| {" | ".join(line)} |' for line in lines)
