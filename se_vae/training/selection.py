"""The selection of x': what an objective sees beside each image (paper Sec. 2.1).

`select` is the paper's: the image of the ball whose encoding is furthest from that of x. The
functions of the table in `training.losses` all take a `Batch`. No gradient flows through a
selection: x' is data (Sec. 2).
"""

from __future__ import annotations

import dataclasses
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp

from se_vae import attacks, gaussians, objectives, wasserstein
from se_vae.attacks import projections
from se_vae.config import SELECTION_DISTANCES, TrainConfig
from se_vae.gaussians import Gaussian
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding

_MOST_PIXELS_SHIFTED = 2  # of a view for the contrastive loss, up or down and left or right


class Batch(NamedTuple):
  """What a selection may use.

  Attributes:
    model: the model.
    config: the settings.
    params: the model's parameters.
    key: one PRNG key.
    x: images `[B, H, W, C]` in [0, 1].
    places: `[B]`, the place of each image in the whole batch.
    start: images `[B, H, W, C]` for an attack to start from, or None for random ones.
    targets: `[B]`, the cluster of each image, for objective 'clusters'.
  """

  model: VAE
  config: TrainConfig
  params: Params
  key: jax.Array
  x: jax.Array
  places: jax.Array
  start: jax.Array | None = None
  targets: jax.Array | None = None


def mean_distance(q_a: Gaussian, q_b: Gaussian) -> jax.Array:
  """Returns the squared distance of the means, in squared latent units, `[...]`."""
  return jnp.sum((q_a.mean - q_b.mean) ** 2, axis=-1)


_DISTANCES = dict(
  zip(
    SELECTION_DISTANCES,
    (wasserstein.squared_w2, gaussians.symmetric_kl, mean_distance),
    strict=True,
  )
)


@dataclasses.dataclass(frozen=True)
class EncodingShift:
  """Distance between a fixed encoding and that of x', which the selection maximises.

  With the squared W2 distance this is the objective of the paper's selection mechanism (Sec. 2.1).

  Attributes:
    model: the model whose encoder is used.
    distance: 'squared_w2' (squared latent units), 'symmetric_kl' (nats), or 'mean_distance', the
      squared distance of the means.
  """

  model: VAE
  distance: str = 'squared_w2'

  def __post_init__(self) -> None:
    if self.distance not in _DISTANCES:
      raise ValueError(f'distance must be one of {", ".join(_DISTANCES)}, got {self.distance!r}')

  def __call__(self, x_adv: jax.Array, params: Params, q_a: Gaussian) -> jax.Array:
    """Returns the distances `[B]`.

    Args:
      x_adv: images x' `[B, H, W, C]`.
      params: the model's parameters, which may be of a lower precision than the rest.
      q_a: the fixed encodings, with means `[B, D]`.
    """
    x_adv = x_adv.astype(jax.tree.leaves(params)[0].dtype)
    q_b = self.model.encode(params, x_adv)
    return _DISTANCES[self.distance](q_a, _cast(q_b, q_a.mean.dtype))


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
    x' `[B, H, W, C]` in [0, 1], within `config.radius` of x in the norm `config.norm`.
  """
  params, q_a = jax.lax.stop_gradient((params, q_a))
  if config.attack_dtype == 'bfloat16':
    params = _cast(params, jnp.bfloat16)
  objective = EncodingShift(model, config.selection_distance)
  return _maximise(objective, config, key, x, (params, q_a), index=index, start=start)


def furthest_encoding(batch: Batch) -> jax.Array:
  """Returns what `select` returns, for the encodings of x."""
  model, config, params, key, x, index, start, _ = batch
  return select(model, config, params, key, x, model.encode(params, x), index=index, start=start)


def furthest_or_certified(batch: Batch) -> jax.Array:
  """Returns what `select` returns, or x if the loss does not use the selected x'."""
  config = batch.config
  if config.selection == 'pgd':
    return furthest_encoding(batch)
  # The weights are traced, so the program decides when it runs whether to attack.
  is_used = jnp.minimum(config.certified_weight, config.certified_share) < 1.0
  return jax.lax.cond(is_used, lambda: furthest_encoding(batch), lambda: batch.x)


def noisy(batch: Batch) -> jax.Array:
  """Returns x with uniform noise of half-width `config.encoder_noise`, clipped to [0, 1]."""
  # The program is the same with and without noise, and draws none where there is none.
  radius = batch.config.encoder_noise
  return jax.lax.cond(
    radius > 0.0,
    lambda: attacks.noise(batch.key, batch.x, radius=radius, index=batch.places),
    lambda: batch.x,
  )


def unchanged(batch: Batch) -> jax.Array:
  """Returns x, for an objective that sees nothing else."""
  return batch.x


@dataclasses.dataclass(frozen=True)
class Confusion:
  """Contrastive loss of x' against candidates, such as the encodings of a batch.

  Attributes:
    model: the model whose encoder is used.
  """

  model: VAE

  def __call__(
    self,
    x_adv: jax.Array,
    params: Params,
    candidates: jax.Array,
    positives: jax.Array,
    temperature: jax.Array,
  ) -> jax.Array:
    """Returns the losses `[B]`, in nats.

    Args:
      x_adv: images x' `[B, H, W, C]`.
      params: the model's parameters.
      candidates: vectors `[M, D]`, such as the encoder means of the whole batch.
      positives: `[B]`, the candidate that belongs to each image.
      temperature: of the softmax.
    """
    queries = self.model.encode(params, x_adv).mean
    return objectives.info_nce(queries, candidates, positives=positives, temperature=temperature)


def confused_view(batch: Batch) -> jax.Array:
  """Returns a shifted copy of each image, attacked so that it is taken for another.

  This is the positive of Kim et al. (2020). The copy is x moved by up to two pixels in each
  direction. x' lies in the ball around the copy, and maximises the contrastive loss against the
  encodings of the batch.
  """
  model, config, params, key, x, index, start, _ = batch
  view_key, attack_key = jax.random.split(key)
  view = shifted(attacks.example_keys(view_key, index), x)
  params = jax.lax.stop_gradient(params)
  means = sharding.whole_batch(model.encode(params, x).mean)
  args = (params, means, sharding.positions(len(x)), config.temperature)
  return _maximise(Confusion(model), config, attack_key, view, args, index=index, start=start)


def misassigned(batch: Batch) -> jax.Array:
  """Returns images x' of the ball around x that are taken for members of other clusters.

  They maximise what `training.losses.clusters` minimises.
  """
  model, config, params, key, x, index, start, targets = batch
  params = jax.lax.stop_gradient(params)
  args = (params, jnp.eye(model.latent_dim, dtype=x.dtype), targets, config.temperature)
  return _maximise(Confusion(model), config, key, x, args, index=index, start=start)


def shifted(keys: jax.Array, x: jax.Array) -> jax.Array:
  """Returns images `[B, H, W, C]`, each moved by up to two pixels, with zeros where there was none.

  keys `[B]` has one PRNG key for each image.
  """

  def shift(key: jax.Array, image: jax.Array) -> jax.Array:
    top, left = jax.random.randint(key, (2,), 0, 2 * most + 1, jnp.int32)
    padded = jnp.pad(image, ((most, most), (most, most), (0, 0)))
    return jax.lax.dynamic_slice(padded, (top, left, jnp.int32(0)), image.shape)

  most = _MOST_PIXELS_SHIFTED
  return jax.vmap(shift)(keys, x)


def _maximise(
  objective: Any,
  config: TrainConfig,
  key: jax.Array,
  x: jax.Array,
  args: tuple[Any, ...],
  *,
  index: jax.Array | None,
  start: jax.Array | None,
) -> jax.Array:
  """Returns the images of the ball around x that PGD finds for an objective."""
  x_adv = attacks.pgd(
    objective,
    key,
    x,
    radius=config.radius,
    num_steps=config.pgd_steps,
    relative_step_size=config.relative_step_size,
    norm=cast(projections.Norm, config.norm),
    start=start,
    args=args,
    index=index,
  )
  return jax.lax.stop_gradient(x_adv)
