"""What the tests of checkpoints share: small trees, a small model, and what they assert."""

from __future__ import annotations

import errno
import os
import pathlib
from typing import Any, NoReturn

import jax
import numpy as np
import pytest

from se_vae import training
from se_vae.models import vae
from se_vae.storage import checkpoints
from se_vae.storage.checkpoints import CheckpointError

MODEL: dict[str, Any] = {
  'image_shape': [4, 4, 1],
  'latent_dim': 2,
  'hidden_units': 3,
  'num_layers': 2,
}


def make_model() -> vae.VAE:
  return vae.make_vae((4, 4, 1), latent_dim=2, hidden_units=3, num_layers=2)


def make_state() -> training.TrainState:
  """A TrainState whose every leaf is different from what initialisation makes."""
  model, config = make_model(), training.TrainConfig()
  shapes = jax.eval_shape(lambda: training.init_state(model, config, jax.random.key(0)))
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda leaf: np.asarray(100 * rng.standard_normal(leaf.shape)).astype(leaf.dtype), shapes
  )


def small(value: int) -> dict[str, Any]:
  return {'a': np.full((2, 3), value, np.float32), 'b': np.int32(value)}


def save_small(directory: pathlib.Path, *values: int, keep: int = 9) -> list[pathlib.Path]:
  return [checkpoints.save(directory, value, small(value), {}, keep=keep) for value in values]


def restore_small(directory: pathlib.Path) -> tuple[int, list[str]]:
  """The step of the newest good checkpoint, and the damages reported on the way to it."""
  damages: list[str] = []
  found = checkpoints.load_latest(directory, on_damage=damages.append)
  assert found is not None
  step: int = found.metadata['step']
  assert_same(found.restore(small(0)), small(step))
  return step, damages


def structure(tree: Any) -> Any:
  return jax.tree.structure(tree)


def assert_same(actual: Any, expected: Any) -> None:
  assert structure(actual) == structure(expected)
  for one, other in zip(jax.tree.leaves(actual), jax.tree.leaves(expected), strict=True):
    assert isinstance(one, np.ndarray)
    assert (one.dtype, one.shape) == (other.dtype, other.shape)
    assert one.tobytes() == np.asarray(other).tobytes()


def never(damage: str) -> NoReturn:
  raise AssertionError(damage)


def assert_one_line(error: pytest.ExceptionInfo[CheckpointError], *words: Any) -> None:
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert str(word) in message


def listed(directory: pathlib.Path) -> list[int]:
  return [step for step, _ in checkpoints.steps(directory)]


def raise_no_space(*_args: Any, **_kwargs: Any) -> NoReturn:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
