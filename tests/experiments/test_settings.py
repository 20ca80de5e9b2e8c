"""Flags, limits and their errors: one line that names the flag, before anything is written."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from absl import flags as absl_flags

from experiments import figure1, pretrain, probe_settings
from experiments.cli import devices, distributed, flags
from se_vae.config import ArgumentError, ModelConfig, TrainConfig, setting, validate
from se_vae.storage import json_files

BINARIES = {'pretrain': pretrain.PretrainConfig, 'probe': probe_settings.ProbeConfig}
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Example:
  count: int = setting(3, 'A number.', at_least=1)
  rate: float | None = setting(None, 'A rate.', above=0, at_most=1)
  kind: str = setting('red', 'A kind.', choices=('red', 'blue'))
  values: tuple[float, ...] = setting((0.5, 1.0), 'Some values.', at_least=0)


@dataclasses.dataclass(frozen=True)
class Other:
  flag: bool = setting(False, 'A switch.')
  name: str = setting('x', 'A name.')


def test_defaults_are_within_their_limits():
  for config_type in (Example, *BINARIES.values(), figure1.Figure1Config, distributed.Cluster):
    validate(config_type())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'count': 0}, 'count: must be >= 1; got 0'),
    ({'count': 2.5}, 'count: must be an integer; got 2.5'),
    ({'count': np.float32(2.0)}, 'count: must be an integer; got 2.0'),
    ({'count': np.int64(0)}, 'count: must be >= 1; got 0'),
    ({'count': np.int64(2**31)}, 'count: must be <= 2147483647; got 2147483648'),
    ({'count': None}, 'count: must be an integer; got None'),
    ({'count': (1, 2)}, 'count: must be one value; got (1, 2)'),
    ({'rate': '1'}, "rate: must be a number; got '1'"),
    ({'rate': np.float32('nan')}, 'rate: must be finite; got nan'),
    ({'kind': None}, 'kind: must be one of red, blue; got None'),
    ({'count': True}, 'count: must be an integer; got True'),
    ({'rate': True}, 'rate: must be a number; got True'),
    ({'values': 0.5}, 'values: must be a tuple; got 0.5'),
    ({'values': [0.5]}, 'values: must be a tuple; got [0.5]'),
    ({'rate': 0.0}, 'rate: must be > 0; got 0.0'),
    ({'rate': 1.5}, 'rate: must be <= 1; got 1.5'),
    ({'rate': float('nan')}, 'rate: must be finite; got nan'),
    ({'kind': 'green'}, "kind: must be one of red, blue; got 'green'"),
    ({'values': (0.1, -2.0)}, 'values: must be >= 0; got -2.0'),
    ({'values': ()}, 'values: needs at least one value'),
    ({'count': 2**31}, 'count: must be <= 2147483647; got 2147483648'),
    (
      {'rate': 1e-300},
      'rate: must be of a size between 1.2e-38 and 1.7e+38, as float32 holds; got 1e-300',
    ),
    (
      {'values': (0.0, 1e300)},
      'values: must be of a size between 1.2e-38 and 1.7e+38, as float32 holds; got 1e+300',
    ),
  ],
)
def test_values_outside_their_limits_are_named(change, message):
  with pytest.raises(ArgumentError) as error:
    validate(Example(**change))
  assert str(error.value) == message
  assert flags.name_flags(error.value) == f'--{message}'


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'flag': 'no'}, "flag: must be True or False; got 'no'"),
    ({'flag': None}, 'flag: must be True or False; got None'),
    ({'name': 5}, 'name: must be text; got 5'),
    ({'name': None}, 'name: must be text; got None'),
  ],
)
def test_switches_and_text_are_of_their_types(change, message):
  with pytest.raises(ArgumentError) as error:
    validate(Other(**change))
  assert str(error.value) == message


def test_scalars_of_numpy_and_jax_become_numbers(tmp_path):
  config = TrainConfig(
    gamma=np.logspace(0.0, 2.0, 3)[1],
    radius=jnp.float32(0.25),
    pgd_steps=np.int64(5),
    warm_start=np.bool_(True),
  )
  plain = TrainConfig(gamma=10.0, radius=0.25, pgd_steps=5, warm_start=True)
  assert config == plain
  stored = flags.to_dict(pretrain.PretrainConfig(train=config, workdir=str(tmp_path)))
  assert json.loads(json_files.dumps(stored)) == json.loads(
    json_files.dumps(flags.to_dict(pretrain.PretrainConfig(train=plain, workdir=str(tmp_path))))
  )
  example, other = Example(values=tuple(np.linspace(0.0, 1.0, 3))), Other(name=tmp_path)
  validate(example)
  validate(other)
  assert [type(value) for value in example.values] == [float] * 3 and other.name == str(tmp_path)


def test_groups_of_settings_are_settings():
  with pytest.raises(ArgumentError, match="train: must be a TrainConfig; got 'x'"):
    pretrain.PretrainConfig(train='x')


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'objective': 5}, 'objective: must be one of'),
    ({'norm': max}, 'norm: must be one of linf, l2'),  # a function is an objective alone
    ({'objective': 'clusters', 'attack_dtype': 'bfloat16'}, 'attack_dtype: needs objective'),
    ({'objective': 'vae', 'selection_distance': 'mean_distance'}, 'selection_distance: needs'),
  ],
)
def test_settings_that_would_be_ignored_are_refused(settings, message):
  with pytest.raises(ArgumentError, match=message):
    TrainConfig(**settings)


@pytest.mark.parametrize('objective', ['se', 'se_avae', max])
def test_settings_of_the_selection_are_for_those_that_select_by_distance(objective):
  config = TrainConfig(
    objective=objective, attack_dtype='bfloat16', selection_distance='mean_distance'
  )
  assert config.attack_dtype == 'bfloat16'


def test_more_steps_need_a_constant_rate_and_no_ramp():
  def longer(**train):
    before = flags.from_dict(pretrain.PretrainConfig, {'num_steps': 10, 'objective': 'se', **train})
    now = dataclasses.replace(before, train=dataclasses.replace(before.train, num_steps=20))
    pretrain._check_same_settings({'config': flags.to_dict(before)}, now)

  longer(schedule='constant')
  for train in ({'schedule': 'cosine'}, {'schedule': 'constant', 'ramp': 0.5}):
    with pytest.raises(ArgumentError, match='num_steps was 10, now 20'):
      longer(**train)


def test_directories_that_are_recorded_are_absolute(monkeypatch, tmp_path):
  monkeypatch.chdir(tmp_path)
  monkeypatch.setenv('HOME', '/home/of/test')
  text = '--workdir=run --data_dir=data --init_from=../vae --cache_dir=~/cache'
  config = flags.parse(pretrain.PretrainConfig, text, '--flags')
  assert (config.workdir, config.data.data_dir) == ('run', str(tmp_path / 'data'))
  assert (config.init_from, config.data.cache_dir) == (
    str(tmp_path.parent / 'vae'),
    '/home/of/test/cache',
  )
  before = flags.to_dict(config) | {'init_from': '../vae'}  # as earlier versions recorded it
  pretrain._check_same_settings({'config': before}, config)
  values = absl_flags.FlagValues()
  flags.define_flags(probe_settings.ProbeConfig, values)
  values(['', '--data_dir=data', '--surrogate='])
  parsed = flags.from_flags(probe_settings.ProbeConfig, values)
  assert (parsed.data_dir, parsed.surrogate) == (str(tmp_path / 'data'), '')
  name = 'mnist_mlp_vae_latent128'  # of a pretrained encoder, and of no directory of data
  values(['', f'--data_dir={name}', f'--surrogate={name}'])
  parsed = flags.from_flags(probe_settings.ProbeConfig, values)
  assert (parsed.data_dir, parsed.surrogate) == (str(tmp_path / name), name)
  values(['', f'--surrogate=./{name}'])
  assert flags.from_flags(probe_settings.ProbeConfig, values).surrogate == str(tmp_path / name)


def test_json_round_trip():
  config = Example(count=5, rate=0.25, values=(1.0, 2.0))
  assert flags.from_dict(Example, flags.to_dict(config)) == config


def test_flags_carry_every_field():
  values = absl_flags.FlagValues()
  flags.define_flags(Example, values)
  values(['program', '--count=7', '--rate=0.5', '--kind=blue', '--values=0,0.25'])
  assert flags.from_flags(Example, values) == Example(7, 0.5, 'blue', (0.0, 0.25))
  values(['program', '--values=0,x'])
  with pytest.raises(ArgumentError, match='values: must be numbers'):
    flags.from_flags(Example, values)


# Each line is what a user might type; each must fail in one line that names the flag, with exit
# code 2, and leave no trace.
WRONG_COMMANDS = [
  ('pretrain', '--workdir={tmp}/w --dataset=imagenet', '--dataset'),
  ('pretrain', '--workdir={tmp}/w --dataset=mnist --data_dir={tmp}/nowhere', '--data_dir'),
  ('pretrain', '--workdir={tmp}/w --dataset=mnist --data_dir={tmp}', '--data_dir'),
  ('pretrain', '--workdir={tmp}/w --dataset=mnist', '--data_dir'),
  ('pretrain', '--workdir={tmp}/w --dataset=folder:{tmp}', '--dataset'),
  ('pretrain', '--workdir={tmp}/w --radius=-0.1', '--radius'),
  ('pretrain', '--workdir={tmp}/w --gamma=-1', '--gamma'),
  ('pretrain', '--workdir={tmp}/w --obs_var=0', '--obs_var'),
  ('pretrain', '--workdir={tmp}/w --obs_var=nan', '--obs_var'),
  ('pretrain', '--workdir={tmp}/w --num_steps=0', '--num_steps'),
  ('pretrain', '--workdir={tmp}/w --latent_dim=0', '--latent_dim'),
  ('pretrain', '--workdir={tmp}/w --batch_size=0', '--batch_size'),
  ('pretrain', '--workdir={tmp}/w --batch_size=4001', '--batch_size'),
  ('pretrain', '--workdir={tmp}/w --batch_size=many', '--batch_size'),
  ('pretrain', '--workdir={tmp}/w --num_devices=3', '--num_devices'),
  ('pretrain', '--workdir={tmp}/w --num_devices=100000', '--num_devices'),
  ('pretrain', '--workdir={tmp}/w --latent_dim=10000000', '--latent_dim, --hidden_units'),
  ('pretrain', '--workdir={tmp}/w --coordinator=localhost:1', '--process_id'),
  ('pretrain', '--workdir={tmp}/w --objective=gan', '--objective'),
  ('pretrain', '--workdir={tmp}/w --arch=transformer', '--arch'),
  ('pretrain', '--workdir={tmp}/w --gama=1', 'gama'),
  ('pretrain', '--workdir={tmp}/w --freeze_decoder', '--freeze_decoder'),
  ('pretrain', '--workdir={tmp}/w --init_from={tmp}/nowhere', '--init_from'),
  ('pretrain', '--workdir={tmp}/w now', "'now'"),
  ('pretrain', '--workdir={tmp}/w --kl_weight=2', '--kl_weight'),
  ('pretrain', '', '--workdir'),
  ('pretrain', '--workdir={tmp}/file/w', '--workdir'),
  ('probe', '--workdir={tmp}/w', '--workdir'),
  ('probe', '--workdir={tmp}/w --task=weather', '--task'),
  ('probe', '--workdir={tmp}/w --radii=0.1,-0.2', '--radii'),
  ('probe', '--workdir={tmp}/w --radii=0.1,much', '--radii'),
  ('probe', '--workdir={tmp}/w --restarts=0', '--restarts'),
  ('probe', '--workdir={tmp}/w --num_examples=0', '--num_examples'),
  ('figure1', '--workdir={tmp}/w --preset=huge', '--preset'),
  ('figure1', '--workdir={tmp}/w --preset=paper', '--data_dir'),
  ('figure1', '--workdir={tmp}/w --num_examples=1001', '--num_examples'),
  ('figure1', '--workdir={tmp}/w --seeds=0', '--seeds'),
  ('sweep', '--workdir={tmp}/w', '--vary'),
  ('sweep', '--workdir={tmp}/w --vary=gamma=x', '--vary'),
  ('supervised', '--workdir={tmp}/w --probe=--radi=1', '--probe'),
  ('supervised', '--workdir={tmp}/w --probe=--l2=2', '--probe'),
  ('supervised', '--workdir={tmp}/w --probe=--joint', '--probe'),
  ('supervised', '--workdir={tmp}/w --probe=--num_examples=1', '--num_examples'),
  ('supervised', '--workdir={tmp}/w --growth=2', '--growth'),
  ('supervised', '--workdir={tmp}/w --num_steps=0', '--num_steps'),
  ('supervised', '--workdir={tmp}/w --batch_size=4001', '--batch_size'),
  ('supervised', '--workdir={tmp}/w --dataset=mnist', '--data_dir'),
]


# Imports everything once, and runs each command in a process of its own, forked from that.
FORK = """
import json, os, runpy, sys
import jax, se_vae.training, se_vae.evaluation.robustness
from experiments import figure1, pretrain, probe, supervised, sweep

for module, arguments, directory in json.load(sys.stdin):
  if os.fork() == 0:
    for number, name in ((1, 'stdout'), (2, 'stderr')):
      os.dup2(os.open(f'{directory}/../{name}', os.O_WRONLY | os.O_CREAT), number)
    sys.argv = [module, *arguments]
    del sys.modules[module]
    code = 0
    try:
      runpy.run_module(module, run_name='__main__', alter_sys=True)
    except SystemExit as end:
      code = end.code
    sys.stdout.flush()
    os._exit(code)  # without the second that Python takes to clear its modules
  _, status = os.wait()
  print(os.waitstatus_to_exitcode(status), flush=True)
"""


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
  """Runs all wrong commands, and keeps what each printed and left behind."""
  lines, directories = [], []
  for binary, arguments, _ in WRONG_COMMANDS:
    directory = tmp_path_factory.mktemp('wrong') / 'files'
    directory.mkdir()
    (directory / 'file').touch()
    directories.append(directory)
    words = arguments.format(tmp=directory).split()
    lines.append((f'experiments.{binary}', words, str(directory)))
  forked = subprocess.run(
    [sys.executable, '-c', FORK],
    cwd=ROOT,
    env=os.environ | {'XDG_CACHE_HOME': str(tmp_path_factory.mktemp('nothing_downloaded'))},
    input=json.dumps(lines),
    capture_output=True,
    text=True,
    check=True,
  )
  assert forked.stderr == ''
  found = {}
  for command, code, directory in zip(
    WRONG_COMMANDS, forked.stdout.split(), directories, strict=True
  ):
    printed = [(directory.parent / name).read_text() for name in ('stdout', 'stderr')]
    left = sorted(path.name for path in directory.iterdir())
    found[command] = (int(code), *printed, left)
  return found


@pytest.mark.parametrize('command', WRONG_COMMANDS, ids=lambda c: f'{c[0]} {c[1]}')
def test_wrong_commands_fail_in_one_line_and_leave_no_trace(outcomes, command):
  code, stdout, stderr, left = outcomes[command]
  # JAX 0.10.0 logs that programs from its cache were tuned for the processor.
  stderr = re.sub(r'^E\d{4} .*Loading XLA:CPU AOT result.*\n', '', stderr, flags=re.MULTILINE)
  assert code == 2, stderr
  assert stdout == ''
  assert len(stderr.splitlines()) == 1 and stderr.startswith('error: '), stderr
  assert command[2] in stderr
  assert left == ['file']


def test_too_many_devices_are_refused_before_jax_starts_them(monkeypatch):
  monkeypatch.setattr(devices, 'jax', None)
  with pytest.raises(ArgumentError, match='64 examples cannot be split evenly over 128 devices'):
    devices.use_all_cores(64, 128)


@pytest.mark.parametrize(
  ('settings', 'message'),
  [
    ({'latent_dim': 10**6}, r'latent_dim, hidden_units: training needs at least \S+ GiB of memory'),
    # From JAX 0.12 on such a shape can be described; before, describing it fails.
    (
      {'latent_dim': 2**31 - 1, 'covariance': 'full'},
      'latent_dim, hidden_units: (too large|training needs)',
    ),
    ({'arch': 'convnet', 'conv_channels': 10**5}, 'latent_dim, conv_channels: training needs'),
  ],
)
def test_a_model_larger_than_the_memory_is_refused_before_it_is_made(
  monkeypatch, settings, message
):
  monkeypatch.setattr(devices, '_host_memory', lambda: 2**30)
  mesh = devices.mesh_for(16, 1)
  with pytest.raises(ArgumentError, match=message):
    devices.check_memory(ModelConfig(**settings), (28, 28, 1), mesh)


@pytest.mark.parametrize(('part', 'weights'), [('encoder', 406), (None, 406 + 392)])
def test_a_model_that_just_fits_is_not_refused(monkeypatch, part, weights):
  """16 -> 8 -> 8 -> 8 -> 8 -> 6 and 3 -> 8 -> 8 -> 8 -> 8 -> 16, with biases, on two devices."""
  config = ModelConfig(latent_dim=3, hidden_units=8)
  needed = 2 * 4 * 4 * weights  # on each device parameters, gradients and two averages in float32
  check = functools.partial(
    devices.check_memory, config, (4, 4, 1), devices.mesh_for(16, 2), part=part
  )
  monkeypatch.setattr(devices, '_host_memory', lambda: needed)
  check()
  monkeypatch.setattr(devices, '_host_memory', lambda: needed - 1)
  with pytest.raises(ArgumentError, match='latent_dim'):
    check()


def test_limits_are_part_of_the_flag_reference():
  assert flags.reference(Example).splitlines()[2:] == [
    '| `--count` | `3` | A number. At least 1. |',
    '| `--rate` | | A rate. Above 0 and at most 1. |',
    '| `--kind` | `red` | A kind. One of `red`, `blue`. |',
    '| `--values` | `0.5,1.0` | Some values. At least 0. |',
  ]


def test_settings_of_all_parts_are_flags_with_one_flat_list_of_names():
  values = absl_flags.FlagValues()
  flags.define_flags(pretrain.PretrainConfig, values)
  values(['program', '--gamma=2', '--latent_dim=7', '--data_seed=3', '--seed=4'])
  config = flags.from_flags(pretrain.PretrainConfig, values)
  assert config.train == TrainConfig(gamma=2.0)
  assert (config.model.latent_dim, config.data.data_seed, config.seed) == (7, 3, 4)
  stored = flags.to_dict(config)
  assert stored['gamma'] == 2.0 and all(type(value) is not dict for value in stored.values())
  assert flags.from_dict(pretrain.PretrainConfig, stored) == config
  assert flags.replace(config, gamma=1.0).train == TrainConfig()
  with pytest.raises(TypeError, match='no setting gama'):
    flags.replace(config, gama=1.0)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'gamma': -1.0}, 'gamma: must be >= 0; got -1.0'),
    ({'obs_var': 0.0}, 'obs_var: must be > 0; got 0.0'),
    ({'num_steps': 0}, 'num_steps: must be >= 1; got 0'),
    ({'learning_rate': float('inf')}, 'learning_rate: must be finite; got inf'),
  ],
)
def test_the_library_refuses_what_the_binary_refuses(change, message):
  for make in (TrainConfig, lambda **changes: flags.replace(pretrain.PretrainConfig(), **changes)):
    with pytest.raises(ArgumentError) as error:
      make(**change)
    assert str(error.value) == message


def test_settings_of_an_older_version_are_understood():
  """Its pgd_step_size was absolute, and it could keep the training set on the devices."""
  old = flags.to_dict(pretrain.PretrainConfig()) | {'radius': 0.2, 'device_data_limit': 1024}
  del old['relative_step_size']
  for step_size, expected in ((None, None), (0.05, 0.25)):
    config = pretrain.stored_config(old | {'pgd_step_size': step_size})
    assert config.train == TrainConfig(relative_step_size=expected)
  config = pretrain.stored_config(old | {'pgd_step_size': 0.05, 'radius': 0.0})
  assert config.train == TrainConfig(radius=0.0)


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'gamma': 'x'}, "gamma: the value must be a number, got 'x'"),
    ({'pgd_steps': 2.5}, r'pgd_steps: the value must be an integer, got 2\.5'),
    ({'radius': -1}, 'radius: must be >= 0'),
    ({'workdir': ['a']}, 'workdir: the value must be a text'),
    ({'pgd_step_size': 'x'}, 'pgd_step_size must be a number'),
    ({'a\nb': 1}, 'PretrainConfig has no setting a b'),
  ],
)
def test_stored_settings_of_the_wrong_type_are_refused_in_a_line(change, message):
  stored = flags.to_dict(pretrain.PretrainConfig()) | change
  with pytest.raises(json_files.JsonError, match=f'^{message}') as error:
    pretrain.stored_config(stored)
  assert '\n' not in str(error.value)
