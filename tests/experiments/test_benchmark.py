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

from experiments.benchmarks import flops, speed, torch_twin, workloads
from experiments.benchmarks.workloads import Case
from experiments.cli import signals
from se_vae import attacks, training
from se_vae.attacks import projections
from se_vae.config import ArgumentError
from se_vae.data.transforms import pixels

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


@pytest.mark.parametrize('memory_format', torch_twin.FORMATS)
@pytest.mark.parametrize('arch', ['mlp', 'convnet'])
@pytest.mark.parametrize('objective', ['vae', 'se'])
def test_the_twin_takes_the_same_step(arch, objective, memory_format):
  """Loss, gradient and selection of the same parameters, images and random numbers."""
  torch = pytest.importorskip('torch')
  small = dataclasses.replace(TINY, arch=arch, objective=objective, hidden_units=30)
  model, config = small.model((14, 14, 2)), small.train_config()
  params = jax.jit(model.init)(jax.random.key(0))
  images = np.random.default_rng(0).integers(0, 256, (16, *model.image_shape), np.uint8)
  twin = torch_twin.Twin(
    torch, model, params, config, images, np.arange(16)[None], memory_format=memory_format
  )
  assert workloads.twin_error(twin, model, params, config, images) < 1e-5
  if objective == 'vae':
    return
  x, key, index = pixels(images), jax.random.key(3), jnp.arange(16)
  q_a = model.encode(params, x)
  keys = attacks.example_keys(key, index)
  # Wide bounds leave the start unclipped: the twin takes offsets, and clips them itself.
  box = projections.Ball(x, jnp.float32(config.radius), 'linf', (-1.0, 2.0))
  ours = np.asarray(training.select(model, config, params, key, x, q_a, index=index))

  def place(images):
    return twin.place(np.asarray(images).reshape(x.shape))

  theirs = twin.select(place(x), place(box.random_points(keys) - x))
  same = np.isclose(place(ours).numpy(), theirs.detach().numpy(), atol=1e-5)
  assert same.mean() > 0.99  # a gradient of rounding's size may have either sign


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
  result = speed.run(config, signals.StopSignal())
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


def test_pytorch_is_timed_in_a_process_of_its_own(tmp_path):
  pytest.importorskip('torch')
  config = speed.BenchmarkConfig(
    workdir=str(tmp_path),
    sections=('torch',),
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
  assert [row['kind'] for row in result['rows']] == ['step', 'torch', 'torch']
  assert all(row['seconds'][0] > 0.0 for row in result['rows'])


def test_pytorch_is_asked_for_in_one_line(tmp_path, monkeypatch):
  monkeypatch.setitem(sys.modules, 'torch', None)
  config = speed.BenchmarkConfig(workdir=str(tmp_path / 'w'), sections=('torch',))
  with pytest.raises(ArgumentError, match='sections: torch needs `pip install torch`'):
    speed.run(config, signals.StopSignal())
  assert not (tmp_path / 'w').exists()


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
