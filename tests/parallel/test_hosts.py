"""Two hosts with addresses of their own, as network namespaces with a cable between them."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from se_vae.storage import checkpoints
from tests.parallel.test_processes import (
  PATIENCE,
  ROOT,
  End,
  assert_same_but_for_rounding,
  ends,
  free_port,
  killed_at_the_end,
  run_alone,
  start,
)

DTYPE_PROMOTION = 'standard'  # optax takes part

ADDRESSES = ('192.0.2.1', '192.0.2.2')  # of a net that is kept for documentation: RFC 5737
# Long enough to be interrupted. Without the attack, whose signs make rounding grow, and with small
# steps: the rows of metrics still tell one batch from another.
LONGER = {
  'objective': 'vae',
  'learning_rate': 1e-6,
  'num_steps': 2000,
  'log_every': 100,
  'checkpoint_every': 100,
}


def ip(*arguments: str, check: bool = True) -> None:
  command = ['ip', *arguments]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  assert done.returncode == 0 or not check, f'{command}: {done.stderr}'


class Hosts:
  """Two network namespaces; a cable between them, which can be cut."""

  def __init__(self, names: tuple[str, str]) -> None:
    self.names = names

  def build(self) -> None:
    for name in self.names:
      ip('netns', 'add', name)
    first, second = self.names
    ip('link', 'add', first, 'netns', first, 'type', 'veth', 'peer', second, 'netns', second)
    for name, address in zip(self.names, ADDRESSES, strict=True):
      ip('-n', name, 'address', 'add', f'{address}/24', 'dev', name)
      ip('-n', name, 'link', 'set', 'lo', 'up')
      ip('-n', name, 'link', 'set', name, 'up')

  def remove(self) -> None:
    for name in self.names:  # and with them the ends of the cable
      ip('netns', 'delete', name, check=False)

  def cut(self) -> None:
    ip('-n', self.names[1], 'link', 'set', self.names[1], 'down')

  def mend(self) -> None:
    ip('-n', self.names[1], 'link', 'set', self.names[1], 'up')

  @contextlib.contextmanager
  def train(self, workdir: Path, **flags) -> Iterator[list[subprocess.Popen]]:
    """One process on each host, as a user starts them."""
    cluster = {'coordinator': f'{ADDRESSES[0]}:1234', 'num_processes': 2, **PATIENCE, **flags}
    processes = [
      start(workdir, within=('ip', 'netns', 'exec', name), process_id=number, **cluster)
      for number, name in enumerate(self.names)
    ]
    with killed_at_the_end(processes):
      yield processes


@pytest.fixture(scope='module')
def hosts() -> Iterator[Hosts]:
  if os.name != 'posix' or os.getuid() != 0:
    pytest.skip('network namespaces need root')
  if shutil.which('ip') is None:
    pytest.skip('needs `ip`, of the package iproute2')
  hosts = Hosts((f'a{os.getpid()}', f'b{os.getpid()}'))
  try:
    try:
      hosts.build()
    except AssertionError as error:  # as in a container without the right to do so
      pytest.skip(f'network namespaces cannot be made here: {error}')
    yield hosts
  finally:
    hosts.remove()


@pytest.mark.long
def test_a_host_is_known_by_its_address_on_the_cable(hosts):
  """Not by that of its name, nor by its loopback interface, at which the other cannot reach it."""
  program = 'from se_vae.parallel import connections as c; print(c.own_address("192.0.2.1:1234"))'
  for name, address in zip(hosts.names, ADDRESSES, strict=True):
    command = ['ip', 'netns', 'exec', name, sys.executable, '-c', program]
    assert subprocess.check_output(command, cwd=ROOT, text=True) == f'{address}\n'


@pytest.mark.slow  # as two processes on one host do, in test_processes.py
def test_two_hosts_train_as_one(tmp_path, hosts):
  """Though their name is of the loopback interface, as on Debian, where no other host can reach."""
  with hosts.train(tmp_path / 'hosts') as processes:
    found = ends(processes)
  assert [end.code for end in found] == [0, 0], found
  run_alone(tmp_path / 'alone')
  assert_same_but_for_rounding(tmp_path / 'hosts', tmp_path / 'alone')


def wait_for_checkpoint(workdir: Path, processes: list[subprocess.Popen], after: int = 0) -> int:
  """Returns the step of the newest checkpoint, once it is a later one."""
  while True:
    steps = [step for step, _ in checkpoints.steps(workdir / 'checkpoints')]
    if max(steps, default=0) > after:
      return max(steps)
    assert all(process.poll() is None for process in processes)
    time.sleep(0.02)


def errors(end: End) -> list[str]:
  """The lines that are no progress."""
  return [line for line in end.errors if not line.startswith('pretrain: ')]


@pytest.mark.slow
def test_a_cut_cable_ends_both_in_a_line_and_the_run_goes_on_when_it_is_mended(tmp_path, hosts):
  """A cut of a second changes nothing."""
  silence = 10
  with hosts.train(tmp_path / 'hosts', **LONGER, heartbeat_timeout=silence) as processes:
    step = wait_for_checkpoint(tmp_path / 'hosts', processes)
    hosts.cut()
    time.sleep(1.0)
    hosts.mend()
    wait_for_checkpoint(tmp_path / 'hosts', processes, after=step)
    hosts.cut()
    cut = time.monotonic()
    found = ends(processes)
    assert time.monotonic() - cut < silence + 30.0  # a few seconds, where the machine is idle
  hosts.mend()
  for end, other in zip(found, (1, 0), strict=True):
    assert end.code == 1, end
    (line,) = errors(end)
    assert line.startswith(f'error: lost process {other}: silent for {silence} s')
  loaded = checkpoints.load_latest(tmp_path / 'hosts' / 'checkpoints', on_damage=pytest.fail)
  assert 0 < loaded.tensors['step'] < LONGER['num_steps']
  with hosts.train(tmp_path / 'hosts', **LONGER) as processes:
    assert [end.code for end in ends(processes)] == [0, 0]
  run_alone(tmp_path / 'alone', **LONGER)
  paths = tmp_path / 'hosts', tmp_path / 'alone'
  assert_same_but_for_rounding(*paths, LONGER['num_steps'], tolerance=1e-4)  # 2e-5 was seen


@pytest.mark.slow
def test_a_silent_process_ends_all_others_in_a_line(tmp_path):
  """Those that do not watch it themselves hear of it before process 0 ends, which they watch."""
  cluster = {'coordinator': f'localhost:{free_port()}', 'num_processes': 3, **PATIENCE}
  flags = {**cluster, **LONGER, 'num_steps': 100_000, 'num_devices': 1, 'batch_size': 48}
  processes = [
    start(tmp_path, process_id=number, **{**flags, 'heartbeat_timeout': 10}) for number in range(3)
  ]
  with killed_at_the_end(processes):
    wait_for_checkpoint(tmp_path, processes)
    processes[2].send_signal(signal.SIGSTOP)
    found = ends(processes[:2])
  for end in found:
    assert end.code == 1, end
    (line,) = errors(end)
    assert line.startswith('error: lost process 2: silent for 10 s')
