"""Compiled programs of this process: forgotten before there are too many of them."""

from __future__ import annotations

import gc
from pathlib import Path

from etils import epy

with epy.lazy_imports():
  import jax

_MAPS = Path('/proc/self/maps')
_LIMIT = Path('/proc/sys/vm/max_map_count')


def forget_if_many(share: float = 0.5) -> bool:
  """Forgets all compiled programs where they take much of what Linux allows a process.

  A compiled program takes a few memory maps, of which a process may have 65,530 by default. XLA
  ends in a segmentation fault where it gets no more. A process that trains one encoder is far from
  that; one that trains fifty of different sizes is not.

  Args:
    share: of the allowed memory maps, in (0, 1), from which on they are many.

  Returns:
    Whether programs were forgotten. They are compiled, or read from a cache, when next used.
  """
  if not (_MAPS.exists() and _LIMIT.exists()):
    return False  # no Linux
  many = _MAPS.read_bytes().count(b'\n') > share * int(_LIMIT.read_text())
  if many:
    jax.clear_caches()
    gc.collect()
  return many
