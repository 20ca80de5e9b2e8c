"""Certificates of encoders and probes for whole test sets: what no attack can exceed.

A certificate holds for every image in a ball, whether or not an attack finds it. Only the accuracy
of a probe needs labels. `certification` has the methods, and says what a bound counts. The
functions share their arguments:

* `model`, a VAE whose encoder has layers that `models.layer_lists` knows, and its parameters
  `params`;
* `probe`, on its means, from D latents to K classes;
* images `x` `[N, H, W, C]`, inside `certifier.bounds`, and `labels` `[N]`, integers in [0, K);
* `radii` >= 0, in any order, or one `radius`;
* `certifier`: ball, method, batches.

They raise TypeError for another model or an encoder with other layers, by name, and ArgumentError
for a probe, radii, counts, labels or images that do not fit.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae import certification
from se_vae.certification import Encoder, LatentBox, Method
from se_vae.config import ArgumentError, check_counts
from se_vae.evaluation import attacked_classifier, certifiers
from se_vae.evaluation.certifiers import LINF_CROWN, Certifier
from se_vae.evaluation.linear_probe import LinearProbe
from se_vae.evaluation.metrics import AdversarialAccuracy
from se_vae.evaluation.states import ValueLog
from se_vae.gaussians import DiagonalGaussian
from se_vae.models.layer_lists import encoder_of
from se_vae.models.vae import VAE, Params
from se_vae.parallel import sharding

# Steps of bisection between the largest requested radius that is certified and the next one.
_HALVINGS = 5


@dataclasses.dataclass(frozen=True, repr=False)
class Certificate:
  """What is certified of N examples, whatever the attack.

  Attributes:
    method: how the bounds were found.
    radius: `[N]`, the largest radius found within which nothing misleads the classifier, at most
      the largest of `curve.radii`; -1 where not even the image itself is certified.
    curve: which examples are certified at each radius, and the certified accuracy.
  """

  method: Method
  radius: np.ndarray
  curve: AdversarialAccuracy

  def __repr__(self) -> str:
    return f'Certificate({self.method.name}, {self.curve})'


def latent_box(
  model: VAE, params: Params, x: np.ndarray, *, radius: float, certifier: Certifier = LINF_CROWN
) -> LatentBox:
  """Returns bounds of the encodings of all images in the ball about each of x, without labels.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> params = model.init(jax.random.key(0))
    >>> box = latent_box(model, params, np.zeros((5, 2, 2, 1), np.float32), radius=0.1)
    >>> box.mean.lower.shape, bool((box.log_var.lower <= box.log_var.upper).all())
    ((5, 3), True)

  Returns:
    Boxes of NumPy arrays `[N, D]`, sound in floating point.
  """
  encoder, x = _checked(model, params, x, (radius,), certifier, 'radius')
  return certifier.map(_latent_box, encoder, (x, _full(radius, x)))


def certified_latent_shift(
  model: VAE,
  params: Params,
  x: np.ndarray,
  *,
  radii: Sequence[float],
  certifier: Certifier = LINF_CROWN,
) -> np.ndarray:
  """Returns upper bounds on the squared W2 between the encodings of x and of any x' in the ball.

  `max_latent_shift` gives lower bounds of the same: the largest shift is between the two.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> params, x = model.init(jax.random.key(0)), np.zeros((5, 2, 2, 1), np.float32)
    >>> certified_latent_shift(model, params, x, radii=(0.1, 0.2)).shape
    (2, 5)

  Returns:
    `[R, N]`; not smaller at a larger radius, and infinite where no bound is found.
  """
  encoder, x = _checked(model, params, x, radii, certifier)
  constants, function = (encoder, params), functools.partial(_shift, model)

  def bounds(radius: float) -> np.ndarray:
    return np.asarray(certifier.map(function, constants, (x, _full(radius, x))))

  # A ball holds all smaller ones, so a bound at a larger radius holds at the smaller ones too.
  found = _along_radii(np.fmin, bounds, radii)
  return np.where(np.isnan(found), np.inf, found)


def certified_margins(
  model: VAE,
  params: Params,
  probe: LinearProbe,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  certifier: Certifier = LINF_CROWN,
) -> np.ndarray:
  """Returns lower bounds of the margin, the label's logit minus the largest other, over each ball.

  Returns:
    `[R, N]`; not larger at a larger radius, and -infinity where no bound is found. An image is
    certified where it is > 0.
  """
  encoder, x = _checked(model, params, x, radii, certifier)
  labels = _checked_labels(labels, x, probe)
  constants = (encoder, _layer_of(probe, encoder))

  def bounds(radius: float) -> np.ndarray:
    return np.asarray(certifier.map(_margins, constants, (x, labels, _full(radius, x))))

  found = _along_radii(np.fmax, bounds, radii)
  return np.where(np.isnan(found), -np.inf, found)


def certified_accuracy(
  model: VAE,
  params: Params,
  probe: LinearProbe,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  certifier: Certifier = LINF_CROWN,
) -> AdversarialAccuracy:
  """Returns the share of examples that no image within the radius misleads, whatever the attack.

  Each example's largest certified radius among `radii` is found by bisection.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> params, x = model.init(jax.random.key(0)), np.zeros((2, 2, 2, 1), np.float32)
    >>> probe = LinearProbe(np.zeros((3, 2), np.float32), np.array([0.0, 1.0], np.float32))
    >>> labels = np.array([0, 1])  # the probe says 1, whatever the image
    >>> print(certified_accuracy(model, params, probe, x, labels, radii=(0.1,)))
    n = 2: 0.500 at 0.1
  """
  is_certified = _margin_is_positive(model, params, probe, x, labels, radii, certifier)
  radius = certifiers.largest_radius(is_certified, len(x), radii, num_steps=0)
  return _curve(radius, radii)


def certified_radius(
  model: VAE,
  params: Params,
  probe: LinearProbe,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  most: float,
  num_steps: int = 10,
  certifier: Certifier = LINF_CROWN,
) -> np.ndarray:
  """Returns for each example the largest radius found within which nothing misleads the probe.

  It is found by `num_steps` halvings of the radii from 0 to `most`, which are >= 0.

  Example:
    >>> from se_vae import make_vae
    >>> model = make_vae((2, 2, 1), latent_dim=3, num_layers=1)
    >>> params, x = model.init(jax.random.key(0)), np.zeros((1, 2, 2, 1), np.float32)
    >>> probe = LinearProbe(np.zeros((3, 2), np.float32), np.array([0.0, 1.0], np.float32))
    >>> certified_radius(model, params, probe, x, np.array([1]), most=0.5)  # always class 1
    array([0.5], dtype=float32)

  Returns:
    `[N]` in [0, most], or -1 where not even the image itself is certified.
  """
  check_counts(num_steps=num_steps)
  is_certified = _margin_is_positive(
    model, params, probe, x, labels, (most,), certifier, name='most'
  )
  return certifiers.largest_radius(is_certified, len(x), (0.0, most), num_steps=num_steps)


def certify(
  model: VAE,
  params: Params,
  probe: LinearProbe,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  certifier: Certifier = LINF_CROWN,
  log: ValueLog | None = None,
  progress: Callable[[int, int], Any] = lambda done, total: None,
) -> Certificate:
  """Returns the certified accuracy at each radius, and each example's largest certified radius.

  The radii are bisected first, and then the interval between two of them that the example's
  largest radius is in. `log` keeps the margins that are found, for a computation that is
  interrupted.

  `progress` is called before the first batch, after each one and at the end with the number of
  bounds that are done and of all, and may raise to stop. Examples that are decided need no further
  bounds, which count as done.
  """
  log, grid, rounds = log or ValueLog(), (0.0, *radii), itertools.count(1)
  total = certifiers.num_rounds(grid, num_steps=_HALVINGS) * len(x)

  def map_batches(mesh: Mesh, function: Any, arrays: Any, batch_size: int) -> np.ndarray:
    decided = next(rounds) * len(x) - len(arrays[0])
    return log.map_batches(
      mesh, function, arrays, batch_size, lambda done: progress(decided + done, total)
    )

  is_certified = _margin_is_positive(
    model, params, probe, x, labels, radii, certifier, map_batches=map_batches
  )
  radius = certifiers.largest_radius(is_certified, len(x), grid, num_steps=_HALVINGS)
  progress(total, total)
  return Certificate(certifier.method, radius, _curve(radius, radii))


def _margin_is_positive(
  model: VAE,
  params: Params,
  probe: LinearProbe,
  x: np.ndarray,
  labels: np.ndarray,
  radii: Sequence[float],
  certifier: Certifier,
  *,
  name: str = 'radii',
  map_batches: Callable[..., Any] = sharding.map_batches,
) -> Callable[[np.ndarray, np.ndarray], np.ndarray]:
  """Returns a function of examples `[M]` and a radius for each: whether each is certified there.

  `name` is that of the argument with the radii.
  """
  encoder, x = _checked(model, params, x, radii, certifier, name)
  labels = _checked_labels(labels, x, probe)
  constants = encoder, _layer_of(probe, encoder)

  def is_certified(rows: np.ndarray, radius: np.ndarray) -> np.ndarray:
    # Whatever the number of examples left, batches have one shape, so this compiles once.
    arrays = x[rows], labels[rows], radius
    margins = certifier.map(_margins, constants, arrays, count=len(x), map_batches=map_batches)
    return np.asarray(margins) > 0.0

  return is_certified


def _curve(radius: np.ndarray, radii: Sequence[float]) -> AdversarialAccuracy:
  """Returns at which radii each example is certified, from the largest ones `[N]`."""
  limits = np.asarray(radii, np.float64)
  return AdversarialAccuracy(limits, radius[None] >= limits.astype(np.float32)[:, None])


@functools.partial(jax.jit, static_argnums=0)
def _latent_box(certifier: Certifier, encoder: Encoder, batch: Any) -> LatentBox:
  return certification.latent_box(encoder, certifier.region(*batch), certifier.method)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _shift(model: VAE, certifier: Certifier, constants: Any, batch: Any) -> jax.Array:
  encoder, params = constants
  with jax.default_matmul_precision('highest'):  # as the bounds; the default of a GPU is TF32
    q = model.encode(params, batch[0])
  assert isinstance(q, DiagonalGaussian)  # `encoder_of` refuses others
  box = certification.latent_box(encoder, certifier.region(*batch), certifier.method)
  return certification.latent_shift(box, q.mean, q.log_var)


@functools.partial(jax.jit, static_argnums=0)
def _margins(certifier: Certifier, constants: Any, batch: Any) -> jax.Array:
  encoder, last = constants
  x, labels, radius = batch
  region = certifier.region(x, radius)
  if not certifier.every_probe:
    return certification.margins(encoder.means(last), region, labels, certifier.method)
  box = certification.output_box(encoder.means(), region, certifier.method)
  return certification.box_margins(box, last, labels)


def _along_radii(
  tighter: np.ufunc, bounds: Callable[[float], np.ndarray], radii: Sequence[float]
) -> np.ndarray:
  """Returns bounds `[R, N]`, each the tightest of those at its radius and at all larger ones.

  `fmin` and `fmax` ignore NaN, which stands for no bound, as where float32 overflows.
  """
  grid = np.unique(np.asarray(radii, np.float64))
  found = np.stack([bounds(radius) for radius in grid[::-1]])
  return tighter.accumulate(found)[::-1][np.searchsorted(grid, radii)]


def _full(radius: float, x: np.ndarray) -> np.ndarray:
  return np.full(len(x), radius, x.dtype)


def _checked(
  model: VAE,
  params: Params,
  x: np.ndarray,
  radii: Sequence[float],
  certifier: Certifier,
  name: str = 'radii',
) -> tuple[Encoder, np.ndarray]:
  """Returns the encoder and the images, of one dtype, which is float32 unless parameters are wider.

  Raises:
    ArgumentError: for unusable images, radii (by the `name` of their argument) or batches.
    TypeError: for an encoder that cannot be certified.
  """
  x, encoder = np.asarray(x), encoder_of(model, params)
  if x.shape[1:] != model.image_shape or not jnp.issubdtype(x.dtype, jnp.floating):
    wanted = ', '.join(map(str, model.image_shape))
    raise ArgumentError('x', f'must be float images [N, {wanted}], got {x.dtype} {x.shape}')
  attacked_classifier.check_images(x, certifier.bounds)
  attacked_classifier.check_radii(radii, name)
  check_counts(batch_size=certifier.batch_size)
  widest = functools.reduce(jnp.promote_types, _dtypes(encoder), np.dtype(np.float32))
  dtype = jax.dtypes.canonicalize_dtype(widest)
  return jax.tree.map(lambda leaf: leaf.astype(dtype), encoder), x.astype(dtype)


def _layer_of(probe: LinearProbe, encoder: Encoder) -> certification.Dense:
  """Returns a probe as a layer, of the encoder's dtype; raises ArgumentError if it does not fit."""
  certifiers.check_probe(probe)
  num_latents, (dtype, *_) = len(encoder.mean.bias), _dtypes(encoder)
  if len(probe.weights) != num_latents:
    raise ArgumentError(
      'probe', f'must take {num_latents} latents as the encoder has, got {len(probe.weights)}'
    )
  weights, bias = (jnp.asarray(leaf, dtype) for leaf in (probe.weights, probe.bias))
  return certification.Dense(weights, bias)


def _dtypes(encoder: Encoder) -> list[np.dtype]:
  return [leaf.dtype for leaf in jax.tree.leaves(encoder)]


def _checked_labels(labels: np.ndarray, x: np.ndarray, probe: LinearProbe) -> np.ndarray:
  """Returns the labels in int32; raises ArgumentError unless there is a class for each image."""
  labels, num_classes = np.asarray(labels), len(probe.bias)
  if labels.shape != (len(x),) or not np.issubdtype(labels.dtype, np.integer):
    message = f'must be {len(x)} integers, one for each image, got {labels.dtype} {labels.shape}'
    raise ArgumentError('labels', message)
  if not ((labels >= 0) & (labels < num_classes)).all():
    raise ArgumentError('labels', f'must lie in [0, {num_classes})')
  return labels.astype(np.int32)
