"""Useful floating-point operations of a training step, counted from the architecture.

Counted are the linear layers alone, a multiplication and an addition each: what any implementation
of the paper must do. Activations, losses and the optimiser come to a few per cent more, and what an
implementation repeats or pads is not useful. A layer's forward pass, the gradient in its input and
the gradient in its weights cost the same.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

from se_vae.models import networks
from se_vae.models.vae import VAE
from se_vae.training import TrainConfig

# The objectives whose steps are counted. Others encode, decode or attack more.
COUNTED = ('vae', 'se')


def train_step(model: VAE, config: TrainConfig, batch_size: int) -> int:
  """Returns the operations of one training step, for the objectives that are COUNTED.

  The encodings of x, and of x' for 'se', go forward and backward, but for the gradient in the image
  itself; so does the decoder, wholly, for its gradient goes on to the encoder. The selection is L
  passes forward and back to the image, which need no gradient in a weight. Interval bounds take the
  centre and the width of the ball forward and backward in its place; linear ones also two rows for
  each latent.
  """
  encoder, decoder = sum(encoder_layers(model)), sum(decoder_layers(model))
  encoding = 3 * encoder - encoder_layers(model)[0]
  operations = encoding + 3 * decoder
  if config.objective == 'se' and config.selection == 'pgd':
    operations += encoding + config.pgd_steps * selection_step(model)
  elif config.objective == 'se':
    operations += 2 * encoding
    operations += 3 * 2 * model.latent_dim * encoder if config.selection == 'linear' else 0
  return batch_size * operations


def selection_step(model: VAE) -> int:
  """Returns the operations of one of the L iterations on one example, forward and backward."""
  return 2 * sum(encoder_layers(model))


def encoder_layers(model: VAE) -> list[int]:
  """Returns the operations of each layer of the encoder in a forward pass on one example."""
  encoder, head = model.encoder, 2 * model.latent_dim
  if isinstance(encoder, networks.MLPEncoder) and encoder.covariance == 'diagonal':
    return _dense(math.prod(model.image_shape), *encoder.hidden, head)
  if isinstance(encoder, networks.ConvEncoder) and encoder.covariance == 'diagonal':
    features = _num_features(model, encoder.channels)
    return [*_convolutions(model, encoder.channels), *_dense(features, head)]
  raise TypeError(f'cannot count the layers of {encoder}')


def decoder_layers(model: VAE) -> list[int]:
  """Returns the operations of each layer of the decoder in a forward pass on one example."""
  decoder = model.decoder
  if isinstance(decoder, networks.MLPDecoder):
    return _dense(model.latent_dim, *decoder.hidden, math.prod(model.image_shape))
  if isinstance(decoder, networks.ConvDecoder):
    features = _num_features(model, decoder.channels)
    # A transposed convolution costs what the convolution does.
    return [*_dense(model.latent_dim, features), *_convolutions(model, decoder.channels)[::-1]]
  raise TypeError(f'cannot count the layers of {decoder}')


def _dense(*widths: int) -> list[int]:
  return [2 * inputs * outputs for inputs, outputs in itertools.pairwise(widths)]


def _convolutions(model: VAE, channels: Sequence[int]) -> list[int]:
  """Returns the operations of each convolution; windows over the edge count in full."""
  ends = itertools.pairwise((model.image_shape[2], *channels))
  sizes = networks.feature_sizes(model.image_shape, len(channels))[1:]
  return [
    2 * networks.KERNEL_SIZE**2 * inputs * outputs * height * width
    for (inputs, outputs), (height, width) in zip(ends, sizes, strict=True)
  ]


def _num_features(model: VAE, channels: Sequence[int]) -> int:
  """Returns how many features the last convolution gives."""
  sizes = networks.feature_sizes(model.image_shape, len(channels))
  return math.prod(sizes[-1]) * channels[-1]
