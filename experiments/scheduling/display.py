"""The progress of many runs: bars on a terminal, a line for each finished run in a log."""

from __future__ import annotations

import sys
from typing import Any

from experiments.cli import messages


class Display:
  """What the user sees of many runs.

  Args:
    num_runs: how many there are.
    num_bars: how many of them can show a bar at the same time.
  """

  def __init__(self, num_runs: int, num_bars: int) -> None:
    self._terminal = sys.stderr.isatty()
    self._bars: dict[int, Any] = {}
    self._num_runs, self._num_ended = num_runs, 0
    self._whole = None
    if self._terminal:
      self._whole = messages.progress_bar(num_runs, 'runs', unit='run', position=num_bars)

  def progress(self, place: int, text: str, done: int, total: int) -> None:
    """Shows at a place, from 0, how far its run is."""
    if not self._terminal:
      return
    bar = self._bars.get(place)
    if bar is None or bar.desc != text:
      self.clear(place)
      bar = messages.progress_bar(total, text, initial=done, position=place)
      self._bars[place] = bar
    bar.update(done - bar.n)

  def clear(self, place: int) -> None:
    """Removes the bar at a place."""
    if place in self._bars:
      self._bars.pop(place).close()

  def line(self, text: str) -> None:
    """Prints a line, above the bars."""
    messages.write_line(text)

  def ended(self, text: str) -> None:
    """Counts a run, and prints what became of it."""
    self._num_ended += 1
    self.line(f'[{self._num_ended}/{self._num_runs}] {text}')
    if self._whole is not None:
      self._whole.update(1)

  def close(self) -> None:
    """Removes all bars."""
    for place in list(self._bars):
      self.clear(place)
    if self._whole is not None:
      self._whole.close()
