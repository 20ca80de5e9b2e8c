"""Jobs in processes of this machine, side by side: one process a job, in a slot of its own."""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from experiments.cli import signals
from experiments.scheduling.display import Display
from experiments.scheduling.jobs import (
  LOG,
  LOOK_EVERY,
  AnyJob,
  Outcome,
  Report,
  ending,
  is_tried_again,
  waiting,
)
from experiments.scheduling.slots import Slot

_ROOT = Path(__file__).resolve().parents[2]


@dataclasses.dataclass(eq=False)
class _Child:
  """A running job. `number` is that of its slot, and `attempt` counts from 1."""

  job: AnyJob
  number: int
  attempt: int
  process: subprocess.Popen[bytes]
  outcome: Outcome | None = None


def run(
  jobs: Sequence[AnyJob],
  slots: Sequence[Slot],
  retries: int,
  cache_dir: Path,
  stop: signals.StopSignal,
  report: Report,
) -> None:
  """Runs every job, and reports what became of each.

  A job that fails does not stop the others. One whose directory another process uses is put off
  until it is free.

  Args:
    jobs: the jobs, in the order in which they start.
    slots: as many run side by side.
    retries: how often a job that failed, or was killed, is started again from its last checkpoint.
    cache_dir: the compiled programs, which all processes share.
    stop: asked several times a second; all processes then save their work.
    report: called for every job that is finished or has failed.

  Raises:
    Interrupted: when `stop` says so, after every process has saved its work.
  """
  scheduler = _Scheduler(jobs, slots, retries, cache_dir, report)
  with contextlib.closing(scheduler.display):
    try:
      scheduler.run(stop)
    finally:  # an error here leaves no process behind
      scheduler.stop()


class _Scheduler:
  def __init__(
    self,
    jobs: Sequence[AnyJob],
    slots: Sequence[Slot],
    retries: int,
    cache_dir: Path,
    report: Report,
  ) -> None:
    self._waiting = collections.deque((job, 1) for job in jobs)
    self._slots = slots
    self._free = list(range(len(slots)))
    self._running: set[_Child] = set()
    self._news: queue.Queue[tuple[_Child, dict[str, Any] | None]] = queue.Queue()
    self._retries, self._cache_dir, self._report = retries, cache_dir, report
    self._told: set[str] = set()
    self._looked = -LOOK_EVERY
    self.display = Display(len(jobs), len(slots))

  def run(self, stop: signals.StopSignal) -> None:
    while self._waiting or self._running:
      stop.check()
      self._start_what_fits(stop)
      with contextlib.suppress(queue.Empty):
        self._hear(*self._news.get(timeout=0.2))

  def stop(self) -> None:
    """Lets every process save its work and end, and waits for it."""
    if self._running:
      self.display.line(f'saving {len(self._running)} runs')
    for child in self._running:
      child.process.send_signal(signal.SIGTERM)
    for child in self._running:
      child.process.wait()

  def _start_what_fits(self, stop: signals.StopSignal) -> None:
    """Fills the free slots with jobs whose directories are free."""
    if not self._free or time.monotonic() < self._looked + LOOK_EVERY:
      return
    for _ in range(len(self._waiting)):
      if not self._free:
        return
      stop.check()  # a look at many directories in use takes seconds
      job, attempt = self._waiting.popleft()
      user = job.user()
      if user is not None:
        self._put_off(job, attempt, user)
      elif (outcome := job.finished()) is not None:
        self._end(job, outcome)
      else:
        self._start(job, attempt)
    if self._free and self._waiting:  # all that wait are in use
      self._looked = time.monotonic()

  def _put_off(self, job: AnyJob, attempt: int, user: str) -> None:
    if job.name not in self._told:
      self._told.add(job.name)
      self.display.line(waiting(job, user))
    self._waiting.append((job, attempt))

  def _start(self, job: AnyJob, attempt: int) -> None:
    number = self._free.pop(0)
    slot = self._slots[number]
    job.workdir.mkdir(parents=True, exist_ok=True)
    with (job.workdir / LOG).open('ab') as log:
      process = subprocess.Popen(
        [sys.executable, '-m', 'experiments.scheduling.worker'],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=log,
        env={**os.environ, **slot.environment(), 'PYTHONPATH': _python_path()},
        start_new_session=True,  # Ctrl-C is for this process, which tells the others
      )
    child = _Child(job, number, attempt, process)
    self._running.add(child)
    order = {
      'job': job.to_json(),
      'cores': slot.cores,
      'compilation_cache_dir': str(self._cache_dir),
    }
    assert process.stdin is not None
    with contextlib.suppress(BrokenPipeError):  # it has ended; its exit code says why
      process.stdin.write(f'{json.dumps(order)}\n'.encode())
      process.stdin.flush()
    threading.Thread(target=self._listen, args=(child,), daemon=True).start()

  def _listen(self, child: _Child) -> None:
    """Passes on what a process tells, and None when it has ended."""
    assert child.process.stdout is not None
    for line in child.process.stdout:
      with contextlib.suppress(ValueError):  # half a line of a process that was killed
        self._news.put((child, json.loads(line)))
    child.process.wait()
    self._news.put((child, None))

  def _hear(self, child: _Child, news: dict[str, Any] | None) -> None:
    if news is None:
      self._ended(child)
    elif 'progress' in news:
      self.display.progress(child.number, *news['progress'])
    else:
      child.outcome = Outcome(**news['outcome'])

  def _ended(self, child: _Child) -> None:
    self._running.remove(child)
    self._free.append(child.number)
    self._looked = -LOOK_EVERY
    self.display.clear(child.number)
    for pipe in (child.process.stdin, child.process.stdout):
      with contextlib.suppress(BrokenPipeError):
        if pipe is not None:
          pipe.close()
    job, outcome = child.job, child.outcome or Outcome(error=_death(child.process), again=True)
    if outcome.user is not None:
      self._put_off(job, child.attempt, outcome.user)
    elif is_tried_again(outcome, child.attempt, self._retries):
      self.display.line(
        f'{job.name}: {outcome.error}; started again ({child.attempt} of {self._retries} retries)'
      )
      self._waiting.appendleft((job, child.attempt + 1))
    else:
      self._end(job, outcome)

  def _end(self, job: AnyJob, outcome: Outcome) -> None:
    self._report(job, outcome)
    self.display.ended(f'{job.name}: {ending(outcome)}')


def _death(process: subprocess.Popen[bytes]) -> str:
  """How a process ended that had no time to say so."""
  code = process.returncode
  if code >= 0:
    return f'its process ended with exit code {code}'
  name = signal.Signals(-code).name
  more = ', perhaps because the memory is too small' if -code == signal.SIGKILL else ''
  return f'its process was killed ({name}{more})'


def _python_path() -> str:
  """The code of this process, for its children, wherever they start."""
  return os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get('PYTHONPATH')])])
