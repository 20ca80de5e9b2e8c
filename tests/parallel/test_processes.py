"""Several processes on loopback, two devices each: they train as one, stop as one, fail as one."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from experiments import pretrain
from experiments.cli import distributed, flags, signals, workdirs
from se_vae.config import ArgumentError
from se_vae.parallel import connections, processes
from se_vae.storage import checkpoints
from tests.experiments.test_app import exit_code

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part

ROOT = Path(__file__).parents[2]
TINY = {
  'tensorboard': False,
  'hidden_units': 16,
  'latent_dim': 4,
  'pgd_steps': 2,
  'num_steps': 40,
  'log_every': 10,
  'checkpoint_every': 20,
  'optimizer': 'sgd',  # Adam divides by the size of gradients, and so of rounding where they vanish
  'learning_rate': 1e-4,
}
SECONDS = 300.0  # for what takes ten on an idle machine; a deadlock is an error, not a wait
PATIENCE = {'join_timeout': 200, 'heartbeat_timeout': 300}  # with a machine that is not idle


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start(
  workdir: Path, *, env: dict[str, str] | None = None, within: Sequence[str] = (), **flags
) -> subprocess.Popen:
  """One process of the binary, as a user starts it; `within` is a command that runs commands."""
  flags = {'workdir': workdir, 'num_devices': 2, **TINY, **flags}
  # JAX warns of proxies, which tests have so that nothing is downloaded.
  inherited = {name: value for name, value in os.environ.items() if not name.endswith('_PROXY')}
  return subprocess.Popen(
    [
      *within,
      sys.executable,
      '-m',
      'experiments.pretrain',
      *(f'--{k}={v}' for k, v in flags.items()),
    ],
    cwd=ROOT,
    env={**inherited, **(env or {})},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@contextlib.contextmanager
def killed_at_the_end(processes: list[subprocess.Popen]) -> Iterator[list[subprocess.Popen]]:
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


@contextlib.contextmanager
def pair(
  workdir: Path, *, own: tuple[dict, dict] = ({}, {}), **flags
) -> Iterator[list[subprocess.Popen]]:
  """Two processes that train together; `own` are further flags of each."""
  cluster = {'coordinator': f'localhost:{free_port()}', 'num_processes': 2, **PATIENCE}
  processes = [
    start(**{'workdir': workdir, 'process_id': number, **cluster, **flags, **own[number]})
    for number in (0, 1)
  ]
  with killed_at_the_end(processes):
    yield processes


class End(NamedTuple):
  """Of a process: its exit code, what it printed, and the lines of its standard error."""

  code: int
  printed: str
  errors: list[str]

  @property
  def last(self) -> str:
    return self.errors[-1] if self.errors else ''


def ends(processes: list[subprocess.Popen]) -> list[End]:
  found = []
  for process in processes:
    stdout, stderr = process.communicate(timeout=SECONDS)
    found.append(End(process.returncode, stdout, stderr.splitlines()))
  return found


def without_gloo(text: str) -> str:
  """Without the words in which Gloo tells who joined: its threads break each other's lines."""
  words = r'\[Gloo\]|Rank|is|connected|to|peer|ranks|Expected|number|of|[\d\s.:]'
  return re.sub(words, '', text)


def wait_for(path: Path, processes: list[subprocess.Popen]) -> None:
  deadline = time.monotonic() + SECONDS
  while not path.exists():
    assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
    time.sleep(0.02)


def rows(workdir: Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def run_alone(workdir: Path, **changes) -> None:
  values = {'workdir': str(workdir), 'num_devices': 1, **TINY, **changes}
  pretrain.run(flags.from_dict(pretrain.PretrainConfig, values), signals.StopSignal())


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> Path:
  """The run of one process with one device."""
  workdir = tmp_path_factory.mktemp('alone')
  run_alone(workdir)
  return workdir


def assert_same_but_for_rounding(
  workdir: Path, expected: Path, num_steps: int = TINY['num_steps'], tolerance: float = 1e-5
) -> None:
  """A gradient's sum in another order: 2e-7 of each tensor's largest entry, on one machine."""
  mine, theirs = (
    checkpoints.load_latest(path / 'checkpoints', on_damage=pytest.fail).tensors
    for path in (workdir, expected)
  )
  assert mine.keys() == theirs.keys() and mine['step'] == num_steps
  for name in (name for name in theirs if name.startswith('params/')):
    atol = tolerance * np.abs(theirs[name]).max()
    np.testing.assert_allclose(mine[name], theirs[name], rtol=0.0, atol=atol, err_msg=name)
  for row, expected_row in zip(rows(workdir), rows(expected), strict=True):
    assert row['step'] == expected_row['step']
    np.testing.assert_allclose(row['loss'], expected_row['loss'], rtol=1e-5)


def test_two_processes_train_as_one_and_write_everything_once(tmp_path, alone):
  elsewhere = tmp_path / 'of process 1'
  own = {}, {'workdir': elsewhere}
  with pair(tmp_path, own=own, tensorboard=True) as processes:
    first, second = ends(processes)
  assert first.code == 0, first.errors
  before, result, _ = first.printed.partition(f'{tmp_path}: step 40: ')
  assert result and without_gloo(before) == ''
  assert (second.code, without_gloo(second.printed)) == (0, ''), second.errors
  assert_same_but_for_rounding(tmp_path, alone)
  assert not elsewhere.exists() and len(list((tmp_path / 'tensorboard').iterdir())) == 1
  assert [step for step, _ in checkpoints.steps(tmp_path / 'checkpoints')] == [40, 20]
  assert len(json.loads((tmp_path / 'config.json').read_text())['devices']) == 4
  results = [json.loads((path / 'result.json').read_text()) for path in (tmp_path, alone)]
  np.testing.assert_allclose(results[0]['test']['elbo'], results[1]['test']['elbo'], rtol=1e-5)


@pytest.mark.slow  # a fast test of how all agree on a signal is below
def test_sigterm_to_one_stops_both_and_one_process_goes_on(tmp_path, alone):
  """The two read their shares of the batches, the one reads whole ones."""
  with pair(tmp_path) as processes:
    wait_for(tmp_path / 'config.json', processes)  # training begins: it compiles
    processes[1].send_signal(signal.SIGTERM)
    found = ends(processes)
  for end in found:
    assert end.code == 128 + signal.SIGTERM, end.errors
    assert end.last.startswith('SIGTERM: saved. Run the same command again')
  ((step, _),) = checkpoints.steps(tmp_path / 'checkpoints')
  assert 0 < step < TINY['num_steps']
  run_alone(tmp_path)
  assert_same_but_for_rounding(tmp_path, alone)


SHARES = """
import json, pathlib, sys
import numpy as np
from se_vae.parallel import processes, sharding

address, number, path = sys.argv[1:]
processes.join(address, 2, int(number))
images, read = np.arange(16, dtype=np.uint8)[:, None], set()

class Spied:
  shape, dtype = images.shape, images.dtype

  def __getitem__(self, rows):
    read.update(rows.ravel().tolist())
    return images[rows]

indices = np.arange(16).reshape(2, 8)
array = sharding.split_rows(sharding.data_mesh(), Spied(), indices)
shares = [np.asarray(shard.data).ravel().tolist() for shard in array.addressable_shards]
signum = processes.maximum(15 * int(number))  # as a run asks after each dispatch; 1 got SIGTERM
pathlib.Path(path).write_text(json.dumps([sorted(read), shares, signum]))
"""


def test_each_process_holds_its_share_of_a_batch_alone_and_all_hear_of_a_signal(tmp_path):
  address = f'localhost:{free_port()}'
  environment = {**os.environ, 'XLA_FLAGS': '--xla_force_host_platform_device_count=2'}
  paths = [tmp_path / str(number) for number in range(2)]
  processes = [
    subprocess.Popen(
      [sys.executable, '-c', SHARES, address, str(number), path],
      cwd=ROOT,
      env=environment,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
      text=True,
    )
    for number, path in enumerate(paths)
  ]
  for end in ends(processes):
    assert end.code == 0, end.errors
  # Two steps of eight examples, on four devices.
  halves = [[[0, 1, 8, 9], [2, 3, 10, 11]], [[4, 5, 12, 13], [6, 7, 14, 15]]]
  for path, shares in zip(paths, halves, strict=True):
    assert json.loads(path.read_text()) == [sorted(shares[0] + shares[1]), shares, signal.SIGTERM]


def test_an_unreachable_coordinator_is_an_error_in_a_line(tmp_path):
  process = start(
    tmp_path / 'w',
    coordinator=f'localhost:{free_port()}',
    num_processes=2,
    process_id=1,
    join_timeout=1,
  )
  (end,) = ends([process])
  assert (end.code, end.printed) == (1, '')
  (line,) = end.errors
  assert line.startswith('error: localhost:') and 'within 1 s (--join_timeout)' in line
  assert not (tmp_path / 'w').exists()


def test_a_coordinator_that_others_cannot_reach_is_a_warning(monkeypatch, capsys):
  """As where the name of a host is 127.0.1.1 in its own /etc/hosts."""
  monkeypatch.setattr(connections, 'own_address', lambda coordinator: '127.0.1.1')
  for host, warns in (('debian', True), ('localhost', False), ('127.0.1.1', False)):
    cluster = distributed.Cluster(coordinator=f'{host}:1', num_processes=2, process_id=0)
    distributed._warn_of_loopback(cluster)
    assert ('debian is 127.0.1.1 on this host' in capsys.readouterr().err) == warns


def test_a_port_in_use_is_an_error_in_a_line(capsys):
  with socket.socket() as taken:
    taken.bind(('localhost', 0))
    taken.listen()
    address = f'localhost:{taken.getsockname()[1]}'
    cluster = distributed.Cluster(coordinator=address, num_processes=2, process_id=0)

    def main():
      with distributed.joined(cluster):
        pytest.fail('joined')

    assert exit_code(main) == 2
  (line,) = capsys.readouterr().err.splitlines()
  assert line.startswith(f'error: --coordinator: cannot listen at {address}: ')


# ---------------------------------------------------------------------------------------------
# Flags
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
  ('flags', 'message'),
  [
    ({'coordinator': 'a:1'}, 'num_processes, process_id: must be given too'),
    ({'num_processes': 2, 'process_id': 0}, 'coordinator: must be given too'),
    ({'coordinator': 'a', 'num_processes': 2, 'process_id': 0}, 'coordinator: must be host:port'),
    ({'coordinator': 'a:1', 'num_processes': 2, 'process_id': 2}, 'process_id: must be below'),
    ({'coordinator': 'a:1', 'num_processes': 0, 'process_id': 0}, 'num_processes: must be >= 1'),
    ({'coordinator': 'a:1', 'num_processes': 2, 'process_id': -1}, 'process_id: must be >= 0'),
    ({'join_timeout': 0}, 'join_timeout: must be >= 1'),
  ],
)
def test_flags_that_contradict_each_other_are_named(flags, message):
  with (
    pytest.raises(ArgumentError, match=message),
    distributed.joined(distributed.Cluster(**flags)),
  ):
    pytest.fail('joined')


def test_alone_nothing_is_joined_and_every_decision_is_one_s_own():
  with distributed.joined(distributed.Cluster()):
    assert processes.is_first()
    assert processes.maximum(7) == 7 and processes.maximum(-7) == -7
    assert processes.differing({'a': 1, 'b': 'x'}) == []
    assert processes.together(lambda a, b: a + b, 1, 2) == 3
    assert processes.on_first(divmod, 7, 2) == (3, 1)
    tree = {'a': np.arange(3), 'b': 1.5}
    assert processes.from_first(tree) is tree
    with pytest.raises(ZeroDivisionError):
      processes.together(divmod, 1, 0)
    with pytest.raises(ZeroDivisionError):  # and is not swallowed: this process is the first
      processes.on_first(divmod, 1, 0)


# ---------------------------------------------------------------------------------------------
# Faults
# ---------------------------------------------------------------------------------------------

ELSEWHERE = 'error: another process has failed, and reports the reason'
LONG = {'num_steps': 100_000, 'log_every': 50}


@pytest.mark.slow
@pytest.mark.parametrize('killed', [0, 1])
def test_the_death_of_one_ends_the_other_and_the_run_goes_on_from_its_checkpoint(tmp_path, killed):
  with pair(tmp_path, **LONG, heartbeat_timeout=30) as processes:
    while not checkpoints.steps(tmp_path / 'checkpoints'):
      wait_for(tmp_path / 'config.json', processes)
      time.sleep(0.1)
    processes[killed].kill()
    asked = time.monotonic()
    (end,) = ends([processes[1 - killed]])
  # At once where connections break, and when its heartbeat has been missed where they do not.
  assert time.monotonic() - asked < 90.0
  assert end.code in (1, -signal.SIGABRT), end.errors  # the latter if JAX's own watch is quicker
  if end.code == 1:
    assert end.last.startswith('error: lost ')
  ((before, _), *_) = checkpoints.steps(tmp_path / 'checkpoints')
  with pair(tmp_path, **LONG) as processes:
    while checkpoints.steps(tmp_path / 'checkpoints')[0][0] == before:
      wait_for(tmp_path / 'config.json', processes)
      time.sleep(0.1)
    processes[0].send_signal(signal.SIGINT)
    assert [end.code for end in ends(processes)] == [130, 130]


@pytest.mark.slow
def test_a_loss_that_is_not_finite_stops_both(tmp_path):
  diverging = {'learning_rate': 1e6, 'schedule': 'constant'}
  with pair(tmp_path, **diverging) as processes:
    found = ends(processes)
  for end in found:
    assert end.code == 1 and 'is not finite' in end.last, end.errors
  assert (tmp_path / 'not_finite.json').exists() and not (tmp_path / 'result.json').exists()


@pytest.mark.slow
def test_other_flags_in_one_process_are_named_by_both(tmp_path):
  with pair(tmp_path / 'w', own=({}, {'seed': 1, 'gamma': 2})) as processes:
    found = ends(processes)
  for end in found:
    assert end.code == 2, end.errors
    assert end.last == 'error: --gamma, --seed: must be the same in every process'
  assert not (tmp_path / 'w').exists()


@pytest.mark.slow
def test_an_error_of_one_process_ends_both(tmp_path):
  """A lock that is held, of process 0; data that are not there, of process 1."""
  with workdirs.lock(tmp_path / 'w'), pair(tmp_path / 'w') as processes:
    first, second = ends(processes)
  assert first.code == 2 and f'in use by process {os.getpid()}' in first.last
  assert (second.code, second.last) == (
    1,
    'error: another process has failed, and reports the reason',
  )
  with pair(tmp_path / 'v', own=({}, {'dataset': 'mnist', 'data_dir': '/no'})) as processes:
    first, second = ends(processes)
  assert (first.code, first.last) == (
    1,
    'error: another process has failed, and reports the reason',
  )
  assert second.code == 2 and '--data_dir' in second.last


@pytest.mark.slow
def test_processes_that_never_come_are_an_error_in_a_line(tmp_path):
  process = start(
    tmp_path / 'w',
    coordinator=f'localhost:{free_port()}',
    num_processes=2,
    process_id=0,
    join_timeout=2,
  )
  (end,) = ends([process])
  assert end.code == 1 and 'did not bring all processes together within 2 s' in end.last


@pytest.mark.slow
def test_a_slurm_job_needs_one_flag(tmp_path, alone):
  """The variables that srun sets, for two tasks on one node."""
  job = {
    'JAX_COORDINATOR_PORT': str(free_port()),
    'SLURM_JOB_ID': '1',
    'SLURM_STEP_NODELIST': 'localhost',
    'SLURM_NTASKS': '2',
  }
  processes = [
    start(
      tmp_path,
      distributed=True,
      **PATIENCE,
      env={**job, 'SLURM_PROCID': str(task), 'SLURM_LOCALID': str(task)},
    )
    for task in (0, 1)
  ]
  assert [end.code for end in ends(processes)] == [0, 0]
  assert_same_but_for_rounding(tmp_path, alone)


@pytest.mark.slow
def test_no_scheduler_is_an_error_in_a_line(tmp_path):
  process = start(tmp_path / 'w', distributed=True)
  (end,) = ends([process])
  assert end.code == 2 and end.last.startswith('error: --distributed: ')
