r"""Trains a classifier adversarially, with labels: how robust the same network can be.

  python -m experiments.supervised --workdir=runs/supervised --dataset=mnist_5k --num_steps=4000

The network is the encoder's, up to its means, with a linear layer on top: what `experiments.probe`
attacks, trained as one on PGD's images (Madry et al., 2018). No smooth encoder, which sees no
label, is expected to reach it. Writes result.json, and goes on where it was interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any, NamedTuple

from etils import epy

from experiments import pretrain, probe
from experiments.cli import app, devices, flags, messages, signals, workdirs
from experiments.cli.flags import UsageError
from se_vae.config import ARCHS, DATASETS, setting, validate
from se_vae.data.transforms import pixels

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import jax
  import jax.numpy as jnp
  import numpy as np
  import optax

  from se_vae import attacks, data
  from se_vae.attacks import losses
  from se_vae.evaluation import linear_probe
  from se_vae.models import vae
  from se_vae.parallel import sharding
  from se_vae.storage import checkpoints

_STEPS_PER_DISPATCH = 50

# Flags of probe that are about a frozen encoder, or about printing.
_UNUSED = ('surrogate', 'joint', 'moves', 'strict', 'standardize', 'l2')


@dataclasses.dataclass(frozen=True)
class SupervisedConfig:
  """The flags of this binary."""

  workdir: str | None = setting(None, 'Directory of this run; everything it writes goes there.')
  dataset: str = setting('mnist_5k', f'One of: {", ".join(DATASETS)}, or tfds:NAME.')
  data_dir: str | None = setting(None, 'Directory of the IDX files or the TFDS data set.')
  arch: str = setting('mlp', 'Architecture of the network.', choices=ARCHS)
  latent_dim: int = setting(64, 'Units below the linear layer.', at_least=1)
  hidden_units: int = setting(200, 'Units of each of the 4 layers of an MLP.', at_least=1)
  conv_channels: int = setting(200, 'Channels of each of the 4 layers of a ConvNet.', at_least=1)
  radius: float = setting(0.2, 'linf radius of the attack in training.', at_least=0, at_most=1)
  growth: float = setting(
    0.3, 'Share of the steps in which the radius grows to its size.', at_least=0, at_most=1
  )  # not 0 by default: a large radius from the start teaches nothing at all
  pgd_steps: int = setting(20, 'Gradient steps of the attack in training.', at_least=1)
  num_steps: int = setting(10_000, 'Training steps.', at_least=1)
  batch_size: int = setting(64, 'Examples a step.', at_least=1)
  learning_rate: float = setting(1e-3, "Adam's, at its peak; a cosine from there.", above=0)
  seed: int = setting(0, 'Of everything random.', at_least=0, at_most=2**31 - 1)
  checkpoint_every: int = setting(2000, 'Steps between checkpoints.', at_least=1)
  probe: str = setting('', "Flags of probe, for the attack: '--attack=worst_case --restarts=3'.")


class State(NamedTuple):
  """Everything that a step changes."""

  step: jax.Array
  params: tuple[vae.Params, linear_probe.LinearProbe]
  opt_state: Any


def main() -> None:
  """Entry point."""
  config = flags.from_flags(SupervisedConfig)
  devices.use_all_cores(config.batch_size)
  with signals.StopSignal().listening() as stop:
    result = run(config, stop)
  for radius, accuracy in zip(result['radii'], result['accuracy'], strict=True):
    print(f'{radius:6.3f}  {accuracy:.3f}')


def run(config: SupervisedConfig, stop: signals.StopSignal) -> dict[str, Any]:
  """Trains and attacks; returns the result's JSON.

  Raises:
    UsageError: for settings that are wrong, before anything is compiled or written.
    Interrupted: when `stop` says so, after a checkpoint.
  """
  validate(config)
  workdir = workdirs.check_workdir(config.workdir)
  attack = probe.parse(config.probe, unused=_UNUSED)
  dataset = pretrain.load_dataset(
    pretrain.PretrainConfig(config.workdir, config.dataset, config.data_dir)
  )
  pretrain.check_batch_size(config.batch_size, dataset)
  probe.check_fits(attack, dataset)
  mesh, attack_mesh = devices.mesh_for(config.batch_size), devices.mesh_for(attack.batch_size)
  with workdirs.lock(workdir, pretrain.RESULT):
    finished = _finished(config, dataset)
    if finished is not None:
      return finished
    classifier, state = _train(config, attack.task, dataset, mesh, stop)
    outcome = probe.evaluate(
      attack,
      attack_mesh,
      classifier,
      dataset.test.images[: attack.num_examples].astype(np.float32) / 255.0,
      dataset.test.labels[attack.task][: attack.num_examples],
      args=state.params,
      progress=lambda *_: stop.check(),
    )
    result = {
      'step': int(state.step),
      **probe.claim(attack, outcome),
      'config': flags.to_dict(config),
      'evaluation': outcome.config,
      'data': dataset.provenance(),
      'versions': devices.versions(),
      'devices': devices.device_kinds(),
    }
    workdirs.write_json(workdir / pretrain.RESULT, result)
  return result


def _finished(config: SupervisedConfig, dataset: data.Dataset) -> dict[str, Any] | None:
  """The result of these very settings on this very data, if it is there already."""
  path = Path(str(config.workdir)) / pretrain.RESULT
  result = workdirs.read_json(path, 'radii', 'accuracy', 'config')
  if result is None:
    return None
  found = (result['config'], result.get('data'))
  wanted = (flags.to_dict(config), dataset.provenance())
  return result if found == wanted else None


def _train(
  config: SupervisedConfig,
  task: str,
  dataset: data.Dataset,
  mesh: jax.sharding.Mesh,
  stop: signals.StopSignal,
) -> tuple[linear_probe.ProbedEncoder, State]:
  """The classifier at its last step, from the newest checkpoint if there is one."""
  images, labels = dataset.train.images, dataset.train.labels[task]
  model = vae.make_vae(
    tuple(images.shape[1:]),
    **{
      name: getattr(config, name)
      for name in ('arch', 'latent_dim', 'hidden_units', 'conv_channels')
    },
  )
  classifier = linear_probe.ProbedEncoder(model)
  init_key, key = jax.random.split(jax.random.key(config.seed))
  init = functools.partial(_init, config, classifier, num_classes=dataset.num_classes[task])
  template = jax.eval_shape(init, init_key)._asdict()
  saved = {**flags.to_dict(config), 'workdir': None, 'data_dir': None, 'probe': None}
  directory = Path(str(config.workdir)) / pretrain.CHECKPOINTS
  restored = checkpoints.restore_latest(directory, template, on_damage=messages.warn)
  if restored is None:
    state = jax.jit(init)(init_key)
  else:
    tree, metadata = restored
    if metadata['config'] != saved or metadata['digest'] != dataset.digest:
      raise UsageError(f'--workdir: the run in {config.workdir} was started with other settings')
    state = State(**tree)
  state = sharding.replicate_copy(mesh, state)
  key, device_images, device_labels = sharding.replicate(mesh, (key, images, labels))
  step = int(state.step)
  with messages.progress_bar(config.num_steps, 'supervised', initial=step) as bar:
    while step < config.num_steps:
      count = min(_STEPS_PER_DISPATCH - step % _STEPS_PER_DISPATCH, config.num_steps - step)
      indices = data.batch_indices(config.seed, step, count, config.batch_size, len(images))
      indices = sharding.split(mesh, indices, axis=1)
      state = _steps(classifier, config, mesh, state, key, device_images, device_labels, indices)
      before, step = step, int(state.step)
      bar.update(step - before)
      due = step // config.checkpoint_every > before // config.checkpoint_every
      if due or step == config.num_steps or stop.requested():
        metadata = {'config': saved, 'digest': dataset.digest}
        checkpoints.save(directory, step, state._asdict(), metadata)
      stop.check()
  return classifier, state


def _optimizer(config: SupervisedConfig) -> optax.GradientTransformation:
  return optax.adam(optax.cosine_decay_schedule(config.learning_rate, config.num_steps))


def _init(
  config: SupervisedConfig, classifier: linear_probe.ProbedEncoder, key: jax.Array, num_classes: int
) -> State:
  """Step 0; the linear layer starts at zero."""
  layer = linear_probe.LinearProbe(
    jnp.zeros((config.latent_dim, num_classes)), jnp.zeros(num_classes)
  )
  params = {'encoder': classifier.model.init(key)['encoder']}, layer
  return State(jnp.zeros((), jnp.int32), params, _optimizer(config).init(params))


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=3)
def _steps(
  classifier: linear_probe.ProbedEncoder,
  config: SupervisedConfig,
  mesh: jax.sharding.Mesh,
  state: State,
  key: jax.Array,
  images: jax.Array,
  labels: jax.Array,
  indices: jax.Array,
) -> State:
  """One training step for each row of `indices` `[K, B]`."""
  objective = losses.CrossEntropy(classifier)

  def loss(params: Any, x_adv: jax.Array, aim: losses.Aim) -> jax.Array:
    return jnp.mean(objective(x_adv, aim, *params))

  def step(
    state: State, examples: jax.Array, key: jax.Array, images: jax.Array, labels: jax.Array
  ) -> State:
    x, aim = pixels(images[examples]), losses.Aim(labels[examples])
    growth = jnp.minimum(1.0, (state.step + 1) / max(1.0, config.growth * config.num_steps))
    x_adv = attacks.pgd(
      objective,
      jax.random.fold_in(key, state.step),
      x,
      radius=config.radius * growth,
      num_steps=config.pgd_steps,
      args=(aim, *state.params),
      index=sharding.share_of_batch(len(examples)),
    )
    gradients = sharding.mean_over_devices(jax.grad(loss)(state.params, x_adv, aim))
    updates, opt_state = _optimizer(config).update(gradients, state.opt_state, state.params)
    return State(state.step + 1, optax.apply_updates(state.params, updates), opt_state)

  def on_device(state: State, indices: jax.Array, *rest: jax.Array) -> State:
    return jax.lax.fori_loop(
      0, len(indices), lambda i, state: step(state, indices[i], *rest), state
    )

  parallel = sharding.per_device(mesh, on_device, (None, 1, None, None, None))
  after: State = parallel(state, indices, key, images, labels)
  return after


if __name__ == '__main__':
  flags.define_flags(SupervisedConfig)
  app.run(main)
