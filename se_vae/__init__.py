"""Smooth Encoders: variational autoencoders whose representations resist small perturbations.

The reference implementation of *Learning Robust Representations with Smooth Encoders* (Cemgil,
Ghaisas, Dvijotham and Kohli, 2019).
"""

from etils import epy as _epy

__version__ = '0.2.0.dev0'

with _epy.lazy_api_imports(globals()):  # a name loads what it needs when it is first used
  from se_vae.attacks.projected_gradient import pgd
  from se_vae.config import ArgumentError, TrainConfig
  from se_vae.data.transforms import pixels
  from se_vae.evaluation.latent_shift import joint_accuracy, max_latent_shift
  from se_vae.evaluation.linear_probe import LinearProbe, ProbedEncoder, encoder_means, fit_probe
  from se_vae.evaluation.robustness import adversarial_accuracy, evaluate
  from se_vae.gaussians import (
    DiagonalGaussian,
    FullGaussian,
    entropy,
    kl_divergence,
    kl_to_standard_normal,
  )
  from se_vae.models.vae import VAE, make_vae
  from se_vae.objectives import elbo, log_normalizer, se_elbo
  from se_vae.storage.model_store import load_model, save_model
  from se_vae.training import (
    EncodingShift,
    TrainState,
    fit,
    init_state,
    select,
    train_step,
  )
  from se_vae.wasserstein import (
    entropic_coupling,
    entropic_coupling_full,
    entropic_squared_w2,
    entropic_squared_w2_full,
    entropic_transport_cost,
    entropic_transport_cost_full,
    optimal_coupling,
    optimal_coupling_full,
    optimal_map,
    optimal_map_full,
    squared_w2,
    squared_w2_full,
  )

__all__ = [
  'VAE',
  'ArgumentError',
  'DiagonalGaussian',
  'EncodingShift',
  'FullGaussian',
  'LinearProbe',
  'ProbedEncoder',
  'TrainConfig',
  'TrainState',
  'adversarial_accuracy',
  'elbo',
  'encoder_means',
  'entropic_coupling',
  'entropic_coupling_full',
  'entropic_squared_w2',
  'entropic_squared_w2_full',
  'entropic_transport_cost',
  'entropic_transport_cost_full',
  'entropy',
  'evaluate',
  'fit',
  'fit_probe',
  'init_state',
  'joint_accuracy',
  'kl_divergence',
  'kl_to_standard_normal',
  'load_model',
  'log_normalizer',
  'make_vae',
  'max_latent_shift',
  'optimal_coupling',
  'optimal_coupling_full',
  'optimal_map',
  'optimal_map_full',
  'pgd',
  'pixels',
  'save_model',
  'se_elbo',
  'select',
  'squared_w2',
  'squared_w2_full',
  'train_step',
]
