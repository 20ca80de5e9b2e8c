"""The names that a notebook imports."""

from __future__ import annotations

import inspect

import se_vae

# Forms of what has an example, what needs none, and what stands in the examples of others.
WITHOUT = {
  'Evaluation',
  'GaussianLatents',
  'data',
  'FullGaussian',
  'EncodingShift',
  'TrainState',
  'VAE',
  'init_state',
  'pixels',
  'save_model',
}


def test_public_names_have_examples_that_the_doctests_run():
  without = {
    name for name in se_vae.__all__ if '>>>' not in str(inspect.getdoc(getattr(se_vae, name)))
  }
  assert without == WITHOUT
  assert sorted(se_vae.__all__) == sorted(set(dir(se_vae)) & set(se_vae.__all__))
