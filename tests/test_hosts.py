"""Several processes on loopback, two devices each: they train as one, stop as one, fail as one."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from experiments import pretrain, runtime
from experiments.settings import UsageError
from se_vae import checkpoints, sharding

DTYPE_PROMOTION = 'standard'  # optax takes part

ROOT = Path(__file__).parents[1]
TINY = {
  'hidden_units': 16,
  'latent_dim': 4,
  'pgd_steps': 2,
  'num_steps': 40,
  'log_every': 10,
  'checkpoint_every': 20,
}
SECONDS = 300.0  # for what takes ten on an idle machine; a deadlock is an error, not a wait


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('localhost', 0))
    return probe.getsockname()[1]


def start(workdir: Path, *, env: dict[str, str] | None = None, **flags) -> subprocess.Popen:
  """One process of the binary, as a user starts it."""
  flags = {'workdir': workdir, 'num_devices': 2, **TINY, **flags}
  return subprocess.Popen(
    [sys.executable, '-m', 'experiments.pretrain', *(f'--{k}={v}' for k, v in flags.items())],
    cwd=ROOT,
    env={**os.environ, **(env or {})},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


@contextlib.contextmanager
def pair(
  workdir: Path, *, own: tuple[dict, dict] = ({}, {}), **flags
) -> Iterator[list[subprocess.Popen]]:
  """Two processes that train together; `own` are further flags of each."""
  cluster = {'coordinator': f'localhost:{free_port()}', 'num_processes': 2}
  processes = [
    start(workdir, process_id=number, **cluster, **{**flags, **own[number]}) for number in (0, 1)
  ]
  try:
    yield processes
  finally:
    for process in processes:
      process.kill()
      process.communicate()


def ends(processes: list[subprocess.Popen]) -> list[tuple[int, str, str]]:
  """The exit code of each, what it printed, and its last line of errors."""
  found = []
  for process in processes:
    stdout, stderr = process.communicate(timeout=SECONDS)
    found.append((process.returncode, without_gloo(stdout), (stderr.splitlines() or [''])[-1]))
  return found


def without_gloo(text: str) -> str:
  """Gloo tells of its connections on standard output, sometimes two in a line."""
  return ''.join(line for line in text.splitlines(keepends=True) if '[Gloo]' not in line)


def wait_for(path: Path, processes: list[subprocess.Popen]) -> None:
  deadline = time.monotonic() + SECONDS
  while not path.exists():
    assert time.monotonic() < deadline and all(process.poll() is None for process in processes)
    time.sleep(0.02)


def rows(workdir: Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


def run_alone(workdir: Path, **changes) -> None:
  config = pretrain.PretrainConfig(workdir=str(workdir), **{'num_devices': 1, **TINY, **changes})
  pretrain.run(config, runtime.StopSignal())


@pytest.fixture(scope='module')
def alone(tmp_path_factory) -> Path:
  """The run of one process with one device."""
  workdir = tmp_path_factory.mktemp('alone')
  run_alone(workdir)
  return workdir


def assert_same_but_for_rounding(workdir: Path, expected: Path) -> None:
  """The gradient of a batch is summed in another order: a few times 1e-6 of each tensor's largest
  entry after the 40 steps here, which Adam and the selection's sign steps magnify."""
  mine, theirs = (
    checkpoints.load_latest(path / 'checkpoints', on_damage=pytest.fail)[0]
    for path in (workdir, expected)
  )
  assert mine.keys() == theirs.keys() and mine['step'] == TINY['num_steps']
  for name in (name for name in theirs if name.startswith('params/')):
    scale = np.abs(theirs[name]).max()
    np.testing.assert_allclose(
      mine[name], theirs[name], rtol=0.0, atol=1e-3 * scale + 1e-12, err_msg=name
    )
  for row, expected_row in zip(rows(workdir), rows(expected), strict=True):
    assert row['step'] == expected_row['step']
    np.testing.assert_allclose(row['loss'], expected_row['loss'], rtol=1e-5)


def test_two_processes_train_as_one_and_write_everything_once(tmp_path, alone):
  with pair(tmp_path) as processes:
    (code, printed, _), other = ends(processes)
  assert code == 0 and printed.startswith(f'{tmp_path}: step 40: ')
  assert other[:2] == (0, '')
  assert_same_but_for_rounding(tmp_path, alone)
  assert [step for step, _ in checkpoints.steps(tmp_path / 'checkpoints')] == [40, 20]
  assert len(json.loads((tmp_path / 'config.json').read_text())['devices']) == 4
  results = [json.loads((path / 'result.json').read_text()) for path in (tmp_path, alone)]
  np.testing.assert_allclose(results[0]['test']['elbo'], results[1]['test']['elbo'], rtol=1e-5)


def test_sigterm_to_one_stops_both_and_one_process_goes_on(tmp_path, alone):
  with pair(tmp_path) as processes:
    wait_for(tmp_path / 'config.json', processes)  # training begins: it compiles
    processes[1].send_signal(signal.SIGTERM)
    found = ends(processes)
  for code, _, last in found:
    assert code == 128 + signal.SIGTERM
    assert last.startswith('SIGTERM: saved. Run the same command again')
  ((step, _),) = checkpoints.steps(tmp_path / 'checkpoints')
  assert 0 < step < TINY['num_steps']
  run_alone(tmp_path)
  assert_same_but_for_rounding(tmp_path, alone)


def test_an_unreachable_coordinator_is_an_error_in_a_line(tmp_path):
  process = start(
    tmp_path / 'w',
    coordinator=f'localhost:{free_port()}',
    num_processes=2,
    process_id=1,
    join_timeout=1,
  )
  stdout, stderr = process.communicate(timeout=SECONDS)
  assert (process.returncode, stdout) == (1, '')
  (line,) = stderr.splitlines()
  assert line.startswith('error: localhost:') and 'within 1 s (--join_timeout)' in line
  assert not (tmp_path / 'w').exists()
