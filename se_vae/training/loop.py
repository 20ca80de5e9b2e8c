"""Training: select x', evaluate the bound, follow its gradient (paper Sec. 2.1 and 6).

The state is a pytree, every choice is in a frozen `TrainConfig`, and the randomness of step s is a
function of (key, s): a run that is interrupted and resumed is the run that was never interrupted.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from se_vae import attacks, data, gaussians, objectives, wasserstein
from se_vae.config import ATTACK_DTYPES, OBJECTIVES, OPTIMIZERS, SCHEDULES
from se_vae.data.transforms import pixels
from se_vae.gaussians import Gaussian
from se_vae.models.vae import VAE, Params
from se_vae.parallel import processes, sharding
from se_vae.training import input_pipeline

Metrics = dict[str, jax.Array]

# A warm start keeps one byte a pixel: 47 MB for MNIST.
_OFFSET_STEPS = 127


@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """What a training step does. Static under jit: another value compiles another program.

  Example:
    >>> TrainConfig(objective='beta')
    Traceback (most recent call last):
    ValueError: objective must be one of vae, se, got 'beta'

  Attributes:
    objective: 'vae' (the ELBO) or 'se' (the SE-ELBO with PGD selection).
    gamma: coupling strength of the SE-ELBO, >= 0.
    obs_var: observation noise variance v, > 0.
    radius: linf radius of the selection, >= 0, in pixel units of [0, 1].
    pgd_steps: gradient steps L of the selection.
    pgd_step_size: their length; None for `attacks.pgd`'s rule.
    warm_start: start each example's selection where its last one ended, an epoch ago, instead of
      at random, for fewer gradient steps. Not the paper's.
    attack_dtype: 'float32', or 'bfloat16' for the encodings within the selection: faster on
      accelerators that multiply it faster. Not the paper's.
    optimizer: 'adam', or 'sgd' with momentum.
    momentum: of 'sgd'.
    learning_rate: the optimiser's, at its peak.
    schedule: 'constant', or 'cosine' to zero at num_steps.
    num_steps: length of the schedule.
    freeze_decoder: train the encoder alone.
    kl_weight: beta, the weight of the KL term of 'vae': a beta-VAE. Not the paper's.
    encoder_noise: half-width of the uniform noise on the pixels that the encoder of 'vae' sees,
      while the decoder is to give the clean ones. Not the paper's.
  """

  objective: str = 'se'
  gamma: float = 1.0
  obs_var: float = 0.1
  radius: float = 0.2
  pgd_steps: int = 20
  pgd_step_size: float | None = None
  warm_start: bool = False
  attack_dtype: str = 'float32'
  optimizer: str = 'adam'
  momentum: float = 0.9
  learning_rate: float = 1e-3
  schedule: str = 'cosine'
  num_steps: int = 10_000
  freeze_decoder: bool = False
  kl_weight: float = 1.0
  encoder_noise: float = 0.0

  def __post_init__(self) -> None:
    for name, allowed in (
      ('objective', OBJECTIVES),
      ('optimizer', OPTIMIZERS),
      ('schedule', SCHEDULES),
      ('attack_dtype', ATTACK_DTYPES),
    ):
      if getattr(self, name) not in allowed:
        raise ValueError(f'{name} must be one of {", ".join(allowed)}, got {getattr(self, name)!r}')
    if self.warm_start and not (self.objective == 'se' and self.radius > 0.0):
      raise ValueError("warm_start needs objective 'se' and a radius > 0")
    if self.objective != 'vae' and (self.kl_weight != 1.0 or self.encoder_noise > 0.0):
      raise ValueError("kl_weight and encoder_noise need objective 'vae'")


class TrainState(NamedTuple):
  """Everything that a step changes."""

  step: jax.Array  # int32, the number of steps done
  params: Params
  opt_state: Any
  # int8 [N, P], with a warm start: the last x' - x of every example, in 127ths of the radius.
  offsets: jax.Array | None = None


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
  """The optax transformation that `config` names."""
  rate: Any = config.learning_rate
  if config.schedule == 'cosine':
    rate = optax.cosine_decay_schedule(config.learning_rate, config.num_steps)
  if config.optimizer == 'sgd':
    return optax.sgd(rate, momentum=config.momentum)
  return optax.adam(rate)


def init_state(
  model: VAE, config: TrainConfig, key: jax.Array, num_examples: int | None = None
) -> TrainState:
  """Step 0: fresh parameters and optimiser state.

  Args:
    model: the model.
    config: the settings.
    key: one PRNG key.
    num_examples: N, of the training set; a warm start needs to know it.
  """
  offsets = None
  if config.warm_start:
    if num_examples is None:
      raise ValueError('a warm start needs num_examples')
    shape = (num_examples, math.prod(model.image_shape))
    offsets_key = jax.random.fold_in(key, 1)
    offsets = jax.random.randint(offsets_key, shape, -_OFFSET_STEPS, _OFFSET_STEPS + 1, jnp.int8)
  params = model.init(key)
  opt_state = make_optimizer(config).init(params)
  return TrainState(jnp.zeros((), jnp.int32), params, opt_state, offsets)


@dataclasses.dataclass(frozen=True)
class LatentMove:
  """Squared W2 between a fixed encoding and that of x': what the selection maximises (Sec. 2.1)."""

  model: VAE

  def __call__(self, x_adv: jax.Array, params: Params, q_a: Gaussian) -> jax.Array:
    """Squared latent units, `[B]`; params may be of a lower precision than the rest."""
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
  index: jax.Array | None = None,
  start: jax.Array | None = None,
) -> jax.Array:
  """The selection mechanism: x' `[B, H, W, C]` near x whose encoding is furthest from q_a.

  Example:
    >>> from se_vae import make_vae
    >>> model, x = make_vae((2, 2, 1), latent_dim=3, num_layers=1), jnp.full((5, 2, 2, 1), 0.5)
    >>> params, config = model.init(jax.random.key(0)), TrainConfig(radius=0.1)
    >>> x_adv = select(model, config, params, jax.random.key(1), x, model.encode(params, x))
    >>> print(jnp.abs(x_adv - x).max().round(3))
    0.1

  No gradient flows through it: x' is data (Sec. 2). `index` and `start` as for `attacks.pgd`.
  """
  params, q_a = jax.lax.stop_gradient((params, q_a))
  if config.attack_dtype == 'bfloat16':
    params = _cast(params, jnp.bfloat16)
  x_adv = attacks.pgd(
    LatentMove(model),
    key,
    x,
    radius=config.radius,
    num_steps=config.pgd_steps,
    step_size=config.pgd_step_size,
    start=start,
    args=(params, q_a),
    index=index,
  )
  return jax.lax.stop_gradient(x_adv)


def loss(
  params: Params,
  model: VAE,
  config: TrainConfig,
  key: jax.Array,
  x: jax.Array,
  x_adv: jax.Array | None = None,
  index: jax.Array | None = None,
) -> tuple[jax.Array, Metrics]:
  """Minus the batch mean of the bound, in nats, and the mean of every term of it.

  With a KL weight beta: of the ELBO less (beta - 1) times the KL divergence.

  Args:
    params: the model's parameters.
    model: the model.
    config: which bound, with its settings.
    key: one key, for the latent noise.
    x: images `[B, H, W, C]` in [0, 1].
    x_adv: the selected x' of each, for the SE-ELBO; with `encoder_noise` what the encoder sees
      instead of x.
    index: `[B]`, the place of each in the whole batch, of which x may be a part; `arange(B)` if
      None. Each draws with a key of its own, whatever the parts.
  """
  index = jnp.arange(x.shape[0]) if index is None else index
  if config.freeze_decoder:  # its gradient is zero, and so is every update
    params = {**params, 'decoder': jax.lax.stop_gradient(params['decoder'])}
  seen = x if config.encoder_noise == 0.0 else x_adv
  assert seen is not None
  q_a = model.encode(params, seen)
  z_a = gaussians.sample_each(q_a, attacks.example_keys(key, index))
  x_mean = model.decode(params, z_a)
  terms: NamedTuple
  if config.objective == 'vae':
    terms = objectives.elbo(x, x_mean, q_a, obs_var=config.obs_var)
    extra = {}
  else:
    assert x_adv is not None
    q_b = model.encode(params, x_adv)
    terms = objectives.se_elbo(x, x_mean, q_a, q_b, gamma=config.gamma, obs_var=config.obs_var)
    extra = {'squared_w2': jnp.mean(wasserstein.squared_w2(q_a, q_b))}
  metrics = {name: jnp.mean(values) for name, values in terms._asdict().items()} | extra
  metrics['squared_error'] = jnp.mean(objectives.squared_error(x, x_mean))
  value = -metrics['elbo']
  if config.kl_weight != 1.0:
    value += (config.kl_weight - 1.0) * metrics['kl']
  return value, {'loss': value} | metrics


class Parts(NamedTuple):
  """How the parts of a batch that is split over devices come together.

  Attributes:
    mean: averages a tree of per-part means.
    gather: stacks the rows of all parts.
  """

  mean: Callable[[Any], Any]
  gather: Callable[[jax.Array], jax.Array]


WHOLE = Parts(mean=lambda tree: tree, gather=lambda rows: rows)


def train_step(
  model: VAE,
  config: TrainConfig,
  state: TrainState,
  key: jax.Array,
  x: jax.Array,
  examples: jax.Array | None = None,
  index: jax.Array | None = None,
  parts: Parts = WHOLE,
) -> tuple[TrainState, Metrics]:
  """One step of gradient ascent on the bound.

  Example:
    >>> from se_vae import make_vae
    >>> model, x = make_vae((2, 2, 1), latent_dim=3, num_layers=1), jnp.full((5, 2, 2, 1), 0.5)
    >>> config = TrainConfig(pgd_steps=2)
    >>> state = init_state(model, config, jax.random.key(0))
    >>> step = jax.jit(train_step, static_argnums=(0, 1))
    >>> state, metrics = step(model, config, state, jax.random.key(1), x)
    >>> print(state.step, sorted(metrics)[:2])
    1 ['elbo', 'gradient_norm']

  Args:
    model: the model.
    config: the settings.
    state: before the step.
    key: the run's key; the step's own is folded in from `state.step`.
    x: images `[B, H, W, C]` in [0, 1].
    examples: `[B]`, where they stand in the training set; a warm start needs to know it.
    index: as for `loss`.
    parts: of the batch, where x is one of several.

  Returns:
    The state after the step, and scalars averaged over the batch.
  """
  sample_key, select_key = jax.random.split(jax.random.fold_in(key, state.step))
  x_adv, offsets = None, state.offsets
  if config.objective == 'se':
    start = None
    if offsets is not None:
      assert examples is not None
      start = x + (config.radius / _OFFSET_STEPS) * offsets[examples].reshape(x.shape)
    q_a = model.encode(state.params, x)
    x_adv = select(model, config, state.params, select_key, x, q_a, index, start)
    if offsets is not None:
      assert examples is not None
      moved = jnp.round((x_adv - x) * (_OFFSET_STEPS / config.radius)).astype(jnp.int8)
      offsets = offsets.at[parts.gather(examples)].set(parts.gather(moved.reshape(len(x), -1)))
  elif config.encoder_noise > 0.0:
    x_adv = attacks.noise(select_key, x, radius=config.encoder_noise, index=index)
  gradients, metrics = parts.mean(
    jax.grad(loss, has_aux=True)(state.params, model, config, sample_key, x, x_adv, index)
  )
  updates, opt_state = make_optimizer(config).update(gradients, state.opt_state, state.params)
  params = optax.apply_updates(state.params, updates)
  metrics['gradient_norm'] = optax.tree.norm(gradients)
  return TrainState(state.step + 1, params, opt_state, offsets), metrics


class Window(NamedTuple):
  """What has come in since the last row of metrics; a part of every checkpoint.

  Attributes:
    num_steps: int32, the window's steps so far.
    sums: each metric, summed over them.
    bad_step: int32, the first step with a metric that is not finite; -1 if there is none.
    bad_metrics: the metrics of that step.
  """

  num_steps: jax.Array
  sums: Metrics
  bad_step: jax.Array
  bad_metrics: Metrics


def empty_window(model: VAE, config: TrainConfig, state: TrainState) -> Window:
  """The window before its first step."""
  x = jax.ShapeDtypeStruct((1, *model.image_shape), jnp.float32)
  step = functools.partial(train_step, model, config)
  shapes = jax.eval_shape(step, state, jax.random.key(0), x, jnp.zeros(1, jnp.int32))[1]
  zeros = {name: jnp.zeros(leaf.shape, leaf.dtype) for name, leaf in shapes.items()}
  return Window(jnp.zeros((), jnp.int32), zeros, jnp.full((), -1, jnp.int32), zeros)


_DEVICES = Parts(mean=sharding.mean_over_devices, gather=sharding.gather_over_devices)


@functools.partial(jax.jit, static_argnames=('model', 'config', 'mesh'), donate_argnames='carry')
def train_steps(
  model: VAE,
  config: TrainConfig,
  mesh: Mesh,
  carry: tuple[TrainState, Window],
  key: jax.Array,
  images: jax.Array,
  indices: jax.Array,
  first: jax.Array,
  count: jax.Array,
) -> tuple[TrainState, Window]:
  """`count` training steps in one dispatch.

  Args:
    model: the model.
    config: the settings.
    mesh: the devices.
    carry: state and window, replicated; donated.
    key: the run's key, replicated.
    images: uint8, the pool that each device takes its examples from: the whole training set
      `[N, H, W, C]`, replicated, or `[K, B, H, W, C]`, split along the batch.
    indices: `[K, B]`, where each step's examples are in their pool, split along the batch.
    first: the row of `indices` to begin with, traced.
    count: how many steps, traced: dispatches of any length share one compilation.

  Returns:
    The new state and window.
  """

  def on_device(
    carry: tuple[TrainState, Window],
    key: jax.Array,
    pool: jax.Array,
    indices: jax.Array,
    first: jax.Array,
    count: jax.Array,
  ) -> tuple[TrainState, Window]:
    index = sharding.share_of_batch(indices.shape[1])
    shape = pool.shape[-3:]
    rows = pool.reshape(-1, math.prod(shape))  # a gather is vectorised along the last axis

    def step(i: jax.Array, carry: tuple[TrainState, Window]) -> tuple[TrainState, Window]:
      state, window = carry
      x = pixels(rows[indices[i]]).reshape(len(index), *shape)
      after, metrics = train_step(model, config, state, key, x, indices[i], index, _DEVICES)
      return after, _add_to_window(window, state.step, metrics)

    return jax.lax.fori_loop(first, first + count, step, carry)

  pool_axis = None if images.ndim == 4 else 1
  parallel = sharding.per_device(mesh, on_device, (None, None, pool_axis, 1, None, None))
  return parallel(carry, key, images, indices, first, count)


def _add_to_window(window: Window, step: jax.Array, metrics: Metrics) -> Window:
  finite = jnp.all(jnp.isfinite(jnp.stack(jax.tree.leaves(metrics))))
  is_first_bad = ~finite & (window.bad_step < 0)

  def keep(new: jax.Array, old: jax.Array) -> jax.Array:
    return jnp.where(is_first_bad, new, old)

  return Window(
    window.num_steps + 1,
    jax.tree.map(jnp.add, window.sums, metrics),
    keep(step, window.bad_step),
    {name: keep(value, window.bad_metrics[name]) for name, value in metrics.items()},
  )


class NotFiniteError(FloatingPointError):
  """A training step gave a NaN or an infinity; the state before the window is still good.

  Attributes:
    step: the step.
    metrics: its metrics.
    examples: `[B]`, the training examples of its batch.
  """

  def __init__(self, step: int, metrics: dict[str, float], examples: np.ndarray) -> None:
    bad = ', '.join(f'{name} {value}' for name, value in metrics.items() if not np.isfinite(value))
    super().__init__(f'step {step} is not finite: {bad}')
    self.step = step
    self.metrics = metrics
    self.examples = examples


class Progress(NamedTuple):
  """Where a run stands after a dispatch.

  Attributes:
    state: valid until the next dispatch.
    window: likewise.
    row: metrics averaged over the window that this dispatch completed; None within a window.
  """

  state: TrainState
  window: Window
  row: dict[str, float] | None


def run(
  model: VAE,
  config: TrainConfig,
  state: TrainState,
  key: jax.Array,
  images: np.ndarray,
  indices_for: input_pipeline.IndicesFor,
  *,
  steps_per_row: int,
  mesh: Mesh,
  window: Window | None = None,
  seconds_per_dispatch: float = 1.0,
  streamed: bool = False,
) -> Iterator[Progress]:
  """Trains from `state` to `config.num_steps`, and comes back about once a second.

  How the steps fall into dispatches changes neither the state nor the rows: windows end at
  multiples of `steps_per_row` (and at the last step), and their sums are carried from one dispatch
  to the next, or through a checkpoint.

  Args:
    model: the model.
    config: the settings.
    state: where to start; donated.
    key: the run's key.
    images: the training set `[N, H, W, C]`, uint8.
    indices_for: (first step, number of steps) to example indices `[steps, B]`, as
      `data.batch_indices` gives.
    steps_per_row: steps that a row of metrics averages over.
    mesh: the devices, which must divide the batch size.
    window: the window that `state` was saved with, where that was within one; donated.
    seconds_per_dispatch: how long a dispatch should take, at most.
    streamed: leave the training set on the host, and read ahead what the next steps take. Changes
      neither the state nor the rows. Not for a warm start.

  Raises:
    NotFiniteError: after a dispatch in which a metric was not finite.
    ValueError: for a warm start whose training set is streamed.
  """
  if streamed and config.warm_start:
    raise ValueError('a warm start needs the training set on the devices')
  step, dispatch_steps = int(state.step), 1
  empty = jax.device_get(empty_window(model, config, state))
  carry = sharding.replicate_copy(mesh, (state, empty if window is None else window))
  key = sharding.replicate(mesh, key)
  feed_steps, feeds = steps_per_row, input_pipeline.resident
  if streamed:
    batch_size = indices_for(step, 1).shape[1]
    feed_steps, feeds = (
      input_pipeline.steps_a_pool(images, batch_size, steps_per_row),
      input_pipeline.streamed,
    )
  starts = range(step // feed_steps * feed_steps, config.num_steps, feed_steps)
  for feed in feeds(mesh, images, indices_for, starts):
    while step < min(feed.step + feed_steps, config.num_steps):
      end = min((step // steps_per_row + 1) * steps_per_row, config.num_steps)
      count = min(dispatch_steps, end - step, feed.step + feed_steps - step)
      began = time.monotonic()
      carry = train_steps(
        model,
        config,
        mesh,
        carry,
        key,
        feed.images,
        feed.places,
        np.int32(step - feed.step),
        np.int32(count),
      )
      bad_step = int(carry[1].bad_step)  # waits for the dispatch
      seconds = time.monotonic() - began
      step += count
      if bad_step >= 0:
        metrics = _to_floats(carry[1].bad_metrics)
        raise NotFiniteError(bad_step, metrics, feed.indices[bad_step - feed.step])
      row = None
      if step == end:
        steps = int(carry[1].num_steps)
        row = {name: total / steps for name, total in _to_floats(carry[1].sums).items()}
        carry = (carry[0], sharding.replicate_copy(mesh, empty))
      yield Progress(carry[0], carry[1], row)
      # At most twice the last one, as the first dispatch of a process includes its compilation.
      fitting = max(1, int(count * seconds_per_dispatch / seconds))
      fitting = min(max(fitting, dispatch_steps // 2), 2 * dispatch_steps)
      dispatch_steps = processes.largest(fitting)  # one clock for all processes


def fit(
  model: VAE,
  config: TrainConfig,
  images: np.ndarray,
  *,
  params: Params | None = None,
  seed: int = 0,
  batch_size: int = 64,
  steps_per_row: int = 100,
  mesh: Mesh | None = None,
) -> tuple[Params, list[dict[str, float]]]:
  """Trains in memory: `run` for a notebook.

  Gives the parameters that `experiments.pretrain` gives with the same settings and devices.

  Example:
    >>> from se_vae import make_vae
    >>> images = np.zeros((8, 2, 2, 1), np.uint8)
    >>> model = make_vae((2, 2, 1), latent_dim=3, hidden_units=4, num_layers=1)
    >>> params, rows = fit(model, TrainConfig(num_steps=5), images, batch_size=4, steps_per_row=2)
    >>> [row['step'] for row in rows]
    [2, 4, 5]

  Args:
    model: the model.
    config: the settings.
    images: the training set `[N, H, W, C]`, uint8.
    params: parameters to start with, as of a VAE whose encoder is to become smoother; fresh ones if
      None.
    seed: of the initialisation, the order of the batches and the noise.
    batch_size: examples a step, at most N.
    steps_per_row: steps that a row of metrics averages over.
    mesh: the devices, which must divide the batch size; the first one if None.

  Returns:
    The parameters, and a row of metrics for every `steps_per_row` steps, each with its last step.

  Raises:
    NotFiniteError: where a metric is not finite.
    TypeError: for images that are not uint8.
    ValueError: for a frozen decoder without `params`: it would stay as it was drawn.
  """
  if config.freeze_decoder and params is None:
    raise ValueError('freeze_decoder needs params, whose decoder is kept')
  init_key, key, _ = jax.random.split(jax.random.key(seed), 3)
  state = jax.jit(init_state, static_argnums=(0, 1, 3))(model, config, init_key, len(images))
  state = state if params is None else state._replace(params=params)
  rows = []
  params = state.params
  for progress in run(
    model,
    config,
    state,
    key,
    images,
    lambda step, count: data.batch_indices(seed, step, count, batch_size, len(images)),
    steps_per_row=steps_per_row,
    mesh=sharding.data_mesh(1) if mesh is None else mesh,
  ):
    params = progress.state.params
    if progress.row is not None:
      rows.append({'step': int(progress.state.step), **progress.row})
  return params, rows


def _to_floats(metrics: Metrics) -> dict[str, float]:
  return {name: float(value) for name, value in jax.device_get(metrics).items()}
