r"""Pretrains a VAE or a Smooth Encoder, and leaves checkpoints, metrics and pictures behind.

  python -m experiments.pretrain --workdir=runs/se --dataset=mnist_5k --objective=se

A run that was interrupted goes on where it was when the same command is given again.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import math
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from etils import epy

from experiments.cli import app, devices, distributed, flags, messages, signals, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import (
  ARCHS,
  ATTACK_DTYPES,
  COVARIANCES,
  DATASETS,
  OBJECTIVES,
  OPTIMIZERS,
  PRECISIONS,
  SCHEDULES,
  setting,
  validate,
)

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax
  import numpy as np

  from experiments.visual import image_grids, tensorboard
  from se_vae import data, training
  from se_vae.evaluation import diagnostics, linear_probe
  from se_vae.models import vae
  from se_vae.parallel import processes
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

# Seconds to wait for a dispatch once a signal has come; it takes about one.
_PATIENCE = 60.0

# Settings that may differ when a run is resumed, since the trained model does not depend on them.
_PLACES = frozenset({'workdir', 'data_dir', 'cache_dir'})
_FREE_SETTINGS = _PLACES | {
  'log_every',
  'checkpoint_every',
  'num_devices',
  'tensorboard',
  'device_data_limit',
}

# What an event file follows: a fair sample of the held-out images, and the first rows of each page.
# More would take over a hundredth of the time that a VAE trains.
_WATCHED = 500
_WATCHED_ROWS = 5


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of this run; everything it writes goes there.')
  dataset: str = setting('mnist_5k', f'One of: {", ".join(DATASETS)}, or tfds:NAME.')
  data_dir: str | None = setting(None, 'Directory of the IDX files or the TFDS data set.')
  cache_dir: str | None = setting(
    None, "Where decoded TFDS sets are kept; 'data' in the work directory if not given."
  )
  device_data_limit: int = setting(
    1024, 'MiB of training images up to which the devices keep them all.', at_least=0
  )
  image_size: int | None = setting(
    None,
    'Pixels a side to which the central square of every image of a tfds: set is resized.',
    at_least=1,
  )
  data_seed: int = setting(0, 'Seed of the colours of color_* data sets.', at_least=0)
  validation: bool = setting(
    False, 'Hold out a sixth of the training set and use it in place of the test set.'
  )
  objective: str = setting('se', 'Bound to maximise.', choices=OBJECTIVES)
  arch: str = setting('mlp', 'Encoder and decoder architecture.', choices=ARCHS)
  latent_dim: int = setting(64, 'Latent dimensions; the paper uses 32, 64 and 128.', at_least=1)
  covariance: str = setting(
    'diagonal', "Covariance of the encoder; the paper's is diagonal.", choices=COVARIANCES
  )
  hidden_units: int = setting(200, 'Units of each of the 4 layers of an MLP.', at_least=1)
  conv_channels: int = setting(
    200, 'Channels of each of the 4 layers of a ConvNet; use 32 or fewer on a CPU.', at_least=1
  )
  gamma: float = setting(1.0, 'Coupling strength of the SE-ELBO.', at_least=0)
  radius: float = setting(
    0.2, 'linf radius of the selection, for pixels in [0, 1].', at_least=0, at_most=1
  )
  pgd_steps: int = setting(20, 'Gradient steps L of the selection.', at_least=1)
  pgd_step_size: float | None = setting(
    None, 'Step size of the selection; 2.5 * radius / pgd_steps if not given.', above=0
  )
  warm_start: bool = setting(
    False, "Start each example's selection where its last one ended, and not at random."
  )
  attack_dtype: str = setting(
    'float32', 'Precision of the encoder within the selection.', choices=ATTACK_DTYPES
  )
  matmul_precision: str = setting(
    'default', "Of all matrix products, as JAX's setting of that name.", choices=PRECISIONS
  )
  obs_var: float = setting(0.1, 'Observation noise variance v of the decoder.', above=0)
  num_steps: int = setting(10_000, 'Training steps; the paper takes 300,000.', at_least=1)
  batch_size: int = setting(64, 'Examples a step.', at_least=1)
  optimizer: str = setting('adam', 'Update rule.', choices=OPTIMIZERS)
  momentum: float = setting(0.9, 'Momentum of sgd.', at_least=0, at_most=1)
  learning_rate: float = setting(1e-3, 'Learning rate, at its peak.', above=0)
  schedule: str = setting('cosine', 'Learning rate over time.', choices=SCHEDULES)
  init_from: str | None = setting(
    None, 'Directory of a run of the same architecture, whose parameters to start with.'
  )
  freeze_decoder: bool = setting(
    False, 'Train the encoder alone, and keep the decoder of --init_from as it is.'
  )
  kl_weight: float = setting(
    1.0, 'Weight of the KL divergence in the loss of --objective=vae: a beta-VAE.', at_least=0
  )
  encoder_noise: float = setting(
    0.0,
    'Uniform noise, up to this, on the pixels that the encoder of --objective=vae sees.',
    at_least=0,
    at_most=1,
  )
  seed: int = setting(
    0, 'Seed of initialisation, batch order and noise.', at_least=0, at_most=2**31 - 1
  )
  log_every: int = setting(100, 'Steps a row of metrics averages over.', at_least=1)
  checkpoint_every: int = setting(2000, 'Steps between checkpoints.', at_least=1)
  tensorboard: bool = setting(True, 'Write TensorBoard event files.')
  num_devices: int | None = setting(
    None,
    'Devices of each process to use; if not given, as many as divide the batch.',
    at_least=1,
  )


def main() -> None:
  """Entry point."""
  config = flags.from_flags(PretrainConfig)
  processes = flags.from_flags(distributed.Cluster)
  devices.use_all_cores(config.batch_size // (processes.num_processes or 1), config.num_devices)
  with distributed.joined(processes), signals.StopSignal().listening() as stop:
    result = run(config, stop)
  if result:
    summary = ', '.join(f'{name} {value:.4g}' for name, value in result['test'].items())
    print(f'{config.workdir}: step {result["step"]}: {summary}')


def prepare(config: PretrainConfig) -> data.Dataset:
  """Checks everything that can be wrong, and loads the data. Compiles and writes nothing.

  Raises:
    UsageError: naming the flag.
  """
  validate(config)
  if config.warm_start and not (config.objective == 'se' and config.radius > 0.0):
    raise UsageError('--warm_start: is for --objective=se and a --radius above 0')
  for name in ('kl_weight', 'encoder_noise'):
    if config.objective != 'vae' and getattr(config, name) != getattr(PretrainConfig, name):
      raise UsageError(f'--{name}: is for --objective=vae')
  if config.freeze_decoder and config.init_from is None:
    raise UsageError('--freeze_decoder: needs --init_from, the run whose decoder is kept')
  if processes.is_first():
    workdir = workdirs.check_workdir(config.workdir)
    begun = workdirs.read_json(workdir / CONFIG, 'config')
    if begun is not None:
      _check_same_settings(begun['config'], config)
  dataset = load_dataset(config)
  check_batch_size(config.batch_size, dataset)
  if config.warm_start and _is_streamed(config, dataset):
    raise UsageError(
      f'--warm_start, --device_data_limit: a warm start keeps the {dataset.train.images.nbytes} '
      f'bytes of training images on every device, and as many more; the limit is '
      f'{config.device_data_limit} MiB'
    )
  if processes.is_first() and not checkpoints.steps(workdir / CHECKPOINTS):
    _load_source(config, dataset)
  devices.mesh_for(config.batch_size, config.num_devices)
  return dataset


def load_dataset(config: PretrainConfig) -> data.Dataset:
  """The data of a run.

  Raises:
    UsageError: if they cannot be found or read.
  """
  cache_dir = config.cache_dir or str(Path(str(config.workdir)) / 'data')
  try:
    data.check(config.dataset, config.data_dir, config.image_size)
    return _load_dataset(
      config.dataset,
      data_dir=config.data_dir,
      data_seed=config.data_seed,
      validation=config.validation,
      cache_dir=cache_dir,
      image_size=config.image_size,
    )
  except data.DataError as error:
    raise UsageError(str(error)) from None


def check_batch_size(batch_size: int, dataset: data.Dataset) -> None:
  """Raises UsageError unless a batch finds enough training examples."""
  if batch_size > len(dataset.train.images):
    raise UsageError(
      f'--batch_size: must be at most the {len(dataset.train.images)} training examples of '
      f'{dataset.name}; got {batch_size}'
    )


# Several runs of one process (a figure's) share one copy of the data.
@functools.lru_cache(maxsize=2)
def _load_dataset(name: str, **options: Any) -> data.Dataset:
  return data.load(name, **options)


def run(
  config: PretrainConfig, stop: signals.StopSignal, description: str = 'pretrain'
) -> dict[str, Any]:
  """Trains to the end, from the newest checkpoint if there is one; returns the result's JSON.

  Of several processes that train together, all raise what one of them raises, or stop when one is
  told to. The first alone uses the work directory, and has a result: that of the others is empty.

  Raises:
    UsageError: for settings that are wrong, before anything is written.
    Interrupted: when `stop` says so, after a checkpoint.
    NotFiniteError: for a loss that is not finite; the last good checkpoint stays.
    OtherProcessError: for any of these in another process alone.
  """
  dataset = processes.together(prepare, config)
  _check_same_everywhere(config, dataset)
  workdir = Path(str(config.workdir))
  stop.patience = _PATIENCE
  with contextlib.ExitStack() as held:
    held.enter_context(jax.default_matmul_precision(config.matmul_precision))
    check_place = (
      processes.on_first(held.enter_context, workdirs.lock(workdir, *_FILES)) or _elsewhere
    )
    result = processes.on_first(_result_so_far, workdir, config.num_steps) or {}
    if processes.largest(bool(result)):
      return result
    mesh = devices.mesh_for(config.batch_size, config.num_devices)
    if config.num_devices is None and processes.is_first():
      devices.warn_of_idle_devices(mesh, config.batch_size)
    setup, window = _begin(config, _set_up(config, dataset), dataset)
    state = _train(config, setup, window, dataset, mesh, stop, description, check_place)
    return processes.on_first(_finish, config, setup, state, dataset, mesh.local_mesh) or {}


def _check_same_everywhere(config: PretrainConfig, dataset: data.Dataset) -> None:
  """Refuses to train with processes that were told different things."""
  values = {name: value for name, value in flags.to_dict(config).items() if name not in _PLACES}
  values |= {'data_dir': dataset.digest, 'versions': devices.versions()}
  if names := processes.differing(values):
    named = ', '.join(f'--{name}' for name in names)
    raise UsageError(f'{named}: must be the same in every process')


def _result_so_far(workdir: Path, num_steps: int) -> dict[str, Any] | None:
  """The result of a run that has already come to its end."""
  result = workdirs.read_json(workdir / RESULT, 'step', 'test', 'config')
  return result if result is not None and result['step'] == num_steps else None


class _Setup(NamedTuple):
  """What the settings make, and where the run stands."""

  model: vae.VAE
  train_config: training.TrainConfig
  state: training.TrainState
  train_key: jax.Array
  eval_key: jax.Array
  metadata: dict[str, Any]


def _set_up(config: PretrainConfig, dataset: data.Dataset) -> _Setup:
  model_config = _model_config(config, dataset)
  model = vae.make_vae(**model_config)
  train_config = training.TrainConfig(**_fields_of(config, *_names(training.TrainConfig)))
  init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
  # As one program, and not as dozens of small ones to compile.
  init_state = jax.jit(training.init_state, static_argnums=(0, 1, 3))
  state = init_state(model, train_config, init_key, len(dataset.train.images))
  metadata = {
    'model': model_config,
    'config': flags.to_dict(config),
    'data': dataset.provenance(),
    'versions': devices.versions(),
  }
  return _Setup(model, train_config, state, train_key, eval_key, metadata)


def _model_config(config: PretrainConfig, dataset: data.Dataset) -> dict[str, Any]:
  """The arguments of `vae.make_vae`."""
  names = 'arch latent_dim hidden_units conv_channels covariance'
  return {'image_shape': tuple(dataset.train.images.shape[1:]), **_fields_of(config, names)}


def _load_source(config: PretrainConfig, dataset: data.Dataset) -> checkpoints.Run | None:
  """The run that --init_from names; its model must be this one's."""
  if config.init_from is None:
    return None
  try:
    source = checkpoints.load_run(config.init_from)
  except checkpoints.CheckpointError as error:
    raise UsageError(f'--init_from: {error}') from None
  here = _model_config(config, dataset)
  if source.model != vae.make_vae(**here):
    there = source.metadata['model']
    there = {**there, 'image_shape': tuple(there['image_shape'])}
    changed = [name for name in here if here[name] != there.get(name)]
    flags = ', '.join('--dataset' if name == 'image_shape' else f'--{name}' for name in changed)
    values = '; '.join(f'{name} {there.get(name)} there, {here[name]} here' for name in changed)
    raise UsageError(f'{flags}: not that of the run in --init_from={config.init_from} ({values})')
  return source


def _begin(
  config: PretrainConfig, setup: _Setup, dataset: data.Dataset
) -> tuple[_Setup, training.Window]:
  """The run at its newest good checkpoint or at step 0, and its window."""
  fresh = setup.state, training.empty_window(setup.model, setup.train_config, setup.state)
  state, window, source = processes.on_first(_restore, config, dataset, *fresh) or (*fresh, None)
  state, window = processes.from_first((state, window))
  return setup._replace(state=state, metadata={**setup.metadata, 'source': source}), window


def _train(
  config: PretrainConfig,
  setup: _Setup,
  window: training.Window,
  dataset: data.Dataset,
  mesh: jax.sharding.Mesh,
  stop: signals.StopSignal,
  description: str,
  check_place: Callable[[], None],
) -> training.TrainState:
  """The training loop around `training.run`: reports, saves and stops."""
  progress = training.Progress(setup.state, window, row=None)
  dispatches = training.run(
    setup.model,
    setup.train_config,
    setup.state,
    setup.train_key,
    dataset.train.images,
    functools.partial(_indices, config, len(dataset.train.images)),
    steps_per_row=config.log_every,
    mesh=mesh,
    window=window,
    streamed=_is_streamed(config, dataset),
  )
  with contextlib.ExitStack() as stack:
    images = dataset.test.images[:_WATCHED]
    look = functools.partial(_look, config, setup, images=images, mesh=mesh.local_mesh)
    kinds = devices.device_kinds(mesh)
    recording = _recording(config, setup, kinds, description, check_place, look)
    record = processes.on_first(stack.enter_context, recording) or _elsewhere
    try:
      for progress in dispatches:
        signum = processes.largest(stop.requested() or 0)
        processes.together(record, progress, signum > 0)
        if signum:
          raise signals.Interrupted(signum)
    except training.NotFiniteError as error:
      report = {'step': error.step, 'metrics': error.metrics, 'examples': error.examples.tolist()}
      path = Path(str(config.workdir)) / NOT_FINITE
      processes.on_first(workdirs.write_json, path, report)
      raise
  return progress.state


@contextlib.contextmanager
def _recording(
  config: PretrainConfig,
  setup: _Setup,
  devices: list[str],
  description: str,
  check_place: Callable[[], None],
  look: Callable[[training.TrainState], _Look],
) -> Iterator[Callable[[training.Progress, bool], None]]:
  """A function that writes down, after each dispatch, what the work directory is to keep of it."""
  workdir, done = Path(str(config.workdir)), int(setup.state.step)
  workdirs.write_json(workdir / CONFIG, setup.metadata | {'devices': devices})
  _drop_rows_after(workdir / METRICS, done)
  best_loss = _best_loss(workdir / BEST)

  def record(progress: training.Progress, stopping: bool) -> None:
    nonlocal done, best_loss
    step, tree = int(progress.state.step), _tree(progress.state, progress.window)
    bar.update(step - done)
    check_place()  # saving would make it anew, without what was in it
    if progress.row is not None:
      loss = progress.row['loss']
      metrics_file.write(json.dumps({'step': step, **progress.row}) + '\n')
      metrics_file.flush()
      bar.set_postfix(loss=f'{loss:.1f}', refresh=False)
      if watch:
        _watch(watch, config, setup.model, progress.state, progress.row, look)
      # Decided by the step alone, and before that step is done with: an interruption between the
      # two checkpoints changes neither.
      if _is_due_in_row(config, step) and loss < best_loss:
        best_loss = loss
        checkpoints.save(workdir / BEST, step, tree, {**setup.metadata, 'loss': loss}, keep=1)
    if _is_due(config, done, step) or stopping:
      os.fsync(metrics_file.fileno())  # no row may be missing before a checkpoint
      if watch:
        watch.sync()
      checkpoints.save(workdir / CHECKPOINTS, step, tree, setup.metadata)
    done = step

  progress_bar = messages.progress_bar(config.num_steps, description, initial=done)
  watch = tensorboard.EventWriter(workdir / EVENTS, done) if config.tensorboard else None
  metrics = (workdir / METRICS).open('a')
  with progress_bar as bar, metrics as metrics_file, watch or contextlib.nullcontext():
    yield record


def _elsewhere(*_: Any) -> None:
  """What processes do that do not use the work directory."""


def _is_due(config: PretrainConfig, done: int, step: int) -> bool:
  """Whether a checkpoint falls between two steps, the second included."""
  every = config.checkpoint_every
  return step // every > done // every or step == config.num_steps


def _is_due_in_row(config: PretrainConfig, step: int) -> bool:
  """Whether a checkpoint falls in the row of metrics that ends with this step."""
  return _is_due(config, (step - 1) // config.log_every * config.log_every, step)


def _tree(state: training.TrainState, window: training.Window) -> dict[str, Any]:
  """What a checkpoint holds."""
  return {**state._asdict(), 'window': window}


def _restore(
  config: PretrainConfig,
  dataset: data.Dataset,
  state: training.TrainState,
  window: training.Window,
) -> tuple[training.TrainState, training.Window, dict[str, Any] | None]:
  """State and window of the newest good checkpoint, or those of step 0; what --init_from gave."""
  directory = Path(str(config.workdir)) / CHECKPOINTS
  template = _tree(state, window)
  restored = checkpoints.restore_latest(directory, template, on_damage=messages.warn)
  if restored is not None:
    tree, saved = restored
    _check_same_settings(saved['config'], config)  # should config.json be lost
    if saved['data']['digest'] != dataset.digest:
      raise UsageError('--data_dir: holds other data than the run was started with')
    window = tree.pop('window')
    return training.TrainState(**tree), window, saved.get('source')
  run = _load_source(config, dataset)
  if run is None:
    return state, window, None
  source = {
    'workdir': str(Path(str(config.init_from)).absolute()),
    'step': run.metadata['step'],
    'checkpoint': run.path.name,  # its SHA-256 is in its name
  }
  return state._replace(params=run.params), window, source


def _best_loss(directory: Path) -> float:
  """The loss of the best checkpoint so far."""
  try:
    found = checkpoints.load_latest(directory, on_damage=messages.warn)
  except checkpoints.CheckpointError:
    found = None  # damaged: the next good loss takes its place
  return math.inf if found is None else float(found[1]['loss'])


def _finish(
  config: PretrainConfig,
  setup: _Setup,
  state: training.TrainState,
  dataset: data.Dataset,
  mesh: jax.sharding.Mesh,
) -> dict[str, Any]:
  """Looks at the trained model on held-out images; writes and returns the result's JSON."""
  workdir = Path(str(config.workdir))
  test, pages = _look(config, setup, state, dataset.test.images, mesh)
  for name, page in pages.items():
    image_grids.save(workdir / f'{name}.png', page)
  result = {'step': int(state.step), 'test': test, **setup.metadata}
  workdirs.write_json(workdir / RESULT, result)
  return result


# Figures of a model, and pages of images.
_Look: TypeAlias = 'tuple[dict[str, float], dict[str, np.ndarray]]'


def _look(
  config: PretrainConfig,
  setup: _Setup,
  state: training.TrainState,
  images: np.ndarray,
  mesh: jax.sharding.Mesh,
) -> _Look:
  """Figures of the model on held-out images, and `image_grids.pages` of the first ten."""
  model, key = setup.model, setup.eval_key
  params = jax.device_get(state.params)
  figures = diagnostics.held_out(model, params, key, images, obs_var=config.obs_var, mesh=mesh)
  means = linear_probe.encoder_means(model, params, images, mesh=mesh)
  figures['active_latents'] = diagnostics.active_latents(means)
  return figures, image_grids.pages(model, setup.train_config, params, key, images[:10], means)


def _watch(
  watch: tensorboard.EventWriter,
  config: PretrainConfig,
  model: vae.VAE,
  state: training.TrainState,
  row: dict[str, float],
  look: Callable[[training.TrainState], _Look],
) -> None:
  """Adds a row to an event file; where a checkpoint fell due since the last, a look at the model.

  At rows alone, whose steps do not depend on how a run was interrupted.
  """
  step = int(state.step)
  watch.row(step, row)
  if _is_due_in_row(config, step):
    figures, pages = look(state)
    shown = pages['reconstructions']
    figures['selection_linf'] = image_grids.perturbation(shown)
    params = jax.device_get(state.params)  # of this process alone
    figures['selection_squared_w2'] = image_grids.squared_w2(model, params, shown)
    watch.scalars(step, 'held_out', figures)
    watch.images(step, {name: page[:_WATCHED_ROWS] for name, page in pages.items()})


def _indices(config: PretrainConfig, num_examples: int, step: int, num_steps: int) -> np.ndarray:
  return data.batch_indices(config.seed, step, num_steps, config.batch_size, num_examples)


def _is_streamed(config: PretrainConfig, dataset: data.Dataset) -> bool:
  """Whether the training set is too large for the devices to keep."""
  return dataset.train.images.nbytes > config.device_data_limit * 2**20


def _names(config_type: type[Any]) -> list[str]:
  return [field.name for field in dataclasses.fields(config_type)]


def _fields_of(config: PretrainConfig, *names: str) -> dict[str, Any]:
  names = tuple(name for group in names for name in group.split())
  return {name: getattr(config, name) for name in names}


def _check_same_settings(before: dict[str, Any], config: PretrainConfig) -> None:
  """Refuses to go on with a run under other settings than it was started with."""
  # A run that was started before a flag existed did what the flag's default does.
  before = flags.to_dict(PretrainConfig()) | before
  longer = config.schedule == 'constant' and config.num_steps > before['num_steps']
  free = _FREE_SETTINGS | ({'num_steps'} if longer else set())
  changed = {
    name: value
    for name, value in flags.to_dict(config).items()
    if name not in free and before[name] != value
  }
  if changed:
    names = ', '.join(f'--{name}' for name in changed)
    values = '; '.join(f'{name} was {before[name]}, now {new}' for name, new in changed.items())
    raise UsageError(
      f'{names}: not what the run in {config.workdir} was started with ({values}); choose another '
      '--workdir'
    )


def _drop_rows_after(path: Path, step: int) -> None:
  """Keeps the rows up to `step`; what came after the last checkpoint will be written again."""
  if not path.exists():
    return
  kept = []
  lines = path.read_bytes().splitlines()
  for number, line in enumerate(lines, start=1):
    try:
      row_step = json.loads(line)['step']
    except (ValueError, TypeError, KeyError):
      if number < len(lines):  # the last line of a killed run is half a line
        messages.warn(f'{path}: line {number} is damaged, left out')
      continue
    if row_step <= step:
      kept.append(line + b'\n')
  atomic_files.write(path, b''.join(kept))


if __name__ == '__main__':
  flags.define_flags(PretrainConfig)
  flags.define_flags(distributed.Cluster)
  app.run(main)
