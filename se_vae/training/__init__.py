"""Training: select x', evaluate the bound, follow its gradient (paper Sec. 2.1 and 6)."""

from se_vae.training.loop import (
  LatentMove,
  NotFiniteError,
  Progress,
  TrainConfig,
  TrainState,
  Window,
  empty_window,
  fit,
  init_state,
  loss,
  make_optimizer,
  run,
  select,
  train_step,
  train_steps,
)

__all__ = [
  'LatentMove',
  'NotFiniteError',
  'Progress',
  'TrainConfig',
  'TrainState',
  'Window',
  'empty_window',
  'fit',
  'init_state',
  'loss',
  'make_optimizer',
  'run',
  'select',
  'train_step',
  'train_steps',
]
