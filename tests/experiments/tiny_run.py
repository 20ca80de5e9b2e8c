"""A tiny encoder of colour MNIST, and a short attack on it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from experiments import pretrain, recording
from experiments.cli import flags, signals

TINY = {'hidden_units': 16, 'latent_dim': 4, 'num_steps': 20}
ATTACK = {'radii': (0.0, 0.05), 'pgd_steps': 2, 'num_examples': 40, 'check_examples': 0}


@contextlib.contextmanager
def unexamined() -> Iterator[None]:
  """Trained models are not measured, and not drawn: half of the programs of a run are for that."""
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(recording.Examiner, 'examine', lambda *_: ({}, {}))
    yield


def train(directory: Path, **changes: Any) -> Path:
  """Trains the encoder, and returns its directory. Files that use it share what is compiled."""
  values = {'workdir': str(directory), 'objective': 'vae', 'dataset': 'color_mnist_5k', **TINY}
  values |= {'log_every': 10, 'tensorboard': False, 'num_devices': 1, **changes}
  with unexamined():
    pretrain.run(flags.from_dict(pretrain.PretrainConfig, values), signals.StopSignal())
  return directory
