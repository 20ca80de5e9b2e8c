"""MNIST and Fashion-MNIST from the web: the four IDX files, from whichever mirror has them.

Nothing here connects to a mirror unless a file is missing.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import io
import threading
import time
import urllib.parse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from se_vae.data import mnist
from se_vae.data.examples import Contents, DataError, describe
from se_vae.storage import atomic_files

# In the order in which they are tried. Hashes are checked, so plain HTTP does no harm.
_MIRRORS = {
  'mnist': (
    'https://ossci-datasets.s3.amazonaws.com/mnist/',
    'https://storage.googleapis.com/cvdf-datasets/mnist/',
  ),
  'fashion_mnist': (
    'http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/',
    'https://raw.githubusercontent.com/zalandoresearch/fashion-mnist/master/data/fashion/',
  ),
}

# SHA-256 of the four compressed files of each set, as all mirrors have them.
_SHA256 = {
  'mnist': {
    'train-images': '440fcabf73cc546fa21475e81ea370265605f56be210a4024d2ca8f203523609',
    'train-labels': '3552534a0a558bbed6aed32b30c495cca23d567ec52cac8be1a0730e8010255c',
    't10k-images': '8d422c7b0a1c1c79245a5bcf07fe86e33eeafee792b84584aec276f5a2dbc4e6',
    't10k-labels': 'f7ae60f92e00ec6debd23a6088c31dbd2371eca3ffa0defaefb259924204aec6',
  },
  'fashion_mnist': {
    'train-images': '3aede38d61863908ad78613f6a32ed271626dd12800ba2636569512369268a84',
    'train-labels': 'a04f17134ac03560a47e3764e11b92fc97de4d1bfaf8ba1a3aa29af54cc90845',
    't10k-images': '346e55b948d973a97e58d2351dde16a484bd415d4595297633bb08f03db6a073',
    't10k-labels': '67da17c76eaffca5446c3361aaab5c3cd6d1c2608764d35dfb1850b086bf8dd5',
  },
}

_BAR = '{l_bar}{bar}| {n_fmt}/{total_fmt}B'
_MAX_BYTES = 2**26  # the largest file has 26 MB
_ANSWER_SECONDS = 3.0
_READ_SECONDS = 15.0  # that a mirror may be silent in the middle of a file


def cache_directory(dataset: str) -> str:
  """Returns the directory for the files of a set where the user names none."""
  import platformdirs

  return str(platformdirs.user_cache_path('se_vae', appauthor=False) / dataset)


def hosts(dataset: str) -> str:
  """Returns the names of the mirrors' hosts, for messages."""
  return ', '.join(urllib.parse.urlsplit(mirror).netloc for mirror in _MIRRORS[dataset])


def answering(dataset: str) -> list[str]:
  """Returns the mirrors of 'mnist' or 'fashion_mnist' that answer within a few seconds."""
  found = set()

  def ask(mirror: str) -> None:
    url = f'{mirror}{mnist.idx_name(mnist.STEMS[0])}.gz'
    with contextlib.suppress(OSError):
      if _downloader(_ANSWER_SECONDS)(url, None, None, check_only=True):
        found.add(mirror)

  # In threads, as a timeout of requests does not cover the name's resolution.
  threads = [threading.Thread(target=ask, args=(m,), daemon=True) for m in _MIRRORS[dataset]]
  deadline = time.monotonic() + _ANSWER_SECONDS
  for thread in threads:
    thread.start()
  for thread in threads:
    thread.join(max(0.0, deadline - time.monotonic()))
  return [mirror for mirror in _MIRRORS[dataset] if mirror in found]


@dataclasses.dataclass(frozen=True)
class IdxDownload:
  """The IDX files of one set, which `read` downloads as far as they are missing.

  Attributes:
    dataset: 'mnist' or 'fashion_mnist'.
    directory: where they are put; it is made if need be.
    paths: those of the four that are there already -> path.
    mirrors: where the others are looked for, in this order.
  """

  dataset: str
  directory: str
  paths: Mapping[str, str]
  mirrors: Sequence[str]

  def read(self, cache_dir: str | None) -> Contents:
    """Downloads the missing files, and reads all of them."""
    there = mnist.IdxFiles(self.dataset, self.directory, self.paths)
    there.arrays()  # nothing is put beside files of another set
    missing = (stem for stem in mnist.STEMS if stem not in self.paths)
    paths = {**self.paths, **{stem: self._fetch(stem) for stem in missing}}
    return dataclasses.replace(there, paths=paths).read(cache_dir)

  def _fetch(self, stem: str) -> str:
    """Returns the path of a file that has been downloaded."""
    path = Path(self.directory) / f'{mnist.idx_name(stem)}.gz'
    content = self._download(path.name, _SHA256[self.dataset][stem])
    try:
      atomic_files.make_directory(path.parent)
      atomic_files.write(path, content)
    except OSError as error:
      message = f'cannot write {str(path)!r}: {describe(error)}; name another directory'
      raise DataError('data_dir', message) from error
    return str(path)

  def _download(self, name: str, sha256: str) -> bytes:
    """Returns the content of a file from the first mirror that has the right one."""
    from tqdm import tqdm

    failures = []
    for mirror in self.mirrors:
      content = _Bounded()
      try:
        # Shown on terminals only (`disable=None`). pooch replaces the total, but needs one.
        with tqdm(total=1, desc=name, unit_scale=True, bar_format=_BAR, disable=None) as bar:
          _downloader(_READ_SECONDS, bar)(f'{mirror}{name}', content, None)
        if hashlib.sha256(content.getvalue()).hexdigest() == sha256:
          return content.getvalue()
        failures.append(f'{mirror} has another file (its SHA-256 differs)')
      except (OSError, ValueError) as error:  # the errors of requests are OSErrors
        failures.append(f'{mirror} failed ({describe(error)})')
    raise DataError(
      'data_dir',
      f'cannot download {name!r} of {self.dataset}: {"; ".join(failures)}; try again later, or name'
      ' a directory with the four IDX files',
    )


class _Bounded(io.BytesIO):
  """A file in memory that no mirror can fill the memory with."""

  def write(self, chunk: Any) -> int:
    if self.tell() + len(chunk) > _MAX_BYTES:
      raise ValueError(f'more than {_MAX_BYTES} bytes')
    return super().write(chunk)


def _downloader(seconds: float, progress_bar: Any = False) -> Any:
  import pooch  # slow to import

  timeout = (_ANSWER_SECONDS, seconds)
  return pooch.HTTPDownloader(progress_bar, chunk_size=2**16, timeout=timeout)
