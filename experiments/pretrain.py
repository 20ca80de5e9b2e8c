r"""Trains a VAE or a Smooth Encoder, and leaves checkpoints, metrics and pictures behind.

  python -m experiments.pretrain --workdir=runs/se --dataset=mnist_5k --objective=se

The same command continues a run that was interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

from etils import epy

from experiments import recording, records
from experiments.cli import app, devices, distributed, flags, signals, workdirs
from se_vae.config import (
  PRECISIONS,
  SMOOTH,
  ArgumentError,
  DataConfig,
  ModelConfig,
  TrainConfig,
  setting,
  validate,
)
from se_vae.storage import json_files

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax
  import numpy as np

  from se_vae import data, training
  from se_vae.models import vae
  from se_vae.parallel import processes
  from se_vae.storage import checkpoints, model_store, pretrained

# Seconds to wait for a dispatch once a signal has come; a dispatch takes about one.
PATIENCE = 60.0

# The fault of a checkpoint that another program wrote.
NOT_A_RUN = 'no checkpoint of pretrain'

# Settings that may differ when a run is resumed, since the trained model does not depend on them.
_FREE_SETTINGS = {*flags.PLACES, 'log_every', 'checkpoint_every', 'num_devices', 'tensorboard'}


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """The settings of this binary, all of them flags."""

  workdir: str | None = setting(None, 'Directory of this run; everything but downloads goes there.')
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  train: TrainConfig = dataclasses.field(default_factory=TrainConfig)
  batch_size: int = setting(64, 'Training examples a step.', at_least=1)
  init_from: str | None = setting(
    None,
    'Start with the parameters of this run (a directory, of the same architecture) or of this '
    'pretrained encoder (a name).',
  )
  matmul_precision: str = setting(
    'default',
    "Precision of all matrix products, as JAX's setting of that name.",
    choices=PRECISIONS,
  )
  seed: int = setting(
    0, 'Seed of initialisation, batch order and noise.', at_least=0, at_most=2**31 - 1
  )
  log_every: int = setting(100, 'Steps that a row of metrics averages over.', at_least=1)
  checkpoint_every: int = setting(2000, 'Steps between checkpoints.', at_least=1)
  tensorboard: bool = setting(True, 'Write TensorBoard event files.')
  num_devices: int | None = setting(
    None,
    'Devices of each process. If not given, as many as divide the batch, and of CPU cores as many '
    'as have 16 examples each.',
    at_least=1,
    at_most=1024,
  )  # JAX aborts if it is to start very many

  def __post_init__(self) -> None:
    validate(self)
    if self.train.freeze_decoder and self.init_from is None:
      raise ArgumentError('freeze_decoder', 'needs init_from, the run whose decoder is kept')
    if self.train.objective == 'tc_vae' and self.model.covariance != 'diagonal':
      raise ArgumentError('covariance', "must be diagonal for objective 'tc_vae'")
    if self.train.selection != 'pgd' and self.model.covariance != 'diagonal':
      raise ArgumentError('covariance', f'must be diagonal for selection {self.train.selection!r}')


def main() -> None:
  """Runs the binary."""
  config = flags.from_flags(PretrainConfig)
  cluster = flags.from_flags(distributed.Cluster)
  devices.use_all_cores(config.batch_size // (cluster.num_processes or 1), config.num_devices)
  with distributed.joined(cluster), signals.StopSignal().listening() as stop:
    result = run(config, stop)
  if result:
    summary = ', '.join(f'{name} {value:.4g}' for name, value in result['test'].items())
    print(f'{config.workdir}: step {result["step"]}: {summary}')


def stored_config(values: dict[str, Any]) -> PretrainConfig:
  """Returns the settings that a checkpoint, config.json or result.json holds.

  Settings that have been added since have their defaults, which do what was done without them.

  Args:
    values: the settings by name, of this version or an older one.

  Raises:
    JsonError: if they are no settings of this binary.
  """
  values = dict(values)
  values.pop('device_data_limit', None)  # the training set is always read from the host now
  step_size = values.pop('pgd_step_size', None)  # was absolute
  if values.get('objective', TrainConfig.objective) not in SMOOTH:
    for name in ('attack_dtype', 'selection_distance'):  # were ignored
      values.pop(name, None)
  try:
    config = flags.from_dict(PretrainConfig, values)
    if step_size is None or not config.train.radius:
      return config
    relative = json_files.check(step_size, float, 'pgd_step_size') / config.train.radius
    return flags.replace(config, relative_step_size=relative)
  except (ArgumentError, TypeError) as error:
    raise json_files.JsonError(' '.join(str(error).split())[:300]) from None


def load_dataset(config: DataConfig, workdir: str | Path | None) -> data.Dataset:
  """Returns the data of a run. Decoded data sets are kept in `workdir` if there is no `cache_dir`.

  Raises:
    ArgumentError: if the data cannot be found or read.
  """
  cache_dir = config.cache_dir or str(Path(str(workdir)) / 'data')
  data.check(config.dataset, config.data_dir, config.image_size)
  return _load_dataset(dataclasses.replace(config, cache_dir=cache_dir))


# Several runs of one process (a figure's) share one copy of the data.
@functools.lru_cache(maxsize=2)
def _load_dataset(config: DataConfig) -> data.Dataset:
  options = flags.to_dict(config)
  return data.load(options.pop('dataset'), **options)


def load_run(argument: str, workdir: Path) -> model_store.SavedModel:
  """Returns the encoder in a work directory.

  Raises:
    ArgumentError: naming the argument, if there is none or the newest checkpoint is damaged. An
      older one would give results of another encoder.
  """
  damages: list[str] = []
  try:
    saved = model_store.load_saved(workdir, on_damage=damages.append)
    (newest, _), *_ = checkpoints.steps(workdir / recording.CHECKPOINTS)
  except checkpoints.CheckpointError as error:
    raise ArgumentError(
      argument, f'holds no pretrained encoder, run experiments.pretrain there first: {error}'
    ) from None
  if damages and saved.metadata['step'] < newest:
    raise ArgumentError(argument, f'{damages[0]}; run experiments.pretrain again to replace it')
  return saved


def encoder_directory(argument: str, place: str) -> Path:
  """Returns the directory of an encoder that a run starts from or is compared with.

  Args:
    argument: names the setting, for the error.
    place: the directory of a run, or the name of a pretrained encoder.

  Raises:
    ArgumentError: if it is neither.
  """
  directory = pretrained.find(place)
  if not directory.is_dir():
    names = ', '.join(pretrained.names())
    raise ArgumentError(
      argument, f'{place} is neither a directory nor the name of a pretrained encoder ({names})'
    )
  return directory


def check_batch_size(batch_size: int, dataset: data.Dataset) -> None:
  """Raises ArgumentError unless there are enough training examples for a batch."""
  count = len(dataset.train.images)
  if batch_size > count:
    message = f'must be at most the {count} training examples of {dataset.name}; got {batch_size}'
    raise ArgumentError('batch_size', message)


def prepare(config: PretrainConfig) -> data.Dataset:
  """Checks everything that can be wrong, and returns the data. Compiles and writes nothing.

  Raises:
    ArgumentError: if a setting cannot be used.
  """
  if processes.is_first():
    workdir = workdirs.check_workdir(config.workdir, workdirs.PRETRAIN)
    begun = _begun(workdir)
    if begun is not None:
      _check_same_settings(begun, config)
  dataset = load_dataset(config.data, config.workdir)
  check_batch_size(config.batch_size, dataset)
  training.check_targets(config.train, config.model.latent_dim, len(dataset.train.images))
  if processes.is_first():
    if begun is not None:
      dataset.check_is_that_of(begun['data']['digest'])
    if not checkpoints.steps(workdir / recording.CHECKPOINTS):
      _load_source(config, dataset)
  mesh = devices.mesh_for(config.batch_size, config.num_devices)
  shape = dataset.train.images.shape[1:]
  devices.check_memory(config.model, shape, mesh)
  devices.check_bounds_of_selection(config.train, config.model, shape, config.batch_size, mesh)
  return dataset


def run(
  config: PretrainConfig, stop: signals.StopSignal, description: str = 'pretrain'
) -> dict[str, Any]:
  """Trains to the end, from the newest checkpoint if there is one; returns the result's JSON.

  Of several processes that train together, all raise what one of them raises, or stop when one is
  told to. The first alone uses the work directory and has a result; the others return an empty one.

  Args:
    config: the settings.
    stop: asked after each dispatch whether to stop.
    description: text before the progress bar.

  Raises:
    ArgumentError: if a setting cannot be used, before anything is written.
    Interrupted: when `stop` says so, after a checkpoint.
    NotFiniteError: if a metric is not finite; the last good checkpoint stays.
    OtherProcessError: for any of these in another process alone.
  """
  dataset = processes.together(prepare, config)
  _check_same_everywhere(config, dataset)
  stop.patience = PATIENCE
  recorder = recording.Recorder(config.workdir)
  with recorder, jax.default_matmul_precision(config.matmul_precision):
    processes.on_first(recorder.lock)
    result = processes.on_first(finished, config) or {}
    if processes.maximum(bool(result)):
      return result
    return _train(config, dataset, recorder, stop, description)


def finished(config: PretrainConfig) -> dict[str, Any] | None:
  """Returns the result's JSON if a run with these settings has come to its end; None otherwise."""
  workdir = Path(str(config.workdir))
  result = recording.read_result(workdir, config.train.num_steps, records.Result)
  begun = None if result is None else _begun(workdir)
  if begun is None:
    return None  # without config.json both are written again
  try:
    _check_same_settings(begun, config)
  except ArgumentError:
    return None  # `run` refuses these settings
  return result


def _begun(workdir: Path) -> records.Run | None:
  """Returns the good config.json of the run in a directory; None if there is none."""
  path = workdir / recording.CONFIG
  return workdirs.read_json(path, records.Run, lambda run: stored_config(run['config']))


def _train(
  config: PretrainConfig,
  dataset: data.Dataset,
  recorder: recording.Recorder,
  stop: signals.StopSignal,
  description: str,
) -> dict[str, Any]:
  """Trains a run that is not finished, and returns the result's JSON."""
  mesh = devices.mesh_for(config.batch_size, config.num_devices)
  if config.num_devices is None and processes.is_first():
    devices.warn_of_idle_devices(mesh, config.batch_size)
  images = dataset.train.images
  model = vae.make_vae(**model_arguments(config, dataset))
  step_function = training.TrainStep(model)
  state, arguments, window, eval_key = first_state(config, step_function, images)
  first = (config, dataset, state, window)
  restored = processes.on_first(lambda: restore(*first, recording.load_newest(recorder.workdir)))
  state, window, source = (state, window, None) if restored is None else restored
  state, window = processes.from_first((state, window))
  metadata = metadata_of(config, dataset, source)
  examiner = recording.Examiner(model, config.train, eval_key, dataset.test.images, mesh.local_mesh)
  kinds = devices.device_kinds(mesh)
  processes.on_first(recorder.start, int(state.step), metadata, kinds, examiner, description)
  indices_for = functools.partial(
    data.batch_indices, config.seed, batch_size=config.batch_size, num_examples=len(images)
  )
  try:
    for progress in training.run(
      step_function,
      state,
      arguments,
      images,
      indices_for,
      num_steps=config.train.num_steps,
      steps_per_row=config.log_every,
      steps_per_checkpoint=config.checkpoint_every,
      mesh=mesh,
      window=window,
    ):
      signum = processes.maximum(stop.requested() or 0)
      processes.on_first(recorder.record, progress, signum > 0)
      if signum:
        raise signals.Interrupted(signum, stop.saves)
      state = progress.state
  except training.NotFiniteError as error:
    processes.on_first(recorder.record_not_finite, error)
    recording.add_hint(error, config.train.selection)
    raise
  return processes.on_first(recorder.finish, state.params) or {}


def first_state(
  config: PretrainConfig, step_function: training.TrainStep, images: np.ndarray
) -> tuple[training.TrainState, tuple[TrainConfig, jax.Array], training.Window, jax.Array]:
  """Returns state, further arguments and window of a run at step 0, and the key of its examiner."""
  state, train_key, eval_key = training.first_state(
    step_function.model, config.train, config.seed, num_examples=len(images)
  )
  arguments = (config.train, train_key)
  return state, arguments, training.empty_window(step_function, state, arguments, images), eval_key


def metadata_of(
  config: PretrainConfig, dataset: data.Dataset, source: dict[str, Any] | None
) -> dict[str, Any]:
  """Returns the JSON values for every checkpoint and the result of a run.

  Args:
    config: the settings.
    dataset: the data.
    source: which run the parameters come from, if any.
  """
  return {
    'model': model_arguments(config, dataset),
    'config': flags.to_dict(config),
    'data': dataset.provenance(),
    'versions': devices.versions(),
    'source': source,
  }


def restore(
  config: PretrainConfig,
  dataset: data.Dataset,
  state: training.TrainState,
  window: training.Window,
  found: checkpoints.Checkpoint | None,
) -> tuple[training.TrainState, training.Window, dict[str, Any] | None]:
  """Returns the state and the window to start from, and which run the parameters come from.

  They come from the checkpoint, or without one from the run that `init_from` names, or are those of
  the given state at step 0.

  Raises:
    ArgumentError: if the checkpoint has been made with other settings or data.
  """
  if found is not None:
    with json_files.naming(found.path, NOT_A_RUN):
      saved = json_files.check(found.metadata, records.Run)
      _check_same_settings(saved, config)  # should config.json be lost
    dataset.check_is_that_of(saved['data']['digest'])
    tree = found.restore({**state._asdict(), 'window': window})
    window = tree.pop('window')
    return training.TrainState(**tree), window, found.metadata.get('source')
  model = vae.make_vae(**model_arguments(config, dataset))
  state = training.add_targets(state, model, config.train, dataset.train.images, config.seed)
  source = _load_source(config, dataset)
  if source is None:
    return state, window, None
  origin = {
    'workdir': flags.absolute(flags.to_dict(config))['init_from'],
    'step': source.metadata['step'],
    'checkpoint': source.path.name,  # its SHA-256 is in its name
  }
  return state._replace(params=source.params), window, origin


def model_arguments(config: PretrainConfig, dataset: data.Dataset) -> dict[str, Any]:
  """Returns the arguments of `vae.make_vae`."""
  return {'image_shape': tuple(dataset.train.images.shape[1:]), **flags.to_dict(config.model)}


def _load_source(config: PretrainConfig, dataset: data.Dataset) -> model_store.SavedModel | None:
  """Returns the encoder that `init_from` names, whose model must be this one's."""
  if config.init_from is None:
    return None
  source = load_run('init_from', encoder_directory('init_from', config.init_from))
  here = model_arguments(config, dataset)
  if source.model != vae.make_vae(**here):
    there = source.metadata['model']
    there = {**there, 'image_shape': tuple(there['image_shape'])}
    changed = [name for name in here if here[name] != there.get(name)]
    values = '; '.join(f'{name} {there.get(name)} there, {here[name]} here' for name in changed)
    raise ArgumentError(
      ['dataset' if name == 'image_shape' else name for name in changed],
      f'not that of init_from={config.init_from} ({values})',
    )
  return source


def settings_of_encoder(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns the settings that all seeds of an encoder share.

  Each seed may begin with a run of its own.
  """
  values = settings_of_model(stored)
  return {name: value for name, value in values.items() if name not in ('seed', 'init_from')}


def settings_of_model(stored: dict[str, Any]) -> dict[str, Any]:
  """Returns those of a run's stored settings that the trained model depends on."""
  values = flags.absolute(flags.to_dict(stored_config(stored)))
  return {name: value for name, value in values.items() if name not in _FREE_SETTINGS}


def _check_same_settings(saved: records.Run, config: PretrainConfig) -> None:
  """Raises ArgumentError for settings that differ from those that the run was started with.

  Args:
    saved: the content of config.json, or the metadata of a checkpoint.
    config: the settings now.

  Raises:
    JsonError: if those are no settings of this binary.
  """
  stored, now = settings_of_model(saved['config']), flags.absolute(flags.to_dict(config))
  changed = [name for name, value in stored.items() if value != now[name]]
  # A cosine and a ramp depend on the number of steps from the first step on.
  is_free = config.train.schedule == 'constant' and not config.train.ramp
  longer = is_free and config.train.num_steps > stored['num_steps']
  if longer:
    changed.remove('num_steps')
  if (source := saved.get('source')) is not None:
    held = _checkpoints_of(config.init_from)
    if source['checkpoint'] in held:  # perhaps by another path
      changed = [name for name in changed if name != 'init_from']
    elif held and 'init_from' not in changed:
      raise ArgumentError(
        'init_from',
        f'{config.init_from} no longer has the encoder that the run in {config.workdir} started '
        'from; remove that run, or choose another workdir',
      )
  if changed:
    values = '; '.join(f'{name} was {stored[name]}, now {now[name]}' for name in changed)
    raise ArgumentError(
      changed,
      f'not what the run in {config.workdir} was started with ({values}); choose another workdir',
    )


def _checkpoints_of(place: str | None) -> list[str]:
  """Returns the names of the checkpoints of a run that `init_from` names, if it has any."""
  if place is None:
    return []
  found = checkpoints.steps(pretrained.find(place) / recording.CHECKPOINTS)
  return [path.name for _, path in found]


def _check_same_everywhere(config: PretrainConfig, dataset: data.Dataset) -> None:
  """Raises ArgumentError for settings that differ between the processes."""
  values = flags.to_dict(config)
  values = {name: value for name, value in values.items() if name not in flags.PLACES}
  values |= {'data_dir': dataset.digest, 'versions': devices.versions()}
  if names := processes.differing(values):
    raise ArgumentError(names, 'must be the same in every process')


if __name__ == '__main__':
  flags.define_flags(PretrainConfig)
  flags.define_flags(distributed.Cluster)
  app.run(main)
