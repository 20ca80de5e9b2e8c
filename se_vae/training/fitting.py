"""Training in memory, as for a notebook: one model, or many side by side.

Also how a run of a seed begins: its first state, and the clusters that objective 'clusters' needs.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import Mesh

from se_vae import data, seeds
from se_vae.config import ArgumentError, TrainConfig, check_counts
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding
from se_vae.training import loop
from se_vae.training.loop import NotFiniteError
from se_vae.training.population import run_population
from se_vae.training.step import TrainState, TrainStep, differing_programs, init_state

Result = tuple[Params, list[dict[str, float]]]


def fit(
  model: VAE,
  config: TrainConfig,
  images: np.ndarray,
  *,
  params: Params | None = None,
  optimizer: optax.GradientTransformation | None = None,
  seed: int = 0,
  batch_size: int = 64,
  steps_per_row: int = 100,
  mesh: Mesh | None = None,
) -> tuple[Params, list[dict[str, float]]]:
  """Trains a model in memory, as for a notebook.

  The parameters are those that `experiments.pretrain` gives with the same settings and devices.

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
    optimizer: in place of the one that `config` names; it then sets the learning rate too.
    seed: seed of the initialisation, the order of the batches and the noise.
    batch_size: examples a step, at most N.
    steps_per_row: number of steps that a row of metrics averages over.
    mesh: the devices, whose number must divide the batch size; the first device if None.

  Returns:
    The parameters, and a row of metrics for every `steps_per_row` steps, each with its last step.

  Raises:
    ArgumentError: for a frozen decoder without `params`, which would stay as it was drawn; for a
      batch_size that is not in [1, N], or steps_per_row < 1; for a mesh with other axes than those
      of `data_mesh`.
    NotFiniteError: if a metric is not finite.
    TypeError: for images that are not uint8.
  """
  mesh = sharding.data_mesh(1) if mesh is None else mesh
  check_fit(
    config,
    params,
    mesh,
    axes=(sharding.DATA_AXIS,),
    batch_size=batch_size,
    steps_per_row=steps_per_row,
    num_examples=len(images),
  )
  state, key, _ = first_state(
    model, config, seed, num_examples=len(images), params=params, optimizer=optimizer
  )
  state = add_targets(state, model, config, images, seed)
  params, rows = state.params, []
  for progress in loop.run(
    TrainStep(model, optimizer),
    state,
    (config, key),
    images,
    data.batch_stream(seed, batch_size, len(images)),
    num_steps=config.num_steps,
    steps_per_row=steps_per_row,
    mesh=mesh,
  ):
    params = progress.state.params
    if progress.row is not None:
      rows.append({'step': int(progress.state.step), **progress.row})
  return params, rows


@overload
def fit_population(
  model: VAE,
  configs: Sequence[TrainConfig],
  images: np.ndarray,
  *,
  seeds: Sequence[int],
  params: Params | None = None,
  optimizer: optax.GradientTransformation | None = None,
  batch_size: int = 64,
  steps_per_row: int = 100,
  mesh: Mesh | None = None,
  vectorize: sharding.Vectorize = 'auto',
  return_errors: Literal[False] = False,
) -> list[Result]: ...


@overload
def fit_population(
  model: VAE,
  configs: Sequence[TrainConfig],
  images: np.ndarray,
  *,
  seeds: Sequence[int],
  params: Params | None = None,
  optimizer: optax.GradientTransformation | None = None,
  batch_size: int = 64,
  steps_per_row: int = 100,
  mesh: Mesh | None = None,
  vectorize: sharding.Vectorize = 'auto',
  return_errors: Literal[True],
) -> list[Result | NotFiniteError]: ...


def fit_population(
  model: VAE,
  configs: Sequence[TrainConfig],
  images: np.ndarray,
  *,
  seeds: Sequence[int],
  params: Params | None = None,
  optimizer: optax.GradientTransformation | None = None,
  batch_size: int = 64,
  steps_per_row: int = 100,
  mesh: Mesh | None = None,
  vectorize: sharding.Vectorize = 'auto',
  return_errors: bool = False,
) -> Any:
  """Trains many models side by side in memory: what `fit` gives for each pair of config and seed.

  One program is compiled for all of them.

  Example:
    >>> from se_vae import make_vae
    >>> images = np.zeros((8, 2, 2, 1), np.uint8)
    >>> model = make_vae((2, 2, 1), latent_dim=3, hidden_units=4, num_layers=1)
    >>> configs = [TrainConfig(num_steps=5, gamma=gamma) for gamma in (1.0, 10.0)]
    >>> results = fit_population(model, configs, images, seeds=[0, 0], batch_size=4)
    >>> [(rows[-1]['step'], len(rows)) for params, rows in results]
    [(5, 1), (5, 1)]

  Args:
    model: the model.
    configs: each member's settings. They may differ in the numbers that a compiled step takes, such
      as gamma, obs_var, radius, learning_rate and num_steps.
    images: the training set `[N, H, W, C]`, uint8.
    seeds: each member's seed, of its initialisation, the order of its batches and its noise.
    params: parameters that all members start with; fresh ones of its own for each if None.
    optimizer: in place of the one that the configs name; it then sets the learning rate too.
    batch_size: examples a step of a member, at most N.
    steps_per_row: number of steps that a row of metrics averages over.
    mesh: the devices, as of `sharding.population_mesh`; one for each member if None, as far as this
      process has them.
    vectorize: how a device takes its members: 'loop' one after the other, 'vmap' all at once,
      'auto' in a loop on a CPU and all at once elsewhere.
    return_errors: put the error of a member whose metrics are not finite into the place of its
      result, and train the others to their ends, rather than raise it at once.

  Returns:
    For each member its parameters, in host memory, and its rows of metrics.

  Raises:
    ArgumentError: for configs that need different programs, naming the settings; if there are no
      members, or not as many seeds as configs; and as `fit`.
    NotFiniteError: for the first member with a metric that is not finite, by number and seed.
    TypeError: for images that are not uint8.
  """
  check_population(configs, seeds)
  if mesh is None:
    mesh = sharding.population_mesh(min(len(seeds), jax.local_device_count()))
  check_fit(
    configs[0],
    params,
    mesh,
    axes=(sharding.POPULATION_AXIS, sharding.DATA_AXIS),
    batch_size=batch_size,
    steps_per_row=steps_per_row,
    num_examples=len(images),
  )
  states, args = [], []
  targets: dict[int, jax.Array | None] = {}  # members of one seed have the same clusters
  for config, seed in zip(configs, seeds, strict=True):
    state, key, _ = first_state(
      model, config, seed, num_examples=len(images), params=params, optimizer=optimizer
    )
    if seed not in targets:
      targets[seed] = add_targets(state, model, config, images, seed).targets
    states.append(jax.device_get(state._replace(targets=targets[seed])))
    args.append((config, key))
  rows: list[list[dict[str, float]]] = [[] for _ in seeds]
  progress = None
  for progress in run_population(
    TrainStep(model, optimizer),
    states,
    args,
    images,
    [data.batch_stream(seed, batch_size, len(images)) for seed in seeds],
    num_steps=[config.num_steps for config in configs],
    steps_per_row=steps_per_row,
    mesh=mesh,
    names=[f'member {i} (seed {seed})' for i, seed in enumerate(seeds)],
    vectorize=vectorize,
  ):
    for error in progress.errors:
      if error is not None and not return_errors:
        raise error
    for own, row in zip(rows, progress.rows, strict=True):
      if row is not None:
        own.append({'step': progress.step, **row})
  assert progress is not None  # every run has a step
  params_of = [member.state.params for member in progress.members()]
  trained = zip(progress.errors, params_of, rows, strict=True)
  return [(own_params, own) if error is None else error for error, own_params, own in trained]


def check_fit(
  config: TrainConfig,
  params: Params | None,
  mesh: Mesh,
  *,
  axes: tuple[str, ...],
  batch_size: int,
  steps_per_row: int,
  num_examples: int,
) -> None:
  """Raises ArgumentError for arguments that `fit` cannot use, and for a mesh with other axes."""
  if config.freeze_decoder and params is None:
    raise ArgumentError('params', 'is needed for freeze_decoder: its decoder is kept')
  check_counts(batch_size=batch_size, steps_per_row=steps_per_row)
  if batch_size > num_examples:
    raise ArgumentError('batch_size', f'must be <= {num_examples}, the images, got {batch_size}')
  if mesh.axis_names != axes:
    raise ArgumentError('mesh', f'needs the axes {axes}, got {mesh.axis_names}')


def add_targets(
  state: TrainState, model: VAE, config: TrainConfig, images: np.ndarray, seed: int
) -> TrainState:
  """Returns the state with the clusters of the images, as many as latents, which 'clusters' needs.

  With any other objective it is the state that was given. The clusters are part of the state, so
  that a resumed run goes on with the same ones.

  Raises:
    ArgumentError: if there is only one latent, or there are not more images than latents.
  """
  if config.objective != 'clusters':
    return state
  check_targets(config, model.latent_dim, len(images))
  if config.clusters_of == 'brightness':
    images = images.max(axis=-1, keepdims=True)
  neighbors = min(10, len(images) - 1)  # ten, but of small sets all
  clusters = data.spectral_clusters(images, model.latent_dim, num_neighbors=neighbors, seed=seed)
  return state._replace(targets=jnp.asarray(clusters))


def check_targets(config: TrainConfig, latent_dim: int, num_images: int) -> None:
  """Raises ArgumentError unless objective 'clusters' can have a cluster for each latent."""
  if config.objective == 'clusters' and not 2 <= latent_dim < num_images:
    raise ArgumentError(
      'latent_dim',
      f"must be >= 2 and below the {num_images} training images for objective 'clusters'; "
      f'got {latent_dim}',
    )


def first_state(
  model: VAE,
  config: TrainConfig,
  seed: int,
  *,
  num_examples: int,
  params: Params | None = None,
  optimizer: optax.GradientTransformation | None = None,
) -> tuple[TrainState, jax.Array, jax.Array]:
  """Returns the state at step 0 of the run of a seed, the key of its steps, and one for measuring.

  Args:
    model: the model.
    config: the settings.
    seed: the seed of the run.
    num_examples: N, the size of the training set.
    params: parameters to start with; fresh ones if None.
    optimizer: in place of the one that `config` names.
  """
  # The generator is named, so that JAX's configured default cannot change the run.
  init_key, key, measuring_key = jax.random.split(seeds.key_of(seed), 3)
  # As one program, and not as dozens of small ones to compile.
  init = jax.jit(init_state, static_argnames=('model', 'num_examples', 'optimizer'))
  state = init(
    model, config, init_key, num_examples=num_examples, params=params, optimizer=optimizer
  )
  return state, key, measuring_key


def check_population(configs: Sequence[TrainConfig], seeds: Sequence[int]) -> None:
  """Raises ArgumentError unless one program can train these members."""
  if not configs:
    raise ArgumentError('configs', 'needs at least one member')
  if len(seeds) != len(configs):
    message = f'needs one for each of the {len(configs)} configs, got {len(seeds)}'
    raise ArgumentError('seeds', message)
  if names := differing_programs(configs):
    values = '; '.join(f'{name} {_distinct(configs, name)}' for name in names)
    raise ArgumentError(names, f'must be the same in the whole population, got {values}')


def _distinct(configs: Sequence[TrainConfig], name: str) -> str:
  return ', '.join(dict.fromkeys(repr(getattr(config, name)) for config in configs))
