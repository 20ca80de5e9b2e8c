"""JSON files: what is written is JSON, and what is read is of the type that the reader needs."""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, Literal, NotRequired, TypedDict

import pytest

from se_vae.storage import json_files


class Record(TypedDict):
  step: int
  rate: float
  pairs: list[tuple[float, float]]
  colour: Literal['red', 'blue']
  limit: int | None
  parts: NotRequired[dict[str, list[str]]]


GOOD: dict[str, Any] = {
  'step': 3,
  'rate': 1,
  'pairs': [[0.5, 2]],
  'colour': 'red',
  'limit': None,
  'parts': {'a': ['b']},
  'other': {'anything': [None]},
}


def test_a_record_is_returned_as_it_is():
  assert json_files.loads(json.dumps(GOOD).encode(), Record) == GOOD
  few = {name: value for name, value in GOOD.items() if name not in ('parts', 'other')}
  assert json_files.check(few, Record) == few


@pytest.mark.parametrize(
  ('change', 'message'),
  [
    ({'step': True}, 'step must be an integer, got True'),
    ({'step': 1.0}, r'step must be an integer, got 1\.0'),
    ({'step': None}, 'step must be an integer, got None'),
    ({'rate': '1'}, "rate must be a number, got '1'"),
    ({'pairs': {}}, 'pairs must be a list, got {}'),
    ({'pairs': [[1]]}, 'pairs must have 2 items, got 1'),
    ({'pairs': [[1, 'x']]}, "pairs must be a number, got 'x'"),
    ({'colour': []}, r'colour must be one of red, blue, got \[\]'),
    ({'limit': 'x'}, "limit must be an integer, got 'x'"),
    ({'parts': None}, 'parts must be an object, got None'),
    ({'parts': {'a': [1]}}, r'parts\.a must be a text, got 1'),
  ],
)
def test_a_value_of_the_wrong_type_is_named_with_its_place(change, message):
  with pytest.raises(json_files.JsonError, match=f'^{message}$'):
    json_files.check(GOOD | change, Record)


def test_missing_names_are_named():
  with pytest.raises(json_files.JsonError, match=r'^the content has no rate, colour, limit$'):
    json_files.check({'step': 1, 'pairs': []}, Record)
  with pytest.raises(json_files.JsonError, match=r'^the content must be an object, got \[\]$'):
    json_files.check([], Record)


def test_numbers_that_are_not_finite_are_null_in_the_file_and_nan_for_the_reader():
  text = json_files.dumps({'a': math.nan, 'b': [math.inf, (1.0,)], 'c': None})
  assert json.loads(text) == {'a': None, 'b': [None, [1.0]], 'c': None}
  for literal in (b'null', b'NaN', b'-Infinity', b'1e999'):
    content = b'{"a": %b}' % literal
    assert json_files.loads(content, dict[str, Any]) == {'a': None}
    assert math.isnan(json_files.loads(content, dict[str, float])['a'])
    with pytest.raises(json_files.JsonError, match='a must be an integer, got None'):
      json_files.loads(content, dict[str, int])


@pytest.mark.parametrize(
  ('text', 'message'),
  [
    (b'', 'empty'),
    (b' \n', 'empty'),
    (b'{"a": 1', 'no JSON'),
    (b'{"a": 1}}', 'no JSON'),
    (b'\xff\xfe{}', 'no JSON'),
    (b'{"a": 1, "a": 1}', 'an object has a name twice'),
    (b'[' * 100_000, 'no JSON'),
    (b'{"a": ' + b'[' * 101 + b']' * 101 + b'}', 'nested more than 100 levels deep'),
    (b'{"a": "\\ud800"}', 'no JSON'),
    (b'{"\\ud800": 1}', 'no JSON'),
    (b'{"a": ' + b'9' * 30 + b'}', 'an integer has more than 64 bits'),
    (b'{"a": ' + b'9' * 10_000 + b'}', 'no JSON'),
    (b'null', 'the content must be an object, got None'),
  ],
)
def test_what_is_not_json_is_refused_in_a_line(tmp_path, text, message):
  path = tmp_path / 'a.json'
  path.write_bytes(text)
  with pytest.raises(json_files.JsonError, match=rf'a\.json: damaged \({message}') as error:
    json_files.read(path, dict[str, Any])
  assert '\n' not in str(error.value)


def test_a_huge_file_is_refused_before_it_is_parsed(tmp_path, monkeypatch):
  monkeypatch.setattr(json_files, 'LARGEST', 10)
  (tmp_path / 'a.json').write_text('{"a": "0123456789"}')
  with pytest.raises(json_files.JsonError, match='longer than 10 bytes'):
    json_files.read(tmp_path / 'a.json', dict[str, Any])


def test_a_byte_order_mark_is_passed_over():
  assert json_files.loads(b'\xef\xbb\xbf{"a": 1}', dict[str, int]) == {'a': 1}


class Curve(TypedDict):
  radii: Annotated[list[float], json_files.SAME_LENGTH]
  accuracy: Annotated[list[float], json_files.SAME_LENGTH]


def test_lists_that_belong_together_have_one_length():
  assert json_files.check({'radii': [0.1], 'accuracy': [0.5]}, Curve)
  with pytest.raises(json_files.JsonError, match='different lengths'):
    json_files.check({'radii': [0.1], 'accuracy': []}, Curve)
