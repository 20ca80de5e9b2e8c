"""Adversarial accuracy against radius (paper Sec. 7, Figure 1), with its evidence.

`adversarial_accuracy` is the paper's curve: PGD at every radius on its own. `evaluate` attacks with
a suite of attacks, keeps each example's worst image, and runs the checks of `sanity_checks`. Both
take any JAX function as a classifier.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from se_vae.attacks import losses
from se_vae.attacks.losses import Model
from se_vae.attacks.projections import Norm
from se_vae.certification import Method
from se_vae.config import SUITES, ArgumentError, check_counts
from se_vae.evaluation import (
  attack_suite,
  attacked_classifier,
  certificates,
  certifiers,
  sanity_checks,
  states,
  verdicts,
)
from se_vae.evaluation.attack_log import AttackLog
from se_vae.evaluation.attack_suite import Suite
from se_vae.evaluation.attacked_classifier import AttackedClassifier
from se_vae.evaluation.certificates import Certificate
from se_vae.evaluation.claims import Claim
from se_vae.evaluation.linear_probe import ProbedEncoder
from se_vae.evaluation.metrics import AdversarialAccuracy
from se_vae.evaluation.verdicts import SanityCheck

Progress = Callable[[int, int], Any]


def adversarial_accuracy(
  logits_fn: Model,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  num_steps: int = 40,
  restarts: int = 1,
  relative_step_size: float | None = None,
  progress: Progress = lambda done, total: None,
  **options: Any,
) -> AdversarialAccuracy:
  """Accuracy under the paper's PGD, with every radius attacked on its own.

  An example is robust at a radius if the classifier is right after all restarts there, whatever the
  attack finds at other radii. Radius 0 is the clean accuracy. The result does not depend on the
  batch size or on the number of devices, beyond rounding.

  Example:
    >>> def above_half(x):  # one pixel, two classes
    ...   return jnp.stack([0.5 - x[:, 0], x[:, 0] - 0.5], axis=1)
    >>> x, labels = np.array([[0.2], [0.45]], np.float32), np.array([0, 0])
    >>> adversarial_accuracy(above_half, x, labels, radii=(0.0, 0.1, 0.4)).accuracy
    array([1. , 0.5, 0. ])

  Args:
    logits_fn: images `[B, ...]` (and `args`) to logits `[B, K]`; hashable, compiled once.
    x: images `[N, ...]`, float, inside `bounds`.
    labels: `[N]` integers in [0, K).
    radii: radii >= 0, in any order.
    num_steps: gradient steps of each attempt.
    restarts: attempts at each radius, each from a random start of its own.
    relative_step_size: step size as a share of the radius; 2.5 / num_steps if None.
    progress: called after each batch and at the end with the number of finished radii and of all.
    **options: `norm`, `bounds`, `seed`, `batch_size`, `args` and `mesh` of `evaluate`.

  Raises:
    ArgumentError: for an argument out of range, or clean logits that are not finite.
  """
  check_counts(num_steps=num_steps, restarts=restarts)
  attacked_classifier.check_step_size(relative_step_size)
  classifier, _ = attacked_classifier.prepare(logits_fn, x, labels, radii=radii, **options)
  suite = attack_suite.standard(
    logits_fn, num_steps=num_steps, restarts=restarts, relative_step_size=relative_step_size
  )
  robust = np.zeros((len(radii), len(x)), bool)
  for i, radius in enumerate(radii):
    report = functools.partial(progress, i, len(radii))
    reporting = dataclasses.replace(classifier, on_batch=report)
    robust[i, reporting.robust(suite.attacks, float(radius), np.arange(len(x)))] = True
  progress(len(radii), len(radii))
  return AdversarialAccuracy(np.asarray(radii, np.float64), robust)


@dataclasses.dataclass(frozen=True, repr=False)
class Evaluation:
  """The result of `evaluate`.

  Attributes:
    curve: accuracy at each radius, in the order asked for.
    attack_log: what misclassified each example, at what radius, with which image, at what cost.
    checks: the sanity checks, in order; empty if `check_examples` was 0.
    config: everything that the numbers depend on, as JSON values.
    certificate: what no attack can exceed; None if it was not asked for.
  """

  curve: AdversarialAccuracy
  attack_log: AttackLog
  checks: tuple[SanityCheck, ...]
  config: dict[str, Any]
  certificate: Certificate | None = None

  @property
  def passed(self) -> bool:
    """Whether no check failed; a skipped check does not count as failed."""
    return all(check.verdict != 'fail' for check in self.checks)

  def __repr__(self) -> str:
    certified = '' if self.certificate is None else f'{self.certificate}, '
    summary = verdicts.summary(self.checks)
    return f'Evaluation({self.config["attack"]}, {self.curve}, {certified}{summary})'


def evaluate(
  logits_fn: Model,
  x: np.ndarray,
  labels: np.ndarray,
  *,
  radii: Sequence[float],
  attack: str = 'standard',
  num_steps: int = 40,
  restarts: int = 1,
  num_queries: int = 1000,
  relative_step_size: float | None = None,
  norm: Norm = 'linf',
  bounds: tuple[float, float] = (0.0, 1.0),
  seed: int = 0,
  batch_size: int = 200,
  args: tuple[Any, ...] = (),
  latents_fn: Model | None = None,
  reconstruct_fn: Model | None = None,
  surrogate: tuple[Model, tuple[Any, ...]] | None = None,
  check_examples: int = 500,
  certify: bool | Method = False,
  mesh: Mesh | None = None,
  state_path: str | Path | None = None,
  progress: Progress = lambda done, total: None,
  certificate_progress: Progress | None = None,
) -> Evaluation:
  """Accuracy under a suite of attacks, with the images that show it and sanity checks of it.

  The attacks run from the smallest radius up. An example that is misclassified, by an earlier
  attack or at a smaller radius, is not attacked again. The remaining examples are compacted into
  batches of one shape, so every attack compiles once. The result does not depend on the batch size
  or on the number of devices, beyond rounding.

  Example:
    >>> x = np.float32([[[0.9], [0.9]], [[0.1], [0.1]]])
    >>> fn = lambda x: jnp.stack([x.sum(axis=(1, 2)) - 1.0, jnp.zeros(x.shape[0])], axis=1)
    >>> result = evaluate(fn, x, np.array([0, 1]), radii=(0.0, 0.3, 0.5), batch_size=2)
    >>> print(result.curve.accuracy, result.checks[0].verdict)
    [1. 1. 0.] pass

  Args:
    logits_fn: images `[B, ...]` (and `args`) to logits `[B, K]`; hashable, compiled once for each
      attack.
    x: images `[N, ...]`, float, inside `bounds`.
    labels: `[N]` integers in [0, K), of at least two classes.
    radii: radii >= 0, in any order, none larger than the pixel range.
    attack: 'standard' (the paper's PGD) or 'worst_case' (`attack_suite.worst_case`).
    num_steps: gradient steps of each attempt.
    restarts: attempts of each untargeted attack at each radius, each from a random start of its
      own.
    num_queries: forward passes of the Square attack, in the suite and in the checks.
    relative_step_size: PGD's step size as a share of the radius; 2.5 / num_steps if None.
    norm: 'linf' or 'l2'.
    bounds: lowest and highest pixel value.
    seed: seed of every random draw.
    batch_size: examples attacked at a time.
    args: further arguments of `logits_fn`, `latents_fn` and `reconstruct_fn`, such as parameters.
    latents_fn: images (and `args`) to representations `[B, E]`, for attacks that aim there.
    reconstruct_fn: images (and `args`) to their reconstructions, for check 12.
    surrogate: another classifier and its arguments. Check 8 tests `logits_fn` on the surrogate's
      adversarial images.
    check_examples: how many of the first examples the checks attack again; 0 for no checks.
    certify: whether to find what is certified of the same examples too, by CROWN, or CROWN-IBP for
      a large encoder (`certifiers.certifier_for`); or the method. Then `logits_fn` must be a
      `ProbedEncoder`, and `args` its parameters and probe.
    mesh: devices to spread a batch over; all of them if None.
    state_path: npz file that keeps the attack log, for an evaluation that is interrupted and
      started again. The bounds of certificates and the answers of checks are kept beside it, in
      files of the same name that end in `.certificates.npz` and `.checks.npz`.
    progress: called after each batch with the number of finished attempts and of all.
    certificate_progress: called in its place while certificates are found, with the number of
      finished bounds and of all.

  Raises:
    ArgumentError: for an argument out of range, or clean logits that are not finite.
    StateError: for a state that is damaged or belongs to another evaluation.
  """
  check_counts(num_steps=num_steps, restarts=restarts, num_queries=num_queries)
  attacked_classifier.check_step_size(relative_step_size)
  path = states.check_path(state_path)
  if not isinstance(check_examples, int | np.integer) or check_examples < 0:
    raise ArgumentError('check_examples', f'must be an integer >= 0, got {check_examples!r}')
  if attack not in SUITES:
    raise ArgumentError('attack', f'must be one of {", ".join(SUITES)}, got {attack!r}')
  if not isinstance(certify, bool | Method):
    raise ArgumentError('certify', f'must be True, False or a Method, got {certify!r}')
  certifier = None
  if certify:
    method, shape = certify if isinstance(certify, Method) else None, np.shape(x)[1:]
    certifier = certifiers.certifier_for(
      logits_fn, args, shape, method=method, norm=norm, bounds=bounds, mesh=mesh
    )
  classifier, logits = attacked_classifier.prepare(
    logits_fn,
    x,
    labels,
    radii=radii,
    seed=seed,
    norm=norm,
    bounds=bounds,
    batch_size=batch_size,
    args=args,
    mesh=mesh,
    latents_fn=latents_fn,
  )
  if reconstruct_fn is not None:
    attacked_classifier.check_function('reconstruct_fn', reconstruct_fn, classifier.x, args)
  if surrogate is not None:
    other, other_args = surrogate
    attacked_classifier.check_function('surrogate', other, classifier.x, other_args, logits=True)
  if max(radii) > classifier.diameter:
    raise ArgumentError(
      'radii', f'must be at most the pixel range {classifier.diameter:g}, got {max(radii)}'
    )
  classes = len(np.unique(labels))
  if classes < 2:
    raise ArgumentError('labels', 'must be of at least two classes: a constant would be robust')
  steps: dict[str, Any] = {
    'num_steps': num_steps,
    'restarts': restarts,
    'relative_step_size': relative_step_size,
  }
  if attack == 'standard':
    suite = attack_suite.standard(logits_fn, **steps)
  else:
    suite = attack_suite.worst_case(
      logits_fn,
      latents_fn,
      classes=classes,
      num_classes=classifier.num_classes,
      norm=norm,
      num_queries=num_queries,
      **steps,
    )
  searched: dict[str, Any] = {
    'attack': attack,
    'attacks': {row.name: {'steps': row.num_steps, 'tries': row.restarts} for row in suite.attacks},
    'relative_step_size': relative_step_size,
    'norm': norm,
    'bounds': list(bounds),
    'seed': seed,
    'radii': sorted({0.0, *map(float, radii)}),
  }
  functions, clean = [logits_fn], [logits]
  if latents_fn is not None:
    functions, clean = [logits_fn, latents_fn], [logits, classifier.targets.latents]
  outputs = np.vstack([np.hstack(clean), classifier.outputs_elsewhere(*functions)])
  log = _attack_all(classifier, suite, outputs, searched, path, progress)
  radii_asked = np.asarray(radii, np.float64)
  curve = AdversarialAccuracy(radii_asked, log.robust(radii_asked))
  report = functools.partial(progress, log.done, log.done)
  config, certificate = searched, None
  if certifier is not None:
    config = searched | {'certified_by': dataclasses.asdict(certifier.method)}
    on_bounds = certificate_progress or (lambda *_: report())
    certificate = _certificate(classifier, certifier, radii, config, path, logits, on_bounds)
  if not check_examples:
    return Evaluation(curve, log, (), config, certificate)
  asked = searched | {
    'check_examples': check_examples,
    'num_steps': num_steps,
    'num_queries': num_queries,
    'found': states.fingerprint({}, (log.radius, log.attack)),
  }
  with _beside(path, '.checks.npz', classifier, asked, outputs) as answers:
    claim = Claim(
      classifier=dataclasses.replace(classifier, on_batch=report, log=answers),
      suite=suite,
      attack_log=log,
      curve=curve,
      config=config,
      logits=logits,
      count=min(check_examples, len(logits)),
      num_steps=num_steps,
      num_queries=num_queries,
      representation=clean[-1],
      reconstruct_fn=reconstruct_fn,
      surrogate=surrogate,
      certificate=certificate,
    )
    checks = sanity_checks.run_checks(claim)
  return Evaluation(curve, log, checks, config, certificate)


def _certificate(
  classifier: AttackedClassifier,
  certifier: certifiers.Certifier,
  radii: Sequence[float],
  config: dict[str, Any],
  path: Path | None,
  logits: np.ndarray,
  progress: Progress,
) -> Certificate:
  """What is certified of the examples, with the bounds beside the attack log.

  What attacks have found is not used, so that check 13 can compare the two.
  """
  assert isinstance(classifier.logits_fn, ProbedEncoder)  # or there would be no certifier
  settings = {name: config[name] for name in ('norm', 'bounds', 'radii')} | config['certified_by']
  params, probe = classifier.args
  with _beside(path, '.certificates.npz', classifier, settings, logits) as log:
    return certificates.certify(
      classifier.logits_fn.model,
      params,
      probe,
      classifier.x,
      classifier.labels,
      radii=radii,
      certifier=certifier,
      log=log,
      progress=progress,
    )


def _attack_all(
  classifier: AttackedClassifier,
  suite: Suite,
  outputs: np.ndarray,
  config: dict[str, Any],
  state_path: Path | None,
  progress: Progress,
) -> AttackLog:
  """Runs every attempt of every attack at every radius on the examples left; can be resumed.

  `outputs` `[N + M, ...]` have the logits of the N clean images first.
  """
  fingerprint = _fingerprint(classifier, config)
  if state_path is not None and state_path.exists():
    log = AttackLog.load(state_path, fingerprint, outputs)
  else:
    names = ('clean', *(attack.name for attack in suite.attacks))
    log = AttackLog.empty(names, classifier.x, outputs)
    logits = outputs[: len(classifier.x), : classifier.num_classes]
    labels = classifier.labels
    correct = np.asarray(losses.is_correct(jnp.asarray(logits), jnp.asarray(labels)))
    wrong = np.flatnonzero(~correct)
    log.record(wrong, classifier.x[wrong], radius=np.zeros(len(wrong)), attack=0, restart=0)
    log.forwards += 1
  attempts = [
    (radius, number, attack, restart)
    for radius in config['radii']
    if radius > 0.0
    for number, attack in enumerate(suite.attacks, start=1)
    for restart in range(attack.restarts)
  ]
  progress(log.done, len(attempts))
  saved = time.monotonic()
  try:
    for radius, number, attack, restart in attempts[log.done :]:
      left = np.flatnonzero(np.isinf(log.radius))
      left = left[left >= log.next_row]
      for images, correct in classifier.attack_batches(attack, radius, restart, left):
        rows, left = np.split(left, [len(images)])
        wrong, images = rows[~correct], images[~correct]
        log.forwards[rows] += attack.cost.forwards
        log.gradients[rows] += attack.cost.gradients
        reached = _smallest_radii(classifier, wrong, images, config['radii'], radius)
        log.record(wrong, images, radius=reached, attack=number, restart=restart)
        log.next_row = int(rows[-1]) + 1
        if state_path is not None and time.monotonic() - saved > states.SAVE_EVERY:
          log.save(state_path, fingerprint)
          saved = time.monotonic()
        progress(log.done, len(attempts))
      log.done, log.next_row = log.done + 1, 0
  finally:
    if state_path is not None:
      log.save(state_path, fingerprint)
  progress(len(attempts), len(attempts))
  return log


def _smallest_radii(
  classifier: AttackedClassifier,
  rows: np.ndarray,
  images: np.ndarray,
  radii: Sequence[float],
  radius: float,
) -> np.ndarray:
  """The smallest of the radii, at most `radius`, whose ball holds each image, `[len(rows)]`.

  An attack at a large radius can find an image that the attacks at a smaller one have missed.
  """
  offsets = images.astype(np.float64) - classifier.x[rows]
  offsets = offsets.reshape(len(rows), classifier.x[0].size)
  distances = np.linalg.norm(offsets, {'linf': np.inf, 'l2': 2}[classifier.norm], axis=1)
  limits = sanity_checks.allowed_distances(
    np.asarray(radii), classifier.x[0].size, classifier.norm, classifier.bounds
  )
  inside = distances[:, None] <= limits[None]
  return np.minimum(radius, np.where(inside, np.asarray(radii)[None], np.inf).min(axis=1))


def _beside(
  path: Path | None,
  suffix: str,
  classifier: AttackedClassifier,
  settings: dict[str, Any],
  outputs: np.ndarray,
) -> states.ValueLog:
  """A log in a file beside that of the attack log, if there is one."""
  path = None if path is None else path.with_name(f'{path.name.removesuffix(".npz")}{suffix}')
  return states.ValueLog(path, _fingerprint(classifier, settings), outputs)


def _fingerprint(classifier: AttackedClassifier, config: dict[str, Any]) -> str:
  """A digest of what a state depends on, but for the functions, which have its `outputs`."""
  return states.fingerprint(config, (classifier.x, classifier.labels, classifier.args))
