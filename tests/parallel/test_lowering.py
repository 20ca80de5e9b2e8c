"""Whole programs as they are compiled: their communication, and their form on each platform."""

from __future__ import annotations

import collections
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from se_vae import training
from se_vae.evaluation import attack_suite, linear_probe
from se_vae.models import vae
from se_vae.parallel import sharding
from se_vae.training import input_pipeline

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part

SHAPE, BATCH = (8, 8, 1), 8
KEY = jax.random.key(0)
CONFIG = training.TrainConfig(pgd_steps=3, num_steps=10)
COLLECTIVES = re.compile(
  r'\b(all-reduce|all-gather|all-to-all|reduce-scatter|collective-permute|collective-broadcast|'
  r'send|recv)(?:-start)?\('
)


def compiled_text(lowered: jax.stages.Lowered) -> str:
  """The compiled program, as XLA leaves it to LLVM; what LLVM does with it does not show there."""
  options = {'xla_backend_optimization_level': 0, 'xla_llvm_disable_expensive_passes': True}
  return lowered.compile(options).as_text()


def collectives(text: str) -> dict[str, int]:
  """How many there are of each in the compiled program."""
  return collections.Counter(COLLECTIVES.findall(text))


def tiny(arch: str) -> vae.VAE:
  return vae.make_vae(SHAPE, arch=arch, latent_dim=3, hidden_units=8, conv_channels=4, num_layers=2)


def zeros(shapes):
  return jax.tree.map(lambda leaf: np.zeros(leaf.shape, leaf.dtype), shapes)


_NAMED = r'replica_groups=mesh\[([^\]]+)\] \{([^}]+)\}'


def groups_of_all_reduces(text: str) -> list[list[list[int]]]:
  """Which devices each all-reduce of the compiled program adds up.

  The text says {{0,1},{2,3}}, [2,2]<=[4], or since JAX 0.12 mesh['population'=2,'data'=2] {'data'}.
  """
  listed = re.findall(r'replica_groups=\{((?:\{[\d,]+\},?)+)\}', text)
  counted = re.findall(r'replica_groups=\[(\d+),(\d+)\]<=\[\d+\]', text)
  groups = [[[*map(int, group.split(','))] for group in re.findall(r'[\d,]*\d', g)] for g in listed]
  ranges = [np.arange(int(g) * int(n)).reshape(int(g), int(n)).tolist() for g, n in counted]
  return groups + ranges + [_along(*named) for named in re.findall(_NAMED, text)]


def _along(mesh: str, axes: str) -> list[list[int]]:
  """The groups along some axes of a mesh, such as "'population'=2,'data'=2" and "'data'"."""
  sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh)}
  summed = [name for name in sizes if f"'{name}'" in axes]
  order = [list(sizes).index(name) for name in sizes if name not in summed]
  order += [list(sizes).index(name) for name in summed]
  devices = np.arange(np.prod([*sizes.values()])).reshape(*sizes.values()).transpose(order)
  return devices.reshape(-1, int(np.prod([sizes[name] for name in summed]))).tolist()


@functools.cache
def window_of_metrics():
  """One for all networks, whose metrics have the same names; a step is traced to learn them."""
  step = training.TrainStep(tiny('mlp'))
  state = zeros(jax.eval_shape(lambda: training.init_state(step.model, CONFIG, KEY)))
  return training.empty_window(step, state, (CONFIG, KEY), np.zeros((20, *SHAPE), np.uint8))


def train_arguments(model: vae.VAE, mesh: jax.sharding.Mesh) -> tuple:
  """Of `training.train_steps`, as `training.run` places them."""
  step, args = training.TrainStep(model), (CONFIG, KEY)
  state = zeros(jax.eval_shape(lambda: training.init_state(model, CONFIG, KEY)))
  images, indices = np.zeros((20, *SHAPE), np.uint8), np.zeros((5, BATCH), np.int32)
  chunk = input_pipeline.read_chunk(mesh, images, indices)
  state, window, args = sharding.replicate(mesh, (state, window_of_metrics(), args))
  return step, mesh, state, window, args, chunk.images, chunk.examples, np.int32(5)


def population_arguments(model: vae.VAE, mesh: jax.sharding.Mesh, size: int) -> tuple:
  """Of `training.train_steps`, as `training.run_population` places them."""

  def stack(tree):
    return jax.tree.map(lambda leaf: np.stack([leaf] * size), tree)

  step, config = training.TrainStep(model), jax.tree.map(jnp.asarray, CONFIG)
  state = zeros(jax.eval_shape(lambda: training.init_state(model, CONFIG, KEY)))
  images, indices = np.zeros((20, *SHAPE), np.uint8), np.zeros((size, 5, BATCH), np.int32)
  chunk = input_pipeline.read_chunk(mesh, images, indices)
  keys = jnp.stack([KEY] * size)
  state, window, config, counts = stack((state, window_of_metrics(), config, np.int32(5)))
  placed = sharding.replicate(mesh, (state, window, (config, keys), counts))
  state, window, args, counts = placed
  return step, mesh, state, window, args, chunk.images, chunk.examples, counts


def attack_arguments(model: vae.VAE, mesh: jax.sharding.Mesh, kind: type) -> tuple:
  """Of `attack_suite.run`, as an evaluation places them: an attack on a probed encoder."""
  params = zeros(jax.eval_shape(model.init, KEY))
  probe = linear_probe.LinearProbe(np.zeros((3, 10), np.float32), np.zeros(10, np.float32))
  suite = attack_suite.worst_case(
    linear_probe.ProbedEncoder(model),
    None,
    classes=10,
    num_classes=10,
    norm='linf',
    num_steps=3,
    restarts=1,
    num_queries=3,
  )
  attack = next(attack for attack in suite.attacks if isinstance(attack, kind))
  x = np.zeros((BATCH, *SHAPE), np.float32)
  index = np.arange(BATCH, dtype=np.int32)
  x, aim, index = sharding.split(mesh, (x, attack_suite.Aim(index, target=index), index))
  args = sharding.replicate(mesh, (params, probe))
  return attack, KEY, x, aim, index, jnp.float32(0.1), args


def test_a_step_averages_once_and_its_selection_not_at_all():
  """One all-reduce a step, of gradients and metrics together; everything else is a device's own."""
  arguments = train_arguments(tiny('mlp'), sharding.data_mesh(4))
  assert collectives(compiled_text(training.train_steps.lower(*arguments))) == {'all-reduce': 1}


@pytest.mark.parametrize(
  ('shape', 'vectorize', 'expected'),
  [
    pytest.param((4, 1), 'loop', [[0], [1], [2], [3]], marks=pytest.mark.slow),
    ((2, 2), 'vmap', [[0, 1], [2, 3]]),
  ],
)
def test_members_of_a_population_do_not_communicate(shape, vectorize, expected):
  """One all-reduce, over the devices that share a batch: of one device alone, it sends nothing."""
  mesh = sharding.population_mesh(*shape)
  arguments = population_arguments(tiny('mlp'), mesh, 4)
  text = compiled_text(training.train_steps.lower(*arguments, vectorize))
  assert collectives(text) == {'all-reduce': 1}
  assert groups_of_all_reduces(text) == [expected]


@pytest.mark.parametrize('kind', [attack_suite.PGD, attack_suite.APGD])
def test_attacks_of_an_evaluation_do_not_communicate(kind):
  arguments = attack_arguments(tiny('mlp'), sharding.data_mesh(4), kind)
  lowered = attack_suite.run.lower(*arguments, norm='linf', bounds=(0.0, 1.0))
  assert collectives(compiled_text(lowered)) == {}


PLATFORMS = ('cpu', 'cuda', 'tpu')


def assert_convolutions_are_native_but_on_cpu(jitted, *arguments, **options):
  """In the program for each platform alone, and in the one that `jax.export` makes for all."""
  trace = jitted.trace(*arguments, **options)
  for platform in PLATFORMS:
    text = trace.lower(lowering_platforms=(platform,)).as_text()
    assert ('stablehlo.convolution' in text) == (platform != 'cpu'), platform
    assert 'stablehlo.dot_general' in text  # the layers to and from the latents, at least
  exported = jax.export.export(jitted, platforms=PLATFORMS)(*arguments, **options)
  assert exported.platforms == PLATFORMS
  text = exported.mlir_module()
  assert 'stablehlo.convolution' in text and 'stablehlo.case' in text


@pytest.mark.slow  # that of a population does, below
def test_a_convnet_s_training_step_lowers_for_every_platform():
  arguments = train_arguments(tiny('convnet'), sharding.data_mesh(1))
  assert_convolutions_are_native_but_on_cpu(training.train_steps, *arguments)


def test_a_convnet_s_attack_lowers_for_every_platform():
  arguments = attack_arguments(tiny('convnet'), sharding.data_mesh(1), attack_suite.APGD)
  assert_convolutions_are_native_but_on_cpu(
    attack_suite.run, *arguments, norm='linf', bounds=(0.0, 1.0)
  )


@pytest.mark.parametrize('arch', [pytest.param('mlp', marks=pytest.mark.slow), 'convnet'])
def test_members_are_taken_at_once_but_on_cpu(arch):
  """Every product of the program for GPUs and TPUs is of all five members; on a CPU none is.

  A convolution is native there, as in a single run.
  """
  arguments = population_arguments(tiny(arch), sharding.population_mesh(1), 5)
  trace = training.train_steps.trace(*arguments)
  texts = {name: trace.lower(lowering_platforms=(name,)).as_text() for name in ('cpu', 'cuda')}
  exported = jax.export.export(training.train_steps, platforms=('cuda', 'tpu'))(*arguments)
  assert exported.platforms == ('cuda', 'tpu')
  for platform, text in {**texts, 'both': exported.mlir_module()}.items():
    products = re.findall(r'stablehlo\.dot_general.*?: \(tensor<(\d+)x\S*, tensor<(\d+)x', text)
    expected = {False} if platform == 'cpu' else {True}
    assert {'5' in sizes for sizes in products} == expected, platform
    native = arch == 'convnet' and platform != 'cpu'
    assert ('stablehlo.convolution' in text) == native, platform
