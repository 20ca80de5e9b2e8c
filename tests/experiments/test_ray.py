"""A sweep on a Ray cluster: nodes that die, nodes that differ, addresses that do not answer."""

from __future__ import annotations

import gc
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import threading
import time
import warnings
from pathlib import Path

import pytest

from experiments import pretrain, probe_settings, sweep
from experiments.cli import devices, flags, signals
from experiments.scheduling import jobs, placement, ray_cluster
from se_vae.config import ArgumentError
from tests.experiments import scheduled

pytest.importorskip('ray')
import ray
from ray.cluster_utils import Cluster

RUNS = {'seed0', 'seed1'}
FLAGS = ('--vary=seed=0,1', '--num_steps=1500', '--checkpoint_every=100')
# Ray's own processes leave sockets to the garbage collector, and use what is deprecated.
pytestmark = [pytest.mark.long, pytest.mark.filterwarnings('ignore')]

os.environ['RAY_USAGE_STATS_ENABLED'] = '0'
os.environ['RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO'] = '0'


@pytest.fixture(scope='module')
def cluster():
  """A head with a core, where the tests run, to which nodes are added."""
  head = {'num_cpus': 1, 'include_dashboard': False}
  with warnings.catch_warnings():
    warnings.simplefilter('ignore')  # Ray leaves files to the garbage collector
    made = Cluster(initialize_head=True, head_node_args=head)
    yield made
    made.shutdown()
    del made
    gc.collect()


def train_here(workdir: Path, *flags: str) -> Path:
  """Runs without Ray, one after the other on a core; returns their directory."""
  code, _, err = scheduled.run(workdir, *flags, '--parallel=1', NPROC='1')
  assert code == 0, err
  return workdir


def alive(cluster: Cluster) -> set[str]:
  """The nodes of a cluster that answer, whoever has started them.

  Those that were killed a moment ago still count: a cluster takes its time to notice.
  """
  return {node['NodeID'] for node in cluster.global_state.node_table() if node['Alive']}


def starts(workdir: Path, run: str) -> list[int]:
  """The steps at which the attempts at a run have started to train."""
  text = (workdir / run / jobs.LOG).read_text()
  return [int(step) for step in re.findall(rf'^seed {run[-1]}: (\d+)/1500$', text, re.MULTILINE)]


@pytest.mark.slow
def test_a_node_that_dies_takes_no_run_with_it(cluster, tmp_path):
  local, tmp_path = train_here(tmp_path / 'local', *FLAGS), tmp_path / 'ray'
  node = cluster.add_node(num_cpus=1)
  process = scheduled.start(tmp_path, *FLAGS, f'--ray_address={cluster.address}')
  begun = [tmp_path / run / 'checkpoints' for run in ('seed0', 'seed1')]
  scheduled.wait_until(lambda: all(any(p.glob('*.safetensors')) for p in begun), process)
  cluster.remove_node(node, allow_graceful=False)
  code, out, err = scheduled.end(process)
  assert code == 0, err
  assert out.endswith('checks: not run\n')
  scheduled.assert_same_runs(tmp_path, local, RUNS)
  assert (tmp_path / 'sweep.csv').read_bytes() == (local / 'sweep.csv').read_bytes()
  # One of the runs was on the node that died, and went on from a checkpoint.
  begins = [starts(tmp_path, run) for run in sorted(RUNS)]
  again = [steps for steps in begins if len(steps) > 1]
  assert all(steps[0] == 0 for steps in begins) and len(again) == 1
  assert again[0][1] > 0 and again[0][1] % 100 == 0
  # Ray streams what the runs print.
  assert '(seed 0 pid=' in err and 'finished in ' in err


def test_a_signal_saves_the_tasks_and_the_same_command_goes_on(cluster, tmp_path):
  """To the same end as without Ray, bit for bit."""
  run = ('--vary=seed=0', *FLAGS[1:])
  local = train_here(tmp_path / 'local', *run)
  workdir, flags = tmp_path / 'ray', (*run, f'--ray_address={cluster.address}')
  process = scheduled.start(workdir, *flags)
  begun = workdir / 'seed0' / 'checkpoints'
  scheduled.wait_until(lambda: any(begun.glob('*.safetensors')), process)
  process.send_signal(signal.SIGTERM)
  code, _, err = scheduled.end(process)
  assert code == 128 + signal.SIGTERM
  assert 'SIGTERM: saved. Run the same command again to go on.' in err and 'no answer' not in err
  assert (workdir / 'seed0' / jobs.LOG).read_text().endswith('error: stopped\n')
  code, out, err = scheduled.run(workdir, *flags)
  assert code == 0, err
  assert out.endswith('checks: not run\n')
  scheduled.assert_same_runs(workdir, local, {'seed0'})
  assert (workdir / 'sweep.csv').read_bytes() == (local / 'sweep.csv').read_bytes()
  first, again = starts(workdir, 'seed0')
  assert first == 0 and again > 0
  # Ray streams what the runs print.
  assert '(seed 0 pid=' in err and 'seed 0: finished' in err


@pytest.mark.slow
def test_this_machine_may_go_on_with_what_a_cluster_has_begun(cluster, tmp_path):
  local, workdir = train_here(tmp_path / 'local', *FLAGS), tmp_path / 'ray'
  process = scheduled.start(workdir, *FLAGS, f'--ray_address={cluster.address}')
  begun = workdir / 'seed0' / 'checkpoints'
  scheduled.wait_until(lambda: any(begun.glob('*.safetensors')), process)
  process.send_signal(signal.SIGTERM)
  assert scheduled.end(process)[0] == 128 + signal.SIGTERM
  logs = [path.read_text() for path in workdir.glob('seed*/run.log')]
  assert logs and all(log.endswith('error: stopped\n') for log in logs)
  scheduled.assert_same_runs(train_here(workdir, *FLAGS), local, RUNS)


@pytest.mark.slow
def test_forty_runs_while_nodes_come_and_go(cluster, tmp_path, record_property):
  """Nodes are killed and added at random while a sweep of forty short runs goes on."""
  names = [f'seed{seed}' for seed in range(40)]
  vary = f'--vary=seed={",".join(map(str, range(40)))}'
  short = (vary, '--num_steps=600', '--checkpoint_every=50')
  code, _, err = scheduled.run(tmp_path / 'local', *short, '--parallel=1', NPROC='1')
  assert code == 0, err
  rng = random.Random(0)
  flags = (*short, '--retries=100', f'--ray_address={cluster.address}')
  process = scheduled.start(tmp_path / 'ray', *flags)
  ended: list[tuple[int, str, str]] = []
  reader = threading.Thread(target=lambda: ended.append(scheduled.end(process, 1800.0)))
  reader.start()  # it reads what Ray prints, of which there is much
  nodes, killed = [], 0
  while reader.is_alive():
    # On a slow machine a run hardly gets further between two kills, so there is an end of them.
    if killed < 20 and nodes and (len(nodes) >= 2 or rng.random() < 0.5):
      cluster.remove_node(nodes.pop(rng.randrange(len(nodes))), allow_graceful=False)
      killed += 1
    elif len(nodes) < 2:
      nodes.append(cluster.add_node(num_cpus=1))
    time.sleep(rng.uniform(2.0, 15.0))
  reader.join()
  for node in nodes:
    cluster.remove_node(node, allow_graceful=False)
  ((code, _, err),) = ended
  assert code == 0, err
  assert killed >= 5
  record_property('kills', killed)
  scheduled.assert_same_runs(tmp_path / 'ray', tmp_path / 'local', set(names))


def refused(tmp_path: Path, *flags: str, **environment: str) -> tuple[str, float]:
  """The error of a sweep that must be refused before it trains, and the seconds that took."""
  began = time.monotonic()
  code, out, err = scheduled.run(tmp_path / 'w', *FLAGS, *flags, **environment)
  seconds = time.monotonic() - began
  assert code == 2 and out == '', err
  assert not list((tmp_path / 'w').glob('seed*'))
  return err.splitlines()[-1], seconds


def test_an_address_that_does_not_answer_is_told_in_a_line(tmp_path):
  with socket.socket() as mute:
    mute.bind(('127.0.0.1', 0))
    mute.listen()  # it takes connections, and never answers
    address = '{}:{}'.format(*mute.getsockname())
    line, seconds = refused(tmp_path, f'--ray_address={address}')
  assert line.startswith(f'error: --ray_address: {address} is no Ray cluster that answers')
  assert seconds < 60.0  # ten on a quiet machine, most of them the start of JAX


def test_what_a_sweep_on_a_cluster_refuses_before_it_writes(tmp_path):
  base = pretrain.PretrainConfig(workdir=str(tmp_path / 'w'))

  def begin(address: str, **changes) -> None:
    where = placement.PlacementConfig(ray_address=address)
    config = sweep.SweepConfig(vary='seed=0', placement=where)
    sweep.run(config, flags.replace(base, **changes), signals.StopSignal())

  with pytest.raises(ArgumentError, match="ray_address: must be 'auto' or HOST:PORT, got 'head'"):
    begin('head')
  with socket.socket() as closed:
    closed.bind(('127.0.0.1', 0))
    address = '{}:{}'.format(*closed.getsockname())
    with pytest.raises(ArgumentError, match=f'ray_address: {address} does not answer'):
      begin(address)
  message = 'num_devices, resources_per_run: a run has only 1 devices'
  with pytest.raises(ArgumentError, match=message):
    begin('auto', num_devices=2)
  assert not (tmp_path / 'w').exists()


def test_what_ray_prints_is_no_result(tmp_path, monkeypatch, capsys):
  """Ray prints what it has heard from the nodes until its end."""
  monkeypatch.setattr(ray, 'init', lambda *_, **__: print('Ray begins'))
  monkeypatch.setattr(ray, 'nodes', list)
  monkeypatch.setattr(ray, 'shutdown', lambda: print('Ray ends'))
  base = pretrain.PretrainConfig(workdir=str(tmp_path / 'w'))
  where = placement.PlacementConfig(ray_address='auto')
  with pytest.raises(ArgumentError, match='no node of the cluster has cpu=1'):
    sweep.run(sweep.SweepConfig(vary='seed=0', placement=where), base, signals.StopSignal())
  out, err = capsys.readouterr()
  assert out == '' and 'Ray begins' in err and 'Ray ends' in err


@pytest.mark.parametrize(
  ('changes', 'message'),
  [
    ({'resources_per_run': 'gpu'}, "resources_per_run: must be like 'cpu=2,gpu=0.5', got 'gpu'"),
    ({'resources_per_run': 'gpu=1'}, 'resources_per_run: is for --ray_address, which is not given'),
    (
      {'ray_address': 'auto', 'parallel': '2'},
      'parallel: is for this machine; with --ray_address, Ray shares runs out',
    ),
  ],
)
def test_wrong_flags_are_named(changes, message):
  with pytest.raises(ArgumentError, match=f'^{re.escape(message)}$'):
    placement.PlacementConfig(**changes)


@pytest.mark.slow  # what a node lacks is asked of `ray_cluster.difference` below
@pytest.mark.skipif(os.geteuid() != 0, reason='a storage that is not shared needs root')
def test_a_node_that_does_not_share_the_storage_is_told_in_a_line(cluster, tmp_path):
  """A node in a mount namespace of its own, where an empty file system lies over the directory."""
  program = Path(sys.executable).with_name('ray')
  command = (
    f'mount -t tmpfs tmpfs {tmp_path} && exec {program} start --address={cluster.address} --block'
  )
  known = alive(cluster)
  with (tmp_path.parent / 'ray.log').open('w') as log:
    node = subprocess.Popen(
      ['unshare', '--mount', 'sh', '-c', f'{command} --num-cpus=1'], stdout=log, stderr=log
    )
  try:
    scheduled.wait_until(lambda: alive(cluster) - known, node)
    line, _ = refused(tmp_path, f'--ray_address={cluster.address}')
  finally:
    node.terminate()
    node.wait()
    scheduled.wait_until(lambda: not alive(cluster) - known, None)
  assert re.fullmatch(
    rf'error: --workdir: node \S+ \(\S+\) does not share {tmp_path}/w; use storage .*', line
  )


@pytest.mark.slow  # a cluster takes a minute to notice
def test_a_node_that_dies_before_it_is_checked_is_left_out(cluster, tmp_path):
  node = cluster.add_node(num_cpus=1)
  (raylet,) = node.all_processes['raylet']
  os.kill(raylet.process.pid, signal.SIGSTOP)  # it counts as alive, and answers nothing
  address = f'--ray_address={cluster.address}'
  try:
    code, _, err = scheduled.run(tmp_path, '--vary=seed=0', '--num_steps=10', address)
  finally:
    cluster.remove_node(node, allow_graceful=False)
  assert code == 0, err


def test_what_no_node_has_is_told_in_a_line(cluster, tmp_path):
  flags = (f'--ray_address={cluster.address}', '--resources_per_run=gpu=1')
  line, _ = refused(tmp_path, *flags)
  assert line == 'error: --resources_per_run: no node of the cluster has cpu=1, gpu=1; ask for less'


@pytest.fixture
def expected(tmp_path):
  """What a node must have, and this one has."""
  mark = tmp_path / 'mark'
  mark.write_text('a')
  return {
    'mark': str(mark),
    'token': 'a',
    'folders': [str(tmp_path)],
    'versions': devices.versions(),
  }


@pytest.mark.parametrize(
  ('changes', 'argument', 'message'),
  [
    ({'mark': '/shared/runs/mark'}, 'workdir', 'does not share /shared/runs; use storage'),
    ({'token': 'of another sweep'}, 'workdir', 'does not share /'),
    ({'folders': ['/', '/no/mnist']}, 'data_dir', 'has no directory /no/mnist'),
    (
      {'versions': devices.versions() | {'jax': '0.0'}},
      'ray_address',
      f'has other versions: jax {devices.versions()["jax"]} there and 0.0 here',
    ),
    ({'versions': {'tpu': '1'}}, 'ray_address', 'has other versions: tpu missing there and 1 here'),
  ],
)
def test_what_a_node_lacks_is_named(expected, changes, argument, message):
  assert ray_cluster.difference(expected) is None
  found = ray_cluster.difference(expected | changes)
  assert found is not None and found[0] == argument and found[1].startswith(message)


def test_a_node_that_joins_later_is_checked_too(expected):
  order = {'name': 'seed 0'}  # no part of it is looked at
  outcome = ray_cluster._work(order, {'cpu': 1.0}, expected | {'token': 'b'})
  assert outcome['again'] and 'does not share' in outcome['error']


def test_paths_are_absolute_for_nodes(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  settings = {'workdir': 'runs/seed0', 'data_dir': 'mnist', 'dataset': 'folder:pictures'}
  pretraining = flags.from_dict(pretrain.PretrainConfig, settings)
  attack = probe_settings.ProbeConfig(workdir='runs/seed0', data_dir='mnist')
  job = jobs.Job('seed 0', pretraining, (attack,)).with_absolute_paths()
  (attack,) = job.attacks
  assert attack.workdir == job.pretraining.workdir == f'{tmp_path}/runs/seed0'
  assert attack.data_dir == job.pretraining.data.data_dir == f'{tmp_path}/mnist'
  assert job.pretraining.data.dataset == f'folder:{tmp_path}/pictures'
  assert jobs.from_json(json.loads(json.dumps(job.to_json()))) == job
  members = jobs.PopulationJob('all', (pretraining,) * 2, Path('runs')).with_absolute_paths()
  assert members.members == (job.pretraining,) * 2 and members.workdir == tmp_path / 'runs'
  assert jobs.from_json(json.loads(json.dumps(members.to_json()))) == members


@pytest.mark.parametrize(
  'text',
  ['cpu', 'cpu=x', 'cpu=-1', '=1', 'cpu=nan', 'cpu=inf', 'cpu=1,CPU=2', 'cpu=0', 'cpu=0,gpu=0'],
)
def test_what_are_no_resources(text):
  with pytest.raises(ArgumentError, match='resources_per_run: must '):
    ray_cluster.parse_resources(text)


def test_a_run_takes_a_core_if_it_does_not_say():
  assert ray_cluster.parse_resources('GPU=0.5, tpu=1') == {'cpu': 1.0, 'gpu': 0.5, 'tpu': 1.0}
  assert ray_cluster.parse_resources('') == {'cpu': 1.0}
