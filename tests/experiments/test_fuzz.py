"""Damaged and hostile inputs: refused with the right error, or read for what they are.

SE_VAE_FUZZ sets the number of inputs of each kind.
"""

from __future__ import annotations

import gzip
import hashlib
import math
import os
import struct
from pathlib import Path

import numpy as np
import pytest
from absl import flags as absl_flags
from hypothesis import HealthCheck, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from experiments import figure1, pretrain, probe
from experiments.cli import flags
from se_vae import data
from se_vae.config import ArgumentError
from se_vae.storage import checkpoints

fuzz = hypothesis_settings(
  max_examples=int(os.environ.get('SE_VAE_FUZZ', '250')),
  derandomize=True,
  deadline=None,
  suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
)

IMAGES = np.arange(3 * 4 * 2, dtype=np.uint8).reshape(3, 4, 2)
IDX = struct.pack('>IIII', 0x803, 3, 4, 2) + IMAGES.tobytes()
SIZES = st.sampled_from([0, 1, 3, 2**16, 2**28, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
  """A few of: bytes changed, cut off, inserted, appended."""
  content = bytearray(original)
  for _ in range(draw(st.integers(1, 3))):
    place = draw(st.integers(0, max(0, len(content) - 1)))
    match draw(st.sampled_from(['change', 'cut', 'insert', 'append'])):
      case 'change' if content:
        content[place] ^= draw(st.integers(1, 255))
      case 'cut':
        del content[place:]
      case 'insert':
        content[place:place] = draw(st.binary(min_size=1, max_size=8))
      case _:
        content += draw(st.binary(min_size=1, max_size=8))
  return bytes(content)


def headers() -> st.SearchStrategy[bytes]:
  """Headers that promise anything, before a little data."""
  magic = st.sampled_from([0x803, 0x801, 0x802, 0xD03, 0]) | SIZES
  header = st.tuples(magic, SIZES, SIZES, SIZES).map(lambda parts: struct.pack('>IIII', *parts))
  return st.tuples(header, st.binary(max_size=64)).map(b''.join)


def assert_read_or_refused(path: Path, content: bytes) -> None:
  """An IDX file is accepted only if it says, byte for byte, what was read from it."""
  try:
    images = data.read_idx(str(path), 3)
  except data.DataError as error:
    assert '\n' not in str(error) and path.name in str(error)
    return
  assert images.dtype == np.uint8 and images.ndim == 3
  assert struct.pack('>IIII', 0x803, *images.shape) + images.tobytes() == content


@fuzz
@given(content=damaged(IDX) | headers() | st.binary(max_size=80))
def test_idx_files(tmp_path, content):
  path = tmp_path / 'train-images-idx3-ubyte'
  path.write_bytes(content)
  assert_read_or_refused(path, content)


@fuzz
@given(content=damaged(gzip.compress(IDX, mtime=0)) | headers().map(gzip.compress))
def test_compressed_idx_files(tmp_path, content):
  path = tmp_path / 'train-images-idx3-ubyte.gz'
  path.write_bytes(content)
  try:
    inside = gzip.decompress(content)
  except Exception:  # whatever gzip thinks of it, read_idx must refuse it
    inside = b''
  assert_read_or_refused(path, inside)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
  tree = {'params': {'w': np.arange(6, dtype=np.float32).reshape(2, 3)}, 'step': np.int32(7)}
  return checkpoints.save(tmp_path_factory.mktemp('checkpoints'), 7, tree, {'config': {'a': 1}})


@fuzz
@given(choices=st.data())
def test_checkpoints(tmp_path, checkpoint, choices):
  original = checkpoint.read_bytes()
  content = choices.draw(damaged(original) | st.binary(max_size=200))
  path = tmp_path / checkpoint.name
  path.write_bytes(content)
  if content == original:
    assert checkpoints.load(path).metadata['step'] == 7
    return
  with pytest.raises(checkpoints.CheckpointError) as error:
    checkpoints.load(path)
  assert '\n' not in str(error.value)


@fuzz
@given(choices=st.data())
def test_checkpoints_whose_name_fits_their_damage(tmp_path, checkpoint, choices):
  """A foreign writer gets the digest right: what it wrote is still a checkpoint or an error."""
  content = choices.draw(damaged(checkpoint.read_bytes()) | st.binary(max_size=200))
  path = tmp_path / f'checkpoint_00000007_{hashlib.sha256(content).hexdigest()}.safetensors'
  path.write_bytes(content)
  template = {'params': {'w': np.zeros((2, 3), np.float32)}, 'step': np.int32(0)}
  try:
    found = checkpoints.load(path)
    tree, metadata = found.restore(template), found.metadata
  except checkpoints.CheckpointError as error:
    assert '\n' not in str(error)
  else:
    assert tree['params']['w'].shape == (2, 3) and metadata['step'] == 7
  finally:
    path.unlink()


NUMBERS = st.sampled_from(
  ['nan', 'inf', '-inf', '1e999', '-0', '0', '1', '-1', '0.5', '1e-30', '٣']
)
TEXTS = NUMBERS | st.integers().map(str) | st.floats().map(repr) | st.text(max_size=12)


@pytest.mark.parametrize(
  'config_type', [pretrain.PretrainConfig, probe.ProbeConfig, figure1.Figure1Config]
)
@fuzz
@given(choices=st.data())
def test_flag_values(config_type, choices):
  """Any text for any flags: refused in one line that names one of them, or within its limits."""
  values = absl_flags.FlagValues()
  flags.define_flags(config_type, values)
  names = flags.names(config_type)
  chosen = choices.draw(st.lists(st.sampled_from(names), min_size=1, max_size=3, unique=True))
  try:
    values(['program', *(f'--{name}={choices.draw(TEXTS)}' for name in chosen)])
    config = flags.from_flags(config_type, values)
  except (absl_flags.Error, ArgumentError) as error:
    assert any(name in str(error) for name in chosen)
    return
  for part in (config, *(getattr(config, name, None) for name in ('data', 'model', 'train'))):
    for name, field in getattr(part, '__dataclass_fields__', {}).items():
      value = getattr(part, name)
      for item in value if isinstance(value, tuple) else (value,):
        if isinstance(item, float):
          assert math.isfinite(item)
        if item is not None and field.metadata.get('at_least') is not None:
          assert item >= field.metadata['at_least']
        if item is not None and field.metadata.get('choices') is not None:
          assert item in field.metadata['choices']
