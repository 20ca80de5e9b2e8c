"""The training step in PyTorch, as one would write it there, to compare our times with.

The same networks (from our weights), selection, bound, optimiser and schedule; the random numbers
come from PyTorch's own generator. Needs PyTorch, which nothing else does but this benchmark and the
comparison of attacks.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import math
import os
import shutil
from collections.abc import Callable
from typing import Any

import numpy as np

from se_vae.config import ArgumentError
from se_vae.models import networks
from se_vae.models.vae import VAE, Params
from se_vae.training import TrainConfig

# Of a ConvNet's images and features.
FORMATS = ('channels first', 'channels last')

# How the gradients of the step are found: by autograd, that of the selection by a backward pass
# that is written out for an MLP, or all by autograd within programs that `torch.compile` makes.
FORMS = ('eager', 'written', 'compiled')

_LOG_2PI = math.log(2.0 * math.pi)


def load(num_threads: int, argument: str = 'peers') -> Any:
  """Returns PyTorch, set to a number of threads.

  Args:
    num_threads: of each operation.
    argument: the setting that asks for PyTorch, for the error.

  Raises:
    ArgumentError: if it is not installed.
  """
  try:
    torch = importlib.import_module('torch')
  except ImportError as error:
    raise ArgumentError(argument, f'PyTorch needs `pip install torch`: {error}') from None
  torch.set_num_threads(num_threads)
  return torch


def can_compile() -> bool:
  """Returns whether there is a C++ compiler, which `torch.compile` needs on a CPU."""
  return any(shutil.which(name) for name in (os.environ.get('CXX', 'g++'), 'g++', 'clang++'))


class Twin:
  """A model with its optimiser and training set."""

  def __init__(
    self,
    torch: Any,
    model: VAE,
    params: Params,
    config: TrainConfig,
    images: np.ndarray,
    indices: np.ndarray,
    form: str = FORMS[0],
    memory_format: str = FORMATS[0],
  ) -> None:
    """Takes over our weights.

    Args:
      torch: the module.
      model: an MLP or a ConvNet of `networks`, with factorised covariance.
      params: its parameters.
      config: the settings of the step; the optimiser is Adam.
      images: training set, uint8 `[N, H, W, C]`.
      indices: `[K, B]`, the batches that `run` goes round.
      form: one of `FORMS`; 'written' is for MLPs.
      memory_format: one of `FORMATS`.
    """
    self.torch, self.config, self.latent_dim = torch, config, model.latent_dim
    self.form = form
    last = memory_format == FORMATS[1]
    self.layout = torch.channels_last if last else torch.contiguous_format
    self.is_conv = isinstance(model.encoder, networks.ConvEncoder)
    nets = _convnets(torch, model, self.layout) if self.is_conv else _mlps(torch, model)
    self.encoder, self.decoder = (net.to(memory_format=self.layout) for net in nets)
    _take_weights(torch, self.encoder, params['encoder']['params'])
    _take_weights(torch, self.decoder, params['decoder']['params'])
    self.images = self.place(images)
    self.indices = torch.from_numpy(indices.astype(np.int64))
    parameters = [*self.encoder.parameters(), *self.decoder.parameters()]
    self.optimizer = torch.optim.Adam(parameters, config.learning_rate, fused=True)
    self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, config.num_steps)
    self.draw, self.loss = self._draw, self._loss
    if form == 'compiled':  # every loop is unrolled into one program
      whole = functools.partial(torch.compile, fullgraph=True, dynamic=False)
      self.draw, self.loss = whole(self._draw), whole(self._loss)

  def place(self, images: np.ndarray) -> Any:
    """Returns images `[N, H, W, C]` as the networks take them: rows, or `[N, C, H, W]`."""
    tensor = self.torch.tensor(images)
    if not self.is_conv:
      return tensor.flatten(1)
    return tensor.permute(0, 3, 1, 2).contiguous(memory_format=self.layout)

  def run(self, steps: int) -> None:
    """Trains for so many steps."""
    for step in range(steps):
      batch = self.draw(self.images[self.indices[step % len(self.indices)]])
      self.optimizer.zero_grad()
      self.loss(*batch).backward()
      self.optimizer.step()
      self.schedule.step()

  def loss_and_norms(
    self, x: np.ndarray, start: np.ndarray, noise: np.ndarray
  ) -> tuple[float, dict[str, float]]:
    """Returns the loss of a step, and the norm of its gradient in the weights of either network.

    Args:
      x: images `[B, H, W, C]` in [0, 1].
      start: where the selection starts, `[B, H, W, C]`; 'vae' ignores it.
      noise: `[B, D]`, standard normal, of z_a.
    """
    self.optimizer.zero_grad()
    loss = self.loss(self.place(x), self.place(start), self.torch.tensor(noise))
    loss.backward()
    nets = {'encoder': self.encoder, 'decoder': self.decoder}
    norms = {
      name: math.sqrt(sum(float((weight.grad**2).sum()) for weight in net.parameters()))
      for name, net in nets.items()
    }
    return float(loss.detach()), norms

  def encode(self, x: Any) -> tuple[Any, Any]:
    """Returns mean and log-variance, each `[B, D]`."""
    return self.encoder(x).chunk(2, dim=1)

  def select(self, x: Any, start: Any, mean_a: Any, sd_a: Any) -> Any:
    """`training.select` for encodings of these means and deviations `[B, D]`."""
    torch = self.torch
    step_size = 2.5 * self.config.radius / self.config.pgd_steps
    gradient = {'eager': self._traced, 'written': self._written, 'compiled': self._functional}
    low, high = self._box(x)
    x_adv = torch.clamp(start, low, high)
    for _ in range(self.config.pgd_steps):
      x_adv = x_adv + step_size * gradient[self.form](x_adv, mean_a, sd_a).sign()
      x_adv = torch.clamp(x_adv, low, high)
    return x_adv

  def _draw(self, rows: Any) -> tuple[Any, Any, Any]:
    """Returns float images of uint8 ones, random images of their balls, and the noise of z_a."""
    torch = self.torch
    x = rows.float() / 255.0
    noise = torch.randn(len(x), self.latent_dim)
    if self.config.objective == 'vae':
      return x, x, noise
    offsets = (2.0 * torch.rand_like(x) - 1.0) * self.config.radius
    return x, torch.clamp(x + offsets, 0.0, 1.0), noise

  def _box(self, x: Any) -> tuple[Any, Any]:
    radius = self.config.radius
    return (x - radius).clamp(0.0, 1.0), (x + radius).clamp(0.0, 1.0)

  def _shift(self, x_adv: Any, mean_a: Any, sd_a: Any) -> Any:
    mean, log_var = self.encode(x_adv)
    return ((mean - mean_a) ** 2).sum() + (((0.5 * log_var).exp() - sd_a) ** 2).sum()

  def _traced(self, x_adv: Any, mean_a: Any, sd_a: Any) -> Any:
    """The gradient of the shift in x', by autograd."""
    with self.torch.enable_grad():
      x_adv = x_adv.detach().requires_grad_(True)
      (gradient,) = self.torch.autograd.grad(self._shift(x_adv, mean_a, sd_a), x_adv)
    return gradient

  def _functional(self, x_adv: Any, mean_a: Any, sd_a: Any) -> Any:
    """The same, in a form that `torch.compile` follows."""
    return self.torch.func.grad(self._shift)(x_adv, mean_a, sd_a)

  def _written(self, x_adv: Any, mean_a: Any, sd_a: Any) -> Any:
    """The same, written out: no graph is recorded, and none of it is for the weights."""
    torch = self.torch
    *hidden, head = [layer for layer in self.encoder if isinstance(layer, torch.nn.Linear)]
    features = [x_adv]
    for layer in hidden:
      features.append(layer(features[-1]).relu_())
    mean, log_var = head(features[-1]).chunk(2, dim=1)
    sd = (0.5 * log_var).exp()
    gradient = torch.cat([2.0 * (mean - mean_a), (sd - sd_a) * sd], dim=1) @ head.weight
    for layer, outputs in zip(hidden[::-1], features[:0:-1], strict=True):
      gradient = gradient.mul_(outputs > 0.0) @ layer.weight
    return gradient

  def _loss(self, x: Any, start: Any, noise: Any) -> Any:
    """The selection and `training.loss`; 'vae' selects nothing."""
    obs_var, gamma = self.config.obs_var, self.config.gamma
    mean, log_var = self.encode(x)
    var = log_var.exp()
    x_mean = self.decoder(mean + var.sqrt() * noise)
    squared_error = ((x - x_mean) ** 2).flatten(1).sum(dim=1)
    likelihood = -0.5 * (squared_error / obs_var + x[0].numel() * (_LOG_2PI + math.log(obs_var)))
    if self.config.objective == 'vae':
      return (0.5 * (var + mean**2 - 1.0 - log_var).sum(dim=1) - likelihood).mean()
    with self.torch.no_grad():
      x_adv = self.select(x, start, mean, var.sqrt())
    mean_b, log_var_b = self.encode(x_adv)
    var_b = log_var_b.exp()
    priors = -0.5 * (mean**2 + var + mean_b**2 + var_b + 2.0 * _LOG_2PI).sum(dim=1)
    # Eq. 13 at the coupling of Eq. 24.
    product = var * var_b
    psi = 2.0 * gamma * product / (1.0 + (1.0 + 4.0 * gamma**2 * product).sqrt())
    distance = (mean - mean_b) ** 2 + var + var_b - 2.0 * psi
    entropy = 0.5 * (product - psi**2).log() + _LOG_2PI + 1.0
    cost = (0.5 * gamma * distance - entropy).sum(dim=1)
    return (cost - priors - likelihood).mean()


def _mlps(torch: Any, model: VAE) -> tuple[Any, Any]:
  pixels, hidden = math.prod(model.image_shape), model.encoder.hidden
  encoder = _stack(torch, (pixels, *hidden, 2 * model.latent_dim))
  decoder = _stack(torch, (model.latent_dim, *model.decoder.hidden, pixels))
  return encoder, decoder.append(torch.nn.Sigmoid())


def _stack(torch: Any, widths: tuple[int, ...]) -> Any:
  layers: list[Any] = []
  for inputs, outputs in itertools.pairwise(widths):
    layers += [torch.nn.Linear(inputs, outputs), torch.nn.ReLU()]
  return torch.nn.Sequential(*layers[:-1])


def _convnets(torch: Any, model: VAE, layout: Any) -> tuple[Any, Any]:
  """3 x 3, stride 2, `SAME`: of even images only the far edges are padded, or cropped off again."""
  nn, channels = torch.nn, model.encoder.channels
  sizes = networks.feature_sizes(model.image_shape, len(channels))
  encoder: list[Any] = []
  decoder: list[Any] = []  # from its end
  ends = itertools.pairwise((model.image_shape[2], *channels))
  for (inputs, outputs), (height, width) in zip(ends, sizes[:-1], strict=True):
    if height % 2 != width % 2:
      raise ValueError(f'height and width must both be odd or both even, got {height}, {width}')
    near, far = (1, 1) if height % 2 else (0, 1)
    pad, crop = ([nn.ZeroPad2d((0, edge, 0, edge))] if near != far else [] for edge in (far, -far))
    encoder += [*pad, nn.Conv2d(inputs, outputs, 3, stride=2, padding=near), nn.ReLU()]
    transposed = nn.ConvTranspose2d(outputs, inputs, 3, stride=2, padding=near)
    decoder += [nn.ReLU() if decoder else nn.Sigmoid(), *crop, transposed]
  image = (*sizes[-1], channels[-1])

  def to_rows(x: Any) -> Any:
    return x.permute(0, 2, 3, 1).flatten(1)

  def to_images(rows: Any) -> Any:
    return rows.unflatten(1, image).permute(0, 3, 1, 2).contiguous(memory_format=layout)

  encoder += [layer(torch, to_rows), nn.Linear(math.prod(image), 2 * model.latent_dim)]
  decoder += [layer(torch, to_images), nn.ReLU(), nn.Linear(model.latent_dim, math.prod(image))]
  return nn.Sequential(*encoder), nn.Sequential(*decoder[::-1])


def layer(torch: Any, function: Callable[[Any], Any]) -> Any:
  """Returns a PyTorch module that applies a function."""

  class Layer(torch.nn.Module):
    def forward(self, x: Any) -> Any:
      return function(x)

  return Layer()


def _take_weights(torch: Any, net: Any, params: Any) -> None:
  """Copies our weights, dense `[I, O]` to `[O, I]`, and `[K, K, I, O]` to `[O, I, K, K]`."""
  head = [params['GaussianHead_0']['Dense_0']] if 'GaussianHead_0' in params else []
  dense = iter(_numbered(params, 'Dense') + head)
  conv = iter(_numbered(params, 'Conv'))
  with torch.no_grad():
    for layer in net:
      if hasattr(layer, 'weight'):
        ours = next(dense if isinstance(layer, torch.nn.Linear) else conv)
        axes = (1, 0) if ours['kernel'].ndim == 2 else (3, 2, 0, 1)
        layer.weight.copy_(torch.tensor(np.transpose(ours['kernel'], axes)))
        layer.bias.copy_(torch.tensor(np.asarray(ours['bias'])))


def _numbered(params: Any, kind: str) -> list[Any]:
  return [params[f'{kind}_{i}'] for i in range(len(params)) if f'{kind}_{i}' in params]
