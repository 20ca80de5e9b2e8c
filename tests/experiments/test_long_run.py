"""A run of 50,000 steps: its terms stay those of exact arithmetic, and nothing of it grows."""

from __future__ import annotations

import json
import os
import shutil
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import se_vae
from se_vae import objectives
from se_vae.gaussians import DiagonalGaussian
from se_vae.storage import checkpoints
from tests.experiments.test_faults import start

STEPS, EVERY = 50_000, 5_000
FLAGS = {
  **{'num_steps': STEPS, 'checkpoint_every': EVERY, 'log_every': 500, 'tensorboard': True},
  **{'hidden_units': 200, 'latent_dim': 64, 'pgd_steps': 5, 'dataset': 'mnist_5k'},
}
NUMBERS = {'gamma': 1.0, 'obs_var': 0.1}
RNG = np.random.default_rng(0)
X = RNG.random((50, 28, 28, 1))
X_ADV = np.clip(X + RNG.uniform(-0.2, 0.2, X.shape), 0.0, 1.0)
NOISE = RNG.standard_normal((50, FLAGS['latent_dim']))


def terms(params, dtype) -> objectives.SEElboTerms:
  """Encodes, decodes and takes the objective apart, all in one precision, without the models."""

  def network(part: str, x: jax.Array) -> jax.Array:
    layers = dict(params[part]['params'])
    if part == 'encoder':
      layers['Dense_9'] = layers.pop('GaussianHead_0')['Dense_0']
    *hidden, last = (layers[name] for name in sorted(layers))
    for layer in hidden:
      x = jax.nn.relu(affine(x, **layer))
    return affine(x, **last)

  def affine(x: jax.Array, kernel: jax.Array, bias: jax.Array) -> jax.Array:
    return jnp.matmul(x, kernel.astype(dtype), precision='highest') + bias.astype(dtype)[None]

  def encode(x: np.ndarray) -> DiagonalGaussian:
    flat = jnp.asarray(x, dtype).reshape(len(x), -1)
    return DiagonalGaussian(*jnp.split(network('encoder', flat), 2, axis=-1))

  q_a, q_b = encode(X), encode(X_ADV)
  z_a = q_a.mean + jnp.exp(0.5 * q_a.log_var) * jnp.asarray(NOISE, dtype)
  x_mean = network('decoder', z_a).reshape(X.shape)
  return objectives.se_elbo(jnp.asarray(X, dtype), x_mean, q_a, q_b, **NUMBERS)


def resources(process: int) -> tuple[int, int, int]:
  """Resident kilobytes, open files and memory maps."""
  place = Path(f'/proc/{process}')
  status = dict(line.split(':') for line in (place / 'status').read_text().splitlines())
  maps = (place / 'maps').read_text().count('\n')
  return int(status['VmRSS'].split()[0]), len(list((place / 'fd').iterdir())), maps


@pytest.mark.slow
def test_nothing_drifts_and_nothing_grows(tmp_path):
  workdir, kept = tmp_path / 'run', tmp_path / 'kept' / 'checkpoints'
  kept.mkdir(parents=True)
  process = start(workdir, **FLAGS)
  usage: dict[int, tuple[int, int, int]] = {}
  while process.poll() is None:
    for step, path in checkpoints.steps(workdir / 'checkpoints') if workdir.exists() else ():
      if step % EVERY == 0 and step not in usage:
        usage[step] = resources(process.pid)
        shutil.copy(path, kept / path.name)
    time.sleep(0.5)
  _, errors = process.communicate()
  assert process.returncode == 0, errors
  newest = checkpoints.steps(workdir / 'checkpoints')[0]
  assert newest[0] == STEPS
  shutil.copy(newest[1], kept / newest[1].name)

  # A term is a sum of at most 784 values of a network of 5 products; float32 has 6e-8.
  for step, path in checkpoints.steps(kept):
    (tmp_path / 'one' / 'checkpoints').mkdir(parents=True, exist_ok=True)
    shutil.copy(path, tmp_path / 'one' / 'checkpoints')
    _, params = se_vae.load_model(tmp_path / 'one')
    narrow = terms(params, jnp.float32)
    with jax.enable_x64(True):
      wide = terms(jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params), jnp.float64)
      wide = type(wide)(*map(np.asarray, wide))
    for name, a, b in zip(wide._fields, narrow, wide, strict=True):
      assert b.dtype == np.float64
      error = np.max(np.abs(np.asarray(a, np.float64) - b))
      assert error <= 1e-5 * max(1.0, np.max(np.abs(b))), (step, name, error)
    shutil.rmtree(tmp_path / 'one')
  assert len(checkpoints.steps(kept)) == STEPS // EVERY

  # The allocator gives memory back in steps, so halves of the run are compared by their highest.
  steps = sorted(usage)
  assert len(steps) >= 8, usage
  half = len(steps) // 2
  before, after = (
    np.max([usage[step] for step in part], axis=0) for part in (steps[:half], steps[half:])
  )
  memory, files, maps = after
  assert memory <= 1.05 * before[0] and maps <= 1.02 * before[2], usage
  assert files <= before[1] + 2, usage  # one may be written just now

  rows = [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]
  assert [row['step'] for row in rows] == list(range(500, STEPS + 1, 500))
  assert len(checkpoints.steps(workdir / 'checkpoints')) == 2
  (events,) = (workdir / 'tensorboard').iterdir()
  pictures = STEPS // EVERY  # those of each checkpoint
  assert events.stat().st_size < 1000 * len(rows) + 100_000 * pictures
  assert os.stat(workdir / 'metrics.jsonl').st_size < 1000 * len(rows)
