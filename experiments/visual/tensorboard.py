"""TensorBoard event files of a run, written without TensorFlow.

Each process that trains a run writes a file of its own. A process that resumes from a checkpoint
first removes the events of later steps from the earlier files, as metrics.jsonl drops its later
rows. Together the files then have every step exactly once.
"""

from __future__ import annotations

import os
import struct
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from experiments.visual import image_grids
from se_vae.storage import atomic_files

# TensorBoard recognises event files by this prefix, and reads them in the order of their names.
_NAME = 'events.out.tfevents.{:06d}'
_ANY = _NAME.replace('{:06d}', '[0-9]' * 6)

_LENGTH = struct.Struct('<Q')
_CHECKSUM = struct.Struct('<I')


class EventWriter:
  """Context manager that writes the events of a run after step `step`."""

  def __init__(self, directory: Path, step: int) -> None:
    """Removes the events of later steps from the directory's files, and begins a new file."""
    directory.mkdir(exist_ok=True)
    atomic_files.remove_leftovers(directory, _ANY)
    before = sorted(directory.glob(_ANY))
    for path in before:
      _drop_after(path, step)
    number = int(before[-1].suffix[1:]) + 1 if before else 1
    self._path = directory / _NAME.format(number)
    self._file = self._path.open('xb')
    self._step, self._time = step, time.monotonic()
    self._write(0, file_version='brain.Event:2')
    # It makes a running TensorBoard drop the removed events too.
    self._write(step + 1, session_log={'status': 'START'})

  def __enter__(self) -> EventWriter:
    return self

  def __exit__(self, *_: object) -> None:
    self._file.close()

  def row(self, step: int, metrics: Mapping[str, float]) -> None:
    """Writes a row of metrics that ends at `step`, and the steps per second since the last row."""
    now = time.monotonic()
    self.scalars(step, 'train', metrics)
    self.scalars(step, 'speed', {'steps_per_second': (step - self._step) / (now - self._time)})
    self._step, self._time = step, now
    with atomic_files.naming(self._path):
      self._file.flush()

  def scalars(self, step: int, group: str, values: Mapping[str, float]) -> None:
    """Writes a point of each curve `group/name`, rounded to float32."""
    summary = [{'tag': f'{group}/{name}', 'simple_value': float(v)} for name, v in values.items()]
    self._write(step, summary={'value': summary})

  def images(self, step: int, pages: Mapping[str, np.ndarray]) -> None:
    """Writes pages of images `[rows, columns, H, W, C]` in [0, 1]."""
    summary = []
    for name, page in pages.items():
      rows, columns, height, width, channels = page.shape
      image = {
        'height': rows * height,
        'width': columns * width,
        'colorspace': channels,
        'encoded_image_string': image_grids.encode_png(page),
      }
      summary.append({'tag': name, 'image': image})
    self._write(step, summary={'value': summary})

  def sync(self) -> None:
    """Flushes the file, and returns when all of it is on the disk."""
    with atomic_files.naming(self._path):
      self._file.flush()
      os.fsync(self._file.fileno())

  def _write(self, step: int, **content: Any) -> None:
    record = _record(_event_type()(wall_time=time.time(), step=step, **content))
    with atomic_files.naming(self._path):
      self._file.write(record)


def read(path: Path) -> Iterator[Any]:
  """The events of a file, up to its end or to an incomplete or damaged record."""
  content, start = path.read_bytes(), 0
  while len(content) >= (begin := start + _LENGTH.size + _CHECKSUM.size):
    length = content[start : start + _LENGTH.size]
    (checksum,) = _CHECKSUM.unpack_from(content, start + _LENGTH.size)
    end = begin + _LENGTH.unpack(length)[0]
    start = end + _CHECKSUM.size
    if checksum != _checksum(length) or len(content) < start:
      return
    yield _event_type().FromString(content[begin:end])


def _drop_after(path: Path, step: int) -> None:
  kept = b''.join(_record(event) for event in read(path) if event.step <= step)
  if len(kept) != path.stat().st_size:
    atomic_files.write(path, kept)


def _record(event: Any) -> bytes:
  """An event as a TFRecord: length, checksum, data, checksum."""
  data = event.SerializeToString()
  length = _LENGTH.pack(len(data))
  return b''.join(
    (length, _CHECKSUM.pack(_checksum(length)), data, _CHECKSUM.pack(_checksum(data)))
  )


def _event_type() -> Any:
  from tensorboardX.proto.event_pb2 import Event  # slow to import

  return Event


def _checksum(data: bytes) -> int:
  from tensorboardX.record_writer import masked_crc32c

  return int(masked_crc32c(data))
