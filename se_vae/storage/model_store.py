"""Models in a work directory: saved by a notebook or by a run, and loaded with their parameters.

A model is the newest good checkpoint in the directory `checkpoints` of the work directory. Its
tensors `params/...` are the parameters, and its metadata['model'] holds the arguments of
`vae.make_vae`.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from se_vae.config import ArgumentError
from se_vae.models import vae
from se_vae.storage import checkpoints
from se_vae.storage.checkpoints import CheckpointError

CHECKPOINTS = 'checkpoints'
CONFIG = 'config.json'


class SavedModel(NamedTuple):
  """A model with its parameters, and the checkpoint that they come from.

  Attributes:
    model: the model.
    params: its parameters.
    metadata: of the checkpoint.
    path: of the checkpoint.
  """

  model: vae.VAE
  params: vae.Params
  metadata: dict[str, Any]
  path: Path


def save_model(workdir: str | Path, params: vae.Params, **arguments: Any) -> Path:
  """Saves parameters for `load_model`, in place of what an earlier call saved there.

  Args:
    workdir: is made if it is missing.
    params: the parameters.
    **arguments: those of `vae.make_vae` that made the model; none for networks of your own.

  Returns:
    The path of the checkpoint.

  Raises:
    ArgumentError: if the directory belongs to a training run.
    ValueError: if `vae.make_vae` does not take the arguments, or makes a model with parameters of
      other shapes or dtypes. float16 may stand for float32.
    CheckpointError: if the file cannot be written.
  """
  directory = Path(workdir) / CHECKPOINTS
  steps = [step for step, _ in checkpoints.steps(directory)]
  if any(steps) or (Path(workdir) / CONFIG).exists():
    raise ArgumentError(
      'workdir', f'{workdir} holds a training run, which would be lost; choose another directory'
    )
  # JSON knows none of NumPy's numbers.
  arguments = jax.tree.map(lambda v: v.item() if isinstance(v, np.generic) else v, arguments)
  if arguments:
    try:
      _, expected = _make(arguments)
    except (KeyError, TypeError) as error:
      raise ValueError(f'make_vae does not take {arguments}: {error}') from error
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
      raise ValueError(f'the parameters are not those of make_vae with {arguments}')
    dtypes = {np.asarray(leaf).dtype.name for leaf in jax.tree.leaves(params)}
    if wrong := dtypes - {'float16', 'float32'}:
      raise ValueError(f'the parameters must be float32 or float16, got {", ".join(sorted(wrong))}')
  metadata = {'model': arguments or None}
  return checkpoints.save(directory, 0, {'params': params}, metadata, keep=1)


def load_model(workdir: str | Path, model: vae.VAE | None = None) -> tuple[vae.VAE, vae.Params]:
  """Returns the model in a work directory and its newest good parameters.

  Args:
    workdir: as in `load_saved`.
    model: as in `load_saved`.

  Raises:
    CheckpointError: if there is no good checkpoint, or it does not hold such a model.

  Example:
    >>> import tempfile
    >>> arguments = {'image_shape': (2, 2, 1), 'latent_dim': 3, 'num_layers': 1}
    >>> params = vae.make_vae(**arguments).init(jax.random.key(0))
    >>> with tempfile.TemporaryDirectory() as workdir:
    ...   path = save_model(workdir, params, **arguments)
    ...   model, params = load_model(workdir)
    >>> model.encode(params, jnp.zeros((5, 2, 2, 1))).mean.shape
    (5, 3)
  """
  saved = load_saved(workdir, model)
  return saved.model, saved.params


def _warn(damage: str) -> None:
  warnings.warn(damage, stacklevel=4)


def load_saved(
  workdir: str | Path,
  model: vae.VAE | None = None,
  *,
  on_damage: Callable[[str], object] = _warn,
) -> SavedModel:
  """Returns the model in a work directory with its newest good checkpoint.

  A damaged checkpoint is passed over.

  Args:
    workdir: of a run, or of `save_model`.
    model: a model with networks of your own; None for a model of `vae.make_vae`.
    on_damage: called with one line for each newer checkpoint that is damaged; warns by default.

  Raises:
    CheckpointError: if there is no good checkpoint, or it does not hold such a model.
  """
  directory = Path(workdir) / CHECKPOINTS
  found = checkpoints.load_latest(directory, on_damage=on_damage)
  if found is None:
    raise CheckpointError(f'{directory}: there is no checkpoint')
  return restore(found, model)


def restore(found: checkpoints.Checkpoint, model: vae.VAE | None = None) -> SavedModel:
  """Returns the model of a checkpoint; parameters in half precision come back in single.

  Args:
    found: the checkpoint.
    model: as in `load_saved`.

  Raises:
    CheckpointError: if the checkpoint does not hold such a model.
  """
  path, tensors, metadata = found
  if model is not None:
    template = _shapes(model)
  elif metadata.get('model', {}) is None:
    raise CheckpointError(
      f'{path}: has parameters of networks of your own; pass the model as an argument'
    )
  else:
    try:
      model, template = _make(metadata['model'])
    except (KeyError, TypeError, ValueError) as error:
      reason = f'{type(error).__name__} {" ".join(str(error).split())}'
      message = f"{path}: its metadata['model'] describes no model: {reason}"
      raise CheckpointError(message) from error
  stored = {
    name: tensor.astype(np.float32) if tensor.dtype == np.float16 else tensor
    for name, tensor in tensors.items()
    if name.startswith('params/')
  }
  params = found._replace(tensors=stored).restore({'params': template})['params']
  return SavedModel(model, jax.tree.map(jnp.asarray, params), metadata, path)


def _make(arguments: Mapping[str, Any]) -> tuple[vae.VAE, vae.Params]:
  """Returns the model that `vae.make_vae` makes, and the shapes of its parameters.

  Raises:
    TypeError, ValueError: if the arguments describe no model.
  """
  model = vae.make_vae(**arguments)
  try:
    return model, _shapes(model)
  except OverflowError as error:
    raise ValueError(f'a size is too large: {error}') from error


def _shapes(model: vae.VAE) -> vae.Params:
  return jax.eval_shape(model.init, jax.random.key(0))
