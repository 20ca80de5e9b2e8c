"""How a process notices that another is silent, and at which address it listens."""

from __future__ import annotations

import time

import jax
import pytest

from se_vae.parallel import connections

pytestmark = pytest.mark.long

TIMEOUT = 2.0


class Store:
  """The part of JAX's key-value store that a watch uses."""

  def __init__(self) -> None:
    self.values: dict[str, str] = {}

  def key_value_set(self, key: str, value: str, allow_overwrite: bool = False) -> None:
    assert allow_overwrite or key not in self.values
    self.values[key] = value

  def key_value_try_get(self, key: str) -> str:
    if key not in self.values:
      raise jax.errors.JaxRuntimeError(f'NOT_FOUND: {key}')
    return self.values[key]

  def key_value_dir_get(self, directory: str) -> list[tuple[str, str]]:
    return [(key, value) for key, value in list(self.values.items()) if key.startswith(directory)]


class Broken:
  """A store that cannot be reached."""

  def __getattr__(self, name: str):
    def fail(*args, **kwargs):
      raise jax.errors.JaxRuntimeError('DEADLINE_EXCEEDED')

    return fail


def watches(stores: list) -> tuple[list[connections.Watch], list[tuple[int, int]]]:
  """One watch for each process, and the pairs (who noticed, who is lost), in order."""
  noticed: list[tuple[int, int]] = []

  def watch(own: int, store) -> connections.Watch:
    return connections.Watch(
      store, own, len(stores), TIMEOUT, lambda lost: noticed.append((own, lost))
    )

  return [watch(own, store) for own, store in enumerate(stores)], noticed


def wait_for(noticed: list, count: int) -> None:
  deadline = time.monotonic() + 60.0
  while len(noticed) < count:
    assert time.monotonic() < deadline, noticed
    time.sleep(0.01)


def test_all_notice_a_silent_process_and_process_0_ends_last():
  found, noticed = watches([Store()] * 4)
  found[2].stop()
  wait_for(noticed, 3)
  assert sorted(noticed) == [(0, 2), (1, 2), (3, 2)] and noticed[-1] == (0, 2)
  assert [watch.is_lost() for watch in found] == [True, True, False, True]
  for watch in found:
    watch.stop()


def test_who_cannot_reach_the_store_loses_process_0():
  store = Store()
  found, noticed = watches([store, Broken()])
  wait_for(noticed, 2)
  assert sorted(noticed) == [(0, 1), (1, 0)]
  for watch in found:
    watch.stop()


def test_a_process_that_leaves_is_not_lost():
  found, noticed = watches([Store()] * 2)
  found[1].leave()
  time.sleep(1.5 * TIMEOUT)
  found[0].leave()
  assert noticed == []


def test_a_process_is_silent_when_its_value_stays_and_not_when_it_has_left():
  silence = connections.Silence({1, 2, 3}, now=0.0)
  for process, value, now in ((1, '1', 1.0), (2, '1', 1.0), (1, '2', 5.0), (2, '1', 5.0)):
    silence.hear(process, value, now)
  silence.hear(3, 'left', 2.0)
  silence.hear(0, '1', 2.0)  # this process's own
  assert silence.longer_than(4.0, now=5.0) == []
  assert silence.longer_than(4.0, now=6.0) == [2]
  assert silence.longer_than(4.0, now=100.0) == [1, 2]


@pytest.mark.parametrize('coordinator', ['127.0.0.1:1', 'localhost:65535', '[::1]:80'])
def test_the_own_address_on_the_way_to_this_host_is_loopback(coordinator):
  assert connections.own_address(coordinator) in ('127.0.0.1', '::1')


@pytest.mark.parametrize('coordinator', ['', 'no-such-host.invalid:1', '127.0.0.1:port'])
def test_the_own_address_on_no_way_is_none(coordinator):
  assert connections.own_address(coordinator) is None
