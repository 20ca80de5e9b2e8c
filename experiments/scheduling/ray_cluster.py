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
import shutil
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

from experiments.cli import app, devices, flags, signals
from experiments.scheduling import slots
from experiments.scheduling.display import Display
from experiments.scheduling.jobs import (
  LOG,
  LOOK_EVERY,
  AnyJob,
  Outcome,
  Report,
  attempt,
  compiled_programs,
  ending,
  from_json,
  is_tried_again,
  waiting,
)
from se_vae.config import ArgumentError

with epy.lazy_imports():  # Ray is an extra, and is imported for --ray_address alone
  import jax
  import ray
  from ray.util import scheduling_strategies

# Seconds in which a cluster has to answer.
_ANSWER = 8.0
# Seconds in which a node has to. Ray takes up to 70 to notice that one has died, with its defaults.
_NODE_ANSWER = 90.0
# Seconds in which tasks that are told to stop save their work.
_SAVE = 90.0


def parse_resources(text: str) -> dict[str, float]:
  """The amounts that 'cpu=2,gpu=0.5' names; a run takes one core if it does not say.

  Raises:
    ArgumentError: for another text, or if a run would take nothing.
  """
  found: dict[str, float] = {}
  for item in filter(None, text.split(',')):
    name, _, amount = (part.strip() for part in item.partition('='))
    name = name.lower() if name.lower() in ('cpu', 'gpu') else name
    try:
      value = float(amount)
    except ValueError:
      value = -1.0
    if not name or name in found or not 0.0 <= value < 1e6:
      raise ArgumentError('resources_per_run', f"must be like 'cpu=2,gpu=0.5', got {text!r}")
    found[name] = value
  found = {'cpu': 1.0, **found}
  if not any(found.values()):
    raise ArgumentError('resources_per_run', 'must not be nothing: all runs would start at once')
  return found


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
  _check_devices(jobs, resources)
  with _connected(address), _marked(workdir, jobs) as expected:
    _check_nodes(resources, expected)
    with contextlib.closing(Display(len(jobs), 0)) as display:
      _run_tasks(jobs, resources, retries, expected, stop, report, display)
  shutil.rmtree(compiled_programs(workdir), ignore_errors=True)


def _run_tasks(
  jobs: Sequence[AnyJob],
  resources: dict[str, float],
  retries: int,
  expected: dict[str, Any],
  stop: signals.StopSignal,
  report: Report,
  display: Display,
) -> None:
  # One call a process: JAX is started with the cores or the GPU of one run.
  task = ray.remote(max_calls=1, max_retries=retries, **_options(resources))(_work)

  def start(job: AnyJob) -> Any:
    values = job.with_absolute_paths().to_json()
    return task.options(name=job.name).remote(values, resources, expected)

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
          outcome = Outcome(error=_reason(error))  # Ray has started it again in vain
        if is_tried_again(outcome, number, retries):
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
      _, silent = ray.wait(list(running), num_returns=len(running), timeout=_SAVE)
      for reference in silent:
        display.line(f'{running[reference][0].name}: no answer; its last checkpoint stays')


def _work(
  order: dict[str, Any], resources: dict[str, float], expected: dict[str, Any]
) -> dict[str, Any]:
  """A task: does what is left of a job, in a process of its own; returns the outcome's values."""
  different = difference(expected)
  if different is not None:  # a node that has joined since
    return dataclasses.asdict(Outcome(error=f'node {platform.node()} {different[1]}', again=True))
  share = resources.get('gpu', 0.0)
  os.environ[devices.CORES_VARIABLE] = str(max(1, int(resources['cpu'])))
  os.environ |= slots.share_of_memory(share) if share else {}
  if not share and 'TPU' not in resources:  # Ray hides the GPUs of others only if a task has some
    jax.config.update('jax_platforms', 'cpu')
  logging.set_verbosity(logging.WARNING)
  job = from_json(order)
  job.workdir.mkdir(parents=True, exist_ok=True)
  app.use_compilation_cache(
    expected['compiled'] or f'{expected["compiled_here"]}/{platform.node()}'
  )
  devices.use_all_cores(job.batch_size, job.num_devices)
  with (job.workdir / LOG).open('a', buffering=1) as log, _copied_to(log):
    print(f'{job.name} on {platform.node()}, process {os.getpid()}', file=sys.stderr)
    try:
      with signals.StopSignal(second_ends=False).listening() as stop:
        outcome = attempt(job, stop)
        if outcome.user is not None:  # such as the process of a node that is dying
          print(waiting(job, outcome.user), file=sys.stderr)
        while outcome.user is not None:
          stop.check()
          time.sleep(LOOK_EVERY)
          outcome = attempt(job, stop)
    except signals.Interrupted:
      outcome = Outcome(error='stopped', again=True)  # by the user, or with the node
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


def _check_devices(jobs: Sequence[AnyJob], resources: dict[str, float]) -> None:
  """Raises ArgumentError for runs that ask for more devices than they take of a node."""
  most = int(resources.get('gpu', 0.0) or resources['cpu'])
  for job in jobs:
    if (job.num_devices or 1) > max(1, most):
      raise ArgumentError(('num_devices', 'resources_per_run'), f'a run has only {most} devices')


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
    if not separator or not (port.isascii() and port.isdecimal()) or not address.isprintable():
      raise ArgumentError('ray_address', f"must be 'auto' or HOST:PORT, got {address!r}")
    try:
      socket.create_connection((host, int(port)), timeout=_ANSWER / 2.0).close()
    except (OSError, OverflowError, ValueError) as error:  # ValueError: no name of a host
      raise ArgumentError('ray_address', f'{address} does not answer: {error}') from None
  # Ray cannot be told how long to wait, nor be interrupted while it does.
  patience = threading.Timer(_ANSWER, _give_up, [address])
  patience.daemon = True
  patience.start()
  handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
  with contextlib.redirect_stdout(sys.stderr):  # what Ray prints, until its very end, is no result
    try:
      ray.init(address, logging_level=std_logging.WARNING)
    except ConnectionError as error:
      here = 'no Ray cluster runs on this machine; start one with `ray start --head`, or name one'
      message = here if address == 'auto' and 'RAY_ADDRESS' not in os.environ else _reason(error)
      raise ArgumentError('ray_address', message) from None
    except (RuntimeError, ValueError) as error:
      raise ArgumentError('ray_address', f'{address}: {_reason(error)}') from None
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


def _reason(error: Exception) -> str:
  """What an error of Ray says, in a line; that of the task, if it is one."""
  if isinstance(error, ray.exceptions.RayTaskError):
    return f'{type(error.cause).__name__}: {error.cause}' if error.cause else str(error)[-300:]
  return str(error).strip().partition('\n')[0] or type(error).__name__


@contextlib.contextmanager
def _marked(workdir: Path, jobs: Sequence[AnyJob]) -> Iterator[dict[str, Any]]:
  """What every node must have, as `difference` takes it: among it a file in the work directory."""
  settings = [flags.absolute(job.settings()) for job in jobs]
  places = ('data_dir', 'init_from')
  names = {str(each[name]) for each in settings for name in places if each.get(name)}
  folders = {each['dataset'].partition(':')[2] for each in settings}
  token = uuid.uuid4().hex
  mark = workdir.absolute() / f'.shared_{token}'
  mark.parent.mkdir(parents=True, exist_ok=True)
  mark.write_text(token)
  chosen: str | None = jax.config.jax_compilation_cache_dir  # type: ignore[attr-defined]
  try:
    yield {
      'mark': str(mark),
      'token': token,
      'folders': sorted(name for name in names | folders if os.path.isabs(name)),
      'versions': devices.versions(),
      'compiled': chosen,
      'compiled_here': str(compiled_programs(workdir)),
    }
  finally:
    mark.unlink(missing_ok=True)


def _check_nodes(resources: dict[str, float], expected: dict[str, Any]) -> None:
  """Checks every node on which a task may run, before anything is trained.

  Raises:
    ArgumentError: if there is none, or one has other versions or another storage.
  """
  able = _able_nodes(resources)
  looks = [
    ray.remote(difference)
    .options(
      num_cpus=0,
      scheduling_strategy=scheduling_strategies.NodeAffinitySchedulingStrategy(
        node['NodeID'], soft=False
      ),
    )
    .remote(expected)
    for node in able.values()
  ]
  for node, reference in zip(able.values(), looks, strict=True):
    name = f'{node["NodeManagerHostname"]} ({node["NodeManagerAddress"]})'
    try:
      different = ray.get(reference, timeout=_NODE_ANSWER)
    except ray.exceptions.RayError as error:
      if node['NodeID'] not in _able_nodes(resources):
        continue  # it has died, so no task will run on it
      message = f'node {name} cannot run a task: {_reason(error)}'
      raise ArgumentError('ray_address', message) from None
    if different is not None:
      argument, message = different
      raise ArgumentError(argument, f'node {name} {message}')


def _able_nodes(resources: dict[str, float]) -> dict[str, dict[str, Any]]:
  """The nodes that live and have `resources`, by their ids.

  Raises:
    ArgumentError: if there is none.
  """
  of_ray = {'cpu': 'CPU', 'gpu': 'GPU'}
  wanted = {of_ray.get(name, name): amount for name, amount in resources.items()}
  able = {
    node['NodeID']: node
    for node in ray.nodes()
    if node['Alive']
    and all(node['Resources'].get(name, 0.0) >= amount for name, amount in wanted.items())
  }
  if not able:
    amounts = ', '.join(f'{name}={amount:g}' for name, amount in resources.items())
    raise ArgumentError('resources_per_run', f'no node of the cluster has {amounts}; ask for less')
  return able


def difference(expected: dict[str, Any]) -> tuple[str, str] | None:
  """What this node lacks: the argument that names it, and a message; None if it lacks nothing.

  Args:
    expected: `mark` and `token`, a file in the work directory and its content; `folders` that must
      be there; `versions` of the packages.
  """
  mark = Path(expected['mark'])
  if not mark.exists() or mark.read_text() != expected['token']:
    return 'workdir', f'does not share {mark.parent}; use storage that all nodes see'
  missing = [folder for folder in expected['folders'] if not Path(folder).is_dir()]
  if missing:
    return 'data_dir', f'has no directory {missing[0]}'
  here, there = devices.versions(), expected['versions']
  different = [name for name in there if here.get(name) != there[name]]
  if different:
    values = ', '.join(
      f'{name} {here.get(name, "missing")} there and {there[name]} here' for name in different
    )
    return 'ray_address', f'has other versions: {values}'
  return None
