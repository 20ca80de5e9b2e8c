"""Names that settings may take, and the error for settings that cannot be used."""

from __future__ import annotations

from collections.abc import Sequence

DATASETS = ('mnist', 'color_mnist', 'fashion_mnist', 'mnist_5k', 'color_mnist_5k')


class ArgumentError(ValueError):
  """An argument or setting has a value that cannot be used.

  Attributes:
    arguments: the names of the arguments that have to change.
    message: one line that says which values are allowed.
  """

  def __init__(self, arguments: str | Sequence[str], message: str) -> None:
    super().__init__(arguments, message)
    self.arguments = (arguments,) if isinstance(arguments, str) else tuple(arguments)
    self.message = message

  def __str__(self) -> str:
    return f'{", ".join(self.arguments)}: {self.message}'
