"""The training loop: from a state to the last step, with rows of metrics on the way.

The loop knows nothing of a bound or a model. It takes a step function, feeds it with batches, and
averages the metrics that it returns.
"""

from __future__ import annotations

import functools
import time
from collections.abc import Iterator
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae.data.transforms import pixels
from se_vae.parallel import processes, sharding
from se_vae.training import input_pipeline
from se_vae.training.step import Metrics


class StepFunction(Protocol):
  """A training step on one device's share of a batch. Hashable: equal ones share programs."""

  def __call__(
    self, state: Any, args: Any, x: jax.Array, examples: jax.Array
  ) -> tuple[Any, Metrics]:
    """Returns the new state and scalar metrics, the same on every device.

    It is called within `sharding.per_device`, and averages by `sharding.mean_over_devices`.

    Args:
      state: a pytree of arrays with an attribute `step`, the number of steps done.
      args: a pytree of arrays and numbers that stay the same for the whole run.
      x: this device's images `[B, H, W, C]` in [0, 1].
      examples: int32 `[B]`, their places in the training set.
    """


class Window(NamedTuple):
  """The metrics of the steps since the last row, which every checkpoint holds.

  Attributes:
    num_steps: int32, the number of those steps.
    sums: each metric, summed over them.
    bad_step: int32, the first step with a metric that is not finite; -1 if there is none.
    bad_metrics: the metrics of that step.
  """

  num_steps: Any
  sums: Any
  bad_step: Any
  bad_metrics: Any


def empty_window(step_function: StepFunction, state: Any, args: Any, images: np.ndarray) -> Window:
  """Returns the window before its first step, as NumPy arrays.

  No step is taken: the shapes of the arguments alone are used.

  Args:
    step_function: the training step.
    state: its state.
    args: its further arguments.
    images: the training set `[N, H, W, C]`.
  """
  mesh = sharding.data_mesh(1)  # one device of each process
  x = jax.ShapeDtypeStruct((mesh.size, *images.shape[1:]), jnp.float32)
  examples = jax.ShapeDtypeStruct((mesh.size,), jnp.int32)
  with jax.enable_x64(False):  # as in `run`
    metrics = _metrics.eval_shape(step_function, mesh, state, args, x, examples)
  zeros = {name: np.zeros(leaf.shape, leaf.dtype) for name, leaf in metrics.items()}
  return Window(np.zeros((), np.int32), zeros, np.full((), -1, np.int32), zeros)


@functools.partial(jax.jit, static_argnames=('step_function', 'mesh'))
def _metrics(
  step_function: StepFunction,
  mesh: Mesh,
  state: Any,
  args: Any,
  x: jax.Array,
  examples: jax.Array,
) -> Metrics:
  """Returns the metrics of a step. It is traced for their shapes alone, and JAX keeps those."""
  step = sharding.per_device(mesh, step_function, (None, None, 0, 0))
  metrics: Metrics = step(state, args, x, examples)[1]
  return metrics


def _add_to_window(window: Window, step: jax.Array, metrics: Metrics) -> Window:
  finite = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
  is_first_bad = ~finite & (window.bad_step < 0)

  def keep(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(is_first_bad, new, old)

  return Window(
    window.num_steps + 1,
    jax.tree.map(jnp.add, window.sums, metrics),
    keep(step, window.bad_step),
    {name: keep(value, window.bad_metrics[name]) for name, value in metrics.items()},
  )


@functools.partial(
  jax.jit,
  static_argnames=('step_function', 'mesh', 'vectorize'),
  donate_argnames=('state', 'window'),
)
def train_steps(
  step_function: StepFunction,
  mesh: Mesh,
  state: Any,
  window: Window,
  args: Any,
  images: jax.Array,
  examples: jax.Array,
  count: jax.typing.ArrayLike,
  vectorize: sharding.Vectorize = 'auto',
) -> tuple[Any, Window]:
  """Takes `count` training steps in one dispatch.

  On a mesh with a population axis all arrays have a leading axis of members, `count` too.

  Args:
    step_function: the training step.
    mesh: the devices.
    state: replicated; donated.
    window: replicated; donated.
    args: further arguments of the step, replicated.
    images: uint8 `[K, B, H, W, C]`, the batches, split along B.
    examples: int32 `[K, B]`, their places in the training set, split along B.
    count: how many of the K steps to take, traced: any number of them shares one compilation.
    vectorize: how a device takes the members of a population, as for `sharding.per_device`.

  Returns:
    The new state and window.
  """

  def on_device(
    carry: tuple[Any, Window], args: Any, images: jax.Array, examples: jax.Array, count: jax.Array
  ) -> tuple[Any, Window]:
    def step(i: jax.Array, carry: tuple[Any, Window]) -> tuple[Any, Window]:
      state, window = carry
      after, metrics = step_function(state, args, pixels(images[i]), examples[i])
      return after, _add_to_window(window, state.step, metrics)

    return jax.lax.fori_loop(0, count, step, carry)

  parallel = sharding.per_device(mesh, on_device, (None, None, 1, 1, None), vectorize)
  after: tuple[Any, Window] = parallel((state, window), args, images, examples, count)
  return after


class NotFiniteError(FloatingPointError):
  """A training step had a NaN or an infinity among its metrics.

  Attributes:
    step: the step.
    metrics: its metrics.
    examples: `[B]`, the training examples of its batch.
    member: the name of the run in its population; '' for a run of its own.
  """

  def __init__(
    self, step: int, metrics: dict[str, float], examples: np.ndarray, member: str = ''
  ) -> None:
    bad = ', '.join(f'{name} {value}' for name, value in metrics.items() if not np.isfinite(value))
    place = f'{member}: ' if member else ''
    super().__init__(f'{place}step {step} is not finite: {bad}')
    self.member = member
    self.step = step
    self.metrics = metrics
    self.examples = examples


class Progress(NamedTuple):
  """The state of a run after a dispatch.

  Attributes:
    state: valid until the next dispatch.
    window: the metrics since the last row, valid until the next dispatch.
    row: the metrics averaged over the row that this dispatch completed; None within a row.
  """

  state: Any
  window: Window
  row: dict[str, float] | None


def run(
  step_function: StepFunction,
  state: Any,
  args: Any,
  images: np.ndarray,
  indices_for: input_pipeline.IndicesFor,
  *,
  num_steps: int,
  steps_per_row: int,
  mesh: Mesh,
  steps_per_checkpoint: int | None = None,
  window: Window | None = None,
  seconds_per_dispatch: float = 1.0,
) -> Iterator[Progress]:
  """Trains from `state` to step `num_steps`, and yields the progress about once a second.

  How the steps fall into dispatches changes neither the state nor the rows. A row ends at every
  multiple of `steps_per_row` and at the last step. Its sums are carried from one dispatch to the
  next, or through a checkpoint.

  Args:
    step_function: the training step.
    state: the state to start from.
    args: further arguments of the step.
    images: the training set `[N, H, W, C]`, uint8.
    indices_for: maps (first step, number of steps) to example indices `[steps, B]`, as
      `data.batch_indices` does.
    num_steps: the step to end at.
    steps_per_row: number of steps that a row of metrics averages over.
    mesh: the devices, whose number must divide the batch size.
    steps_per_checkpoint: a dispatch ends at every multiple of it too, so that the state there can
      be saved; None for rows alone.
    window: the window that was saved with `state`.
    seconds_per_dispatch: how long a dispatch should take, at most.

  Raises:
    NotFiniteError: after a dispatch in which a metric was not finite.
  """
  step, dispatch_steps = int(state.step), 1
  window = empty_window(step_function, state, args, images) if window is None else window
  empty = jax.tree.map(np.zeros_like, window)._replace(bad_step=np.full((), -1, np.int32))
  batch_size = indices_for(step, 1).shape[1]
  chunk_steps = input_pipeline.steps_per_chunk(images, batch_size, at_most=steps_per_row)
  state, window = sharding.replicate_copy(mesh, (state, window))
  with jax.enable_x64(False):  # Python's numbers are 32 bits wide, whatever the user has set
    args = sharding.replicate(mesh, jax.tree.map(jnp.asarray, args))
  chunk = input_pipeline.read_chunk(mesh, images, indices_for(step, chunk_steps))
  while step < num_steps:
    row_end = next_end(step, num_steps, steps_per_row)
    end = next_end(step, row_end, steps_per_checkpoint or row_end)
    count = min(dispatch_steps, chunk_steps, end - step)
    began = time.monotonic()
    state, window = train_steps(step_function, mesh, state, window, args, *chunk, np.int32(count))
    step += count
    # The next batches are read while the devices work.
    chunk = input_pipeline.read_chunk(mesh, images, indices_for(step, chunk_steps))
    bad_step = int(window.bad_step)  # waits for the devices
    steps_per_second = count / (time.monotonic() - began)
    if bad_step >= 0:
      examples = indices_for(bad_step, 1)[0]
      raise NotFiniteError(bad_step, to_floats(window.bad_metrics), examples)
    row = None
    if step == row_end:
      row = row_of(window)
      window = sharding.replicate_copy(mesh, empty)
    yield Progress(state, window, row)
    # The first dispatch includes the compilation, so the second one has a single step too.
    fitting = max(1, int(steps_per_second * seconds_per_dispatch))
    dispatch_steps = processes.maximum(fitting)  # one clock for all processes


def row_of(window: Window) -> dict[str, float]:
  """Returns the averages of the metrics over the steps of a window."""
  num_steps = int(window.num_steps)
  return {name: total / num_steps for name, total in to_floats(window.sums).items()}


def next_end(step: int, last: int, every: int) -> int:
  """Returns the first multiple of `every` after `step`, or `last` if that comes before it."""
  return min((step // every + 1) * every, last)


def to_floats(metrics: Metrics) -> dict[str, float]:
  """Returns scalar metrics as Python's numbers."""
  return {name: float(value) for name, value in jax.device_get(metrics).items()}
