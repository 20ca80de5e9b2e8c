"""The attacks of an evaluation: what each maximises, from what start, how often, at what cost.

An attack is a frozen, hashable object that maps a batch of images to adversarial images. `standard`
and `worst_case` build the suites that `robustness.evaluate` offers.
"""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

from se_vae import attacks
from se_vae.attacks import losses, projections
from se_vae.attacks.losses import Aim, Model
from se_vae.attacks.projections import Norm
from se_vae.evaluation import targets
from se_vae.evaluation.targets import Targets

# Attacks on the representation aim at this many other classes, the nearest first.
_LATENT_TARGETS = 3


class Cost(NamedTuple):
  """What one attempt of an attack spends on each example.

  Attributes:
    forwards: forward passes without a gradient, with the one that scores the result.
    gradients: gradients.
  """

  forwards: int
  gradients: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Attack:
  """One attack of a suite.

  Attributes:
    name: unique in a suite; part of the attack's randomness.
    restarts: how often it runs at each radius, each time with a key and an aim of its own.
    aim: what one of these attempts aims at.
    num_steps: gradient steps, or queries of an attack without gradients.
  """

  name: str
  restarts: int = 1
  aim: Callable[[Targets, np.ndarray, int], Aim] = targets.own_label
  num_steps: int = 1

  @property
  def cost(self) -> Cost:
    """The cost of one attempt."""
    return Cost(forwards=1, gradients=0)

  def __call__(self, key: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    """Adversarial images of one attempt, `[B, ...]`, inside the ball and the bounds.

    Args:
      key: key of the attempt.
      x: clean images `[B, ...]`.
      **options: `radius`, `norm`, `bounds`, `args` and `index` of `attacks.pgd`; the first of the
        `args` is the aim.
    """
    raise NotImplementedError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Noise(Attack):
  """A uniform draw from the ball, or from its corners (l2: its surface) if `extreme`."""

  extreme: bool = False

  def __call__(self, key: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    """Noisy images."""
    del options['args']
    return attacks.noise(key, x, extreme=self.extreme, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class OtherImage(Attack):
  """Another image, that of the aim, projected to the ball."""

  def __call__(self, key: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    """The projected images."""
    del options['index']
    aim, *_ = options.pop('args')
    return projections.Ball(x, **options).project(aim.image)


@dataclasses.dataclass(frozen=True, kw_only=True)
class GradientAttack(Attack):
  """An attack that climbs the gradient of `objective(x_adv, aim, *args)`."""

  objective: Model


@dataclasses.dataclass(frozen=True, kw_only=True)
class FGSM(GradientAttack):
  """One gradient step, to the edge of the ball."""

  @property
  def cost(self) -> Cost:
    """One gradient."""
    return Cost(forwards=1, gradients=1)

  def __call__(self, key: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    """Images after the step."""
    del options['index']
    return attacks.fgsm(self.objective, key, x, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class PGD(GradientAttack):
  """Projected gradient ascent; `relative_step_size` is `attacks.pgd`'s, a share of the radius."""

  relative_step_size: float | None = None

  @property
  def cost(self) -> Cost:
    """A gradient for each step, and a forward pass for the last iterate."""
    return Cost(forwards=2, gradients=self.num_steps)

  def __call__(self, key: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    """The best iterates."""
    return attacks.pgd(
      self.objective,
      key,
      x,
      num_steps=self.num_steps,
      relative_step_size=self.relative_step_size,
      keep_best=True,
      **options,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class APGD(GradientAttack):
  """Auto-PGD, from where PGD on `start_objective` ends, or from a random start if None."""

  start_objective: Model | None = None

  @property
  def cost(self) -> Cost:
    """A gradient at the start and for each step, and the cost of the PGD before."""
    if self.start_objective is None:
      return Cost(forwards=1, gradients=1 + self.num_steps)
    return Cost(forwards=2, gradients=1 + 2 * self.num_steps)

  def __call__(self, key: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    """The best iterates."""
    options['num_steps'] = self.num_steps
    start = None
    if self.start_objective is not None:
      start = attacks.pgd(self.start_objective, key, x, keep_best=True, **options)
    return attacks.apgd(self.objective, key, x, start=start, **options)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Square(Attack):
  """Random search for the largest `objective(x_adv, aim, *args)`, without gradients; linf alone."""

  objective: Model

  @property
  def cost(self) -> Cost:
    """A forward pass for each query."""
    return Cost(forwards=1 + self.num_steps, gradients=0)

  def __call__(self, key: jax.Array, x: jax.Array, **options: Any) -> jax.Array:
    """The best images."""
    norm = options.pop('norm')
    assert norm == 'linf'  # suites have it for no other norm
    return attacks.square(self.objective, key, x, num_queries=self.num_steps, **options)


@dataclasses.dataclass(frozen=True)
class Suite:
  """The attacks that an evaluation rests on.

  Attributes:
    attacks: in the order in which they run.
    doubled: names of the attacks that check 6 repeats with twice the steps. Each is compiled again,
      so a long suite names those of its strongest method alone.
  """

  attacks: tuple[Attack, ...]
  doubled: tuple[str, ...]

  @property
  def gradient_attacks(self) -> tuple[GradientAttack, ...]:
    """Those that use gradients."""
    return tuple(attack for attack in self.attacks if isinstance(attack, GradientAttack))


def standard(
  logits_fn: Model, *, num_steps: int, restarts: int, relative_step_size: float | None = None
) -> Suite:
  """The paper's attack: PGD on the cross-entropy. Arguments as in `robustness.evaluate`."""
  pgd = PGD(
    name='pgd_cross_entropy',
    objective=_until_misclassified(losses.CrossEntropy(logits_fn)),
    num_steps=num_steps,
    restarts=restarts,
    relative_step_size=relative_step_size,
  )
  return Suite((pgd,), doubled=(pgd.name,))


def worst_case(
  logits_fn: Model,
  latents_fn: Model | None,
  *,
  classes: int,
  num_classes: int,
  norm: Norm,
  num_steps: int,
  restarts: int,
  num_queries: int,
  relative_step_size: float | None = None,
) -> Suite:
  """Noise, other images, FGSM, PGD and APGD on several losses, attacks on latents, and Square.

  The cheap attacks run first: the expensive ones need not attack what those misclassify.

  Args:
    logits_fn: the classifier.
    latents_fn: its representation; no attacks on latents if None.
    classes: C, how many classes the evaluated examples have.
    num_classes: K, how many the classifier knows; the DLR loss needs three.
    norm: of the ball; Square is for 'linf' alone.
    num_steps: gradient steps of each attempt.
    restarts: attempts of each untargeted attack.
    num_queries: of Square.
    relative_step_size: of PGD, as a share of the radius; 2.5 / num_steps if None.
  """
  by_name: dict[str, Any] = {
    'cross_entropy': losses.CrossEntropy(logits_fn),
    'margin': losses.Margin(logits_fn),
  }
  if num_classes >= 3:
    by_name['dlr'] = losses.DLR(logits_fn)
  found: list[Attack] = [
    Noise(name='noise'),
    Noise(name='extreme_noise', extreme=True),
    OtherImage(
      name='candidates', restarts=targets.NUM_GREYS + classes - 1, aim=targets.other_image
    ),
    FGSM(name='fgsm', objective=by_name['cross_entropy']),
  ]
  steps: dict[str, Any] = {'num_steps': num_steps, 'restarts': restarts}
  objectives = {name: _until_misclassified(loss) for name, loss in by_name.items()}
  found += [
    PGD(name=f'pgd_{name}', objective=loss, relative_step_size=relative_step_size, **steps)
    for name, loss in objectives.items()
  ]
  auto = [APGD(name=f'apgd_{name}', objective=loss, **steps) for name, loss in objectives.items()]
  auto.append(
    APGD(
      name='apgd_targeted',
      objective=_until_misclassified(losses.Targeted(logits_fn)),
      num_steps=num_steps,
      restarts=num_classes - 1,
      aim=targets.other_class,
    )
  )
  found += auto
  if latents_fn is not None:
    nearest = min(classes - 1, _LATENT_TARGETS)
    towards, away = losses.LatentTarget(latents_fn), losses.LatentShift(latents_fn)
    found += [
      APGD(
        name=name,
        objective=objectives['margin'],
        start_objective=start,
        num_steps=num_steps,
        restarts=attempts,
        aim=aim,
      )
      for name, start, attempts, aim in (
        ('latent_centroid', towards, nearest, targets.other_centroid),
        ('latent_encoding', towards, nearest, targets.other_encoding),
        ('latent_w2', away, restarts, targets.own_encoding),
      )
    ]
  if norm == 'linf':
    found.append(square_margin(logits_fn, num_queries))
  return Suite(tuple(found), doubled=tuple(attack.name for attack in auto))


def square_margin(logits_fn: Model, num_queries: int) -> Square:
  """Square on the margin."""
  return Square(name='square', objective=losses.Margin(logits_fn), num_steps=num_queries)


@functools.partial(jax.jit, static_argnames=('attack', 'norm', 'bounds'))
def run(
  attack: Attack,
  key: jax.Array,
  x: jax.Array,
  aim: Aim,
  index: jax.Array,
  radius: jax.Array,
  args: tuple[Any, ...],
  *,
  norm: Norm,
  bounds: tuple[float, float],
) -> jax.Array:
  """One attempt on a batch, compiled once for all radii and keys: `[B, ...]`, of x's shape."""
  options = {'radius': radius, 'norm': norm, 'bounds': bounds, 'index': index}
  return attack(key, x, args=(aim, *args), **options)


def attempt_key(key: jax.Array, attack: Attack, radius: float, attempt: int) -> jax.Array:
  """The key of one attempt, whatever other attacks, radii and attempts there are."""
  for number in (zlib.crc32(attack.name.encode()), np.float32(radius).view(np.uint32), attempt):
    key = jax.random.fold_in(key, np.uint32(number))
  return key


def _until_misclassified(objective: Any) -> Model:
  return losses.UntilMisclassified(objective, objective.logits_fn)
