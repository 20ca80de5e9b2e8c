"""JSON files, and the one check of what is read from them.

A reader names the type that it needs, such as a `TypedDict` or `dict[str, float]`. Anything else in
a file is a `JsonError`. JSON has no NaN or infinity: both are written as null, and null is NaN
where a float is expected.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import types
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import (
  Annotated,
  Any,
  Literal,
  NotRequired,
  TypeVar,
  Union,
  get_args,
  get_origin,
  is_typeddict,
)

T = TypeVar('T')

# Marks lists of a `TypedDict` that must have as many items: Annotated[list[float], SAME_LENGTH].
SAME_LENGTH = 'same length'

# No file of this project comes near these limits; without them a foreign one can exhaust memory.
LARGEST = 2**28  # bytes
_DEEPEST = 100  # levels of nesting

_WORDS: dict[Any, str] = {
  bool: 'true or false',
  int: 'an integer',
  float: 'a number',
  str: 'a text',
  list: 'a list',
  tuple: 'a list',
  dict: 'an object',
}


class JsonError(ValueError):
  """Content that is not JSON, or not of the type that its reader needs; told in one line."""


def read(path: Path, kind: type[T]) -> T:
  """Returns the content of a JSON file.

  Args:
    path: the file.
    kind: what it has to hold, as for `check`.

  Raises:
    OSError: if the file cannot be read.
    JsonError: if it does not hold that; the error names the file.
  """
  with path.open('rb') as file:
    content = file.read(LARGEST + 1)
  with naming(path):
    return loads(content, kind)


@contextlib.contextmanager
def naming(path: Path, fault: str = 'damaged') -> Iterator[None]:
  """Adds the path of a file, and what is wrong with it, to a JsonError of the block."""
  try:
    yield
  except JsonError as error:
    raise JsonError(f'{path}: {fault} ({error})') from None


def loads(text: bytes, kind: type[T]) -> T:
  """Returns the content of a JSON text, which may begin with a byte order mark.

  Raises:
    JsonError: if it is not JSON, holds a name twice, is too long, or is not of this kind.
  """
  if len(text) > LARGEST:
    raise JsonError(f'longer than {LARGEST} bytes')
  try:
    return check(_plain(json.loads(text.decode('utf-8-sig'), object_pairs_hook=_object)), kind)
  except JsonError:
    raise
  except (ValueError, RecursionError) as error:
    reason = ' '.join(str(error).split())[:200]
    raise JsonError(f'no JSON: {reason}' if text.strip() else 'empty') from None


def dumps(content: Any, indent: int | None = None) -> str:
  """Returns JSON text, with null for numbers that are not finite."""
  return json.dumps(_plain(content), indent=indent, allow_nan=False)


def check(content: Any, kind: type[T], place: str = '') -> T:
  """Returns JSON values as the type that a reader needs, with NaN for null where it says float.

  Args:
    content: the values.
    kind: `bool`, `int`, `float`, `str`, `list[X]`, `tuple[X, ...]`, `tuple[X, Y]`, `dict[str, X]`,
      `Literal[...]`, `X | None`, `Any`, or a `TypedDict`. Lists stay lists where it says tuple. A
      `TypedDict` may have more names, whose values are not checked.
    place: where the content stands, for the error.

  Raises:
    JsonError: if they are not of that type; the error names the place.
  """
  return typing.cast(T, _checked(content, kind, place))


def _checked(content: Any, kind: Any, place: str) -> Any:
  base, arguments = get_origin(kind) or kind, get_args(kind)
  if kind is Any:
    return content
  if base in (NotRequired, Annotated):
    return _checked(content, arguments[0], place)
  if base in (Union, types.UnionType):  # X | None; a file holds no functions
    (rest,) = (e for e in arguments if e is not types.NoneType and get_origin(e) is not Callable)
    return None if content is None else _checked(content, rest, place)
  if base is Literal:
    if content not in arguments:
      raise JsonError(f'{place} must be one of {", ".join(arguments)}, got {_shown(content)}')
    return content
  if is_typeddict(kind):
    given = _checked(content, dict[str, Any], place)
    hints = _hints(kind)
    missing = [name for name, hint in hints.items() if name not in given and not _optional(hint)]
    if missing:
      raise JsonError(f'{place or "the content"} has no {", ".join(missing)}')
    known = {name: hints[name] for name in given if name in hints}
    given |= {n: _checked(given[n], hint, _join(place, n)) for n, hint in known.items()}
    counts = {n: len(given[n]) for n, hint in known.items() if get_origin(hint) is Annotated}
    if len(set(counts.values())) > 1:
      raise JsonError(f'{place or "the content"} has lists of different lengths: {counts}')
    return given
  if kind is float and content is None:
    return math.nan
  accepted = {float: (int, float), tuple: (list, tuple)}.get(base, base)
  if not isinstance(content, accepted) or (isinstance(content, bool) and base is not bool):
    raise JsonError(f'{place or "the content"} must be {_WORDS[base]}, got {_shown(content)}')
  if base is dict and arguments:
    return {
      name: _checked(each, arguments[1], _join(place, name)) for name, each in content.items()
    }
  if base is tuple and arguments[-1] is not ...:
    if len(content) != len(arguments):
      raise JsonError(f'{place} must have {len(arguments)} items, got {len(content)}')
    return [_checked(each, one, place) for each, one in zip(content, arguments, strict=True)]
  if base in (list, tuple) and arguments:
    return [_checked(each, arguments[0], place) for each in content]
  return content


@functools.cache
def _hints(kind: Any) -> dict[str, Any]:
  return typing.get_type_hints(kind, include_extras=True)


def _optional(hint: Any) -> bool:
  return get_origin(hint) is NotRequired


def _join(place: str, name: str) -> str:
  shown = name if name.isidentifier() else _shown(name)  # a file may hold any name
  return f'{place}.{shown}' if place else shown


def _shown(content: Any) -> str:
  return repr(content)[:80]


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
  found = dict(pairs)
  if len(found) < len(pairs):
    raise JsonError('an object has a name twice')
  return found


def _plain(content: Any, depth: int = 0) -> Any:
  """Returns values that every JSON reader takes alike: no NaN, half characters or huge integers."""
  if depth > _DEEPEST:
    raise JsonError(f'nested more than {_DEEPEST} levels deep')
  if isinstance(content, float):
    return content if math.isfinite(content) else None
  if isinstance(content, int) and abs(content) >= 2**63:
    raise JsonError('an integer has more than 64 bits')
  if isinstance(content, str):
    # Raises for half of a surrogate pair, except for a byte of a file name that is not UTF-8.
    content.encode(errors='surrogateescape')
  if isinstance(content, dict):
    return {_plain(name): _plain(each, depth + 1) for name, each in content.items()}
  if isinstance(content, list | tuple):
    return [_plain(each, depth + 1) for each in content]
  return content
