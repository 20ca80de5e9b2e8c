"""Compiled programs are forgotten before a process has too many of them."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import pytest

from experiments.cli import programs

pytestmark = pytest.mark.skipif(not Path('/proc/self/maps').exists(), reason='needs Linux')


@pytest.mark.long
def test_they_are_forgotten_where_their_memory_maps_are_many(tmp_path, monkeypatch):
  maps = len(Path('/proc/self/maps').read_text().splitlines())
  limit = tmp_path / 'max_map_count'
  monkeypatch.setattr(programs, '_LIMIT', limit)
  traced = 0

  @jax.jit
  def function(x):
    nonlocal traced
    traced += 1
    return x + 1.0

  limit.write_text(f'{20 * maps}\n')  # a twentieth is in use
  function(jnp.zeros(3))
  assert not programs.forget_if_many()
  function(jnp.zeros(3))
  assert traced == 1

  limit.write_text(f'{maps}\n')
  assert programs.forget_if_many()
  assert function(jnp.zeros(3)).tolist() == [1.0, 1.0, 1.0]
  assert traced == 2


def test_where_the_system_does_not_tell_nothing_is_forgotten(tmp_path, monkeypatch):
  monkeypatch.setattr(programs, '_LIMIT', tmp_path / 'none')
  assert not programs.forget_if_many(0.001)
