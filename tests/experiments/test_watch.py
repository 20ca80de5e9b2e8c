"""What one sees of a run: its TensorBoard event files, read by a reader of the test's own."""

from __future__ import annotations

import errno
import io
import json
import re
import signal
import struct
import sys
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image
from tensorboardX.proto import event_pb2

import se_vae
from experiments import pretrain, recording
from experiments.cli import flags, messages, signals
from experiments.visual import image_grids, tensorboard
from se_vae import training
from se_vae.data.transforms import pixels
from se_vae.storage import checkpoints

pytestmark = pytest.mark.long

DTYPE_PROMOTION = 'standard'  # optax takes part

TINY = {'hidden_units': 16, 'latent_dim': 4, 'pgd_steps': 2, 'num_steps': 30}
OFTEN = {'log_every': 5, 'checkpoint_every': 10}
PICTURES = {'reconstructions': (4, 10), 'samples': (5, 10), 'traversals': (4, 10)}


def config(workdir: Path, **changes) -> pretrain.PretrainConfig:
  return flags.from_dict(
    pretrain.PretrainConfig, {'workdir': str(workdir), **TINY, **OFTEN, **changes}
  )


def checksum(data: bytes) -> int:
  """The masked CRC-32C of TFRecord files, bit by bit."""
  crc = 0xFFFFFFFF
  for byte in data:
    crc ^= byte
    for _ in range(8):
      crc = (crc >> 1) ^ (0x82F63B78 if crc & 1 else 0)
  crc ^= 0xFFFFFFFF
  return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


def read_events(path: Path, with_checksums: bool = False) -> list:
  """All events of a file; fails where a byte is out of place."""
  content, found = path.read_bytes(), []
  while content:
    length, length_checksum = struct.unpack('<QI', content[:12])
    data, (data_checksum,) = (
      content[12 : 12 + length],
      struct.unpack_from('<I', content, 12 + length),
    )
    assert length_checksum == checksum(content[:8])
    assert not with_checksums or data_checksum == checksum(data)
    found.append(event_pb2.Event.FromString(data))
    content = content[16 + length :]
  return found


def curves(workdir: Path) -> dict[str, list[tuple[int, float]]]:
  """(step, value) of every scalar, in the order of the files."""
  found: dict[str, list[tuple[int, float]]] = {}
  for path in sorted((workdir / 'tensorboard').iterdir()):
    for event in read_events(path):
      for value in event.summary.value:
        if value.HasField('simple_value'):
          found.setdefault(value.tag, []).append((event.step, value.simple_value))
  return found


def images(workdir: Path) -> list[tuple[int, str, bytes]]:
  return [
    (event.step, value.tag, value.image.encoded_image_string)
    for path in sorted((workdir / 'tensorboard').iterdir())
    for event in read_events(path)
    for value in event.summary.value
    if value.HasField('image')
  ]


def rows(workdir: Path) -> list[dict[str, float]]:
  return [json.loads(line) for line in (workdir / 'metrics.jsonl').read_text().splitlines()]


@pytest.fixture(scope='module')
def watched(tmp_path_factory) -> Path:
  """A Smooth Encoder after a short training."""
  workdir = tmp_path_factory.mktemp('watched')
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(recording, '_WATCHED', 1000)  # all test images, which the result is about
    pretrain.run(config(workdir), signals.StopSignal())
  return workdir


def check_matches_metrics(workdir: Path) -> None:
  found, written = curves(workdir), rows(workdir)
  for name in written[0].keys() - {'step'}:
    expected = [(row['step'], float(np.float32(row[name]))) for row in written]
    assert found[f'train/{name}'] == expected, name


def test_the_check_value_of_crc_32c():
  """RFC 3720's: without it the two readers could be wrong alike."""
  assert checksum(b'123456789') == ((0xE3069283 >> 15 | 0xE3069283 << 17) + 0xA282EAD8) & 0xFFFFFFFF


def test_event_files_say_what_metrics_say(watched):
  (path,) = (watched / 'tensorboard').iterdir()
  first, second, *_ = read_events(path)
  assert first.file_version == 'brain.Event:2' and second.session_log.status == 1
  assert [row['step'] for row in rows(watched)] == [5, 10, 15, 20, 25, 30]
  check_matches_metrics(watched)
  speed = curves(watched)['speed/steps_per_second']
  assert [step for step, _ in speed] == [5, 10, 15, 20, 25, 30]
  assert all(value > 0.0 for _, value in speed)


def test_checkpoints_are_looked_at(watched):
  found = curves(watched)
  result = json.loads((watched / 'result.json').read_text())['test']
  for name in result:
    assert [step for step, _ in found[f'held_out/{name}']] == [10, 20, 30]
    assert found[f'held_out/{name}'][-1][1] == pytest.approx(result[name], rel=1e-6)
  for _, linf in found['held_out/selection_linf']:
    assert 0.0 < linf <= 0.2 + 1e-6
  moves = found['held_out/selection_squared_w2']
  assert [step for step, _ in moves] == [10, 20, 30] and min(value for _, value in moves) > 0.0
  shown = images(watched)
  assert [(step, name) for step, name, _ in shown] == [
    (step, name) for step in (10, 20, 30) for name in PICTURES
  ]
  for _, name, png in shown[-3:]:
    with Image.open(io.BytesIO(png)) as small, Image.open(watched / f'{name}.png') as large:
      rows_and_columns = PICTURES[name]
      assert small.size == tuple(28 * count for count in reversed(rows_and_columns))
      pixels_of_rows = np.asarray(large)[::2, -2 * small.width :: 2]  # without their labels
      np.testing.assert_array_equal(np.asarray(small), pixels_of_rows[: small.height])


def test_a_resumed_run_has_every_step_once(watched, tmp_path, monkeypatch):
  """Stopped twice between rows; once killed long after its last checkpoint, within a record."""
  monkeypatch.setattr(recording, '_WATCHED', 1000)
  for _ in range(2):
    stop = signals.StopSignal()
    stop.signum = signal.SIGTERM
    with pytest.raises(signals.Interrupted):
      pretrain.run(config(tmp_path), stop)
  (step, _), *_ = checkpoints.steps(tmp_path / 'checkpoints')
  with tensorboard.EventWriter(tmp_path / 'tensorboard', step) as writer:
    writer.row(25, {'loss': 0.0})
    writer.images(25, {'samples': np.zeros((1, 1, 28, 28, 1), np.float32)})
    writer.row(28, {'loss': 0.0})
  killed = sorted((tmp_path / 'tensorboard').iterdir())[-1]
  killed.write_bytes(killed.read_bytes()[:-3])
  killed.with_name(f'.{killed.name}.7.tmp').write_bytes(b'half')  # TensorBoard would read it
  pretrain.run(config(tmp_path), signals.StopSignal())
  check_matches_metrics(tmp_path)
  straight, resumed = curves(watched), curves(tmp_path)
  assert resumed.keys() == straight.keys()
  for name in straight.keys() - {'speed/steps_per_second'}:
    assert resumed[name] == straight[name], name
  assert images(tmp_path) == images(watched)
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 4  # one a process


def test_only_whole_records_are_read(tmp_path):
  with tensorboard.EventWriter(tmp_path / 'a', 0) as writer:
    writer.scalars(3, 'train', {'loss': 1.5})
  (path,) = (tmp_path / 'a').iterdir()
  content = path.read_bytes()
  assert [event.step for event in tensorboard.read(path)] == [0, 1, 3]
  assert len(read_events(path, with_checksums=True)) == 3
  for cut in range(1, 40):
    path.write_bytes(content[:-cut])
    assert [event.step for event in tensorboard.read(path)] == [0, 1]
  path.write_bytes(content + bytes(64))  # a file system may fill up with zeros
  assert len(list(tensorboard.read(path))) == 3


def test_event_files_can_be_declined(tmp_path):
  pretrain.run(config(tmp_path, tensorboard=False), signals.StopSignal())
  assert not (tmp_path / 'tensorboard').exists()


def test_a_traversal_moves_one_latent(watched):
  model, params = se_vae.load_model(watched)
  x = np.random.default_rng(0).integers(0, 256, (10, 28, 28, 1), np.uint8)
  # Latent 2 is used most, then 0, 1 and 3.
  means = np.array([[0.1, 0.0, 3.0, 0.0], [0.5, 0.2, -3.0, 0.1]])
  settings = training.TrainConfig(pgd_steps=2, num_steps=30)  # the run's: compiled before
  pages = image_grids.pages(model, settings, params, jax.random.key(1), x, means)
  z = np.asarray(model.encode(params, pixels(x)).mean)[0]
  for row, latent in enumerate((2, 0, 1, 3)):
    moved = np.tile(z, (10, 1))
    moved[:, latent] = np.linspace(-3, 3, 10)
    expected = model.decode(params, moved)
    np.testing.assert_allclose(pages['traversals'][row], expected, atol=1e-5)  # jitted or not
  originals, selected, *_ = pages['reconstructions']
  np.testing.assert_array_equal(originals, np.asarray(pixels(x)))
  largest = [float(np.abs(a - b).max()) for a, b in zip(originals, selected, strict=True)]
  assert image_grids.perturbation(pages['reconstructions']) == pytest.approx(np.mean(largest))
  assert max(largest) <= 0.2 + 1e-6
  q_a, q_b = model.encode(params, originals), model.encode(params, selected)
  moved = image_grids.squared_w2(model, params, pages['reconstructions'])
  assert moved == pytest.approx(float(se_vae.squared_w2(q_a, q_b).mean()), rel=1e-5)


@pytest.mark.parametrize(('size', 'scale', 'channels'), [(28, 2, 1), (8, 5, 3)])
def test_every_row_of_a_page_has_its_label_beside_it(tmp_path, size, scale, channels):
  page = np.zeros((4, 3, size, size, channels), np.float32)
  image_grids.save(tmp_path / 'page.png', page, image_grids.ROWS)
  with Image.open(tmp_path / 'page.png') as picture:
    pixels_of_page = np.asarray(picture)
  margin = pixels_of_page[:, : -3 * size * scale]
  assert len(margin) == 4 * size * scale and not pixels_of_page[:, margin.shape[1] :].any()
  for row in np.split(margin, 4):
    ink = (row < 128).reshape(len(row), -1).any(axis=1)
    assert ink.any() and not ink[[0, -1]].any()  # whole, and in no other row


def test_a_terminal_has_one_line_that_is_written_over(capsys, monkeypatch):
  monkeypatch.setattr(sys.stderr, 'isatty', lambda: True)
  with messages.progress_bar(3, 'pretrain') as bar:
    bar.mininterval = 0.0
    for loss in ('3.0', '2.0', '1.0'):
      bar.set_postfix(loss=loss, refresh=False)
      bar.update()
  *_, last = (text := capsys.readouterr().err).split('\r')
  assert text.count('\n') <= 1 and '3/3' in last and ' steps/s' in last and 'loss=1.0' in last


def test_a_log_file_has_plain_lines(capsys):
  with messages.progress_bar(3, 'pretrain') as bar:
    bar.mininterval = 0.0
    for loss in ('3.0', '2.0', '1.0'):
      bar.set_postfix(loss=loss, refresh=False)
      bar.update()
  text = capsys.readouterr().err
  assert '\r' not in text and text.endswith('\n')
  first, *_, last = lines = text.splitlines()
  assert first == 'pretrain: 0/3'
  assert re.fullmatch(r'pretrain: 3/3, 00:00 gone, 00:00 left, [0-9.]+ steps/s, loss=1\.0', last)
  assert len({line.partition(',')[0] for line in lines}) == len(lines)


@pytest.mark.parametrize(('n', 'says'), [(2, ''), (6, '2.0 steps/s'), (3, '2.0 s/step')])
def test_a_speed_is_told_in_words_once_it_is_known(n, says):
  """Two of ten steps were done before."""
  times = messages._times(n=n, total=10, initial=2, elapsed=2.0, rate=None, unit='step')
  assert times.endswith(says) and bool(times) == bool(says)


@pytest.mark.parametrize(('active', 'said'), [(0, True), (1, False)])
def test_an_encoder_without_an_active_latent_is_told(tmp_path, monkeypatch, capsys, active, said):
  figures = {'active_latents': active}
  monkeypatch.setattr(recording.Examiner, 'examine', lambda *_: (figures, {}))
  chosen = config(tmp_path, dataset='mnist_5k', objective='vae', num_steps=2, tensorboard=False)
  pretrain.run(chosen, signals.StopSignal())
  assert (f'{tmp_path}: no latent is active' in capsys.readouterr().err) == said


def test_a_full_disk_at_a_row_of_metrics_names_the_file(tmp_path, monkeypatch):
  dumps = recording.json_files.dumps

  def full(content, **options):
    if not options:  # a row, as all other files are indented
      raise OSError(errno.ENOSPC, 'No space left on device')
    return dumps(content, **options)

  monkeypatch.setattr(recording.json_files, 'dumps', full)
  chosen = config(tmp_path, dataset='mnist_5k', objective='vae', num_steps=10, tensorboard=False)
  with pytest.raises(OSError, match=rf"No space left on device: '{tmp_path}/metrics.jsonl'"):
    pretrain.run(chosen, signals.StopSignal())
