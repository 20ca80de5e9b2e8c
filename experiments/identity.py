"""What the result of an attack depends on: its settings, and the contents of encoders and data.

Paths are no part of it, so that a result stays valid wherever its files are moved.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

from experiments import pretrain, records
from experiments.cli import flags, workdirs

# Checkpoints identify encoders, and digests the data. The others change no result.
_FREE_SETTINGS = (*flags.PLACES, 'pretrained', 'dataset', 'surrogate', 'strict', 'batch_size')
_OF_CERTIFICATES = ('certify', 'certify_method', 'certify_slope_steps')
_RENAMED = {'pgd_step_size': 'relative_step_size'}


def finished(path: Path, attack: dict[str, Any]) -> dict[str, Any] | None:
  """Returns the result in a file if it is of this attack, with the work directory of now.

  Args:
    path: the JSON file, which may be missing.
    attack: what a result holds of the attack: `config` of the probe, `pretraining` (the settings)
      and `step` of the encoder, `checkpoint`, `surrogate`, `surrogate_checkpoint` and `data`.
  """
  result = workdirs.read_json(
    path, records.FinishedProbe, lambda found: pretrain.settings_of_model(found['pretraining'])
  )
  if result is None or not _same(dict(result), attack):
    return None
  config = {**result['config'], 'workdir': attack['config']['workdir']}
  return {**result, 'config': config}


def digest(attack: dict[str, Any]) -> str:
  """Returns a short digest of the settings of an attack."""
  # Certificates do not change what an attack finds.
  values = settings({'config': attack['config'] | {'certify': False}})
  return hashlib.sha256(json.dumps(values).encode()).hexdigest()[:8]


def _same(before: dict[str, Any], now: dict[str, Any]) -> bool:
  encoders = _encoders if 'checkpoint' in before else _encoders_of_old_results
  return (
    encoders(before) == encoders(now)
    and before['data']['digest'] == now['data']['digest']
    and settings(before) == settings(now)
  )


def _encoders(attack: dict[str, Any]) -> tuple[Any, ...]:
  return attack['checkpoint'], attack.get('surrogate_checkpoint')


def _encoders_of_old_results(attack: dict[str, Any]) -> tuple[Any, ...]:
  """Returns what results of version 0.1.0 hold of the encoders, whose files they do not name."""
  training = pretrain.settings_of_model(attack['pretraining'])
  return training, attack['step'], attack.get('surrogate')


def settings(attack: dict[str, Any]) -> dict[str, Any]:
  """Returns those of a probe's settings that its result depends on, by their names of now.

  Settings of certificates are left out if no certificate was asked for, and `labels_per_class` if
  the probe is fitted to all labels, because results of earlier versions do not have it.
  """
  named = {_RENAMED.get(name, name): value for name, value in attack['config'].items()}
  free = _FREE_SETTINGS if named.get('certify') else (*_FREE_SETTINGS, *_OF_CERTIFICATES)
  if named.get('labels_per_class') is None:
    free = (*free, 'labels_per_class')
  return {name: value for name, value in named.items() if name not in free}
