"""Damaged and hostile inputs: refused with the right error, or read for what they are.

SE_VAE_FUZZ sets the number of inputs of each kind. `tests/test_fuzz_arrays.py` has arrays.
"""

from __future__ import annotations

import functools
import gzip
import hashlib
import json
import math
import shutil
import struct
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from absl import flags as absl_flags
from hypothesis import example, given
from hypothesis import strategies as st

from experiments import (
  figure1,
  identity,
  pretrain,
  probe_settings,
  recording,
  records,
  report,
  sweep,
)
from experiments import supervised as supervised_binary
from experiments.benchmarks import attack_comparison, speed
from experiments.cli import distributed, flags, workdirs
from experiments.cli.flags import UsageError
from experiments.visual import report_page
from se_vae import data
from se_vae.config import ARCHS, COVARIANCES, ArgumentError
from se_vae.evaluation.attack_log import AttackLog
from se_vae.evaluation.states import StateError
from se_vae.storage import checkpoints, json_files, model_store
from tests.experiments.test_report import write_probe, write_run
from tests.storage.small_trees import MODEL, make_model
from tests.tools.fuzzing import JSON, altered, damaged, fuzz

IMAGES = np.arange(3 * 4 * 2, dtype=np.uint8).reshape(3, 4, 2)
IDX = struct.pack('>IIII', 0x803, 3, 4, 2) + IMAGES.tobytes()
SIZES = st.sampled_from([0, 1, 3, 2**16, 2**28, 2**31, 2**32 - 1]) | st.integers(0, 2**32 - 1)


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


@fuzz()
@given(content=damaged(IDX) | headers() | st.binary(max_size=80))
def test_idx_files(tmp_path, content):
  path = tmp_path / 'train-images-idx3-ubyte'
  path.write_bytes(content)
  assert_read_or_refused(path, content)


@fuzz()
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


@fuzz()
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


@fuzz()
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
  'config_type',
  [
    pretrain.PretrainConfig,
    probe_settings.ProbeConfig,
    figure1.Figure1Config,
    sweep.SweepConfig,
    supervised_binary.SupervisedConfig,
    report.ReportConfig,
    distributed.Cluster,
    speed.BenchmarkConfig,
    attack_comparison.ComparisonConfig,
  ],
)
@fuzz()
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


WORDS = st.sampled_from(['--', '-', '=', ',', ' ', "'", '"', '\\', '\n', 'gamma', 'seed', 'radii'])


@fuzz()
@given(
  vary=st.lists(WORDS | TEXTS, max_size=8).map(''.join),
  attack=st.just('') | st.lists(WORDS | TEXTS, max_size=8).map(''.join),
)
def test_flags_within_flags(tmp_path, vary, attack):
  """Those in --vary and --probe: refused, naming the flag, or variants below the directory."""
  try:
    variants = list(
      sweep.variants_of(sweep.SweepConfig(vary, attack), pretrain.PretrainConfig(), tmp_path)
    )
  except UsageError as error:
    assert '--vary' in str(error) or '--probe' in str(error)
    return
  for each in variants:
    assert str(each.job.pretraining.workdir).startswith(str(tmp_path))


# JSON


@fuzz()
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_json(content):
  """Read into values that are JSON again, or refused in a line."""
  try:
    found = json_files.loads(content, dict[str, Any])
  except json_files.JsonError as error:
    assert '\n' not in str(error)
  else:
    assert json_files.loads(json_files.dumps(found).encode(), dict[str, Any]) == found
    json.dumps(found, ensure_ascii=False, allow_nan=False).encode()


@pytest.fixture(scope='module')
def run(tmp_path_factory) -> Path:
  """A run with every file that a report reads, which is a figure of its own too."""
  run = write_run(tmp_path_factory.mktemp('runs') / 'mnist_mlp_se')
  curve = {'radii': [0.0, 0.1], 'accuracy': [0.5, 0.25], 'interval': [[0.4, 0.6], [0.2, 0.3]]}
  quantiles = {'0.05': [0.0, 1.25], '0.95': [0.0, 5.5]}
  moves = {'radii': [0.0, 0.12], 'mean': [0.0, 3.75], 'quantiles': quantiles}
  extra = {'joint': {'tasks': ['digit', 'color'], **curve}, 'moves': moves}
  config = json.loads((run / 'config.json').read_text())['config']
  data = {'source': 'here', 'digest': 'abc'}
  result = write_probe(run, pretraining=config, data=data, **extra)
  identity = {'encoders': 'mnist_mlp', 'objective': 'se', 'latent_dim': 64, 'seed': 0}
  panels = [{'title': 'a', 'encoders': 'mnist_mlp', 'task': 'digit'}]
  figure = {'panels': panels, 'results': [result | identity], 'optimizer': 'Adam'}
  (run / 'figure1.json').write_text(json.dumps(figure))
  (run / 'not_finite.json').write_text('{"step": 3}')
  varied = {'varied': {'gamma': 1.0}, 'seconds': None, **result}
  (run / 'sweep.json').write_text(json.dumps({'results': [varied]}))
  return run


def read_by_pretrain(run: Path) -> None:
  settings = {'workdir': str(run), 'num_steps': 300}
  begun = workdirs.read_json(
    run / 'config.json', records.Run, lambda content: pretrain.stored_config(content['config'])
  )
  if begun is not None:
    config = flags.from_dict(pretrain.PretrainConfig, settings)
    pretrain._check_same_settings(begun, config)
  result = recording.read_result(run, 300, records.Result)
  if result is not None:
    ', '.join(f'{name} {value:.4g}' for name, value in result['test'].items())
  recording._drop_rows_after(run / 'metrics.jsonl', 200)
  for line in (run / 'metrics.jsonl').read_text().splitlines():
    assert json.loads(line)['step'] <= 200


def read_by_others(run: Path) -> None:
  attack = {
    'config': flags.to_dict(probe_settings.ProbeConfig()),
    'pretraining': flags.to_dict(pretrain.PretrainConfig()),
    'step': 300,
    'data': {'digest': 'abc'},
  }
  identity.finished(run / 'probe_digit.json', attack)
  workdirs.read_json(run / 'sweep.json', records.Sweep)
  found = workdirs.read_json(run / 'probe_digit.json', records.Supervised)
  if found is not None:
    list(zip(found['radii'], found['accuracy'], strict=True))


def read_by_report(run: Path) -> None:
  reader = report._Reader()
  reader.read(run / 'config.json', report._load_config)
  config = flags.to_dict(pretrain.PretrainConfig())
  reader.run(run, 'run', report_page.styles(['se'])[0], config, {})
  assert not [damage for damage in reader.damages if '\n' in damage]


def drawn_by_report(run: Path) -> None:
  page, _ = report.render([run])
  page.encode()


@pytest.mark.long
@pytest.mark.parametrize(
  ('read', 'share'),
  [(read_by_pretrain, 1.0), (read_by_others, 1.0), (read_by_report, 1.0), (drawn_by_report, 0.02)],
)
def test_files_of_a_run(tmp_path, run, capsys, read, share):
  """Each file is used, or left out with a line; a report and pretrain may refuse in a line."""
  names = sorted(path.name for path in run.iterdir())
  workdir = shutil.copytree(run, tmp_path / 'run')

  @fuzz(share)
  @given(choices=st.data())
  def check(choices: st.DataObject) -> None:
    name = choices.draw(st.sampled_from(names))
    original = (run / name).read_bytes()
    (workdir / name).write_bytes(choices.draw(other_content(name, original)))
    try:
      read(workdir)
    except (ArgumentError, json_files.JsonError) as error:
      assert '\n' not in str(error)
    finally:
      for changed in {name, 'metrics.jsonl'}:
        shutil.copy(run / changed, workdir / changed)
    for line in capsys.readouterr().err.splitlines():
      assert line.startswith('warning: '), line

  check()


def other_content(name: str, original: bytes) -> st.SearchStrategy[bytes]:
  """Bytes that are not the original's, or JSON of another structure."""
  random = damaged(original) | st.binary(max_size=80)
  if name.endswith('.jsonl'):
    rows = [json.loads(line) for line in original.splitlines()]
    return random | altered(rows).map(as_lines)
  if name.endswith('.json'):
    return random | altered(json.loads(original)).map(lambda value: json.dumps(value).encode())
  return random


def as_lines(rows: Any) -> bytes:
  lines = rows if isinstance(rows, list) else [rows]
  return b''.join(json.dumps(row).encode() + b'\n' for row in lines)


# Attack logs and models


OUTPUTS = np.array([[0.0, 1.0]] * 3)


@pytest.fixture(scope='module')
def attack_log(tmp_path_factory) -> tuple[AttackLog, bytes]:
  log = AttackLog.empty(('clean', 'pgd'), np.zeros((3, 2, 2), np.float32), OUTPUTS)
  log.record(np.array([1]), np.ones((1, 2, 2)), radius=np.array([0.1]), attack=1, restart=0)
  path = tmp_path_factory.mktemp('log') / 'state.npz'
  log.save(path, 'fingerprint')
  return log, path.read_bytes()


@fuzz()
@given(choices=st.data())
def test_attack_logs(tmp_path, attack_log, choices):
  """Refused, or equal to what was saved; a zip file has bytes that say nothing."""
  log, original = attack_log
  path = tmp_path / 'state.npz'
  path.write_bytes(choices.draw(damaged(original) | st.binary(max_size=200)))
  try:
    found = AttackLog.load(path, 'fingerprint', OUTPUTS)
  except StateError as error:
    assert '\n' not in str(error) and str(path) in str(error)
    return
  for name, value in vars(log).items():
    np.testing.assert_array_equal(getattr(found, name), value)


@functools.cache
def params_of_model():
  return {'params': make_model().init(jax.random.key(0))}


def sizes_of_models() -> st.SearchStrategy[dict[str, Any]]:
  """Arguments of models of any size, also of sizes that no machine has memory for."""
  names = ['latent_dim', 'hidden_units', 'conv_channels', 'num_layers']
  size = st.dictionaries(st.sampled_from(names), SIZES | st.just(2**62), min_size=1, max_size=2)
  kind = st.fixed_dictionaries(
    {'arch': st.sampled_from(ARCHS), 'covariance': st.sampled_from(COVARIANCES)}
  )
  return st.builds(lambda size, kind: MODEL | size | kind, size, kind)


@pytest.mark.long
@fuzz(0.1)
@given(
  arguments=altered({**MODEL, 'arch': 'mlp', 'covariance': 'diagonal'}) | sizes_of_models() | JSON
)
@example(arguments={**MODEL, 'image_shape': [4, 4]})
def test_models_of_other_arguments(tmp_path, arguments):
  """A checkpoint of a foreign writer: a model of these shapes, or an error."""
  directory = tmp_path / 'checkpoints'
  try:
    checkpoints.save(directory, 0, params_of_model(), {'model': arguments}, keep=1)
  except ValueError:
    return  # NaN or a huge integer
  try:
    model, _ = model_store.load_model(tmp_path)
  except checkpoints.CheckpointError as error:
    assert '\n' not in str(error)
  else:
    assert model.image_shape == (4, 4, 1)
