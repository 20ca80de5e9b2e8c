"""How encodings are certified in batches: the ball, the method, the batches, and the bisection."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from se_vae import certification
from se_vae.attacks.projections import Norm, as_bounds
from se_vae.certification import Method
from se_vae.config import NORMS, ArgumentError
from se_vae.evaluation.linear_probe import LinearProbe, ProbedEncoder
from se_vae.models.layer_lists import encoder_of
from se_vae.parallel import sharding

# Coefficients of linear bounds that one example, and one batch, may have. An MLP of 4 x 200 units
# on 784 pixels has 0.3 million, a ConvNet of 4 x 32 channels on 28 x 28 pixels 20 million.
_MOST_COEFFICIENTS = 2**22
_BATCH_COEFFICIENTS = 2**24


@dataclasses.dataclass(frozen=True)
class Certifier:
  """How encodings are certified: the ball, the method, and how images are cut into batches.

  Attributes:
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    method: of `certification.Method`; CROWN by default.
    every_probe: whether margins follow from the box of the means alone. They are smaller then, and
      `latent_box` is all that is needed to certify another probe.
    batch_size: images at a time, or fewer where there are fewer.
    mesh: devices to spread a batch over; all of them if None.
  """

  norm: Norm = 'linf'
  bounds: tuple[float, float] = (0.0, 1.0)
  method: Method = certification.CROWN
  every_probe: bool = False
  batch_size: int = 32
  mesh: Mesh | None = None

  def __post_init__(self) -> None:
    if not isinstance(self.method, Method):
      raise ArgumentError('method', f'must be a certification.Method, got {self.method!r}')
    object.__setattr__(self, 'bounds', as_bounds(self.bounds))
    if self.norm not in NORMS:
      raise ArgumentError('norm', f'must be one of {", ".join(NORMS)}, got {self.norm!r}')

  def region(self, x: jax.Array, radius: jax.Array) -> certification.Region:
    """Returns the ball of each image `[B, ...]` with its radius `[B]`."""
    return certification.ball(x, radius, norm=self.norm, bounds=self.bounds)

  def map(
    self,
    function: Callable[..., Any],
    constants: Any,
    arrays: Any,
    *,
    count: int | None = None,
    map_batches: Callable[..., Any] = sharding.map_batches,
  ) -> Any:
    """Returns `function(self, constants, batch)` for all rows of host arrays, as NumPy arrays.

    A batch is at most as large as `count`, which is the number of rows if it is not given.
    `map_batches` is called in the place of that of `sharding`.
    """
    mesh = sharding.data_mesh() if self.mesh is None else self.mesh
    count = len(jax.tree.leaves(arrays)[0]) if count is None else count
    function = functools.partial(function, self, sharding.replicate(mesh, constants))
    return map_batches(mesh, function, arrays, min(self.batch_size, count))


LINF_CROWN = Certifier()


def certifier_for(
  logits_fn: Any,
  args: tuple[Any, ...],
  image_shape: tuple[int, ...],
  *,
  method: Method | None = None,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  mesh: Mesh | None = None,
) -> Certifier:
  """Returns a certifier with a method and a batch size that suit the size of an encoder.

  CROWN's cost grows with the units of a layer times those of the layers below it. Where one image
  would need more than four million coefficients, as in a ConvNet, the method is CROWN-IBP.

  Args:
    logits_fn: a `ProbedEncoder`.
    args: its parameters, of which only shapes and dtypes are used, and its probe, or None if it is
      not fitted yet.
    image_shape: of one image.
    method: in place of the one that suits.
    norm: of the certifier, as are `bounds` and `mesh`.
    bounds: lowest and highest pixel value.
    mesh: devices; all of them if None.

  Raises:
    ArgumentError: for another function or probe, and for an encoder with layers that cannot be
      certified.
  """
  if type(logits_fn) is not ProbedEncoder or len(args) != 2:  # a subclass may compute another thing
    name = getattr(logits_fn, '__name__', type(logits_fn).__name__)
    message = f'needs a ProbedEncoder, with its parameters and probe as args; got {name}'
    raise ArgumentError('certify', message)
  if args[1] is not None:
    check_probe(args[1])
  try:
    layers = jax.eval_shape(functools.partial(encoder_of, logits_fn.model), args[0]).means()
  except TypeError as error:
    raise ArgumentError('certify', str(error)) from None
  count = certification.num_coefficients(layers, image_shape)
  if method is None:
    method = certification.CROWN if count <= _MOST_COEFFICIENTS else Method('crown_ibp')
  batch_size = Certifier.batch_size
  if method.name == 'crown':
    batch_size = max(1, min(batch_size, _BATCH_COEFFICIENTS // count))
  return Certifier(norm, bounds, method, batch_size=batch_size, mesh=mesh)


def check_probe(probe: Any) -> None:
  """Raises ArgumentError unless it is a `LinearProbe`: a subclass may compute another thing."""
  if type(probe) is not LinearProbe:
    raise ArgumentError('probe', f'must be a LinearProbe, got {type(probe).__name__}')


def num_rounds(radii: Sequence[float], *, num_steps: int) -> int:
  """Returns how often `largest_radius` asks at most."""
  return len(np.unique(np.asarray(radii, np.float32))).bit_length() + num_steps


def largest_radius(
  is_certified: Callable[[np.ndarray, np.ndarray], np.ndarray],
  count: int,
  radii: Sequence[float],
  *,
  num_steps: int,
) -> np.ndarray:
  """Returns the largest certified radius found, float32 `[N]`; -1 where no radius is certified.

  A ball holds all smaller ones, so an example that is certified at one radius is so at all smaller
  ones. Each round asks only for examples that are not decided yet.

  Args:
    is_certified: maps examples `[M]` and a radius for each to bool `[M]`.
    count: N.
    radii: are bisected first, so that the result tells at which of them an example is certified.
    num_steps: halvings of the interval between two of the radii that is left then.
  """
  grid: np.ndarray = np.unique(np.asarray(radii, np.float32))
  # The first `low` radii are certified, and the one after the first `high` is not.
  low: np.ndarray = np.zeros(count, np.int32)
  high = np.full(count, len(grid), np.int32)
  while len(rows := np.flatnonzero(low < high)):
    middle = (low[rows] + high[rows]) // 2
    certified = is_certified(rows, grid[middle])
    low[rows] = np.where(certified, middle + 1, low[rows])
    high[rows] = np.where(certified, high[rows], middle)
  radius = np.append(np.float32(-1.0), grid)[low]
  rows = np.flatnonzero((low > 0) & (low < len(grid)))
  other = grid[low[rows]]
  for _ in range(num_steps if len(rows) else 0):
    middle = np.float32(0.5) * (radius[rows] + other)
    certified = is_certified(rows, middle)
    radius[rows] = np.where(certified, middle, radius[rows])
    other = np.where(certified, other, middle)
  return radius
