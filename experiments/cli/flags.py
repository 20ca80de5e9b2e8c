"""Command-line flags that are derived from dataclasses of settings.

A binary has one frozen dataclass of settings, whose fields are made by `se_vae.config.setting` or
are dataclasses of settings themselves. All of them become flags, with one flat list of names, and
`to_dict` gives the flat JSON object that config.json and result.json hold.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import shlex
import types
import typing
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from absl import flags as absl_flags
from etils import epy

from se_vae.config import ArgumentError, validate
from se_vae.storage import json_files

with epy.lazy_imports():  # --help and wrong flags are answered without it
  from se_vae.storage import pretrained

Config = TypeVar('Config')

# Where a binary works. No result depends on it.
PLACES = ('workdir', 'output', 'data_dir', 'cache_dir')
# Directories that results record. A relative one would name another place from elsewhere.
_DIRECTORIES = ('data_dir', 'cache_dir', 'init_from', 'surrogate')
# Those of them that take the name of a pretrained encoder too.
ENCODERS = ('init_from', 'surrogate')

# The flags defined here belong to the binary that asks for them, and are listed by its --help.
absl_flags.disclaim_key_flags()

_DEFINE: dict[Any, Callable[..., Any]] = {
  bool: absl_flags.DEFINE_bool,
  int: absl_flags.DEFINE_integer,
  float: absl_flags.DEFINE_float,
  str: absl_flags.DEFINE_string,
}


class UsageError(ArgumentError):
  """The command line is wrong in a way that one message explains; it names the flags itself."""

  def __init__(self, message: str) -> None:
    super().__init__((), message)

  def __str__(self) -> str:
    return self.message


def name_flags(error: ArgumentError, known: absl_flags.FlagValues | None = None) -> str:
  """Returns the message of an error in one line, with `--` before the name of every flag.

  Args:
    error: the error.
    known: the flags that there are; if None, every argument is one.
  """
  flags = ', '.join(
    f'--{name}' if known is None or name in known else name for name in error.arguments
  )
  return ' '.join((f'{flags}: {error.message}' if flags else error.message).split())


def define_flags(
  config_type: type[Any], flag_values: absl_flags.FlagValues = absl_flags.FLAGS
) -> None:
  """Defines one absl flag for each setting of `config_type`."""
  for field, kind in _settings(config_type):
    default: Any = field.default
    if isinstance(default, tuple):
      default = [str(value) for value in default]
    description = field.metadata['help']
    if field.metadata['choices'] is not None:
      description += f' One of: {", ".join(field.metadata["choices"])}.'
    define = _DEFINE.get(kind, absl_flags.DEFINE_list)
    define(field.name, default, description, flag_values=flag_values)


def from_flags(
  config_type: type[Config], flag_values: absl_flags.FlagValues = absl_flags.FLAGS
) -> Config:
  """Returns the configuration that the parsed flags describe.

  Raises:
    ArgumentError: if a value is outside its limits.
  """
  config = from_dict(config_type, absolute(_values(config_type, flag_values)))
  validate(config)
  return config


def _values(config_type: type[Any], flag_values: absl_flags.FlagValues) -> dict[str, Any]:
  values: dict[str, Any] = {}
  for field, kind in _settings(config_type):
    value = flag_values[field.name].value
    if typing.get_origin(kind) is tuple and value is not None:
      item_type = typing.get_args(kind)[0]
      try:
        value = tuple(item_type(item) for item in value)
      except ValueError:
        message = f'must be numbers separated by commas, got {value}'
        raise ArgumentError(field.name, message) from None
    values[field.name] = value
  return values


def absolute(values: dict[str, Any]) -> dict[str, Any]:
  """Returns settings by name, with the directories that results record as absolute paths.

  The names of pretrained encoders stay as they are.
  """
  paths = {
    name: os.path.abspath(os.path.expanduser(values[name]))
    for name in _DIRECTORIES
    if values.get(name) and not (name in ENCODERS and values[name] in pretrained.names())
  }
  kind, _, folder = str(values.get('dataset')).partition(':')
  if kind == 'folder' and folder:
    paths['dataset'] = f'{kind}:{os.path.abspath(os.path.expanduser(folder))}'
  return values | paths


def parse(config_type: type[Config], text: str, flag: str) -> Config:
  """Returns the configuration that the flags in `text` describe.

  Raises:
    UsageError: if they are wrong; the message begins with `flag`.
  """
  with errors_begin_with(flag):
    config = from_dict(config_type, absolute(parse_values(config_type, shlex.split(text))))
    validate(config)
    return config


def parse_values(config_type: type[Any], arguments: list[str]) -> dict[str, Any]:
  """Returns all settings by name, as command line arguments give them. Limits are not checked.

  Raises:
    absl.flags.Error, ArgumentError: if an argument is no flag, or has no value of its type.
  """
  flag_values = absl_flags.FlagValues()
  define_flags(config_type, flag_values)
  rest = flag_values(['', *arguments])[1:]
  if rest:
    raise UsageError(f'unexpected argument {rest[0]!r}')
  return _values(config_type, flag_values)


@contextlib.contextmanager
def errors_begin_with(flag: str) -> Iterator[None]:
  """Raises a UsageError whose message begins with `flag` for errors in the context."""
  try:
    yield
  except ArgumentError as error:
    raise UsageError(f'{flag}: {name_flags(error)}') from None
  except (absl_flags.Error, ValueError) as error:
    raise UsageError(f'{flag}: {" ".join(str(error).split())}') from None


def names(config_type: type[Any]) -> list[str]:
  """Returns the names of all settings, in the order of the flags."""
  return [field.name for field, _ in _settings(config_type)]


def to_dict(config: Any) -> dict[str, Any]:
  """Returns all settings by name, as JSON values."""
  values: dict[str, Any] = {}
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    if dataclasses.is_dataclass(value):
      values |= to_dict(value)
    else:
      values[field.name] = list(value) if isinstance(value, tuple) else value
  return values


def from_dict(config_type: type[Config], values: dict[str, Any]) -> Config:
  """Returns the configuration with these settings, and defaults for the others.

  Raises:
    ArgumentError: if a value is not of its type, or outside the limits that the configuration
      checks itself.
    TypeError: if there is no setting of a name.
  """
  unknown = values.keys() - names(config_type)
  if unknown:
    raise TypeError(f'{config_type.__name__} has no setting {", ".join(sorted(unknown))}')
  annotations: dict[str, Any] = typing.get_type_hints(config_type)
  arguments: dict[str, Any] = {}
  for field in dataclasses.fields(config_type):  # type: ignore[arg-type]
    kind = annotations[field.name]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
      part = {name: values[name] for name in names(kind) if name in values}
      arguments[field.name] = from_dict(kind, part)
    elif field.name in values:
      try:
        value = json_files.check(values[field.name], kind, 'the value')
      except json_files.JsonError as error:
        raise ArgumentError(field.name, str(error)) from None
      arguments[field.name] = tuple(value) if isinstance(value, list) else value
  return config_type(**arguments)


def replace(config: Config, **changes: Any) -> Config:
  """Returns the configuration with some settings changed, whichever part of it they are in."""
  return from_dict(type(config), to_dict(config) | changes)


def reference(config_type: type[Any]) -> str:
  """Returns a Markdown table of the flags: their defaults, meanings and allowed values."""
  lines = ['| Flag | Default | Meaning |', '|---|---|---|']
  for field, _ in _settings(config_type):
    default = field.default
    if isinstance(default, tuple):
      default = ','.join(map(str, default))
    elif isinstance(default, bool):
      default = str(default).lower()
    shown = '' if default in (None, '') else f'`{default}` '
    meaning = f'{field.metadata["help"]}{_limits(field)}'.replace('|', '\\|')
    lines.append(f'| `--{field.name}` | {shown}| {meaning} |')
  return '\n'.join(lines)


def _limits(field: dataclasses.Field[Any]) -> str:
  """Returns the allowed values in words, after a space; nothing where all are allowed."""
  limits = field.metadata
  if limits['choices'] is not None:
    return f' One of `{"`, `".join(limits["choices"])}`.'
  bounds = [
    f'{words} {limits[name]}'
    for name, words in (('at_least', 'at least'), ('above', 'above'), ('at_most', 'at most'))
    if limits[name] is not None
  ]
  return f' {" and ".join(bounds).capitalize()}.' if bounds else ''


def _settings(config_type: type[Any]) -> Iterator[tuple[dataclasses.Field[Any], Any]]:
  """Yields each setting's field and the T of its type `T` or `T | None`, nested ones in place."""
  annotations: dict[str, Any] = typing.get_type_hints(config_type)
  for field in dataclasses.fields(config_type):
    kind = annotations[field.name]
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
      yield from _settings(kind)
    elif isinstance(kind, types.UnionType):
      yield field, next(part for part in typing.get_args(kind) if part is not type(None))
    else:
      yield field, kind
