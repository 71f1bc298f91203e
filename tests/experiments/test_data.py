"""Checks that batches are a pure function of (seed, step), that every example is in its place, and all refusals."""

import collections
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys

import jax
import numpy as np
import PIL.Image
import pytest
import tensorflow_datasets as tfds
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn import datasets

from experiments import data
from experiments.data import digits, images
from experiments.data.order import BatchPart, ShuffledOrder

REPOSITORY = pathlib.Path(__file__).parents[2]
STEPS = (0, 7, 1000, 10, 123_456_789)
# The program prints a hash of batches of every kind. The test runs it in this process and in two others, which start
# together after their imports, and expects equal hashes.
FINGERPRINT = """
import hashlib, pathlib, sys, time
from experiments import data

def fingerprint(root, steps):
  root = pathlib.Path(root)
  arguments = dict(batch_size=64, seed=3, data_dir=root)
  sets = [data.load('digits', **arguments), data.load('digits', augment=True, **arguments),
          data.load(str(root / 'numbers.txt'), sequence_length=20, **arguments)]
  batches = [one.train[step] for one in sets for step in steps] + [batch for one in sets for batch in one.test]
  return hashlib.sha256(b''.join(value.tobytes() for batch in batches for value in batch.values())).hexdigest()

if __name__ == '__main__':
  print('ready', flush=True)
  while not pathlib.Path(sys.argv[1], 'go').exists():
    time.sleep(0.01)
  print(fingerprint(sys.argv[1], eval(sys.argv[2])))
"""


class Boxes(tfds.core.GeneratorBasedBuilder):
  """The `Boxes` are a set of colour images that has its own validation split. Each pixel encodes split and number."""

  VERSION = tfds.core.Version('1.0.0')
  SIZES = {'train': 20, 'validation': 6, 'test': 5}
  SHAPE = (4, 6, 3)

  def _info(self):
    features = {'picture': tfds.features.Image(shape=self.SHAPE), 'kind': tfds.features.ClassLabel(num_classes=3)}
    return tfds.core.DatasetInfo(
        builder=self, features=tfds.features.FeaturesDict(features), supervised_keys=('picture', 'kind'))

  def _split_generators(self, dl_manager):
    return {split: self._generate_examples(place, size) for place, (split, size) in enumerate(self.SIZES.items())}

  def _generate_examples(self, place, size):
    for i in range(size):
      pixels = np.full((4, 6, 3), (100 * place + i, 3 * i, 9), np.uint8)
      yield i, {'picture': PIL.Image.fromarray(pixels), 'kind': i % 3}


class RaggedBoxes(Boxes):
  """The `RaggedBoxes` are declared without one shape for all images."""

  SHAPE = (None, None, 3)


@pytest.fixture(scope='module')
def root(tmp_path_factory):
  """Returns a data directory with `digits`, the two sets above, and one of the two in TensorFlow's own format."""
  path = tmp_path_factory.mktemp('data')
  digits.prepared(path)
  for builder in (Boxes, RaggedBoxes):
    builder(data_dir=path, file_format='array_record').download_and_prepare(download_dir=path / 'downloads')
  shutil.copytree(path / 'boxes', path / 'old_boxes')
  info = path / 'old_boxes' / '1.0.0' / 'dataset_info.json'
  info.write_text(json.dumps({**json.loads(info.read_text()), 'name': 'old_boxes', 'fileFormat': 'tfrecord'}))
  (path / 'short.txt').write_text('Twelve words.')
  (path / 'latin1.txt').write_bytes('déjà'.encode('latin-1'))
  return path


def load(root, name='digits', batch_size=64, seed=3, **arguments):
  return data.load(str(name), batch_size=batch_size, seed=seed, data_dir=root, **arguments)


def rows(batches, raw=False):
  """Counts the images with their labels, without padding. `raw` is the range of pixels to map back to 0 ... 16."""
  counted = collections.Counter()
  for batch in batches:
    images = batch['inputs']
    if raw:
      images = np.rint((images - raw[0]) / (raw[1] - raw[0]) * 16).astype(np.uint8)
    kept = batch.get('weight', np.ones(len(images))) > 0
    counted.update((image.tobytes(), int(label)) for image, label in zip(images[kept], batch['labels'][kept]))
  return counted


def epoch(one, number, count, batch_size):
  """Returns the inputs and labels of epoch `number`, cut out of the endless training batches."""
  first, last = number * count, (number + 1) * count
  steps = [one.train[step] for step in range(first // batch_size, -(-last // batch_size))]
  cut = slice(first % batch_size, first % batch_size + count)
  return {key: np.concatenate([step[key] for step in steps])[cut] for key in steps[0]}


# The digits.


def test_digits_metadata(root):
  info = digits.prepared(root).info
  assert {name: split.num_examples for name, split in info.splits.items()} == {'train': 1437, 'test': 360}
  assert info.features['image'].shape == (8, 8, 1) and info.features['image'].np_dtype == np.uint8
  assert info.features['label'].num_classes == 10 and info.supervised_keys == ('image', 'label')
  assert info.file_format.value == 'array_record'


def test_whole_splits_have_all_pixels_from_0_to_1(root):
  whole = data.pixels('digits', data_dir=root, valid_fraction=0.1)
  assert {split: len(labels) for split, (_, labels) in whole.items()} == {'train': 1294, 'valid': 143, 'test': 360}
  original = datasets.load_digits()
  stored = sorted(((16 * x).astype(np.uint8).tobytes(), int(y)) for images, labels in whole.values()
                  for x, y in zip(images, labels))
  assert stored == sorted((x.astype(np.uint8).tobytes(), int(y)) for x, y in zip(original.images, original.target))
  assert {*data.pixels('digits', data_dir=root, valid_fraction=0.0)} == {'train', 'test'}
  with pytest.raises(ValueError, match='is text, which has no pixels'):
    data.pixels(str(root / 'short.txt'))
  with pytest.raises(ValueError, match='augment=True means nothing there'):
    data.pixels('digits', data_dir=root, augment=True)


def test_digits_are_scikit_learns_and_stratified(root):
  sources = digits.prepared(root).as_data_source()
  stored = {split: [(example['image'].tobytes(), int(example['label'])) for example in source]
            for split, source in sources.items()}
  original = datasets.load_digits()
  expected = collections.Counter(
      (image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(original.images, original.target))
  assert collections.Counter(stored['train'] + stored['test']) == expected
  share = [np.bincount([label for _, label in stored[split]], minlength=10) for split in ('test', 'train')]
  assert np.abs(share[0] - (share[0] + share[1]) / 5).max() < 1


def test_preparing_needs_no_network_and_no_tensorflow_and_says_nothing(tmp_path, monkeypatch, capfd):
  def refuse(*_):
    raise AssertionError('tried to open a connection')
  monkeypatch.setattr(socket.socket, 'connect', refuse)
  monkeypatch.setattr(socket, 'getaddrinfo', refuse)
  load(tmp_path)
  assert 'tensorflow' not in sys.modules
  assert capfd.readouterr() == ('', '')
  assert {path.name for path in tmp_path.iterdir()} == {'digits', '.digits.lock'}


DAMAGE = {
    'truncated': lambda directory: _rewrite(directory, lambda content: content[:len(content) // 2]),
    'empty': lambda directory: _rewrite(directory, lambda content: b''),
    'one bit': lambda directory: _rewrite(directory, lambda content: content[:9000] + b'\xff' + content[9001:]),
    'no records': lambda directory: next(directory.glob('*-train.*')).unlink(),
    'half an info': lambda directory: (directory / 'dataset_info.json').write_text('{"name": "dig'),
    'no info': lambda directory: (directory / 'dataset_info.json').unlink(),
    'nothing': lambda directory: shutil.rmtree(directory),
}


def _rewrite(directory, change):
  file = next(directory.glob('*-train.*'))
  file.write_bytes(change(file.read_bytes()))


@pytest.mark.parametrize('damage', DAMAGE)
def test_a_damaged_set_is_prepared_again(root, tmp_path, damage):
  shutil.copytree(root / 'digits', tmp_path / 'digits')
  DAMAGE[damage](tmp_path / 'digits' / '1.0.0')
  assert rows(load(tmp_path).test) == rows(load(root).test)
  assert digits.prepared(tmp_path).info.splits['train'].num_examples == 1437


def test_two_processes_prepare_at_once_and_see_the_same_batches(root, tmp_path):
  namespace = {'__name__': 'fingerprint'}
  exec(FINGERPRINT, namespace)
  for directory in (root, tmp_path):
    (directory / 'numbers.txt').write_text(''.join(f'{i:05d}' for i in range(600)))
  both = [subprocess.Popen([sys.executable, '-c', FINGERPRINT, str(tmp_path), repr(STEPS)], cwd=REPOSITORY, text=True,
                           stdout=subprocess.PIPE, stderr=subprocess.PIPE) for _ in range(2)]
  assert [process.stdout.readline() for process in both] == ['ready\n'] * 2, [process.stderr.read() for process in both]
  (tmp_path / 'go').touch()
  outputs = [process.communicate(timeout=120) for process in both]
  assert [process.returncode for process in both] == [0, 0], outputs
  assert {out.strip() for out, _ in outputs} == {namespace['fingerprint'](root, STEPS)}
  assert [err for _, err in outputs] == ['', '']  # TFDS shows no bars and no advice to install OpenCV.


# The order of examples.


def test_a_batch_does_not_depend_on_what_was_asked_before(root):
  one, other = load(root, augment=True), load(root, augment=True)
  forward = [one.train[step] for step in STEPS]
  backward = [other.train[step] for step in reversed(STEPS)]
  for a, b in zip(forward, reversed(backward)):
    assert all((a[key] == b[key]).all() for key in a)


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 50), st.integers(1, 70), st.integers(0, 2**32 - 1), st.integers(0, 10**12))
def test_every_position_once_an_epoch(count, batch_size, seed, number):
  positions = ShuffledOrder(count, BatchPart(batch_size, slice(None)), seed)
  first, last = number * count, (number + 1) * count
  steps = [positions[step] for step in range(first // batch_size, -(-last // batch_size))]
  index, epochs = (np.concatenate([step[key] for step in steps]) for key in ('index', 'epoch'))
  assert sorted(index[epochs == number]) == list(range(count))


@pytest.mark.parametrize('batch_size', [100, 1294, 1500])
def test_every_training_image_once_an_epoch_in_changing_order(root, batch_size):
  one, other = load(root, batch_size=batch_size), load(root, batch_size=batch_size, seed=4)
  epochs = [epoch(one, 0, 1294, batch_size), epoch(one, 1, 1294, batch_size), epoch(other, 0, 1294, batch_size)]
  assert rows([epochs[0]]) == rows([epochs[1]]) == rows([epochs[2]])
  orders = {each['inputs'].tobytes() for each in epochs}
  assert len(orders) == 3


@pytest.mark.parametrize('fraction, batch_size', [(0, 64), (0.1, 143), (0.1, 32), (0.25, 64), (0.5, 1000)])
def test_splits_are_disjoint_and_complete(root, fraction, batch_size):
  one = load(root, batch_size=batch_size, valid_fraction=fraction)
  count = 1437 - int(1437 * fraction)
  train = epoch(one, 0, count, batch_size)
  scale = train['inputs'].min(), train['inputs'].max()
  parts = [rows([train], scale), rows(one.valid, scale), rows(one.test, scale)]
  assert [part.total() for part in parts] == [count, 1437 - count, 360]
  original = datasets.load_digits()
  assert sum(parts, collections.Counter()) == collections.Counter(
      (image.astype(np.uint8).tobytes(), int(label)) for image, label in zip(original.images, original.target))


def test_the_last_batch_is_padded_with_weight_zero(root):
  one = load(root, batch_size=100)
  assert [batch['weight'].sum() for batch in one.test] == [100, 100, 100, 60] and len(one.test) == 4
  for batch in (*one.test, *one.valid):
    assert batch['inputs'].shape == (100, 8, 8, 1) and batch['labels'].shape == batch['weight'].shape == (100,)
    assert (np.diff(batch['weight']) <= 0).all()


def test_batches_are_what_example_says(root):
  for one in (load(root), load(root, 'boxes', batch_size=7)):
    assert {key: (value.shape, value.dtype) for key, value in one.train[5].items()} == {
        key: (value.shape, value.dtype) for key, value in one.example.items()}
  assert one.example['inputs'].shape == (7, 4, 6, 3) and one.num_classes == 3


@pytest.mark.parametrize('step', [-1, 6])
def test_there_is_no_batch_outside(root, step):
  with pytest.raises(IndexError, match=f'no batch {step}'):
    load(root).test[step]


# Images.


def test_standardised_by_the_training_images(root):
  one = load(root, batch_size=1294)
  images = one.train[0]['inputs']
  assert abs(images.mean()) < 1e-5 and abs(images.std() - 1) < 1e-5
  channels = load(root, 'boxes', batch_size=20).train[0]['inputs']
  np.testing.assert_allclose(channels.mean((0, 1, 2)), 0, atol=1e-6)
  np.testing.assert_allclose(channels.std((0, 1, 2)), [1, 1, 0], atol=1e-5)  # A constant channel gives no NaN.


def test_super_resolution_is_from_images_at_half_the_size(root):
  one, plain = load(root, task='super_resolution', batch_size=9), load(root, batch_size=9)
  assert one.num_classes == 1 and one.example['inputs'].shape == (9, 4, 4, 1)
  for batch, same in zip(one.test, plain.test):
    assert set(batch) == set(same)
    np.testing.assert_array_equal(batch['weight'], same['weight'])
    half = jax.image.resize(batch['labels'], (9, 4, 4, 1), 'bicubic')
    np.testing.assert_allclose(batch['inputs'], half, atol=1e-6)
  labels = one.train[3]['labels']
  assert labels.min() == 0 and labels.max() == 1  # The largest pixel of digits is 16.
  standardised = plain.train[3]['inputs']
  np.testing.assert_allclose((labels - labels.mean()) / labels.std(),
                             (standardised - standardised.mean()) / standardised.std(), atol=1e-5)
  colours = load(root, 'boxes', task='super_resolution', batch_size=2)
  assert colours.num_classes == 3 and colours.train[0]['inputs'].shape == (2, 2, 3, 3)


def test_images_without_a_half_are_refused():
  part = (lambda rows: {'inputs': np.ones((len(rows), 4, 5, 1), np.uint8)}, np.arange(3))
  with pytest.raises(ValueError, match='4 x 5 have no half'):
    data.PREPARATIONS['super_resolution'](images.ImageSplits(part, part, part, 10))


def test_a_set_keeps_its_own_validation_split(root):
  one = load(root, 'boxes', batch_size=4)
  assert [batch['weight'].sum() for batch in one.valid] == [4, 2]
  first = epoch(one, 0, 20, 4)['inputs'][..., 0].max((1, 2))
  assert len(set(first)) == 20
  valid = np.concatenate([batch['inputs'][batch['weight'] > 0][:, 0, 0, 0] for batch in one.valid])
  assert valid.min() > first.max()  # The first channel of the validation split is at least 100.


def test_from_records_as_from_memory(root, monkeypatch):
  fast = load(root, batch_size=50, augment=True)
  monkeypatch.setattr(images, 'IN_MEMORY', 1000)
  slow = load(root, batch_size=50, augment=True)
  for a, b in zip((fast.train[3], *fast.valid), (slow.train[3], *slow.valid)):
    assert all((a[key] == b[key]).all() and a[key].dtype == b[key].dtype for key in a)


def test_sets_for_several_seeds_share_the_images(root, monkeypatch):
  one = load(root, seed=0)
  monkeypatch.setattr(images, '_with_memory', lambda *_: pytest.fail('decoded again'))
  assert (load(root, seed=1).test[0]['inputs'] == one.test[0]['inputs']).all()


def test_augmented_images_are_shifts(root):
  plain, shifted = load(root).train[2], load(root, augment=True).train[2]
  black = plain['inputs'].min()
  padded = np.pad(plain['inputs'], ((0, 0), (1, 1), (1, 1), (0, 0)), constant_values=black)
  candidates = np.stack([padded[:, y:y + 8, x:x + 8] for y in range(3) for x in range(3)])
  same = (candidates == shifted['inputs']).all((2, 3, 4))
  assert same.any(0).all() and (same.sum(1) > 0).all()  # Each image is one of nine shifts, and all nine occur.
  assert (plain['labels'] == shifted['labels']).all()


# A part of each batch.


PARTS = [slice(0, 5), slice(5, 6), slice(6, 12)]


@pytest.mark.parametrize('arguments', [
    {}, {'augment': True}, {'task': 'super_resolution'}, {'name': 'numbers.txt', 'sequence_length': 10}], ids=str)
def test_the_parts_of_a_batch_are_together_the_batch(root, text, arguments):
  arguments = {**arguments, 'batch_size': 12}
  if 'name' in arguments:
    arguments['name'] = text
  one, parts = load(root, **arguments), [load(root, rows=rows, **arguments) for rows in PARTS]
  assert all(part.example == one.example for part in parts)
  for split in ('train', 'valid', 'test'):
    whole, pieces = getattr(one, split), [getattr(part, split) for part in parts]
    assert {len(whole)} == {len(piece) for piece in pieces}
    for step in (0, 1, len(whole) - 1 if split != 'train' else 12_345):
      assert [len(piece[step]['labels']) for piece in pieces] == [5, 1, 6]
      for key, value in whole[step].items():
        np.testing.assert_array_equal(np.concatenate([piece[step][key] for piece in pieces]), value)


def test_only_the_own_rows_are_read(root, monkeypatch):
  """Counts each access to a row, with a set that is too large for memory."""
  monkeypatch.setattr(images, 'IN_MEMORY', 0)
  read, reader = collections.Counter(), images._reader

  def counting(builder, split, *keys):
    get = reader(builder, split, *keys)
    return lambda rows: (read.update((split, int(row)) for row in rows), get(rows))[1]

  monkeypatch.setattr(images, '_reader', counting)
  whole = load(root, batch_size=12)
  parts = [load(root, batch_size=12, rows=rows) for rows in PARTS]
  for split in ('train', 'valid', 'test'):
    counts = []
    for one in (whole, *parts):
      read.clear()
      getattr(one, split)[3]
      counts.append(read.copy())
    assert [count.total() for count in counts] == [12, 5, 1, 6] and sum(counts[1:], collections.Counter()) == counts[0]


def test_what_fits_in_memory_is_read_once(monkeypatch):
  read = []
  get = images._with_memory(lambda rows: (read.extend(rows), {'inputs': rows * 2})[1], 3000)
  for rows in ([5, 1, 5], [1, 2], np.arange(3000), [2999, 0]):
    assert (get(np.array(rows))['inputs'] == np.array(rows) * 2).all()
  assert sorted(read) == list(range(3000))


# Text.


@pytest.fixture(scope='module')
def text(tmp_path_factory):
  """Returns a file of numbers, so that eight bytes tell their position, between characters of two and three bytes."""
  path = tmp_path_factory.mktemp('text') / 'numbers.txt'
  path.write_text(''.join(f'{i:06d}é€' for i in range(300)))
  return path


def split_texts(one):
  """Returns the validation and the test text: the first input, then the labels of weight 1."""
  texts = []
  for split in (one.valid, one.test):
    labels = np.concatenate([batch['labels'][batch['weight'] > 0] for batch in split])
    texts.append(bytes([split[0]['inputs'][0, 0], *labels.tolist()]))
  return texts


@pytest.mark.parametrize('length, batch_size', [(10, 4), (7, 3), (128, 2), (1, 16)])
def test_a_file_is_cut_into_whole_characters_and_every_byte_predicted_once(text, length, batch_size):
  one = load(None, text, sequence_length=length, batch_size=batch_size)
  whole = text.read_bytes()
  valid, test = split_texts(one)
  assert whole.endswith(valid + test)
  for part in (whole[:-len(valid + test)], valid, test):
    part.decode('utf-8')
  assert abs(len(valid) - len(whole) * 0.05) < 4 and abs(len(test) - len(whole) * 0.05) < 4


@pytest.mark.parametrize('length, batch_size', [(16, 8), (50, 3), (200, 1)])
def test_training_windows_lie_side_by_side_and_move_between_epochs(text, length, batch_size):
  one = load(None, text, sequence_length=length, batch_size=batch_size)
  valid, test = split_texts(one)
  train = text.read_bytes()[:-len(valid + test)]
  count, offsets = (len(train) - length) // length, []
  for number in range(4):
    part = epoch(one, number, count, batch_size)
    assert (part['inputs'][:, 1:] == part['labels'][:, :-1]).all()
    starts = sorted(train.index(bytes([*inputs.tolist(), labels[-1]]))
                    for inputs, labels in zip(part['inputs'].astype(np.uint8), part['labels'].astype(np.uint8)))
    assert np.array_equal(np.diff(starts), np.full(count - 1, length))
    offsets.append(starts[0])
  assert len(set(offsets)) > 1 and max(offsets) < length
  assert one.num_classes == 256 and one.example['inputs'].dtype == np.int32


# Refusals.


REFUSED = [
    # name, arguments, what the message says
    ('digts', {}, ["unknown data set 'digts'", "Did you mean 'digits'", 'boxes']),
    ('mnits', {}, ["Did you mean 'mnist'", 'UTF-8 text file']),
    ('mnist', {}, ["'mnist' is not in data_dir", "'boxes', 'digits'", 'tfds build mnist --data_dir']),
    ('old_boxes', {}, ['tfrecord', 'TensorFlow', 'tfds build old_boxes']),
    ('ragged_boxes', {}, ["'ragged_boxes' is no set of 8-bit images of one shape", 'picture']),
    ('nowhere.txt', {}, ["cannot read the text file 'nowhere.txt'", 'No such file']),
    ('short.txt', {}, ['short.txt', '12 bytes of train text', 'sequence length of 128 needs 256']),
    ('latin1.txt', {}, ['latin1.txt', 'byte 1 is not']),
    ('digits', {'sequence_length': 8}, ["'digits' is images", 'sequence_length=8']),
    ('short.txt', {'augment': True}, ['is text', 'augment=True']),
    ('short.txt', {'task': 'super_resolution'}, ['is text', 'task=super_resolution']),
    ('digits', {'task': 'superresolution'}, ["unknown task 'superresolution'", "Did you mean 'super_resolution'"]),
    ('digits', {'batch_size': 0}, ['batch_size=0 must be at least 1']),
    *((name, {'batch_size': 10**9}, ['batch_size=1000000000 takes', 'are free; give a smaller batch'])
      for name in ('digits', 'boxes', __file__)),
    ('digits', {'seed': -1}, ['seed=-1 must be in 0']),
    ('digits', {'valid_fraction': 1.0}, ['valid_fraction=1.0']),
    ('digits', {'root': 'short.txt'}, ['cannot write the digits', 'short.txt', 'choose another data_dir']),
]


@pytest.mark.parametrize('name, arguments, says', REFUSED, ids=lambda value: str(value)[:20])
def test_refusals(root, monkeypatch, name, arguments, says):
  monkeypatch.chdir(root)
  arguments = dict(arguments)
  with pytest.raises(ValueError) as refusal:
    load(root / arguments.pop('root', ''), name, **arguments)
  for words in says:
    assert words in str(refusal.value)


@pytest.mark.parametrize('variable, expected', [('/x/y', '/x/y/sparsejax'), ('', '~/.cache/sparsejax'),
                                                ('relative', '~/.cache/sparsejax')])
def test_the_cache_directory(monkeypatch, variable, expected):
  monkeypatch.setenv('XDG_CACHE_HOME', variable)
  assert data.cache_directory() == pathlib.Path(expected).expanduser()


# Sets of TFDS, if a directory has them.


@pytest.mark.skipif('SPARSEJAX_DATA_DIR' not in os.environ, reason='SPARSEJAX_DATA_DIR names no prepared TFDS sets')
@pytest.mark.parametrize('name, shape, classes, sizes', [
    ('mnist', (128, 28, 28, 1), 10, (6000, 10_000)),
    ('cifar10', (128, 32, 32, 3), 10, (5000, 10_000)),
    ('tiny_shakespeare', (128, 64), 256, (55_769, 55_769)),
])
def test_sets_of_tfds(name, shape, classes, sizes):
  length = 64 if classes == 256 else None
  one = load(os.environ['SPARSEJAX_DATA_DIR'], name, batch_size=128, sequence_length=length)
  assert one.example['inputs'].shape == shape and one.num_classes == classes
  assert tuple(sum(batch['weight'].sum() for batch in split) for split in (one.valid, one.test)) == sizes
