"""The settings of a probe and its attack, which figure1, sweep and supervised take too."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

from etils import epy

from experiments.cli import flags
from experiments.cli.flags import UsageError
from se_vae.config import SUITES, ArgumentError, setting

with epy.lazy_imports():  # --help and wrong flags are answered without them
  import numpy as np

  from se_vae import data

TASKS = ('digit', 'color', 'label', 'parity', 'thickness', 'slant')
RADII = (0.0, 0.02, 0.05, 0.1, 0.15, 0.2, 0.25, 0.3)

CERTIFICATES = ('ibp', 'crown_ibp', 'crown')  # of se_vae.certification, which would import JAX

# Auto-PGD and Square hold a table with an entry for each step, which is a constant of the program.
MOST_STEPS = 1_000_000
MOST_RESTARTS = 10_000  # every attempt is listed before the first


@dataclasses.dataclass(frozen=True)
class ProbeConfig:
  """The flags of `experiments.probe`."""

  workdir: str | None = setting(None, 'Directory of a pretraining run.')
  pretrained: str | None = setting(
    None,
    'Name of a pretrained encoder, which is attacked in place of a run; needs --output. '
    'docs/pretrained_encoders.md has the names.',
  )
  output: str | None = setting(
    None, 'Directory for everything that this binary writes; --workdir if not given.'
  )
  dataset: str | None = setting(
    None, "Data set that the probe is fitted and attacked on; the run's own if not given."
  )
  data_dir: str | None = setting(None, "Directory of the data; the run's own if not given.")
  cache_dir: str | None = setting(
    None,
    "Directory for decoded images; the run's own, or 'data' in --output, if not given.",
  )
  task: str = setting('digit', 'What the probe predicts.', choices=TASKS)
  labels_per_class: int | None = setting(
    None,
    'Training examples of each class that the probe is fitted to, a random draw; all if not given.',
    at_least=1,
  )
  attack: str = setting(
    'standard', "The paper's PGD, or a suite of strong and varied attacks.", choices=SUITES
  )
  radii: tuple[float, ...] = setting(
    RADII, 'linf radii of the attack, for pixels in [0, 1].', at_least=0, at_most=1
  )
  pgd_steps: int = setting(40, 'Gradient steps of the attack.', at_least=1, at_most=MOST_STEPS)
  relative_step_size: float | None = setting(
    None, 'Step size as a share of the radius; 2.5 / pgd_steps if not given.', above=0
  )
  restarts: int = setting(
    1, 'Random starts of the attack at each radius.', at_least=1, at_most=MOST_RESTARTS
  )
  num_queries: int = setting(
    1000, 'Forward passes of the Square attack.', at_least=1, at_most=MOST_STEPS
  )
  check_examples: int = setting(
    200, 'Test examples that the sanity checks attack again; 0 for no checks.', at_least=0
  )
  surrogate: str | None = setting(
    None,
    'Directory of another run, or name of a pretrained encoder, whose adversarial examples check 8 '
    'uses.',
  )
  joint: bool = setting(False, 'Attack the probes of all tasks together too, for colour sets.')
  moves: bool = setting(False, 'Measure the largest latent shift, without labels.')
  certify: bool = setting(
    False,
    "Also find the accuracy that no attack can go below, and each example's certified radius.",
  )
  certify_method: str | None = setting(
    None,
    'How --certify bounds the encoder; if not given, crown for an MLP and crown_ibp for a ConvNet, '
    'which is faster and much looser.',
    choices=CERTIFICATES,
  )
  certify_slope_steps: int = setting(
    0,
    'Gradient steps on the slopes of the linear bounds of --certify (alpha-CROWN): tighter, and '
    'slower.',
    at_least=0,
    at_most=1000,
  )
  strict: bool = setting(False, 'Exit with code 1 if a check fails.')
  num_examples: int | None = setting(
    None, 'Test examples to attack, a fair sample of all; all if not given.', at_least=1
  )
  batch_size: int = setting(256, 'Examples attacked at a time; changes no result.', at_least=1)
  standardize: bool = setting(False, 'Standardise each latent before the fit, as in fit_probe.')
  l2: float = setting(1.0, 'Penalty of the probe, as in fit_probe.', above=0)
  seed: int = setting(
    0, 'Seed of the random starts and of the draw of labels.', at_least=0, at_most=2**31 - 1
  )


def parse(text: str, *, unused: tuple[str, ...] = ()) -> ProbeConfig:
  """The settings in the --probe flag of another binary, which sets the directories itself.

  Raises:
    UsageError: for a flag that is wrong, a directory, or one of the flags that are `unused` there.
  """
  config = flags.parse(ProbeConfig, text, '--probe')
  for name in ('workdir', 'dataset', 'data_dir', 'cache_dir'):
    if getattr(config, name) is not None:
      raise UsageError(f'--probe: --{name} is a flag of its own here')
  for name in given(config, ('output', 'pretrained', *unused)):
    raise UsageError(f'--probe: --{name} changes nothing here')
  return config


def given(config: ProbeConfig, names: Sequence[str]) -> list[str]:
  """Those of the named settings that are not at their defaults."""
  return [name for name in names if getattr(config, name) != getattr(ProbeConfig, name)]


def file_stem(config: ProbeConfig) -> str:
  """The name of a result's files without suffix, with what is not the default.

  Example:
    >>> file_stem(ProbeConfig(labels_per_class=10, attack='worst_case'))
    'probe_digit_10_labels_worst_case'
  """
  labels = '' if config.labels_per_class is None else f'_{config.labels_per_class}_labels'
  attack = '' if config.attack == 'standard' else f'_{config.attack}'
  return f'probe_{config.task}{labels}{attack}'


def fitted_rows(config: ProbeConfig, dataset: data.Dataset, task: str) -> np.ndarray:
  """The training examples that the probe for a task is fitted to."""
  labels, num_classes = dataset.train.labels[task], dataset.num_classes[task]
  return data.few_labels(labels, num_classes, config.labels_per_class, seed=config.seed)


def joint_tasks(dataset: data.Dataset) -> tuple[str, ...]:
  """The tasks that --joint attacks together: those of the data set itself."""
  return tuple(task for task in dataset.num_classes if task not in data.DERIVED_TASKS)


def check_data(config: ProbeConfig, dataset: data.Dataset) -> None:
  """Raises ArgumentError unless a data set has the tasks and the examples that are asked for.

  Args:
    config: the settings.
    dataset: `with_task` of them.
  """
  if config.task not in dataset.num_classes:
    tasks = ', '.join(data.tasks_of(dataset))
    raise ArgumentError('task', f'{dataset.name} has no task {config.task}; its tasks are {tasks}')
  joint = joint_tasks(dataset)
  for task in dict.fromkeys((config.task, *(joint if config.joint else ()))):
    missing = set(range(dataset.num_classes[task])) - set(dataset.train.labels[task].tolist())
    if missing:
      raise ArgumentError(
        'task',
        f'{dataset.name} has no training example of {task} '
        f'{", ".join(map(str, sorted(missing)))}, and names {dataset.num_classes[task]}',
      )
    fitted_rows(config, dataset, task)
  if config.joint and len(joint) < 2:
    raise ArgumentError('joint', f'needs several tasks; {dataset.name} has {joint[0]} alone')
  available = len(dataset.test.images)
  if config.num_examples is not None and config.num_examples > available:
    raise ArgumentError(
      'num_examples',
      f'must be at most the {available} test examples; got {config.num_examples}',
    )
  labels = dataset.test.labels[config.task][: config.num_examples]
  if (labels == labels[0]).all():
    raise ArgumentError('num_examples', f'is too small: all are of {config.task} {labels[0]}')
