"""The worst encoding of a whole ball of images, within certified bounds.

The selection of `training.selection` finds one x' of the ball, and shows how far an encoding can
move at least. Bounds of all encodings of the ball show how far it can move at most. With the worst
encoding within them in the place of q(z | x'), the SE-ELBO is a lower bound of what it is for any
x' of the ball. Training on it makes the bounds tighter: unlike a selected x', the worst encoding
has a gradient, that of the bounds in the encoder's parameters.
"""

from __future__ import annotations

from typing import cast

import jax
import jax.numpy as jnp

from se_vae import certification, objectives
from se_vae.attacks import projections
from se_vae.config import TrainConfig
from se_vae.gaussians import DiagonalGaussian, Gaussian
from se_vae.models import layer_lists
from se_vae.models.vae import VAE, Params

# Larger bounds of a log-variance, as at the beginning of a run, would make its variance overflow.
_LARGEST_LOG_VAR = 20.0


def region(config: TrainConfig, x: jax.Array, x_adv: jax.Array) -> certification.Region:
  """Returns the images whose encodings are bounded.

  Args:
    config: the settings.
    x: images `[B, H, W, C]` in [0, 1].
    x_adv: the selected x' of each image, which matters for a `certified_share` below 1.
  """
  norm = cast(projections.Norm, config.norm)
  radius = config.radius if config.certified_radius is None else config.certified_radius
  if norm == 'l2':
    return certification.ball(x, radius, norm=norm)
  width = config.certified_share * radius
  center = jnp.clip(x_adv, x - (radius - width), x + (radius - width))
  return certification.ball(center, width)


def worst_encoding(
  model: VAE,
  config: TrainConfig,
  params: Params,
  x: jax.Array,
  x_adv: jax.Array,
  q_a: Gaussian,
) -> DiagonalGaussian:
  """Returns what `objectives.worst_encoding` returns for bounds of the encodings of each ball.

  Bounds of log-variances above 20 count as 20, so that training can begin where they are huge.

  Args:
    model: the model, with an encoder that `models.layer_lists` knows.
    config: the settings; `selection` names the bounds.
    params: the model's parameters.
    x: images `[B, H, W, C]` in [0, 1].
    x_adv: the selected x' of each image.
    q_a: the encodings of x, factorised, with means `[B, D]`.

  Raises:
    TypeError: for an encoder that cannot be certified, by name.
  """
  encoder = layer_lists.encoder_of(model, params)
  assert isinstance(q_a, DiagonalGaussian)  # `encoder_of` refuses others
  images = region(config, x, x_adv)
  box = certification.latent_box(encoder, images, certification.Method('ibp'))
  mean, log_var = box.mean, box.log_var
  if config.selection == 'linear':
    # Linear bounds of the log-variances too would double the cost of a step.
    mean = certification.output_box(encoder.means(), images, certification.Method('crown_ibp'))
  return objectives.worst_encoding(
    q_a,
    (mean.lower, mean.upper),
    (
      jnp.minimum(log_var.lower, _LARGEST_LOG_VAR),
      jnp.minimum(log_var.upper, _LARGEST_LOG_VAR),
    ),
    gamma=config.gamma,
    coupling=config.coupling,
  )
