"""The files that a training run leaves in its work directory.

`config.json` has the settings, `metrics.jsonl` a row of metrics for every `log_every` steps,
`checkpoints/` the newest two checkpoints and `checkpoints/best` the one with the lowest loss,
`tensorboard/` event files, and `result.json` the figures of the trained model, with pages of images
beside it. An interruption changes none of them.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
from pathlib import Path
from typing import Any

from etils import epy

from experiments import records
from experiments.cli import messages, provenance, workdirs
from se_vae.config import WITHOUT_DECODER
from se_vae.storage import json_files

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax
  import numpy as np

  from experiments.visual import image_grids, tensorboard
  from se_vae import training
  from se_vae.evaluation import linear_probe, metrics
  from se_vae.models import vae
  from se_vae.storage import atomic_files, checkpoints

CHECKPOINTS = 'checkpoints'
BEST = 'checkpoints/best'
CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
RESULT = 'result.json'
EVENTS = 'tensorboard'
NOT_FINITE = 'not_finite.json'
PAGES = ('reconstructions', 'samples', 'traversals')
_FILES = (CONFIG, METRICS, RESULT, NOT_FINITE, *(f'{page}.png' for page in PAGES))

# Figures of held-out images that mean nothing if the decoder was not trained.
_OF_THE_DECODER = ('elbo', 'log_likelihood', 'squared_error')

_NO_ACTIVE_LATENT = (
  '{}: no latent is active, so all images have about the same encoding; training needs more steps, '
  'or a smaller --learning_rate'
)

# What an event file shows: figures of a fair sample of the held-out images, and the first rows of
# each page. More would take over a hundredth of the time that a VAE trains.
_WATCHED = 500
_WATCHED_ROWS = 5


@dataclasses.dataclass(frozen=True)
class Examiner:
  """Measures a model on held-out images.

  Attributes:
    model: the model.
    config: the settings that it is trained with.
    key: one PRNG key, for latent noise, samples and selections.
    images: the held-out images, uint8 `[N, H, W, C]`.
    mesh: devices of this process.
  """

  model: vae.VAE
  config: training.TrainConfig
  key: jax.Array
  images: np.ndarray
  mesh: jax.sharding.Mesh

  def examine(
    self, params: vae.Params, num_images: int | None = None
  ) -> tuple[dict[str, float], dict[str, np.ndarray]]:
    """Returns figures of the first `num_images` or of all images, and `image_grids.pages` of ten.

    Args:
      params: the model's parameters, in host memory.
      num_images: number of images to measure.
    """
    images = self.images[:num_images]
    figures = metrics.held_out(
      self.model, params, self.key, images, obs_var=self.config.obs_var, mesh=self.mesh
    )
    means = linear_probe.encoder_means(self.model, params, images, mesh=self.mesh)
    figures['active_latents'] = metrics.active_latents(means)
    pages = image_grids.pages(self.model, self.config, params, self.key, images[:10], means)
    return figures, pages


def meaningful(objective: str, figures: dict[str, float]) -> dict[str, float]:
  """Returns figures of held-out images, without the decoder's if `objective` does not train it."""
  left_out = _OF_THE_DECODER if objective in WITHOUT_DECODER else ()
  return {name: value for name, value in figures.items() if name not in left_out}


class Recorder:
  """Writes the files of a run. A context, which holds the lock of the work directory.

  Of several processes that train together the first alone calls the methods.

  Attributes:
    workdir: the work directory.
  """

  def __init__(self, workdir: str | None) -> None:
    self.workdir = Path(str(workdir))
    self._held = contextlib.ExitStack()

  def __enter__(self) -> Recorder:
    return self

  def __exit__(self, *_: object) -> None:
    self._held.close()

  def lock(self) -> None:
    """Makes the work directory and locks it.

    Raises:
      ArgumentError: if another process works in it.
    """
    self._check_place = self._held.enter_context(workdirs.lock(self.workdir, *_FILES))

  def start(
    self,
    step: int,
    metadata: dict[str, Any],
    devices: list[str],
    examiner: Examiner,
    description: str | None,
  ) -> None:
    """Writes config.json and opens the other files, at the step that training starts from.

    Rows of metrics and events of later steps are dropped: they will be written again.

    Args:
      step: the step that training starts from.
      metadata: JSON values for every checkpoint and the result; `config` has the settings.
      devices: the kinds of the devices.
      examiner: measures the model, for the event files and the result.
      description: text before the progress bar; None for a run that shows none.
    """
    settings = metadata['config']
    self._step, self._num_steps = step, settings['num_steps']
    self._log_every, self._checkpoint_every = settings['log_every'], settings['checkpoint_every']
    self._metadata, self._devices, self._examiner = metadata, devices, examiner
    source = {'devices': devices, 'commit': provenance.commit()}
    workdirs.write_json(self.workdir / CONFIG, metadata | source)
    _drop_rows_after(self.workdir / METRICS, step)
    self._best_loss = _best_loss(self.workdir / BEST)
    hold = self._held.enter_context
    self._bar = hold(messages.progress_bar(self._num_steps, description, initial=step))
    self._metrics = hold((self.workdir / METRICS).open('a'))
    self._events = None
    if settings['tensorboard']:
      self._events = hold(tensorboard.EventWriter(self.workdir / EVENTS, step))

  def record(self, progress: training.Progress, stopping: bool) -> None:
    """Writes what is due after a dispatch.

    Args:
      progress: the state of the run.
      stopping: whether a checkpoint is due in any case.
    """
    before, step = self._step, int(progress.state.step)
    self._step = step
    self._check_place()  # a checkpoint would make the directory anew, without what was in it
    tree = {**progress.state._asdict(), 'window': progress.window}
    if progress.row is not None:
      self._record_row(step, progress.row, tree)
    self._bar.update(step - before)
    if self._is_due(before, step) or stopping:
      with atomic_files.naming(self.workdir / METRICS):
        os.fsync(self._metrics.fileno())  # no row may be missing before a checkpoint
      if self._events is not None:
        self._events.sync()
      checkpoints.save(self.workdir / CHECKPOINTS, step, tree, self._metadata)
      self._forget_failure(step)

  def _record_row(self, step: int, row: dict[str, float], tree: dict[str, Any]) -> None:
    """Writes a row of metrics, and what else falls on rows.

    The steps of rows do not depend on interruptions, so neither do the events nor the best
    checkpoint. The best one is saved before the newest one: an interruption between the two changes
    neither.
    """
    with atomic_files.naming(self.workdir / METRICS):
      self._metrics.write(json_files.dumps({'step': step, **row}) + '\n')
      self._metrics.flush()
    self._bar.set_postfix(loss=f'{row["loss"]:.1f}', refresh=False)
    row_start = (step - 1) // self._log_every * self._log_every
    checkpoint_falls_in_row = self._is_due(row_start, step)
    if self._events is not None:
      self._events.row(step, row)
      if checkpoint_falls_in_row:
        self._write_events(step, jax.device_get(tree['params']), self._events)
    if checkpoint_falls_in_row and row['loss'] < self._best_loss:
      self._best_loss = row['loss']
      metadata = {**self._metadata, 'loss': row['loss']}
      checkpoints.save(self.workdir / BEST, step, tree, metadata, keep=1)

  def _write_events(self, step: int, params: vae.Params, events: tensorboard.EventWriter) -> None:
    figures, pages = self._examiner.examine(params, _WATCHED)
    shown = pages['reconstructions']
    figures['selection_linf'] = image_grids.perturbation(shown)
    figures['selection_squared_w2'] = image_grids.squared_w2(self._examiner.model, params, shown)
    events.scalars(step, 'held_out', figures)
    events.images(step, {name: page[:_WATCHED_ROWS] for name, page in pages.items()})

  def _is_due(self, before: int, step: int) -> bool:
    """Returns whether a checkpoint falls between two steps, the second included."""
    every = self._checkpoint_every
    return step // every > before // every or step == self._num_steps

  def _forget_failure(self, step: int) -> None:
    """Removes not_finite.json once training has passed its step, with other settings or code."""
    if 0 < failed_step(self.workdir) <= step:
      (self.workdir / NOT_FINITE).unlink()

  def record_not_finite(self, error: training.NotFiniteError) -> None:
    """Writes not_finite.json, with the step, its metrics and the examples of its batch."""
    report = {'step': error.step, 'metrics': error.metrics, 'examples': error.examples.tolist()}
    workdirs.write_json(self.workdir / NOT_FINITE, report)

  def finish(self, params: vae.Params) -> dict[str, Any]:
    """Writes the pages of images and result.json, and returns what is in it."""
    figures, pages = self._examiner.examine(jax.device_get(params))
    if figures.get('active_latents') == 0:
      messages.warn(_NO_ACTIVE_LATENT.format(self.workdir))
    for name, page in pages.items():
      rows = image_grids.ROWS if name == 'reconstructions' else ()
      image_grids.save(self.workdir / f'{name}.png', page, rows)
    result = {
      'step': self._num_steps,
      'checkpoint': checkpoint_name(self.workdir, self._num_steps),
      'test': figures,
      **self._metadata,
      'devices': self._devices,
    }
    workdirs.write_json(self.workdir / RESULT, result)
    return result


def add_hint(error: training.NotFiniteError, selection: str) -> None:
  """Says in the error what may help, where something is known to."""
  if selection != 'pgd':  # the bounds of a whole ball overflow easily
    hint = 'use --init_from and --ramp, or a smaller --certified_radius'
    error.args = (f'{error}; with --selection={selection}, {hint}',)


def read_result(workdir: Path, num_steps: int, kind: type[Any]) -> dict[str, Any] | None:
  """Returns the result in a work directory; None if it is missing or has to be made again.

  A result is valid for one checkpoint, whose name holds the digest of its content. It has to be
  made again if that is not the newest good checkpoint, or has another number of steps.

  Args:
    workdir: the work directory.
    num_steps: the number of training steps.
    kind: the type of the result in `records`.
  """
  path = workdir / RESULT
  result: dict[str, Any] | None = workdirs.read_json(path, kind)
  if result is None or result['step'] != num_steps:
    return None
  name = checkpoint_name(workdir, num_steps)
  if name is not None and result.setdefault('checkpoint', name) == name:
    return result
  messages.warn(f'{path}: its checkpoint is missing or damaged, so it is made again')
  return None


def checkpoint_name(workdir: Path, step: int) -> str | None:
  """Returns the name of the newest good checkpoint; None if there is none or its step differs."""
  with contextlib.suppress(checkpoints.CheckpointError):
    found = checkpoints.load_latest(workdir / CHECKPOINTS, on_damage=lambda _: None)
    if found is not None and found.metadata['step'] == step:
      return found.path.name
  return None


def load_newest(workdir: Path) -> checkpoints.Checkpoint | None:
  """Returns the newest good checkpoint in a work directory, to train on from; None without any.

  Raises:
    CheckpointError: if all are damaged; the message says what to do.
  """
  directory = workdir / CHECKPOINTS
  try:
    return checkpoints.load_latest(directory, on_damage=messages.warn)
  except checkpoints.CheckpointError as error:
    message = f'{error}; remove this directory to train from the start'
    raise checkpoints.CheckpointError(message) from None


def good_steps(workdir: Path) -> list[int]:
  """Returns the steps of the good checkpoints in a work directory, newest first.

  Raises:
    CheckpointError: if all are damaged; the message says what to do.
  """
  if load_newest(workdir) is None:
    return []
  found = []
  for step, path in checkpoints.steps(workdir / CHECKPOINTS):
    with contextlib.suppress(checkpoints.CheckpointError):
      checkpoints.load(path)
      found.append(step)
  return found


def failed_step(workdir: Path) -> int:
  """Returns the step whose metrics were not finite when training ended; 0 if none is known."""
  path = workdir / NOT_FINITE
  try:
    return int(json_files.read(path, records.Row)['step']) if path.exists() else 0
  except json_files.JsonError:
    return 0


def load_at(workdir: Path, step: int) -> checkpoints.Checkpoint | None:
  """Returns the checkpoint of a step, and removes the newer ones; None if there is none.

  Training goes on from it. Its later rows will be written again, and a newer checkpoint would go
  with none.
  """
  found = None
  for other, path in checkpoints.steps(workdir / CHECKPOINTS):
    if other > step:
      path.unlink()
    elif other == step:
      found = checkpoints.load(path)
  return found


def _best_loss(directory: Path) -> float:
  """Returns the loss of the best checkpoint so far."""
  try:
    found = checkpoints.load_latest(directory, on_damage=messages.warn)
  except checkpoints.CheckpointError:
    found = None  # damaged: the next good loss takes its place
  return math.inf if found is None else float(found.metadata['loss'])


def read_rows(path: Path) -> tuple[list[dict[str, float]], str]:
  """Returns the rows of metrics.jsonl, and one line about those that are damaged; '' for none.

  The last line of a killed run is half a line, which is no damage.
  """
  rows, damages = [], []
  with path.open('rb') as file:
    lines = iter(lambda: file.readline(json_files.LARGEST), b'')
    for number, line in enumerate(lines, start=1):
      try:
        row = json_files.loads(line, dict[str, float])
        json_files.check(row, records.Row)
      except json_files.JsonError as error:
        if line.endswith(b'\n'):
          damages.append(f'line {number} is damaged ({error})')
      else:
        rows.append(row)
  more = f'; so are {len(damages) - 1} more lines' if len(damages) > 1 else ''
  return rows, f'{path}: {damages[0]}{more}' if damages else ''


def _drop_rows_after(path: Path, step: int) -> None:
  """Keeps the rows up to `step`; what came after the last checkpoint will be written again."""
  if not path.exists():
    return
  rows, damage = read_rows(path)
  if damage:
    messages.warn(f'{damage}; left out')
  kept = [f'{json_files.dumps(row)}\n' for row in rows if row['step'] <= step]
  atomic_files.write(path, ''.join(kept).encode())
