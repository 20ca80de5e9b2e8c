"""Sweeps of tiny encoders as their users start them, for tests of slots and clusters."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from experiments.scheduling.placement import PlacementConfig
from se_vae.storage import checkpoints

ALONE = PlacementConfig(parallel='1')  # one run after the other, in the process of the test

ROOT = Path(__file__).parents[2]
TRAINING = '--objective=vae --hidden_units=16 --latent_dim=4 --log_every=20 --notensorboard'
ATTACK = '--radii=0,0.1 --num_examples=20 --pgd_steps=2 --check_examples=0'


def start(workdir: Path, *flags: str, **environment: str) -> subprocess.Popen[str]:
  """Starts a sweep."""
  command = [sys.executable, '-m', 'experiments.sweep', f'--workdir={workdir}', *TRAINING.split()]
  return subprocess.Popen(
    [*command, f'--probe={ATTACK}', *flags],
    cwd=ROOT,
    env={**os.environ, **environment},
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def end(process: subprocess.Popen[str], seconds: float = 240.0) -> tuple[int, str, str]:
  """Waits for the end: exit code, standard output, standard error."""
  out, err = process.communicate(timeout=seconds)
  return process.returncode, out, err


def run(workdir: Path, *flags: str, **environment: str) -> tuple[int, str, str]:
  """A sweep, to its end."""
  return end(start(workdir, *flags, **environment))


def wait_until(
  condition: Callable[[], object], process: subprocess.Popen[str] | None, seconds: float = 120.0
) -> None:
  """Waits for something that must come, while a process runs if there is one."""
  deadline = time.monotonic() + seconds
  while not condition():
    assert process is None or process.poll() is None, process.communicate()
    assert time.monotonic() < deadline, 'it never came'
    time.sleep(0.02)


def assert_same_runs(workdir: Path, expected: Path, names: set[str]) -> None:
  """Every run is the same in both sweeps, bit for bit."""
  for name in names:
    assert_same_run(workdir / name, expected / name)


def assert_same_run(run: Path, expected: Path) -> None:
  """The same parameters, states, rows of metrics and accuracies, bit for bit."""
  mine, theirs = (
    checkpoints.load_latest(path / 'checkpoints', on_damage=_no_damage) for path in (run, expected)
  )
  assert mine is not None and theirs is not None, run.name
  assert mine.tensors.keys() == theirs.tensors.keys()
  for key, value in theirs.tensors.items():
    np.testing.assert_array_equal(mine.tensors[key], value, err_msg=f'{run.name}: {key}')
  for file in ('metrics.jsonl', 'probe_digit.csv'):
    assert (run / file).read_bytes() == (expected / file).read_bytes(), run.name


def _no_damage(message: str) -> None:
  raise AssertionError(message)
