r"""Fits a linear probe on a pretrained encoder's means, attacks it, and checks the claim.

  python -m experiments.probe --workdir=runs/se --task=digit --attack=worst_case

Reads the newest checkpoint of the run in --workdir and writes beside it `probe_TASK.json`
(accuracies, checks, settings, versions), `.csv` and `.png` (the curve), `_images.png` (adversarial
images beside originals and reconstructions) and `.npz` (every example's ledger and adversarial
image), with `probe_TASK_worst_case` for the name of a worst case; `robustness.json` holds all
results. --joint adds the curve of one attack on all tasks together, and --moves how far the
encoding itself can be moved, with `_moves.csv`. With --strict the exit code is 1 when a check
fails. Interrupted, the same command goes on where it was.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import json
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from etils import epy

from experiments import pretrain
from experiments.cli import app, devices, flags, messages, signals, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import SUITES, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax
  import numpy as np

  from experiments.visual import plots
  from se_vae import data
  from se_vae.evaluation import attack_log, linear_probe, maxima, robustness
  from se_vae.models import vae
  from se_vae.storage import atomic_files, checkpoints

TASKS = ('digit', 'color', 'label')
RADII = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)

# One probe at a time writes a directory, be the encoder itself trained on meanwhile or not.
_LOCK = '.probe.lock'
_FILES = ('probe_*', 'robustness.json')

# Seconds to wait for a batch of an attack once a signal has come. One can take minutes, and is lost
# unless the whole try is done: the ledger of finished tries is on disk.
_PATIENCE = 5.0

# Of the moves of the encoding, over the examples.
_QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

Progress = Callable[[int, int], None]


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of a pretraining run.')
  data_dir: str | None = setting(None, "Directory of the data; the run's own if not given.")
  task: str = setting('digit', 'What the probe predicts.', choices=TASKS)
  attack: str = setting('standard', "The paper's PGD, or everything there is.", choices=SUITES)
  radii: tuple[float, ...] = setting(
    RADII, 'linf radii of the attack, for pixels in [0, 1].', at_least=0, at_most=1
  )
  pgd_steps: int = setting(40, 'Gradient steps of the attack.', at_least=1)
  pgd_step_size: float | None = setting(
    None, 'Step size as a share of the radius; 2.5 / pgd_steps if not given.', above=0
  )
  restarts: int = setting(1, 'Random starts of the attack at each radius.', at_least=1)
  num_queries: int = setting(1000, 'Forward passes of the Square attack.', at_least=1)
  check_examples: int = setting(
    200, 'Test examples that the checks attack once more; 0 for no checks.', at_least=0
  )
  surrogate: str | None = setting(
    None, 'Directory of another run on the same data, whose adversarial examples check 8 tries.'
  )
  joint: bool = setting(False, 'Attack the probes of all tasks together too, for colour sets.')
  moves: bool = setting(False, 'Measure how far the encoding can be moved, without labels.')
  strict: bool = setting(False, 'Exit with code 1 when a check fails.')
  num_examples: int | None = setting(
    None, 'Test examples to attack, in canonical order; all if not given.', at_least=1
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
  print(f'{config.workdir}: {config.task} probe on {result["num_examples"]} test images')
  print(f'radius  adversarial accuracy [95 % interval], {config.attack}')
  for radius, accuracy, (low, high) in zip(
    result['radii'], result['accuracy'], result['interval'], strict=True
  ):
    print(f'{radius:6.3f}  {accuracy:.3f} [{low:.3f}, {high:.3f}]')
  if config.joint:
    tasks = ' and '.join(result['joint']['tasks'])
    print(f'{tasks} together:', *(f'{value:.3f}' for value in result['joint']['accuracy']))
  if config.moves:
    print('mean squared W2 of moves:', *(f'{value:.3g}' for value in result['moves']['mean']))
  for check in result['checks']:
    verdict = 'pass' if check['passed'] else 'FAIL'
    print(f'{verdict}  {check["number"]:2d} {check["name"]}: {check["figure"]}')
  if config.strict and not all(check['passed'] for check in result['checks']):
    sys.exit(1)


@dataclasses.dataclass(frozen=True)
class Prepared:
  """An encoder, its data, and the test examples to attack: images float32 in [0, 1]."""

  workdir: Path
  model: vae.VAE
  params: vae.Params
  metadata: dict[str, Any]
  dataset: data.Dataset
  images: np.ndarray
  labels: np.ndarray
  mesh: jax.sharding.Mesh
  surrogate: checkpoints.Run | None


def prepare(config: ProbeConfig) -> Prepared:
  """Checks everything that can be wrong, and loads. Compiles and writes nothing.

  Raises:
    UsageError: naming the flag.
  """
  validate(config)
  workdir = workdirs.check_workdir(config.workdir, _LOCK)
  model, params, metadata, _ = _load('--workdir', workdir)
  pretraining = pretrain.stored_config(metadata['config'])
  # A run's directory may have moved since, and with it what it wrote.
  data_dir = config.data_dir or pretraining.data.data_dir
  dataset = pretrain.load_dataset(dataclasses.replace(pretraining.data, data_dir=data_dir), workdir)
  check_fits(config, dataset)
  if dataset.digest != metadata['data']['digest']:
    raise UsageError('--data_dir: holds other data than the encoder was trained on')
  surrogate = _load_surrogate(config, workdir, dataset)
  count = config.num_examples or len(dataset.test.images)
  return Prepared(
    workdir,
    model,
    params,
    metadata,
    dataset,
    dataset.test.images[:count].astype(np.float32) / 255.0,
    dataset.test.labels[config.task][:count],
    devices.mesh_for(config.batch_size),
    surrogate,
  )


def _load(flag: str, workdir: Path) -> checkpoints.Run:
  try:
    return checkpoints.load_run(workdir)
  except checkpoints.CheckpointError as error:
    raise UsageError(
      f'{flag}: holds no pretrained encoder, run experiments.pretrain there first: {error}'
    ) from None


def _load_surrogate(
  config: ProbeConfig, workdir: Path, dataset: data.Dataset
) -> checkpoints.Run | None:
  if config.surrogate is None:
    return None
  if not config.check_examples:
    raise UsageError('--surrogate: is for a check; needs --check_examples above 0')
  path = Path(config.surrogate)
  if path.resolve() == workdir.resolve():
    raise UsageError('--surrogate: is --workdir itself; name another run')
  surrogate = _load('--surrogate', path)
  if surrogate.metadata['data']['digest'] != dataset.digest:
    raise UsageError('--surrogate: was trained on other data than --workdir')
  return surrogate


def train_means(prepared: Prepared, model: vae.VAE, params: vae.Params) -> np.ndarray:
  """What an encoder makes of the training set, `[N, D]`."""
  return linear_probe.encoder_means(
    model, params, prepared.dataset.train.images, mesh=prepared.mesh
  )


def fit(
  config: ProbeConfig, prepared: Prepared, means: np.ndarray, task: str | None = None
) -> tuple[linear_probe.LinearProbe, float]:
  """The probe for a task (--task if None) on `train_means`, and its accuracy on them."""
  task = config.task if task is None else task
  labels = prepared.dataset.train.labels[task]
  probe = linear_probe.fit_probe(
    means,
    labels,
    prepared.dataset.num_classes[task],
    l2=config.l2,
    standardize=config.standardize,
  )
  return probe, linear_probe.accuracy(probe, means, labels)


def run(
  config: ProbeConfig, stop: signals.StopSignal, description: str = 'attack'
) -> dict[str, Any]:
  """Fits, attacks and checks; returns the result's JSON.

  Raises:
    UsageError: for settings that are wrong, before anything is compiled or written.
    Interrupted: when `stop` says so; what was attacked is kept.
  """
  prepared = prepare(config)
  stop.patience = _PATIENCE
  with workdirs.lock(prepared.workdir, *_FILES, name=_LOCK):
    return _run(config, prepared, stop, description)


def _run(
  config: ProbeConfig, prepared: Prepared, stop: signals.StopSignal, description: str
) -> dict[str, Any]:
  means = train_means(prepared, prepared.model, prepared.params)
  stop.check()
  probe, train_accuracy = fit(config, prepared, means)
  stop.check()
  stem = prepared.workdir / file_stem(config)
  digest = hashlib.sha256(json.dumps(flags.to_dict(config)).encode()).hexdigest()[:8]
  state = stem.with_name(f'{stem.name}_{digest}.state.npz')
  surrogate = None
  if prepared.surrogate is not None:
    other, other_params, *_ = prepared.surrogate
    fitted, _ = fit(config, prepared, train_means(prepared, other, other_params))
    surrogate = linear_probe.ProbedEncoder(other), (other_params, fitted)
  options = _options(config, prepared.mesh)
  attack = functools.partial(
    evaluate,
    config,
    prepared.mesh,
    linear_probe.ProbedEncoder(prepared.model),
    prepared.images,
    prepared.labels,
    args=(prepared.params, probe),
    reconstruct_fn=linear_probe.Reconstruction(prepared.model),
    surrogate=surrogate,
    state_path=state,
  )
  extra: dict[str, Any] = {}
  if config.joint:
    with _progress(f'{description}, joint', stop) as progress:
      extra['joint'] = _joint(config, prepared, means, probe, options | {'progress': progress})
  if config.moves:
    with _progress(f'{description}, moves', stop) as progress:
      extra['moves'] = _moves(prepared, options | {'progress': progress})
  with _progress(description, stop) as progress:
    try:
      outcome = attack(progress=progress)
    except attack_log.LedgerError as error:
      messages.warn(f'{error}; starting afresh')
      state.unlink()
      outcome = attack(progress=progress)
  result = {
    **claim(config, outcome),
    'train_accuracy': train_accuracy,
    'config': flags.to_dict(config),
    'evaluation': outcome.config,
    **extra,
    'cost': {
      'gradients': int(outcome.ledger.gradients.sum()),
      'forwards': int(outcome.ledger.forwards.sum()),
    },
    'pretraining': prepared.metadata['config'],
    'step': prepared.metadata['step'],
    'surrogate': None if prepared.surrogate is None else prepared.surrogate.metadata['config'],
    'data': prepared.dataset.provenance(),
    'versions': devices.versions(),
    'devices': devices.device_kinds(),
  }
  _write(stem, result, outcome, prepared)
  state.unlink()
  return result


def _options(config: ProbeConfig, mesh: jax.sharding.Mesh) -> dict[str, Any]:
  """What every attack is told."""
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
  **more: Any,
) -> robustness.Evaluation:
  """`robustness.evaluate` of an encoder with a linear layer, as the settings say."""
  return robustness.evaluate(
    classifier,
    images,
    labels,
    attack=config.attack,
    num_queries=config.num_queries,
    relative_step_size=config.pgd_step_size,
    latents_fn=linear_probe.GaussianLatents(classifier.model),
    check_examples=config.check_examples,
    **_options(config, mesh),
    **more,
  )


def claim(config: ProbeConfig, outcome: robustness.Evaluation) -> dict[str, Any]:
  """What an evaluation found, as JSON."""
  return {
    'task': config.task,
    'num_examples': outcome.curve.correct.shape[1],
    'radii': list(config.radii),
    'accuracy': outcome.curve.accuracy.tolist(),
    'interval': outcome.curve.interval().tolist(),
    'checks': [check._asdict() for check in outcome.checks],
  }


@contextlib.contextmanager
def _progress(description: str, stop: signals.StopSignal) -> Iterator[Progress]:
  """A bar of finished and all attacks, which looks for a signal whenever it moves."""
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
  options: dict[str, Any],
) -> dict[str, Any]:
  """The curve of examples whose probes no single image breaks together."""
  tasks, count = tuple(prepared.dataset.num_classes), len(prepared.images)
  probes = [probe if t == config.task else fit(config, prepared, means, t)[0] for t in tasks]
  labels = [prepared.dataset.test.labels[task][:count] for task in tasks]
  curve = maxima.joint_accuracy(
    (linear_probe.ProbedEncoder(prepared.model),) * len(tasks),
    prepared.images,
    np.stack(labels, axis=1),
    args=tuple((prepared.params, fitted) for fitted in probes),
    **options,
  )
  return {
    'tasks': tasks,
    'radii': list(config.radii),
    'accuracy': curve.accuracy.tolist(),
    'interval': curve.interval().tolist(),
  }


def _moves(prepared: Prepared, options: dict[str, Any]) -> dict[str, Any]:
  """Mean and quantiles over examples of the largest squared W2 between the encodings of x and x'.

  Full covariances: of the distance of their means, a lower bound.
  """
  latents_fn = linear_probe.GaussianLatents(prepared.model)
  moves = maxima.representation_moves(
    latents_fn, prepared.images, args=(prepared.params,), **options
  )
  quantiles = np.quantile(moves, _QUANTILES, axis=1)
  return {
    'radii': list(options['radii']),
    'mean': moves.mean(axis=1).tolist(),
    'quantiles': dict(zip(map(str, _QUANTILES), quantiles.tolist(), strict=True)),
  }


def parse(text: str, *, unused: tuple[str, ...] = ()) -> ProbeConfig:
  """The settings that --probe of another binary gives; the directories are that binary's.

  Raises:
    UsageError: for a flag that is wrong, a directory, or one of the flags that are `unused` there.
  """
  config = flags.parse(ProbeConfig, text, '--probe')
  for name in ('workdir', 'data_dir'):
    if getattr(config, name) is not None:
      raise UsageError(f'--probe: --{name} is a flag of its own here')
  for name in unused:
    if getattr(config, name) != getattr(ProbeConfig, name):
      raise UsageError(f'--probe: --{name} changes nothing here')
  return config


def file_stem(config: ProbeConfig) -> str:
  """What the files of a result are called; a worst case does not take the place of the curve."""
  attack = '' if config.attack == 'standard' else f'_{config.attack}'
  return f'probe_{config.task}{attack}'


def check_fits(config: ProbeConfig, dataset: data.Dataset) -> None:
  """Raises UsageError, naming the flag, unless a data set has what the settings ask of it."""
  validate(config)
  if config.task not in dataset.num_classes:
    raise UsageError(
      f'--task: {dataset.name} has no {config.task} labels; its tasks are '
      f'{", ".join(dataset.num_classes)}'
    )
  for task in dataset.num_classes if config.joint else (config.task,):
    missing = set(range(dataset.num_classes[task])) - set(dataset.train.labels[task].tolist())
    if missing:
      raise UsageError(
        f'--task: {dataset.name} has no training example of {task} '
        f'{", ".join(map(str, sorted(missing)))}, and names {dataset.num_classes[task]}'
      )
  if config.joint and len(dataset.num_classes) < 2:
    raise UsageError(f'--joint: needs several tasks; {dataset.name} has {config.task} labels alone')
  available = len(dataset.test.images)
  if config.num_examples is not None and config.num_examples > available:
    raise UsageError(
      f'--num_examples: must be at most the {available} test examples; got {config.num_examples}'
    )


def _write(
  stem: Path, result: dict[str, Any], outcome: robustness.Evaluation, prepared: Prepared
) -> None:
  curves = {'': result} | ({'joint_': result['joint']} if 'joint' in result else {})
  columns: dict[str, Sequence[float]] = {'radius': result['radii']}
  for prefix, found in curves.items():
    columns |= {f'{prefix}accuracy': found['accuracy']}
    columns |= zip(
      (f'{prefix}low', f'{prefix}high'), zip(*found['interval'], strict=True), strict=True
    )
  _write_csv(stem.with_suffix('.csv'), columns)
  moves = result.get('moves')
  if moves:
    quantiles = {f'quantile_{level}': values for level, values in moves['quantiles'].items()}
    columns = {'radius': moves['radii'], 'mean_squared_w2': moves['mean'], **quantiles}
    _write_csv(stem.with_name(f'{stem.name}_moves.csv'), columns)

  curve, ledger = outcome.curve, vars(outcome.ledger)
  arrays = {('broken_' if name == 'radius' else '') + name: ledger[name] for name in ledger}
  with atomic_files.replacing(stem.with_suffix('.npz')) as file:
    np.savez_compressed(
      file, radii=curve.radii, correct=curve.correct, labels=prepared.labels, **arrays
    )
  objective = result['pretraining']['objective']
  drawn = [plots.Curve(objective, [found], name.strip('_')) for name, found in curves.items()]
  panels = [(f'{result["task"]} probe', drawn)]
  with atomic_files.replacing(stem.with_suffix('.png')) as file:
    plots.save(file, panels, moves=moves)
  page = _page(outcome, prepared)
  if page:
    with atomic_files.replacing(stem.with_name(f'{stem.name}_images.png')) as file:
      plots.save_images(file, page)
  path = stem.with_name('robustness.json')
  name = stem.name.removeprefix('probe_')
  workdirs.write_json(path, {**(workdirs.read_json(path) or {}), name: result})
  workdirs.write_json(stem.with_suffix('.json'), result)  # last: its presence says all is there


def _write_csv(path: Path, columns: Mapping[str, Sequence[float]]) -> None:
  workdirs.write_csv(path, [tuple(columns), *zip(*columns.values(), strict=True)])


def _page(outcome: robustness.Evaluation, prepared: Prepared) -> list[np.ndarray]:
  """Four rows of images: originals, adversarial ones, and what the decoder makes of either.

  Of the examples that were right and fell, evenly from the smallest broken radius to the largest.
  """
  radius = outcome.ledger.radius
  fallen = np.flatnonzero((radius > 0.0) & np.isfinite(radius))
  if not len(fallen):
    return []
  order = fallen[np.argsort(radius[fallen], kind='stable')]
  chosen = order[np.unique(np.linspace(0, len(order) - 1, 12).astype(int))]
  reconstruct = jax.jit(linear_probe.Reconstruction(prepared.model))
  rows = [prepared.images[chosen], outcome.ledger.images[chosen]]
  return [*rows, *(np.asarray(reconstruct(row, prepared.params)) for row in rows)]


if __name__ == '__main__':
  flags.define_flags(ProbeConfig)
  app.run(main)
