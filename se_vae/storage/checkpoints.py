"""Checkpoints: one safetensors file each, written atomically and verified in every byte.

`checkpoint_{step:08d}_{digest}.safetensors` carries in its name the SHA-256 of all of its bytes, so
that damage to any of them shows, while the file stays plain safetensors. Tensors are named by their
pytree path, `params/encoder/...`, and the safetensors header holds one JSON document of metadata.
Nothing is pickled.

One process at a time writes a directory; any number may read it meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import safetensors
import safetensors.numpy

from se_vae.models import vae
from se_vae.storage import atomic_files

FORMAT = 1
# What safetensors both writes and reads as NumPy arrays; it writes float8, but cannot read it.
DTYPES = frozenset(
  ['bool', 'bfloat16', 'float16', 'float32', 'float64', 'complex64']
  + [f'{kind}{bits}' for kind in ('int', 'uint') for bits in (8, 16, 32, 64)]
)

Tensors = dict[str, np.ndarray]
Metadata = dict[str, Any]

_HEADER_KEY = 'se_vae'
_NAME = re.compile(r'checkpoint_([0-9]{8,})_([0-9a-f]{64})\.safetensors')


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written, read or used; one line that says which and why."""


def save(
  directory: str | Path, step: int, tree: Any, metadata: Mapping[str, Any], *, keep: int = 2
) -> Path:
  """Writes a checkpoint, then removes those that it makes superfluous.

  At every moment, a power cut included, the directory holds the checkpoint before this one or this
  one, complete. Older checkpoints are read again before they count towards `keep`.

  Args:
    directory: made if need be.
    step: >= 0; another checkpoint of the same step is replaced.
    tree: a pytree of arrays and numbers of `DTYPES`.
    metadata: JSON values; tuples come back as lists. 'format', 'step' and, where it is missing,
      'versions' are added.
    keep: how many good checkpoints to keep, >= 1.

  Returns:
    The new file.

  Raises:
    CheckpointError: if the file cannot be written; the older ones are still there.
    TypeError, ValueError: if step or keep is out of range, or tree or metadata cannot be stored.
  """
  if step < 0 or keep < 1:
    raise ValueError(f'step must be >= 0 and keep >= 1, got {step} and {keep}')
  data = _serialise(step, tree, metadata)
  path = Path(directory) / f'checkpoint_{step:08d}_{hashlib.sha256(data).hexdigest()}.safetensors'
  try:
    atomic_files.make_directory(path.parent)
    atomic_files.remove_leftovers(path.parent, 'checkpoint_*')  # of dead ones: there is one writer
    with atomic_files.replacing(path) as file:
      file.write(data)
  except OSError as error:
    raise CheckpointError(f'{path}: cannot be written: {error.strerror or error}') from error
  _prune(path, step, keep)
  return path


def steps(directory: str | Path) -> list[tuple[int, Path]]:
  """The checkpoints of a directory by name alone, newest first; links and other names are ignored.

  Raises:
    CheckpointError: if the directory exists but cannot be listed.
  """
  try:
    with os.scandir(directory) as entries:
      names = [entry.name for entry in entries if entry.is_file(follow_symlinks=False)]
  except FileNotFoundError:
    return []
  except OSError as error:
    raise CheckpointError(f'{directory}: cannot be listed: {error.strerror}') from error
  matches = filter(None, map(_NAME.fullmatch, names))
  return sorted(((int(match[1]), Path(directory) / match[0]) for match in matches), reverse=True)


def load(path: str | Path) -> tuple[Tensors, Metadata]:
  """The tensors of one checkpoint by name, and its metadata.

  Raises:
    CheckpointError: if the file is missing or damaged.
  """
  match = _NAME.fullmatch(Path(path).name)
  if match is None:
    raise CheckpointError(f'{path}: is not named checkpoint_<step>_<sha256>.safetensors')
  try:
    if _digest(path) != match[2]:
      raise CheckpointError(f'{path}: damaged, its SHA-256 is not the one in its name')
    with safetensors.safe_open(path, framework='np') as file:
      tensors = {name: file.get_tensor(name) for name in file.offset_keys()}
      metadata = json.loads((file.metadata() or {}).get(_HEADER_KEY, 'null'))
  except OSError as error:
    raise CheckpointError(f'{path}: cannot be read: {error.strerror or error}') from error
  # The last three are how NumPy types and JSON that only a foreign writer makes come out.
  except (safetensors.SafetensorError, AttributeError, ValueError, RecursionError) as error:
    raise CheckpointError(f'{path}: is not a checkpoint: {_one_line(error)}') from error
  if not isinstance(metadata, dict) or metadata.get('format') != FORMAT:
    raise CheckpointError(f'{path}: its metadata is not of format {FORMAT}')
  if metadata.get('step') != int(match[1]):
    raise CheckpointError(f'{path}: renamed, it is of step {metadata.get("step")!r}')
  return tensors, metadata


def restore(path: str | Path, template: Any) -> tuple[Any, Metadata]:
  """One checkpoint as a pytree of NumPy arrays, and its metadata.

  Args:
    path: the file.
    template: a pytree of arrays or `jax.ShapeDtypeStruct`; every leaf must be there with its shape
      and dtype, and no other.

  Raises:
    CheckpointError: if the file is missing or damaged, or does not fit the template.
  """
  tensors, metadata = load(path)
  return _fill(path, template, tensors), metadata


def load_latest(
  directory: str | Path, *, on_damage: Callable[[str], None]
) -> tuple[Tensors, Metadata] | None:
  """`load` of the newest good checkpoint; None where there is no checkpoint at all.

  Args:
    directory: may be missing.
    on_damage: called with one line for each checkpoint that had to be passed over.

  Raises:
    CheckpointError: if there are checkpoints but none is good.
  """
  found = _newest_good(directory, on_damage)
  return None if found is None else found[1:]


def restore_latest(
  directory: str | Path, template: Any, *, on_damage: Callable[[str], None]
) -> tuple[Any, Metadata] | None:
  """`restore` of the newest good checkpoint; None where there is no checkpoint at all.

  A checkpoint that is whole but does not fit the template is the wrong one, not a damaged one: no
  older one is tried.

  Args:
    directory: may be missing.
    template: as for `restore`.
    on_damage: called with one line for each checkpoint that had to be passed over.

  Raises:
    CheckpointError: if there are checkpoints but none is good, or the one found does not fit.
  """
  found = _newest_good(directory, on_damage)
  if found is None:
    return None
  path, tensors, metadata = found
  return _fill(path, template, tensors), metadata


class Run(NamedTuple):
  """What a run's newest good checkpoint says of it."""

  model: vae.VAE
  params: vae.Params
  metadata: Metadata
  path: Path


def save_model(workdir: str | Path, params: vae.Params, **arguments: Any) -> Path:
  """Saves parameters for `load_model`, in place of what an earlier call saved there.

  Args:
    workdir: made if need be.
    params: the parameters.
    **arguments: those of `vae.make_vae` that made the model; none for networks of your own.

  Returns:
    The checkpoint.

  Raises:
    ValueError: if `vae.make_vae` does not take the arguments, or its model other parameters.
  """
  if arguments:
    _, expected = _model_of(arguments)
    if jax.tree.map(np.shape, params) != jax.tree.map(np.shape, expected):
      raise ValueError(f'the parameters are not those of make_vae with {arguments}')
  metadata = {'model': arguments or None}
  return save(Path(workdir) / 'checkpoints', 0, {'params': params}, metadata, keep=1)


def load_model(workdir: str | Path, model: vae.VAE | None = None) -> tuple[vae.VAE, vae.Params]:
  """The model of a run and its newest good parameters: the first two of `load_run`.

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
  return load_run(workdir, model)[:2]


def load_run(workdir: str | Path, model: vae.VAE | None = None) -> Run:
  """The model of a run, its newest good parameters, and the metadata they were saved with.

  Damaged checkpoints are passed over with a warning.

  Args:
    workdir: of the run, with its checkpoints in `checkpoints/`, whose tensors `params/...` are the
      parameters.
    model: with networks of your own; if None, the checkpoint's metadata['model'] holds the
      arguments of `vae.make_vae`.

  Raises:
    CheckpointError: if there is no good checkpoint, or it does not hold such a model.
  """
  directory = Path(workdir) / 'checkpoints'
  found = _newest_good(directory, lambda damage: warnings.warn(damage, stacklevel=2))
  if found is None:
    raise CheckpointError(f'{directory}: there is no checkpoint')
  path, tensors, metadata = found
  if model is not None:
    template = _shapes_of(model)
  elif metadata.get('model', {}) is None:
    raise CheckpointError(
      f'{path}: is of networks of your own, which it does not hold: hand them over'
    )
  else:
    try:
      model, template = _model_of(metadata['model'])
    except (KeyError, TypeError, ValueError) as error:
      reason = f'{type(error).__name__} {_one_line(error)}'
      message = f"{path}: its metadata['model'] describes no model: {reason}"
      raise CheckpointError(message) from error
  stored = {name: tensor for name, tensor in tensors.items() if name.startswith('params/')}
  params = jax.tree.map(jnp.asarray, _fill(path, {'params': template}, stored)['params'])
  return Run(model, params, metadata, path)


def _model_of(arguments: Mapping[str, Any]) -> tuple[vae.VAE, vae.Params]:
  """The model that `vae.make_vae` makes of these, and its parameters' shapes."""
  model = vae.make_vae(**{**arguments, 'image_shape': tuple(arguments['image_shape'])})
  return model, _shapes_of(model)


def _shapes_of(model: vae.VAE) -> vae.Params:
  return jax.eval_shape(model.init, jax.random.key(0))


def _named_leaves(tree: Any) -> dict[str, Any]:
  """The leaves by path, in the order of `jax.tree.leaves`; ValueError where two share a name."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
  if len(named) < len(leaves):
    raise ValueError(f"two leaves have the same path joined by '/', among {', '.join(named)}")
  return named


def _dtype(leaf: Any) -> str:
  """The name of the dtype of an array, a `jax.ShapeDtypeStruct` or a number."""
  return str(leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype)


def _serialise(step: int, tree: Any, metadata: Mapping[str, Any]) -> bytes:
  """The bytes of the file."""
  tensors = {}
  for name, leaf in _named_leaves(jax.device_get(tree)).items():
    if _dtype(leaf) not in DTYPES or name == '__metadata__':
      raise ValueError(f'leaf {name!r} of dtype {_dtype(leaf)} cannot be stored')
    # safetensors takes the buffer as it lies: a transposed view would be stored scrambled.
    tensors[name] = np.asarray(leaf, order='C')
  versions = {
    'python': platform.python_version(),
    'jax': jax.__version__,
    'numpy': np.__version__,
  }
  document = {'versions': versions, **metadata, 'format': FORMAT, 'step': int(step)}
  header = {_HEADER_KEY: json.dumps(document, allow_nan=False)}
  return safetensors.numpy.save(tensors, header)


def _prune(written: Path, step: int, keep: int) -> None:
  """Removes what is older than the `keep` newest good checkpoints, and others of this step.

  `written` stays even if newer names exist: they may all be damaged, which is why they are read.
  """
  good = 0
  for other_step, path in steps(written.parent):
    if path == written:
      good += 1
    elif other_step == step or good >= keep:
      # This checkpoint is safe already, and a leftover costs only space.
      with contextlib.suppress(OSError):
        path.unlink()
    else:
      good += _is_good(path)


def _is_good(path: Path) -> bool:
  try:
    load(path)
  except CheckpointError:
    return False
  return True


def _digest(path: str | Path) -> str:
  with open(path, 'rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def _one_line(error: Exception) -> str:
  return ' '.join(str(error).split())


def _newest_good(
  directory: str | Path, on_damage: Callable[[str], None]
) -> tuple[Path, Tensors, Metadata] | None:
  """The newest checkpoint that loads; None if there is none, CheckpointError if none loads."""
  candidates = steps(directory)
  for _, path in candidates:
    try:
      return path, *load(path)
    except CheckpointError as error:
      on_damage(str(error))
  if not candidates:
    return None
  # Reading beside a writer, all that was listed may have been replaced by newer ones.
  if steps(directory) != candidates:
    return _newest_good(directory, on_damage)
  raise CheckpointError(f'{directory}: none of its {len(candidates)} checkpoints is good')


def _fill(path: str | Path, template: Any, tensors: Tensors) -> Any:
  """The template's structure with the tensors for leaves; CheckpointError names all that differ."""
  expected = _named_leaves(template)
  problems = [f'{name!r} is not in the template' for name in sorted(tensors.keys() - expected)]
  for name, leaf in expected.items():
    wanted = f'{_dtype(leaf)}{list(np.shape(leaf))}'
    if name not in tensors:
      problems.append(f'{name!r} is missing')
    elif (stored := f'{tensors[name].dtype}{list(tensors[name].shape)}') != wanted:
      problems.append(f'{name!r} is {stored}, not {wanted}')
  if problems:
    raise CheckpointError(f'{path}: does not fit: {"; ".join(problems)}')
  return jax.tree.unflatten(jax.tree.structure(template), [tensors[name] for name in expected])
