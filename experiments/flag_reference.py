"""Prints the Markdown tables of flags that `docs/flags.md` holds.

python -m experiments.flag_reference
"""

from __future__ import annotations

from experiments import pretrain, probe_settings, sweep
from experiments.cli import distributed, flags


def references() -> str:
  """Returns the tables of `pretrain` in one process and several, `probe` and `sweep`."""
  sections = (
    ('`experiments.pretrain`', pretrain.PretrainConfig),
    ('`experiments.pretrain` in several processes', distributed.Cluster),
    ('`experiments.probe`', probe_settings.ProbeConfig),
    ('`experiments.sweep`, beside all flags of `pretrain`', sweep.SweepConfig),
  )
  return '\n'.join(
    f'## {title}\n\n{flags.reference(config_type)}\n' for title, config_type in sections
  )


if __name__ == '__main__':
  print(references(), end='')
