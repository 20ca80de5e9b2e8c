"""The settings of a run: what each means, which values it may take, and their defaults.

Everything that lists the settings is derived from the dataclasses here: their validation, the flags
of the binaries with their help, and the flag reference in the documentation. This module imports
neither JAX nor any other module of the package, so that `--help` is answered at once.
"""

from __future__ import annotations

import dataclasses
import math
import numbers
import os
import re
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias, TypeVar

DATASETS = ('mnist', 'color_mnist', 'fashion_mnist', 'mnist_5k', 'color_mnist_5k')
ARCHS = ('mlp', 'convnet')
COVARIANCES = ('diagonal', 'full')
OBJECTIVES = ('vae', 'se', 'avae', 'se_avae', 'tc_vae', 'lipschitz', 'contrastive', 'clusters')
CLUSTERS_OF = ('pixels', 'brightness')
WITHOUT_DECODER = ('contrastive', 'clusters')  # these leave the decoder as it was drawn
COUPLINGS = ('paper', 'balanced')
SELECTION_DISTANCES = ('squared_w2', 'symmetric_kl', 'mean_distance')
SELECTIONS = ('pgd', 'interval', 'linear')
NORMS = ('linf', 'l2')
ATTACK_DTYPES = ('float32', 'bfloat16')
PRECISIONS = ('default', 'high', 'highest')
OPTIMIZERS = ('adam', 'sgd')
SCHEDULES = ('constant', 'cosine')
SUITES = ('standard', 'worst_case')

# What JAX's 32-bit arrays hold: a larger number would become another one, a smaller one 0.
LARGEST_INT = 2**31 - 1
_SMALLEST_FLOAT, _LARGEST_FLOAT = 2.0**-126, 2.0**127

Class = TypeVar('Class', bound=type)

# A name of OBJECTIVES, or a function (model, params, keys, x, x_adv) -> terms by name.
Objective: TypeAlias = str | Callable[..., Any]

# The objectives that a setting is for; with all others it keeps its default.
SMOOTH = ('se', 'se_avae')
_FOR = {
  'coupling': SMOOTH,
  'attack_dtype': SMOOTH,
  'selection_distance': SMOOTH,
  'ramp': ('avae', 'contrastive', 'clusters', *SMOOTH),
  'selection': ('se',),
  'kl_weight': ('vae', 'tc_vae'),
  'encoder_noise': ('vae',),
  'jacobian_weight': ('lipschitz',),
  'temperature': ('contrastive', 'clusters'),
  'clusters_of': ('clusters',),
}
# What a function in place of an objective uses too.
_FOR_ANY = ('ramp', 'attack_dtype', 'selection_distance')


class ArgumentError(ValueError):
  """An argument or setting has a value that cannot be used.

  Example:
    >>> error = ArgumentError(('batch_size', 'num_devices'), 'must divide evenly')
    >>> str(error)
    'batch_size, num_devices: must divide evenly'

  Attributes:
    arguments: the names of the arguments that have to change.
    message: one line that says which values are allowed.
  """

  def __init__(self, arguments: str | Sequence[str], message: str) -> None:
    super().__init__(arguments, message)
    self.arguments = (arguments,) if isinstance(arguments, str) else tuple(arguments)
    self.message = message

  def __str__(self) -> str:
    return f'{", ".join(self.arguments)}: {self.message}'


def setting(
  default: Any,
  description: str,
  *,
  choices: Sequence[str] | None = None,
  at_least: float | None = None,
  above: float | None = None,
  at_most: float | None = None,
  traced: bool = False,
) -> Any:
  """Returns a dataclass field with a default, a description and limits.

  Args:
    default: the default value.
    description: what the setting means, in one or two sentences.
    choices: the allowed values.
    at_least: the smallest allowed value.
    above: a number that the value must exceed.
    at_most: the largest allowed value.
    traced: whether a compiled training step takes the value as an argument. A change of any other
      setting compiles another program.
  """
  limits = {'choices': choices, 'at_least': at_least, 'above': above, 'at_most': at_most}
  return dataclasses.field(
    default=default, metadata={'help': description, 'traced': traced, **limits}
  )


def validate(config: Any) -> None:
  """Checks every field of a dataclass of settings against its limits.

  Limits apply to each item of a tuple. Every number must be one that JAX's 32-bit arrays hold.
  Fields that are dataclasses of settings themselves are checked too. Scalars of NumPy and JAX
  become Python's numbers, and paths become text, so that settings can be stored as JSON.

  Raises:
    ArgumentError: for the first field that is outside its limits, or of another type.
  """
  for field in dataclasses.fields(config):
    value = _plain(getattr(config, field.name))
    object.__setattr__(config, field.name, value)  # configs are frozen
    types = set(re.findall(r'\w+', str(field.type)))
    if dataclasses.is_dataclass(value):
      validate(value)
    elif not field.metadata:
      raise ArgumentError(field.name, f'must be a {field.type}; got {value!r}')
    elif value is None and 'None' in types:
      continue
    elif isinstance(value, tuple) != ('tuple' in types):
      raise ArgumentError(
        field.name, f'must be {"a tuple" if "tuple" in types else "one value"}; got {value!r}'
      )
    elif isinstance(value, tuple) and not value:
      raise ArgumentError(field.name, 'needs at least one value')
    else:
      for item in value if isinstance(value, tuple) else (value,):
        message = _violation(item, types, field.metadata)
        if message is not None:
          raise ArgumentError(field.name, f'must be {message}; got {item!r}')


def _plain(value: Any) -> Any:
  if isinstance(value, tuple):
    return tuple(map(_plain, value))
  if isinstance(value, os.PathLike):
    return os.fspath(value)
  is_scalar = getattr(value, 'shape', None) == () and hasattr(value, 'item')
  return value.item() if is_scalar else value


def _violation(value: Any, types: set[str], limits: Any) -> str | None:
  """Returns the type or limit that the value violates, in words, or None."""
  if callable(value) and 'Objective' in types:
    return None
  if limits['choices'] is not None and value not in limits['choices']:
    return f'one of {", ".join(limits["choices"])}'
  if 'bool' in types and not isinstance(value, bool):
    return 'True or False'
  if 'str' in types and not isinstance(value, str):
    return 'text'
  if 'int' in types and type(value) is not int:
    return 'an integer'
  if 'float' in types and type(value) not in (int, float):
    return 'a number'
  if isinstance(value, float) and not math.isfinite(value):
    return 'finite'
  if limits['at_least'] is not None and value < limits['at_least']:
    return f'>= {limits["at_least"]}'
  if limits['above'] is not None and value <= limits['above']:
    return f'> {limits["above"]}'
  if limits['at_most'] is not None and value > limits['at_most']:
    return f'<= {limits["at_most"]}'
  if isinstance(value, float) and value and not _SMALLEST_FLOAT <= abs(value) <= _LARGEST_FLOAT:
    return f'of a size between {_SMALLEST_FLOAT:.1e} and {_LARGEST_FLOAT:.1e}, as float32 holds'
  if type(value) is int and abs(value) > LARGEST_INT:
    return f'<= {LARGEST_INT}'
  return None


def check_counts(at_most: int | None = None, **counts: int) -> None:
  """Checks counts.

  Args:
    at_most: the largest that is allowed; any if None.
    **counts: the counts, by the names of the arguments.

  Raises:
    ArgumentError: naming the argument, unless each is an integer >= 1 and within the limit.
  """
  for name, count in counts.items():
    if not isinstance(count, numbers.Integral):
      raise ArgumentError(name, f'must be an integer, got {count!r}')
    if count < 1:
      raise ArgumentError(name, f'must be >= 1, got {count}')
    if at_most is not None and count > at_most:
      raise ArgumentError(name, f'must be <= {at_most}, got {count}')


def documented(config_type: Class) -> Class:
  """Adds the description of every field to the docstring of a dataclass of settings."""
  lines = [
    f'    {field.name}: {field.metadata["help"]}' for field in dataclasses.fields(config_type)
  ]
  config_type.__doc__ = '\n'.join([f'{config_type.__doc__}\n\n  Attributes:', *lines, '  '])
  return config_type


@documented
@dataclasses.dataclass(frozen=True)
class DataConfig:
  """The data set of a run."""

  dataset: str = setting(
    'mnist_5k', f'Data set: one of {", ".join(DATASETS)}, tfds:NAME, or folder:DIR with images.'
  )
  data_dir: str | None = setting(
    None, 'Directory of the IDX files, which are downloaded into it, or of the TFDS data set.'
  )
  cache_dir: str | None = setting(
    None, "Directory for decoded images; 'data' in the work directory if not given."
  )
  image_size: int | None = setting(
    None,
    'Resize the central square of each image of a tfds: or folder: set to this many pixels a side.',
    at_least=1,
    at_most=4096,
  )  # an image of three channels then has 48 MiB
  data_seed: int = setting(
    0, 'Seed of the colours of color_* data sets.', at_least=0, at_most=2**31 - 1
  )
  validation: bool = setting(
    False, 'Hold out a sixth of the training set and use it in place of the test set.'
  )

  def __post_init__(self) -> None:
    validate(self)


@documented
@dataclasses.dataclass(frozen=True)
class ModelConfig:
  """The networks of a model."""

  arch: str = setting('mlp', 'Architecture of the encoder and the decoder.', choices=ARCHS)
  latent_dim: int = setting(64, 'Latent dimensions; the paper uses 32, 64 and 128.', at_least=1)
  covariance: str = setting(
    'diagonal', 'Covariance of the encoder; the paper uses diagonal.', choices=COVARIANCES
  )
  hidden_units: int = setting(200, 'Units of each of the 4 layers of an MLP.', at_least=1)
  conv_channels: int = setting(
    200,
    'Channels of each of the 4 layers of a ConvNet; use 32 or fewer on a CPU. 200 need a smaller '
    'learning rate than the default, such as 0.0002.',
    at_least=1,
  )

  def __post_init__(self) -> None:
    validate(self)


@documented
@dataclasses.dataclass(frozen=True)
class TrainConfig:
  """The bound to maximise and the way to do it.

  The paper says that training uses SGD, and gives neither a learning rate nor a schedule. Adam with
  a cosine schedule, the default here, is this project's choice. The paper has the objective `se`
  with the coupling `paper`, beside `vae`, and the linf ball and the distance `squared_w2` for the
  selection. All other choices are additions of this project.

  Example:
    >>> TrainConfig(norm='l1')
    Traceback (most recent call last):
    se_vae.config.ArgumentError: norm: must be one of linf, l2; got 'l1'
  """

  objective: Objective = setting(
    'se',
    'What to train: the SE-ELBO (se), the ELBO (vae), or one of the objectives to compare with. '
    'In Python also a function (model, params, keys, x, x_adv) -> terms.',
    choices=OBJECTIVES,
  )
  gamma: float = setting(1.0, 'Coupling strength of se, avae and se_avae.', at_least=0, traced=True)
  coupling: str = setting(
    'paper', "Coupling of z and z' of se and se_avae: Eq. 2, or balanced.", choices=COUPLINGS
  )
  obs_var: float = setting(
    0.1,
    'Observation noise variance v of the decoder; the paper does not give it.',
    above=0,
    traced=True,
  )
  selection: str = setting(
    'pgd',
    "What stands for q(z | x') in the SE-ELBO: the encoding of the x' that PGD selects, or the "
    "worst encoding within bounds, interval or linear, of those of all x' in the ball.",
    choices=SELECTIONS,
  )
  certified_weight: float = setting(
    1.0,
    'Weight of the SE-ELBO with the bounds of selection interval or linear. The SE-ELBO with the '
    "x' of PGD has the rest.",
    at_least=0,
    at_most=1,
    traced=True,
  )
  certified_radius: float | None = setting(
    None,
    'Radius of the ball that selection interval or linear bounds; radius if not given. At most 1 '
    'for linf.',
    at_least=0,
    traced=True,
  )
  certified_share: float = setting(
    1.0,
    'Size of the bounded ball, as a share of the whole one. Below 1, a smaller linf ball around '
    "the x' of PGD is bounded, inside the whole one.",
    above=0,
    at_most=1,
    traced=True,
  )
  ramp: float = setting(
    0.0,
    'Share of the training steps during which gamma and the radii grow from 0 to their values.',
    at_least=0,
    at_most=1,
    traced=True,
  )
  radius: float = setting(
    0.2,
    'Radius of the selection, for pixels in [0, 1]; at most 1 for linf.',
    at_least=0,
    traced=True,
  )
  norm: str = setting('linf', 'Norm of the ball of the selection.', choices=NORMS)
  selection_distance: str = setting(
    'squared_w2',
    "What the selection of se and se_avae maximises between the encodings of x and x'. "
    'mean_distance is the squared distance of their means.',
    choices=SELECTION_DISTANCES,
  )
  pgd_steps: int = setting(20, 'Gradient steps L of the selection.', at_least=1)
  relative_step_size: float | None = setting(
    None,
    'Step size of the selection, as a share of the radius; 2.5 / pgd_steps if not given.',
    above=0,
    traced=True,
  )
  warm_start: bool = setting(
    False,
    "Start each example's selection where its selection an epoch ago ended, and not at random.",
  )
  attack_dtype: str = setting(
    'float32',
    'Precision of the encoder within the selection of se and se_avae.',
    choices=ATTACK_DTYPES,
  )
  optimizer: str = setting('adam', 'Optimizer; the paper uses SGD.', choices=OPTIMIZERS)
  momentum: float = setting(0.9, 'Momentum of sgd.', at_least=0, at_most=1, traced=True)
  learning_rate: float = setting(
    1e-3, 'Largest learning rate of the schedule.', above=0, traced=True
  )
  schedule: str = setting(
    'cosine', 'Learning rate over time: constant, or a cosine to 0.', choices=SCHEDULES
  )
  num_steps: int = setting(
    10_000, 'Training steps; the paper takes 300,000.', at_least=1, traced=True
  )
  freeze_decoder: bool = setting(
    False, 'Train the encoder alone, and keep the decoder that training starts with.'
  )
  kl_weight: float = setting(
    1.0,
    'Weight of the KL divergence of vae (a beta-VAE), or of the total correlation of tc_vae.',
    at_least=0,
    traced=True,
  )
  encoder_noise: float = setting(
    0.0,
    'Half-width of the uniform noise on the pixels that the encoder of vae sees: a denoising VAE.',
    at_least=0,
    at_most=1,
    traced=True,
  )
  jacobian_weight: float = setting(
    0.01,
    "Weight of the squared Frobenius norm of the encoder mean's Jacobian, for lipschitz.",
    at_least=0,
    traced=True,
  )
  temperature: float = setting(
    0.5, 'Temperature of the softmax of contrastive and clusters.', above=0, traced=True
  )
  clusters_of: str = setting(
    'pixels',
    'What clusters compares images by: their pixels, or their brightness, the maximum over the '
    'channels of each pixel.',
    choices=CLUSTERS_OF,
  )

  def __post_init__(self) -> None:
    validate(self)
    for name in ('radius', 'certified_radius'):
      if self.norm == 'linf' and (getattr(self, name) or 0.0) > 1.0:
        raise ArgumentError(name, f"must be <= 1 for norm 'linf'; got {getattr(self, name)}")
    selects = self.objective in SMOOTH or callable(self.objective)
    if self.warm_start and not (selects and self.radius > 0.0):
      raise ArgumentError('warm_start', "needs objective 'se' or 'se_avae', and a radius > 0")
    attacks = self.selection == 'pgd' or min(self.certified_weight, self.certified_share) < 1.0
    if self.warm_start and not attacks:
      raise ArgumentError('warm_start', 'needs a certified_weight or certified_share below 1')
    defaults = {field.name: field.default for field in dataclasses.fields(self)}
    for name in ('certified_weight', 'certified_radius', 'certified_share'):
      if self.selection == 'pgd' and getattr(self, name) != defaults[name]:
        raise ArgumentError(name, "needs selection 'interval' or 'linear'")
    if self.norm == 'l2' and self.certified_share != 1.0:
      raise ArgumentError('certified_share', "needs norm 'linf'")
    for name, objectives in _FOR.items():
      is_for = self.objective in objectives or (name in _FOR_ANY and callable(self.objective))
      if not is_for and getattr(self, name) != defaults[name]:
        raise ArgumentError(name, f'needs objective {" or ".join(map(repr, objectives))}')
