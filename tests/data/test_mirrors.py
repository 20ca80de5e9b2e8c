"""Downloads from mirrors. A server on this host plays good, bad and slow ones."""

from __future__ import annotations

import gzip
import hashlib
import http.server
import os
import socket
import threading
from collections.abc import Callable, Iterator

import pytest

from se_vae import data
from se_vae.data import mirrors, mnist
from tests.data.tiny_idx import STEMS, assert_raises, file_name, idx_bytes, tiny_arrays, write_idx

FILES = {
  f'{file_name(stem)}.gz': gzip.compress(idx_bytes(array), mtime=0)
  for stem, array in tiny_arrays().items()
}


class Mirrors(http.server.BaseHTTPRequestHandler):
  """The first part of an address says what the mirror does with a file."""

  protocol_version = 'HTTP/1.1'

  def do_HEAD(self) -> None:
    self._answer()

  def do_GET(self) -> None:
    kind, content = self._answer()
    self.server.requested.append(self.path)
    if kind == 'slow':
      self.wfile.write(content[:10])
      self.server.finish.wait(30)
    elif kind == 'truncated':
      self.wfile.write(content[:-10])
      self.close_connection = True
    else:
      self.wfile.write(content)

  def _answer(self) -> tuple[str, bytes]:
    _, kind, name = self.path.split('/')
    content = {'bad': b'<html>moved</html>', 'large': bytes(5000)}.get(kind, FILES.get(name, b''))
    self.send_response(404 if kind == 'gone' and self.command == 'GET' else 200)
    self.send_header('Content-Length', str(len(content)))
    self.end_headers()
    return kind, content

  def log_message(self, *_) -> None:
    pass


@pytest.fixture
def server() -> Iterator[http.server.ThreadingHTTPServer]:
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Mirrors) as server:
    server.requested, server.finish = [], threading.Event()
    thread = threading.Thread(target=server.serve_forever, kwargs={'poll_interval': 0.01})
    thread.start()
    yield server
    server.finish.set()
    server.shutdown()
    thread.join()


@pytest.fixture
def use(server, monkeypatch) -> Callable[..., None]:
  """Makes mirrors of these kinds those of fashion_mnist, and the tiny files its files."""
  arrays = tiny_arrays()
  for module, contents in (
    (mirrors, {stem: FILES[f'{file_name(stem)}.gz'] for stem in STEMS}),
    (mnist, {stem: idx_bytes(arrays[stem]) for stem in STEMS}),
  ):
    digests = {stem: hashlib.sha256(content).hexdigest() for stem, content in contents.items()}
    monkeypatch.setitem(module._SHA256, 'fashion_mnist', digests)

  def use(*kinds: str) -> None:
    urls = tuple(f'http://127.0.0.1:{server.server_address[1]}/{kind}/' for kind in kinds)
    monkeypatch.setitem(mirrors._MIRRORS, 'fashion_mnist', urls)

  return use


def test_the_first_good_mirror_is_used_once(use, server, tmp_path, monkeypatch):
  use('good', 'other')
  expected = data.load('fashion_mnist', data_dir=write_idx(tmp_path / 'idx', tiny_arrays()))
  data.check('fashion_mnist')
  cache = tmp_path / 'own-cache' / 'fashion_mnist'
  assert not cache.exists() and server.requested == []  # a check downloads nothing
  (tmp_path / 'named').mkdir()
  for where, directory in ((None, cache), (str(tmp_path / 'named'), tmp_path / 'named')):
    server.requested.clear()
    for _ in range(2):
      dataset = data.load('fashion_mnist', data_dir=where)
      assert dataset.digest == expected.digest
      assert dataset.source == f'IDX files in {directory}'
    assert server.requested == [f'/good/{name}' for name in FILES]
    assert {path.name: path.read_bytes() for path in directory.iterdir()} == FILES
  # Nobody is asked where the files are.
  monkeypatch.setattr(mirrors, 'answering', pytest.fail)
  data.load('fashion_mnist')


@pytest.mark.parametrize(
  ('kind', 'reason'),
  [
    ('bad', 'SHA-256'),
    ('truncated', 'failed'),
    ('slow', 'timed out'),
    ('gone', '404'),
    ('large', 'more than'),
  ],
)
def test_a_mirror_that_fails_is_followed_by_the_next(use, tmp_path, monkeypatch, kind, reason):
  monkeypatch.setattr(mirrors, '_READ_SECONDS', 0.2)
  monkeypatch.setattr(mirrors, '_MAX_BYTES', 2000)
  use(kind)
  assert_raises(
    lambda: data.load('fashion_mnist', data_dir=str(tmp_path)), 'data_dir: ', f'/{kind}/', reason
  )
  assert [*tmp_path.iterdir()] == []  # no half of a file either
  use(kind, 'good')
  assert len(data.load('fashion_mnist', data_dir=str(tmp_path)).train.images) == 30
  assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == FILES


def test_an_interrupted_download_is_continued(use, server, tmp_path):
  use('good')
  first, *others = FILES
  (tmp_path / first).write_bytes(FILES[first])
  data.load('fashion_mnist', data_dir=str(tmp_path))
  assert server.requested == [f'/good/{name}' for name in others]


def test_nothing_is_put_beside_files_of_another_set(use, server, tmp_path):
  use('good')
  name = file_name(STEMS[0])
  (tmp_path / name).write_bytes(idx_bytes(tiny_arrays(1)[STEMS[0]]))
  assert_raises(lambda: data.load('fashion_mnist', data_dir=str(tmp_path)), name, 'SHA-256')
  assert os.listdir(tmp_path) == [name] and server.requested == []


def test_a_prepared_set_is_not_downloaded_again(use, server, prepared):
  use('good')
  assert data.load('fashion_mnist', data_dir=str(prepared)).source.startswith('TFDS')
  assert server.requested == []


def test_a_directory_that_cannot_be_written_is_named(use, tmp_path, monkeypatch):
  use('good')
  (tmp_path / 'own-cache').write_text('a file')
  assert_raises(lambda: data.load('fashion_mnist'), 'data_dir: cannot write', 'own-cache')


def test_mirrors_that_do_not_answer_are_named(monkeypatch):
  with pytest.raises(data.DataError) as caught:
    data.check('mnist')
  assert str(caught.value) == (
    "data_dir: 'mnist' was not found in the default directories, and no mirror answers "
    '(127.0.0.1:9); name a directory with the four IDX files or with the TFDS set '
    "'mnist', prepared with TensorFlow, or use mnist_5k, which is embedded"
  )


def test_a_name_server_that_does_not_answer_is_not_waited_for(monkeypatch):
  test_is_over, waited_for = threading.Event(), threading.Event()

  def hang(*_):
    test_is_over.wait(30)
    waited_for.set()
    raise OSError

  monkeypatch.setattr(mirrors, '_ANSWER_SECONDS', 0.1)
  monkeypatch.setattr(socket, 'getaddrinfo', hang)
  assert_raises(lambda: data.check('mnist'), 'no mirror answers')
  assert not waited_for.is_set()
  test_is_over.set()
