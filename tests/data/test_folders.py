"""Image folders: what is in them is what is loaded, and what cannot be used is named."""

from __future__ import annotations

import shutil
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from experiments.cli import flags
from se_vae import data
from se_vae.data import folders
from tests.data.tiny_idx import assert_raises, hashes, splits

RNG = np.random.default_rng(0)


def noise(*shape: int) -> np.ndarray:
  return RNG.integers(0, 256, shape, np.uint8)


def write(root: Path, images: dict[str, np.ndarray]) -> str:
  for name, image in images.items():
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(image).save(root / name)
  return f'folder:{root}'


def colour_of_16_bits() -> bytes:
  """A PNG with 4 x 5 pixels, which Pillow cannot write."""
  header = struct.pack('>IIBBBBB', 4, 5, 16, 2, 0, 0, 0)
  pixels = zlib.compress(5 * (b'\0' + 4 * b'\x12\xff\x12\xff\x12\xff'))
  chunks = [(b'IHDR', header), (b'IDAT', pixels), (b'IEND', b'')]
  packed = [
    struct.pack('>I', len(content)) + kind + content + struct.pack('>I', zlib.crc32(kind + content))
    for kind, content in chunks
  ]
  return b'\x89PNG\r\n\x1a\n' + b''.join(packed)


def gray(count: int = 6, classes: tuple[str, ...] = ('cat', 'dog')) -> dict[str, np.ndarray]:
  return {f'{name}/{i}.png': noise(5, 4) for name in classes for i in range(count)}


def by_class(split: data.Split) -> dict[bytes, int]:
  return dict(zip(hashes(split.images), split.labels['label'].tolist(), strict=True))


@pytest.mark.parametrize('cache', [None, 'cache'])
def test_a_folder_without_splits_holds_out_a_sixth(tmp_path, cache):
  images = gray()
  name = write(tmp_path / 'set', images)
  (tmp_path / 'set' / 'notes.txt').write_text('beside the classes')
  (tmp_path / 'set' / 'cat' / '.hidden').write_text('')
  data.check(name)
  cache_dir = cache and str(tmp_path / cache)
  dataset = data.load(name, cache_dir=cache_dir)
  assert dataset.num_classes == {'label': 2}
  assert [len(split.images) for split in splits(dataset)] == [10, 2]
  found = {key: label for split in splits(dataset) for key, label in by_class(split).items()}
  digests = hashes(np.stack([*images.values()]))
  assert found == dict(zip(digests, [0] * 6 + [1] * 6, strict=True))
  assert dataset.train.images.shape[1:] == (5, 4, 1)
  # The order is that of the content: other names, and another place, give the same data.
  other = {f'{n.replace("cat", "a cat")}.PNG': image for n, image in reversed(images.items())}
  write(tmp_path / 'other', other)
  moved = data.load(name, data_dir=str(tmp_path / 'other'), cache_dir=cache_dir)
  assert moved.digest == dataset.digest
  # And other content gives other data, though it is decoded already.
  Image.fromarray(noise(5, 4)).save(tmp_path / 'set' / 'dog' / '0.png')
  assert data.load(name, cache_dir=cache_dir).digest != dataset.digest


def test_a_folder_with_train_and_test(tmp_path):
  images = {f'{split}/{n}': x for split in ('train', 'test') for n, x in gray(2).items()}
  for name in ('test/cat/0.png', 'test/cat/1.png'):
    del images[name]  # a class may lack test images
  dataset = data.load(write(tmp_path, images))
  train, test = splits(dataset)
  assert dataset.num_classes == {'label': 2}
  assert sorted(train.labels['label']) == [0, 0, 1, 1]
  test_digests = hashes(np.stack([x for n, x in images.items() if n.startswith('test')]))
  assert by_class(test) == dict.fromkeys(test_digests, 1)
  # A class may be called train.
  vehicles = data.load(write(tmp_path / 'vehicles', gray(classes=('bus', 'train'))))
  assert vehicles.num_classes == {'label': 2}


def test_colours_sizes_and_orientations(tmp_path):
  image = noise(8, 6, 3)
  name = write(tmp_path, {f'x/{i}.png': noise(8, 6, 3) for i in range(6)})
  Image.fromarray(image).save(tmp_path / 'x' / 'flat.jpg', quality=95)
  upright = Image.Exif()
  upright[0x0112] = 6  # the camera was held on its side
  Image.fromarray(np.rot90(image)).save(tmp_path / 'x' / 'turned.png', exif=upright)
  dataset = data.load(name)
  digests = hashes(np.concatenate([split.images for split in splits(dataset)]))
  assert dataset.train.images.shape[1:] == (8, 6, 3)
  assert hashes(image[None]) == [digest for digest in digests if digest in hashes(image[None])]
  for i, shape in enumerate([(3, 9, 3), (20, 2, 3)]):
    write(tmp_path, {f'x/other{i}.png': noise(*shape)})
  assert_raises(lambda: data.load(name), 'dataset, image_size: images differ', '(3, 9, 3)')
  small = data.load(name, image_size=4)
  assert small.train.images.shape[1:] == (4, 4, 3)
  assert small.source == f'images in {tmp_path}-4px'
  assert hashes(data.central_square(image, 4)[None])[0] in hashes(
    np.concatenate([split.images for split in splits(small)])
  )


def test_other_images_behind_a_link_are_another_set(tmp_path):
  write(tmp_path / 'one', gray(classes=('cat',)))
  write(tmp_path / 'other', gray(classes=('cat',)))
  name = write(tmp_path / 'set', gray(classes=('dog',)))
  digests = set()
  for place in ('one', 'other'):
    link = tmp_path / 'set' / 'cat'
    link.unlink(missing_ok=True)
    link.symlink_to(tmp_path / place / 'cat')
    digests.add(data.load(name, cache_dir=str(tmp_path / 'cache')).digest)
  assert len(digests) == 2


def test_a_run_may_write_into_its_own_set(tmp_path):
  images = gray()
  name = write(
    tmp_path,
    {f'{half}/{path}': image for half in ('train', 'test') for path, image in images.items()},
  )
  cache_dir = tmp_path / 'runs' / 'data'
  for number in range(3):
    data.load(name, cache_dir=str(cache_dir))
    (tmp_path / 'runs' / f'metrics{number}').touch()
  assert len([*cache_dir.glob('[!.]*')]) == 1


def cut(path: Path) -> None:
  path.write_bytes(path.read_bytes()[:60])


def keep_one_image(root: Path) -> None:
  for path in sorted(root.glob('*/*'))[1:]:
    path.unlink()
  (root / 'dog').rmdir()


@pytest.mark.parametrize(
  ('change', 'words'),
  [
    (shutil.rmtree, ['cannot list']),
    (lambda root: [*map(shutil.rmtree, root.iterdir())], ['no subdirectories']),
    (lambda root: (root / 'empty').mkdir(), ['empty', 'no images']),
    (lambda root: (root / 'cat' / 'x.txt').touch(), ['x.txt', 'no PNG or JPEG']),
    (lambda root: (root / 'cat' / 'more').mkdir(), ['more', 'no PNG or JPEG']),
    (lambda root: (root / 'cat' / '0.png').write_bytes(b'GIF89a'), ['0.png', 'cannot read']),
    (lambda root: cut(root / 'dog' / '3.png'), ['3.png', 'cannot read']),
    (lambda root: write(root, {'dog/5.png': noise(5, 4, 3)}), ['5.png', 'gray (1) or colour']),
    (lambda root: write(root, {'cat/2.png': np.zeros((5, 4), np.uint16)}), ['2.png', '8 bits']),
    (lambda root: (root / 'cat' / '1.png').write_bytes(colour_of_16_bits()), ['1.png', '8 bits']),
    (keep_one_image, ['too few']),
    (
      lambda root: write(root, {'train/a/0.png': noise(5, 4), 'test/b/0.png': noise(5, 4)}),
      ["'b'", 'none to train'],
    ),
  ],
)
def test_what_cannot_be_used_is_named(tmp_path, monkeypatch, change, words):
  name = write(tmp_path / 'set', gray())
  change(tmp_path / 'set')
  monkeypatch.setattr(folders, '_NUM_COMPARED', 12)
  assert_raises(lambda: data.check(name), 'dataset', *words)
  assert_raises(
    lambda: data.check('folder:gone', data_dir=str(tmp_path / 'set')), 'data_dir', *words
  )
  # Where the few that are compared happen to be good, decoding finds it.
  monkeypatch.setattr(folders, '_NUM_COMPARED', 1)
  assert_raises(lambda: data.load(name, cache_dir=str(tmp_path / 'cache')), 'dataset', *words)
  assert not list((tmp_path / 'cache').glob('[!.]*'))


def test_a_name_without_a_folder_is_unknown():
  assert_raises(lambda: data.check('folder:'), 'dataset: unknown', 'folder:DIR')
  assert_raises(lambda: data.check('folder:\0'), 'dataset: cannot list')


def test_runs_record_the_absolute_path(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  assert flags.absolute({'dataset': 'folder:x'}) == {'dataset': f'folder:{tmp_path}/x'}
  for name in ('folder:', 'tfds:x', 'mnist'):
    assert flags.absolute({'dataset': name}) == {'dataset': name}
