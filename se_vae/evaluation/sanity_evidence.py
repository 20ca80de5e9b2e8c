"""Gathers the figures of `checks`: attacks again, harder, weaker and otherwise."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from se_vae import attacks
from se_vae.attacks import losses
from se_vae.attacks.losses import Aim, Model, UntilBroken
from se_vae.evaluation import attack_suite, sanity_checks
from se_vae.evaluation.attack_log import Ledger
from se_vae.evaluation.batched_attacks import (
  Problem,
  aim_at,
  attempt,
  forward,
  in_batches,
  survivors,
)
from se_vae.evaluation.diagnostics import active_latents
from se_vae.evaluation.metrics import AdversarialAccuracy
from se_vae.evaluation.sanity_checks import Check
from se_vae.parallel import sharding

# Radii of check 4, as shares of the radius that takes every image to every other.
_LARGE = (0.5, 0.75, 1.0)


def audit(
  problem: Problem,
  table: tuple[attack_suite.Attack, ...],
  ledger: Ledger,
  accuracy: np.ndarray,
  interval: np.ndarray,
  radii: np.ndarray,
  config: dict[str, Any],
  *,
  count: int,
  num_steps: int,
  num_queries: int,
  representation: np.ndarray,
  reconstruct_fn: Model | None,
  surrogate: tuple[Model, tuple[Any, ...]] | None,
) -> tuple[Check, ...]:
  """Runs all checks of `checks`.

  Args:
    problem: the classifier and its examples.
    table: the attacks that the claim rests on.
    ledger: what they found.
    accuracy: the claim, `[R]`.
    interval: its interval, `[R, 2]`.
    radii: `[R]`, in any order.
    config: the reported hyper-parameters.
    count: the checks that attack do so on the first so many examples.
    num_steps: gradient steps of PGD.
    num_queries: of Square.
    representation: clean representations `[N, E]`, or logits of a classifier without.
    reconstruct_fn: images to reconstructions, if there is a decoder.
    surrogate: another classifier, with its arguments.
  """
  rows = np.arange(count)
  order = np.unique(radii)
  largest_share = float(np.bincount(problem.labels).max() / len(problem.labels))
  logits = forward(problem, problem.logits_fn, problem.x)
  clean_accuracy = float(_correct(logits, problem.labels).mean())
  wrong = ~_correct(forward(problem, problem.logits_fn, ledger.images), problem.labels)
  broken = np.isfinite(ledger.radius)

  # Each radius apart, whatever a smaller one broke: what monotony has to be seen on.
  curves = {
    attack.name: AdversarialAccuracy(
      order, np.stack([np.isin(rows, survivors(problem, (attack,), r, rows)) for r in order])
    )
    for attack in _reference(problem, num_steps, config['relative_step_size'])
  }
  pgd, fgsm = curves['pgd'].accuracy, curves['fgsm'].accuracy
  noise = {name: curves[name].accuracy for name in ('noise', 'signs')}
  if surrogate is not None:
    noise['transfer'] = _transfer(problem, surrogate, num_steps, order, rows)

  # Where about half of what is right is broken, more of it could be.
  at_order = ledger.survives(order).mean(axis=1)
  pivot = float(order[np.argmin(np.abs(at_order - 0.5 * clean_accuracy))])
  left = rows[ledger.radius[rows] > pivot]
  gradient = tuple(attack for attack in table if attack.gradients)
  fresh = dataclasses.replace(problem, key=jax.random.fold_in(problem.key, 1))
  # Other numbers of steps are other programs: of a long table only the strongest method's.
  doubled = tuple(
    dataclasses.replace(a, num_steps=2 * a.num_steps)
    for a in gradient
    if a.warm_start is None and a.method == gradient[-1].method
  )
  more = {
    name: len(left) - len(survivors(fresh, attempts, pivot, left)) if pivot > 0.0 else 0
    for name, attempts in (('steps', doubled), ('restarts', gradient))
  }
  return (
    sanity_checks.legality(problem.x, ledger.images, ledger.radius, problem.norm, problem.bounds),
    sanity_checks.rescoring(broken, wrong, clean_accuracy, float((ledger.radius > 0.0).mean())),
    sanity_checks.monotone(order, pgd, curves['pgd'].interval()),
    sanity_checks.large_radius(*_large_radii(problem, table, ledger, rows), largest_share),
    sanity_checks.iterative(pgd, fgsm, count),
    sanity_checks.converged(more['steps'], more['restarts'], count),
    sanity_checks.gradient_free(_square_alone(fresh, ledger, pivot, rows, num_queries), count),
    sanity_checks.weaker(pgd, noise, count),
    sanity_checks.healthy_gradients(_health(problem, gradient, pivot, rows)),
    sanity_checks.deterministic(
      logits[rows],
      forward(problem, problem.logits_fn, problem.x)[rows],
      forward(problem, problem.logits_fn, problem.x[::-1])[::-1][rows],
    ),
    sanity_checks.mean_of_minima(
      accuracy,
      interval,
      # From the images alone: how far each is from the original, and what it does.
      wrong[None] & (_recorded(ledger)[None] <= radii[:, None]),
      len(problem.x),
      config,
    ),
    sanity_checks.alive(
      _life(problem, clean_accuracy, representation, reconstruct_fn, rows), largest_share
    ),
  )


def _reference(
  problem: Problem, num_steps: int, step_share: float | None
) -> tuple[attack_suite.Attack, ...]:
  """The paper's attack with one start, one step, and what both must beat."""
  (pgd,) = attack_suite.standard(
    problem.logits_fn, num_steps=num_steps, restarts=1, step_share=step_share
  )
  return (
    dataclasses.replace(pgd, name='pgd'),
    attack_suite.Attack('fgsm', 'fgsm', losses.CrossEntropy(problem.logits_fn)),
    attack_suite.Attack('noise', 'noise'),
    attack_suite.Attack('signs', 'extreme_noise'),
  )


def _transfer(
  problem: Problem,
  surrogate: tuple[Model, tuple[Any, ...]],
  num_steps: int,
  radii: np.ndarray,
  rows: np.ndarray,
) -> np.ndarray:
  """Accuracy on what PGD finds for another classifier, `[R]`."""
  logits_fn, args = surrogate
  other = dataclasses.replace(
    problem, logits_fn=logits_fn, args=sharding.replicate(problem.mesh, args)
  )
  # To the end: what just breaks the other classifier transfers badly.
  attack = attack_suite.Attack(
    'transfer', 'pgd', losses.CrossEntropy(logits_fn), num_steps=num_steps
  )
  accuracy = []
  for radius in radii:
    images, _ = attempt(other, attack, float(radius), 0, rows)
    logits = forward(problem, problem.logits_fn, images)
    accuracy.append(_correct(logits, problem.labels[rows]).mean())
  return np.array(accuracy)


def _large_radii(
  problem: Problem, table: tuple[attack_suite.Attack, ...], ledger: Ledger, rows: np.ndarray
) -> tuple[list[float], list[float]]:
  """Radii from half the pixel range on, and the accuracy that the claim's attacks leave there."""
  span = problem.bounds[1] - problem.bounds[0]
  unit = span * (np.sqrt(problem.x[0].size) if problem.norm == 'l2' else 1.0)
  radii, accuracy = [], []
  left = rows[ledger.radius[rows] > _LARGE[0] * unit]
  for radius in (share * unit for share in _LARGE):
    left = survivors(problem, table, radius, left)
    radii.append(float(radius))
    accuracy.append(len(left) / len(rows))
    if not len(left):
      break
  return radii, accuracy


def _square_alone(
  problem: Problem, ledger: Ledger, radius: float, rows: np.ndarray, num_queries: int
) -> int:
  """How many of `rows` Square breaks at this radius and the claim's gradient attacks do not."""
  if problem.norm != 'linf':
    return -1
  credited = np.array([name == 'square' for name in ledger.names])[ledger.attack[rows]]
  before = int(np.sum(credited & (ledger.radius[rows] <= radius)))
  left = rows[ledger.radius[rows] > radius]
  attack = attack_suite.square_margin(problem.logits_fn, num_queries)
  return before + len(left) - len(survivors(problem, (attack,), radius, left))


def _health(
  problem: Problem, table: tuple[attack_suite.Attack, ...], radius: float, rows: np.ndarray
) -> dict[str, dict[str, float]]:
  """For each attack, the shares of examples in trouble at a random point of the ball."""
  rows = rows[_correct(forward(problem, problem.logits_fn, problem.x[rows]), problem.labels[rows])]
  if not len(rows):
    return {'none': {'examples that are right': 1.0}}
  noisy, _ = attempt(problem, attack_suite.Attack('health', 'noise'), radius, 0, rows)
  logits = forward(problem, problem.logits_fn, noisy)
  top = np.sort(logits, axis=1)[:, ::-1]
  loss = np.asarray(_cross_entropy(jnp.asarray(logits), problem.labels[rows]))
  finite = np.isfinite(logits).all(axis=1)
  shares = {
    'logits': {
      'tied': float(np.mean(top[:, 0] == top[:, 1])),
      'saturated': float(np.mean(loss == 0.0)),
      'not finite': float(np.mean(~finite)),
    }
  }
  for attack in table:
    objective = attack.objective
    assert objective is not None
    if isinstance(objective, UntilBroken):
      objective = objective.objective  # its gradient is zero where it has done its work
    gradients = functools.partial(_gradient_flags, objective, problem.args)
    flags = in_batches(problem, gradients, (noisy, aim_at(problem, attack, 0, rows)))
    shares[attack.name] = {name: float(flag.mean()) for name, flag in flags.items()}
  return shares


@functools.partial(jax.jit, static_argnames='objective')
def _gradient_flags(
  objective: Model, args: tuple[Any, ...], batch: tuple[jax.Array, Aim]
) -> dict[str, jax.Array]:
  """Whether each example's gradient is all zero, and whether any of it is NaN or infinite."""
  x, aim = batch
  objective, columns = attacks.on_columns(objective, x)
  gradient = attacks.values_and_gradients(objective, columns, (aim, *args))[1]
  return {
    'zero': (gradient == 0.0).all(axis=0),
    'NaN or Inf': ~jnp.isfinite(gradient).all(axis=0),
  }


@jax.jit
def _cross_entropy(logits: jax.Array, labels: jax.Array) -> jax.Array:
  return losses.CrossEntropy(lambda same: same)(logits, Aim(labels))


def _life(
  problem: Problem,
  clean_accuracy: float,
  representation: np.ndarray,
  reconstruct_fn: Model | None,
  rows: np.ndarray,
) -> dict[str, float]:
  """The figures of check 12."""
  spread = representation - representation.mean(axis=0)
  figures = {
    'clean_accuracy': clean_accuracy,
    'active_dimensions': float(active_latents(representation)),
    'latent_scale': float(np.sqrt((spread**2).sum(axis=1).mean())),
  }
  if reconstruct_fn is not None:
    x = problem.x[rows].reshape(len(rows), -1)
    reconstructed = forward(problem, reconstruct_fn, problem.x[rows]).reshape(x.shape)
    figures['squared_error'] = float(((x - reconstructed) ** 2).sum(axis=1).mean())
    figures['variance'] = float(((x - x.mean(axis=0)) ** 2).sum(axis=1).mean())
  return figures


def _recorded(ledger: Ledger) -> np.ndarray:
  """`[N]`: the radius of each example's image, inf where it is the clean one of a survivor."""
  return np.where(ledger.attack >= 0, ledger.radius, np.inf)


def _correct(logits: np.ndarray, labels: np.ndarray) -> np.ndarray:
  """`losses.is_correct`, again and in NumPy: a check shares no code with what it checks."""
  return np.isfinite(logits).all(axis=1) & (logits.argmax(axis=1) == labels)
