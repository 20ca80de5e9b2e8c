"""The results of sanity checks, as JSON values and in one line of text. Imports no JAX."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Literal, NamedTuple, NotRequired, TypedDict

from se_vae.storage import json_files


class CheckRecord(TypedDict):
  """A check in a JSON file; files of older versions have `passed` alone and no verdict."""

  number: int
  name: str
  figure: str
  verdict: NotRequired[Literal['pass', 'fail', 'skipped']]
  passed: NotRequired[bool | None]
  values: NotRequired[dict[str, Any]]


class SanityCheck(NamedTuple):
  """The result of one check.

  Attributes:
    number: 1 to 13.
    name: the statement that is checked.
    verdict: 'pass', 'fail' or 'skipped'.
    figure: the reason for the verdict, in one line.
    values: the numbers behind it, as JSON values.
  """

  number: int
  name: str
  verdict: str
  figure: str
  values: dict[str, Any]

  def __repr__(self) -> str:
    return f'SanityCheck({self.number}: {self.name}, {self.verdict}: {self.figure})'

  @property
  def passed(self) -> bool | None:
    """None if the check was skipped."""
    return {'pass': True, 'fail': False, 'skipped': None}[self.verdict]

  def to_json(self) -> dict[str, Any]:
    """JSON values: `number, name, verdict, passed, figure, values`."""
    content = self._asdict()
    values = content.pop('values')
    figure = content.pop('figure')
    return {**content, 'passed': self.passed, 'figure': figure, 'values': values}

  @classmethod
  def from_json(cls, content: Mapping[str, Any]) -> SanityCheck:
    """What `to_json` gave, in files of older versions too, which have `passed` alone.

    Raises:
      JsonError: for values that are no check.
    """
    check = json_files.check(dict(content), CheckRecord)
    if 'verdict' not in check and check.get('passed') is None:
      raise json_files.JsonError('a check has no verdict')
    verdict = check.get('verdict') or ('pass' if check['passed'] else 'fail')
    values = check.get('values', {})
    return cls(check['number'], check['name'], verdict, check['figure'], values)


def summary(checks: Iterable[SanityCheck | Mapping[str, Any]]) -> str:
  """One line that counts the verdicts, and names the checks that failed or were skipped.

  Example:
    >>> summary([SanityCheck(7, 'Square is weaker', 'skipped', 'Square is for linf', {})])
    'checks: 0 passed, 0 failed, 1 skipped (7: Square is weaker)'

  Args:
    checks: checks, or their JSON values; of several evaluations one after the other too.
  """
  found = [
    each if isinstance(each, SanityCheck) else SanityCheck.from_json(each) for each in checks
  ]
  if not found:
    return 'checks: not run'
  parts = []
  for verdict, word in (('pass', 'passed'), ('fail', 'failed'), ('skipped', 'skipped')):
    named = [f'{check.number}: {check.name}' for check in found if check.verdict == verdict]
    times = {name: named.count(name) for name in named}  # more than one for several evaluations
    texts = (name if count == 1 else f'{name}, {count} times' for name, count in times.items())
    names = f' ({"; ".join(texts)})' if named and verdict != 'pass' else ''
    parts.append(f'{len(named)} {word}{names}')
  return f'checks: {", ".join(parts)}'
