"""Checkpoints: round trips, templates, which one is restored, which ones are kept."""

from __future__ import annotations

import json
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import safetensors
import safetensors.numpy

from se_vae import training
from se_vae.storage import checkpoints
from se_vae.storage.checkpoints import CheckpointError
from tests.storage.small_trees import (
  assert_one_line,
  assert_same,
  listed,
  make_state,
  never,
  raise_no_space,
  restore_small,
  save_small,
  small,
  structure,
)

# Round trips


@pytest.mark.parametrize('abstract', [False, True])
def test_train_state_round_trip(tmp_path: pathlib.Path, abstract: bool) -> None:
  state = make_state()
  path = checkpoints.save(tmp_path, 12, jax.tree.map(jnp.asarray, state), {'config': {'seed': 1}})
  template = jax.eval_shape(lambda: jax.tree.map(jnp.asarray, state)) if abstract else state
  checkpoint = checkpoints.load(path)
  tree = checkpoint.restore(template)
  assert_same(tree, state)
  assert isinstance(tree, training.TrainState)
  assert checkpoint.path == path
  assert checkpoint.metadata['config'] == {'seed': 1}


def test_names_are_pytree_paths(tmp_path: pathlib.Path) -> None:
  path = checkpoints.save(tmp_path, 12, make_state(), {})
  assert re.fullmatch(r'checkpoint_00000012_[0-9a-f]{64}\.safetensors', path.name)
  names = checkpoints.load(path).tensors.keys()
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


def test_metadata_round_trip(tmp_path: pathlib.Path) -> None:
  metadata = {'text': 'é\n"\\', 'list': [1, 2.5, None, True], 'nested': {'a': {}}, 'versions': {}}
  path = checkpoints.save(tmp_path, 3, small(3), metadata)
  assert checkpoints.load(path).metadata == {**metadata, 'format': 1, 'step': 3}


@pytest.mark.parametrize('dtype', sorted(checkpoints.DTYPES))
@pytest.mark.parametrize('shape', [(), (0, 3), (2, 3)])
def test_every_dtype_and_shape(tmp_path: pathlib.Path, dtype: str, shape: tuple[int, ...]) -> None:
  tree = {'x': np.arange(np.prod(shape)).reshape(shape).astype(jnp.dtype(dtype))}
  path = checkpoints.save(tmp_path, 0, tree, {})
  assert_same(checkpoints.load(path).restore(tree), tree)


def test_special_values_keep_their_bits(tmp_path: pathlib.Path) -> None:
  bits = np.array([0x7FC00001, 0xFFC00000, 0x7F800000, 0x80000000, 0x00000001], np.uint32)
  path = checkpoints.save(tmp_path, 0, {'x': bits.view(np.float32)}, {})
  assert_same(checkpoints.load(path).tensors['x'].view(np.uint32), bits)


def test_memory_order_does_not_matter(tmp_path: pathlib.Path) -> None:
  x = np.arange(24, dtype=np.float32).reshape(2, 3, 4)
  tree = {'transposed': x.T, 'fortran': np.asfortranarray(x), 'strided': x[:, ::2], 'back': x[::-1]}
  path = checkpoints.save(tmp_path, 0, tree, {})
  assert_same(checkpoints.load(path).restore(tree), tree)


def test_numbers_tuples_and_empty_nodes(tmp_path: pathlib.Path) -> None:
  tree = {'tuple': (np.ones(2), [np.zeros(1)]), 'empty': (), 'none': None, 'number': 3}
  path = checkpoints.save(tmp_path, 0, tree, {})
  restored = checkpoints.load(path).restore(tree)
  assert structure(restored) == structure(tree)
  assert restored['number'] == 3


def test_same_content_is_the_same_file(tmp_path: pathlib.Path) -> None:
  (one,) = save_small(tmp_path / 'a', 5)
  (other,) = save_small(tmp_path / 'b', 5)
  assert one.name == other.name
  assert one.read_bytes() == other.read_bytes()


def test_restored_arrays_do_not_depend_on_the_file(tmp_path: pathlib.Path) -> None:
  (path,) = save_small(tmp_path, 5)
  tree = checkpoints.load(path).restore(small(0))
  path.write_bytes(b'')
  assert_same(tree, small(5))


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
    checkpoints.load(newest).restore(template)
  assert_one_line(error, newest, *words)
  # A wrong template is not damage: neither reported as such nor a reason to use older files.
  found = checkpoints.load_latest(tmp_path, on_damage=never)
  assert found is not None
  with pytest.raises(CheckpointError) as error:
    found.restore(template)
  assert_one_line(error, newest, *words)


# Listing, and which one is restored


def test_no_checkpoint_is_none(tmp_path: pathlib.Path) -> None:
  for directory in (tmp_path, tmp_path / 'missing'):
    assert checkpoints.steps(directory) == []
    assert checkpoints.load_latest(directory, on_damage=never) is None


def test_none_good_is_an_error(tmp_path: pathlib.Path) -> None:
  paths = save_small(tmp_path, 1, 2, 3)
  for path in paths:
    path.write_bytes(b'')
  damages: list[str] = []
  with pytest.raises(CheckpointError, match='none of its 3 checkpoints is good') as error:
    checkpoints.load_latest(tmp_path, on_damage=damages.append)
  assert_one_line(error, tmp_path)
  assert [damage.split(':')[0] for damage in damages] == [str(path) for path in reversed(paths)]


def test_load_latest(tmp_path: pathlib.Path) -> None:
  save_small(tmp_path, 1, 2)
  found = checkpoints.load_latest(tmp_path, on_damage=never)
  assert found is not None
  assert_same(found.tensors, small(2))
  assert found.metadata['step'] == 2


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
    assert_same(checkpoints.load(path).tensors, small(value))


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
