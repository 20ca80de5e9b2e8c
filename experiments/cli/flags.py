"""One frozen dataclass is a binary's flags, their help and limits, and its configuration."""

from __future__ import annotations

import dataclasses
import math
import shlex
import types
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from absl import flags as absl_flags

Config = TypeVar('Config')

# The flags defined here belong to the binary that asks for them, and are listed by its --help.
absl_flags.disclaim_key_flags()


class UsageError(Exception):
  """Something the user can put right; one line that names the flag and what is allowed."""


def setting(
  default: Any,
  description: str,
  *,
  choices: Sequence[str] | None = None,
  at_least: float | None = None,
  above: float | None = None,
  at_most: float | None = None,
) -> Any:
  """A dataclass field that is also a flag, with the values it allows."""
  limits = {'choices': choices, 'at_least': at_least, 'above': above, 'at_most': at_most}
  return dataclasses.field(default=default, metadata={'help': description, **limits})


def define_flags(
  config_type: type[Any], flag_values: absl_flags.FlagValues = absl_flags.FLAGS
) -> None:
  """Defines one absl flag for each field of `config_type`."""
  types_by_name = typing.get_type_hints(config_type)
  for field in dataclasses.fields(config_type):
    default: Any = field.default
    description = field.metadata['help']
    kind = _value_type(types_by_name[field.name])
    if field.metadata['choices'] is not None:
      description += f' One of: {", ".join(field.metadata["choices"])}.'
    if kind is bool:
      absl_flags.DEFINE_bool(field.name, default, description, flag_values=flag_values)
    elif kind is int:
      absl_flags.DEFINE_integer(field.name, default, description, flag_values=flag_values)
    elif kind is float:
      absl_flags.DEFINE_float(field.name, default, description, flag_values=flag_values)
    elif kind is str:
      absl_flags.DEFINE_string(field.name, default, description, flag_values=flag_values)
    else:
      text = None if default is None else [str(value) for value in default]
      absl_flags.DEFINE_list(field.name, text, description, flag_values=flag_values)


def from_flags(
  config_type: type[Config], flag_values: absl_flags.FlagValues = absl_flags.FLAGS
) -> Config:
  """The configuration that the parsed flags describe, checked."""
  types_by_name = typing.get_type_hints(config_type)
  values: dict[str, Any] = {}
  for field in dataclasses.fields(config_type):  # type: ignore[arg-type]
    value = flag_values[field.name].value
    kind = _value_type(types_by_name[field.name])
    if typing.get_origin(kind) is tuple and value is not None:
      value = _parse_list(field.name, value, typing.get_args(kind)[0])
    values[field.name] = value
  config = config_type(**values)
  check(config)
  return config


def parse(config_type: type[Config], text: str, flag: str) -> Config:
  """The configuration that the flags in `text` describe, checked; errors name `flag`."""
  values = absl_flags.FlagValues()
  define_flags(config_type, values)
  try:
    rest = values([flag, *shlex.split(text)])[1:]
    if rest:
      raise UsageError(f'unexpected argument {rest[0]!r}')
    return from_flags(config_type, values)
  except (absl_flags.Error, UsageError, ValueError) as error:
    raise UsageError(f'{flag}: {" ".join(str(error).split())}') from None


def check(config: Any) -> None:
  """Raises UsageError, naming the flag, unless every field is within its limits."""
  for field in dataclasses.fields(config):
    value = getattr(config, field.name)
    for item in value if isinstance(value, tuple) else (value,):
      _check_value(f'--{field.name}', item, field.metadata)
    if value == ():
      raise UsageError(f'--{field.name}: needs at least one value')


def to_dict(config: Any) -> dict[str, Any]:
  """The configuration as JSON values."""
  return {
    name: list(value) if isinstance(value, tuple) else value
    for name, value in dataclasses.asdict(config).items()
  }


def from_dict(config_type: Callable[..., Config], values: dict[str, Any]) -> Config:
  """The inverse of `to_dict`."""
  return config_type(**{name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})


def _value_type(annotation: Any) -> Any:
  """The T of `T` or `T | None`."""
  if isinstance(annotation, types.UnionType):
    return next(kind for kind in typing.get_args(annotation) if kind is not type(None))
  return annotation


def _parse_list(name: str, items: Sequence[str], kind: Callable[[str], Any]) -> tuple[Any, ...]:
  try:
    return tuple(kind(item) for item in items)
  except ValueError:
    raise UsageError(f'--{name}: must be numbers separated by commas, got {items}') from None


def _check_value(flag: str, value: Any, limits: Any) -> None:
  if value is None:
    return
  if limits['choices'] is not None and value not in limits['choices']:
    raise UsageError(f'{flag}: must be one of {", ".join(limits["choices"])}; got {value!r}')
  if isinstance(value, float) and not math.isfinite(value):
    raise UsageError(f'{flag}: must be finite; got {value}')
  if limits['at_least'] is not None and value < limits['at_least']:
    raise UsageError(f'{flag}: must be >= {limits["at_least"]}; got {value}')
  if limits['above'] is not None and value <= limits['above']:
    raise UsageError(f'{flag}: must be > {limits["above"]}; got {value}')
  if limits['at_most'] is not None and value > limits['at_most']:
    raise UsageError(f'{flag}: must be <= {limits["at_most"]}; got {value}')
