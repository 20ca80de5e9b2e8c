"""Populations: many encoders, trained side by side by one compiled program.

The members of a population differ in their seeds and in the traced numbers of their settings. Each
draws the batches and the noise of its single run. Members never communicate: each device has some
of them, and takes them one after the other on a CPU, and all at once on a GPU or TPU.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae.parallel import sharding
from se_vae.training import input_pipeline, loop


class PopulationProgress(NamedTuple):
  """The states of a population after a dispatch.

  Attributes:
    step: the number of steps done, by all members that have not ended before.
    states: the members' states, stacked along a first axis that may be longer than the population;
      valid until the next dispatch.
    windows: the metrics since each member's last row, NumPy arrays stacked likewise.
    rows: for each member the metrics averaged over the row that this dispatch completed, or None.
    errors: for each member the error of its first step that was not finite, or None.
  """

  step: int
  states: Any
  windows: loop.Window
  rows: list[dict[str, float] | None]
  errors: list[loop.NotFiniteError | None]

  def members(self) -> list[loop.Progress]:
    """Returns the progress of each member, as its single run yields it, in host memory.

    It is valid until the next dispatch. A member that has ended keeps its last state. The state of
    one with an error is of no use.
    """
    states = jax.device_get(self.states)
    return [
      loop.Progress(_member(states, i), _member(self.windows, i), row)
      for i, row in enumerate(self.rows)
    ]


def run_population(
  step_function: loop.StepFunction,
  states: Sequence[Any],
  args: Sequence[Any],
  images: np.ndarray,
  indices_for: Sequence[input_pipeline.IndicesFor],
  *,
  num_steps: Sequence[int],
  steps_per_row: int,
  mesh: Mesh,
  steps_per_checkpoint: int | None = None,
  windows: Sequence[loop.Window] | None = None,
  names: Sequence[str] | None = None,
  vectorize: sharding.Vectorize = 'auto',
  seconds_per_dispatch: float = 1.0,
) -> Iterator[PopulationProgress]:
  """Trains members from their states to their last steps, and yields about once a second.

  This is `training.run` for many runs. Rows and states do not depend on how the steps fall into
  dispatches, nor on the other members. A member whose metrics are not finite takes no further
  steps, and has an error from then on; the others are trained to their ends.

  Args:
    step_function: the training step.
    states: each member's state, all at the same step.
    args: each member's further arguments of the step, of the same structure.
    images: the training set `[N, H, W, C]`, uint8, which the members share.
    indices_for: for each member what maps (first step, number of steps) to example indices
      `[steps, B]`.
    num_steps: the step that each member ends at.
    steps_per_row: number of steps that a row of metrics averages over.
    mesh: the devices, as of `sharding.population_mesh`. The length of its data axis must divide the
      batch size. Where the other does not divide the number of members, the last devices have fewer
      members, or none.
    steps_per_checkpoint: a dispatch ends at every multiple of it too; None for rows alone.
    windows: the windows that were saved with the states.
    names: the members' names, for errors; their numbers if None.
    vectorize: how a device takes its members: 'loop' one after the other, 'vmap' all at once,
      'auto' in a loop on a CPU and all at once elsewhere.
    seconds_per_dispatch: how long a dispatch should take, at most.
  """
  size = len(states)
  names = [f'member {i}' for i in range(size)] if names is None else names
  if windows is None:
    windows = [loop.empty_window(step_function, states[0], args[0], images)] * size
  step, dispatch_steps = _common_step(states), 1
  errors: list[loop.NotFiniteError | None] = [None] * size
  num_groups = mesh.shape[sharding.POPULATION_AXIS]
  # Every device has as many. Those that fill up are copies of the first, and take no steps.
  padding = [0] * (-size % num_groups)
  places = [*range(size), *padding]
  stacked_windows = _stacked([windows[i] for i in places])
  stacked_states = sharding.replicate_copy(mesh, _stacked([states[i] for i in places]))
  with jax.enable_x64(False):  # Python's numbers are 32 bits wide, whatever the user has set
    placed_args = sharding.replicate(mesh, _stacked([args[i] for i in places]))
  batch_size = indices_for[0](step, 1).shape[1]
  chunk_steps = input_pipeline.steps_per_chunk(
    images, batch_size * (len(places) // num_groups), at_most=steps_per_row
  )

  def read_chunk() -> input_pipeline.Chunk:
    examples = np.stack([indices(step, chunk_steps) for indices in indices_for])
    return input_pipeline.read_chunk(mesh, images, examples[places])

  chunk = read_chunk()
  while active := [i for i in range(size) if errors[i] is None and step < num_steps[i]]:
    row_ends = {i: loop.next_end(step, num_steps[i], steps_per_row) for i in active}
    end = min(row_ends.values())
    end = loop.next_end(step, end, steps_per_checkpoint or end)
    count = min(dispatch_steps, chunk_steps, end - step)
    counts = np.zeros(len(places), np.int32)
    counts[active] = count
    began = time.monotonic()
    placed = sharding.replicate_copy(mesh, (stacked_windows, counts))
    stacked_states, stacked_windows = loop.train_steps(
      step_function, mesh, stacked_states, placed[0], placed_args, *chunk, placed[1], vectorize
    )
    step += count
    chunk = read_chunk()  # while the devices work
    # In host memory, where the windows of single members are emptied; waits for the devices.
    stacked_windows = jax.tree.map(np.array, jax.device_get(stacked_windows))
    steps_per_second = count / (time.monotonic() - began)
    rows: list[dict[str, float] | None] = [None] * size
    for i in active:
      window = _member(stacked_windows, i)
      if window.bad_step >= 0:
        examples = indices_for[i](int(window.bad_step), 1)[0]
        metrics = loop.to_floats(window.bad_metrics)
        errors[i] = loop.NotFiniteError(int(window.bad_step), metrics, examples, names[i])
      elif step == row_ends[i]:
        rows[i] = loop.row_of(window)
        _empty(stacked_windows, i)
    yield PopulationProgress(step, stacked_states, stacked_windows, rows, list(errors))
    # The first dispatch includes the compilation, and is followed by one of a step again.
    dispatch_steps = max(1, int(steps_per_second * seconds_per_dispatch))


def _common_step(states: Sequence[Any]) -> int:
  steps = {int(state.step) for state in states}
  if len(steps) > 1:
    raise ValueError(f'the states must be at the same step, got {sorted(steps)}')
  return steps.pop()


def _stacked(trees: Sequence[Any]) -> Any:
  """Returns one tree whose leaves have a leading axis of members, in host memory but for keys."""

  def stack(*leaves: Any) -> Any:
    if jnp.issubdtype(jax.typeof(leaves[0]).dtype, jax.dtypes.prng_key):
      return jnp.stack(leaves)
    stacked = np.stack(jax.device_get(leaves))
    return stacked.astype(jax.dtypes.canonicalize_dtype(stacked.dtype))

  return jax.tree.map(stack, *trees)


def _member(stacked: Any, i: int) -> Any:
  """Returns one member's tree of stacked NumPy arrays, as views."""
  return jax.tree.map(lambda leaf: leaf[i], stacked)


def _empty(windows: loop.Window, i: int) -> None:
  """Empties the window of a member, in place."""
  for leaf in jax.tree.leaves(windows):
    leaf[i] = 0
  windows.bad_step[i] = -1
