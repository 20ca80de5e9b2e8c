r"""Measures how fast a CPU trains populations, beside single runs and separate processes.

  python -m tests.tools.population_speed se

All ways take turns, so that what else the machine does meets all of them. Each is a process of its
own, which compiles before the first turn. Prints medians over the turns: the CPU time of a training
step of one member, and the steps of all members together a second. On a busy machine only the CPU
times can be compared.
"""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from typing import NamedTuple

import jax

from se_vae import data, training
from se_vae.models import vae
from se_vae.parallel import sharding

SECONDS, TURNS, BATCH, FOREVER = 1.0, 12, 64, 10**7
# Steps of a dispatch, the same for all ways: about half a second for four members.
DISPATCH = {'se': 12, 'vae': 100}


class Way(NamedTuple):
  """One way to train.

  Attributes:
    name: what it is called.
    kind: 'single', or how a population is vectorised.
    members: of each process.
    devices: of each process.
    cores: the core of each process; '' for all cores.
  """

  name: str
  kind: str
  members: int
  devices: int
  cores: tuple[str, ...] = ('',)


WAYS = [
  Way('single runs, 1 device', 'single', 1, 1),
  Way('single runs, 2 devices', 'single', 1, 2),
  Way('two processes, a core each', 'single', 1, 1, ('0', '1')),
  Way('vmap, 1 device, P = 4', 'vmap', 4, 1),
  *(Way(f'loop, 2 devices, P = {size}', 'loop', size, 2) for size in (2, 4, 8)),
  *(Way(f'vmap, 2 devices, P = {size}', 'vmap', size, 2) for size in (2, 4, 8)),
]


def work(objective: str, kind: str, size: int, num_devices: int) -> None:
  """Trains for a while at each line of input; prints steps a second and CPU seconds a step."""
  jax.config.update('jax_num_cpu_devices', num_devices)
  images = data.load('mnist_5k').train.images
  step_function = training.TrainStep(vae.make_vae((28, 28, 1)))
  config = training.TrainConfig(objective=objective, num_steps=FOREVER)
  firsts = [
    training.first_state(step_function.model, config, seed, num_examples=len(images))
    for seed in range(size)
  ]
  streams = [data.batch_stream(seed, BATCH, len(images)) for seed in range(size)]
  options = {'steps_per_row': DISPATCH[objective], 'seconds_per_dispatch': 1e3}
  if kind == 'single':
    ((state, key, _),), (stream,) = firsts, streams
    mesh = sharding.data_mesh(num_devices)
    run = training.run(
      step_function, state, (config, key), images, stream, mesh=mesh, num_steps=FOREVER, **options
    )
    steps = (int(progress.state.step) for progress in run)
  else:
    population = training.run_population(
      step_function,
      [jax.device_get(state) for state, *_ in firsts],
      [(config, key) for _, key, _ in firsts],
      images,
      streams,
      num_steps=[FOREVER] * size,
      mesh=sharding.population_mesh(num_devices),
      vectorize=kind,
      **options,
    )
    steps = (progress.step for progress in population)
  done = next(step for step in steps if step > DISPATCH[objective])
  print('ready', flush=True)
  for _ in sys.stdin:
    before, began, cpu = done, time.monotonic(), time.process_time()
    while time.monotonic() - began < SECONDS:
      done = next(steps)
    count = size * (done - before)
    wall, cpu = time.monotonic() - began, time.process_time() - cpu
    print(count / wall, cpu / count, flush=True)


def start(way: Way, objective: str) -> list[subprocess.Popen[str]]:
  """Starts the processes of one way, and waits until they have compiled."""
  worker = [sys.executable, '-m', 'tests.tools.population_speed', objective, *map(str, way[1:4])]
  commands = [['taskset', '-c', core, *worker] if core else worker for core in way.cores]
  pipes = {'stdin': subprocess.PIPE, 'stdout': subprocess.PIPE, 'text': True}
  processes = [subprocess.Popen(command, **pipes) for command in commands]
  for process in processes:
    assert process.stdout.readline() == 'ready\n', way.name
  return processes


def main(objective: str) -> None:
  """Prints a table of all ways."""
  running = {way.name: start(way, objective) for way in WAYS}
  rates: dict[str, list[float]] = {name: [] for name in running}
  costs: dict[str, list[float]] = {name: [] for name in running}
  for _ in range(TURNS):
    for name, processes in running.items():
      for process in processes:
        print(file=process.stdin, flush=True)
      pairs = [map(float, process.stdout.readline().split()) for process in processes]
      own_rates, own_costs = zip(*pairs, strict=True)
      rates[name].append(sum(own_rates))
      costs[name].append(statistics.mean(own_costs))
  for name in running:
    milliseconds, rate = 1e3 * statistics.median(costs[name]), statistics.median(rates[name])
    print(f'{name:28} {milliseconds:6.2f} ms of CPU a step, {rate:7.1f} steps/s')
  for processes in running.values():
    for process in processes:
      process.stdin.close()
      process.wait()


if __name__ == '__main__':
  if len(sys.argv) == 2:
    main(sys.argv[1])
  else:
    work(sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4]))
