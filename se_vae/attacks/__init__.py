"""Attacks: images near x that maximise any per-example objective.

They know images and a callable, and nothing of encoders or labels. `losses` has what an attack on a
classifier or on its representation maximises.
"""

from se_vae.attacks.auto_pgd import apgd
from se_vae.attacks.projected_gradient import (
  Objective,
  example_keys,
  fgsm,
  noise,
  pgd,
  values_and_gradients,
)
from se_vae.attacks.projections import NORMS
from se_vae.attacks.square_attack import square

__all__ = [
  'NORMS',
  'Objective',
  'apgd',
  'example_keys',
  'fgsm',
  'noise',
  'pgd',
  'square',
  'values_and_gradients',
]
