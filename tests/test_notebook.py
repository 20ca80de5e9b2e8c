"""The notebook runs from top to bottom, and is stored with the outputs of such a run."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).parents[1]
PATH = ROOT / 'notebooks' / 'smooth_encoders.ipynb'


def kinds(cell) -> list[str]:
  """What a cell has put out: 'text', or 'image/png'; one entry a stream."""
  return [
    'text' if output.output_type == 'stream' else max(output.data, key='image/png'.__eq__)
    for output in cell.outputs
  ]


def code_cells(path: Path) -> list:
  notebook = nbformat.read(path, as_version=4)
  nbformat.validate(notebook)
  return [cell for cell in notebook.cells if cell.cell_type == 'code']


def test_notebook_is_stored_as_it_was_run():
  cells = code_cells(PATH)
  assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
  assert 10 <= len(cells) <= 15
  assert not [o for cell in cells for o in cell.outputs if o.output_type == 'error']
  assert not [o for cell in cells for o in cell.outputs if o.get('name') == 'stderr']
  assert sum(kinds(cell).count('image/png') for cell in cells) == 7
  assert PATH.stat().st_size < 1_000_000


@pytest.mark.slow
def test_notebook_runs(tmp_path):
  """In a process of its own: a kernel has its own warnings, and its own devices."""
  code = (
    'import sys, nbclient, nbformat\n'
    'notebook = nbformat.read(sys.argv[1], as_version=4)\n'
    "resources = {'metadata': {'path': sys.argv[2]}}\n"
    'nbclient.NotebookClient(notebook, timeout=600, resources=resources).execute()\n'
    'nbformat.write(notebook, sys.argv[3])\n'
  )
  fresh = tmp_path / 'fresh.ipynb'
  line = [sys.executable, '-c', code, str(PATH), str(ROOT), str(fresh)]
  environment = {**os.environ, 'IPYTHONDIR': str(tmp_path / 'ipython')}
  done = subprocess.run(line, cwd=ROOT, env=environment, capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  before, after = code_cells(PATH), code_cells(fresh)
  assert len(after) == len(before)
  for stored, ran in zip(before, after, strict=True):
    # Streams may come in several pieces; the numbers in them are those of this machine.
    assert set(kinds(ran)) == set(kinds(stored)), ran.source
