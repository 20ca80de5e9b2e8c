"""A probed MLP encoder in PyTorch, for the attacks of other libraries."""

from __future__ import annotations

from typing import Any

import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import torch_twin
from se_vae.config import ArgumentError
from se_vae.evaluation import linear_probe
from se_vae.models.vae import VAE, Params


def build(torch: Any, model: VAE, params: Params, fitted: linear_probe.LinearProbe) -> Any:
  """Returns the encoder's mean and the probe in PyTorch: `[B, C, H, W]` to logits `[B, K]`.

  Raises:
    ArgumentError: for an encoder that is no MLP.
  """
  dense = params['encoder']['params']
  names = [name for name in dense if name.startswith('Dense')]
  if len(names) + 1 != len(dense):
    raise ArgumentError('workdir', 'this comparison rebuilds MLP encoders only')
  head = next(dense[name] for name in dense if name not in names)['Dense_0']
  weights = [
    (dense[f'Dense_{i}']['kernel'], dense[f'Dense_{i}']['bias']) for i in range(len(names))
  ]
  mean = slice(0, model.latent_dim)
  weights += [(head['kernel'][:, mean], head['bias'][mean]), (fitted.weights, fitted.bias)]
  layers: list[Any] = [torch_twin.layer(torch, _channels_last), torch.nn.Flatten()]
  for number, (kernel, bias) in enumerate(weights):
    layer = torch.nn.Linear(*kernel.shape)
    layer.weight.data = torch.from_numpy(np.array(kernel).T.copy())
    layer.bias.data = torch.from_numpy(np.array(bias))
    layers += [layer, torch.nn.ReLU()] if number < len(names) else [layer]
  return torch.nn.Sequential(*layers).eval()


def _channels_last(x: Any) -> Any:
  return x.permute(0, 2, 3, 1)


def check_same(
  torch: Any,
  network: Any,
  model: VAE,
  params: Params,
  fitted: linear_probe.LinearProbe,
  x: np.ndarray,
) -> None:
  """Raises AssertionError unless both classifiers have the same logits on images `[B, H, W, C]`."""
  with torch.no_grad():
    theirs = network(torch.from_numpy(np.moveaxis(x, -1, 1).copy())).numpy()
  ours = np.asarray(linear_probe.ProbedEncoder(model)(jnp.asarray(x), params, fitted))
  np.testing.assert_allclose(theirs, ours, atol=1e-3)


def misclassified(
  torch: Any, network: Any, radius: float, x: Any, target: Any, images: Any
) -> np.ndarray:
  """Returns, bool `[B]`, which images are legal and misclassified by the network.

  Args:
    torch: the module.
    network: maps images `[B, C, H, W]` to logits.
    radius: of the linf ball.
    x: clean images `[B, C, H, W]`.
    target: `[B]`, their labels.
    images: adversarial images `[B, C, H, W]`.
  """
  with torch.no_grad():
    near = (images - x).abs().flatten(1).amax(dim=1) <= radius + 1e-6
    inside = ((images >= 0.0) & (images <= 1.0)).flatten(1).all(dim=1)
    wrong = network(images).argmax(dim=1) != target
  found: np.ndarray = (near & inside & wrong).numpy()
  return found
