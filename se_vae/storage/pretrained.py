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
    '46fb67fb7126b928889da02a7560e97254c3feeabeae93a912e0a136f6f16f6f',
  ),
  'mnist_mlp_se_smoothed_latent128': (
    10000,
    'f2f48aad7eafa70923caa5f1ce460104df8f63142f3e1f2b55fac27ba228651a',
  ),
  'mnist_mlp_se_certified_latent128': (
    20000,
    'c823cdd326584ac3988e3d05d63e89d441ead1e58c0d4e566f4c1d8f84e40bc5',
  ),
  'mnist_mlp_clusters_latent30': (
    10000,
    '28c5d9ef57b55afb945f5536255ec8ae05fc219de2618522b775b184a73a8bd5',
  ),
  'mnist_convnet_vae_latent128': (
    20000,
    '486fa1b508ef553d8e762f4b191d75271a26d1df754db5bd94d5e3fb6ebcc58b',
  ),
  'mnist_convnet_se_smoothed_latent128': (
    10000,
    '84897e4381c8f37a4fa0641e2284b6772fe7d36610a3745047d73eec10759dfd',
  ),
  'mnist_convnet_se_certified_latent128': (
    6000,
    'a3bf82fba6dbb1a16b168526fff8c511846e0b07193fdf7da6b7c364c2d5e94f',
  ),
  'mnist_convnet_clusters_latent30': (
    6000,
    '7aaed3e1b58cc770f9ee6d05b624e5fb61f1f30ededc79b4548edb7fc1795ae6',
  ),
  'color_mnist_mlp_vae_latent128': (
    20000,
    'bb539939c3bfd5866c38f82f54061754129fb17a5ab75324785c146157e1101c',
  ),
  'color_mnist_mlp_se_smoothed_latent128': (
    10000,
    '81bb2462cbc485e3922f09ac7f21432377b1d62b16c1bcba4878810a8cf3914d',
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
    CheckpointError: unless the directory has the file of this name, undamaged, and no other.
  """
  _load(name)
  return _FOLDER / name


def _load(name: str) -> checkpoints.Checkpoint:
  if name not in _CHECKPOINTS:
    raise ArgumentError('name', f'must be one of {", ".join(_CHECKPOINTS)}, got {name!r}')
  directory = _FOLDER / name / model_store.CHECKPOINTS
  step, digest = _CHECKPOINTS[name]
  path = directory / f'checkpoint_{step:08d}_{digest}.safetensors'
  found = checkpoints.load(path)
  if others := [other.name for _, other in checkpoints.steps(directory) if other != path]:
    raise checkpoints.CheckpointError(f'{directory}: {others[0]} does not belong to this package')
  return found


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
    CheckpointError: if the file is missing, damaged or not alone.

  Example:
    >>> model, params = load_pretrained('mnist_mlp_vae_latent128')
    >>> x = np.zeros((5, 28, 28, 1), np.float32)
    >>> model.encode(params, x).mean.shape
    (5, 128)
  """
  saved = model_store.restore(_load(name))
  return saved.model, saved.params


def export(source: str | Path, destination: str | Path) -> Path:
  """Writes the newest checkpoint of a run as a pretrained encoder; returns the path of the file.

  Args:
    source: work directory of the run.
    destination: directory of the encoder, is made.

  Raises:
    ArgumentError: for a directory that no training run wrote.
    CheckpointError: if there is no good checkpoint.
  """
  saved = model_store.load_saved(source)
  if 'config' not in saved.metadata:
    raise ArgumentError('source', f'{source} holds no training run')
  half = jax.tree.map(lambda leaf: np.asarray(leaf, np.float16), saved.params)
  config: dict[str, Any] = saved.metadata['config'] | dict.fromkeys(_PLACES)
  if config.get('init_from'):
    config['init_from'] = Path(config['init_from']).name
  metadata = {name: saved.metadata[name] for name in ('model', 'versions')}
  # The source of the data is a place too; the name of the data set is none.
  metadata['data'] = {**saved.metadata['data'], 'source': config['dataset']}
  directory = Path(destination) / model_store.CHECKPOINTS
  return checkpoints.save(
    directory, saved.metadata['step'], {'params': half}, {**metadata, 'config': config}, keep=1
  )
