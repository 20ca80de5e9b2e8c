"""Pretrains an encoder, then probes and attacks it; skips each part that is already finished."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from experiments import pretrain, probe, records
from experiments.cli import flags, signals, workdirs


def run(
  pretraining: pretrain.PretrainConfig,
  attacks: tuple[probe.ProbeConfig, ...],
  stop: signals.StopSignal,
  name: str,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
  """The results of an encoder's training and of every attack on it.

  Args:
    pretraining: settings of the encoder.
    attacks: settings of the probes and attacks.
    stop: raises when a signal has come.
    name: text in front of the progress bars.
  """
  encoder = pretrain.run(pretraining, stop, name)
  return encoder, [
    _finished(attack, encoder) or probe.run(attack, stop, f'{name}, attack on {attack.task}')
    for attack in attacks
  ]


def _finished(attack: probe.ProbeConfig, pretraining: dict[str, Any]) -> dict[str, Any] | None:
  """The result of an attack that has already run with equal settings on the same encoder."""
  path = Path(str(attack.workdir)) / f'{probe.file_stem(attack)}.json'
  result = workdirs.read_json(path, records.Probe)
  if result is None:
    return None
  found = (probe.stored_config(result['config']), result.get('pretraining'), result['step'])
  wanted = (flags.to_dict(attack), pretraining['config'], pretraining['step'])
  return dict(result) if found == wanted else None
