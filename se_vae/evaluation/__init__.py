"""Linear probes, adversarial accuracy against radius, and the sanity checks beside it.

`robustness.evaluate` attacks any JAX function that gives logits: `attacked_classifier` holds it and
its examples, `attack_suite` and `targets` the attacks, `attack_log` what they found, which `states`
keeps in a file.
`sanity_checks` checks the result, a `Claim` of `claims`, and `verdicts` has what the checks return.
`linear_probe` makes a classifier of an encoder. `latent_shift` measures how far an attack moves a
representation, without labels. `certificates` bounds both from the other side, for every attack,
with the methods and batches of `certifiers`. `randomized_smoothing` has certificates by sampling.
"""

from etils import epy as _epy

with _epy.lazy_api_imports(globals()):  # the checks of a file are read without loading JAX
  from se_vae.evaluation.certificates import (
    Certificate,
    certified_accuracy,
    certified_latent_shift,
    certified_margins,
    certified_radius,
    latent_box,
  )
  from se_vae.evaluation.certifiers import Certifier
  from se_vae.evaluation.latent_shift import joint_accuracy, max_latent_shift
  from se_vae.evaluation.linear_probe import (
    GaussianLatents,
    LinearProbe,
    ProbedEncoder,
    Reconstruction,
    encoder_means,
    fit_probe,
  )
  from se_vae.evaluation.metrics import AdversarialAccuracy
  from se_vae.evaluation.randomized_smoothing import SmoothedCertificate, smoothed_accuracy
  from se_vae.evaluation.robustness import Evaluation, adversarial_accuracy, evaluate
  from se_vae.evaluation.verdicts import SanityCheck

__all__ = [
  'AdversarialAccuracy',
  'Certificate',
  'Certifier',
  'Evaluation',
  'GaussianLatents',
  'LinearProbe',
  'ProbedEncoder',
  'Reconstruction',
  'SanityCheck',
  'SmoothedCertificate',
  'adversarial_accuracy',
  'certified_accuracy',
  'certified_latent_shift',
  'certified_margins',
  'certified_radius',
  'encoder_means',
  'evaluate',
  'fit_probe',
  'joint_accuracy',
  'latent_box',
  'max_latent_shift',
  'smoothed_accuracy',
]
