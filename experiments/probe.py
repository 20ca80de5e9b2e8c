r"""Fits a linear probe on a pretrained encoder's means, attacks it, and checks the result.

  python -m experiments.probe --workdir=runs/se --task=digit --attack=worst_case

Reads the newest checkpoint of the run in --workdir. Writes `probe_TASK.json` (accuracies, sanity
checks, settings, versions), `.csv` and `.png` (the curve), `_images.png` (adversarial images beside
originals and reconstructions) and `.npz` (the probe, the attack log and the adversarial image of
every example) to the same directory, or to --output, and then only reads the run. With
--attack=worst_case the files are named `probe_TASK_worst_case`; `robustness.json` holds all
results. --joint adds the curve of one attack on all tasks together, and --moves the largest latent
shift, with `_moves.csv`. With --strict the exit code is 1 if a check fails. An interrupted attack
continues when the same command is given again. A finished one is not repeated until its JSON file
is removed.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from etils import epy

from experiments import identity, pretrain, records
from experiments.cli import app, devices, flags, messages, provenance, signals, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import SUITES, ArgumentError, setting, validate
from se_vae.storage import json_files

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax
  import numpy as np

  from experiments.visual import probe_results
  from se_vae import data
  from se_vae.evaluation import attack_log, latent_shift, linear_probe, robustness
  from se_vae.models import vae
  from se_vae.storage import model_store

TASKS = ('digit', 'color', 'label')
RADII = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)

# One probe at a time writes to a directory, whether or not the encoder is being trained there.
_LOCK = '.probe.lock'

# Seconds to wait for a batch of an attack after a signal. A batch can take minutes, and is lost
# unless the whole attempt is finished: the log of finished attempts is on disk.
_PATIENCE = 5.0

# Auto-PGD and Square hold a table with an entry for each step, which is a constant of the program.
_MOST_STEPS = 1_000_000


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a pretraining run.')
  output: str | None = setting(
    None, 'Directory for everything that this binary writes; --workdir if not given.'
  )
  data_dir: str | None = setting(None, "Directory of the data; the run's own if not given.")
  cache_dir: str | None = setting(
    None,
    "Directory for decoded images; the run's own, or 'data' in --output, if not given.",
  )
  task: str = setting('digit', 'What the probe predicts.', choices=TASKS)
  attack: str = setting(
    'standard', "The paper's PGD, or a suite of strong and varied attacks.", choices=SUITES
  )
  radii: tuple[float, ...] = setting(
    RADII, 'linf radii of the attack, for pixels in [0, 1].', at_least=0, at_most=1
  )
  pgd_steps: int = setting(40, 'Gradient steps of the attack.', at_least=1, at_most=_MOST_STEPS)
  relative_step_size: float | None = setting(
    None, 'Step size as a share of the radius; 2.5 / pgd_steps if not given.', above=0
  )
  restarts: int = setting(
    1, 'Random starts of the attack at each radius.', at_least=1, at_most=10_000
  )  # every attempt is listed before the first
  num_queries: int = setting(
    1000, 'Forward passes of the Square attack.', at_least=1, at_most=_MOST_STEPS
  )
  check_examples: int = setting(
    200, 'Test examples that the sanity checks attack again; 0 for no checks.', at_least=0
  )
  surrogate: str | None = setting(
    None, 'Directory of another run on the same data, whose adversarial examples check 8 uses.'
  )
  joint: bool = setting(False, 'Attack the probes of all tasks together too, for colour sets.')
  moves: bool = setting(False, 'Measure the largest latent shift, without labels.')
  strict: bool = setting(False, 'Exit with code 1 if a check fails.')
  num_examples: int | None = setting(
    None, 'Test examples to attack, a fair sample of all; all if not given.', at_least=1
  )
  batch_size: int = setting(256, 'Examples attacked at a time; changes no result.', at_least=1)
  standardize: bool = setting(False, 'Standardise each latent before the fit, as in fit_probe.')
  l2: float = setting(1.0, 'Penalty of the probe, as in fit_probe.', above=0)
  seed: int = setting(0, 'Seed of the random starts.', at_least=0, at_most=2**31 - 1)


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
  if config.workdir and config.output:
    run = Path(config.workdir)
    output = workdirs.check_workdir(config.output, argument='output', lock_name=_LOCK)
  else:
    run = output = workdirs.check_workdir(config.workdir, lock_name=_LOCK)
  model, params, metadata, checkpoint = _load('workdir', run)
  dataset = _load_dataset(config, metadata, output)
  check_fits(config, dataset)
  dataset.check_is_that_of(metadata['data']['digest'])
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
    _load_surrogate(config, run, dataset),
  )


def _load(argument: str, workdir: Path) -> model_store.SavedModel:
  workdirs.check_owner(argument, workdir, workdirs.PRETRAIN)
  saved = pretrain.load_run(argument, workdir)
  with json_files.naming(saved.path, pretrain.NOT_A_RUN):
    pretrain.stored_config(json_files.check(saved.metadata, records.Run)['config'])
  return saved


def _load_dataset(config: ProbeConfig, metadata: dict[str, Any], output: Path) -> data.Dataset:
  """Loads the encoder's data, whose directories may have moved since."""
  stored = pretrain.stored_config(metadata['config']).data
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


def _load_surrogate(
  config: ProbeConfig, workdir: Path, dataset: data.Dataset
) -> model_store.SavedModel | None:
  if config.surrogate is None:
    return None
  if not config.check_examples:
    raise ArgumentError('surrogate', 'is for a check; needs check_examples above 0')
  path = Path(config.surrogate)
  if path.resolve() == workdir.resolve():
    raise ArgumentError('surrogate', 'is the run in workdir itself; name another one')
  surrogate = _load('surrogate', path)
  if not dataset.is_that_of(surrogate.metadata['data']['digest']):
    raise ArgumentError('surrogate', 'was trained on other data than the run in workdir')
  return surrogate


def train_means(prepared: Prepared, model: vae.VAE, params: vae.Params) -> np.ndarray:
  """An encoder's means of the training images, `[N, D]`."""
  return linear_probe.encoder_means(
    model, params, prepared.dataset.train.images, mesh=prepared.mesh
  )


def fit(
  config: ProbeConfig, prepared: Prepared, means: np.ndarray, task: str | None = None
) -> linear_probe.LinearProbe:
  """The probe for a task (--task if None), fitted to `train_means`."""
  task = config.task if task is None else task
  labels, num_classes = prepared.dataset.train.labels[task], prepared.dataset.num_classes[task]
  return linear_probe.fit_probe(
    means, labels, num_classes, l2=config.l2, standardize=config.standardize
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
  stem = prepared.output / file_stem(config)
  attacked = _attacked(config, prepared)
  with workdirs.lock(prepared.output, *probe_results.PATTERNS, name=_LOCK):
    if (finished := identity.finished(stem.with_suffix('.json'), attacked)) is not None:
      return finished
    means = train_means(prepared, prepared.model, prepared.params)
    stop.check()
    probe = fit(config, prepared, means)
    stop.check()
    surrogate = None
    if prepared.surrogate is not None:
      other, other_params, *_ = prepared.surrogate
      fitted = fit(config, prepared, train_means(prepared, other, other_params))
      surrogate = linear_probe.ProbedEncoder(other), (other_params, fitted)
    extra: dict[str, Any] = {}
    if config.joint:
      with _progress(f'{description}, joint', stop) as progress:
        extra['joint'] = _joint(config, prepared, means, probe, progress)
    if config.moves:
      with _progress(f'{description}, latent shift', stop) as progress:
        extra['moves'] = _latent_shift(config, prepared, progress)
    state = stem.with_name(f'{stem.name}_{identity.digest(attacked)}.state.npz')
    reconstruct_fn = linear_probe.Reconstruction(prepared.model)
    with _progress(description, stop) as progress:
      attack = functools.partial(
        evaluate,
        config,
        prepared.mesh,
        linear_probe.ProbedEncoder(prepared.model),
        prepared.images,
        prepared.labels,
        args=(prepared.params, probe),
        reconstruct_fn=reconstruct_fn,
        surrogate=surrogate,
        state_path=state,
        progress=progress,
      )
      try:
        outcome = attack()
      except attack_log.AttackLogError as error:
        messages.warn(f'{error}; starting afresh')
        state.unlink()
        outcome = attack()
    result = {
      **probe_results.claim(config.task, outcome),
      'train_accuracy': linear_probe.accuracy(
        probe, means, prepared.dataset.train.labels[config.task]
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
    state.unlink()
  return result


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


def evaluate(
  config: ProbeConfig,
  mesh: jax.sharding.Mesh,
  classifier: linear_probe.ProbedEncoder,
  images: np.ndarray,
  labels: np.ndarray,
  **options: Any,
) -> robustness.Evaluation:
  """`robustness.evaluate` of a probed encoder with these settings, and further `options`."""
  return robustness.evaluate(
    classifier,
    images,
    labels,
    attack=config.attack,
    num_queries=config.num_queries,
    relative_step_size=config.relative_step_size,
    latents_fn=linear_probe.GaussianLatents(classifier.model),
    check_examples=config.check_examples,
    **_attack_options(config, mesh),
    **options,
  )


@contextlib.contextmanager
def _progress(description: str, stop: signals.StopSignal) -> Iterator[Callable[[int, int], None]]:
  """The `progress` of an attack: a bar that looks for a signal whenever it advances."""
  with messages.progress_bar(1, description, unit='attack') as bar:

    def advance(done: int, total: int) -> None:
      bar.total = total
      bar.update(done - bar.n)
      stop.check()

    yield advance


def _joint(
  config: ProbeConfig,
  prepared: Prepared,
  means: np.ndarray,
  probe: linear_probe.LinearProbe,
  progress: Callable[[int, int], None],
) -> dict[str, Any]:
  """The curve of examples on which no single image misleads the probes of all tasks."""
  tasks, count = tuple(prepared.dataset.num_classes), len(prepared.images)
  probes = [probe if t == config.task else fit(config, prepared, means, t) for t in tasks]
  labels = [prepared.dataset.test.labels[task][:count] for task in tasks]
  curve = latent_shift.joint_accuracy(
    (linear_probe.ProbedEncoder(prepared.model),) * len(tasks),
    prepared.images,
    np.stack(labels, axis=1),
    args=tuple((prepared.params, fitted) for fitted in probes),
    progress=progress,
    **_attack_options(config, prepared.mesh),
  )
  return {'tasks': tasks, **probe_results.curve(curve)}


def _latent_shift(
  config: ProbeConfig, prepared: Prepared, progress: Callable[[int, int], None]
) -> dict[str, Any]:
  """The largest squared W2 between the encodings of x and of x', over the examples.

  For full covariances, the squared distance between their means, a lower bound.
  """
  shift = latent_shift.max_latent_shift(
    linear_probe.GaussianLatents(prepared.model),
    prepared.images,
    args=(prepared.params,),
    progress=progress,
    **_attack_options(config, prepared.mesh),
  )
  return probe_results.latent_shift(config.radii, shift)


def parse(text: str, *, unused: tuple[str, ...] = ()) -> ProbeConfig:
  """The settings in the --probe flag of another binary, which sets the directories itself.

  Raises:
    UsageError: for a flag that is wrong, a directory, or one of the flags that are `unused` there.
  """
  config = flags.parse(ProbeConfig, text, '--probe')
  for name in ('workdir', 'data_dir', 'cache_dir'):
    if getattr(config, name) is not None:
      raise UsageError(f'--probe: --{name} is a flag of its own here')
  for name in ('output', *unused):
    if getattr(config, name) != getattr(ProbeConfig, name):
      raise UsageError(f'--probe: --{name} changes nothing here')
  return config


def file_stem(config: ProbeConfig) -> str:
  """The name of a result's files without suffix; each suite of attacks has a name of its own."""
  attack = '' if config.attack == 'standard' else f'_{config.attack}'
  return f'probe_{config.task}{attack}'


def check_fits(config: ProbeConfig, dataset: data.Dataset) -> None:
  """Raises ArgumentError unless a data set has what the settings ask of it."""
  validate(config)
  if config.task not in dataset.num_classes:
    tasks = ', '.join(dataset.num_classes)
    raise ArgumentError('task', f'{dataset.name} has no task {config.task}; its tasks are {tasks}')
  for task in dataset.num_classes if config.joint else (config.task,):
    missing = set(range(dataset.num_classes[task])) - set(dataset.train.labels[task].tolist())
    if missing:
      raise ArgumentError(
        'task',
        f'{dataset.name} has no training example of {task} '
        f'{", ".join(map(str, sorted(missing)))}, and names {dataset.num_classes[task]}',
      )
  if config.joint and len(dataset.num_classes) < 2:
    raise ArgumentError('joint', f'needs several tasks; {dataset.name} has {config.task} alone')
  available = len(dataset.test.images)
  if config.num_examples is not None and config.num_examples > available:
    raise ArgumentError(
      'num_examples',
      f'must be at most the {available} test examples; got {config.num_examples}',
    )
  labels = dataset.test.labels[config.task][: config.num_examples]
  if (labels == labels[0]).all():
    raise ArgumentError('num_examples', f'is too small: all are of {config.task} {labels[0]}')


if __name__ == '__main__':
  flags.define_flags(ProbeConfig)
  app.run(main)
