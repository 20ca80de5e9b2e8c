"""What training minimises: how each objective uses the model, and which x' it sees.

An objective is a function ``(model, params, keys, x, x_adv) -> terms``. `keys` `[B]` has one PRNG
key for each example, so that the noise does not depend on how a batch is split over devices.
`terms` is a dict of arrays `[B]` with `loss`, which is minimised, or else `elbo`, which is
maximised. The others become metrics. A user's function is used like the ones of the table
`OBJECTIVES` here, which take the settings too.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from se_vae import gaussians, objectives, seeds, wasserstein
from se_vae.config import TrainConfig
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding
from se_vae.training import certified, selection

Terms = dict[str, jax.Array]


@dataclasses.dataclass(frozen=True)
class Entry:
  """One objective.

  Attributes:
    terms: `(model, params, keys, x, x_adv) -> terms`; that of 'clusters' takes `targets` too.
    select: returns x_adv, one of the functions of `training.selection`.
  """

  terms: Callable[..., Terms]
  select: Callable[[selection.Batch], jax.Array]


def entry(config: TrainConfig) -> Entry:
  """Returns the objective that the settings name; for a user's function, with the paper's x'."""
  if callable(config.objective):
    return Entry(config.objective, selection.furthest_encoding)
  terms, select = OBJECTIVES[config.objective]
  return Entry(functools.partial(terms, config=config), select)


def vae(
  model: VAE, params: Params, keys: jax.Array, x: jax.Array, x_adv: jax.Array, config: TrainConfig
) -> Terms:
  """The VAE, whose encoder sees x_adv; a beta-VAE where `config.kl_weight` is not 1."""
  q = model.encode(params, x_adv)
  x_mean = model.decode(params, gaussians.sample_each(q, keys))
  terms = objectives.elbo(x, x_mean, q, obs_var=config.obs_var)
  loss = -terms.elbo + (config.kl_weight - 1.0) * terms.kl
  return {'loss': loss, **terms._asdict(), **_error(x, x_mean)}


def se(
  model: VAE, params: Params, keys: jax.Array, x: jax.Array, x_adv: jax.Array, config: TrainConfig
) -> Terms:
  """The Smooth Encoder (Eq. 6-7, Sec. 6), with a certified part where the settings ask for it."""
  q_a = model.encode(params, x)
  x_mean = model.decode(params, gaussians.sample_each(q_a, keys))
  q_b = model.encode(params, x_adv)
  bound = functools.partial(
    objectives.se_elbo,
    x,
    x_mean,
    q_a,
    gamma=config.gamma,
    obs_var=config.obs_var,
    coupling=config.coupling,
  )
  terms = bound(q_b)
  extra = {'squared_w2': wasserstein.squared_w2(q_a, q_b), **_error(x, x_mean)}
  if config.selection != 'pgd':
    lowest = bound(certified.worst_encoding(model, config, params, x, x_adv, q_a))
    extra['certified_elbo'] = lowest.elbo
    share = config.certified_weight
    terms = jax.tree.map(lambda one, low: one + share * (low - one), terms, lowest)
  return {**terms._asdict(), **extra}


def avae(
  model: VAE, params: Params, keys: jax.Array, x: jax.Array, x_adv: jax.Array, config: TrainConfig
) -> Terms:
  """The Autoencoding VAE (Cemgil et al., 2020)."""
  q = model.encode(params, x)
  x_mean = model.decode(params, gaussians.sample_each(q, keys))
  q_cycle = model.encode(params, jax.lax.stop_gradient(x_mean))
  terms = objectives.avae_elbo(x, x_mean, q, q_cycle, gamma=config.gamma, obs_var=config.obs_var)
  return {**terms._asdict(), **_error(x, x_mean)}


def se_avae(
  model: VAE, params: Params, keys: jax.Array, x: jax.Array, x_adv: jax.Array, config: TrainConfig
) -> Terms:
  """The Smooth Encoder with self-consistency."""
  q_a = model.encode(params, x)
  x_mean = model.decode(params, gaussians.sample_each(q_a, keys))
  q_b = model.encode(params, x_adv)
  q_cycle = model.encode(params, jax.lax.stop_gradient(x_mean))
  numbers = {'gamma': config.gamma, 'obs_var': config.obs_var}
  terms = objectives.se_avae_elbo(x, x_mean, q_a, q_b, q_cycle, **numbers, coupling=config.coupling)
  return {**terms._asdict(), 'squared_w2': wasserstein.squared_w2(q_a, q_b), **_error(x, x_mean)}


def tc_vae(
  model: VAE, params: Params, keys: jax.Array, x: jax.Array, x_adv: jax.Array, config: TrainConfig
) -> Terms:
  """The beta-TC-VAE (Chen et al., 2018), with beta the `config.kl_weight`."""
  q = model.encode(params, x)
  z = gaussians.sample_each(q, keys)
  x_mean = model.decode(params, z)
  terms = objectives.tc_elbo(x, x_mean, q, z, sharding.whole_batch(q), obs_var=config.obs_var)
  loss = -terms.elbo + (config.kl_weight - 1.0) * terms.total_correlation
  return {'loss': loss, **terms._asdict(), **_error(x, x_mean)}


def lipschitz(
  model: VAE, params: Params, keys: jax.Array, x: jax.Array, x_adv: jax.Array, config: TrainConfig
) -> Terms:
  """The VAE with a penalty on the Jacobian of the encoder mean (Hoffman et al., 2019)."""
  q = model.encode(params, x)
  x_mean = model.decode(params, gaussians.sample_each(q, keys))
  terms = objectives.elbo(x, x_mean, q, obs_var=config.obs_var)

  def signs(key: jax.Array) -> jax.Array:
    return seeds.draw(jax.random.rademacher, key, q.mean.shape[1:], q.mean.dtype)

  sign_keys = jax.vmap(lambda key: jax.random.fold_in(key, 1))(keys)
  norm = objectives.squared_jacobian_norm(
    lambda x: model.encode(params, x).mean, x, jax.vmap(signs)(sign_keys)
  )
  loss = -terms.elbo + config.jacobian_weight * norm
  return {'loss': loss, **terms._asdict(), 'squared_jacobian_norm': norm, **_error(x, x_mean)}


def contrastive(
  model: VAE, params: Params, keys: jax.Array, x: jax.Array, x_adv: jax.Array, config: TrainConfig
) -> Terms:
  """A small form of adversarial contrastive learning (Kim et al., 2020), without the decoder."""
  means = sharding.whole_batch(model.encode(params, x).mean)
  loss = functools.partial(
    objectives.info_nce,
    candidates=means,
    positives=sharding.positions(len(x)),
    temperature=config.temperature,
  )
  clean = loss(model.encode(params, selection.shifted(keys, x)).mean)
  attacked = loss(model.encode(params, x_adv).mean)
  return {'loss': clean + attacked, 'clean_loss': clean, 'attacked_loss': attacked}


def clusters(
  model: VAE,
  params: Params,
  keys: jax.Array,
  x: jax.Array,
  x_adv: jax.Array,
  config: TrainConfig,
  targets: jax.Array,
) -> Terms:
  """The cluster of x, read off the encoding of x_adv, whose latent k stands for cluster k.

  targets `[B]` has the clusters. The decoder is not used.
  """
  means = model.encode(params, x_adv).mean
  axes = jnp.eye(model.latent_dim, dtype=means.dtype)
  cross_entropy = objectives.info_nce(
    means, axes, positives=targets, temperature=config.temperature
  )
  # Cosines do not change with the length of a mean, which would grow without a limit.
  squared_length = jnp.mean(means**2, axis=-1)  # 1 for a typical sample of the prior
  loss = cross_entropy + (squared_length - 1.0) ** 2
  found = (jnp.argmax(means, axis=-1) == targets).astype(means.dtype)
  return {
    'loss': loss,
    'cross_entropy': cross_entropy,
    'squared_length': squared_length,
    'cluster_accuracy': found,
  }


def _error(x: jax.Array, x_mean: jax.Array) -> Terms:
  return {'squared_error': objectives.squared_error(x, x_mean)}


# The names of `se_vae.config.OBJECTIVES`: the terms, and what stands in for x'.
OBJECTIVES: dict[str, tuple[Callable[..., Terms], Callable[[selection.Batch], jax.Array]]] = {
  'vae': (vae, selection.noisy),
  'se': (se, selection.furthest_or_certified),
  'avae': (avae, selection.unchanged),
  'se_avae': (se_avae, selection.furthest_encoding),
  'tc_vae': (tc_vae, selection.unchanged),
  'lipschitz': (lipschitz, selection.unchanged),
  'contrastive': (contrastive, selection.confused_view),
  'clusters': (clusters, selection.misassigned),
}


def mean_terms(terms: Any, size: int) -> Terms:
  """Returns the batch mean of each term, with `loss` first.

  Args:
    terms: what an objective returned.
    size: B, the number of examples.

  Raises:
    TypeError, AssertionError: unless it is a dict of arrays `[B]` with `loss` or `elbo`.
  """
  if not isinstance(terms, dict) or not {'loss', 'elbo'} & terms.keys():
    raise TypeError(f"an objective must return a dict with 'loss' or 'elbo', got {terms!r:.200}")
  for name, values in terms.items():
    if jnp.shape(values) != (size,):
      raise AssertionError(
        f'an objective must return one value for each example: {name} must be [{size}], got '
        f'{jnp.shape(values)}'
      )
  means = {name: jnp.mean(values) for name, values in terms.items()}
  loss = means.pop('loss') if 'loss' in means else -means['elbo']
  return {'loss': loss, **means}
