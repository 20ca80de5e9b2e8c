"""One training step: select x', evaluate the bound, follow its gradient (paper Sec. 2.1 and 6).

The randomness of step s is a function of (key, s): a run that is interrupted and resumed is the run
that was never interrupted. A `TrainConfig` is a pytree. Its numbers that a user varies, such as
`gamma` and `learning_rate`, are leaves, so that a sweep over them compiles one program; every other
setting is part of the tree's structure and changes the program.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from se_vae import attacks
from se_vae.config import ArgumentError, TrainConfig
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding
from se_vae.training import losses, selection

Metrics = dict[str, jax.Array]

# Offsets are int8, in units of radius / 127: a byte for each pixel, 47 MB for MNIST.
_OFFSET_STEPS = 127

_FIELDS = dataclasses.fields(TrainConfig)
_TRACED = tuple(field.name for field in _FIELDS if field.metadata['traced'])
_STATIC = tuple(field.name for field in _FIELDS if not field.metadata['traced'])


def _flatten(config: TrainConfig) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
  """Returns the leaves and the structure of a configuration."""
  return tuple(getattr(config, n) for n in _TRACED), tuple(getattr(config, n) for n in _STATIC)


def _unflatten(static: tuple[Any, ...], traced: tuple[Any, ...]) -> TrainConfig:
  """Inverts `_flatten`; the values have been validated, and may be tracers now."""
  config = object.__new__(TrainConfig)
  names = (*_TRACED, *_STATIC)
  vars(config).update(zip(names, (*traced, *static), strict=True))
  return config


jax.tree_util.register_pytree_node(TrainConfig, _flatten, _unflatten)


def differing_programs(configs: Sequence[TrainConfig]) -> list[str]:
  """Returns the names of the settings by which these configurations need different programs.

  Example:
    >>> differing_programs([TrainConfig(gamma=1.0), TrainConfig(gamma=3.0, pgd_steps=5)])
    ['pgd_steps']

  Args:
    configs: the configurations. Numbers that a compiled step takes may differ; a traced setting
      that is None in one alone may not.
  """

  def form(config: TrainConfig, name: str) -> Any:
    value = getattr(config, name)
    return value is None if name in _TRACED else value

  names = [field.name for field in _FIELDS]
  return [name for name in names if len({form(config, name) for config in configs}) > 1]


def at_step(config: TrainConfig, step: jax.Array, dtype: Any = jnp.float32) -> TrainConfig:
  """Returns the settings of one step: during the ramp, a part of `gamma` and of the radii.

  Example:
    >>> config = at_step(TrainConfig(gamma=10.0, ramp=0.5, num_steps=100), jnp.array(9))
    >>> print(f'{config.gamma:.3f} {config.radius:.3f}')
    2.000 0.040

  Args:
    config: the settings of the run.
    step: the number of steps done.
    dtype: of these numbers.
  """
  number = (step + 1).astype(dtype)
  length = jnp.asarray(config.ramp * config.num_steps, dtype)
  share = jnp.minimum(number / jnp.maximum(length, 1.0), 1.0)
  leaves, static = _flatten(config)
  values = dict(zip(_TRACED, leaves, strict=True))
  for name in ('gamma', 'radius', 'certified_radius'):
    values[name] = None if values[name] is None else values[name] * share
  return _unflatten(static, tuple(values.values()))


class TrainState(NamedTuple):
  """Everything that a training step changes.

  Attributes:
    step: int32, the number of steps done.
    params: the model's parameters.
    opt_state: the optimiser's state.
    offsets: int8 `[N, P]`, with a warm start: the last x' - x of every training example, in 127ths
      of the radius. None without.
    targets: int32 `[N]`, for objective 'clusters': the cluster of every training example. None
      otherwise.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  offsets: jax.Array | None = None
  targets: jax.Array | None = None


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """Returns the optax transformation that `config` names.

  A cosine schedule takes the learning rate from its peak at step 0 to zero at `config.num_steps`.
  """
  rate: Any = config.learning_rate
  if config.schedule == 'cosine':

    def rate(count: jax.Array) -> jax.Array:
      done = jnp.minimum(count, config.num_steps) / config.num_steps
      return config.learning_rate * 0.5 * (1.0 + jnp.cos(jnp.pi * done))

  if config.optimizer == 'sgd':
    return optax.sgd(rate, momentum=config.momentum)
  return optax.adam(rate)


def init_state(
  model: VAE,
  config: TrainConfig,
  key: jax.Array,
  *,
  num_examples: int | None = None,
  params: Params | None = None,
  optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
  """Returns the state at step 0, with a fresh optimiser state.

  Args:
    model: the model.
    config: the settings.
    key: one PRNG key.
    num_examples: N, the size of the training set, which a warm start needs. With it the state has a
      place for the clusters of objective 'clusters', which `add_targets` finds.
    params: parameters to start with; fresh ones if None.
    optimizer: in place of the one that `config` names.

  Raises:
    ArgumentError: for a warm start without `num_examples`.
  """
  offsets = None
  if config.warm_start:
    if num_examples is None:
      raise ArgumentError('num_examples', 'is needed for a warm start')
    shape = (num_examples, math.prod(model.image_shape))
    offsets_key = jax.random.fold_in(key, 2)  # `model.init` splits the key into those of 0 and 1
    offsets = jax.random.randint(offsets_key, shape, -_OFFSET_STEPS, _OFFSET_STEPS + 1, jnp.int8)
  params = model.init(key) if params is None else params
  opt_state = (optimizer or make_optimizer(config)).init(params)
  targets = None
  if config.objective == 'clusters' and num_examples is not None:
    targets = jnp.zeros(num_examples, jnp.int32)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, offsets, targets)


def loss(
  model: VAE,
  config: TrainConfig,
  params: Params,
  key: jax.Array,
  x: jax.Array,
  x_adv: jax.Array | None = None,
  *,
  index: jax.Array | None = None,
  targets: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns the batch mean of the loss, in nats, and the batch mean of each of its terms.

  The loss is minus the bound, plus the penalty that the objective has.

  Args:
    model: the model.
    config: the settings, among them the objective.
    params: the model's parameters.
    key: one PRNG key, for the latent noise.
    x: images `[B, H, W, C]` in [0, 1].
    x_adv: the selected x' of each image; for objective 'vae' what the encoder sees; x if None.
    index: `[B]`, the place of each image in the whole batch, of which x may be a part; `arange(B)`
      if None. Each image draws its noise with a key of its own, however the batch is split.
    targets: `[B]`, the cluster of each image, for objective 'clusters' alone.

  Returns:
    The loss, a scalar, and the metrics, scalars by name.

  Raises:
    TypeError, AssertionError: if a user's objective does not return terms `[B]` by name.
  """
  index = jnp.arange(x.shape[0], dtype=jnp.int32) if index is None else index
  if config.freeze_decoder:
    params = {**params, 'decoder': jax.lax.stop_gradient(params['decoder'])}
  keys = attacks.example_keys(key, index)
  extra = {} if targets is None else {'targets': targets}
  x_adv = x if x_adv is None else x_adv
  terms = losses.entry(config).terms(model, params, keys, x, x_adv, **extra)
  metrics = losses.mean_terms(terms, len(x))
  return metrics['loss'], metrics


def train_step(
  model: VAE,
  config: TrainConfig,
  state: TrainState,
  key: jax.Array,
  x: jax.Array,
  *,
  examples: jax.Array | None = None,
  optimizer: optax.GradientTransformation | None = None,
) -> tuple[TrainState, Metrics]:
  """Takes one step: selects x', and follows the gradient of the loss.

  Example:
    >>> from se_vae import make_vae
    >>> model, x = make_vae((2, 2, 1), latent_dim=3, num_layers=1), jnp.full((5, 2, 2, 1), 0.5)
    >>> config = TrainConfig(pgd_steps=2)
    >>> state = init_state(model, config, jax.random.key(0))
    >>> step = jax.jit(train_step, static_argnames='model')
    >>> state, metrics = step(model, config, state, jax.random.key(1), x)
    >>> print(state.step, sorted(metrics)[:2])
    1 ['elbo', 'gradient_norm']

  Args:
    model: the model.
    config: the settings.
    state: the state before the step.
    key: the run's PRNG key; the step's own is folded in from `state.step`.
    x: images `[B, H, W, C]` in [0, 1]; within `sharding.per_device` this device's share of them.
    examples: `[B]`, the places of x in the training set, which a warm start and objective
      'clusters' need.
    optimizer: in place of the one that `config` names; it then sets the learning rate too.

  Returns:
    The state after the step, and scalars that are averages over the batch.
  """
  sample_key, select_key = jax.random.split(jax.random.fold_in(key, state.step))
  index = sharding.positions(len(x))
  config = at_step(config, state.step, x.dtype)
  offsets = state.offsets
  start = None
  if offsets is not None:
    if examples is None:
      raise ArgumentError('examples', 'is needed for a warm start')
    start = _warm_start(config, offsets[examples], x)
  targets = None
  if config.objective == 'clusters':
    if state.targets is None or examples is None:
      raise ArgumentError(('targets', 'examples'), "are needed for objective 'clusters'")
    targets = state.targets[examples]
  batch = selection.Batch(model, config, state.params, select_key, x, index, start, targets)
  x_adv = losses.entry(config).select(batch)
  if offsets is not None:
    rows = sharding.whole_batch((examples, _offset_rows(config, x, x_adv)))
    offsets = offsets.at[rows[0]].set(rows[1])
  gradients, metrics = jax.grad(loss, argnums=2, has_aux=True)(
    model, config, state.params, sample_key, x, x_adv, index=index, targets=targets
  )
  gradients, metrics = sharding.mean_over_devices((gradients, metrics))
  if optimizer is None:
    # Where a user has set x64, `jit` makes Python's numbers 64 bits wide.
    narrow = config if _is_wide(state.params) else jax.tree.map(_in_32_bits, config)
    optimizer = make_optimizer(narrow)
  params, opt_state = apply_gradients(optimizer, gradients, state.opt_state, state.params)
  if config.freeze_decoder:  # an optimiser may update even where the gradient is zero
    params = {**params, 'decoder': state.params['decoder']}
  metrics['gradient_norm'] = optax.tree.norm(gradients)
  return TrainState(state.step + 1, params, opt_state, offsets, state.targets), metrics


def apply_gradients(
  optimizer: optax.GradientTransformation, gradients: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
  """Returns the parameters and the optimiser's state after a step, computed in their dtype."""
  # Where a user has set x64, optax would compute the powers of Adam in float64.
  with jax.enable_x64(_is_wide(params)):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


def _is_wide(params: Params) -> bool:
  return any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))


def _in_32_bits(number: Any) -> Any:
  narrow = {'float64': jnp.float32, 'int64': jnp.int32}
  dtype = getattr(number, 'dtype', None)
  return number if str(dtype) not in narrow else number.astype(narrow[str(dtype)])


def _warm_start(config: TrainConfig, rows: jax.Array, x: jax.Array) -> jax.Array:
  """Returns x plus the offsets that are stored as rows `[B, P]`."""
  return x + (config.radius / _OFFSET_STEPS) * rows.reshape(x.shape).astype(x.dtype)


def _offset_rows(config: TrainConfig, x: jax.Array, x_adv: jax.Array) -> jax.Array:
  """Returns x' - x as it is stored, `[B, P]`."""
  rounded = jnp.round((x_adv - x) * (_OFFSET_STEPS / config.radius))
  return rounded.astype(jnp.int8).reshape(len(x), -1)


@dataclasses.dataclass(frozen=True)
class TrainStep:
  """`train_step` on one device's share of a batch, as `training.run` takes it.

  Equal ones share compiled programs.

  Attributes:
    model: the model.
    optimizer: in place of the one that the settings name.
  """

  model: VAE
  optimizer: optax.GradientTransformation | None = None

  def __call__(
    self,
    state: TrainState,
    args: tuple[TrainConfig, jax.Array],
    x: jax.Array,
    examples: jax.Array,
  ) -> tuple[TrainState, Metrics]:
    """Returns the state after the step and its metrics.

    Args:
      state: the state before the step.
      args: the settings and the run's key.
      x: this device's images `[B, H, W, C]` in [0, 1].
      examples: `[B]`, their places in the training set.
    """
    config, key = args
    return train_step(
      self.model,
      config,
      state,
      key,
      x,
      examples=examples,
      optimizer=self.optimizer,
    )
