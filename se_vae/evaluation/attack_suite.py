"""The attacks of an evaluation, as a table: what runs, from what start, how often, at what cost."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from typing import Any, NamedTuple

import jax
import numpy as np

from se_vae import attacks
from se_vae.attacks import auto_pgd, losses, projections, square_attack
from se_vae.attacks.losses import Aim, Model
from se_vae.attacks.projections import Norm

# Classes that a latent-targeted attack tries, nearest first: each is a whole attack of its own.
_LATENT_TARGETS = 3
_GREYS = 5


@dataclasses.dataclass(frozen=True)
class Attack:
  """One row of the table. Hashable: a static argument of `run`.

  Attributes:
    name: unique in a suite; part of the attack's randomness.
    method: 'pgd', 'apgd', 'fgsm', 'square', 'noise', 'extreme_noise' or 'image' (`aim.image`
      clipped to the ball).
    objective: what it maximises, unless it is noise or an image.
    warm_start: what PGD maximises first, to find the start of 'apgd'; a random start if None.
    num_steps: gradient steps, or queries of 'square'.
    tries: how many times, each with a key and a target of its own.
    target: what the tries aim at: '', 'class', 'centroid', 'encoding', 'self' or 'candidate'.
    step_share: length of a step of 'pgd' as a share of the radius; `attacks.pgd`'s rule if None.
  """

  name: str
  method: str
  objective: Model | None = None
  warm_start: Model | None = None
  num_steps: int = 1
  tries: int = 1
  target: str = ''
  step_share: float | None = None

  @property
  def gradients(self) -> int:
    """Gradients that one try takes on each example."""
    if self.method in ('square', 'noise', 'extreme_noise', 'image'):
      return 0
    warm = self.num_steps if self.warm_start is not None else 0
    return warm + self.num_steps + (self.method == 'apgd')

  @property
  def forwards(self) -> int:
    """Forward passes without a gradient that one try takes, that which scores it included."""
    extra = {'pgd': 1, 'square': self.num_steps}.get(self.method, 0)
    return 1 + extra + (self.warm_start is not None)


def standard(
  logits_fn: Model, *, num_steps: int, restarts: int, step_share: float | None = None
) -> tuple[Attack, ...]:
  """The paper's attack: PGD on the cross-entropy."""
  objective = losses.CrossEntropy(logits_fn)
  return (
    Attack(
      'pgd_cross_entropy',
      'pgd',
      _until(objective),
      num_steps=num_steps,
      tries=restarts,
      step_share=step_share,
    ),
  )


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
  step_share: float | None = None,
) -> tuple[Attack, ...]:
  """Everything there is, the cheap first: what they break, the dear need not attack.

  Args:
    logits_fn: the classifier.
    latents_fn: its representation, for attacks that aim there; none of them if None.
    classes: how many classes the evaluated examples have.
    num_classes: K, how many the classifier knows.
    norm: of the ball; Square is for 'linf' alone.
    num_steps: gradient steps of each try.
    restarts: tries of the untargeted attacks.
    num_queries: of Square.
    step_share: of PGD.
  """
  by_name: dict[str, Model] = {
    'cross_entropy': losses.CrossEntropy(logits_fn),
    'margin': losses.Margin(logits_fn),
  }
  if num_classes >= 3:
    by_name['dlr'] = losses.DLR(logits_fn)
  steps: dict[str, Any] = {'num_steps': num_steps}
  table = [
    Attack('noise', 'noise'),
    Attack('extreme_noise', 'extreme_noise'),
    Attack('candidates', 'image', tries=_GREYS + classes - 1, target='candidate'),
    Attack('fgsm', 'fgsm', by_name['cross_entropy']),
  ]
  for method in ('pgd', 'apgd'):
    table += [
      Attack(
        f'{method}_{name}', method, _until(loss), tries=restarts, step_share=step_share, **steps
      )
      for name, loss in by_name.items()
    ]
  table.append(
    Attack(
      'apgd_targeted',
      'apgd',
      _until(losses.Targeted(logits_fn)),
      tries=num_classes - 1,
      target='class',
      **steps,
    )
  )
  if latents_fn is not None:
    nearest = min(classes - 1, _LATENT_TARGETS)
    move = losses.LatentMove(latents_fn)
    towards = losses.LatentTarget(latents_fn)
    for name, warm_start, tries, target in (
      ('latent_centroid', towards, nearest, 'centroid'),
      ('latent_encoding', towards, nearest, 'encoding'),
      ('latent_w2', move, restarts, 'self'),
    ):
      if tries:
        loss = _until(by_name['margin'])
        table.append(Attack(name, 'apgd', loss, warm_start, tries=tries, target=target, **steps))
  if norm == 'linf':
    table.append(square_margin(logits_fn, num_queries))
  return tuple(table)


def square_margin(logits_fn: Model, num_queries: int) -> Attack:
  """Square on the margin."""
  return Attack('square', 'square', losses.Margin(logits_fn), num_steps=num_queries)


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
  """One try on a batch: x_adv of x's shape, legal as `attacks.pgd`'s. Radius and key are traced."""
  options: dict[str, Any] = {'radius': radius, 'bounds': bounds}
  if attack.method in ('noise', 'extreme_noise'):
    extreme = attack.method == 'extreme_noise'
    return attacks.noise(key, x, extreme=extreme, norm=norm, index=index, **options)
  if attack.method == 'image':
    assert aim.image is not None
    image = projections.project(
      projections.columns(aim.image), x=projections.columns(x), norm=norm, **options
    )
    return projections.images(image, x.shape)
  assert attack.objective is not None
  options['args'] = (aim, *args)
  if attack.method == 'square':
    return square_attack.square(
      attack.objective, key, x, num_queries=attack.num_steps, index=index, **options
    )
  options['norm'] = norm
  if attack.method == 'fgsm':
    return attacks.fgsm(attack.objective, key, x, **options)
  options |= {'num_steps': attack.num_steps, 'index': index}
  if attack.method == 'pgd':
    share = attack.step_share
    return attacks.pgd(
      attack.objective, key, x, relative_step_size=share, keep_best=True, **options
    )
  start = None
  if attack.warm_start is not None:
    start = attacks.pgd(attack.warm_start, key, x, keep_best=True, **options)
  return auto_pgd.apgd(attack.objective, key, x, start=start, **options)


def try_key(key: jax.Array, attack: Attack, radius: float, attempt: int) -> jax.Array:
  """The key of one try, whatever other attacks, radii and tries there are."""
  for number in (zlib.crc32(attack.name.encode()), np.float32(radius).view(np.uint32), attempt):
    key = jax.random.fold_in(key, np.uint32(number))
  return key


class Aims(NamedTuple):
  """What the attacks of a suite aim at, for N examples of C classes; see `find_aims`.

  Attributes:
    latents: `[N, E]`.
    centroids: `[C, E]`, of the classes in ascending order.
    by_centroid: `[N, C - 1]`, rows of centroids of other classes, nearest first.
    by_encoding: `[N, C - 1]`, of each other class the nearest example, nearest first.
    greys: `[G, ...]`, uniform images.
  """

  latents: np.ndarray
  centroids: np.ndarray
  by_centroid: np.ndarray
  by_encoding: np.ndarray
  greys: np.ndarray


def find_aims(
  x: np.ndarray, labels: np.ndarray, latents: np.ndarray, bounds: tuple[float, float]
) -> Aims:
  """Targets for every example.

  Args:
    x: images `[N, ...]`.
    labels: `[N]`.
    latents: representations `[N, E]`; of a classifier that has none, the pixels.
    bounds: lowest and highest pixel value.
  """
  latents = latents.reshape(len(x), -1)
  classes, own = np.unique(labels, return_inverse=True)
  members = [np.flatnonzero(labels == c) for c in classes]
  centroids = np.stack([latents[rows].mean(axis=0) for rows in members])
  distances = np.empty((len(x), len(classes)))
  nearest = np.empty((len(x), len(classes)), np.int64)
  to_centroid = _squared_distances(latents, centroids)
  for c, rows in enumerate(members):
    for start in range(0, len(x), 1000):  # all pairs at once would not fit into memory
      some = slice(start, start + 1000)
      squared = _squared_distances(latents[some], latents[rows])
      closest = squared.argmin(axis=1)
      nearest[some, c] = rows[closest]
      distances[some, c] = squared.min(axis=1)
  everyone = np.arange(len(x))
  distances[everyone, own] = to_centroid[everyone, own] = np.inf
  by_encoding = np.take_along_axis(nearest, distances.argsort(axis=1)[:, :-1], axis=1)
  levels = np.linspace(*bounds, _GREYS, dtype=x.dtype)
  greys = np.stack([np.full(x.shape[1:], level, x.dtype) for level in levels])
  by_centroid = to_centroid.argsort(axis=1)[:, :-1]
  return Aims(latents, centroids, by_centroid, by_encoding, greys)


def aim_at(
  aims: Aims | None,
  attack: Attack,
  attempt: int,
  rows: np.ndarray,
  x: np.ndarray,
  labels: np.ndarray,
  num_classes: int,
) -> Aim:
  """The aim of one try on the examples `rows`; `aims` may be None where it needs none."""
  labels = labels[rows]
  if not attack.target:
    return Aim(labels)
  if attack.target == 'class':
    return Aim(labels, target=(labels + 1 + attempt) % num_classes)
  assert aims is not None
  if attack.target == 'centroid':
    return Aim(labels, latent=aims.centroids[aims.by_centroid[rows, attempt]])
  if attack.target == 'encoding':
    return Aim(labels, latent=aims.latents[aims.by_encoding[rows, attempt]])
  if attack.target == 'self':
    return Aim(labels, latent=aims.latents[rows])
  if attempt < len(aims.greys):
    return Aim(labels, image=np.broadcast_to(aims.greys[attempt], x[rows].shape))
  return Aim(labels, image=x[aims.by_encoding[rows, attempt - len(aims.greys)]])


def _until(objective: Any) -> Model:
  return losses.UntilBroken(objective, objective.logits_fn)


def _squared_distances(a: np.ndarray, b: np.ndarray) -> np.ndarray:
  return (a**2).sum(1)[:, None] - 2.0 * a @ b.T + (b**2).sum(1)[None]
