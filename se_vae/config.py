"""Settings that a library function refuses."""

from __future__ import annotations


class ArgumentError(ValueError):
  """Arguments that a function does not take; `str` is "radii: must be finite".

  Attributes:
    arguments: names of the arguments.
    message: what is wrong with them.
  """

  def __init__(self, arguments: str | tuple[str, ...], message: str) -> None:
    self.arguments = (arguments,) if isinstance(arguments, str) else arguments
    self.message = message
    super().__init__(f'{", ".join(self.arguments)}: {message}')
