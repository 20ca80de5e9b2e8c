"""What the binaries read again of the JSON files that they write, as types for `json_files`."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NotRequired, TypedDict

from se_vae.evaluation.verdicts import CheckRecord
from se_vae.storage.json_files import SAME_LENGTH


class Data(TypedDict):
  """Where the images of a run come from."""

  source: str
  digest: str


class Source(TypedDict):
  """The run whose parameters a run has started with."""

  checkpoint: str


class Run(TypedDict):
  """config.json of a run, and the metadata of its checkpoints."""

  config: dict[str, Any]
  data: Data
  versions: dict[str, str]
  devices: NotRequired[list[str]]
  source: NotRequired[Source | None]


class Result(TypedDict):
  """result.json of a run of pretrain."""

  step: int
  checkpoint: NotRequired[str | None]
  test: dict[str, float]
  config: dict[str, Any]


class Row(TypedDict):
  """A row of metrics.jsonl, whose other values are numbers; not_finite.json."""

  step: int


class Curve(TypedDict):
  """Adversarial accuracy against radius, with 95 % intervals."""

  radii: Annotated[list[float], SAME_LENGTH]
  accuracy: Annotated[list[float], SAME_LENGTH]
  interval: Annotated[list[tuple[float, float]], SAME_LENGTH]


class Joint(Curve):
  """The curve of several tasks together."""

  tasks: list[str]


class Certified(Curve):
  """Certified accuracy against radius, and the method that bounded the encoder."""

  method: str


class LatentShift(TypedDict):
  """The largest latent shift against radius."""

  radii: list[float]
  mean: list[float]
  quantiles: dict[str, list[float]]


class Attack(TypedDict):
  """The settings of an attack that a report names."""

  attack: str
  dataset: NotRequired[str | None]
  labels_per_class: NotRequired[int | None]


class Attacked(Curve):
  """What the results of a probe and of a supervised classifier share."""

  task: str
  num_examples: int
  step: int
  checks: NotRequired[list[CheckRecord]]
  certified: NotRequired[Certified]


class Probe(Attacked):
  """The result of a probe."""

  config: Attack
  checkpoint: NotRequired[str | None]
  joint: NotRequired[Joint]
  moves: NotRequired[LatentShift]
  data: NotRequired[Data]


class FinishedProbe(Curve):
  """The result of a probe, where it is given back in place of another attack."""

  task: str
  num_examples: int
  checks: list[CheckRecord]
  certified: NotRequired[Certified]
  config: dict[str, Any]
  pretraining: dict[str, Any]
  step: int
  checkpoint: NotRequired[str]
  surrogate_checkpoint: NotRequired[str | None]
  data: Data


class FigureProbe(Probe):
  """The result of a probe in figure1.json."""

  encoders: str
  objective: Literal['vae', 'se']
  latent_dim: int


class Panel(TypedDict):
  """A panel of a figure."""

  title: str
  encoders: str
  task: str


class Figure(TypedDict):
  """figure1.json."""

  panels: list[Panel]
  results: list[FigureProbe]
  optimizer: NotRequired[str]


class Variant(TypedDict):
  """What sweep.json says of a variant; the rest is in the variant's own files."""

  varied: dict[str, Any]
  seconds: float | None
  devices: list[str]


class Sweep(TypedDict):
  """sweep.json."""

  config: NotRequired[dict[str, Any]]
  results: list[Variant]


class Supervised(Attacked):
  """result.json of supervised."""

  checkpoint: NotRequired[str | None]
  config: dict[str, Any]
  evaluation: Attack
  data: NotRequired[Data]
  versions: dict[str, str]
  devices: NotRequired[list[str]]
