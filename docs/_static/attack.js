'use strict';

/**
 * The mathematics of the page "Attack it yourself": networks, gradients and projected gradient
 * ascent, for one image at a time. It uses no DOM, so that a test can run it in an engine without a
 * browser and compare it with the library.
 *
 * Weights are float16 values; everything is computed in float64. Images are arrays of 784 numbers
 * in [0, 1], and an encoder's outputs are D means followed by D log-variances.
 *
 * @typedef {{inputs: number, outputs: number, kernel: Float32Array, bias: Float32Array}} Layer
 *   of a linear map x -> x kernel + bias; the kernel is [inputs, outputs], row by row
 * @typedef {Layer[]} Network of linear layers, with a ReLU after each but the last
 * @typedef {{sizes: number[], weights: string}} StoredNetwork
 *   the widths from the inputs to the outputs; kernel and bias of each layer, float16 in base64
 * @typedef {{value: number, gradient: Float64Array}} Point of a function
 * @typedef {(outputs: Float64Array) => Point} Objective of an encoder's outputs
 */
const attack = (() => {
  /** The bytes of a base64 string. @param {string} text @returns {Uint8Array} */
  function bytes(text) {
    return Uint8Array.from(atob(text), (character) => character.charCodeAt(0));
  }

  /** A finite float16 from its bits. @param {number} bits @returns {number} */
  function half(bits) {
    const sign = bits >> 15 ? -1 : 1;
    const exponent = (bits >> 10) & 31;
    const fraction = bits & 1023;
    // Numbers of the lowest exponent are subnormal: they have no leading one.
    return sign * (exponent ? (1024 + fraction) * 2 ** (exponent - 25) : fraction * 2 ** -24);
  }

  /** @param {StoredNetwork} stored @returns {Network} */
  function readNetwork({ sizes, weights }) {
    const stored = bytes(weights); // little-endian, on any machine
    const values = new Float32Array(stored.length / 2);
    for (let i = 0; i < values.length; i++) {
      values[i] = half(stored[2 * i] | (stored[2 * i + 1] << 8));
    }
    let position = 0;
    const take = (/** @type {number} */ count) => values.subarray(position, (position += count));
    return sizes.slice(1).map((outputs, i) => {
      const inputs = sizes[i];
      return { inputs, outputs, kernel: take(inputs * outputs), bias: take(outputs) };
    });
  }

  /**
   * The input of each layer, and the outputs of the last.
   * @param {Network} network
   * @param {ArrayLike<number>} x
   * @returns {Float64Array[]}
   */
  function activations(network, x) {
    const found = [Float64Array.from(x)];
    network.forEach(({ inputs, outputs, kernel, bias }, layer) => {
      const y = Float64Array.from(bias);
      for (let i = 0; i < inputs; i++) {
        const value = found[layer][i];
        if (value === 0) continue; // of black pixels and inactive units, which are many
        for (let j = 0, k = i * outputs; j < outputs; j++, k++) y[j] += value * kernel[k];
      }
      found.push(layer < network.length - 1 ? y.map((value) => Math.max(value, 0)) : y);
    });
    return found;
  }

  /**
   * The outputs of a network.
   * @param {Network} network
   * @param {ArrayLike<number>} x
   * @returns {Float64Array}
   */
  function apply(network, x) {
    return activations(network, x)[network.length];
  }

  /**
   * The gradient in a network's input, from the one in its outputs.
   * @param {Network} network
   * @param {Float64Array[]} found its `activations`
   * @param {Float64Array} gradient in the outputs
   * @returns {Float64Array}
   */
  function pullBack(network, found, gradient) {
    for (let layer = network.length - 1; layer >= 0; layer--) {
      const { inputs, outputs, kernel } = network[layer];
      const below = new Float64Array(inputs);
      for (let i = 0; i < inputs; i++) {
        if (layer > 0 && found[layer][i] === 0) continue; // the ReLU below is not active
        let sum = 0;
        for (let j = 0, k = i * outputs; j < outputs; j++, k++) sum += kernel[k] * gradient[j];
        below[i] = sum;
      }
      gradient = below;
    }
    return gradient;
  }

  /**
   * An objective of images: its value at x, and its gradient in x.
   * @param {Network} encoder
   * @param {Objective} objective
   * @param {ArrayLike<number>} x
   * @returns {Point}
   */
  function evaluate(encoder, objective, x) {
    const found = activations(encoder, x);
    const { value, gradient } = objective(found[encoder.length]);
    return { value, gradient: pullBack(encoder, found, gradient) };
  }

  /** The means among an encoder's outputs. @param {Float64Array} outputs @returns {Float64Array} */
  function means(outputs) {
    return outputs.subarray(0, outputs.length / 2);
  }

  /**
   * Squared W2 between the encoding of a clean image and another (Eq. 12). The paper's selection
   * maximises it, as `se_vae.training.step.EncodingShift`.
   * @param {Float64Array} clean outputs of the encoder
   * @returns {Objective}
   */
  function encodingShift(clean) {
    const dim = clean.length / 2;
    return (outputs) => {
      const gradient = new Float64Array(2 * dim);
      let value = 0;
      for (let k = 0; k < dim; k++) {
        const shift = outputs[k] - clean[k];
        const deviation = Math.exp(outputs[dim + k] / 2);
        const spread = deviation - Math.exp(clean[dim + k] / 2);
        value += shift ** 2 + spread ** 2;
        gradient[k] = 2 * shift;
        gradient[dim + k] = spread * deviation;
      }
      return { value, gradient };
    };
  }

  /** @param {Float64Array} logits @returns {Float64Array} */
  function softmax(logits) {
    const highest = Math.max(...logits);
    const powers = logits.map((logit) => Math.exp(logit - highest));
    const sum = powers.reduce((total, power) => total + power);
    return powers.map((power) => power / sum);
  }

  /**
   * Cross-entropy of a linear probe of the means, in nats.
   * @param {Network} probe
   * @param {number} label
   * @returns {Objective}
   */
  function crossEntropy(probe, label) {
    return (outputs) => {
      const found = activations(probe, means(outputs));
      const gradient = softmax(found[probe.length]);
      const value = -Math.log(gradient[label]);
      gradient[label] -= 1;
      const inOutputs = new Float64Array(outputs.length); // zero for the log-variances
      inOutputs.set(pullBack(probe, found, gradient));
      return { value, gradient: inOutputs };
    };
  }

  /** Numbers in [0, 1) that are the same for the same seed (mulberry32). @param {number} seed */
  function generator(seed) {
    return () => {
      seed = (seed + 0x6d2b79f5) | 0;
      let bits = Math.imul(seed ^ (seed >>> 15), seed | 1);
      bits ^= bits + Math.imul(bits ^ (bits >>> 7), bits | 61);
      return ((bits ^ (bits >>> 14)) >>> 0) / 2 ** 32;
    };
  }

  /**
   * The point of the linf ball about x and of [0, 1] that is nearest to y.
   * @param {ArrayLike<number>} x
   * @param {number} radius
   * @param {Float64Array} y
   * @returns {Float64Array}
   */
  function project(x, radius, y) {
    return y.map((value, i) => {
      const lowest = Math.max(x[i] - radius, 0);
      const highest = Math.min(x[i] + radius, 1);
      return Math.min(Math.max(value, lowest), highest);
    });
  }

  /**
   * A uniform draw from the linf ball about x, projected.
   * @param {ArrayLike<number>} x
   * @param {number} radius
   * @param {() => number} random
   * @returns {Float64Array}
   */
  function randomPoint(x, radius, random) {
    const y = Float64Array.from(x, (value) => value + radius * (2 * random() - 1));
    return project(x, radius, y);
  }

  /**
   * Projected gradient ascent with sign steps of 2.5 radius / numSteps, as `se_vae.pgd`. It yields
   * x' after each step, so that a page can pause between two steps; the last x' is the result.
   * @param {(x: Float64Array) => Point} objective
   * @param {ArrayLike<number>} x
   * @param {{radius: number, numSteps: number, start: Float64Array}} settings
   * @returns {Generator<Float64Array, void>}
   */
  function* pgd(objective, x, { radius, numSteps, start }) {
    const stepSize = (2.5 / numSteps) * radius;
    let adversarial = project(x, radius, start);
    for (let step = 0; step < numSteps; step++) {
      const { gradient } = objective(adversarial);
      const next = adversarial.map((value, i) => value + stepSize * Math.sign(gradient[i]));
      adversarial = project(x, radius, next);
      yield adversarial;
    }
  }

  return {
    apply,
    bytes,
    crossEntropy,
    encodingShift,
    evaluate,
    generator,
    means,
    pgd,
    randomPoint,
    readNetwork,
    softmax,
  };
})();
