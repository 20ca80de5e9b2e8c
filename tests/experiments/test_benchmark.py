"""What the benchmark counts, compares and writes; no test asserts a time."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from experiments.benchmarks import flops, peers, speed, torch_classifier, torch_twin, workloads
from experiments.benchmarks.workloads import Case
from experiments.cli import signals
from se_vae import training
from se_vae.config import ArgumentError
from se_vae.evaluation import linear_probe

DTYPE_PROMOTION = 'standard'  # optax takes part

TINY = Case('mlp', 'se', 16, latent_dim=3, pgd_steps=2, hidden_units=8, conv_channels=2)


def case(**changes) -> Case:
  return dataclasses.replace(TINY, **changes)


def test_operations_of_an_mlp_by_hand():
  """4 -> 8 -> 8 -> 8 -> 8 -> 6 and 3 -> 8 -> 8 -> 8 -> 8 -> 4, two operations a weight."""
  model = TINY.model((2, 2, 1))
  first, encoder, decoder = 4 * 8, 4 * 8 + 3 * 64 + 8 * 6, 3 * 8 + 3 * 64 + 8 * 4
  assert sum(flops.encoder_layers(model)) == 2 * encoder
  assert sum(flops.decoder_layers(model)) == 2 * decoder
  vae = 2 * (3 * encoder - first + 3 * decoder)
  assert flops.train_step(model, training.TrainConfig(objective='vae'), 5) == 5 * vae
  se = vae + 2 * (3 * encoder - first) + 7 * 2 * 2 * encoder
  config = training.TrainConfig(objective='se', pgd_steps=7)
  assert flops.train_step(model, config, 5) == 5 * se


def test_operations_of_a_convnet_by_hand():
  """Images of 5 x 6, then 3 x 3, 2 x 2, 1 x 1, 1 x 1; 9 products for each pair of channels."""
  model = case(arch='convnet').model((5, 6, 3))
  convolutions = [9 * 3 * 2 * 9, 9 * 2 * 2 * 4, 9 * 2 * 2, 9 * 2 * 2]
  assert flops.encoder_layers(model) == [2 * count for count in (*convolutions, 2 * 6)]
  assert flops.decoder_layers(model) == [2 * count for count in (3 * 2, *convolutions[::-1])]


@pytest.mark.long
@pytest.mark.parametrize(
  ('wide', 'compiled'),
  [
    (case(hidden_units=512, batch_size=128), True),
    (case(arch='convnet', objective='vae', conv_channels=64, batch_size=32), False),
  ],
)
def test_operations_agree_with_the_compiler(wide, compiled):
  """XLA counts activations, losses and the optimiser too: 1 to 3 % in layers this wide.

  The smallest layer left out, or counted twice, would be further off. XLA counts the body of a loop
  once: L is 1. A ConvNet takes long to compile: its VAE is counted before it is optimised.
  """
  wide = dataclasses.replace(wide, pgd_steps=1)
  model, config = wide.model((28, 28, 1)), wide.train_config()
  key = jax.eval_shape(lambda: jax.random.key(0))
  state = jax.eval_shape(functools.partial(training.init_state, model, config), key)
  x = jax.ShapeDtypeStruct((wide.batch_size, *model.image_shape), jnp.float32)
  lowered = jax.jit(functools.partial(training.train_step, model, config)).lower(state, key, x)
  program = lowered.compile() if compiled else lowered
  ratio = program.cost_analysis()['flops'] / flops.train_step(model, config, wide.batch_size)
  assert 1.0 < ratio < 1.03


def benched(images, **changes) -> workloads.Benched:
  return workloads.Benched(case(hidden_units=30, **changes), images)


@pytest.fixture
def small_images():
  return np.random.default_rng(0).integers(0, 256, (16, 14, 14, 2), np.uint8)


@pytest.fixture
def as_users_write():
  """Plain JAX adds a bias `[K]` to rows `[B, K]`."""
  with jax.numpy_rank_promotion('allow'):
    yield


@pytest.mark.long
@pytest.mark.usefixtures('as_users_write')
@pytest.mark.parametrize(
  ('name', 'arch', 'memory_format', 'objective'),
  [
    # A fast test of plain JAX's VAE is below.
    pytest.param('jax', 'mlp', torch_twin.FORMATS[0], 'vae', marks=pytest.mark.slow),
    pytest.param('jax', 'convnet', torch_twin.FORMATS[0], 'vae', marks=pytest.mark.slow),
    ('jax', 'mlp', torch_twin.FORMATS[0], 'se'),
    ('jax', 'convnet', torch_twin.FORMATS[0], 'se'),
    *(
      (name, arch, memory_format, objective)
      for name, arch, memory_format in (
        ('torch', 'mlp', torch_twin.FORMATS[0]),
        ('torch', 'convnet', torch_twin.FORMATS[0]),
        ('torch', 'convnet', torch_twin.FORMATS[1]),
        ('torch_written', 'mlp', torch_twin.FORMATS[0]),
      )
      for objective in ('vae', 'se')
    ),
  ],
)
def test_a_peer_takes_our_step(name, arch, memory_format, objective, small_images):
  """Selection, loss and gradient from the same parameters, images and random numbers."""
  if peers.KINDS[name].form is not None:
    pytest.importorskip('torch')
  ours = benched(small_images, arch=arch, objective=objective)
  peer = peers.make(name, ours, memory_format)
  arguments = (ours.model, ours.params, ours.config, small_images)
  assert max(peers.disagreement(peer, *arguments)) < 1e-5
  given = ours.params, ours.host_images
  before = jax.tree.map(np.array, given)
  peer.run(2)  # must not change the weights and the images that it was given
  jax.tree.map(np.testing.assert_array_equal, given, before)


@pytest.mark.slow
def test_a_compiled_peer_takes_our_step():
  """Its process raises AssertionError if it does not."""
  pytest.importorskip('torch')
  if not torch_twin.can_compile():
    pytest.skip('needs a C++ compiler')
  with peers.processes() as executors:
    (workload,) = peers.steps(executors, 'torch_compiled', TINY)
    workload.run(2)
  assert workload.first_seconds > 0.0


@pytest.mark.long
@pytest.mark.usefixtures('as_users_write')
def test_another_step_is_told_from_ours(small_images):
  ours = benched(small_images, objective='vae')
  peer = peers.make('jax', ours)
  arguments = peer, ours.model, ours.params
  assert max(peers.disagreement(*arguments, ours.config, small_images)) < 1e-5
  other = dataclasses.replace(ours.config, obs_var=1.1 * ours.config.obs_var)
  assert min(peers.disagreement(*arguments, other, small_images)) > 1e-4


@pytest.mark.slow
def test_the_binary_measures_what_it_is_asked_for(tmp_path, capsys):
  config = speed.BenchmarkConfig(
    workdir=str(tmp_path),
    sections=('steps', 'growth', 'profile', 'evaluation'),
    archs=('mlp',),
    objectives=('se',),
    batch_sizes=(16,),
    conv_batch_sizes=(16,),
    latent_dim=3,
    hidden_units=8,
    growth_batch_sizes=(16,),
    growth_latent_dims=(3,),
    growth_pgd_steps=(1,),
    roofline_sizes=(16, 32),
    num_examples=20,
    repeats=2,
    seconds=0.01,
  )
  (tmp_path / '.benchmark.json.7.tmp').touch()  # as a kill leaves it
  result = speed.run(config, signals.StopSignal())
  assert {path.name for path in tmp_path.iterdir()} == {'.lock', 'benchmark.json', 'benchmark.md'}
  assert json.loads((tmp_path / 'benchmark.json').read_text()) == result
  assert len(result['roofline']) == 4 and len(result['rows']) == 2 + 4 + 1
  for values in (*result['roofline'].values(), *(row['seconds'] for row in result['rows'])):
    assert len(values) == 2 and min(values) > 0.0
  counted = [row for row in result['rows'] if row['operations'] is not None]
  assert [row['kind'] for row in counted] == ['step', 'piece', 'piece', 'step']
  assert all(min(row['share']) > 0.0 for row in counted)
  whole, attack, gradient, _ = (row['operations'] for row in counted)
  assert whole == attack + gradient
  assert whole == flops.train_step(
    case(pgd_steps=20).model((28, 28, 1)), training.TrainConfig(pgd_steps=20), 16
  )
  tables = (tmp_path / 'benchmark.md').read_text()
  assert tables == capsys.readouterr().out
  assert '| MLP 8 SE, batch 16, latent 3, L 1 |' in tables and 'all-reduce' in tables


def test_operations_that_are_not_counted_are_not_shown():
  row = {'name': 'x', 'seconds': [0.1], 'cpu_seconds': [0.1], 'operations': None, 'share': None}
  cells = speed._step(row | {'temp_bytes': None, 'first_seconds': 1.0})
  assert len(cells) == len(speed._STEP_HEADER) and cells[3:7] == [''] * 4
  case = workloads.Case('mlp', 'contrastive', 4, 3, 2, 8, 8)
  assert case.name == 'MLP 8 CONTRASTIVE, batch 4, latent 3, L 2'


def test_peers_are_timed_in_processes_of_their_own(tmp_path):
  pytest.importorskip('torch')
  config = speed.BenchmarkConfig(
    workdir=str(tmp_path),
    sections=('peers',),
    peers=('jax', 'torch'),
    archs=('convnet',),
    objectives=('vae',),
    conv_batch_sizes=(16,),
    latent_dim=3,
    conv_channels=4,
    roofline_sizes=(16,),
    repeats=1,
    seconds=0.01,
  )
  result = speed.run(config, signals.StopSignal())
  assert [row['kind'] for row in result['rows']] == ['step', 'peer', 'peer', 'peer']
  assert all(min(row['seconds'][0], row['first_seconds']) > 0.0 for row in result['rows'])
  assert 'PyTorch, eager, channels last' in (tmp_path / 'benchmark.md').read_text()


def test_a_classifier_in_pytorch_is_ours():
  torch = pytest.importorskip('torch')
  model = TINY.model((6, 6, 2))
  params = jax.jit(model.init)(jax.random.key(0))
  rng = np.random.default_rng(0)
  weights = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
  fitted = linear_probe.LinearProbe(weights, jnp.arange(4.0))
  x = rng.uniform(size=(5, 6, 6, 2)).astype(np.float32)
  network = torch_classifier.build(torch, model, params, fitted)
  torch_classifier.check_same(torch, network, model, params, fitted, x)
  other = linear_probe.LinearProbe(weights, jnp.arange(4.0) + 1.0)
  with pytest.raises(AssertionError):
    torch_classifier.check_same(torch, network, model, params, other, x)


def test_only_legal_images_count_against_a_classifier():
  torch = pytest.importorskip('torch')
  x = torch.full((4, 1, 1, 1), 0.95)
  images = torch.tensor([0.85, 0.95, 0.8, 1.01]).reshape(4, 1, 1, 1)
  target = torch.zeros(4, dtype=torch.int64)

  def network(x):  # class 1 but at 0.95
    value = x.flatten(1)
    return torch.cat([torch.zeros_like(value), (value - 0.95).abs() - 0.01], dim=1)

  found = torch_classifier.misclassified(torch, network, 0.1, x, target, images)
  assert found.tolist() == [True, False, False, False]


@pytest.mark.slow
def test_the_worst_case_is_compared_with_autoattack(tmp_path):
  pytest.importorskip('torchattacks')
  config = speed.BenchmarkConfig(
    workdir=str(tmp_path),
    sections=('worst_case',),
    roofline_sizes=(16,),
    num_examples=40,
    attack_steps=2,
    attack_queries=10,
    repeats=1,
    seconds=0.01,
  )
  sides = speed.run(config, signals.StopSignal())['worst_case']
  assert list(sides) == ['our worst_case', 'AutoAttack']
  for side in sides.values():
    assert 0.0 < side['accuracy'] < 1.0 and len(side['seconds']) == 1
    # An image that stays robust is attacked towards 9 other classes, with 2 steps each.
    assert side['passes'] > 18.0
  assert '| AutoAttack |' in (tmp_path / 'benchmark.md').read_text()


def test_pytorch_is_asked_for_in_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  config = speed.BenchmarkConfig(workdir=str(tmp_path / 'w'), sections=('peers',))
  with pytest.raises(ArgumentError, match='peers: PyTorch needs `pip install torch`'):
    speed.run(config, signals.StopSignal())
  assert not (tmp_path / 'w').exists()


def test_a_compiler_is_asked_for_in_one_line(tmp_path, monkeypatch):
  pytest.importorskip('torch')
  monkeypatch.setenv('PATH', str(tmp_path))
  with pytest.raises(ArgumentError, match=r'torch_compiled needs a C\+\+ compiler'):
    peers.check(('torch_compiled',))


def test_batches_larger_than_the_data_are_refused(tmp_path):
  config = speed.BenchmarkConfig(workdir=str(tmp_path / 'w'), batch_sizes=(4001,))
  with pytest.raises(ArgumentError, match='batch_sizes: must be at most the 4000'):
    speed.run(config, signals.StopSignal())


@pytest.mark.parametrize('binary', speed._BINARIES)
def test_the_binaries_whose_start_is_measured_are_there(binary):
  assert importlib.util.find_spec(f'experiments.{binary}') is not None


@pytest.mark.slow
def test_start_up_is_measured(tmp_path):
  config = speed.BenchmarkConfig(
    workdir=str(tmp_path), sections=('startup',), roofline_sizes=(16,), repeats=1, seconds=0.01
  )
  startup = speed.run(config, signals.StopSignal())['startup']
  assert list(startup)[-1] == 'first step, warm cache'
  assert all(len(seconds) == 1 and seconds[0] > 0.0 for seconds in startup.values())
