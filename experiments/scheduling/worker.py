"""The process of one run in a slot. `experiments.scheduling.processes` starts it.

It reads the job from standard input, and ends, as for SIGTERM, when its parent closes that: so no
run outlives the binary that it belongs to. Standard output carries messages, each a line of JSON:
the progress, and the outcome at the end. Whatever else is printed goes to standard error, the log.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import sys
import threading
from typing import Any

from absl import logging

from experiments.cli import app, devices, messages, signals
from experiments.scheduling import jobs


def main() -> None:
  """Does the job that standard input holds."""
  news = os.dup(1)
  os.dup2(2, 1)

  def tell(**values: Any) -> None:
    with contextlib.suppress(BrokenPipeError):  # the parent has died, and this process ends soon
      line = f'{json.dumps(values)}\n'.encode()
      while line:
        line = line[os.write(news, line) :]

  order = json.loads(sys.stdin.buffer.readline())
  threading.Thread(target=_end_with_parent, daemon=True).start()
  logging.set_verbosity(logging.WARNING)
  messages.observer = lambda text, done, total: tell(progress=[text, done, total])
  if order['cores']:
    os.sched_setaffinity(0, order['cores'])
  job = jobs.from_json(order['job'])
  app.use_compilation_cache(order['compilation_cache_dir'])
  devices.use_all_cores(job.batch_size, job.num_devices)
  try:
    with signals.StopSignal(second_ends=False).listening() as stop:
      outcome = jobs.attempt(job, stop)
  except signals.Interrupted as interrupted:
    print(f'{interrupted}: saved', file=sys.stderr)
    sys.exit(128 + interrupted.signum)
  if outcome.error is not None:
    print(f'error: {outcome.error}', file=sys.stderr)
  tell(outcome=dataclasses.asdict(outcome))


def _end_with_parent() -> None:
  while os.read(0, 4096):
    pass
  os.kill(os.getpid(), signal.SIGTERM)


if __name__ == '__main__':
  main()
