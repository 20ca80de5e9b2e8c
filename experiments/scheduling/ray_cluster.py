"""Jobs on the nodes of a Ray cluster: each is a task, and its files are on storage that all share.

Ray shares the tasks out, streams what they print to the user, and starts a task again elsewhere if
its node dies; it then goes on from its last checkpoint.
"""

from __future__ import annotations

import contextlib
import dataclasses
import logging as std_logging
import os
import platform
import signal
import socket
import sys
import threading
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn, TextIO

from absl import logging
from etils import epy

from experiments.cli import app, devices, signals
from experiments.scheduling.display import Display
from experiments.scheduling.jobs import (
  LOG,
  AnyJob,
  Outcome,
  Report,
  attempt,
  compiled_programs,
  ending,
  from_json,
)
from se_vae.config import ArgumentError

with epy.lazy_imports():  # Ray is an extra, and is imported for --ray_address alone
  import ray
  from ray.util import scheduling_strategies

# Seconds in which a cluster, and each of its nodes, has to answer.
_ANSWER = 8.0
_NODE_ANSWER = 60.0
# Seconds in which tasks that are told to stop save their work.
_SAVE = 60.0
# Seconds between two attempts at a directory that another process, which may be dying, still uses.
_LOOK_EVERY = 2.0


def parse_resources(text: str) -> dict[str, float]:
  """The amounts that 'cpu=2,gpu=0.5' names; a run takes one core if it does not say.

  Raises:
    ArgumentError: for another text.
  """
  found: dict[str, float] = {}
  for item in filter(None, text.split(',')):
    name, _, amount = item.partition('=')
    try:
      found[name.strip()] = float(amount)
    except ValueError:
      found[name.strip()] = -1.0
  if not found or not all(name and 0.0 <= amount < 1e6 for name, amount in found.items()):
    raise ArgumentError('resources_per_run', f"must be like 'cpu=2,gpu=0.5', got {text!r}")
  return {'cpu': 1.0, **found}


def run(
  jobs: Sequence[AnyJob],
  address: str,
  resources: dict[str, float],
  retries: int,
  workdir: Path,
  stop: signals.StopSignal,
  report: Report,
) -> None:
  """Runs every job as a Ray task, and reports what became of each.

  Args:
    jobs: the jobs, in the order in which they start.
    address: of the cluster.
    resources: what each task takes of a node.
    retries: how often a job whose node died, or that failed, is started again.
    workdir: the directory of all jobs, on storage that the nodes share.
    stop: asked twice a second; all tasks then save their work.
    report: called for every job that is finished or has failed.

  Raises:
    ArgumentError: if the cluster does not answer, has no node with these resources, or has nodes
      that do not share the storage or have other versions. Nothing is trained then.
    Interrupted: when `stop` says so.
  """
  with _connected(address):
    _check_nodes(workdir, resources, jobs)
    display = Display(len(jobs), 0)
    with contextlib.closing(display):
      _run_tasks(jobs, resources, retries, stop, report, display)


def _run_tasks(
  jobs: Sequence[AnyJob],
  resources: dict[str, float],
  retries: int,
  stop: signals.StopSignal,
  report: Report,
  display: Display,
) -> None:
  # One call a process: JAX is started with the cores or the GPU of one run.
  task = ray.remote(max_calls=1, max_retries=retries, **_options(resources))(_work)

  def start(job: AnyJob) -> Any:
    return task.options(name=job.name).remote(job.with_absolute_paths().to_json(), resources['cpu'])

  running = {start(job): (job, 1) for job in jobs}
  try:
    while running:
      stop.check()
      ready, _ = ray.wait(list(running), timeout=0.5)
      for reference in ready:
        job, number = running.pop(reference)
        try:
          outcome = Outcome(**ray.get(reference))
        except ray.exceptions.RayError as error:
          outcome = Outcome(error=_first_line(error))  # Ray has started it again in vain
        if outcome.again and number <= retries:
          display.line(f'{job.name}: {outcome.error}; started again')
          running[start(job)] = job, number + 1
          continue
        report(job, outcome)
        display.ended(f'{job.name}: {ending(outcome)}')
  finally:
    if running:
      display.line(f'saving {len(running)} runs')
      for reference in running:
        ray.cancel(reference)
      ray.wait(list(running), num_returns=len(running), timeout=_SAVE)


def _work(order: dict[str, Any], num_cores: float) -> dict[str, Any]:
  """A task: does what is left of a job, in a process of its own; returns the outcome's values."""
  os.environ[devices.CORES_VARIABLE] = str(max(1, int(num_cores)))
  logging.set_verbosity(logging.WARNING)
  job = from_json(order)
  job.workdir.mkdir(parents=True, exist_ok=True)
  app.use_compilation_cache(str(compiled_programs(job.workdir.parent)))
  devices.use_all_cores(job.batch_size, job.pretraining.num_devices)
  with (job.workdir / LOG).open('a', buffering=1) as log, _copied_to(log):
    print(f'{job.name} on {platform.node()}, process {os.getpid()}', file=sys.stderr)
    try:
      with signals.StopSignal().listening() as stop:
        outcome = attempt(job, stop)
        while outcome.user is not None:  # such as the process of a node that is dying
          stop.check()
          time.sleep(_LOOK_EVERY)
          outcome = attempt(job, stop)
    except signals.Interrupted:
      outcome = Outcome(error='stopped')
    if outcome.error is not None:
      print(f'error: {outcome.error}', file=sys.stderr)
  return dataclasses.asdict(outcome)


@contextlib.contextmanager
def _copied_to(log: TextIO) -> Iterator[None]:
  """Writes to `log` too what is printed to standard error, which Ray streams to the user."""
  stream = sys.stderr

  class Both:
    def write(self, text: str) -> None:
      log.write(text)
      stream.write(text)

    def flush(self) -> None:
      stream.flush()

    def isatty(self) -> bool:
      return False

  with contextlib.redirect_stderr(Both()):  # type: ignore[type-var]
    yield


def _options(resources: dict[str, float]) -> dict[str, Any]:
  """The options of `ray.remote` for --resources_per_run."""
  others = {name: amount for name, amount in resources.items() if name not in ('cpu', 'gpu')}
  return {
    'num_cpus': resources['cpu'],
    'num_gpus': resources.get('gpu', 0.0),
    'resources': others or None,
  }


@contextlib.contextmanager
def _connected(address: str) -> Iterator[None]:
  """Connects this process with a cluster.

  Raises:
    ArgumentError: if there is none; Ray alone would look for it for minutes.
  """
  try:
    import ray
  except ImportError:
    raise ArgumentError('ray_address', "needs Ray: pip install '.[cluster]'") from None
  host, separator, port = address.removeprefix('ray://').rpartition(':')
  if address != 'auto':
    if not separator or not port.isdigit():
      raise ArgumentError('ray_address', f"must be 'auto' or HOST:PORT, got {address!r}")
    try:
      socket.create_connection((host, int(port)), timeout=_ANSWER / 2.0).close()
    except (OSError, OverflowError) as error:
      raise ArgumentError('ray_address', f'{address} does not answer: {error}') from None
  # Ray cannot be told how long to wait, nor be interrupted while it does.
  patience = threading.Timer(_ANSWER, _give_up, [address])
  patience.daemon = True
  patience.start()
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  try:
    ray.init(address, logging_level=std_logging.WARNING)
  except (ConnectionError, RuntimeError, ValueError) as error:
    if address == 'auto':
      message = (
        'no Ray cluster runs on this machine; start one with `ray start --head`, or name one'
      )
    else:
      message = f'{address}: {_first_line(error)}'
    raise ArgumentError('ray_address', message) from None
  finally:
    patience.cancel()
    for number, handler in handlers.items():  # Ray has put its own in their place
      signal.signal(number, handler)
  try:
    yield
  finally:
    ray.shutdown()


def _give_up(address: str) -> NoReturn:
  print(f'error: --ray_address: {address} is no Ray cluster that answers', file=sys.stderr)
  sys.stderr.flush()
  os._exit(2)


def _first_line(error: Exception) -> str:
  return str(error).strip().partition('\n')[0] or type(error).__name__


def _check_nodes(workdir: Path, resources: dict[str, float], jobs: Sequence[AnyJob]) -> None:
  """Checks every node on which a task may run, before anything is trained.

  Raises:
    ArgumentError: if there is none, or one has other versions or another storage.
  """
  wanted = {
    {'cpu': 'CPU', 'gpu': 'GPU'}.get(name, name): amount for name, amount in resources.items()
  }
  able = [
    node
    for node in ray.nodes()
    if node['Alive']
    and all(node['Resources'].get(name, 0.0) >= amount for name, amount in wanted.items())
  ]
  if not able:
    raise ArgumentError('resources_per_run', 'no node of the cluster has as much')
  folders = sorted({str(job.pretraining.data.data_dir) for job in jobs} - {'None'})
  token = uuid.uuid4().hex
  mark = workdir.absolute() / f'.shared_{token}'
  workdir.mkdir(parents=True, exist_ok=True)
  mark.write_text(token)
  try:
    looks = [
      ray.remote(look)
      .options(
        num_cpus=0,
        scheduling_strategy=scheduling_strategies.NodeAffinitySchedulingStrategy(
          node['NodeID'], soft=False
        ),
      )
      .remote(str(mark), folders)
      for node in able
    ]
    for node, reference in zip(able, looks, strict=True):
      name = f'{node["NodeManagerHostname"]} ({node["NodeManagerAddress"]})'
      try:
        seen = ray.get(reference, timeout=_NODE_ANSWER)
      except ray.exceptions.RayError as error:
        reason = str(error).strip().splitlines()[-1]
        raise ArgumentError('ray_address', f'node {name} cannot run a task: {reason}') from None
      check_node(name, seen, token, workdir)
  finally:
    mark.unlink()


def check_node(host: str, seen: dict[str, Any], token: str, workdir: Path) -> None:
  """Raises ArgumentError if a node does not see what this process sees."""
  if seen['token'] != token:
    raise ArgumentError(
      'workdir', f'node {host} does not share {workdir.absolute()}; use storage that all nodes see'
    )
  if seen['missing']:
    raise ArgumentError('data_dir', f'node {host} has no {seen["missing"][0]}')
  here = devices.versions()
  different = [name for name in here if seen['versions'].get(name) != here[name]]
  if different:
    values = ', '.join(
      f'{name} {seen["versions"].get(name, "missing")} there and {here[name]} here'
      for name in different
    )
    raise ArgumentError('ray_address', f'node {host} has other versions: {values}')


def look(mark: str, folders: list[str]) -> dict[str, Any]:
  """What a node sees of the storage and of the packages."""
  path = Path(mark)
  return {
    'token': path.read_text() if path.exists() else None,
    'missing': [folder for folder in folders if not Path(folder).is_dir()],
    'versions': devices.versions(),
  }
