"""Runs of several work directories as one population: their files are those of single runs."""

from __future__ import annotations

import json
import re
import shutil
import signal
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from experiments import population, pretrain, recording
from experiments.cli import flags, signals, workdirs
from se_vae import training
from se_vae.config import ArgumentError
from se_vae.storage import checkpoints
from tests.training import small_runs

DTYPE_PROMOTION = 'standard'  # optax takes part
pytestmark = [pytest.mark.long, pytest.mark.usefixtures('shallow')]

TINY = {'hidden_units': 16, 'latent_dim': 4, 'num_steps': 20, 'log_every': 10}
TINY |= {'checkpoint_every': 8, 'num_devices': 1, 'dataset': 'color_mnist_5k'}
TINY |= {'objective': 'vae'}  # rounding does not turn the sign of a step, as in a selection
TINY |= {'tensorboard': False}  # one test is about event files too
# The second ends before the others.
MEMBERS = [{'seed': 0}, {'seed': 1, 'kl_weight': 5.0, 'num_steps': 18}, {'seed': 1, 'obs_var': 0.2}]


class StopAfter(signals.StopSignal):
  """Requests to stop after some dispatches."""

  def __init__(self, dispatches: int) -> None:
    super().__init__()
    self._left = dispatches

  def requested(self) -> int | None:
    self._left -= 1
    return signal.SIGTERM if self._left <= 0 else None


class StopAfterCheckpoint(signals.StopSignal):
  """Requests to stop after the dispatch that follows a checkpoint, however long dispatches are."""

  def __init__(self, directory: Path) -> None:
    super().__init__()
    self._directory = directory

  def requested(self) -> int | None:
    return signal.SIGTERM if checkpoints.steps(self._directory) else None


def configs(directory: Path, **changes) -> list[pretrain.PretrainConfig]:
  return [
    flags.from_dict(
      pretrain.PretrainConfig, {'workdir': str(directory / str(i)), **TINY, **own, **changes}
    )
    for i, own in enumerate(MEMBERS)
  ]


@pytest.fixture(scope='module')
def singles(tmp_path_factory) -> Path:
  directory = tmp_path_factory.mktemp('singles')
  for config in configs(directory, tensorboard=True):
    pretrain.run(config, signals.StopSignal())
  return directory


def names(workdir: Path, events: bool) -> set[str]:
  """Of all files, without the digests of checkpoints and the times of event files."""
  files = [path.relative_to(workdir) for path in workdir.rglob('*') if path.is_file()]
  return {
    re.sub('_[0-9a-f]{64}|tfevents.*', '', str(path))
    for path in files
    if events or recording.EVENTS not in path.parts
  }


def pixels(path: Path) -> np.ndarray:
  with Image.open(path) as picture:
    return np.asarray(picture, np.float32)


def check_same_runs(found: Path, expected: Path, events: bool = False) -> None:
  """All files, but for paths in settings and the digests that they change, and event files.

  Numbers agree to rounding: as the tests compile, a loop over members is fused differently.
  """
  for i in range(len(MEMBERS)):
    own, single = found / str(i), expected / str(i)
    assert names(own, events) == names(single, events)
    pairs = [recording.read_rows(place / 'metrics.jsonl') for place in (own, single)]
    assert pairs[0][1] == pairs[1][1] == ''
    assert_same_numbers(pairs[0][0], pairs[1][0])
    for page in recording.PAGES:
      first, second = (pixels(place / f'{page}.png') for place in (own, single))
      assert np.abs(first - second).max() <= 1.0  # of 255 levels
    for name in ('config.json', 'result.json'):
      contents = [json.loads((workdir / name).read_text()) for workdir in (own, single)]
      for content in contents:
        content.pop('checkpoint', None)
        del content['config']['workdir'], content['config']['tensorboard']
      assert_same_numbers(*(content.pop('test', {}) for content in contents))
      assert contents[0] == contents[1]
    for folder in (recording.CHECKPOINTS, recording.BEST):
      pairs = zip(checkpoints.steps(own / folder), checkpoints.steps(single / folder), strict=True)
      for (step, path), (expected_step, expected_path) in pairs:
        assert step == expected_step
        small_runs.assert_close(*(checkpoints.load(p).tensors for p in (path, expected_path)), 1e-4)


def assert_same_numbers(found, expected) -> None:
  jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4), found, expected)


def test_the_files_are_those_of_single_runs(tmp_path, singles):
  own = configs(tmp_path, tensorboard=True)
  results = population.train_population(own, signals.StopSignal())
  check_same_runs(tmp_path, singles, events=True)
  assert [result['step'] for result in results] == [20, 18, 20]
  changed = {path: path.stat().st_mtime_ns for path in tmp_path.rglob('*')}
  assert population.train_population(own, signals.StopSignal()) == results
  assert [pretrain.run(config, signals.StopSignal()) for config in own] == results
  files = [path for path in changed if path.is_file() and path.name != '.lock']
  assert all(path.stat().st_mtime_ns == changed[path] for path in files)


@pytest.mark.slow
@pytest.mark.parametrize('dispatches', [1, 4])
def test_a_signal_saves_all_and_the_population_goes_on(tmp_path, singles, dispatches):
  with pytest.raises(signals.Interrupted):
    population.train_population(configs(tmp_path), StopAfter(dispatches))
  steps = [recording.good_steps(Path(str(config.workdir))) for config in configs(tmp_path)]
  assert len({own[0] for own in steps}) == 1 and steps[0][0] > 0
  population.train_population(configs(tmp_path), signals.StopSignal())
  check_same_runs(tmp_path, singles)


def test_a_population_killed_while_it_saves_goes_on_from_the_last_common_step(
  tmp_path, singles, monkeypatch
):
  stop = StopAfterCheckpoint(tmp_path / '1' / recording.CHECKPOINTS)
  with pytest.raises(signals.Interrupted):
    population.train_population(configs(tmp_path), stop)
  steps = [recording.good_steps(tmp_path / str(i)) for i in range(len(MEMBERS))]
  assert steps == [steps[0]] * len(MEMBERS)  # the signal saved all
  _, common = steps[0]
  (_, path), *_ = checkpoints.steps(tmp_path / '1' / recording.CHECKPOINTS)
  path.unlink()
  begun, load_at = [], recording.load_at
  monkeypatch.setattr(
    recording, 'load_at', lambda workdir, step: begun.append(step) or load_at(workdir, step)
  )
  population.train_population(configs(tmp_path), signals.StopSignal())
  assert begun == [common] * len(MEMBERS)
  check_same_runs(tmp_path, singles)


def test_runs_that_share_no_step_go_on_for_themselves(tmp_path, singles):
  """The first is finished, the second has been interrupted, the third not begun."""
  first, second, _ = configs(tmp_path)
  pretrain.run(first, signals.StopSignal())
  with pytest.raises(signals.Interrupted):
    pretrain.run(second, StopAfter(2))
  population.train_population(configs(tmp_path), signals.StopSignal())
  check_same_runs(tmp_path, singles)


@pytest.mark.parametrize('failed', [False, True])
def test_members_that_rest_do_not_hold_back_the_others(tmp_path, singles, monkeypatch, failed):
  """The first has ended, or failed, at a step that the others have left behind."""
  with pytest.raises(signals.Interrupted):
    population.train_population(
      configs(tmp_path), StopAfterCheckpoint(tmp_path / '1' / 'checkpoints')
    )
  newest, before = recording.good_steps(tmp_path / '0')
  (_, path), *_ = checkpoints.steps(tmp_path / '0' / recording.CHECKPOINTS)
  path.unlink()
  if failed:
    workdirs.write_json(tmp_path / '0' / recording.NOT_FINITE, {'step': before + 1})
  begun, load_at = [], recording.load_at
  monkeypatch.setattr(
    recording, 'load_at', lambda workdir, step: begun.append(step) or load_at(workdir, step)
  )
  population.train_population(configs(tmp_path), signals.StopSignal())
  assert begun == ([newest] * 2 + [before] if failed else [before] * 3)
  check_same_runs(tmp_path, singles)
  assert not (tmp_path / '0' / recording.NOT_FINITE).exists()  # training passed that step


def test_a_finished_run_without_a_result_gets_one(tmp_path, singles):
  for i in range(len(MEMBERS)):
    shutil.copytree(singles / str(i), tmp_path / str(i))
  own = configs(tmp_path)
  for config in own:  # they hold the paths of the others
    (Path(str(config.workdir)) / 'result.json').unlink()
  results = population.train_population(own, signals.StopSignal())
  assert [result['step'] for result in results] == [20, 18, 20]
  check_same_runs(tmp_path, singles)


def test_the_others_finish_beside_a_run_that_is_not_finite(tmp_path, singles):
  own = configs(tmp_path)
  own[1] = flags.replace(own[1], learning_rate=1e30)
  with pytest.raises(training.NotFiniteError, match=r'/1: step \d+ is not finite'):
    population.train_population(own, signals.StopSignal())
  report = json.loads((tmp_path / '1' / 'not_finite.json').read_text())
  assert 0 < report['step'] < 18
  assert not (tmp_path / '1' / 'result.json').exists()
  for i in ('0', '2'):
    rows, expected = (recording.read_rows(p / i / 'metrics.jsonl')[0] for p in (tmp_path, singles))
    assert_same_numbers(rows, expected)
    assert (tmp_path / i / 'result.json').exists()


def test_runs_that_do_not_fit_together_are_refused(tmp_path):
  first, second, third = configs(tmp_path)
  for changed, message in (
    ({'pgd_steps': 3, 'log_every': 5}, 'pgd_steps, log_every: must be the same in all runs'),
    ({'relative_step_size': 0.5}, 'relative_step_size: must be the same in all runs'),
    ({'workdir': str(tmp_path / '0')}, 'workdir: must be another one for each run'),
  ):
    with pytest.raises(ArgumentError, match=message):
      population.train_population(
        [first, flags.replace(second, **changed), third], signals.StopSignal()
      )
  with pytest.raises(ArgumentError, match='configs: needs at least one run'):
    population.train_population([], signals.StopSignal())
  assert list(tmp_path.iterdir()) == []
