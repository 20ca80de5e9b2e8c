"""What the tests of data share: nothing installed, and one prepared TFDS set."""

from __future__ import annotations

import pathlib
import shutil
from unittest import mock

import pytest

from se_vae import data
from se_vae.data import mirrors, mnist, tfds
from tests.data.tiny_idx import examples
from tests.data.tiny_tfds import write_tfds


@pytest.fixture(autouse=True)
def _nothing_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path) -> None:
  """Without TensorFlow, a network or a directory of data, whatever this machine has."""
  refused = dict.fromkeys(mirrors._MIRRORS, ('http://127.0.0.1:9/',))  # nobody listens there
  monkeypatch.setattr(mirrors, '_MIRRORS', refused)
  monkeypatch.setattr(mirrors, 'cache_directory', lambda name: str(tmp_path / 'own-cache' / name))
  monkeypatch.setattr(tfds, '_has_tensorflow', lambda: False)
  monkeypatch.setattr(tfds, '_is_online', lambda: False)
  monkeypatch.setenv('TFDS_DATA_DIR', str(tmp_path / 'no-default'))


@pytest.fixture(autouse=True)
def fashion_sha256(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
  """Lets any files be those of fashion_mnist; returns the digests that are expected otherwise."""
  expected = mnist._SHA256['fashion_mnist']
  monkeypatch.setitem(mnist._SHA256, 'fashion_mnist', dict.fromkeys(mnist.STEMS, mock.ANY))
  return expected


@pytest.fixture(scope='module')
def digits() -> data.Dataset:
  return data.load('mnist_5k')


@pytest.fixture(scope='module')
def colored() -> data.Dataset:
  return data.load('color_mnist_5k')


@pytest.fixture(scope='module')
def prepared(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
  root = tmp_path_factory.mktemp('tfds')
  write_tfds(root, {'train': examples('train'), 'test': examples('t10k')})
  return root


@pytest.fixture
def own_copy(prepared: pathlib.Path, tmp_path: pathlib.Path) -> pathlib.Path:
  return pathlib.Path(shutil.copytree(prepared, tmp_path / 'copy'))
