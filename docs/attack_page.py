"""Sphinx extension: the data and the scripts of the page "Attack it yourself".

The data are made from the package each time the site is built. They are written as scripts, because
a page that is opened from a disk may load scripts but no other files.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jax
import numpy as np
from scipy.spatial.distance import pdist

import se_vae
from se_vae import data

if TYPE_CHECKING:
  from sphinx.application import Sphinx

PAGE = 'attack_it_yourself'
ENCODERS = {'vae': 'mnist_mlp_vae_latent128', 'smoothed': 'mnist_mlp_se_smoothed_latent128'}
PARTS = ('vae', 'smoothed', 'shared')


def setup(app: Sphinx) -> dict[str, bool]:
  app.connect('builder-inited', write_data)
  app.connect('html-page-context', add_files)
  return {'parallel_read_safe': True, 'parallel_write_safe': True}


def write_data(app: Sphinx) -> None:
  """Writes the data beside the site's other static files."""
  if app.builder.format == 'html':
    jax.config.update('jax_platforms', 'cpu')  # an accelerator rounds differently
    folder = Path(app.outdir) / '_static' / 'attack'
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in scripts(page_data()).items():
      (folder / f'{name}.js').write_text(text)


def add_files(
  app: Sphinx, pagename: str, templatename: str, context: dict[str, Any], doctree: object
) -> None:
  """Adds the scripts to their page alone: they have 2.6 MB."""
  if pagename == PAGE:
    app.add_css_file('attack_page.css')
    for name in (*(f'attack/{part}.js' for part in PARTS), 'attack.js', 'attack_page.js'):
      app.add_js_file(name, loading_method='defer')


def scripts(parts: Mapping[str, Any]) -> dict[str, str]:
  """The script of each of `PARTS`, which defines `attackData.vae` and so on."""
  return {
    name: f'(globalThis.attackData ??= {{}}).{name} = {json.dumps(part)};\n'
    for name, part in parts.items()
  }


def page_data() -> dict[str, Any]:
  """What the page reads: two encoders with their probes, and what they share."""
  models = {key: se_vae.load_pretrained(name) for key, name in ENCODERS.items()}
  decoder, other = (params['decoder'] for _, params in models.values())
  if not jax.tree.all(jax.tree.map(np.array_equal, decoder, other)):
    raise ValueError('the page shows one decoder, but the two encoders have different ones')

  digits = data.load('mnist_5k')
  labels = digits.test.labels['digit']
  means, probes = {}, {}
  for key, (model, params) in models.items():
    train_means = se_vae.encoder_means(model, params, digits.train.images)
    probes[key] = se_vae.fit_probe(train_means, digits.train.labels['digit'], num_classes=10)
    means[key] = se_vae.encoder_means(model, params, digits.test.images)
  logits = [np.asarray(probes[key].logits(means[key])) for key in ENCODERS]
  is_right = np.all([found.argmax(axis=1) == labels for found in logits], axis=0)
  chosen = [np.flatnonzero(is_right & (labels == digit))[0] for digit in range(10)]
  parts: dict[str, Any] = {
    key: {
      'encoder': network(encoder_layers(params)),
      'probe': network([(probes[key].weights, probes[key].bias)]),
      'deviations': [round(value, 3) for value in means[key].std(axis=0).tolist()],
      'mean_distance': round(float(pdist(means[key]).mean()), 2),
    }
    for key, (_, params) in models.items()
  }
  parts['shared'] = {
    'decoder': network(dense_layers(decoder['params'])),
    'digits': base64.b64encode(digits.test.images[chosen].tobytes()).decode(),
  }
  return parts


def dense_layers(params: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
  """Kernel and bias of `Dense_0`, `Dense_1` and so on."""
  count = sum(name.startswith('Dense_') for name in params)
  layers = (params[f'Dense_{layer}'] for layer in range(count))
  return [(np.asarray(layer['kernel']), np.asarray(layer['bias'])) for layer in layers]


def encoder_layers(params: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
  """Kernels and biases from the pixels to the means and log-variances."""
  encoder = params['encoder']['params']
  return dense_layers(encoder) + dense_layers(encoder['GaussianHead_0'])


def network(layers: Sequence[tuple[Any, Any]]) -> dict[str, Any]:
  """The widths of a network, and its kernels and biases as little-endian float16 in base64."""
  sizes = [len(layers[0][0]), *(len(bias) for _, bias in layers)]
  flat = np.concatenate([np.ravel(part) for layer in layers for part in layer]).astype('<f2')
  if not np.isfinite(flat).all():
    raise ValueError('weights must be finite in float16')
  return {'sizes': sizes, 'weights': base64.b64encode(flat.tobytes()).decode()}
