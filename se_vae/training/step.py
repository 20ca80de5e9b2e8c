"""One training step: select x', evaluate the bound, follow its gradient (paper Sec. 2.1 and 6).

The randomness of step s is a function of (key, s): a run that is interrupted and resumed is the run
that was never interrupted. A `TrainConfig` is a pytree. Its numbers that a user varies, such as
`gamma` and `learning_rate`, are leaves, so that a sweep over them compiles one program; every other
setting is part of the tree's structure and changes the program.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from se_vae import attacks, gaussians, objectives, wasserstein
from se_vae.config import ArgumentError, TrainConfig
from se_vae.gaussians import Gaussian
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding

Metrics = dict[str, jax.Array]

# A warm start keeps one byte a pixel: 47 MB for MNIST.
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


class TrainState(NamedTuple):
  """Everything that a training step changes.

  Attributes:
    step: int32, the number of steps done.
    params: the model's parameters.
    opt_state: the optimiser's state.
    offsets: int8 `[N, P]`, with a warm start: the last x' - x of every training example, in 127ths
      of the radius. None without.
  """

  step: jax.Array
  params: Params
  opt_state: Any
  offsets: jax.Array | None = None


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
  optimizer: optax.GradientTransformation | None = None,
) -> TrainState:
  """Returns the state at step 0, with fresh parameters and a fresh optimiser state.

  Args:
    model: the model.
    config: the settings.
    key: one PRNG key.
    num_examples: N, the size of the training set, which a warm start needs.
    optimizer: in place of the one that `config` names.

  Raises:
    ArgumentError: for a warm start without `num_examples`.
  """
  offsets = None
  if config.warm_start:
    if num_examples is None:
      raise ArgumentError('num_examples', 'is needed for a warm start')
    shape = (num_examples, math.prod(model.image_shape))
    offsets_key = jax.random.fold_in(key, 1)
    offsets = jax.random.randint(offsets_key, shape, -_OFFSET_STEPS, _OFFSET_STEPS + 1, jnp.int8)
  params = model.init(key)
  opt_state = (optimizer or make_optimizer(config)).init(params)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, offsets)


@dataclasses.dataclass(frozen=True)
class EncodingShift:
  """Squared W2 distance between a fixed encoding and that of x', which the selection maximises.

  This is the objective of the paper's selection mechanism (Sec. 2.1).

  Attributes:
    model: the model whose encoder is used.
  """

  model: VAE

  def __call__(self, x_adv: jax.Array, params: Params, q_a: Gaussian) -> jax.Array:
    """Returns the distances `[B]`, in squared latent units.

    Args:
      x_adv: images x' `[B, H, W, C]`.
      params: the model's parameters, which may be of a lower precision than the rest.
      q_a: the fixed encodings, with means `[B, D]`.
    """
    x_adv = x_adv.astype(jax.tree.leaves(params)[0].dtype)
    q_b = self.model.encode(params, x_adv)
    return wasserstein.squared_w2(q_a, _cast(q_b, q_a.mean.dtype))


def _cast(tree: Any, dtype: Any) -> Any:
  return jax.tree.map(lambda leaf: leaf.astype(dtype), tree)


def select(
  model: VAE,
  config: TrainConfig,
  params: Params,
  key: jax.Array,
  x: jax.Array,
  q_a: Gaussian,
  *,
  index: jax.Array | None = None,
  start: jax.Array | None = None,
) -> jax.Array:
  """Returns the images x' near x whose encodings are furthest from q_a (Sec. 2.1).

  No gradient flows through the selection: x' is data (Sec. 2).

  Example:
    >>> from se_vae import make_vae
    >>> model, x = make_vae((2, 2, 1), latent_dim=3, num_layers=1), jnp.full((5, 2, 2, 1), 0.5)
    >>> params, config = model.init(jax.random.key(0)), TrainConfig(radius=0.1)
    >>> x_adv = select(model, config, params, jax.random.key(1), x, model.encode(params, x))
    >>> print(jnp.abs(x_adv - x).max().round(3))
    0.1

  Args:
    model: the model.
    config: the settings.
    params: the model's parameters.
    key: one PRNG key.
    x: images `[B, H, W, C]` in [0, 1].
    q_a: the encodings of x, with means `[B, D]`.
    index: `[B]` integers that identify the examples, for their random starts; `arange(B)` if None.
    start: images `[B, H, W, C]` to start from, in place of random ones.

  Returns:
    x' `[B, H, W, C]` in [0, 1], within `config.radius` of x in the linf norm.
  """
  params, q_a = jax.lax.stop_gradient((params, q_a))
  if config.attack_dtype == 'bfloat16':
    params = _cast(params, jnp.bfloat16)
  x_adv = attacks.pgd(
    EncodingShift(model),
    key,
    x,
    radius=config.radius,
    num_steps=config.pgd_steps,
    relative_step_size=config.relative_step_size,
    start=start,
    args=(params, q_a),
    index=index,
  )
  return jax.lax.stop_gradient(x_adv)


def loss(
  model: VAE,
  config: TrainConfig,
  params: Params,
  key: jax.Array,
  x: jax.Array,
  x_adv: jax.Array | None = None,
  *,
  index: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """Returns minus the batch mean of the bound, in nats, and the batch mean of each of its terms.

  The loss of a beta-VAE, with beta the `kl_weight`, adds (beta - 1) times the mean KL divergence.

  Args:
    model: the model.
    config: the settings, among them the bound.
    params: the model's parameters.
    key: one PRNG key, for the latent noise.
    x: images `[B, H, W, C]` in [0, 1].
    x_adv: for the SE-ELBO the selected x' of each image. For the ELBO what the encoder sees in
      place of x; x itself if None.
    index: `[B]`, the place of each image in the whole batch, of which x may be a part; `arange(B)`
      if None. Each image draws its noise with a key of its own, however the batch is split.

  Returns:
    The loss, a scalar, and the metrics, scalars by name.
  """
  index = jnp.arange(x.shape[0], dtype=jnp.int32) if index is None else index
  if config.freeze_decoder:
    params = {**params, 'decoder': jax.lax.stop_gradient(params['decoder'])}
  seen = x_adv if config.objective == 'vae' and x_adv is not None else x
  q_a = model.encode(params, seen)
  z_a = gaussians.sample_each(q_a, attacks.example_keys(key, index))
  x_mean = model.decode(params, z_a)
  terms: NamedTuple
  if config.objective == 'vae':
    terms = objectives.elbo(x, x_mean, q_a, obs_var=config.obs_var)
    extra = {}
  else:
    if x_adv is None:
      raise ArgumentError('x_adv', "is needed for objective 'se'")
    q_b = model.encode(params, x_adv)
    terms = objectives.se_elbo(x, x_mean, q_a, q_b, gamma=config.gamma, obs_var=config.obs_var)
    extra = {'squared_w2': jnp.mean(wasserstein.squared_w2(q_a, q_b))}
  metrics = {name: jnp.mean(values) for name, values in terms._asdict().items()} | extra
  metrics['squared_error'] = jnp.mean(objectives.squared_error(x, x_mean))
  value = -metrics['elbo']
  if config.objective == 'vae':
    value += (config.kl_weight - 1.0) * metrics['kl']
  return value, {'loss': value} | metrics


def train_step(
  model: VAE,
  config: TrainConfig,
  state: TrainState,
  key: jax.Array,
  x: jax.Array,
  *,
  examples: jax.Array | None = None,
  optimizer: optax.GradientTransformation | None = None,
  sharded: bool = False,
) -> tuple[TrainState, Metrics]:
  """Takes one step of gradient ascent on the bound.

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
    x: images `[B, H, W, C]` in [0, 1].
    examples: `[B]`, the places of x in the training set, which a warm start needs.
    optimizer: in place of the one that `config` names; it then sets the learning rate too.
    sharded: whether x is one device's share of the batch, within `sharding.per_device`.

  Returns:
    The state after the step, and scalars that are averages over the batch.
  """
  sample_key, select_key = jax.random.split(jax.random.fold_in(key, state.step))
  index = sharding.share_of_batch(len(x)) if sharded else jnp.arange(len(x), dtype=jnp.int32)
  offsets = state.offsets
  if config.objective == 'vae':
    # The program is the same with and without noise, and draws none where there is none.
    x_adv = jax.lax.cond(
      config.encoder_noise > 0.0,
      lambda: attacks.noise(select_key, x, radius=config.encoder_noise, index=index),
      lambda: x,
    )
  else:
    start = None
    if offsets is not None:
      if examples is None:
        raise ArgumentError('examples', 'is needed for a warm start')
      start = _warm_start(config, offsets[examples], x)
    q_a = model.encode(state.params, x)
    x_adv = select(model, config, state.params, select_key, x, q_a, index=index, start=start)
    if offsets is not None and examples is not None:
      rows = _offset_rows(config, x, x_adv)
      if sharded:
        examples, rows = sharding.gather_over_devices(examples), sharding.gather_over_devices(rows)
      offsets = offsets.at[examples].set(rows)
  gradients, metrics = jax.grad(loss, argnums=2, has_aux=True)(
    model, config, state.params, sample_key, x, x_adv, index=index
  )
  if sharded:
    gradients, metrics = sharding.mean_over_devices((gradients, metrics))
  optimizer = make_optimizer(config) if optimizer is None else optimizer
  params, opt_state = apply_gradients(optimizer, gradients, state.opt_state, state.params)
  if config.freeze_decoder:  # an optimiser may update even where the gradient is zero
    params = {**params, 'decoder': state.params['decoder']}
  metrics['gradient_norm'] = optax.tree.norm(gradients)
  return TrainState(state.step + 1, params, opt_state, offsets), metrics


def apply_gradients(
  optimizer: optax.GradientTransformation, gradients: Params, opt_state: Any, params: Params
) -> tuple[Params, Any]:
  """Returns the parameters and the optimiser's state after a step, computed in their dtype."""
  # Where a user has set x64, optax would compute the powers of Adam in float64.
  is_wide = any(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(params))
  with jax.enable_x64(is_wide):
    updates, opt_state = optimizer.update(gradients, opt_state, params)
  return optax.apply_updates(params, updates), opt_state


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
      sharded=True,
    )
