"""Small TFDS sets, prepared without TensorFlow."""

from __future__ import annotations

import io
import os
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image


def png(image: np.ndarray) -> io.BytesIO:
  # TFDS takes encoded files as they are; encoding arrays itself would need TensorFlow.
  buffer = io.BytesIO()
  Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image).save(buffer, 'PNG')
  buffer.seek(0)
  return buffer


def write_tfds(
  directory: pathlib.Path,
  split_examples: dict[str, tuple[Any, Any]],
  *,
  name: str = 'fashion_mnist',
  version: str = '3.0.1',
  image_shape: tuple[int | None, ...] = (5, 4, 1),
  num_classes: int = 10,
  features: Callable[[Any], dict[str, Any]] | None = None,
) -> pathlib.Path:
  """Prepares an array_record set, without TensorFlow; returns the directory of the version."""
  import tensorflow_datasets as tfds

  tfds.disable_progress_bar()
  image = tfds.features.Image(shape=image_shape)
  spec = (
    features(tfds.features)
    if features
    else {
      'image': image,
      'label': tfds.features.ClassLabel(num_classes=num_classes),
    }
  )

  class TinySet(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]
    VERSION = tfds.core.Version(version)

    def _info(self):
      return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(spec))

    def _split_generators(self, dl_manager):
      return {split: self._generate_examples(*xy) for split, xy in split_examples.items()}

    def _generate_examples(self, images, labels):
      for i, (x, y) in enumerate(zip(images, labels, strict=True)):
        kinds = {
          feature: png(x) if isinstance(spec[feature], tfds.features.Image) else int(y)
          for feature in spec
        }
        yield i, kinds

  TinySet.name = name
  builder = TinySet(data_dir=str(directory), file_format='array_record')
  builder.download_and_prepare()
  return pathlib.Path(os.fspath(builder.data_path))
