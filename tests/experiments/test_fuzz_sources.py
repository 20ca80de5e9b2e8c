"""Damaged and hostile sources: data and encoders from elsewhere, addresses, manifests, layers.

SE_VAE_FUZZ sets the number of inputs of each kind.
"""

from __future__ import annotations

import contextlib
import io
import json
import shutil
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from experiments.cli.flags import UsageError
from experiments.reproduction import building, leaderboard, manifest, rows
from experiments.scheduling import ray_cluster
from se_vae import certification, data
from se_vae.config import ArgumentError
from se_vae.data import folders, mirrors
from se_vae.storage import checkpoints, json_files, model_store, pretrained
from tests.experiments.test_results import CONTENT, measured
from tests.tools.fuzzing import JSON, altered, damaged, fuzz

PIXELS = np.arange(5 * 4, dtype=np.uint8).reshape(5, 4)


def encoded(form: str) -> bytes:
  file = io.BytesIO()
  Image.fromarray(PIXELS).save(file, form)
  return file.getvalue()


# Data


@pytest.fixture
def folder(tmp_path) -> Path:
  for name in ('cat', 'dog'):
    (tmp_path / 'set' / name).mkdir(parents=True)
    for number in range(4):
      Image.fromarray(PIXELS + number).save(tmp_path / 'set' / name / f'{number}.png')
  return tmp_path / 'set'


@pytest.mark.parametrize('form', ['png', 'jpeg'])
def test_image_folders(folder, form):
  """A damaged image is refused in a line that names it, or decoded to the size of the others."""
  path = folder / 'dog' / f'damaged.{form}'

  @fuzz()
  @given(content=damaged(encoded(form)) | st.binary(max_size=80))
  def check(content: bytes) -> None:
    path.write_bytes(content)
    try:
      contents = folders.open_folder('dataset', str(folder), None).read(None)
    except data.DataError as error:
      assert '\n' not in str(error) and path.name in str(error)
    else:
      images = np.concatenate([contents.train.images, contents.test.images])
      assert images.shape == (9, 5, 4, 1) and images.dtype == np.uint8

  check()


NAMES = st.text(st.characters(exclude_characters='/\0', codec='utf-8'), min_size=1, max_size=6)


@fuzz(0.2)
@given(
  paths=st.lists(st.lists(NAMES | st.sampled_from(['train', 'test', 'a.png']), max_size=3)),
  image_size=st.none() | st.integers(1, 6),
)
def test_trees_of_image_folders(tmp_path_factory, paths, image_size):
  """Any tree of names is refused in a line, or has a class for each of its directories."""
  root = tmp_path_factory.mktemp('tree')
  for path in paths:
    place = root.joinpath(*path)
    if not place.exists() and not any(above.is_file() for above in place.parents):
      place.parent.mkdir(parents=True, exist_ok=True)
      place.write_bytes(encoded('png')) if place.suffix == '.png' else place.mkdir()
  try:
    opened = folders.open_folder('dataset', str(root), image_size)
  except data.DataError as error:
    assert '\n' not in str(error)
  else:
    assert all(0 <= label < len(opened.classes) for _, label in opened.splits['train'])
  finally:
    shutil.rmtree(root)


@fuzz()
@given(content=damaged(b'the right file') | st.binary(max_size=40))
def test_downloads(tmp_path, monkeypatch, content):
  """What a mirror sends is taken only if it is the right file, and nothing else is written."""
  right = {name: '0' * 64 for name in mirrors._SHA256['mnist']}
  monkeypatch.setitem(mirrors._SHA256, 'mnist', right)
  monkeypatch.setattr(
    mirrors, '_downloader', lambda *_: lambda url, file, pooch: file.write(content)
  )
  download = mirrors.IdxDownload('mnist', str(tmp_path / 'cache'), {}, ['http://mirror/'])
  with pytest.raises(data.DataError) as error:
    download._fetch('train-images')
  assert '\n' not in str(error.value) and 'SHA-256' in str(error.value)
  assert not (tmp_path / 'cache').exists()


# Encoders


@pytest.fixture
def encoders(tmp_path, monkeypatch) -> Iterator[Path]:
  """A registry of its own, which may be damaged."""
  name = 'mnist_mlp_clusters_latent30'
  shutil.copytree(pretrained.workdir(name), tmp_path / name)
  monkeypatch.setattr(pretrained, '_FOLDER', tmp_path)
  (path,) = (tmp_path / name / model_store.CHECKPOINTS).iterdir()
  return path


def test_pretrained_encoders(encoders):
  """Every damage is told in a line: the digest is in the package."""
  name = encoders.parents[1].name
  original = encoders.read_bytes()
  # The header of a file is what a reader trusts, so most damages are there.
  header = 8 + int.from_bytes(original[:8], 'little')

  @fuzz(0.05)
  @given(choices=st.data())
  def check(choices: st.DataObject) -> None:
    content = choices.draw(damaged(original[:header])) + original[header:]
    encoders.write_bytes(content)
    if content == original:
      pretrained.load_pretrained(name)
      return
    with pytest.raises(checkpoints.CheckpointError) as error:
      pretrained.load_pretrained(name)
    assert '\n' not in str(error.value)

  check()


@fuzz()
@given(name=st.text(max_size=30) | JSON)
def test_names_of_pretrained_encoders(name):
  with pytest.raises((ArgumentError, TypeError)):
    pretrained.workdir(name)


# Addresses


def unknown_host(host: str | bytes | None, *_: object, **__: object) -> None:
  """As the system answers, which encodes the name first."""
  if isinstance(host, str):
    host.encode('idna')
  raise socket.gaierror('unknown')


PARTS = st.sampled_from([':', '//', 'ray://', 'localhost', '6379', '٣', '²', '-1', '0', '[::1]'])


@fuzz()
@given(address=st.lists(PARTS | st.text(max_size=5), max_size=4).map(''.join))
def test_ray_addresses(monkeypatch, address):
  """Refused in a line before Ray is asked."""
  monkeypatch.setattr(socket, 'getaddrinfo', unknown_host)
  with pytest.raises(ArgumentError) as error, ray_cluster._connected(address):
    pass
  assert 'ray_address' in str(error.value) and '\n' not in str(error.value)


# Results


@fuzz()
@given(content=altered(CONTENT) | JSON)
def test_manifests(tmp_path, content):
  """YAML of any content: refused in a line, or every row has encoders and commands."""
  path = tmp_path / 'manifest.yaml'
  path.write_text(json.dumps(content))
  try:
    found = manifest.load(path)
  except ArgumentError as error:
    assert '\n' not in str(error) and path.name in str(error)
  else:
    for row in found.rows.values():
      assert ('supervised' in row) != (row.get('encoder') in found.encoders)


@fuzz()
@given(content=st.binary(max_size=60) | st.text(max_size=60).map(str.encode))
def test_manifests_of_any_text(tmp_path, content):
  path = tmp_path / 'manifest.yaml'
  path.write_bytes(content)
  with pytest.raises(ArgumentError) as error:
    manifest.load(path)
  assert '\n' not in str(error.value)


ROW = measured('smooth', [0.8, 0.5])


@fuzz()
@given(content=altered(ROW) | JSON)
def test_measured_rows(tmp_path, content):
  """Refused in a line, or judged by the rules of the leaderboard."""
  path = tmp_path / 'smooth.json'
  path.write_text(json.dumps(content))
  try:
    row = rows.read_file(path)
  except json_files.JsonError as error:
    assert '\n' not in str(error)
  else:
    assert all('\n' not in fault for fault in leaderboard.faults(row))


@fuzz(0.3)
@given(content=st.binary(max_size=60) | JSON.map(lambda value: json.dumps(value).encode()))
def test_ledgers(tmp_path, capsys, content):
  """Damaged ones are named and made again; those of other code are refused."""
  (tmp_path / building.LEDGER).write_bytes(content)
  try:
    building.claim(tmp_path, {'revision': 1})
  except (ArgumentError, UsageError) as error:
    assert '\n' not in str(error)
  else:
    assert json.loads((tmp_path / building.LEDGER).read_text()) == {'revision': 1}
  for line in capsys.readouterr().err.splitlines():
    assert line.startswith('warning: '), line


# Layers


SIZES = st.sampled_from([1, 2, 3, 1, 2, 3, 0])
SHAPES = st.lists(SIZES, max_size=4).map(tuple)


@st.composite
def networks(draw: st.DrawFn) -> tuple[tuple[Any, ...], tuple[int, ...]]:
  """Layers and the shape of a batch, which mostly fit."""
  batch = draw(st.tuples(SIZES, SIZES) | st.tuples(SIZES, SIZES, SIZES, SIZES) | SHAPES)
  shape = batch[1:]  # of an example

  def filled(shape: tuple[int, ...]) -> Any:
    dtype = draw(st.sampled_from(['float32'] * 9 + ['int32', 'float16']))
    return jnp.full(shape, draw(st.sampled_from([1, -1])), dtype)

  def bias(weights: Any) -> Any:
    return filled(draw(st.sampled_from([weights.shape[-1:]] * 4) | SHAPES))

  def layer() -> Any:
    kind = draw(st.sampled_from(['linear', 'linear', 'linear', 'relu', 'flatten', 'any', 'none']))
    if kind == 'linear':
      kind = {1: 'dense', 3: 'conv'}.get(len(shape), 'any')
    if kind == 'any':
      kind = draw(st.sampled_from(['dense', 'conv', 'relu', 'flatten']))
    inputs = draw(st.just(shape[-1]) | SIZES) if shape else draw(SIZES)
    match kind:
      case 'dense':
        weights = filled((inputs, draw(SIZES)))
        return certification.Dense(weights, bias(weights))
      case 'conv':
        weights = filled((*draw(st.tuples(SIZES, SIZES)), inputs, draw(SIZES)))
        strides = draw(st.sampled_from([(1, 1), (2, 2), (2, 1)]))
        return certification.Conv(weights, bias(weights), strides)
      case 'relu':
        return certification.ReLU()
      case 'flatten':
        return certification.Flatten()
    return draw(st.sampled_from([None, 'relu', 1.0]))

  found = []
  for _ in range(draw(st.integers(0, 3))):
    found.append(layer())
    with contextlib.suppress(AttributeError, AssertionError):  # no layer, or none that fits
      shape = found[-1].out_shape(shape)
  return tuple(found), batch


@fuzz(0.05)
@given(
  network=networks(),
  radius=st.sampled_from([0.0, 0.1, 0.1, 0.1, -1.0, np.inf, np.nan]),
  labels=st.just(None) | SHAPES,
  method=st.sampled_from(certification.METHODS).map(certification.Method),
)
def test_certificates_of_any_layers(network, radius, labels, method):
  """Refused with a documented error, or bounds that hold at the centre; or NaN for no radius."""
  layers, shape = network
  x = jnp.full(shape, 0.5)
  labels = jnp.zeros(shape[:1] if labels is None else labels, 'int32')
  try:
    region = certification.ball(x, radius)
    box = certification.output_box(layers, region, method)
  except (AssertionError, TypeError, ValueError) as error:
    assert str(error)
    return
  outputs = certification.apply(layers, x)
  is_known = radius >= 0.0 and np.isfinite(radius)
  assert box.lower.shape == box.upper.shape == outputs.shape
  if is_known:
    assert (box.lower <= outputs).all() and (outputs <= box.upper).all()
  else:
    assert np.isnan(box.lower).all() and np.isnan(box.upper).all()
  try:
    worst = certification.worst_logits(layers, region, labels, method)
  except AssertionError:
    assert outputs.ndim != 2 or labels.shape != outputs.shape[:1]
    return
  if is_known:
    assert (worst >= outputs - outputs[:, :1]).all()
  else:
    assert np.isnan(worst[:, 1:]).all()
