"""A file of JSON values, a line each, that is read again after whatever ended its writer."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def read(path: Path) -> Iterator[dict[str, Any]]:
  """Every entry, but for a line that was being written at a kill. There need be no file."""
  for line in path.read_text().splitlines() if path.exists() else ():
    with contextlib.suppress(json.JSONDecodeError):
      yield json.loads(line)


def append(path: Path, entry: dict[str, Any]) -> None:
  """Adds an entry, on a line of its own: the line before it may be cut."""
  with path.open('a') as file:
    file.write('\n' + json.dumps(entry))
