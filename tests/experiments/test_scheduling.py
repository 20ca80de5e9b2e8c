"""Many runs side by side: slots, failures, interruptions, and hosts that share a sweep."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
import subprocess
import sys

import pytest

from experiments import probe
from experiments.cli import devices, messages, signals, workdirs
from experiments.scheduling import display, jobs, placement, slots
from se_vae.config import ArgumentError
from se_vae.storage import checkpoints, locks
from tests.experiments import scheduled

RUNS = {'seed0', 'seed1'}
FLAGS = ('--vary=seed=0,1', '--num_steps=1000', '--checkpoint_every=100')


@pytest.fixture
def four_cores(monkeypatch):
  monkeypatch.setattr(devices, 'num_cores', lambda: 4)
  monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {2, 3, 5, 7}, raising=False)
  monkeypatch.setattr(slots, 'gpus', lambda: [])


@pytest.mark.parametrize(
  ('parallel', 'num_jobs', 'cores_per_run', 'cores'),
  [
    ('auto', 9, 1, [(2,), (3,), (5,), (7,)]),
    ('auto', 3, 1, [(2,), (3,), (5,)]),  # all slots have equally many
    ('auto', 2, 1, [(2, 3), (5, 7)]),
    ('auto', 9, 2, [(2, 3), (5, 7)]),
    ('auto', 9, 8, [(2, 3, 5, 7)]),
    ('auto', 1, 1, [(2, 3, 5, 7)]),
    ('1', 9, 1, [(2, 3, 5, 7)]),
    ('2', 9, 1, [(2, 3), (5, 7)]),
    ('4', 2, 1, [(2, 3), (5, 7)]),
  ],
)
def test_the_cores_are_shared_evenly(four_cores, parallel, num_jobs, cores_per_run, cores, capsys):
  found = slots.slots(parallel, num_jobs, cores_per_run)
  assert [slot.cores for slot in found] == cores
  assert all(slot.environment() == {'NPROC': str(len(slot.cores))} for slot in found)
  assert capsys.readouterr().err == ''


def test_more_slots_than_cores_share_them_with_a_warning(four_cores, capsys):
  found = slots.slots('6', 9)
  assert [slot.cores for slot in found] == [(2,), (3,), (5,), (7,), (2,), (3,)]
  assert capsys.readouterr().err == 'warning: --parallel: 6 runs share 4 cores\n'
  assert len(slots.slots('6', 3)) == 3 and capsys.readouterr().err == ''


def test_gpus_are_slots_and_several_slots_share_the_memory_of_one(four_cores, monkeypatch):
  monkeypatch.setattr(slots, 'gpus', lambda: ['0', 'GPU-5c'])
  first, second = slots.slots('auto', 9)
  assert (first.cores, second.cores) == ((2, 3), (5, 7))
  assert first.environment() == {'NPROC': '2', 'CUDA_VISIBLE_DEVICES': '0'}
  assert second.environment() == {'NPROC': '2', 'CUDA_VISIBLE_DEVICES': 'GPU-5c'}
  shared = [slot.environment() for slot in slots.slots('3', 9)]
  assert [each['CUDA_VISIBLE_DEVICES'] for each in shared] == ['0', 'GPU-5c', '0']
  fractions = [each.get('XLA_CLIENT_MEM_FRACTION') for each in shared]
  assert fractions == ['0.450', None, '0.450']
  (both,) = slots.slots('auto', 9, 2)  # each run asks for two
  assert both.environment()['CUDA_VISIBLE_DEVICES'] == '0,GPU-5c'
  with pytest.raises(ArgumentError, match='num_devices: must be <= 2, the GPUs here'):
    slots.slots('auto', 9, 3)
  (alone,) = slots.slots('1', 9)  # the runs take turns in this process, which has all GPUs
  assert alone.gpu is None
  (only,) = slots.slots('auto', 1)
  assert only.environment()['CUDA_VISIBLE_DEVICES'] == '0,GPU-5c'


def test_gpus_are_those_that_jax_would_use(monkeypatch):
  class Plugin:
    name = 'xla_cuda13'

  monkeypatch.setattr(slots.importlib.metadata, 'entry_points', lambda group: [Plugin])
  assert slots.gpus({'CUDA_VISIBLE_DEVICES': '2,0'}) == ['2', '0']
  assert (
    slots.gpus({'CUDA_VISIBLE_DEVICES': ''}) == slots.gpus({'CUDA_VISIBLE_DEVICES': '-1'}) == []
  )
  assert slots.gpus({'CUDA_VISIBLE_DEVICES': '2,0', 'JAX_PLATFORMS': 'cpu'}) == []
  assert slots.gpus({'CUDA_VISIBLE_DEVICES': '2', 'JAX_PLATFORMS': ''}) == ['2']
  assert not slots.has_other_accelerator({})
  monkeypatch.setattr(slots.importlib.metadata, 'entry_points', lambda group: [])
  assert not slots.has_other_accelerator({})
  assert slots.gpus({'CUDA_VISIBLE_DEVICES': '2,0'}) == []


@pytest.mark.parametrize(
  ('error', 'again'),
  [
    (OSError(errno.EIO, 'storage'), True),
    (OSError(errno.ETIMEDOUT, 'network'), True),
    (RuntimeError('the device was lost'), True),
    (OSError(errno.ENOSPC, 'full'), False),
    (PermissionError(errno.EACCES, 'no right'), False),
    (FileNotFoundError(errno.ENOENT, 'missing'), False),
    (OSError(errno.EMFILE, 'too many open files'), False),
    (NotImplementedError('later'), False),
    (checkpoints.CheckpointError('damaged'), False),
    (ValueError('a setting'), False),
  ],
)
def test_errors_that_would_repeat_are_not_tried_again(error, again):
  assert jobs._passes(error) == again


def test_gpus_that_do_not_answer_are_not_taken_for_none(monkeypatch):
  def hang(command, timeout, **_):
    raise slots.subprocess.TimeoutExpired(command, timeout)

  monkeypatch.setattr(slots.subprocess, 'run', hang)
  with pytest.raises(ArgumentError, match='parallel: the GPUs did not answer in 60 s'):
    slots._count_gpus.__wrapped__()


def test_an_accelerator_that_is_not_shared_takes_one_run_at_a_time(four_cores, monkeypatch, capsys):
  monkeypatch.setattr(slots, '_plugins', lambda: ['tpu'])
  assert slots.has_other_accelerator({}) and not slots.has_other_accelerator(
    {'JAX_PLATFORMS': 'cpu'}
  )
  monkeypatch.delenv('JAX_PLATFORMS', raising=False)
  (slot,) = slots.slots('auto', 9)
  assert slot.num_cores == 4 and capsys.readouterr().err == ''
  (slot,) = slots.slots('2', 9)
  assert slot.num_cores == 4 and '2 runs cannot share this accelerator' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('parallel', 'gpus', 'platforms'),
  [('auto', ['0'], 'cpu'), ('1', ['0'], None), ('01', ['0'], None), ('auto', [], None)],
)
def test_a_process_with_slots_leaves_the_gpus_to_them(monkeypatch, parallel, gpus, platforms):
  changed = {}
  monkeypatch.setattr(placement.jax.config, 'update', changed.__setitem__)
  monkeypatch.setattr(slots, 'gpus', lambda: gpus)
  placement.use_cpu_alone_beside_slots(placement.PlacementConfig(parallel=parallel))
  assert changed.get('jax_platforms') == platforms


@pytest.mark.parametrize('parallel', ['', '0', '-1', 'two', '1.5', '1025'])
def test_what_is_no_number_of_slots(parallel):
  with pytest.raises(ArgumentError, match='parallel: must be'):
    slots.parse(parallel)


@pytest.fixture(scope='module')
def one_after_another(tmp_path_factory):
  """Two runs in one process, with one core."""
  workdir = tmp_path_factory.mktemp('alone')
  code, _, err = scheduled.run(workdir, *FLAGS, '--parallel=1', NPROC='1')
  assert code == 0, err
  return workdir


def owner(workdir, run: str) -> int:
  """The process that trains a run."""
  _, number, *_ = (workdir / run / '.lock').read_text().split()
  return int(number)


def has_checkpoint(workdir, run: str) -> bool:
  return any((workdir / run / 'checkpoints').glob('checkpoint_*.safetensors'))


@pytest.mark.long
@pytest.mark.parametrize(
  'signum', [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)]
)
def test_a_signal_saves_runs_side_by_side_which_go_on_bit_for_bit(
  one_after_another, tmp_path, signum
):
  """The same command ends with the results of runs one after another, never interrupted."""
  process = scheduled.start(tmp_path, *FLAGS, '--parallel=2')
  for run in RUNS:
    scheduled.wait_until(lambda run=run: has_checkpoint(tmp_path, run), process)
  process.send_signal(signum)
  code, _, err = scheduled.end(process)
  assert code == 128 + signum
  assert 'saving 2 runs' in err
  assert err.endswith(f'{signum.name}: saved. Run the same command again to go on.\n')
  for run in RUNS:
    assert (tmp_path / run / jobs.LOG).read_text().endswith('SIGTERM: saved\n')
  code, out, err = scheduled.run(tmp_path, *FLAGS, '--parallel=2')
  assert code == 0, err
  for number in (1, 2):
    assert f'[{number}/2] seed ' in err
  assert err.count(': finished') == 2 and out.endswith('checks: not run\n')
  for run in RUNS:
    assert '1000/1000' in (tmp_path / run / jobs.LOG).read_text()
  assert not (tmp_path / 'compiled').exists()
  scheduled.assert_same_runs(tmp_path, one_after_another, RUNS)
  assert (tmp_path / 'sweep.csv').read_bytes() == (one_after_another / 'sweep.csv').read_bytes()


def test_what_is_left_has_as_many_cores_as_before(four_cores, tmp_path, monkeypatch):
  """Rounding depends on the number of cores, so it must not depend on what was finished before."""

  class FakeJob:
    name, num_devices = 'run', None

    def __init__(self, outcome: jobs.Outcome | None) -> None:
      self.finished = lambda: outcome

  started = []
  monkeypatch.setattr(
    placement.processes, 'run', lambda left, own, *_: started.append((len(left), own))
  )
  done = jobs.Outcome(encoder={})
  for outcomes in ((None, None), (done, None)):
    every = [FakeJob(outcome) for outcome in outcomes]
    config = placement.PlacementConfig()
    placement.run_all(every, config, tmp_path, signals.StopSignal(), lambda *_: None)
  assert [number for number, _ in started] == [2, 1]
  assert [[slot.cores for slot in own] for _, own in started] == [[(2, 3), (5, 7)]] * 2


def test_programs_of_a_command_that_was_killed_are_removed_when_nobody_uses_them(tmp_path):
  """Also where nothing is left to train, or what is left runs in one process."""

  def end_of_a_sweep() -> None:
    placement.run_all([], placement.PlacementConfig(), tmp_path, signals.StopSignal(), print)

  end_of_a_sweep()
  assert not list(tmp_path.iterdir())
  compiled, lock = placement._programs(tmp_path)
  compiled.mkdir(parents=True)
  (compiled / 'program').touch()
  with locks.share(lock):
    end_of_a_sweep()
    assert (compiled / 'program').exists()
  of_another_host = compiled.with_name('another')
  of_another_host.mkdir()
  end_of_a_sweep()
  assert [*compiled.parent.iterdir()] == [of_another_host]


@pytest.mark.slow
def test_runs_side_by_side_are_those_one_after_another_bit_for_bit(one_after_another, tmp_path):
  code, out, err = scheduled.run(tmp_path, *FLAGS, '--parallel=2')
  assert code == 0, err
  scheduled.assert_same_runs(tmp_path, one_after_another, RUNS)
  assert (tmp_path / 'sweep.csv').read_bytes() == (one_after_another / 'sweep.csv').read_bytes()
  assert err.count('finished in ') == 2 and out.endswith('checks: not run\n')
  results = json.loads((tmp_path / 'sweep.json').read_text())['results']
  assert [result['varied'] for result in results] == [{'seed': 0}, {'seed': 1}]
  assert all(result['seconds'] > 0.0 and len(result['devices']) == 1 for result in results)

  logs = [(tmp_path / name / jobs.LOG).read_bytes() for name in sorted(RUNS)]
  code, _, err = scheduled.run(tmp_path, *FLAGS, '--parallel=2')  # nothing is left to do
  assert code == 0 and err == ''
  assert [(tmp_path / name / jobs.LOG).read_bytes() for name in sorted(RUNS)] == logs
  assert json.loads((tmp_path / 'sweep.json').read_text())['results'] == results


@pytest.mark.long
def test_a_run_that_fails_stops_no_other_and_one_that_is_killed_is_started_again(
  one_after_another, tmp_path
):
  good, bad = tmp_path / 'learning_rate0.001', tmp_path / 'learning_rate1e+30'
  flags = ('--vary=learning_rate=1e-3,1e30', *FLAGS[1:], '--parallel=2')
  process = scheduled.start(tmp_path, *flags)
  scheduled.wait_until(lambda: has_checkpoint(tmp_path, good.name), process)
  os.kill(owner(tmp_path, good.name), signal.SIGKILL)
  code, out, err = scheduled.end(process)
  assert code == 1
  # The first was killed, and has ended as if it had not been. 0.001 is the learning rate of all.
  assert 'learning_rate 0.001: its process was killed (SIGKILL' in err
  assert '(1 of 2 retries)' in err and 'gone' in (good / jobs.LOG).read_text()
  scheduled.assert_same_run(good, one_after_another / 'seed0')
  # The second failed, and is named with the end of its log. It would fail again in the same way.
  assert 'learning_rate 1e+30: failed: step ' in err and 'is not finite' in err
  assert f'{bad}/run.log:' in err and err.count('started again') == 1
  assert '    error: step ' in err  # the last line of the log
  assert err.endswith('error: 1 of 2 runs failed; the others are finished\n')
  assert 'Traceback' not in err
  assert '| 0.001 | 1 |' in out and '1 of 2 variants are not finished' in out
  (result,) = json.loads((tmp_path / 'sweep.json').read_text())['results']
  assert result['varied'] == {'learning_rate': 1e-3} and len(result['devices']) == 1


@pytest.mark.slow
def test_what_has_failed_is_done_when_its_cause_is_mended_and_the_rest_stays(tmp_path):
  flags = ('--vary=learning_rate=1e-3,1e30', *FLAGS[1:], '--parallel=2')
  assert scheduled.run(tmp_path, *flags)[0] == 1
  before = (tmp_path / 'learning_rate0.001' / jobs.LOG).read_bytes()
  code, _, err = scheduled.run(tmp_path, '--vary=learning_rate=1e-3,3e-3', *flags[1:])
  assert code == 0, err
  assert (tmp_path / 'learning_rate0.001' / jobs.LOG).read_bytes() == before


@pytest.mark.slow
def test_a_run_that_is_killed_without_retries_is_a_failure(tmp_path):
  process = scheduled.start(tmp_path, *FLAGS, '--parallel=2', '--retries=0')
  scheduled.wait_until(lambda: has_checkpoint(tmp_path, 'seed0'), process)
  os.kill(owner(tmp_path, 'seed0'), signal.SIGKILL)
  code, _, err = scheduled.end(process)
  assert code == 1
  assert 'failed: seed 0: its process was killed (SIGKILL, perhaps because' in err
  assert 'seed 1: finished' in err


def test_the_process_of_a_run_gets_a_signal_when_its_sweep_is_gone():
  """The sweep holds the other end of its standard input."""
  program = 'from experiments.scheduling import worker; worker._end_with_parent()'
  command = [sys.executable, '-c', program]
  process = subprocess.Popen(command, cwd=scheduled.ROOT, stdin=subprocess.PIPE)
  with process:  # which closes it
    process.stdin.write(b'more than nothing is no end\n')
    process.stdin.flush()
    assert process.poll() is None
  assert process.returncode == -signal.SIGTERM


@pytest.mark.slow
def test_no_run_outlives_its_sweep_and_the_next_one_waits_for_it(one_after_another, tmp_path):
  process = scheduled.start(tmp_path, *FLAGS, '--parallel=2')
  for run in RUNS:
    scheduled.wait_until(lambda run=run: has_checkpoint(tmp_path, run), process)
  process.kill()
  scheduled.end(process)
  code, _, err = scheduled.run(tmp_path, *FLAGS, '--parallel=2')
  assert code == 0, err
  for run in RUNS:
    assert 'SIGTERM: saved\n' in (tmp_path / run / jobs.LOG).read_text()
  scheduled.assert_same_runs(tmp_path, one_after_another, RUNS)


@pytest.mark.slow  # test_sweep.py has a fast test, where the other process is simulated
def test_processes_that_run_the_same_sweep_share_its_runs(one_after_another, tmp_path):
  both = [scheduled.start(tmp_path, *FLAGS, '--parallel=1', NPROC='1') for _ in range(2)]
  ends = [scheduled.end(process) for process in both]
  for code, _, err in ends:
    assert code == 0, err
  # Each trained one of the runs.
  found = [set(re.findall(r'^\[\d/2\] (seed \d): 1000/', err, re.MULTILINE)) for *_, err in ends]
  assert sorted(map(sorted, found)) == [['seed 0'], ['seed 1']]
  scheduled.assert_same_runs(tmp_path, one_after_another, RUNS)
  assert (tmp_path / 'sweep.csv').read_bytes() == (one_after_another / 'sweep.csv').read_bytes()


def last_row(workdir, run: str) -> dict[str, float]:
  return json.loads((workdir / run / 'metrics.jsonl').read_text().splitlines()[-1])


@pytest.mark.slow  # test_sweep.py has a fast test, in one process
def test_a_population_trains_what_runs_of_their_own_train(tmp_path):
  short = (FLAGS[0], '--num_steps=60')
  code, _, err = scheduled.run(tmp_path / 'alone', *short, '--parallel=1', NPROC='1')
  assert code == 0, err
  flags = (*short, '--vectorize', '--parallel=2')
  code, _, err = scheduled.run(tmp_path / 'all', *flags)
  assert code == 0, err
  assert '[1/1] population of 2: ' in err and '[2/2] seed ' in err
  for run in RUNS:
    mine, theirs = last_row(tmp_path / 'all', run), last_row(tmp_path / 'alone', run)
    assert mine.keys() == theirs.keys()
    for name, value in theirs.items():  # rounding, which 60 steps of training amplify
      assert mine[name] == pytest.approx(value, rel=1e-3, abs=1e-3), name
    log = (tmp_path / 'all' / run / jobs.LOG).read_text()
    assert '60/60' not in log  # it was only attacked there
  code, _, err = scheduled.run(tmp_path / 'all', *flags)  # nothing is left to do
  assert (code, err) == (0, '')


def test_a_bar_tells_its_observer(monkeypatch):
  told = []
  monkeypatch.setattr(messages, 'observer', lambda *news: told.append(news))
  bar = messages.progress_bar(10, 'a run', initial=2)
  bar.update(3)
  bar.close()
  assert told == [('a run', 5, 10)]


class Terminal:
  """Standard error as a terminal."""

  def __init__(self):
    self.text = ''

  def write(self, text):
    self.text += text

  def flush(self):
    pass

  def isatty(self):
    return True


def test_a_terminal_shows_a_bar_of_each_run_and_one_of_all(monkeypatch):
  terminal = Terminal()
  monkeypatch.setattr(sys, 'stderr', terminal)
  shown = display.Display(3, 2)
  shown.progress(0, 'seed 0', 0, 100)
  shown.progress(1, 'seed 1', 40, 100)
  shown.progress(0, 'seed 0, attack', 1, 2)
  shown.ended('seed 0: finished')
  shown.close()
  for text in ('seed 0:', 'seed 1:', 'seed 0, attack:', 'runs:', '1/3', '[1/3] seed 0: finished\n'):
    assert text in terminal.text


def test_a_log_gets_a_line_for_each_run(capsys):
  shown = display.Display(2, 2)
  shown.progress(0, 'seed 0', 1, 100)
  shown.ended('seed 0: finished in 3 s')
  shown.close()
  assert capsys.readouterr().err == '[1/2] seed 0: finished in 3 s\n'


@pytest.mark.parametrize('name', [workdirs.LOCK, probe.LOCK])
def test_a_run_that_is_trained_or_attacked_has_a_user(tmp_path, name):
  assert jobs._user([tmp_path]) is None
  with workdirs.lock(tmp_path, name=name):
    assert str(jobs._user([tmp_path])).startswith('process ')


def test_a_run_is_tried_again_as_often_as_asked():
  again = jobs.Outcome(error='e', again=True)
  assert [jobs.is_tried_again(again, number, 2) for number in (1, 2, 3)] == [True, True, False]
  assert not jobs.is_tried_again(again, 1, 0)
  assert not jobs.is_tried_again(jobs.Outcome(error='e'), 1, 2)
