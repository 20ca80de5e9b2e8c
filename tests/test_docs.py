"""The pages for users: their links lead somewhere, and their Python is valid."""

import ast
import re
from pathlib import Path

import pytest

from experiments import flag_reference

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob('*.md'), *(ROOT / 'docs').glob('*.md')]


def anchors(page):
  """The anchors that GitHub gives the headings of a page."""
  text = re.sub(r'```.*?```', '', page.read_text(), flags=re.DOTALL)
  headings = re.findall(r'^#+ (.*)$', text, flags=re.MULTILINE)
  return {re.sub(r'[^\w\- ]', '', heading.lower()).replace(' ', '-') for heading in headings}


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_links_lead_to_files_and_headings(page):
  for target in re.findall(r'\]\(([^)\s]+)\)', page.read_text()):
    if not target.startswith('https://'):
      name, _, anchor = target.partition('#')
      path = page.parent / name if name else page
      assert path.exists(), target
      assert not anchor or anchor in anchors(path), target


@pytest.mark.parametrize('page', PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page):
  for block in re.findall(r'```python\n(.*?)```', page.read_text(), flags=re.DOTALL):
    ast.parse(block)


def test_the_readme_is_short():
  assert len((ROOT / 'README.md').read_text().splitlines()) <= 150


def test_the_flag_reference_is_that_of_the_settings():
  assert flag_reference.references() in (ROOT / 'docs' / 'flags.md').read_text()
