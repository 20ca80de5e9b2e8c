"""Hypothesis settings and strategies of the tests that damage their inputs."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Any

from hypothesis import HealthCheck, seed, settings
from hypothesis import strategies as st

COUNT = int(os.environ.get('SE_VAE_FUZZ', '40'))
SEED = os.environ.get('SE_VAE_FUZZ_SEED')  # the same inputs each time where it is not given


def fuzz(share: float = 1.0) -> Callable[[Any], Any]:
  """Gives a test SE_VAE_FUZZ inputs, or a share of them where an input is slow."""
  chosen = settings(
    max_examples=max(3, int(COUNT * share)),
    derandomize=True,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
  )
  return chosen if SEED is None else lambda test: seed(int(SEED))(chosen(test))


@st.composite
def damaged(draw: st.DrawFn, original: bytes) -> bytes:
  """A few of: bytes changed, cut off, inserted, appended."""
  content = bytearray(original)
  for _ in range(draw(st.integers(1, 3))):
    place = draw(st.integers(0, max(0, len(content) - 1)))
    match draw(st.sampled_from(['change', 'cut', 'insert', 'append'])):
      case 'change' if content:
        content[place] ^= draw(st.integers(1, 255))
      case 'cut':
        del content[place:]
      case 'insert':
        content[place:place] = draw(st.binary(min_size=1, max_size=8))
      case _:
        content += draw(st.binary(min_size=1, max_size=8))
  return bytes(content)


JSON: st.SearchStrategy[Any] = st.recursive(
  st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
  lambda inner: (
    st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
  ),
  max_leaves=6,
)


@st.composite
def altered(draw: st.DrawFn, original: Any) -> Any:
  """A JSON value in which one or two values are replaced, left out, or repeated."""
  content = copy.deepcopy(original)
  for _ in range(draw(st.integers(1, 2))):
    content = _alter(draw, content)
  return content


def _alter(draw: st.DrawFn, content: Any) -> Any:
  action = draw(st.sampled_from(['descend'] * 6 + ['replace', 'leave out', 'repeat']))
  if action == 'replace' or not isinstance(content, dict | list) or not content:
    return draw(JSON)
  key = draw(st.sampled_from(list(content) if isinstance(content, dict) else range(len(content))))
  if action == 'leave out':
    del content[key]
  elif action == 'descend':
    content[key] = _alter(draw, content[key])
  elif isinstance(content, list):
    content.insert(key, content[key])
  else:
    content[draw(st.text(max_size=4))] = content[key]
  return content
