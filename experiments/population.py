"""Trains the runs of several work directories side by side, as one population.

Every work directory gets the files of its single run, `experiments.pretrain`, which finds the run
finished, or goes on with it.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from etils import epy

from experiments import pretrain, recording
from experiments.cli import devices, flags, messages, signals
from se_vae.config import ArgumentError, TrainConfig

with epy.lazy_imports():  # as in the binaries
  import jax

  from se_vae import data, training
  from se_vae.models import vae
  from se_vae.parallel import sharding

# Settings that may differ between members, beside the numbers that a compiled step takes.
_OWN = frozenset({'workdir', 'seed'})


@dataclasses.dataclass
class _Member:
  """A run that is not finished.

  Attributes:
    config: its settings.
    recorder: writes its files.
    steps: the steps of its good checkpoints, newest first; 0 without any.
    error: of its first step that was not finite.
  """

  config: pretrain.PretrainConfig
  recorder: recording.Recorder
  steps: list[int]
  error: training.NotFiniteError | None = None

  @property
  def rests(self) -> bool:
    """Whether it got no further than its newest checkpoint while the others went on."""
    failed_at = recording.failed_step(self.recorder.workdir)
    return self.steps[0] >= self.config.train.num_steps or failed_at > self.steps[0]


def train_population(
  configs: Sequence[pretrain.PretrainConfig],
  stop: signals.StopSignal,
  description: str = 'population',
) -> list[dict[str, Any]]:
  """Trains the runs of several work directories to their ends; returns the JSON of their results.

  Finished runs are not trained again. The others go on from the newest step of which all of them
  have a good checkpoint. Those that share no step go on as separate populations, one after the
  other, and so do those that had failed or reached their end. Each member trains on one device, so
  the files are those of `experiments.pretrain` with `num_devices` 1. On a CPU, call
  `devices.use_all_cores(batch_size * len(configs))` first. One process trains a population.

  Args:
    configs: each run's settings. They may differ in the work directory, the seed, and the numbers
      that a compiled step takes, such as gamma, obs_var, radius, learning_rate and num_steps.
      `num_devices` is the number of devices for all members.
    stop: asked after each dispatch whether to stop.
    description: text before the progress bar.

  Raises:
    ArgumentError: if a setting cannot be used, or one differs that may not, before anything is
      written.
    Interrupted: when `stop` says so, after a checkpoint of every member.
    NotFiniteError: for the first member with a metric that is not finite, by its work directory.
      All others have been trained to their ends, and have results.
  """
  check_fit_together(configs)
  dataset, *_ = [pretrain.prepare(config) for config in configs]
  common, images = configs[0], dataset.train.images
  mesh = devices.population_mesh(len(configs), common.num_devices)
  copies = -(-len(configs) // mesh.size)
  devices.check_memory(common.model, images.shape[1:], mesh, copies=copies)
  stop.patience = pretrain.PATIENCE
  with contextlib.ExitStack() as held:
    held.enter_context(jax.default_matmul_precision(common.matmul_precision))
    unfinished = []
    for config in configs:
      recorder = held.enter_context(recording.Recorder(config.workdir))
      recorder.lock()
      if pretrain.finished(config) is None:
        steps = recording.good_steps(recorder.workdir) or [0]
        unfinished.append(_Member(config, recorder, steps))
    going = [member for member in unfinished if not member.rests]
    resting = [member for member in unfinished if member.rests]
    for member in resting:
      del member.steps[1:]
    for own in (going, resting):
      for step, members in _by_step(own):
        _train(members, step, dataset, stop, description)
  for member in unfinished:
    if member.error is not None:
      raise member.error
  return [pretrain.run(config, stop) for config in configs]


def check_fit_together(configs: Sequence[pretrain.PretrainConfig]) -> None:
  """Raises ArgumentError, naming the settings, unless these runs can be one population."""
  if not configs:
    raise ArgumentError('configs', 'needs at least one run')
  traced = {field.name for field in dataclasses.fields(TrainConfig) if field.metadata['traced']}
  values = [flags.absolute(flags.to_dict(config)) for config in configs]
  changed = [
    name
    for name, first in values[0].items()
    if name not in _OWN | traced and any(own[name] != first for own in values)
  ]
  changed += training.differing_programs([config.train for config in configs])
  if names := list(dict.fromkeys(changed)):
    raise ArgumentError(names, 'must be the same in all runs of a population')
  if len({own['workdir'] for own in values}) < len(configs):
    raise ArgumentError('workdir', 'must be another one for each run of a population')


def _by_step(members: list[_Member]) -> list[tuple[int, list[_Member]]]:
  """Returns the members in groups, each with the newest step of which all have a checkpoint.

  The run that is furthest behind determines the step of the first group. In a population that was
  killed while it saved, the others have that checkpoint too, as their last but one.
  """
  groups = []
  while members:
    step = min(member.steps[0] for member in members)
    groups.append((step, [member for member in members if step in member.steps]))
    members = [member for member in members if step not in member.steps]
  return groups


def _train(
  members: list[_Member],
  step: int,
  dataset: data.Dataset,
  stop: signals.StopSignal,
  description: str,
) -> None:
  """Trains members from a step to their ends, and writes their results."""
  common, images = members[0].config, dataset.train.images
  model = vae.make_vae(**pretrain.model_arguments(common, dataset))
  step_function = training.TrainStep(model)
  starts = [_start(member, step, step_function, dataset) for member in members]
  states, arguments, windows = zip(*starts, strict=True)
  current = list(map(training.Progress, states, windows, [None] * len(members)))
  done = [step] * len(members)
  totals = [member.config.train.num_steps for member in members]
  with messages.progress_bar(sum(totals), description, initial=step * len(members)) as bar:
    for progress in training.run_population(
      step_function,
      states,
      arguments,
      images,
      [data.batch_stream(member.config.seed, common.batch_size, len(images)) for member in members],
      num_steps=totals,
      steps_per_row=common.log_every,
      steps_per_checkpoint=common.checkpoint_every,
      mesh=devices.population_mesh(len(members), common.num_devices),
      windows=windows,
      names=[str(member.config.workdir) for member in members],
    ):
      signum = stop.requested() or 0
      current = progress.members()
      for i, (member, own) in enumerate(zip(members, current, strict=True)):
        before, done[i] = done[i], int(own.state.step)
        if done[i] > before and member.error is None:  # neither ended before nor failed
          _record(member, own, progress.errors[i], stopping=signum > 0)
          bar.update(done[i] - before)
      if signum:
        raise signals.Interrupted(signum, stop.saves)
  for member, own in zip(members, current, strict=True):
    if member.error is None:
      member.recorder.finish(own.state.params)


def _start(
  member: _Member, step: int, step_function: training.TrainStep, dataset: data.Dataset
) -> tuple[training.TrainState, Any, training.Window]:
  """Returns a member's state, arguments and window at a step, and opens its files."""
  config, images = member.config, dataset.train.images
  state, arguments, window, eval_key = pretrain.first_state(config, step_function, images)
  found = recording.load_at(Path(str(config.workdir)), step)
  state, window, source = pretrain.restore(config, dataset, state, window, found)
  mesh = sharding.data_mesh(1)
  examiner = recording.Examiner(
    step_function.model, config.train, eval_key, dataset.test.images, mesh
  )
  metadata = pretrain.metadata_of(config, dataset, source)
  member.recorder.start(step, metadata, devices.device_kinds(mesh), examiner, None)
  return jax.device_get(state), arguments, window


def _record(
  member: _Member,
  progress: training.Progress,
  error: training.NotFiniteError | None,
  *,
  stopping: bool,
) -> None:
  """Writes what is due for a member after a dispatch."""
  if error is not None:
    member.error = error
    member.recorder.record_not_finite(error)
    recording.add_hint(error, member.config.train.selection)
  else:
    member.recorder.record(progress, stopping)
