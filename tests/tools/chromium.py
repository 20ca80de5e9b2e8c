"""A headless Chromium for tests: pages, keys and scripts, through its debugging protocol."""

from __future__ import annotations

import base64
import contextlib
import itertools
import json
import os
import select
import shutil
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

TIMEOUT = 60.0  # s, for one answer
# Messages that a page must not cause.
_COMPLAINTS = {'Runtime.exceptionThrown', 'Log.entryAdded', 'Runtime.consoleAPICalled'}


def executable() -> str | None:
  """The path of a Chromium, if there is one and it can be started."""
  if shutil.which('bash') is None:
    return None
  return next(
    filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None
  )


class Page:
  """One page of a browser.

  Attributes:
    complaints: what the page has written to the console, errors included.
  """

  def __init__(self, write: int, read: int) -> None:
    self._write, self._read = write, read
    self._numbers = itertools.count(1)
    self._rest = b''
    self._session: dict[str, str] = {}
    self.complaints: list[dict[str, Any]] = []
    target = self.call('Target.createTarget', url='about:blank')['targetId']
    attached = self.call('Target.attachToTarget', targetId=target, flatten=True)
    self._session = {'sessionId': attached['sessionId']}
    for domain in ('Page', 'Runtime', 'Log'):
      self.call(f'{domain}.enable')

  def call(self, method: str, **params: Any) -> dict[str, Any]:
    """The result of a command of the protocol."""
    number = next(self._numbers)
    message = {'id': number, 'method': method, 'params': params} | self._session
    os.write(self._write, json.dumps(message).encode() + b'\0')
    while (answer := self._next()).get('id') != number:
      if answer.get('method') in _COMPLAINTS:
        self.complaints.append(answer)
    if 'error' in answer:
      raise RuntimeError(f'{method}: {answer["error"]}')
    return answer['result']

  def _next(self) -> dict[str, Any]:
    """The next message, which ends with a zero byte."""
    while b'\0' not in self._rest:
      if not select.select([self._read], [], [], TIMEOUT)[0]:
        raise TimeoutError(f'no answer from Chromium in {TIMEOUT} s')
      received = os.read(self._read, 2**16)
      if not received:
        raise EOFError('Chromium has ended')
      self._rest += received
    message, _, self._rest = self._rest.partition(b'\0')
    return json.loads(message)

  def evaluate(self, expression: str) -> Any:
    """The value of a JavaScript expression in the page."""
    done = self.call('Runtime.evaluate', expression=expression, returnByValue=True)
    if 'exceptionDetails' in done:
      raise RuntimeError(done['exceptionDetails'])
    return done['result'].get('value')

  def wait_for(self, expression: str) -> None:
    """Waits until an expression is true."""
    end = time.monotonic() + TIMEOUT
    while not self.evaluate(expression):
      if time.monotonic() > end:
        raise TimeoutError(f'{expression} is not true after {TIMEOUT} s')
      time.sleep(0.05)

  def press(self, key: str, code: int) -> None:
    """Presses a key that writes no text, with its Windows key code."""
    for kind in ('rawKeyDown', 'keyUp'):
      self.call('Input.dispatchKeyEvent', type=kind, key=key, code=key, windowsVirtualKeyCode=code)

  def mouse(self, kind: str, x: float, y: float) -> None:
    """Moves, presses or releases the left button: 'mouseMoved', 'mousePressed', 'mouseReleased'."""
    self.call(
      'Input.dispatchMouseEvent', type=kind, x=x, y=y, button='left', buttons=1, clickCount=1
    )

  def screenshot(self, path: Path) -> None:
    """Writes the whole page as a PNG."""
    taken = self.call('Page.captureScreenshot', captureBeyondViewport=True)
    path.write_bytes(base64.b64decode(taken['data']))


@contextlib.contextmanager
def page(profile: Path) -> Iterator[Page]:
  """A page of a new browser, whose files are in `profile`."""
  here_read, there_write = os.pipe()
  there_read, here_write = os.pipe()
  # Chromium reads commands from file 3 and writes answers to file 4. Bash moves them there; other
  # shells take no number above 9.
  command = f'exec "$@" 3<&{there_read} 4>&{there_write}'
  options = (
    '--headless=new',
    '--remote-debugging-pipe',
    '--no-sandbox',
    '--disable-gpu',
    '--no-first-run',
    '--disable-dev-shm-usage',
    f'--user-data-dir={profile}',
  )
  process = subprocess.Popen(
    ('bash', '-c', command, 'bash', executable(), *options),
    pass_fds=(there_read, there_write),
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  os.close(there_read)
  os.close(there_write)
  try:
    yield Page(here_write, here_read)
  finally:
    process.terminate()
    process.wait()
    os.close(here_write)
    os.close(here_read)
