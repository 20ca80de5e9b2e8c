"""Bounds of random networks by auto_LiRPA, for `tests/certification/test_auto_lirpa.py`.

  python -m venv /tmp/lirpa && /tmp/lirpa/bin/pip install 'numpy<2' torch 'onnx<1.17' appdirs tqdm
  /tmp/lirpa/bin/pip install --no-deps auto_LiRPA==0.3
  /tmp/lirpa/bin/python tests/tools/auto_lirpa.py tests/certification/auto_lirpa.npz

This version asks for an older PyTorch than runs on today's Python. It needs two private names of
PyTorch that are gone, which are put back here. Nothing of this project is imported.
"""

from __future__ import annotations

import sys
from typing import Any

import numpy as np
import torch
import torch.onnx.symbolic_helper

# The older PyTorch let a graph's nodes be indexed, and had a function that is imported only.
torch._C.Node.__getitem__ = lambda node, name: getattr(node, node.kindOf(name))(name)
torch.onnx.symbolic_helper._set_opset_version = lambda version: None

from auto_LiRPA import BoundedModule, BoundedTensor, PerturbationLpNorm  # noqa: E402

RADIUS = 0.05
METHODS = {'ibp': 'IBP', 'crown_ibp': 'CROWN-IBP', 'crown': 'CROWN'}


def weights(rng: np.random.Generator, *shape: int) -> tuple[np.ndarray, np.ndarray]:
  """Weights and biases of one layer, the last axis its outputs, with which few units are dead."""
  fan = np.prod(shape[:-1])
  kernel, bias = rng.normal(size=shape) * np.sqrt(2.0 / fan), 0.1 * rng.normal(size=shape[-1])
  return kernel.astype(np.float32), bias.astype(np.float32)


def mlp(rng: np.random.Generator) -> tuple[list[Any], np.ndarray, Any]:
  """Layers, images and the PyTorch network of 12 - 10 - 10 - 3 units."""
  layers = [weights(rng, *sizes) for sizes in ((12, 10), (10, 10), (10, 3))]
  parts = []
  for kernel, bias in layers:
    linear = torch.nn.Linear(*kernel.shape)
    parts += [_filled(linear, kernel.T, bias), torch.nn.ReLU()]
  return layers, rng.uniform(size=(4, 12)), torch.nn.Sequential(*parts[:-1])


def convnet(rng: np.random.Generator) -> tuple[list[Any], np.ndarray, Any]:
  """The same of two convolutions with stride 2 of 9 x 9 pixels, and a dense layer."""
  shapes = ((3, 3, 1, 4), (3, 3, 4, 5), (3 * 3 * 5, 3))
  layers = [weights(rng, *shape) for shape in shapes]
  parts = []
  for kernel, bias in layers[:2]:
    conv = torch.nn.Conv2d(*kernel.shape[2:], 3, stride=2, padding=1)
    parts += [_filled(conv, kernel.transpose(3, 2, 0, 1), bias), torch.nn.ReLU()]
  kernel, bias = layers[2]
  linear = torch.nn.Linear(*kernel.shape)
  rows = kernel.reshape(3, 3, 5, 3).transpose(2, 0, 1, 3).reshape(45, 3)  # channels first
  parts += [torch.nn.Flatten(), _filled(linear, rows.T, bias)]
  return layers, rng.uniform(size=(4, 9, 9, 1)), torch.nn.Sequential(*parts)


def _filled(layer: Any, weight: np.ndarray, bias: np.ndarray) -> Any:
  layer.weight.data = torch.from_numpy(np.ascontiguousarray(weight))
  layer.bias.data = torch.from_numpy(bias)
  return layer


def main(path: str) -> None:
  """Writes weights, images and bounds of both networks."""
  arrays = {'radius': np.float32(RADIUS)}
  for name, make in (('mlp', mlp), ('convnet', convnet)):
    layers, x, network = make(np.random.default_rng(0))
    x = x.astype(np.float32)
    for i, (kernel, bias) in enumerate(layers):
      arrays |= {f'{name}/{i}/weights': kernel, f'{name}/{i}/bias': bias}
    ends = np.maximum(x - RADIUS, 0.0), np.minimum(x + RADIUS, 1.0)
    center, low, high = (
      torch.from_numpy(v if v.ndim == 2 else v.transpose(0, 3, 1, 2).copy()) for v in (x, *ends)
    )
    region = PerturbationLpNorm(norm=np.inf, x_L=low, x_U=high)
    bounded = BoundedModule(network, center)
    arrays[f'{name}/x'] = x
    for key, method in METHODS.items():
      bounds = bounded.compute_bounds(x=(BoundedTensor(center, region),), method=method)
      for end, values in zip(('lower', 'upper'), bounds, strict=True):
        arrays[f'{name}/{key}/{end}'] = values.detach().numpy()
  np.savez(path, **arrays)


if __name__ == '__main__':
  main(sys.argv[1])
