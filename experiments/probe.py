r"""Fits a linear probe on a pretrained encoder's means, attacks it, and checks the result.

  python -m experiments.probe --workdir=runs/se --task=digit --attack=worst_case

Reads the newest checkpoint of the run in --workdir, or the encoder that --pretrained names. Writes
`probe_TASK.json` (accuracies, sanity checks, settings, versions), `.csv` and `.png` (the curve),
`_images.png` (adversarial images beside originals and reconstructions) and `.npz` (the probe, the
attack log and the adversarial image of every example) to the same directory, or to --output, and
then only reads the run. With --attack=worst_case the files are named `probe_TASK_worst_case`;
`robustness.json` holds all results. --certify adds the certified curve, which no attack can bring
the accuracy below. --joint adds the curve of one attack on all tasks together, and --moves the
largest latent shift, with `_moves.csv`. With --labels_per_class=10 the probe is fitted to 10 labels
a class, and the files are named `probe_TASK_10_labels`. With --strict the exit code is 1 if a check
fails. An interrupted probe continues when the same command is given again, whatever it was at. A
finished one is not repeated until its JSON file is removed.
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from etils import epy

from experiments import identity, pretrain, probe_settings, recording, records
from experiments.cli import app, devices, flags, messages, provenance, signals, workdirs
from experiments.probe_settings import ProbeConfig
from se_vae.config import ArgumentError, ModelConfig, validate
from se_vae.storage import json_files

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax
  import numpy as np

  from experiments.visual import probe_results
  from se_vae import certification, data
  from se_vae.evaluation import certifiers, latent_shift, linear_probe, robustness, states
  from se_vae.models import layer_lists, vae
  from se_vae.storage import model_store, pretrained

Result = TypeVar('Result')

# One probe at a time writes to a directory, whether or not the encoder is being trained there.
LOCK = '.probe.lock'

# Seconds to wait for a batch of an attack after a signal. A batch can take minutes, and is lost
# then: those before it are on disk, but for those of the last ten seconds.
_PATIENCE = 5.0
# Of all matrix products, as JAX's setting of that name. The default of a GPU keeps 10 bits of each
# factor (TF32), and that is another network than the one that is certified.
PRECISION = 'highest'


def main() -> None:
  """Entry point."""
  config = flags.from_flags(ProbeConfig)
  devices.use_all_cores(config.batch_size)
  with signals.StopSignal().listening() as stop:
    result = run(config, stop)
  print(probe_results.as_text(result))
  if config.strict and any(check['verdict'] == 'fail' for check in result['checks']):
    sys.exit(1)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An encoder, its data, and the test examples to attack: images float32 in [0, 1].

  `output` is where results go, and `checkpoint` the name of the encoder's file.
  """

  output: Path
  model: vae.VAE
  params: vae.Params
  metadata: dict[str, Any]
  checkpoint: str
  dataset: data.Dataset
  images: np.ndarray
  labels: np.ndarray
  mesh: jax.sharding.Mesh
  surrogate: model_store.SavedModel | None


def prepare(config: ProbeConfig) -> Prepared:
  """Loads the encoder and its data, and checks all settings. Compiles and writes nothing.

  Raises:
    ArgumentError: if a setting cannot be used.
  """
  validate(config)
  argument, run = _encoder(config)
  if config.output and (config.workdir or config.pretrained):
    output = workdirs.check_workdir(config.output, argument='output', lock_name=LOCK)
    if (output / recording.CONFIG).exists() and output.resolve() != run.resolve():
      raise ArgumentError('output', f'{output} holds another run; choose another directory')
  else:
    output = workdirs.check_workdir(config.workdir, lock_name=LOCK)
  model, params, metadata, checkpoint = _load(argument, run)
  dataset = data.with_task(_load_dataset(config, metadata, output), config.task)
  check_fits(config, dataset)
  _method(config, model)
  if config.dataset is None:
    dataset.check_is_that_of(metadata['data']['digest'])
  elif (shape := dataset.train.images.shape[1:]) != model.image_shape:
    raise ArgumentError(
      'dataset', f'has images of shape {shape}, and the encoder takes {model.image_shape}'
    )
  count = config.num_examples or len(dataset.test.images)
  return Prepared(
    output,
    model,
    params,
    metadata,
    checkpoint.name,
    dataset,
    dataset.test.images[:count].astype(np.float32) / 255.0,
    dataset.test.labels[config.task][:count],
    devices.mesh_for(config.batch_size),
    load_surrogate(config, model.image_shape, checkpoint.name),
  )


def _encoder(config: ProbeConfig) -> tuple[str, Path]:
  """The setting that names the encoder, and its directory."""
  if config.pretrained is None:
    return 'workdir', Path(config.workdir or '')  # checked with the other settings of directories
  if config.workdir is not None or config.output is None:
    raise ArgumentError('pretrained', 'is in place of a run in workdir, and needs output')
  try:
    return 'pretrained', pretrained.workdir(config.pretrained)
  except ArgumentError as error:
    raise ArgumentError('pretrained', error.message) from None


def _load(argument: str, workdir: Path) -> model_store.SavedModel:
  workdirs.check_owner(argument, workdir, workdirs.PRETRAIN)
  saved = pretrain.load_run(argument, workdir)
  with json_files.naming(saved.path, pretrain.NOT_A_RUN):
    pretrain.stored_config(json_files.check(saved.metadata, records.Run)['config'])
  return saved


def _load_dataset(config: ProbeConfig, metadata: dict[str, Any], output: Path) -> data.Dataset:
  """Loads the encoder's data, whose directories may have moved since."""
  stored = pretrain.stored_config(metadata['config']).data
  if config.dataset is not None:
    resized = config.dataset.startswith(('folder:', 'tfds:'))
    size = stored.image_size if resized else None  # others have one size
    stored = dataclasses.replace(stored, dataset=config.dataset, data_dir=None, image_size=size)
  data_dir, cache_dir = config.data_dir or stored.data_dir, config.cache_dir
  if not (cache_dir or config.output) and stored.cache_dir and Path(stored.cache_dir).is_dir():
    cache_dir = stored.cache_dir
  stored = dataclasses.replace(stored, data_dir=data_dir, cache_dir=cache_dir)
  try:
    return pretrain.load_dataset(stored, output)
  except ArgumentError as error:
    names_folder = error.arguments == ('dataset',) and stored.dataset.startswith('folder:')
    if config.data_dir is None and (data_dir is not None or names_folder):
      message = f'{error.message}. This is from the run; name the directory where its data are now'
      raise ArgumentError('data_dir' if names_folder else error.arguments, message) from None
    raise


def load_surrogate(
  config: ProbeConfig, image_shape: tuple[int, ...], checkpoint: str | None = None
) -> model_store.SavedModel | None:
  """Loads the encoder in `surrogate`; None if there is none.

  Args:
    config: the settings of the attack.
    image_shape: that of the attacked encoder, (H, W, C).
    checkpoint: the file of the attacked encoder; None before it is trained.

  Raises:
    ArgumentError: if it is no encoder, the attacked one, or one of other images.
  """
  if config.surrogate is None:
    return None
  surrogate = _load('surrogate', pretrain.encoder_directory('surrogate', config.surrogate))
  if surrogate.path.name == checkpoint:
    raise ArgumentError('surrogate', 'is the encoder that is attacked; name another one')
  if (shape := surrogate.model.image_shape) != image_shape:
    raise ArgumentError(
      'surrogate', f'takes images of shape {shape}, and the attacked encoder {image_shape}'
    )
  return surrogate


def train_means(prepared: Prepared, model: vae.VAE, params: vae.Params) -> np.ndarray:
  """An encoder's means of the training images, `[N, D]`."""
  with jax.default_matmul_precision(PRECISION):
    return linear_probe.encoder_means(
      model, params, prepared.dataset.train.images, mesh=prepared.mesh
    )


def fit(
  config: ProbeConfig, prepared: Prepared, means: np.ndarray, task: str | None = None
) -> linear_probe.LinearProbe:
  """The probe for a task (--task if None), fitted to `train_means`."""
  task = config.task if task is None else task
  labels, num_classes = prepared.dataset.train.labels[task], prepared.dataset.num_classes[task]
  rows = probe_settings.fitted_rows(config, prepared.dataset, task)
  return linear_probe.fit_probe(
    means[rows], labels[rows], num_classes, l2=config.l2, standardize=config.standardize
  )


def run(
  config: ProbeConfig, stop: signals.StopSignal, description: str = 'attack'
) -> dict[str, Any]:
  """Fits, attacks and checks, unless this was done before; returns the result's JSON.

  Raises:
    ArgumentError: for settings that are wrong, before anything is compiled or written.
    Interrupted: when `stop` says so; what was attacked is kept.
  """
  prepared = prepare(config)
  stop.patience = _PATIENCE
  stem = prepared.output / probe_settings.file_stem(config)
  attacked = _attacked(config, prepared)
  with (
    workdirs.lock(prepared.output, *probe_results.PATTERNS, name=LOCK),
    jax.default_matmul_precision(PRECISION),
  ):
    state = f'{stem.name}_{identity.digest(attacked)}'
    if (finished := identity.finished(stem.with_suffix('.json'), attacked)) is not None:
      remove_states(prepared.output, state)
      return finished
    means = train_means(prepared, prepared.model, prepared.params)
    stop.check()
    probe = fit(config, prepared, means)
    fitted = probe_settings.fitted_rows(config, prepared.dataset, config.task)
    stop.check()
    surrogate = None
    if prepared.surrogate is not None:
      other, other_params, *_ = prepared.surrogate
      other_probe = fit(config, prepared, train_means(prepared, other, other_params))
      surrogate = linear_probe.ProbedEncoder(other), (other_params, other_probe)
    extra: dict[str, Any] = {}
    if config.joint:
      with messages.advancing_bar(f'{description}, joint', stop.check) as progress:
        options = {'progress': progress, 'state_path': stem.with_name(f'{state}.joint.state.npz')}
        extra['joint'] = resumed(_joint, config, prepared, means, probe, **options)
    if config.moves:
      with messages.advancing_bar(f'{description}, latent shift', stop.check) as progress:
        options = {'progress': progress, 'state_path': stem.with_name(f'{state}.moves.state.npz')}
        extra['moves'] = resumed(_latent_shift, config, prepared, **options)
    reconstruct_fn = linear_probe.Reconstruction(prepared.model)
    outcome = attack(
      config,
      prepared.mesh,
      linear_probe.ProbedEncoder(prepared.model),
      prepared.images,
      prepared.labels,
      description=description,
      stop=stop,
      args=(prepared.params, probe),
      reconstruct_fn=reconstruct_fn,
      surrogate=surrogate,
      state_path=stem.with_name(f'{state}.state.npz'),
    )
    result = {
      **probe_results.claim(config.task, outcome),
      'train_accuracy': linear_probe.accuracy(
        probe, means[fitted], prepared.dataset.train.labels[config.task][fitted]
      ),
      'evaluation': outcome.config,
      **extra,
      'cost': {
        name: int(getattr(outcome.attack_log, name).sum()) for name in ('gradients', 'forwards')
      },
      **attacked,
      'versions': devices.versions(),
      'commit': provenance.commit(),
      'devices': devices.device_kinds(prepared.mesh),
    }
    reconstruct = functools.partial(jax.jit(reconstruct_fn), params=prepared.params)
    probe_results.write(stem, result, outcome, probe, prepared.images, prepared.labels, reconstruct)
    remove_states(prepared.output, state)
  return result


def resumed(function: Callable[..., Result], *args: Any, **options: Any) -> Result:
  """Calls a function that goes on from a state, which is removed if it is of no use."""
  try:
    return function(*args, **options)
  except states.StateError as error:
    messages.warn(f'{error}; starting afresh')
    error.path.unlink()
  return resumed(function, *args, **options)


def remove_states(directory: Path, name: str) -> None:
  """Removes the states of a result that is finished; `name` is what their files begin with."""
  for path in directory.glob(f'{name}.*'):
    path.unlink()


def finished(config: ProbeConfig) -> dict[str, Any] | None:
  """Returns the result's JSON if this attack was done before; None otherwise.

  Raises:
    ArgumentError: for settings that are wrong.
  """
  prepared = prepare(config)
  path = prepared.output / f'{probe_settings.file_stem(config)}.json'
  return identity.finished(path, _attacked(config, prepared))


def _attacked(config: ProbeConfig, prepared: Prepared) -> dict[str, Any]:
  """What is attacked and how, which `identity` tells from other attacks, as JSON values."""
  surrogate = prepared.surrogate
  return {
    'config': flags.to_dict(config),
    'pretraining': prepared.metadata['config'],
    'step': prepared.metadata['step'],
    'checkpoint': prepared.checkpoint,
    'surrogate': None if surrogate is None else surrogate.metadata['config'],
    'surrogate_checkpoint': None if surrogate is None else surrogate.path.name,
    'data': prepared.dataset.provenance(),
  }


def _attack_options(config: ProbeConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """The arguments that all attacks of a probe share."""
  return {
    'radii': config.radii,
    'num_steps': config.pgd_steps,
    'restarts': config.restarts,
    'seed': config.seed,
    'batch_size': config.batch_size,
    'mesh': mesh,
  }


def attack(
  *args: Any, description: str, stop: signals.StopSignal, **options: Any
) -> robustness.Evaluation:
  """`evaluate` with progress bars, which goes on where an earlier call was interrupted."""
  stop.patience = _PATIENCE
  certificates = f'{description}, certificates'
  with (
    messages.advancing_bar(description, stop.check) as progress,
    messages.advancing_bar(certificates, stop.check, unit='bound') as certificate_progress,
  ):
    bars = {'progress': progress, 'certificate_progress': certificate_progress}
    return resumed(evaluate, *args, **bars, **options)


def evaluate(
  config: ProbeConfig,
  mesh: jax.sharding.Mesh,
  classifier: linear_probe.ProbedEncoder,
  images: np.ndarray,
  labels: np.ndarray,
  **options: Any,
) -> robustness.Evaluation:
  """`robustness.evaluate` of a probed encoder with these settings, and further `options`."""
  with jax.default_matmul_precision(PRECISION):
    return robustness.evaluate(
      classifier,
      images,
      labels,
      attack=config.attack,
      num_queries=config.num_queries,
      relative_step_size=config.relative_step_size,
      latents_fn=linear_probe.GaussianLatents(classifier.model),
      check_examples=config.check_examples,
      certify=_method(config, classifier.model) or False,
      **_attack_options(config, mesh),
      **options,
    )


def _method(config: ProbeConfig, model: vae.VAE) -> certification.Method | None:
  """The method of --certify, or None without it.

  Raises:
    ArgumentError: for an encoder that cannot be certified, or not within the memory.
  """
  if not config.certify:
    return None
  params = jax.eval_shape(model.init, jax.random.key(0))
  classifier = linear_probe.ProbedEncoder(model)
  suited = certifiers.certifier_for(classifier, (params, None), model.image_shape).method
  method = certification.Method(config.certify_method or suited.name, config.certify_slope_steps)
  if method.name == 'crown':
    layers = jax.eval_shape(functools.partial(layer_lists.encoder_of, model), params).means()
    count = certification.num_coefficients(layers, model.image_shape)  # of one image a device
    mesh = devices.mesh_for(config.batch_size)
    devices.check_bounds_memory('certify_method', 'crown', count, mesh)
  return method


def _joint(
  config: ProbeConfig,
  prepared: Prepared,
  means: np.ndarray,
  probe: linear_probe.LinearProbe,
  **options: Any,
) -> dict[str, Any]:
  """The curve of examples on which no single image misleads the probes of all tasks."""
  tasks, count = probe_settings.joint_tasks(prepared.dataset), len(prepared.images)
  probes = [probe if t == config.task else fit(config, prepared, means, t) for t in tasks]
  labels = [prepared.dataset.test.labels[task][:count] for task in tasks]
  curve = latent_shift.joint_accuracy(
    (linear_probe.ProbedEncoder(prepared.model),) * len(tasks),
    prepared.images,
    np.stack(labels, axis=1),
    args=tuple((prepared.params, fitted) for fitted in probes),
    **_attack_options(config, prepared.mesh),
    **options,
  )
  return {'tasks': tasks, **probe_results.curve(curve)}


def _latent_shift(config: ProbeConfig, prepared: Prepared, **options: Any) -> dict[str, Any]:
  """The largest squared W2 between the encodings of x and of x', over the examples.

  For full covariances, the squared distance between their means, a lower bound.
  """
  shift = latent_shift.max_latent_shift(
    linear_probe.GaussianLatents(prepared.model),
    prepared.images,
    args=(prepared.params,),
    **_attack_options(config, prepared.mesh),
    **options,
  )
  return probe_results.latent_shift(config.radii, shift)


def check_fits(
  config: ProbeConfig, dataset: data.Dataset, model: ModelConfig | None = None
) -> None:
  """Raises ArgumentError unless a data set, and a model to be trained, have what is asked."""
  validate(config)
  if model is not None:
    shape = tuple(dataset.train.images.shape[1:])
    _method(config, vae.make_vae(shape, **flags.to_dict(model)))
  if config.surrogate is not None and not config.check_examples:
    raise ArgumentError('surrogate', 'is for a check; needs check_examples above 0')
  if config.certify_method and not config.certify:
    raise ArgumentError('certify_method', 'needs certify')
  if config.certify_slope_steps and (not config.certify or config.certify_method == 'ibp'):
    raise ArgumentError('certify_slope_steps', 'needs certify, by crown or crown_ibp')
  probe_settings.check_data(config, data.with_task(dataset, config.task))


if __name__ == '__main__':
  flags.define_flags(ProbeConfig)
  app.run(main)
