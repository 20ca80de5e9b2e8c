"""Kills a binary at random moments, resumes it, and compares every byte of its files.

  python -m tests.tools.kills pretrain DIRECTORY --kills=20

The moments are uniform over the time that an undisturbed run takes, and so fall on loading,
training, attacking, saving and drawing. A run that ends is compared and started again, until there
were enough kills. One process imports the library and forks the binaries. With
JAX_COMPILATION_CACHE_DIR only the first run compiles, and the moments are those of the second.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import random
import shutil
import signal
import sys
import time
import traceback
from pathlib import Path

from experiments import figure1, pretrain, probe, probe_settings, supervised, sweep
from experiments.cli import app, distributed, flags
from experiments.scheduling import jobs
from se_vae.evaluation import states


def as_flags(settings: dict[str, object]) -> str:
  return ' '.join(f'--{name}={value}' for name, value in settings.items())


TINY = {'hidden_units': 16, 'pgd_steps': 2}
TRAINING = {**TINY, 'latent_dim': 4, 'checkpoint_every': 100, 'log_every': 50}
ATTACK = {'num_examples': 40, 'pgd_steps': 4, 'restarts': 2, 'check_examples': 0, 'batch_size': 16}
# Of these the attack is the smaller part.
EVIDENCE = {**ATTACK, 'num_examples': 160, 'radii': '0,0.05,0.1,0.2'}
BINARIES = {
  'pretrain': (
    pretrain,
    (pretrain.PretrainConfig, distributed.Cluster),
    {**TRAINING, 'num_steps': 1500},
  ),
  'probe': (
    probe,
    (probe_settings.ProbeConfig,),
    {**ATTACK, 'attack': 'worst_case', 'radii': '0,0.05,0.1,0.2', 'num_queries': 20},
  ),
  'probe_joint': (probe, (probe_settings.ProbeConfig,), {**EVIDENCE, 'joint': True}),
  'probe_moves': (probe, (probe_settings.ProbeConfig,), {**EVIDENCE, 'moves': True}),
  'probe_certify': (
    probe,
    (probe_settings.ProbeConfig,),
    {**EVIDENCE, 'certify': True, 'num_examples': 200},
  ),
  'figure1': (figure1, (figure1.Figure1Config,), {'radii': '0,0.1', 'latent_dims': 4}),
  'supervised': (
    supervised,
    (supervised.SupervisedConfig,),
    {
      **TINY,
      'latent_dim': 4,
      'num_steps': 600,
      'checkpoint_every': 100,
      'probe': as_flags({**ATTACK, 'radii': '0,0.1', 'check_examples': 16}),
    },
  ),
  'sweep': (
    sweep,
    (sweep.SweepConfig, pretrain.PretrainConfig),
    {
      **TRAINING,
      'num_steps': 600,
      'vary': 'seed=0,1,2',
      'parallel': 2,
      'probe': as_flags({**ATTACK, 'radii': '0,0.1'}),
    },
  ),
}
# Their runs are processes of their own, which save when the binary is killed. Of two checkpoints
# that are kept, the older one may be of another step then.
WITH_WORKERS = ('figure1', 'sweep')


def start(binary: str, workdir: Path, log: Path) -> int:
  """Forks the binary as `python -m experiments.BINARY` would be; its process id."""
  process = os.fork()
  if process:
    return process
  with log.open('w') as file:
    os.dup2(file.fileno(), 1)
    os.dup2(file.fileno(), 2)
  module, config_types, settings = BINARIES[binary]
  for config_type in config_types:
    flags.define_flags(config_type)
  sys.argv = [
    binary,
    *(f'--{name}={value}' for name, value in {'workdir': workdir, **settings}.items()),
  ]
  try:
    app.run(module.main)
    code: object = 0
  except SystemExit as end:
    code = end.code or 0
  except BaseException:
    traceback.print_exc()
    code = 1
  sys.stdout.flush()
  sys.stderr.flush()
  os._exit(code if isinstance(code, int) else 1)


def renew(workdir: Path, begin: Path) -> None:
  """Puts what a run finds in the place of what one has made."""
  shutil.rmtree(workdir, ignore_errors=True)
  shutil.copytree(begin, workdir)


def finish(process: int, log: Path, options: int = 0) -> bool:
  """Waits for the end, which must be a good one; False where it has not come yet."""
  ended, status = os.waitpid(process, options)
  if status:
    sys.exit(f'failed:\n{log.read_text()}')
  return bool(ended)


def contents(workdir: Path, binary: str) -> dict[str, bytes]:
  """Every file but locks, logs and event files, which tell of processes and of the clock."""
  left_out = set()
  if binary in WITH_WORKERS:
    for folder in workdir.rglob('checkpoints'):
      left_out |= set(sorted(folder.glob('checkpoint_*'))[:-1])
  found = {
    str(path.relative_to(workdir)): path.read_bytes()
    for path in workdir.rglob('*')
    if path.is_file()
    and path not in left_out
    and not path.name.endswith('lock')
    and path.name != jobs.LOG
    and path.parent.name != 'tensorboard'
  }
  if 'sweep.json' in found:
    table = json.loads(found['sweep.json'])
    for result in table['results']:
      del result['seconds']
    found['sweep.json'] = json.dumps(table).encode()
  return found


def compare(found: dict[str, bytes], expected: dict[str, bytes]) -> None:
  different = {name for name, content in found.items() if expected.get(name) != content}
  if different | (expected.keys() - found):
    sys.exit(f'different: {sorted(different)}; missing: {sorted(expected.keys() - found)}')


def main() -> None:
  parser = argparse.ArgumentParser()
  parser.add_argument('binary', choices=BINARIES)
  parser.add_argument('directory', type=Path)
  parser.add_argument('--kills', type=int, default=20)
  parser.add_argument('--seed', type=int, default=0, help='of the moments')
  arguments = parser.parse_args()
  workdir, log = arguments.directory / 'run', arguments.directory / 'log'
  states.SAVE_EVERY = 0.0  # an attack log that is often written is often hit
  quick = figure1.PRESETS['quick']
  figure1.PANELS = figure1.PANELS[:2]
  color = dataclasses.replace(quick.encoders[1], num_steps=200, overrides=TINY)
  figure1.PRESETS['quick'] = dataclasses.replace(quick, encoders=(color,), attack=ATTACK)

  begin = arguments.directory / 'begin'  # what a run finds
  begin.mkdir(parents=True)
  if arguments.binary.startswith('probe'):
    module, config_types, _ = BINARIES['pretrain']
    dataset = 'color_mnist_5k' if arguments.binary == 'probe_joint' else 'mnist_5k'
    settings = {**TRAINING, 'num_steps': 200, 'dataset': dataset}
    BINARIES['trained'] = (module, config_types, settings)
    finish(start('trained', workdir, log), log)
    begin.rmdir()
    workdir.rename(begin)

  expected: dict[str, bytes] = {}
  for _ in range(2):
    renew(workdir, begin)
    started = time.monotonic()
    finish(start(arguments.binary, workdir, log), log)
    seconds = time.monotonic() - started
    found = contents(workdir, arguments.binary)
    expected = expected or found
    compare(found, expected)
    print(f'undisturbed: {seconds:.1f} s, {len(expected)} files', flush=True)

  rng = random.Random(arguments.seed)
  kills = ends = 0
  renew(workdir, begin)
  while True:
    process = start(arguments.binary, workdir, log)
    if kills == arguments.kills:
      finish(process, log)
      compare(contents(workdir, arguments.binary), expected)
      break
    time.sleep(rng.uniform(0.0, seconds))
    if finish(process, log, os.WNOHANG):
      compare(contents(workdir, arguments.binary), expected)
      ends += 1
      renew(workdir, begin)
    else:
      os.kill(process, signal.SIGKILL)
      os.waitpid(process, 0)
      kills += 1
  print(f'{kills} kills, {ends + 1} ends, each of them byte for byte the undisturbed one')


if __name__ == '__main__':
  main()
