"""Tests of `se_vae.checkpoints`: round trips, damage, full disks, killed writers, foreign files."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import pathlib
import re
import resource
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

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
  found = checkpoints.restore_latest(directory, small(0), on_damage=damages.append)
  assert found is not None
  tree, metadata = found
  assert_same(tree, small(metadata['step']))
  return metadata['step'], damages


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


def forge(directory: pathlib.Path, data: bytes, step: int = 9) -> pathlib.Path:
  """A file whose name is right for its bytes, whatever they are."""
  name = f'checkpoint_{step:08d}_{hashlib.sha256(data).hexdigest()}.safetensors'
  path = pathlib.Path(directory) / name
  path.write_bytes(data)
  return path


def assert_one_line(error: pytest.ExceptionInfo[CheckpointError], *words: Any) -> None:
  message = str(error.value)
  assert '\n' not in message
  for word in words:
    assert str(word) in message


# Round trips


@pytest.mark.parametrize('abstract', [False, True])
def test_train_state_round_trip(tmp_path: pathlib.Path, abstract: bool) -> None:
  state = make_state()
  path = checkpoints.save(tmp_path, 12, jax.tree.map(jnp.asarray, state), {'config': {'seed': 1}})
  template = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state)) if abstract else state
  tree, metadata = checkpoints.restore(path, template)
  assert_same(tree, state)
  assert isinstance(tree, training.TrainState)
  assert metadata['config'] == {'seed': 1}


def test_names_are_pytree_paths(tmp_path: pathlib.Path) -> None:
  path = checkpoints.save(tmp_path, 12, make_state(), {})
  assert re.fullmatch(r'checkpoint_00000012_[0-9a-f]{64}\.safetensors', path.name)
  names = checkpoints.load(path)[0].keys()
  assert {'step', 'opt_state/0/count'} <= names
  assert any(name.startswith('params/encoder/params/') for name in names)
  assert any(name.startswith('opt_state/0/mu/decoder/params/') for name in names)


def test_file_is_plain_safetensors_with_json_metadata(tmp_path: pathlib.Path) -> None:
  path = checkpoints.save(tmp_path, 3, small(3), {'config': {'objective': 'se'}})
  assert_same(safetensors.numpy.load_file(path), small(3))
  with safetensors.safe_open(path, framework='np') as file:
    (document,) = file.metadata().values()
  document = json.loads(document)
  assert document.pop('versions').keys() == {'python', 'jax', 'numpy'}
  assert document == {'format': 1, 'step': 3, 'config': {'objective': 'se'}}


def test_metadata_survives(tmp_path: pathlib.Path) -> None:
  metadata = {'text': 'é\n"\\', 'list': [1, 2.5, None, True], 'nested': {'a': {}}, 'versions': {}}
  path = checkpoints.save(tmp_path, 3, small(3), metadata)
  assert checkpoints.load(path)[1] == {**metadata, 'format': 1, 'step': 3}


@pytest.mark.parametrize('dtype', sorted(checkpoints.DTYPES))
@pytest.mark.parametrize('shape', [(), (0, 3), (2, 3)])
def test_every_dtype_and_shape(tmp_path: pathlib.Path, dtype: str, shape: tuple[int, ...]) -> None:
  tree = {'x': np.arange(np.prod(shape)).reshape(shape).astype(jnp.dtype(dtype))}
  path = checkpoints.save(tmp_path, 0, tree, {})
  assert_same(checkpoints.restore(path, tree)[0], tree)


def test_special_values_keep_their_bits(tmp_path: pathlib.Path) -> None:
  bits = np.array([0x7FC00001, 0xFFC00000, 0x7F800000, 0x80000000, 0x00000001], np.uint32)
  path = checkpoints.save(tmp_path, 0, {'x': bits.view(np.float32)}, {})
  assert_same(checkpoints.load(path)[0]['x'].view(np.uint32), bits)


def test_memory_order_does_not_matter(tmp_path: pathlib.Path) -> None:
  x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  tree = {'transposed': x.T, 'fortran': np.asfortranarray(x), 'strided': x[:, ::2], 'back': x[::-1]}
  path = checkpoints.save(tmp_path, 0, tree, {})
  assert_same(checkpoints.restore(path, tree)[0], tree)


def test_numbers_tuples_and_empty_nodes(tmp_path: pathlib.Path) -> None:
  tree = {'tuple': (np.ones(2), [np.zeros(1)]), 'empty': (), 'none': None, 'number': 3}
  path = checkpoints.save(tmp_path, 0, tree, {})
  restored, _ = checkpoints.restore(path, tree)
  assert structure(restored) == structure(tree)
  assert restored['number'] == 3


def test_same_content_is_the_same_file(tmp_path: pathlib.Path) -> None:
  (one,) = save_small(tmp_path / 'a', 5)
  (other,) = save_small(tmp_path / 'b', 5)
  assert one.name == other.name
  assert one.read_bytes() == other.read_bytes()


def test_restored_arrays_do_not_depend_on_the_file(tmp_path: pathlib.Path) -> None:
  (path,) = save_small(tmp_path, 5)
  tree, _ = checkpoints.restore(path, small(0))
  path.write_bytes(b'')
  assert_same(tree, small(5))


# Damage


def damaged_copies(data: bytes) -> Iterator[tuple[str, bytes]]:
  """Every way of damage tried, as (name, bytes)."""
  rng = np.random.default_rng(0)
  for position in sorted({0, 7, 8, len(data) - 1, *rng.integers(len(data), size=200).tolist()}):
    flipped = bytearray(data)
    flipped[position] ^= 1 << int(rng.integers(8))
    yield f'flip at {position}', bytes(flipped)
  for length in (0, 1, 8, 100, len(data) // 2, len(data) - 1):
    yield f'truncated to {length}', data[:length]
  yield 'longer', data + b'\0'
  yield 'zeros', bytes(len(data))
  yield 'foreign', b'PK\3\4 not a checkpoint'


def test_every_damage_is_found_and_the_previous_is_used(tmp_path: pathlib.Path) -> None:
  _, newest = save_small(tmp_path, 1, 2)
  data = newest.read_bytes()
  for name, damaged in damaged_copies(data):
    newest.write_bytes(damaged)
    step, damages = restore_small(tmp_path)
    assert step == 1, name
    assert len(damages) == 1 and str(newest) in damages[0] and 'damaged' in damages[0], name
  newest.write_bytes(data)
  assert restore_small(tmp_path) == (2, [])


def test_renamed_digest_and_renamed_step(tmp_path: pathlib.Path) -> None:
  _, newest = save_small(tmp_path, 1, 2)
  digest = newest.rename(newest.with_name(f'checkpoint_00000003_{"0" * 64}.safetensors'))
  assert restore_small(tmp_path) == (
    1,
    [f'{digest}: damaged, its SHA-256 is not the one in its name'],
  )
  step = digest.rename(newest.with_name(newest.name.replace('00000002', '00000003')))
  assert restore_small(tmp_path) == (1, [f'{step}: renamed, it is of step 2'])


def foreign_files() -> dict[str, bytes]:
  """Whole files, as far as a digest can tell, that no version of `save` wrote."""
  x = {'x': np.zeros(2, np.float32)}

  def with_document(document: str) -> bytes:
    return safetensors.numpy.save(x, {'se_vae': document})

  header = json.dumps({'x': {'dtype': 'F8_E4M3', 'shape': [1], 'data_offsets': [0, 1]}}).encode()
  huge = json.dumps({'x': {'dtype': 'F32', 'shape': [2**62], 'data_offsets': [0, 4]}}).encode()
  return {
    'empty': b'',
    'text': b'hello, world',
    'header too long': b'\xff' * 64,
    'no metadata': safetensors.numpy.save(x),
    'not json': with_document('{'),
    'not an object': with_document('[1]'),
    'next format': with_document('{"format": 2, "step": 9}'),
    'no step': with_document('{"format": 1}'),
    'deep': with_document('[' * 100_000),
    'long number': with_document('{"step": ' + '9' * 10_000 + '}'),
    'unreadable dtype': len(header).to_bytes(8, 'little') + header + b'\0',
    'sizes disagree': len(huge).to_bytes(8, 'little') + huge + bytes(4),
  }


@pytest.mark.parametrize('name', foreign_files())
def test_foreign_content_under_a_good_name(tmp_path: pathlib.Path, name: str) -> None:
  save_small(tmp_path, 1)
  path = forge(tmp_path, foreign_files()[name])
  with pytest.raises(CheckpointError) as error:
    checkpoints.load(path)
  assert_one_line(error, path)
  assert restore_small(tmp_path)[0] == 1


@pytest.mark.parametrize('name', ['model.safetensors', 'checkpoint_1_ab.safetensors'])
def test_load_wants_a_checkpoint_name(tmp_path: pathlib.Path, name: str) -> None:
  with pytest.raises(CheckpointError, match='is not named'):
    checkpoints.load(tmp_path / name)


def test_load_of_a_missing_file(tmp_path: pathlib.Path) -> None:
  path = tmp_path / f'checkpoint_00000003_{"0" * 64}.safetensors'
  with pytest.raises(CheckpointError) as error:
    checkpoints.load(path)
  assert_one_line(error, path, 'No such file')


# Templates


@pytest.mark.parametrize(
  'template, words',
  [
    ({'a': np.zeros((2, 3), np.float32)}, ["'b' is not in the template"]),
    (small(0) | {'c': np.zeros(1)}, ["'c' is missing"]),
    (small(0) | {'a': np.zeros((3, 2), np.float32)}, ["'a' is float32[2, 3], not float32[3, 2]"]),
    (small(0) | {'a': np.zeros((2, 3), np.float16)}, ["'a' is float32[2, 3], not float16[2, 3]"]),
    (small(0) | {'b': np.zeros(1, np.int32)}, ["'b' is int32[], not int32[1]"]),
    ({'a': {'x': np.zeros(1)}}, ["'a' is not in", "'b' is not in", "'a/x' is missing"]),
  ],
)
def test_every_mismatch_is_named(tmp_path: pathlib.Path, template: Any, words: Any) -> None:
  _, newest = save_small(tmp_path, 1, 2)
  with pytest.raises(CheckpointError) as error:
    checkpoints.restore(newest, template)
  assert_one_line(error, newest, *words)
  # A wrong template is not damage: neither reported as such nor a reason to try older files.
  with pytest.raises(CheckpointError) as error:
    checkpoints.restore_latest(tmp_path, template, on_damage=never)
  assert_one_line(error, newest, *words)


# Listing, and which one is restored


def test_no_checkpoint_is_none(tmp_path: pathlib.Path) -> None:
  for directory in (tmp_path, tmp_path / 'missing'):
    assert checkpoints.steps(directory) == []
    assert checkpoints.restore_latest(directory, small(0), on_damage=never) is None
    assert checkpoints.load_latest(directory, on_damage=never) is None


def test_none_good_is_an_error(tmp_path: pathlib.Path) -> None:
  paths = save_small(tmp_path, 1, 2, 3)
  for path in paths:
    path.write_bytes(b'')
  damages: list[str] = []
  with pytest.raises(CheckpointError, match='none of its 3 checkpoints is good') as error:
    checkpoints.restore_latest(tmp_path, small(0), on_damage=damages.append)
  assert_one_line(error, tmp_path)
  assert [damage.split(':')[0] for damage in damages] == [str(path) for path in reversed(paths)]


def test_load_latest(tmp_path: pathlib.Path) -> None:
  save_small(tmp_path, 1, 2)
  found = checkpoints.load_latest(tmp_path, on_damage=never)
  assert found is not None
  tensors, metadata = found
  assert_same(tensors, small(2))
  assert metadata['step'] == 2


def test_steps_are_numbers_newest_first(tmp_path: pathlib.Path) -> None:
  values = [99_999_999, 5, 100_000_000, 0]
  paths = save_small(tmp_path, *values)
  expected = sorted(zip(values, paths, strict=True), reverse=True)
  assert checkpoints.steps(str(tmp_path)) == expected


def test_other_names_and_links_are_ignored(tmp_path: pathlib.Path) -> None:
  (path,) = save_small(tmp_path / 'elsewhere', 7)
  (tmp_path / path.name).symlink_to(path)
  (tmp_path / f'checkpoint_00000008_{"0" * 64}.safetensors').mkdir()
  for name in (path.name + '.bak', 'x' + path.name, path.name.upper(), 'notes.txt'):
    (tmp_path / name).write_bytes(b'')
  before = sorted(tmp_path.iterdir())
  assert checkpoints.steps(tmp_path) == []
  (mine,) = save_small(tmp_path, 9, keep=1)
  assert sorted(tmp_path.iterdir()) == sorted([*before, mine])


def test_directory_that_is_a_file(tmp_path: pathlib.Path) -> None:
  (tmp_path / 'file').write_bytes(b'')
  with pytest.raises(CheckpointError, match='cannot be listed'):
    checkpoints.steps(tmp_path / 'file')
  with pytest.raises(CheckpointError, match='cannot be written'):
    save_small(tmp_path / 'file', 1)


def test_reader_beside_a_writer_looks_again(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  save_small(tmp_path, 1, keep=1)
  real_load = checkpoints.load
  moved_on: list[bool] = []

  def load_slowly(path: pathlib.Path) -> Any:
    if not moved_on:
      moved_on.append(True)
      save_small(tmp_path, 2, keep=1)
    return real_load(path)

  monkeypatch.setattr(checkpoints, 'load', load_slowly)
  step, damages = restore_small(tmp_path)
  assert step == 2
  assert len(damages) == 1 and 'No such file' in damages[0]


# Pruning


def listed(directory: pathlib.Path) -> list[int]:
  return [step for step, _ in checkpoints.steps(directory)]


@pytest.mark.parametrize('keep', [1, 2, 3])
def test_pruning_keeps_the_newest(tmp_path: pathlib.Path, keep: int) -> None:
  save_small(tmp_path, *range(6), keep=keep)
  assert listed(tmp_path) == list(range(5, 5 - keep, -1))
  assert restore_small(tmp_path) == (5, [])


def test_damaged_checkpoints_do_not_count_towards_keep(tmp_path: pathlib.Path) -> None:
  paths = save_small(tmp_path, 1, 2, 3)
  paths[-1].write_bytes(b'')
  save_small(tmp_path, 4, keep=2)
  assert listed(tmp_path) == [4, 3, 2]


def test_what_was_just_written_outlives_a_damaged_newer_one(tmp_path: pathlib.Path) -> None:
  paths = save_small(tmp_path, 10, 20)
  paths[-1].write_bytes(b'')
  save_small(tmp_path, 12, keep=1)
  assert listed(tmp_path) == [20, 12]
  assert restore_small(tmp_path)[0] == 12


def test_saving_a_step_again_replaces_it(tmp_path: pathlib.Path) -> None:
  save_small(tmp_path, 1, 2)
  for value in (7, 8, 9):
    path = checkpoints.save(tmp_path, 2, small(value), {})
    assert checkpoints.steps(tmp_path)[0] == (2, path)
    assert listed(tmp_path) == [2, 1]
    assert_same(checkpoints.load(path)[0], small(value))


def test_saving_heals_a_damaged_twin(tmp_path: pathlib.Path) -> None:
  _, newest = save_small(tmp_path, 1, 2)
  newest.write_bytes(b'')
  assert save_small(tmp_path, 2) == [newest]
  assert restore_small(tmp_path) == (2, [])


def test_failure_to_prune_is_not_a_failure_to_save(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  save_small(tmp_path, 1)
  monkeypatch.setattr(pathlib.Path, 'unlink', raise_no_space)
  save_small(tmp_path, 2, keep=1)
  assert listed(tmp_path) == [2, 1]


# Writing


def raise_no_space(*_args: Any, **_kwargs: Any) -> NoReturn:
  raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def assert_save_fails_harmlessly(directory: pathlib.Path, reason: int, tree: Any = None) -> None:
  before = {path: path.read_bytes() for path in directory.iterdir()}
  with pytest.raises(CheckpointError) as error:
    checkpoints.save(directory, 9, small(9) if tree is None else tree, {}, keep=1)
  assert_one_line(error, directory / 'checkpoint_00000009_', os.strerror(reason))
  assert {path: path.read_bytes() for path in directory.iterdir()} == before


@pytest.mark.parametrize('function', ['replace', 'fsync'])
def test_interrupted_write_loses_nothing(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, function: str
) -> None:
  save_small(tmp_path, 1, 2)
  with monkeypatch.context() as patch:
    patch.setattr(os, function, raise_no_space)
    assert_save_fails_harmlessly(tmp_path, errno.ENOSPC)
  assert restore_small(tmp_path) == (2, [])
  save_small(tmp_path, 9)
  assert restore_small(tmp_path) == (9, [])


def test_file_that_cannot_be_written_in_full(tmp_path: pathlib.Path) -> None:
  save_small(tmp_path, 1, 2)
  soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, hard))  # A real write that stops half-way.
  try:
    assert_save_fails_harmlessly(tmp_path, errno.EFBIG, {'x': np.ones(50_000)})
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
  assert restore_small(tmp_path) == (2, [])


def test_interrupt_by_the_user_leaves_no_temporary_file(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  def interrupt(_descriptor: int) -> NoReturn:
    raise KeyboardInterrupt

  monkeypatch.setattr(os, 'fsync', interrupt)
  with pytest.raises(KeyboardInterrupt):
    save_small(tmp_path, 1)
  assert list(tmp_path.iterdir()) == []


@pytest.mark.skipif(os.geteuid() == 0, reason='root may write anywhere')
def test_read_only_directory(tmp_path: pathlib.Path) -> None:
  save_small(tmp_path, 1, 2)
  tmp_path.chmod(0o555)
  try:
    assert_save_fails_harmlessly(tmp_path, errno.EACCES)
    assert restore_small(tmp_path) == (2, [])
  finally:
    tmp_path.chmod(0o755)


def test_temporary_files_of_dead_writers_are_removed(tmp_path: pathlib.Path) -> None:
  for pid in (1, os.getpid(), 999_999_999):
    (tmp_path / f'.checkpoint_{pid}.safetensors.{pid}.tmp').write_bytes(b'half of it')
  assert checkpoints.restore_latest(tmp_path, small(0), on_damage=never) is None
  (path,) = save_small(tmp_path, 1)
  assert list(tmp_path.iterdir()) == [path]


def test_durable_before_visible_before_pruned(
  tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  (old,) = save_small(tmp_path, 1)
  events = []
  real_fsync, real_replace, real_unlink = os.fsync, os.replace, pathlib.Path.unlink

  def fsync(descriptor: int) -> None:
    events.append(('fsync', pathlib.Path(os.readlink(f'/proc/self/fd/{descriptor}')).suffix))
    real_fsync(descriptor)

  def replace(source: Any, target: Any) -> None:
    events.append(('replace', pathlib.Path(target).suffix))
    real_replace(source, target)

  def unlink(path: pathlib.Path, missing_ok: bool = False) -> None:
    if path == old:
      events.append(('prune', path.suffix))
    real_unlink(path, missing_ok)

  monkeypatch.setattr(os, 'fsync', fsync)
  monkeypatch.setattr(os, 'replace', replace)
  monkeypatch.setattr(pathlib.Path, 'unlink', unlink)
  save_small(tmp_path, 2, keep=1)
  assert events == [
    ('fsync', '.tmp'),
    ('replace', '.safetensors'),
    ('fsync', ''),  # The directory.
    ('prune', '.safetensors'),
  ]


@pytest.mark.parametrize(
  'tree, words',
  [
    ({'key': jax.eval_shape(lambda: jax.random.key(0))}, 'key'),
    ({'x': np.zeros(2, jnp.float8_e4m3fn)}, 'float8_e4m3fn'),
    ({'x': np.zeros(2, np.complex128)}, 'complex128'),
    ({'x': 'text'}, 'str|<U'),
    ({'x': object()}, 'object'),
    ({'__metadata__': np.zeros(2)}, '__metadata__'),
    ({'a/b': np.zeros(2), 'a': {'b': np.ones(2)}}, 'same path'),
  ],
)
def test_trees_that_cannot_be_stored(tmp_path: pathlib.Path, tree: Any, words: Any) -> None:
  with pytest.raises(ValueError, match=words):
    checkpoints.save(tmp_path, 0, tree, {})
  assert list(tmp_path.iterdir()) == []


def test_prng_keys_are_refused(tmp_path: pathlib.Path) -> None:
  with pytest.raises(ValueError, match=r"'key' of dtype key<"):
    checkpoints.save(tmp_path, 0, {'key': jax.random.key(0)}, {})


def test_arguments_that_cannot_be_stored(tmp_path: pathlib.Path) -> None:
  for step, keep in ((-1, 1), (0, 0)):
    with pytest.raises(ValueError, match='step must be >= 0 and keep >= 1'):
      checkpoints.save(tmp_path, step, small(0), {}, keep=keep)
  with pytest.raises(ValueError, match='JSON'):
    checkpoints.save(tmp_path, 0, small(0), {'loss': float('nan')})
  with pytest.raises(TypeError, match='JSON'):
    checkpoints.save(tmp_path, 0, small(0), {'config': training.TrainConfig()})


# A writer that is killed. One process imports the library once and forks writers to kill.
KILLER = """
  import os, pathlib, random, signal, sys, time
  import numpy as np
  from se_vae import checkpoints

  directory, kills = pathlib.Path(sys.argv[1]), int(sys.argv[2])
  template = {'a': np.zeros(20_000, np.float32), 'step': np.int32(0)}

  def latest():
    def on_damage(damage):
      raise AssertionError(damage)
    found = checkpoints.restore_latest(directory, template, on_damage=on_damage)
    if found is None:
      return 0
    tree, metadata = found
    assert tree['step'] == metadata['step'] and (tree['a'] == metadata['step']).all()
    return metadata['step']

  def write_for_ever(step):
    while True:
      step += 1
      tree = {'a': np.full(20_000, step, np.float32), 'step': np.int32(step)}
      checkpoints.save(directory, step, tree, {}, keep=2)

  random.seed(0)
  last = left = 0
  for _ in range(kills):
    writer = os.fork()
    if not writer:
      write_for_ever(last)
    time.sleep(random.uniform(0.02, 0.08))
    os.kill(writer, signal.SIGKILL)
    assert os.waitpid(writer, 0)[1] == signal.SIGKILL
    left += len(list(directory.glob('.*.tmp')))
    step = latest()
    assert step >= last, (step, last)
    last = step
  checkpoints.save(directory, last + 1, template, {}, keep=2)
  print(last, left, len(list(directory.iterdir())))
"""


def test_killed_writers_lose_nothing(tmp_path: pathlib.Path) -> None:
  kills = 25
  done = subprocess.run(
    [sys.executable, '-c', textwrap.dedent(KILLER), str(tmp_path), str(kills)],
    capture_output=True,
    text=True,
    timeout=60,
    check=False,
    cwd=pathlib.Path(__file__).parents[2],
  )
  assert done.returncode == 0, done.stderr
  last, interrupted, files = map(int, done.stdout.split())
  assert last >= kills  # The writers did write.
  assert interrupted > 0  # Some were killed in the middle of a file.
  assert files == 2


# Models


def save_model(
  workdir: pathlib.Path, step: int = 1, metadata: Any = None
) -> tuple[vae.Params, pathlib.Path]:
  state = jax.tree.map(jnp.asarray, make_state())
  metadata = {'model': MODEL} if metadata is None else metadata
  return state.params, checkpoints.save(workdir / 'checkpoints', step, state, metadata)


@pytest.mark.parametrize('as_type', [str, pathlib.Path])
def test_load_model(tmp_path: pathlib.Path, as_type: type) -> None:
  params, _ = save_model(tmp_path)
  model, loaded = checkpoints.load_model(as_type(tmp_path))
  assert model == make_model()
  assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(loaded))
  assert_same(jax.device_get(loaded), jax.device_get(params))
  x = jax.random.uniform(jax.random.key(1), (5, 4, 4, 1))
  expected, actual = make_model().encode(params, x), model.encode(loaded, x)
  assert_same(jax.device_get(actual), jax.device_get(expected))


def test_load_model_passes_over_damage_with_a_warning(tmp_path: pathlib.Path) -> None:
  params, _ = save_model(tmp_path, 1)
  _, newest = save_model(tmp_path, 2)
  newest.write_bytes(b'')
  with pytest.warns(UserWarning, match='damaged'):
    _, loaded = checkpoints.load_model(tmp_path)
  assert_same(jax.device_get(loaded), jax.device_get(params))


def test_load_model_without_checkpoint(tmp_path: pathlib.Path) -> None:
  with pytest.raises(CheckpointError, match='there is no checkpoint'):
    checkpoints.load_model(tmp_path)


@pytest.mark.parametrize(
  'model, words',
  [
    (None, "KeyError 'model'"),
    ([1], 'describes no model'),
    ({'latent_dim': 2}, "KeyError 'image_shape'"),
    (MODEL | {'image_shape': 4}, 'TypeError'),
    (MODEL | {'arch': 'transformer'}, 'transformer'),
    (MODEL | {'colour': 'red'}, 'colour'),
    (MODEL | {'latent_dim': '2'}, 'describes no model'),
    (MODEL | {'hidden_units': 4}, 'does not fit'),
    (MODEL | {'num_layers': 3}, 'is missing'),
    (MODEL | {'num_layers': 1}, 'is not in the template'),
  ],
)
def test_load_model_of_something_else(tmp_path: pathlib.Path, model: Any, words: Any) -> None:
  _, path = save_model(tmp_path, metadata={} if model is None else {'model': model})
  with pytest.raises(CheckpointError) as error:
    checkpoints.load_model(tmp_path)
  assert_one_line(error, path, words)


def test_save_model(tmp_path: pathlib.Path) -> None:
  params, arguments = make_model().init(jax.random.key(3)), dict(MODEL)
  for _ in range(2):
    path = checkpoints.save_model(tmp_path, params, **arguments)
    assert list((tmp_path / 'checkpoints').iterdir()) == [path]
  model, loaded = checkpoints.load_model(tmp_path)
  assert model == make_model()
  assert_same(jax.device_get(loaded), jax.device_get(params))


def test_save_model_of_other_parameters(tmp_path: pathlib.Path) -> None:
  params = make_model().init(jax.random.key(3))
  with pytest.raises(ValueError, match='are not those of make_vae'):
    checkpoints.save_model(tmp_path, params, **MODEL | {'latent_dim': 9})
  with pytest.raises(ValueError, match='arch must be one of'):
    checkpoints.save_model(tmp_path, params, **MODEL | {'arch': 'transformer'})
  assert list(tmp_path.iterdir()) == []


def test_networks_of_one_s_own_are_saved_and_handed_over(tmp_path: pathlib.Path) -> None:
  made = make_model()
  own = vae.VAE(made.encoder, made.decoder.clone(hidden=(7,)), made.image_shape, made.latent_dim)
  params = own.init(jax.random.key(4))
  path = checkpoints.save_model(tmp_path, params)
  model, loaded = checkpoints.load_model(tmp_path, own)
  assert model is own
  assert_same(jax.device_get(loaded), jax.device_get(params))
  with pytest.raises(CheckpointError) as error:
    checkpoints.load_model(tmp_path)
  assert_one_line(error, path, 'networks of your own')
  with pytest.raises(CheckpointError, match='does not fit'):
    checkpoints.load_model(tmp_path, made)
