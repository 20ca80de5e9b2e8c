"""Smooth Encoders: variational autoencoders whose representations resist small perturbations.

The reference implementation of *Learning Robust Representations with Smooth Encoders* (Cemgil,
Ghaisas, Dvijotham and Kohli, 2019).
"""

from etils import epy as _epy

__version__ = '0.2.0.dev0'

with _epy.lazy_api_imports(globals()):  # a name loads what it needs when it is first used
  from se_vae import data
  from se_vae.attacks import pgd
  from se_vae.config import ArgumentError, TrainConfig
  from se_vae.data.transforms import pixels
  from se_vae.evaluation.certificates import (
    certified_accuracy,
    certified_latent_shift,
    certified_radius,
    latent_box,
  )
  from se_vae.evaluation.latent_shift import joint_accuracy, max_latent_shift
  from se_vae.evaluation.linear_probe import (
    GaussianLatents,
    LinearProbe,
    ProbedEncoder,
    encoder_means,
    fit_probe,
  )
  from se_vae.evaluation.randomized_smoothing import smoothed_accuracy
  from se_vae.evaluation.robustness import Evaluation, adversarial_accuracy, evaluate
  from se_vae.gaussians import DiagonalGaussian, FullGaussian, entropy, kl_divergence
  from se_vae.models.vae import VAE, make_vae
  from se_vae.objectives import elbo, log_normalizer, se_elbo
  from se_vae.storage.model_store import load_model, save_model
  from se_vae.storage.pretrained import load_pretrained
  from se_vae.training import (
    EncodingShift,
    TrainState,
    fit,
    fit_population,
    init_state,
    select,
    train_step,
  )
  from se_vae.wasserstein import entropic_squared_w2, entropic_transport_cost, squared_w2

__all__ = [
  'VAE',
  'ArgumentError',
  'DiagonalGaussian',
  'EncodingShift',
  'Evaluation',
  'FullGaussian',
  'GaussianLatents',
  'LinearProbe',
  'ProbedEncoder',
  'TrainConfig',
  'TrainState',
  'adversarial_accuracy',
  'certified_accuracy',
  'certified_latent_shift',
  'certified_radius',
  'data',
  'elbo',
  'encoder_means',
  'entropic_squared_w2',
  'entropic_transport_cost',
  'entropy',
  'evaluate',
  'fit',
  'fit_population',
  'fit_probe',
  'init_state',
  'joint_accuracy',
  'kl_divergence',
  'latent_box',
  'load_model',
  'load_pretrained',
  'log_normalizer',
  'make_vae',
  'max_latent_shift',
  'pgd',
  'pixels',
  'save_model',
  'se_elbo',
  'select',
  'smoothed_accuracy',
  'squared_w2',
  'train_step',
]
