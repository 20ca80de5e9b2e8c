"""Pretrained encoders that come with the package, each as the work directory of its run.

Their parameters are stored in float16, which halves the files, and computed with in float32. The
page on pretrained encoders has a card for each: data, settings, command and measured accuracy.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import jax
import numpy as np

from se_vae.config import ArgumentError
from se_vae.models import vae
from se_vae.storage import checkpoints, model_store

# The step and the SHA-256 of the file that each name stands for.
_CHECKPOINTS: dict[str, tuple[int, str]] = {
  'mnist_mlp_vae_latent128': (
    20000,
    'e0e1fffc1c289648f28f4447b90cd2ea6d1f0db4346627ddbc664a0972abb741',
  ),
  'mnist_mlp_se_smoothed_latent128': (
    10000,
    'a91f3b67d2251b5db624b083595f276cf08956c599ad1910d439c80b0b1fe747',
  ),
  'mnist_convnet_vae_latent128': (
    20000,
    '8484c342c93c2c46d37d490bb85886307866e3288d2d48adeaa4a24d9975e7ba',
  ),
  'mnist_convnet_se_smoothed_latent128': (
    10000,
    '714ef93b5d0265ee8725483fbdf9b414db11340671aa4a4afed899738121d830',
  ),
  'color_mnist_mlp_vae_latent128': (
    20000,
    '90902a7a23b5339192a3b841dbd1d632e58dcefbe86690e9316a8a631ad48dbd',
  ),
  'color_mnist_mlp_se_smoothed_latent128': (
    10000,
    'e18bc2627b6152773da70b354d1097ea96fa7d7606e1fc3e25d12b52f9d78942',
  ),
}

_FOLDER = Path(__file__).parent / 'encoders'
# What names a place on the machine where the run was made.
_PLACES = ('workdir', 'data_dir', 'cache_dir')


def names() -> tuple[str, ...]:
  """Returns the names that `load_pretrained` takes."""
  return tuple(_CHECKPOINTS)


def workdir(name: str) -> Path:
  """Returns the directory of a pretrained encoder, as of a run. It is only to be read.

  Raises:
    ArgumentError: for an unknown name.
  """
  if name not in _CHECKPOINTS:
    raise ArgumentError('name', f'must be one of {", ".join(_CHECKPOINTS)}, got {name!r}')
  return _FOLDER / name


def find(place: str | Path) -> Path:
  """Returns the directory that `place` stands for: a pretrained encoder's name, or else a path.

  A directory that has the name of an encoder is written with its path, as in './NAME'.
  """
  return workdir(str(place)) if place in _CHECKPOINTS else Path(place)


def load_pretrained(name: str) -> tuple[vae.VAE, vae.Params]:
  """Returns a pretrained model and its parameters, in float32.

  Args:
    name: such as 'mnist_mlp_se_smoothed_latent128'; `names` has them all.

  Raises:
    ArgumentError: for an unknown name.
    CheckpointError: if the file is missing or damaged.

  Example:
    >>> model, params = load_pretrained('mnist_mlp_vae_latent128')
    >>> x = np.zeros((5, 28, 28, 1), np.float32)
    >>> model.encode(params, x).mean.shape
    (5, 128)
  """
  directory = workdir(name) / model_store.CHECKPOINTS
  step, digest = _CHECKPOINTS[name]
  path = directory / f'checkpoint_{step:08d}_{digest}.safetensors'
  saved = model_store.restore(checkpoints.load(path))
  return saved.model, saved.params


def export(source: str | Path, destination: str | Path) -> Path:
  """Writes the newest checkpoint of a run as a pretrained encoder; returns the path of the file.

  Args:
    source: work directory of the run.
    destination: directory of the encoder, is made.
  """
  saved = model_store.load_saved(source)
  half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), saved.params)
  config: dict[str, Any] = saved.metadata['config'] | dict.fromkeys(_PLACES)
  if config.get('init_from'):
    config['init_from'] = Path(config['init_from']).name
  metadata = {name: saved.metadata[name] for name in ('model', 'versions')}
  metadata['data'] = {'digest': saved.metadata['data']['digest']}  # its source is a place too
  directory = Path(destination) / model_store.CHECKPOINTS
  return checkpoints.save(
    directory, saved.metadata['step'], {'params': half}, {**metadata, 'config': config}, keep=1
  )
