"""Sphinx settings of the documentation site: `make docs` builds it, without network."""

from __future__ import annotations

import re
import sys
from pathlib import Path

import flax.linen as nn
import jax
import optax
from docutils import nodes
from docutils.utils.math import latex2mathml
from sphinx.application import Sphinx
from sphinx.ext import autosummary
from sphinx.writers.html5 import HTML5Translator

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / 'docs')]

import se_vae  # noqa: E402 - the checkout's, wherever Sphinx runs

# Types are called and linked by the names that users import, and not by where they are defined.
for module, kind in (
  ('flax.linen', nn.Module),
  ('jax', jax.Array),
  ('jax.sharding', jax.sharding.Mesh),
  ('optax', optax.GradientTransformation),
):
  kind.__module__ = module
jax.Array.__qualname__ = 'Array'

project = 'se_vae'
author = 'The se_vae authors'
release = se_vae.__version__

extensions = [
  'myst_nb',
  'sphinx.ext.autodoc',
  'sphinx.ext.autosummary',
  'sphinx.ext.intersphinx',
  'sphinx.ext.napoleon',
  'sphinx.ext.viewcode',
  'sphinx_copybutton',
  'attack_page',  # beside this file
]

# Pages are Markdown, and have the anchors that GitHub gives their headings.
myst_enable_extensions = ['dollarmath', 'amsmath']
myst_heading_anchors = 4
nb_execution_mode = 'off'  # the notebook is stored with its outputs; `make notebook` runs it
exclude_patterns = ['_build']

# Single backquotes in docstrings are names: links where they can be.
default_role = 'py:obj'
nitpick_ignore_regex = [
  ('py:obj', '.*'),
  ('py:exc', 'JsonError'),  # in no page: only readers of this project's own files meet it
  # Of named tuples, as strings; and a ParamSpec.
  ('py:class', '(np.ndarray|Array|Path|(vae.)?Params|Arguments)'),
]
autodoc_member_order = 'bysource'
autodoc_typehints_format = 'short'
autodoc_default_options = {'members': True}
autodoc_preserve_defaults = True
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 88
autodoc_type_aliases = {
  'ArrayLike': 'jax.typing.ArrayLike',
  'jax.typing.ArrayLike': 'jax.typing.ArrayLike',
}
napoleon_numpy_docstring = False
napoleon_use_ivar = True
autosummary_generate = False
autosummary.WELL_KNOWN_ABBREVIATIONS += ('Eq.', 'Sec.')  # they end no sentence
# Written by hand in Sphinx's plain format, with the names that types and docstrings mention.
intersphinx_mapping = {
  'flax': ('https://flax-linen.readthedocs.io/en/latest/', 'inventories/flax.txt'),
  'jax': ('https://docs.jax.dev/en/latest/', 'inventories/jax.txt'),
  'numpy': ('https://numpy.org/doc/stable/', 'inventories/numpy.txt'),
  'optax': ('https://optax.readthedocs.io/en/latest/', 'inventories/optax.txt'),
  'python': ('https://docs.python.org/3/', 'inventories/python.txt'),
}

html_theme = 'furo'
html_title = 'se_vae'
html_static_path = ['_static']
html_css_files = ['site.css']
html_copy_source = False
html_show_copyright = False
html_show_sourcelink = False
html_math_renderer = 'mathml'

# Pages of the repository's top folder, which take the place of their stubs.
TOP_PAGES = {'build': 'BUILD.md', 'changelog': 'CHANGELOG.md', 'results': 'RESULTS.md'}


def take_top_pages(app: Sphinx, docname: str, source: list[str]) -> None:
  """Shows the pages of the top folder, and makes the links from and to them those of the site."""
  text = source[0]
  if docname in TOP_PAGES:
    path = ROOT / TOP_PAGES[docname]
    app.env.note_dependency(path)
    text = re.sub(r'\]\((?!https?:|#)', '](../', path.read_text()).replace('](../docs/', '](')
  for page, name in TOP_PAGES.items():
    text = text.replace(f'](../{name}', f']({page}.md')
  source[0] = re.sub(r'\[([^]]*)\]\(\.\./notebooks/.*?\)', r'{doc}`\1 <tutorial>`', text)


def visit_math(translator: HTML5Translator, node: nodes.math) -> None:
  """Writes a formula as MathML, which browsers show without a script."""
  block = isinstance(node, nodes.math_block)
  mathml = latex2mathml.tex2mathml(node.astext(), as_block=block)
  # As in TeX: a norm does not grow with what is in it, and a function stands off from its argument.
  mathml = mathml.replace('<mo>‖', '<mo stretchy="false" lspace="0" rspace="0">‖')
  mathml = re.sub(r'(&ApplyFunction;</mo>)(?=\s*<m[^o])', r'\1<mspace width="0.17em"/>', mathml)
  translator.body.append(f'<div class="formula">{mathml}</div>' if block else mathml)
  raise nodes.SkipNode


def skip_fields(
  app: Sphinx, what: str, name: str, obj: object, skip: bool, options: object
) -> bool | None:
  """Leaves out the fields of named tuples, which the docstring of their class explains."""
  return True if type(obj).__name__ == '_tuplegetter' else None


def shorten_signature(
  app: Sphinx,
  what: str,
  name: str,
  obj: object,
  options: object,
  signature: str | None,
  result: str | None,
) -> tuple[str | None, str | None]:
  """Writes aliases of types as the source does, and leaves out what Flax adds to a module."""
  signature, result = (
    text and re.sub(r"TypeAliasForwardRef\('([^']*)'\)", r'\1', text)
    for text in (signature, result)
  )
  return signature and re.sub(r',? *parent: .*\)$', ')', signature), result


def setup(app: Sphinx) -> None:
  app.connect('autodoc-skip-member', skip_fields)
  app.connect('autodoc-process-signature', shorten_signature)
  app.connect('source-read', take_top_pages)
  app.add_html_math_renderer('mathml', (visit_math, None), (visit_math, None))
