"""Checkpoints: one safetensors file each, written atomically and verified in every byte.

The name `checkpoint_{step:08d}_{digest}.safetensors` holds the SHA-256 of the file, so that damage
to any byte shows, while the file stays plain safetensors. Tensors are named by their pytree path,
`params/encoder/...`, and the safetensors header holds one JSON document of metadata. Nothing is
pickled.

One process at a time may write to a directory of checkpoints. Any number may read it meanwhile.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

import jax
import numpy as np
import safetensors
import safetensors.numpy

from se_vae.storage import atomic_files, json_files

FORMAT = 1
# What safetensors both writes and reads as NumPy arrays; it writes float8, but cannot read it.
DTYPES = frozenset(
  ['bool', 'bfloat16', 'float16', 'float32', 'float64', 'complex64']
  + [f'{kind}{bits}' for kind in ('int', 'uint') for bits in (8, 16, 32, 64)]
)

_HEADER_KEY = 'se_vae'
_NAME = re.compile(r'checkpoint_([0-9]{8,})_([0-9a-f]{64})\.safetensors')


class CheckpointError(RuntimeError):
  """A checkpoint that cannot be written, read or used. The one-line message says which and why."""


class _Header(TypedDict):
  """The metadata that every checkpoint has."""

  format: int
  step: int


class Checkpoint(NamedTuple):
  """The content of a checkpoint whose every byte has been verified.

  Attributes:
    path: the file.
    tensors: the stored leaves, by their pytree paths.
    metadata: JSON values, among them 'format', 'step' and 'versions'.
  """

  path: Path
  tensors: dict[str, np.ndarray]
  metadata: dict[str, Any]

  def restore(self, template: Any) -> Any:
    """Returns the tensors as a pytree of NumPy arrays.

    Args:
      template: a pytree of arrays or `jax.ShapeDtypeStruct`; the checkpoint must hold every leaf
        with its shape and dtype, and no other.

    Raises:
      CheckpointError: naming every leaf that is missing, superfluous or of another shape or dtype.
    """
    expected = _named_leaves(template)
    extra = sorted(self.tensors.keys() - expected)
    differences = [f'{name!r} is not in the template' for name in extra]
    for name, leaf in expected.items():
      wanted = _described(leaf)
      if name not in self.tensors:
        differences.append(f'{name!r} is missing')
      elif (stored := _described(self.tensors[name])) != wanted:
        differences.append(f'{name!r} is {stored}, not {wanted}')
    if differences:
      raise CheckpointError(f'{self.path}: does not fit: {"; ".join(differences)}')
    leaves = [self.tensors[name] for name in expected]
    return jax.tree.unflatten(jax.tree.structure(template), leaves)


def save(
  directory: str | Path, step: int, tree: Any, metadata: Mapping[str, Any], *, keep: int = 2
) -> Path:
  """Writes a checkpoint, then removes those that are no longer needed.

  At every moment the directory holds the previous checkpoint or this one, complete, even after a
  power cut. Older checkpoints are read again before they count towards `keep`.

  Args:
    directory: is made if it is missing.
    step: >= 0; another checkpoint of the same step is replaced.
    tree: a pytree of arrays and numbers of `DTYPES`.
    metadata: JSON values; tuples come back as lists. 'format', 'step' and, where it is missing,
      'versions' are added.
    keep: how many good checkpoints to keep, >= 1.

  Returns:
    The path of the new file.

  Raises:
    CheckpointError: if the file cannot be written; the older ones stay.
    TypeError, ValueError: if step or keep is out of range, or tree or metadata cannot be stored.
  """
  if step < 0 or keep < 1:
    raise ValueError(f'step must be >= 0 and keep >= 1, got {step} and {keep}')
  data = _serialise(step, tree, metadata)
  path = Path(directory) / f'checkpoint_{step:08d}_{hashlib.sha256(data).hexdigest()}.safetensors'
  try:
    atomic_files.make_directory(path.parent)
    # Only one process writes at a time, so these are of killed ones.
    atomic_files.remove_leftovers(path.parent, 'checkpoint_*')
    atomic_files.write(path, data)
  except OSError as error:
    raise CheckpointError(f'{path}: cannot be written: {error.strerror or error}') from error
  _prune(path, step, keep)
  return path


def steps(directory: str | Path) -> list[tuple[int, Path]]:
  """Returns steps and paths of the checkpoints of a directory, newest first.

  Only names are looked at. Links and other names are ignored.

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


def load(path: str | Path) -> Checkpoint:
  """Returns the content of one checkpoint.

  Raises:
    CheckpointError: if the file is missing or damaged.
  """
  match = _NAME.fullmatch(Path(path).name)
  if match is None:
    raise CheckpointError(f'{path}: is not named checkpoint_<step>_<sha256>.safetensors')
  try:
    with open(path, 'rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    if digest != match[2]:
      raise CheckpointError(f'{path}: damaged, its SHA-256 is not the one in its name')
    with safetensors.safe_open(path, framework='np') as stored:
      tensors = {name: stored.get_tensor(name) for name in stored.offset_keys()}
      document = (stored.metadata() or {}).get(_HEADER_KEY, '')
    metadata = dict(json_files.loads(document.encode(), _Header))
  except OSError as error:
    raise CheckpointError(f'{path}: cannot be read: {error.strerror or error}') from error
  # NumPy types that only a foreign writer makes come out as AttributeError or ValueError.
  except (safetensors.SafetensorError, AttributeError, ValueError) as error:
    raise CheckpointError(f'{path}: is not a checkpoint: {" ".join(str(error).split())}') from error
  if metadata['format'] != FORMAT:
    raise CheckpointError(f'{path}: its metadata is not of format {FORMAT}')
  if metadata['step'] != int(match[1]):
    raise CheckpointError(f'{path}: renamed, it is of step {metadata["step"]}')
  return Checkpoint(Path(path), tensors, metadata)


def load_latest(directory: str | Path, *, on_damage: Callable[[str], object]) -> Checkpoint | None:
  """Returns the newest good checkpoint; None if there is none at all.

  Args:
    directory: may be missing.
    on_damage: called with one line for each newer checkpoint that is damaged.

  Raises:
    CheckpointError: if there are checkpoints but none is good.
  """
  candidates = steps(directory)
  for _, path in candidates:
    try:
      return load(path)
    except CheckpointError as error:
      on_damage(str(error))
  if not candidates:
    return None
  # Beside a writer, newer checkpoints may have replaced all that were listed.
  if steps(directory) != candidates:
    return load_latest(directory, on_damage=on_damage)
  raise CheckpointError(f'{directory}: none of its {len(candidates)} checkpoints is good')


def _named_leaves(tree: Any) -> dict[str, Any]:
  """Returns the leaves by path, in the order of `jax.tree.leaves`.

  Raises:
    ValueError: if two leaves have the same path.
  """
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = {jax.tree_util.keystr(path, simple=True, separator='/'): leaf for path, leaf in leaves}
  if len(named) < len(leaves):
    raise ValueError(f"two leaves have the same path joined by '/', among {', '.join(named)}")
  return named


def _dtype(leaf: Any) -> str:
  """Returns the name of the dtype of an array, a `jax.ShapeDtypeStruct` or a number."""
  return str(leaf.dtype if hasattr(leaf, 'dtype') else np.asarray(leaf).dtype)


def _described(leaf: Any) -> str:
  return f'{_dtype(leaf)}{list(np.shape(leaf))}'


def _serialise(step: int, tree: Any, metadata: Mapping[str, Any]) -> bytes:
  """Returns the content of a checkpoint's file."""
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
  text = json.dumps(document, allow_nan=False)
  json_files.loads(text.encode(), _Header)  # raises for what could not be read again
  return safetensors.numpy.save(tensors, {_HEADER_KEY: text})


def _prune(written: Path, step: int, keep: int) -> None:
  """Removes others of this step, and all that are older than the `keep` newest good checkpoints.

  `written` stays even if newer checkpoints exist, since those may be damaged. They are read.
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
      with contextlib.suppress(CheckpointError):
        load(path)
        good += 1
