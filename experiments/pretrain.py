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
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.sharding import Mesh

from experiments import events, pictures, runtime, settings
from experiments.settings import UsageError, setting
from se_vae import checkpoints, data, diagnostics, networks, probing, training, vae

CHECKPOINTS = 'checkpoints'
BEST = 'checkpoints/best'
CONFIG = 'config.json'
METRICS = 'metrics.jsonl'
RESULT = 'result.json'
EVENTS = 'tensorboard'
NOT_FINITE = 'not_finite.json'

PRECISIONS = ('default', 'high', 'highest')

# Settings that may differ when a run is resumed, since the trained model does not depend on them.
_FREE_SETTINGS = frozenset(
  {'workdir', 'data_dir', 'cache_dir', 'log_every', 'checkpoint_every', 'tensorboard'}
)

# What an event file follows: a fair sample of the held-out images, and the first rows of each page.
# More would take over a hundredth of the time that a VAE trains.
_WATCHED = 500
_WATCHED_ROWS = 5


@dataclasses.dataclass(frozen=True)
class PretrainConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of this run; everything it writes goes there.')
  dataset: str = setting('mnist_5k', f'One of: {", ".join(data.DATASETS)}, or tfds:NAME.')
  data_dir: str | None = setting(None, 'Directory of the IDX files or the TFDS data set.')
  cache_dir: str | None = setting(
    None, "Where decoded TFDS sets are kept; 'data' in the work directory if not given."
  )
  data_seed: int = setting(0, 'Seed of the colours of color_* data sets.', at_least=0)
  validation: bool = setting(
    False, 'Hold out a sixth of the training set and use it in place of the test set.'
  )
  objective: str = setting('se', 'Bound to maximise.', choices=training.OBJECTIVES)
  arch: str = setting('mlp', 'Encoder and decoder architecture.', choices=vae.ARCHS)
  latent_dim: int = setting(64, 'Latent dimensions; the paper uses 32, 64 and 128.', at_least=1)
  covariance: str = setting(
    'diagonal', "Covariance of the encoder; the paper's is diagonal.", choices=networks.COVARIANCES
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
    False, "Start each example's selection where its last one ended; then 5 pgd_steps may do."
  )
  attack_dtype: str = setting(
    'float32', 'Precision of the encoder within the selection.', choices=training.ATTACK_DTYPES
  )
  matmul_precision: str = setting(
    'default', "Of all matrix products, as JAX's setting of that name.", choices=PRECISIONS
  )
  obs_var: float = setting(0.1, 'Observation noise variance v of the decoder.', above=0)
  num_steps: int = setting(10_000, 'Training steps; the paper takes 300,000.', at_least=1)
  batch_size: int = setting(64, 'Examples a step.', at_least=1)
  optimizer: str = setting('adam', 'Update rule.', choices=training.OPTIMIZERS)
  momentum: float = setting(0.9, 'Momentum of sgd.', at_least=0, at_most=1)
  learning_rate: float = setting(1e-3, 'Learning rate, at its peak.', above=0)
  schedule: str = setting('cosine', 'Learning rate over time.', choices=training.SCHEDULES)
  seed: int = setting(
    0, 'Seed of initialisation, batch order and noise.', at_least=0, at_most=2**31 - 1
  )
  log_every: int = setting(100, 'Steps a row of metrics averages over.', at_least=1)
  checkpoint_every: int = setting(1000, 'Steps between checkpoints.', at_least=1)
  tensorboard: bool = setting(True, 'Write TensorBoard event files.')


def main() -> None:
  """Entry point."""
  config = settings.from_flags(PretrainConfig)
  runtime.use_all_cores(config.batch_size)
  with runtime.StopSignal().listening() as stop:
    result = run(config, stop)
  summary = ', '.join(f'{name} {value:.4g}' for name, value in result['test'].items())
  print(f'{config.workdir}: step {result["step"]}: {summary}')


def prepare(config: PretrainConfig) -> data.Dataset:
  """Checks everything that can be wrong, and loads the data. Compiles and writes nothing.

  Raises:
    UsageError: naming the flag.
  """
  settings.check(config)
  if config.warm_start and not (config.objective == 'se' and config.radius > 0.0):
    raise UsageError('--warm_start: is for --objective=se and a --radius above 0')
  workdir = runtime.check_workdir(config.workdir)
  _check_same_settings(workdir / CONFIG, config)
  try:
    data.check(config.dataset, config.data_dir)
    dataset = load_dataset(config)
  except data.DataError as error:
    raise UsageError(str(error)) from None
  if config.batch_size > len(dataset.train.images):
    raise UsageError(
      f'--batch_size: must be at most the {len(dataset.train.images)} training examples of '
      f'{config.dataset}; got {config.batch_size}'
    )
  return dataset


def load_dataset(config: PretrainConfig) -> data.Dataset:
  """The data of a run.

  Raises:
    DataError: if they cannot be found or read.
  """
  cache_dir = config.cache_dir or str(Path(str(config.workdir)) / 'data')
  return _load_dataset(
    config.dataset, config.data_dir, config.data_seed, config.validation, cache_dir
  )


# Several runs of one process (a figure's) share one copy of the data.
@functools.lru_cache(maxsize=2)
def _load_dataset(
  name: str, data_dir: str | None, data_seed: int, validation: bool, cache_dir: str
) -> data.Dataset:
  return data.load(
    name, data_dir=data_dir, data_seed=data_seed, validation=validation, cache_dir=cache_dir
  )


def run(
  config: PretrainConfig, stop: runtime.StopSignal, description: str = 'pretrain'
) -> dict[str, Any]:
  """Trains to the end, from the newest checkpoint if there is one; returns the result's JSON.

  Raises:
    UsageError: for settings that are wrong, before anything is written.
    Interrupted: when `stop` says so, after a checkpoint.
    NotFiniteError: for a loss that is not finite; the last good checkpoint stays.
  """
  dataset = prepare(config)
  workdir = Path(str(config.workdir))
  with runtime.lock(workdir), jax.default_matmul_precision(config.matmul_precision):
    if (workdir / RESULT).exists():
      result: dict[str, Any] = runtime.read_json(workdir / RESULT)
      if result['step'] == config.num_steps:
        return result
    mesh = runtime.mesh_for(config.batch_size)
    setup = _set_up(config, dataset)
    state = _train(config, setup, dataset, mesh, stop, description)
    result = _finish(config, setup, state, dataset, mesh)
    runtime.write_json(workdir / RESULT, result)
  return result


class _Setup(NamedTuple):
  """What the settings make, before the first step."""

  model: vae.VAE
  train_config: training.TrainConfig
  state: training.TrainState
  train_key: jax.Array
  eval_key: jax.Array
  metadata: dict[str, Any]


def _set_up(config: PretrainConfig, dataset: data.Dataset) -> _Setup:
  image_shape: tuple[int, int, int] = dataset.train.images.shape[1:]
  model_config = _fields_of(config, 'arch latent_dim hidden_units conv_channels covariance')
  model = vae.make_vae(image_shape, **model_config)
  train_config = training.TrainConfig(**_fields_of(config, *_names(training.TrainConfig)))
  init_key, train_key, eval_key = jax.random.split(jax.random.key(config.seed), 3)
  state = training.init_state(model, train_config, init_key, len(dataset.train.images))
  metadata = {
    'model': {'image_shape': list(image_shape), **model_config},
    'config': settings.to_dict(config),
    'data': {'source': dataset.source, 'digest': dataset.digest},
    'versions': runtime.versions(),
  }
  return _Setup(model, train_config, state, train_key, eval_key, metadata)


def _train(
  config: PretrainConfig,
  setup: _Setup,
  dataset: data.Dataset,
  mesh: Mesh,
  stop: runtime.StopSignal,
  description: str,
) -> training.TrainState:
  """The training loop around `training.run`: resumes, reports and saves."""
  workdir = Path(str(config.workdir))
  state, window = _restore(workdir / CHECKPOINTS, setup, dataset)
  runtime.write_json(workdir / CONFIG, setup.metadata | {'devices': runtime.devices()})
  done = int(state.step)
  _drop_rows_after(workdir / METRICS, done)
  best_loss = _best_loss(workdir / BEST)
  dispatches = training.run(
    setup.model,
    setup.train_config,
    state,
    setup.train_key,
    dataset.train.images,
    functools.partial(_indices, config, len(dataset.train.images)),
    steps_per_row=config.log_every,
    mesh=mesh,
    window=window,
  )
  progress = runtime.progress_bar(config.num_steps, description, initial=done)
  watch = events.EventWriter(workdir / EVENTS, done) if config.tensorboard else None
  metrics_file = (workdir / METRICS).open('a')
  with progress, metrics_file, watch or contextlib.nullcontext():
    loss = math.inf
    try:
      for state, window, row in dispatches:
        step = int(state.step)
        progress.update(step - done)
        if row is not None:
          loss = row['loss']
          metrics_file.write(json.dumps({'step': step, **row}) + '\n')
          metrics_file.flush()
          progress.set_postfix(loss=f'{loss:.1f}', refresh=False)
          if watch:
            _watch(watch, config, setup, state, row, dataset.test.images[:_WATCHED], mesh)
        due = step // config.checkpoint_every > done // config.checkpoint_every
        done = step
        if not workdir.is_dir():  # saving would make it anew, without what was in it
          raise FileNotFoundError(f'{workdir}: the work directory has vanished')
        if due or stop.signum is not None or done == config.num_steps:
          if watch:
            watch.sync()  # what the next process will not do again
          tree = _tree(state, window)
          checkpoints.save(workdir / CHECKPOINTS, done, tree, setup.metadata)
          if loss < best_loss:
            best_loss = loss
            checkpoints.save(workdir / BEST, done, tree, {**setup.metadata, 'loss': loss}, keep=1)
        stop.check()
    except training.NotFiniteError as error:
      report = {'step': error.step, 'metrics': error.metrics, 'examples': error.examples.tolist()}
      runtime.write_json(workdir / NOT_FINITE, report)
      raise
  return state


def _tree(state: training.TrainState, window: training.Window) -> dict[str, Any]:
  """What a checkpoint holds."""
  return {**state._asdict(), 'window': window}


def _restore(
  directory: Path, setup: _Setup, dataset: data.Dataset
) -> tuple[training.TrainState, training.Window]:
  """State and window of the newest good checkpoint, or those of step 0."""
  window = training.empty_window(setup.model, setup.train_config, setup.state)
  template = _tree(setup.state, window)
  restored = checkpoints.restore_latest(directory, template, on_damage=runtime.warn)
  if restored is None:
    return setup.state, window
  tree, saved = restored
  if saved['data']['digest'] != dataset.digest:
    raise UsageError('--data_dir: holds other data than the run was started with')
  window = tree.pop('window')
  return training.TrainState(**tree), window


def _best_loss(directory: Path) -> float:
  """The loss of the best checkpoint so far."""
  try:
    found = checkpoints.load_latest(directory, on_damage=runtime.warn)
  except checkpoints.CheckpointError:
    found = None  # damaged: the next good loss takes its place
  return math.inf if found is None else float(found[1]['loss'])


def _finish(
  config: PretrainConfig,
  setup: _Setup,
  state: training.TrainState,
  dataset: data.Dataset,
  mesh: Mesh,
) -> dict[str, Any]:
  """Looks at the trained model on held-out images, and returns the result's JSON."""
  test, pages = _look(config, setup, state, dataset.test.images, mesh)
  for name, page in pages.items():
    pictures.save(Path(str(config.workdir)) / f'{name}.png', page)
  return {'step': int(state.step), 'test': test, **setup.metadata}


def _look(
  config: PretrainConfig,
  setup: _Setup,
  state: training.TrainState,
  images: np.ndarray,
  mesh: Mesh,
) -> tuple[dict[str, float], dict[str, np.ndarray]]:
  """Figures of the model on held-out images, and `pictures.pages` of the first ten."""
  model, key = setup.model, setup.eval_key
  params = jax.device_get(state.params)
  figures = diagnostics.held_out(model, params, key, images, obs_var=config.obs_var, mesh=mesh)
  means = probing.encoder_means(model, params, images, mesh=mesh)
  figures['active_latents'] = diagnostics.active_latents(means)
  return figures, pictures.pages(model, setup.train_config, params, key, images[:10], means)


def _watch(
  watch: events.EventWriter,
  config: PretrainConfig,
  setup: _Setup,
  state: training.TrainState,
  row: dict[str, float],
  images: np.ndarray,
  mesh: Mesh,
) -> None:
  """Adds a row to an event file; where a checkpoint fell due since the last, a look at the model.

  At rows alone, whose steps do not depend on how a run was interrupted.
  """
  step = int(state.step)
  watch.row(step, row)
  row_before = (step - 1) // config.log_every * config.log_every
  due = step // config.checkpoint_every > row_before // config.checkpoint_every
  if due or step == config.num_steps:
    figures, pages = _look(config, setup, state, images, mesh.local_mesh)
    figures['selection_linf'] = pictures.perturbation(pages['reconstructions'])
    watch.scalars(step, 'held_out', figures)
    watch.images(step, {name: page[:_WATCHED_ROWS] for name, page in pages.items()})


def _indices(config: PretrainConfig, num_examples: int, step: int, num_steps: int) -> np.ndarray:
  return data.batch_indices(config.seed, step, num_steps, config.batch_size, num_examples)


def _names(config_type: type[Any]) -> list[str]:
  return [field.name for field in dataclasses.fields(config_type)]


def _fields_of(config: PretrainConfig, *names: str) -> dict[str, Any]:
  names = tuple(name for group in names for name in group.split())
  return {name: getattr(config, name) for name in names}


def _check_same_settings(path: Path, config: PretrainConfig) -> None:
  """Refuses to go on with a run under other settings than it was started with."""
  if not path.exists():
    return
  before = runtime.read_json(path)['config']
  longer = config.schedule == 'constant' and config.num_steps > before['num_steps']
  free = _FREE_SETTINGS | ({'num_steps'} if longer else set())
  changed = {
    name: value
    for name, value in settings.to_dict(config).items()
    if name not in free and before.get(name) != value
  }
  if changed:
    names = ', '.join(f'--{name}' for name in changed)
    values = '; '.join(f'{name} was {before.get(name)}, now {new}' for name, new in changed.items())
    raise UsageError(
      f'{names}: not what the run in {path.parent} was started with ({values}); choose another '
      '--workdir'
    )


def _drop_rows_after(path: Path, step: int) -> None:
  """Keeps the rows up to `step`; what came after the last checkpoint will be written again."""
  if not path.exists():
    return
  kept = []
  for line in path.read_text().splitlines():
    try:
      row = json.loads(line)
    except json.JSONDecodeError:
      break  # the last line of a killed run
    if row['step'] > step:
      break
    kept.append(line + '\n')
  runtime.write_atomically(path, lambda temporary: temporary.write_text(''.join(kept)))


if __name__ == '__main__':
  settings.define_flags(PretrainConfig)
  runtime.run(main)
