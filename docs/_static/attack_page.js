'use strict';

/**
 * The controls and pictures of the page "Attack it yourself". The mathematics is in attack.js. The
 * networks are in `attackData`, which the scripts that docs/attack_page.py makes define.
 */
(() => {
  const SIDE = 28;
  const NUM_STEPS = 40;
  const FRAME_MS = 12; // of computation, so that the page answers between two frames
  const ENCODERS = { vae: 'VAE', smoothed: 'Smoothed VAE' };
  const HIGHEST_SHIFT = 4; // of the chart of latents
  const DRAWN = 'drawn'; // the value of the choice that is no digit of the set

  const decoder = attack.readNetwork(attackData.shared.decoder);
  const images = attack.bytes(attackData.shared.digits);
  const models = Object.entries(ENCODERS).map(([key, title]) => ({
    key,
    title,
    encoder: attack.readNetwork(attackData[key].encoder),
    probe: attack.readNetwork(attackData[key].probe),
    deviations: attackData[key].deviations,
    meanDistance: attackData[key].mean_distance,
  }));

  // The page

  const classes = [...Array(10).keys()];

  const controlsHtml = `
    <form class="attack-controls" autocomplete="off">
      <fieldset class="attack-digits">
        <legend>Digit</legend>
        ${classes.map((digit) => choiceHtml(digit, `the digit ${digit}`)).join('')}
        ${choiceHtml(DRAWN, 'your drawing')}
      </fieldset>
      <div class="attack-drawing">
        <canvas id="attack-pad" width="280" height="280" role="img"
          aria-label="Pad to draw a digit on, with a mouse, a pen or a finger"></canvas>
        <div><span>Or draw one.</span> <button type="button" id="attack-clear">Clear</button></div>
      </div>
      <div class="attack-radius">
        <label for="attack-radius">
          Radius <output id="attack-radius-value" aria-live="off"></output></label>
        <input type="range" id="attack-radius" min="0" max="0.3" step="0.01" value="0.1">
      </div>
      <fieldset class="attack-objectives">
        <legend>The attack maximises</legend>
        <label><input type="radio" name="objective" value="shift" checked> the latent shift</label>
        <label><input type="radio" name="objective" value="probe"> the probe's cross-entropy</label>
      </fieldset>
      <button type="button" id="attack-restart">Start from another random point</button>
    </form>`;

  /** @param {number | string} value @param {string} name */
  function choiceHtml(value, name) {
    return `<label><input type="radio" name="digit" value="${value}" aria-label="${name}">
      <canvas width="${SIDE}" height="${SIDE}"></canvas></label>`;
  }

  /** @param {{key: string, title: string, deviations: number[], meanDistance: number}} model */
  function panelHtml({ key, title, deviations, meanDistance }) {
    const picture = (/** @type {string} */ part, /** @type {string} */ name) =>
      `<canvas data-part="${part}" width="${SIDE}" height="${SIDE}" role="img"
        aria-label="${title}: ${name}"></canvas>`;
    const bars = classes.map(
      (digit) => `<span><i class="before"></i><i class="after"></i><b>${digit}</b></span>`,
    );
    return `
      <section class="attack-panel" id="attack-${key}" aria-labelledby="attack-${key}-title">
        <h2 id="attack-${key}-title">${title}</h2>
        <p class="attack-verdict" data-part="verdict"></p>
        <div class="attack-images">
          <span>x</span><span>x'</span>
          ${picture('x', 'x')}${picture('adversarial', "x'")}
          <span class="attack-row">reconstructions</span>
          ${picture('before', 'reconstruction of x')}${picture('after', "reconstruction of x'")}
        </div>
        <p class="attack-label">Latent shift <b data-part="shift"></b></p>
        <div class="attack-meter"><i data-part="meter"></i></div>
        <p class="attack-note">full bar: ${meanDistance}, the mean distance of two digits</p>
        <p class="attack-label">Shift of each latent's mean</p>
        <svg class="attack-latents" viewBox="0 0 ${deviations.length} ${HIGHEST_SHIFT}"
          preserveAspectRatio="none" role="img"
          aria-label="${title}: shift of each of ${deviations.length} latents">
          <path class="before" d="${steps(widestFirst(deviations, deviations))}"></path>
          <path class="after" data-part="latents"></path>
        </svg>
        <p class="attack-note">grey: its deviation over the test digits, widest first</p>
        <p class="attack-label">The probe's probabilities</p>
        <div class="attack-bars" data-part="bars" role="img">${bars.join('')}</div>
      </section>`;
  }

  /**
   * Values of the latents, from the one whose mean varies most over the test digits to the one whose
   * varies least.
   * @param {ArrayLike<number>} values
   * @param {number[]} deviations
   */
  function widestFirst(values, deviations) {
    const order = [...deviations.keys()].sort((a, b) => deviations[b] - deviations[a]);
    return order.map((k) => values[k]);
  }

  /** A bar of width 1 for each value, as an SVG path. @param {number[]} values */
  function steps(values) {
    const bar = (/** @type {number} */ value, /** @type {number} */ k) =>
      `M${k} ${HIGHEST_SHIFT}v${-Math.min(value, HIGHEST_SHIFT).toFixed(3)}h1V${HIGHEST_SHIFT}`;
    return values.map(bar).join('');
  }

  const root = /** @type {HTMLElement} */ (document.getElementById('attack'));
  root.innerHTML = `${controlsHtml}
    <p class="attack-status" id="attack-status" role="status" aria-live="polite"></p>
    <div class="attack-panels">${models.map(panelHtml).join('')}</div>`;

  /** @param {string} selector @param {ParentNode} [parent] @returns {any} */
  const find = (selector, parent = root) => parent.querySelector(selector);
  const parts = Object.fromEntries(
    models.map(({ key }) => [
      key,
      Object.fromEntries(
        [...root.querySelectorAll(`#attack-${key} [data-part]`)].map((element) => [
          /** @type {any} */ (element).dataset.part,
          element,
        ]),
      ),
    ]),
  );
  const radiusSlider = find('#attack-radius');
  const pad = find('#attack-pad');

  // Images

  /** @param {number} digit @returns {Float64Array} */
  function testDigit(digit) {
    const size = SIDE * SIDE;
    return Float64Array.from(images.subarray(digit * size, (digit + 1) * size), (v) => v / 255);
  }

  /** @param {HTMLCanvasElement} canvas @param {ArrayLike<number>} image in [0, 1] */
  function show(canvas, image) {
    const context = /** @type {CanvasRenderingContext2D} */ (canvas.getContext('2d'));
    const pixels = context.createImageData(SIDE, SIDE);
    for (let i = 0; i < image.length; i++) {
      pixels.data.fill(Math.round(255 * image[i]), 4 * i, 4 * i + 3);
      pixels.data[4 * i + 3] = 255;
    }
    context.putImageData(pixels, 0, 0);
  }

  // The attack

  /** @type {Float64Array | null} */
  let drawing = null;
  let seed = 0;
  let frame = 0;

  /** @param {any} model @param {ArrayLike<number>} x */
  function encode({ encoder, probe }, x) {
    const outputs = attack.apply(encoder, x);
    const mean = attack.means(outputs);
    const probabilities = attack.softmax(attack.apply(probe, mean));
    return {
      outputs,
      probabilities,
      prediction: probabilities.indexOf(Math.max(...probabilities)),
      mean,
      reconstruction: attack.apply(decoder, mean).map((v) => 1 / (1 + Math.exp(-v))),
    };
  }

  /**
   * The encoding of x, and an attack on it that has not taken a step.
   * @param {any} model
   * @param {Float64Array} x
   * @param {number} radius
   */
  function begin(model, x, radius) {
    const clean = encode(model, x);
    const objective =
      find('[name=objective]:checked').value === 'probe'
        ? attack.crossEntropy(model.probe, clean.prediction)
        : attack.encodingShift(clean.outputs);
    const start = attack.randomPoint(x, radius, attack.generator(seed));
    const iterates = attack.pgd((y) => attack.evaluate(model.encoder, objective, y), x, {
      radius,
      numSteps: NUM_STEPS,
      start,
    });
    return { model, clean, adversarial: start, iterates };
  }

  /** Attacks both encoders anew with the settings of the page, a few steps in each frame. */
  function run() {
    cancelAnimationFrame(frame);
    const radius = Number(radiusSlider.value);
    const choice = find('[name=digit]:checked').value;
    const x = choice === DRAWN && drawing ? drawing : testDigit(Number(choice));
    const attacks = models.map((model) => begin(model, x, radius));
    find('#attack-radius-value').textContent = radius.toFixed(2);
    root.dataset.state = 'running';

    function advance() {
      const end = performance.now() + FRAME_MS;
      let isRunning = true;
      while (isRunning && performance.now() < end) {
        for (const started of attacks) {
          const { value, done } = started.iterates.next();
          if (value) started.adversarial = value;
          isRunning = !done; // both take the same number of steps
        }
      }
      const results = attacks.map(({ model, clean, adversarial }) =>
        render(model, x, clean, adversarial),
      );
      if (isRunning) {
        frame = requestAnimationFrame(advance);
      } else {
        root.dataset.state = 'done';
        find('#attack-status').textContent = `Radius ${radius.toFixed(2)}. ${results.join(' ')}`;
      }
    }
    frame = requestAnimationFrame(advance);
  }

  /**
   * Shows one encoder under attack, and returns a sentence on it.
   * @param {any} model
   * @param {ArrayLike<number>} x
   * @param {any} clean the encoding of x
   * @param {Float64Array} adversarial x'
   */
  function render(model, x, clean, adversarial) {
    const part = parts[model.key];
    const found = encode(model, adversarial);
    show(part.x, x);
    show(part.adversarial, adversarial);
    show(part.before, clean.reconstruction);
    show(part.after, found.reconstruction);

    const shift = Math.sqrt(attack.encodingShift(clean.outputs)(found.outputs).value);
    part.shift.textContent = shift.toFixed(2);
    part.meter.style.width = `${100 * Math.min(shift / model.meanDistance, 1)}%`;
    const shifts = found.mean.map((value, k) => Math.abs(value - clean.mean[k]));
    part.latents.setAttribute('d', steps(widestFirst(shifts, model.deviations)));

    [...part.bars.children].forEach((bar, digit) => {
      find('.before', bar).style.height = `${100 * clean.probabilities[digit]}%`;
      find('.after', bar).style.height = `${100 * found.probabilities[digit]}%`;
    });
    const highest = (/** @type {any} */ { prediction, probabilities }) =>
      `${prediction} with ${Math.round(100 * probabilities[prediction])} %`;
    part.bars.setAttribute(
      'aria-label',
      `The probe's highest probability: for x ${highest(clean)}, for x' ${highest(found)}`,
    );

    const isChanged = found.prediction !== clean.prediction;
    part.verdict.dataset.changed = String(isChanged);
    part.verdict.textContent = isChanged
      ? `${clean.prediction} becomes ${found.prediction}`
      : `stays ${clean.prediction}`;
    const change = isChanged
      ? `the prediction changes from ${clean.prediction} to ${found.prediction}`
      : `the prediction stays ${clean.prediction}`;
    return `${model.title}: ${change}, latent shift ${shift.toFixed(2)}.`;
  }

  // Drawing

  /**
   * The drawing as MNIST's digits were made: scaled to a box of 20 pixels, its centre of mass in the
   * middle of 28.
   */
  function readPad() {
    const { width } = pad;
    const ink = pad.getContext('2d').getImageData(0, 0, width, width).data;
    let [left, top, right, bottom] = [width, width, 0, 0];
    let [mass, sumX, sumY] = [0, 0, 0];
    for (let y = 0, i = 3; y < width; y++) {
      for (let x = 0; x < width; x++, i += 4) {
        if (!ink[i]) continue;
        [left, right] = [Math.min(left, x), Math.max(right, x + 1)];
        [top, bottom] = [Math.min(top, y), Math.max(bottom, y + 1)];
        mass += ink[i];
        sumX += ink[i] * (x + 0.5);
        sumY += ink[i] * (y + 0.5);
      }
    }
    if (!mass) return null;
    const scale = 20 / Math.max(right - left, bottom - top);
    const small = document.createElement('canvas');
    small.width = small.height = SIDE;
    const context = /** @type {CanvasRenderingContext2D} */ (small.getContext('2d'));
    context.imageSmoothingQuality = 'high';
    context.setTransform(
      scale,
      0,
      0,
      scale,
      SIDE / 2 - (scale * sumX) / mass,
      SIDE / 2 - (scale * sumY) / mass,
    );
    context.drawImage(pad, 0, 0);
    const { data } = context.getImageData(0, 0, SIDE, SIDE);
    return Float64Array.from({ length: SIDE * SIDE }, (_, i) => data[4 * i + 3] / 255);
  }

  /** @param {PointerEvent} event */
  function draw(event) {
    const box = pad.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top].map(
      (v) => (v * pad.width) / box.width,
    );
    const context = pad.getContext('2d');
    if (event.type === 'pointerdown') {
      pad.setPointerCapture(event.pointerId);
      context.beginPath();
      context.moveTo(x, y);
    }
    context.lineTo(x, y);
    context.stroke();
    event.preventDefault();
  }

  /** Takes the drawing, or the lack of one, as the digit to attack. */
  function takeDrawing() {
    drawing = readPad();
    const choice = find(`[value=${DRAWN}]`);
    choice.disabled = !drawing;
    if (drawing) choice.checked = true;
    else if (choice.checked) find('[name=digit]').checked = true;
    show(choice.nextElementSibling, drawing ?? new Float64Array(SIDE * SIDE));
    run();
  }

  const pen = pad.getContext('2d', { willReadFrequently: true });
  pen.strokeStyle = 'white';
  pen.lineWidth = 22;
  pen.lineCap = pen.lineJoin = 'round';
  pad.addEventListener('pointerdown', draw);
  pad.addEventListener('pointermove', (/** @type {PointerEvent} */ event) => {
    if (pad.hasPointerCapture(event.pointerId)) draw(event);
  });
  pad.addEventListener('lostpointercapture', takeDrawing);
  find('#attack-clear').addEventListener('click', () => {
    pen.clearRect(0, 0, pad.width, pad.height);
    takeDrawing();
  });

  // The start

  classes.forEach((digit) =>
    show(find(`[name=digit][value="${digit}"]`).nextElementSibling, testDigit(digit)),
  );
  find('[name=digit][value="7"]').checked = true;
  find('form').addEventListener('input', run);
  find('#attack-restart').addEventListener('click', () => {
    seed += 1;
    run();
  });
  takeDrawing();
})();
