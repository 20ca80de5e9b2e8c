"""Flags, limits and their errors: one line that names the flag, before anything is written."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from pathlib import Path

import pytest
from absl import flags as absl_flags

from experiments import figure1, pretrain, probe
from experiments.cli import distributed, flags
from experiments.cli.flags import UsageError
from se_vae.config import setting, validate

BINARIES = {'pretrain': pretrain.PretrainConfig, 'probe': probe.ProbeConfig}
ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Example:
  count: int = setting(3, 'A number.', at_least=1)
  rate: float | None = setting(None, 'A rate.', above=0, at_most=1)
  kind: str = setting('red', 'A kind.', choices=('red', 'blue'))
  values: tuple[float, ...] = setting((0.5, 1.0), 'Some values.', at_least=0)


def test_defaults_are_within_their_limits():
  for config_type in (Example, *BINARIES.values(), figure1.Figure1Config, distributed.Cluster):
    validate(config_type())


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'count': 0}, '--count: must be >= 1; got 0'),
    ({'rate': 0.0}, '--rate: must be > 0; got 0.0'),
    ({'rate': 1.5}, '--rate: must be <= 1; got 1.5'),
    ({'rate': float('nan')}, '--rate: must be finite; got nan'),
    ({'kind': 'green'}, "--kind: must be one of red, blue; got 'green'"),
    ({'values': (0.1, -2.0)}, '--values: must be >= 0; got -2.0'),
    ({'values': ()}, '--values: needs at least one value'),
  ],
)
def test_values_outside_their_limits_are_named(change, message):
  with pytest.raises(UsageError) as error:
    validate(Example(**change))
  assert str(error.value) == message


def test_json_round_trip():
  config = Example(count=5, rate=0.25, values=(1.0, 2.0))
  assert flags.from_dict(Example, flags.to_dict(config)) == config


def test_flags_carry_every_field():
  values = absl_flags.FlagValues()
  flags.define_flags(Example, values)
  values(['program', '--count=7', '--rate=0.5', '--kind=blue', '--values=0,0.25'])
  assert flags.from_flags(Example, values) == Example(7, 0.5, 'blue', (0.0, 0.25))
  values(['program', '--values=0,x'])
  with pytest.raises(UsageError, match='--values: must be numbers'):
    flags.from_flags(Example, values)


# Each line is what a user might type; each must fail in one line that names the flag, with exit
# code 2, and leave no trace.
WRONG_COMMANDS = [
  ('pretrain', '--workdir={tmp}/w --dataset=imagenet', '--dataset'),
  ('pretrain', '--workdir={tmp}/w --dataset=mnist --data_dir={tmp}/nowhere', '--data_dir'),
  ('pretrain', '--workdir={tmp}/w --dataset=mnist --data_dir={tmp}', '--data_dir'),
  ('pretrain', '--workdir={tmp}/w --dataset=mnist', '--data_dir'),
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
  ('supervised', '--workdir={tmp}/w --growth=2', '--growth'),
  ('supervised', '--workdir={tmp}/w --num_steps=0', '--num_steps'),
  ('supervised', '--workdir={tmp}/w --batch_size=4001', '--batch_size'),
  ('supervised', '--workdir={tmp}/w --dataset=mnist', '--data_dir'),
]


@pytest.fixture(scope='module')
def outcomes(tmp_path_factory):
  """Runs all wrong commands, two at a time, and keeps what each printed and left behind."""
  running, finished = [], {}

  def collect():
    command, process, directory = running.pop(0)
    stdout, stderr = process.communicate(timeout=60)
    left = sorted(path.name for path in directory.iterdir())
    finished[command] = (process.returncode, stdout, stderr, left)

  for command in WRONG_COMMANDS:
    directory = tmp_path_factory.mktemp('wrong')
    (directory / 'file').touch()
    binary, arguments, _ = command
    line = [sys.executable, '-m', f'experiments.{binary}']
    line += arguments.format(tmp=directory).split()
    process = subprocess.Popen(
      line, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    running.append((command, process, directory))
    if len(running) == 2:
      collect()
  while running:
    collect()
  return finished


@pytest.mark.parametrize('command', WRONG_COMMANDS, ids=lambda c: f'{c[0]} {c[1]}')
def test_wrong_commands_fail_in_one_line_and_leave_no_trace(outcomes, command):
  code, stdout, stderr, left = outcomes[command]
  assert code == 2, stderr
  assert stdout == ''
  assert len(stderr.splitlines()) == 1 and stderr.startswith('error: '), stderr
  assert command[2] in stderr
  assert left == ['file']


def test_readme_lists_every_flag():
  readme = (ROOT / 'README.md').read_text()
  for config_type in (*BINARIES.values(), distributed.Cluster):
    for field in dataclasses.fields(config_type):
      assert f'`--{field.name}`' in readme, field.name
