"""Training objectives, term by term: one value for each example `[B]`, in nats.

`bounds` has the VAE's ELBO. `smooth` has the paper's SE-ELBO, with the paper's coupling of z_a and
z_b or a balanced one, `certified` its smallest value over a box of encodings, and `consistency` the
objective of the Autoencoding VAE. The other modules have objectives to compare with:
`total_correlation` the beta-TC-VAE, `lipschitz` a penalty on the encoder's Jacobian, and
`contrastive` a loss without a decoder, of views of images or of their clusters.

Bounds are maximised, and called `elbo`; penalties and losses are minimised.
"""

from se_vae.objectives.bounds import ElboTerms, elbo, gaussian_log_likelihood, squared_error
from se_vae.objectives.certified import worst_encoding
from se_vae.objectives.consistency import (
  AVAETerms,
  SEAVAETerms,
  avae_elbo,
  se_avae_elbo,
)
from se_vae.objectives.contrastive import info_nce
from se_vae.objectives.lipschitz import squared_jacobian_norm
from se_vae.objectives.smooth import (
  SEElboTerms,
  balanced_gamma,
  correlation,
  log_normalizer,
  log_prior,
  se_elbo,
)
from se_vae.objectives.total_correlation import TCElboTerms, tc_elbo

__all__ = [
  'AVAETerms',
  'ElboTerms',
  'SEAVAETerms',
  'SEElboTerms',
  'TCElboTerms',
  'avae_elbo',
  'balanced_gamma',
  'correlation',
  'elbo',
  'gaussian_log_likelihood',
  'info_nce',
  'log_normalizer',
  'log_prior',
  'se_avae_elbo',
  'se_elbo',
  'squared_error',
  'squared_jacobian_norm',
  'tc_elbo',
  'worst_encoding',
]
