"""Certificates: bounds of a network's outputs that hold for every input in a ball.

An attack shows how bad a network is at least, a certificate how bad it can be at most. A network
is a tuple of `layers`; a ball is one of `regions`. `interval` and `linear_relaxation` bound the
outputs, `rounding` says how the bounds hold in floating point, and `certificates` has boxes,
margins and certified radii. They know layers and arrays, and nothing of Flax, data or training.
"""

from se_vae.certification.certificates import (
  CROWN,
  METHODS,
  Encoder,
  LatentBox,
  Method,
  box_margins,
  latent_box,
  latent_shift,
  margins,
  output_box,
  worst_logits,
)
from se_vae.certification.layers import Conv, Dense, Flatten, Layer, ReLU, apply
from se_vae.certification.linear_relaxation import num_coefficients, num_row_coefficients
from se_vae.certification.regions import Box, Region, ball

__all__ = [
  'CROWN',
  'METHODS',
  'Box',
  'Conv',
  'Dense',
  'Encoder',
  'Flatten',
  'LatentBox',
  'Layer',
  'Method',
  'ReLU',
  'Region',
  'apply',
  'ball',
  'box_margins',
  'latent_box',
  'latent_shift',
  'margins',
  'num_coefficients',
  'num_row_coefficients',
  'output_box',
  'worst_logits',
]
