"""Training: select x', evaluate the bound, follow its gradient (paper Sec. 2.1 and 6).

`selection` finds x', `certified` bounds the encodings of a whole ball, `losses` is the table of
objectives, `step` is one training step, `loop` takes many of them, `population` does so for many
encoders at once, `input_pipeline` feeds both with batches, and `fitting` trains in memory, as for a
notebook. The settings are `se_vae.config.TrainConfig`.
"""

from se_vae.config import TrainConfig
from se_vae.training.fitting import (
  add_targets,
  check_targets,
  first_state,
  fit,
  fit_population,
)
from se_vae.training.loop import (
  NotFiniteError,
  Progress,
  StepFunction,
  Window,
  empty_window,
  run,
  train_steps,
)
from se_vae.training.population import PopulationProgress, run_population
from se_vae.training.selection import EncodingShift, select
from se_vae.training.step import (
  TrainState,
  TrainStep,
  apply_gradients,
  differing_programs,
  init_state,
  loss,
  make_optimizer,
  train_step,
)

__all__ = [
  'EncodingShift',
  'NotFiniteError',
  'PopulationProgress',
  'Progress',
  'StepFunction',
  'TrainConfig',
  'TrainState',
  'TrainStep',
  'Window',
  'add_targets',
  'apply_gradients',
  'check_targets',
  'differing_programs',
  'empty_window',
  'first_state',
  'fit',
  'fit_population',
  'init_state',
  'loss',
  'make_optimizer',
  'run',
  'run_population',
  'select',
  'train_step',
  'train_steps',
]
