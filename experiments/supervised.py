r"""Trains a classifier adversarially, with labels: how robust the same network can be.

  python -m experiments.supervised --workdir=runs/supervised --dataset=mnist_5k --num_steps=4000

The network is the encoder's, up to its means, with a linear layer on top: what `experiments.probe`
attacks, trained as one on PGD's images (Madry et al., 2018). A smooth encoder, which sees no label,
is not expected to reach it. With --labels_per_class=10 it trains on 10 images of each class alone,
those that `probe` fits its own probe to with the same flag and --seed. --certified_weight adds the
worst logits within interval bounds of the ball (Gowal et al., 2018): a comparison for certified
accuracy, with --probe='--certify'. Writes result.json. The same command continues a run that was
interrupted, also within its attack.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from etils import epy

from experiments import pretrain, probe, probe_settings, recording, records
from experiments.cli import app, devices, flags, messages, provenance, signals, workdirs
from se_vae.config import ArgumentError, DataConfig, ModelConfig, TrainConfig, setting, validate

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from experiments.visual import probe_results
  from se_vae import attacks, certification, data, seeds, training
  from se_vae.attacks import losses
  from se_vae.evaluation import linear_probe
  from se_vae.models import layer_lists, vae
  from se_vae.parallel import sharding
  from se_vae.storage import checkpoints

# Flags of probe that are about a frozen encoder, or about printing.
_UNUSED = ('surrogate', 'joint', 'moves', 'strict', 'standardize', 'l2', 'labels_per_class')

# Results do not depend on these settings, which may differ when a run is resumed.
_FREE = ('workdir', 'data_dir', 'cache_dir', 'checkpoint_every')
_FREE_IN_TRAINING = (*_FREE, 'probe')  # the attack comes after it

_ATTACK = 'attack'  # what the names of files begin with from which the attack goes on


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
  """The settings of this binary, all of them flags."""

  workdir: str | None = setting(None, 'Directory of this run; everything but downloads goes there.')
  data: DataConfig = dataclasses.field(default_factory=DataConfig)
  model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
  labels_per_class: int | None = setting(
    None,
    'Training examples of each class, a random draw; all if not given.',
    at_least=1,
  )
  radius: float = setting(0.2, 'linf radius of the attack in training.', at_least=0, at_most=1)
  growth: float = setting(
    0.3,
    'Share of the training steps during which the radius grows from 0.',
    at_least=0,
    at_most=1,
  )  # not 0 by default: a large radius from the start teaches nothing at all
  pgd_steps: int = setting(20, 'Gradient steps of the attack in training.', at_least=1)
  certified_weight: float = setting(
    0.0,
    'Share in the loss of the worst logits within interval bounds of the ball, beside the attack. '
    'It grows with the radius.',
    at_least=0,
    at_most=1,
  )
  num_steps: int = setting(10_000, 'Training steps.', at_least=1)
  batch_size: int = setting(64, 'Examples a step.', at_least=1)
  learning_rate: float = setting(
    1e-3, 'Peak learning rate of Adam, with a cosine schedule.', above=0
  )
  seed: int = setting(
    0,
    'Seed of initialisation, batch order, attacks and the draw of labels.',
    at_least=0,
    at_most=2**31 - 1,
  )
  checkpoint_every: int = setting(2000, 'Steps between checkpoints.', at_least=1)
  probe: str = setting('', "Flags of probe, for the attack: '--attack=worst_case --restarts=3'.")

  def __post_init__(self) -> None:
    validate(self)


Params: TypeAlias = 'tuple[vae.Params, linear_probe.LinearProbe]'


class Prepared(NamedTuple):
  """The work directory, the settings of the attack, the data, and the examples to train on."""

  workdir: Path
  attack: probe_settings.ProbeConfig
  dataset: data.Dataset
  rows: np.ndarray


class State(NamedTuple):
  """Everything that a training step changes."""

  step: jax.Array
  params: Params
  opt_state: Any


@dataclasses.dataclass(frozen=True)
class SupervisedStep:
  """A step of adversarial training, as `training.run` takes it.

  Attributes:
    classifier: the encoder's means with a linear layer.
    certified_weight: the share of the loss that is a bound over the whole ball, in [0, 1], once the
      radius has grown; it grows in proportion, since the first bounds are huge.
  """

  classifier: linear_probe.ProbedEncoder
  certified_weight: float = 0.0

  def __call__(
    self,
    state: State,
    args: tuple[TrainConfig, float, jax.Array, jax.Array],
    x: jax.Array,
    examples: jax.Array,
  ) -> tuple[State, dict[str, jax.Array]]:
    """Returns the state after the step and its loss.

    Args:
      state: the state before the step.
      args: the settings of the attack and of the optimiser, the share of the steps in which the
        radius grows, the run's PRNG key, and the labels of the training set `[N]`.
      x: this device's images `[B, H, W, C]` in [0, 1].
      examples: `[B]`, their places in the training set.
    """
    config, growth, key, labels = args
    objective, aim = losses.CrossEntropy(self.classifier), losses.Aim(labels[examples])
    done = (state.step + 1).astype(jnp.float32)
    size = jnp.minimum(1.0, done / jnp.maximum(1.0, growth * config.num_steps))
    radius, weight = config.radius * size, self.certified_weight * size

    def attacked() -> jax.Array:
      return attacks.pgd(
        objective,
        jax.random.fold_in(key, state.step),
        x,
        radius=radius,
        num_steps=config.pgd_steps,
        args=(aim, *state.params),
        index=sharding.positions(len(x)),
      )

    x_adv = jax.lax.cond(weight < 1.0, attacked, lambda: x) if self.certified_weight else attacked()

    def loss(params: Params) -> jax.Array:
      value = jnp.mean(objective(x_adv, aim, *params))
      if not self.certified_weight:
        return value
      bound = jnp.mean(certified_loss(self.classifier.model, params, x, aim.labels, radius))
      return (1.0 - weight) * value + weight * bound

    value, gradients = sharding.mean_over_devices(jax.value_and_grad(loss)(state.params))
    optimizer = training.make_optimizer(config)
    params, opt_state = training.apply_gradients(
      optimizer, gradients, state.opt_state, state.params
    )
    return State(state.step + 1, params, opt_state), {'loss': value}


def layers_of(model: vae.VAE, params: Params) -> tuple[certification.Layer, ...]:
  """Returns the classifier as layers from images to logits, the last two linear ones as one.

  Interval bounds are tighter that way.

  Raises:
    TypeError: for an encoder that cannot be certified, by name.
  """
  encoder, (_, last) = layer_lists.encoder_of(model, params[0]), params
  weights = jnp.matmul(encoder.mean.weights, last.weights, precision='highest')
  bias = jnp.matmul(encoder.mean.bias, last.weights, precision='highest') + last.bias
  return (*encoder.trunk, certification.Dense(weights, bias))


def certified_loss(
  model: vae.VAE, params: Params, x: jax.Array, labels: jax.Array, radius: jax.typing.ArrayLike
) -> jax.Array:
  """Returns upper bounds `[B]` of the cross-entropy, in nats, over the linf balls of images.

  Args:
    model: the model whose encoder is part of the classifier.
    params: of the encoder, and the linear layer.
    x: images `[B, H, W, C]` in [0, 1].
    labels: `[B]`.
    radius: of the balls.
  """
  region, method = certification.ball(x, radius), certification.Method('ibp')
  worst = certification.worst_logits(layers_of(model, params), region, labels, method)
  return optax.losses.softmax_cross_entropy_with_integer_labels(worst, labels)


def main() -> None:
  """Runs the binary."""
  config = flags.from_flags(SupervisedConfig)
  devices.use_all_cores(config.batch_size)
  with signals.StopSignal().listening() as stop:
    result = run(config, stop)
  print(probe_results.as_text(result, 'classifier, trained with labels,'))


def run(config: SupervisedConfig, stop: signals.StopSignal) -> dict[str, Any]:
  """Trains and attacks; returns the result's JSON.

  Raises:
    ArgumentError: if a setting cannot be used, before anything is compiled or written.
    Interrupted: when `stop` says so, after a checkpoint.
    NotFiniteError: if the loss is not finite; the last good checkpoint stays.
  """
  workdir, attack, dataset, rows = prepare(config)
  stop.patience = pretrain.PATIENCE
  mesh, attack_mesh = devices.mesh_for(config.batch_size), devices.mesh_for(attack.batch_size)
  with workdirs.lock(workdir, recording.RESULT, f'{_ATTACK}.*'):
    if (before := _finished(config, workdir, dataset)) is not None:
      return before
    classifier, params = _train(config, workdir, attack.task, dataset, rows, mesh, stop)
    outcome = probe.attack(
      attack,
      attack_mesh,
      classifier,
      dataset.test.images[: attack.num_examples].astype(np.float32) / 255.0,
      dataset.test.labels[attack.task][: attack.num_examples],
      description='supervised, attack',
      stop=stop,
      args=params,
      state_path=workdir / f'{_ATTACK}.state.npz',
    )
    result = {
      'step': config.num_steps,
      'checkpoint': recording.checkpoint_name(workdir, config.num_steps),
      **probe_results.claim(attack.task, outcome),
      'config': flags.to_dict(config),
      'evaluation': outcome.config,
      'data': dataset.provenance(),
      'versions': devices.versions(),
      'commit': provenance.commit(),
      'devices': devices.device_kinds(mesh),
    }
    workdirs.write_json(workdir / recording.RESULT, result)
    probe.remove_states(workdir, _ATTACK)
  return result


def prepare(config: SupervisedConfig) -> Prepared:
  """Checks all settings, and loads the data. Compiles and writes nothing.

  Raises:
    ArgumentError: if a setting cannot be used.
  """
  workdir = workdirs.check_workdir(config.workdir, workdirs.SUPERVISED)
  attack = probe_settings.parse(config.probe, unused=_UNUSED)
  dataset = data.with_task(pretrain.load_dataset(config.data, workdir), attack.task)
  pretrain.check_batch_size(config.batch_size, dataset)
  with flags.errors_begin_with('--probe'):
    probe.check_fits(attack, dataset, config.model)
  rows = _labelled(config, dataset, attack.task)
  if config.certified_weight:
    _check_can_be_certified(config.model, dataset)
  mesh = devices.mesh_for(config.batch_size)
  devices.check_memory(config.model, dataset.train.images.shape[1:], mesh, part='encoder')
  return Prepared(workdir, attack, dataset, rows)


def finished(config: SupervisedConfig) -> dict[str, Any] | None:
  """Returns the result's JSON if this classifier was trained and attacked before; None otherwise.

  Raises:
    ArgumentError: for settings that are wrong.
  """
  prepared = prepare(config)
  return _finished(config, prepared.workdir, prepared.dataset)


def _finished(
  config: SupervisedConfig, workdir: Path, dataset: data.Dataset
) -> dict[str, Any] | None:
  found = recording.read_result(workdir, config.num_steps, records.Supervised)
  if (
    found is None
    or found.get('data', {}).get('digest') != dataset.digest
    or _settings(found['config']) != _settings(flags.to_dict(config))
  ):
    return None
  return found


def _settings(stored: dict[str, Any], free: tuple[str, ...] = _FREE) -> dict[str, Any]:
  """Returns stored settings but the `free` ones, with the defaults of those added since."""
  return flags.to_dict(SupervisedConfig()) | stored | dict.fromkeys(free)


def _labelled(config: SupervisedConfig, dataset: data.Dataset, task: str) -> np.ndarray:
  """The training examples whose labels may be used.

  Raises:
    ArgumentError: if a class has fewer than are asked for, or a batch needs more than there are.
  """
  labels, num_classes = dataset.train.labels[task], dataset.num_classes[task]
  rows = data.few_labels(labels, num_classes, config.labels_per_class, seed=config.seed)
  if config.batch_size > len(rows):
    message = f'must be at most the {len(rows)} labelled examples; got {config.batch_size}'
    raise ArgumentError('batch_size', message)
  return rows


def _check_can_be_certified(config: ModelConfig, dataset: data.Dataset) -> None:
  model = vae.make_vae(tuple(dataset.train.images.shape[1:]), **flags.to_dict(config))
  try:
    jax.eval_shape(lambda key: layer_lists.encoder_of(model, model.init(key)), jax.random.key(0))
  except TypeError as error:
    raise ArgumentError('certified_weight', str(error)) from None


def _train(
  config: SupervisedConfig,
  workdir: Path,
  task: str,
  dataset: data.Dataset,
  rows: np.ndarray,
  mesh: jax.sharding.Mesh,
  stop: signals.StopSignal,
) -> tuple[linear_probe.ProbedEncoder, Any]:
  """Returns the classifier, trained on some `rows` of the data set, and its parameters.

  Training starts from the newest checkpoint if there is one.
  """
  images, labels = dataset.train.images, dataset.train.labels[task]
  model = vae.make_vae(tuple(images.shape[1:]), **flags.to_dict(config.model))
  classifier = linear_probe.ProbedEncoder(model)
  init_key, key = jax.random.split(seeds.key_of(config.seed))
  train_config = TrainConfig(  # Adam with a cosine schedule
    radius=config.radius,
    pgd_steps=config.pgd_steps,
    learning_rate=config.learning_rate,
    num_steps=config.num_steps,
  )

  def init(key: jax.Array) -> State:
    num_classes = dataset.num_classes[task]
    layer = linear_probe.LinearProbe(
      jnp.zeros((config.model.latent_dim, num_classes), jnp.float32),
      jnp.zeros(num_classes, jnp.float32),
    )
    params = {'encoder': model.init(key)['encoder']}, layer
    opt_state = training.make_optimizer(train_config).init(params)
    return State(jnp.zeros((), jnp.int32), params, opt_state)

  settings = _settings(flags.to_dict(config), _FREE_IN_TRAINING)
  metadata = {'config': settings, 'digest': dataset.digest, 'task': task}
  directory = workdir / recording.CHECKPOINTS
  template = jax.eval_shape(init, init_key)._asdict()
  found = recording.load_newest(workdir)
  if found is None:
    state = jax.jit(init)(init_key)
  else:
    _check_same_training(found.metadata, metadata, workdir)
    dataset.check_is_that_of(found.metadata['digest'])
    state = State(**found.restore(template))

  def indices_for(step: int, num_steps: int) -> np.ndarray:
    places = data.batch_indices(config.seed, step, num_steps, config.batch_size, len(rows))
    return rows[places].astype(np.int32)

  with messages.progress_bar(config.num_steps, 'supervised', initial=int(state.step)) as bar:
    for progress in training.run(
      SupervisedStep(classifier, config.certified_weight),
      state,
      (train_config, config.growth, key, labels),
      images,
      indices_for,
      num_steps=config.num_steps,
      steps_per_row=config.checkpoint_every,
      mesh=mesh,
    ):
      state = progress.state
      step = int(state.step)
      bar.update(step - bar.n)
      signum = stop.requested()
      if progress.row is not None or signum is not None:
        checkpoints.save(directory, step, state._asdict(), metadata)
      if signum is not None:
        raise signals.Interrupted(signum, stop.saves)
  return classifier, state.params


def _check_same_training(saved: dict[str, Any], now: dict[str, Any], workdir: Path) -> None:
  """Raises ArgumentError unless a checkpoint has the settings and the task of now."""
  wanted = {**now['config'], 'task': now['task']}
  # Checkpoints of earlier versions do not name their task.
  found = {**_settings(saved['config'], _FREE_IN_TRAINING), 'task': saved.get('task', now['task'])}
  changed = [
    f'{name} was {found.get(name)}, now {value}'
    for name, value in wanted.items()
    if found.get(name) != value
  ]
  if changed:
    message = f'was started with other settings ({"; ".join(changed)}); choose another one'
    raise ArgumentError('workdir', f'the run in {workdir} {message}')


if __name__ == '__main__':
  flags.define_flags(SupervisedConfig)
  app.run(main)
