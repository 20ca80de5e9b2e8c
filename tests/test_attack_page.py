"""The page of the documentation that attacks two encoders in the browser."""

from __future__ import annotations

import base64
import json
import re
import runpy
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import py_mini_racer
import pytest

import se_vae
from se_vae.attacks import losses
from se_vae.evaluation.linear_probe import LinearProbe, ProbedEncoder
from se_vae.training import EncodingShift
from tests.tools import chromium

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[1]
STATIC = ROOT / 'docs' / '_static'
RADIUS = 0.1
# Both sides compute in float64 with the same float16 weights, so they differ by the order in which
# they add up at most 784 products: 1e-13 of the largest value.
TOLERANCE = 1e-11

# The functions below run in the engine. V8 alone has no atob, which all browsers have.
HARNESS = """
const text = (bytes) => Array.from(bytes, (byte) => String.fromCharCode(byte)).join('');
globalThis.atob = (base64) => text(Uint8Array.fromBase64(base64));
"""
FUNCTIONS = """
const images = attack.bytes(attackData.shared.digits);
const digit = (i) => Array.from(images.subarray(784 * i, 784 * (i + 1)), (value) => value / 255);
const models = Object.fromEntries(['vae', 'smoothed'].map((key) => [key, {
  encoder: attack.readNetwork(attackData[key].encoder),
  probe: attack.readNetwork(attackData[key].probe),
}]));
const decoder = attack.readNetwork(attackData.shared.decoder);
const apply = (network, x) => Array.from(attack.apply(network, x));
const objectives = {
  shift: (key, i) => attack.encodingShift(attack.apply(models[key].encoder, digit(i))),
  probe: (key, i) => attack.crossEntropy(models[key].probe, i),
};
function evaluate(name, key, i, x) {
  const { value, gradient } = attack.evaluate(models[key].encoder, objectives[name](key, i), x);
  return { value, gradient: Array.from(gradient) };
}
function pgd(name, key, i, start, radius, numSteps) {
  const objective = (x) => attack.evaluate(models[key].encoder, objectives[name](key, i), x);
  const settings = { radius, numSteps, start: Float64Array.from(start) };
  return [...attack.pgd(objective, digit(i), settings)].map((x) => Array.from(x));
}
const start = (i, radius) => Array.from(attack.randomPoint(digit(i), radius, attack.generator(i)));
"""


@pytest.fixture(scope='module')
def page():
  return SimpleNamespace(**runpy.run_path(str(ROOT / 'docs' / 'attack_page.py')))


@pytest.fixture(scope='module')
def parts(page):
  return page.page_data()


@pytest.fixture(scope='module')
def call(page, parts):
  """Calls a function of `FUNCTIONS` on the page's own data."""
  engine = py_mini_racer.MiniRacer()
  for code in (
    HARNESS,
    *page.scripts(parts).values(),
    (STATIC / 'attack.js').read_text(),
    FUNCTIONS,
  ):
    engine.eval(code)

  def call(expression, *arguments):
    code = ', '.join(json.dumps(np.asarray(argument).tolist()) for argument in arguments)
    return json.loads(engine.eval(f'JSON.stringify({expression}({code}))'))

  yield call
  engine.close()


@pytest.fixture(scope='module')
def models(page, parts):
  """The library's model, its parameters and the page's probe for each key, in float64."""
  found = {}
  for key, name in page.ENCODERS.items():
    model, params = se_vae.load_pretrained(name)
    half = np.frombuffer(base64.b64decode(parts[key]['probe']['weights']), '<f2')
    with jax.enable_x64(True):
      weights, bias = np.split(half.astype(np.float64), [1280])
      probe = LinearProbe(jnp.asarray(weights.reshape(128, 10)), jnp.asarray(bias))
      params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float64), params)
    found[key] = model, params, probe
  return found


@pytest.fixture
def x64():
  with jax.enable_x64(True):
    yield


def images(call):
  return jnp.asarray([call('digit', i) for i in range(10)]).reshape(10, 28, 28, 1)


def objective(name, model, params, probe, x):
  """The library's objective of images, which aims at the ten digits."""
  if name == 'shift':
    q_a = model.encode(params, x)
    return lambda y: EncodingShift(model)(y, params, q_a)
  aim = losses.Aim(jnp.arange(10))
  return lambda y: losses.CrossEntropy(ProbedEncoder(model))(y, aim, params, probe)


def assert_close(found, wanted):
  wanted = np.asarray(wanted)
  assert np.abs(np.asarray(found) - wanted).max() <= TOLERANCE * np.abs(wanted).max()


@pytest.mark.parametrize('key', ['vae', 'smoothed'])
@pytest.mark.usefixtures('x64')
def test_the_networks_are_the_librarys(call, models, key):
  model, params, probe = models[key]
  x = images(call)
  q = model.encode(params, x)
  outputs = np.array(
    [call(f'((i) => apply(models.{key}.encoder, digit(i)))', i) for i in range(10)]
  )
  assert_close(outputs[:, :128], q.mean)
  assert_close(outputs[:, 128:], q.log_var)
  logits = probe.logits(q.mean)
  for i, mean in enumerate(np.asarray(q.mean)):
    assert_close(call(f'((z) => apply(models.{key}.probe, z))', mean), logits[i])
    decoded = call('((z) => apply(decoder, z))', mean)
    assert_close(jax.nn.sigmoid(jnp.asarray(decoded)), model.decode(params, q.mean)[i].ravel())
  assert logits.argmax(axis=1).tolist() == list(range(10))  # the page takes this for the labels


@pytest.mark.parametrize('name', ['shift', 'probe'])
@pytest.mark.parametrize('key', ['vae', 'smoothed'])
@pytest.mark.usefixtures('x64')
def test_gradients_are_the_librarys(call, models, key, name):
  x = images(call)
  # Away from x, where the shift has a gradient.
  y = jnp.clip(x + RADIUS * jnp.asarray(np.random.default_rng(0).uniform(-1, 1, x.shape)), 0, 1)
  function = objective(name, *models[key], x)
  total = jax.grad(lambda y: (function(y).sum(), function(y)), has_aux=True)
  gradients, values = jax.jit(total)(y)
  wanted = np.asarray(gradients).reshape(10, -1)
  for i, value in enumerate(values):
    found = call('evaluate', name, key, i, y[i].ravel())
    assert_close(found['value'], value)
    assert_close(found['gradient'], wanted[i])
    is_clear = np.abs(wanted[i]) > TOLERANCE * np.abs(wanted[i]).max()
    assert is_clear.mean() > 0.5
    np.testing.assert_array_equal(
      np.sign(found['gradient'])[is_clear], np.sign(wanted[i])[is_clear]
    )


@pytest.mark.parametrize(
  ('key', 'name'),
  [
    ('vae', 'shift'),
    ('smoothed', 'probe'),
    pytest.param('vae', 'probe', marks=pytest.mark.slow),
    pytest.param('smoothed', 'shift', marks=pytest.mark.slow),
  ],
)
@pytest.mark.usefixtures('x64')
def test_the_attack_is_the_librarys(call, models, key, name):
  x = images(call)
  start = jnp.asarray([call('start', i, RADIUS) for i in range(10)]).reshape(x.shape)
  assert len(np.unique(start)) > 1000
  function = objective(name, *models[key], x)
  wanted = se_vae.pgd(function, jax.random.key(0), x, radius=RADIUS, num_steps=40, start=start)
  for i in range(10):
    iterates = np.array(call('pgd', name, key, i, start[i].ravel(), RADIUS, 40))
    assert len(iterates) == 40
    for point in (np.asarray(start[i]).ravel(), *iterates):
      assert (np.abs(point - np.asarray(x[i]).ravel()) <= RADIUS + 1e-15).all()
      assert (point >= 0.0).all() and (point <= 1.0).all()
    # No step has turned on a sign that rounding decides, or the two would part.
    np.testing.assert_allclose(iterates[-1], wanted[i].ravel(), rtol=0, atol=TOLERANCE)


@pytest.mark.usefixtures('x64')
def test_the_vae_shifts_along_latents_that_the_digits_hardly_use(call, models, parts):
  """As the page says of the six widest latents, at the radius that it starts with."""
  x, shares = images(call), {}
  for key, (model, params, _) in models.items():
    variances = np.square(parts[key]['deviations'])
    widest = np.argsort(-variances)[:6]
    assert variances[widest].sum() > 0.5 * variances.sum()
    found = [
      call('pgd', 'shift', key, i, call('start', i, RADIUS), RADIUS, 40)[-1] for i in range(10)
    ]
    x_adv = jnp.asarray(found).reshape(x.shape)
    squares = np.square(model.encode(params, x_adv).mean - model.encode(params, x).mean)
    shares[key] = squares[:, widest].sum() / squares.sum()
  assert shares['vae'] < 0.5 < shares['smoothed'], shares


def test_data_are_the_same_each_time_and_below_a_megabyte_an_encoder(page, parts):
  assert page.page_data() == parts
  assert tuple(parts) == page.PARTS
  assert all(len(script) < 1_000_000 for script in page.scripts(parts).values())


def test_decoders_that_differ_are_refused(page, monkeypatch):
  def load(name, *, load=se_vae.load_pretrained):
    model, params = load(name)
    if '_se_' in name:
      params = params | {'decoder': jax.tree.map(jnp.negative, params['decoder'])}
    return model, params

  monkeypatch.setattr(se_vae, 'load_pretrained', load)
  with pytest.raises(ValueError, match='two encoders have different ones'):
    page.page_data()


# In a browser

STATUS = "document.querySelector('#attack-status').textContent"
DONE = "document.querySelector('#attack')?.dataset.state === 'done'"


@pytest.fixture(scope='module')
def site(tmp_path_factory):
  """The address of the page in the built site."""
  pytest.importorskip('sphinx')
  pytest.importorskip('furo')
  folder = tmp_path_factory.mktemp('site')
  line = (sys.executable, '-m', 'sphinx', '--builder=html', '--quiet', '-d', folder / 'doctrees')
  done = subprocess.run((*line, ROOT / 'docs', folder / 'html'), capture_output=True, text=True)
  assert done.returncode == 0, done.stderr
  return (folder / 'html' / 'attack_it_yourself.html').as_uri()


@pytest.fixture
def browser(site, tmp_path):
  if chromium.executable() is None:
    pytest.skip('needs Chromium')
  with chromium.page(tmp_path / 'profile') as browser:
    browser.call('Page.navigate', url=site)
    browser.wait_for(DONE)
    yield browser
    assert browser.complaints == []


def set_radius(browser, radius):
  slider = "document.querySelector('#attack-radius')"
  event = "new Event('input', {bubbles: true})"
  browser.evaluate(f'{slider}.value = {radius}; {slider}.dispatchEvent({event}); 0')
  browser.wait_for(DONE)
  return browser.evaluate(STATUS)


@pytest.mark.slow
def test_the_attack_runs_in_a_browser(browser):
  status = set_radius(browser, 0)
  assert re.search(r'VAE: the prediction stays (\d), latent shift 0.00', status), status
  status = set_radius(browser, 0.2)
  assert re.search(r'^Radius 0.20. VAE: the prediction changes from 7 to \d', status), status
  shifts = [float(shift) for shift in re.findall(r'latent shift ([\d.]+\d)', status)]
  assert shifts[0] > 2 * shifts[1] > 0


@pytest.mark.slow
def test_the_keyboard_reaches_every_control(browser):
  focus = 'document.activeElement.id || document.activeElement.value'
  browser.evaluate("document.querySelector('[name=digit]:checked').focus()")
  browser.press('ArrowRight', 39)
  assert browser.evaluate(focus) == '8'
  browser.wait_for(DONE)
  assert 'stays 8' in browser.evaluate(STATUS) or 'from 8' in browser.evaluate(STATUS)
  order = ['attack-clear', 'attack-radius', 'shift', 'attack-restart']
  for control in order:
    browser.press('Tab', 9)
    assert browser.evaluate(focus) == control
    if control == 'attack-radius':
      for _ in range(2):
        browser.press('ArrowRight', 39)
      browser.wait_for(DONE)
      assert browser.evaluate(STATUS).startswith('Radius 0.12.')


@pytest.mark.slow
def test_a_drawing_is_attacked(browser):
  """A vertical stroke, which the probes take for a 1."""
  box = browser.evaluate("document.querySelector('#attack-pad').getBoundingClientRect().toJSON()")
  left, top, width = box['left'], box['top'], box['width']
  x = left + 0.3 * width
  browser.mouse('mousePressed', x, top + 0.2 * width)
  for part in np.linspace(0.2, 0.8, 20):
    browser.mouse('mouseMoved', x, top + part * width)
  browser.mouse('mouseReleased', x, top + 0.8 * width)
  browser.wait_for("document.querySelector('[name=digit]:checked').value === 'drawn'")
  set_radius(browser, 0)
  assert browser.evaluate(STATUS).count('the prediction stays 1') == 2
  # Scaled to 20 pixels and centred, wherever it was drawn.
  ink = browser.evaluate("""(() => {
    const canvas = document.querySelector('[name=digit]:checked + canvas');
    const { data } = canvas.getContext('2d').getImageData(0, 0, 28, 28);
    return Array.from({ length: 784 }, (_, i) => data[4 * i] / 255);
  })()""")
  ink = np.reshape(ink, (28, 28))
  rows = np.flatnonzero(ink.max(axis=1) > 0.1)
  assert 19 <= np.ptp(rows) + 1 <= 22
  for axis in (0, 1):
    center = (ink.sum(axis=1 - axis) * (np.arange(28) + 0.5)).sum() / ink.sum()
    assert abs(center - 14) < 0.3
  browser.evaluate("document.querySelector('#attack-clear').click()")
  browser.wait_for(DONE)
  assert browser.evaluate("document.querySelector('[name=digit]:checked').value") == '0'
