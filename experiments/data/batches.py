"""Data sets through TFDS and grain: `load` gives batches that are a pure function of (seed, step)."""

import collections.abc
import contextlib
import difflib
import functools
import logging
import operator
import os
import pathlib
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import grain
import jax
import numpy as np
import tensorflow_datasets as tfds

from experiments.data import digits, sst2
from sparsejax import errors

IN_MEMORY = 2**30  # bytes; images of sets up to this size are decoded once, those of larger ones at each access
STATISTICS = 10_000  # images that the standardisation constants are computed from
BYTES = 256  # the vocabulary of text

Batch = Mapping[str, np.ndarray]


class Batches(collections.abc.Sequence):
  """Batches by number, each a pure function of its number, in any order and at the same cost."""

  def __init__(self, dataset: grain.MapDataset):
    self._dataset = dataset

  def __len__(self) -> int:
    return len(self._dataset)

  def __getitem__(self, step: int) -> Batch:
    step = operator.index(step)
    if not 0 <= step < len(self):
      raise IndexError(f'Batches: no batch {step}; there are {len(self)}.')
    return self._dataset[step]


class Data(NamedTuple):
  """One data set, ready to train on.

  `train[step]`: `inputs` and `labels`, for every `step >= 0`, each example once an epoch in an order that
  depends on the seed and the epoch. `valid` and `test`: every example once in a fixed order, with a `weight` that is 0
  where the last batch is padded. `num_classes` is how many numbers a model gives for each label: the vocabulary
  for text, the channels for super-resolution. `example`: one training batch as `jax.ShapeDtypeStruct`.
  """

  train: Batches
  valid: Batches
  test: Batches
  num_classes: int
  example: dict[str, jax.ShapeDtypeStruct]


def cache_directory() -> pathlib.Path:
  """Where data lie if nobody says otherwise: `$XDG_CACHE_HOME/sparsejax`, or `~/.cache/sparsejax`."""
  cache = pathlib.Path(os.environ.get('XDG_CACHE_HOME', ''))  # to be ignored unless absolute, says its specification
  return (cache if cache.is_absolute() else pathlib.Path.home() / '.cache') / 'sparsejax'


def load(name: str, *, batch_size: int, seed: int, data_dir: str | os.PathLike | None = None,
         sequence_length: int | None = None, valid_fraction: float = 0.1, augment: bool = False,
         task: str = 'classification', rows: slice = slice(None)) -> Data:
  """The data set `name`: `digits`, any TFDS image or text set that is prepared in `data_dir`, or a UTF-8 text file.

  Images: `inputs` `float32[B, H, W, C]`, standardised per channel by the training split, `labels` `int32[B]`,
  `weight` `float32[B]`. Text is read as bytes: `inputs` and `labels` (the next byte) `int32[B, T]`,
  `weight` `float32[B, T]`, with `T = sequence_length` (128 if not given). `valid_fraction` of the training split,
  evenly spaced in it, is the validation split, unless the set has its own; of a text file, the last
  `valid_fraction` is half validation, half test. `augment`: shift training images by up to an eighth of their height.
  `task='super_resolution'`: `labels` `float32[B, H, W, C]` is the image over the largest pixel value of the training
  split, `inputs` is it at half the height and width, bicubic with antialiasing, and classes play no part.
  `rows`: only these of each batch, and only these are read, as one of several processes needs them; `example` is of the
  whole batch. The constants of the standardisation are computed by each process, from the same images.

  `sst2_sentences`: `inputs` `int32[B, T]`, tokens of `data_dir/sst2_sentences/{train,dev,test}.tsv` filled up with 0,
  with `T = sequence_length` (32 if not given), `labels` `int32[B]`; see `sst2.load`.

  Raises `ValueError` for a name that nobody knows, a set that is not in `data_dir`, and arguments that do not fit.
  """
  for argument, fits, rule in (
      (f'batch_size={batch_size}', batch_size >= 1, 'at least 1'),
      (f'seed={seed}', 0 <= seed < 2**32, 'in 0 ... 2**32 - 1'),
      (f'sequence_length={sequence_length}', sequence_length is None or sequence_length >= 1, 'at least 1'),
      (f'valid_fraction={valid_fraction}', 0 <= valid_fraction < 1, 'in 0 ... 1, without 1')):
    if not fits:
      raise ValueError(f'data.load: {argument} must be {rule}.')
  if task not in PREPARED:
    raise errors.unknown('data.load', 'task', task, PREPARED)
  if name == sst2.NAME:
    _refuse(name, 'sentences', 'augment', augment)
    _refuse(name, 'sentences', 'task', task if task != 'classification' else None)
    root = pathlib.Path(data_dir or cache_directory()).expanduser()
    return _sentences(sst2.load(root, sequence_length or sst2.LENGTH), _Part(batch_size, rows), seed)
  with _quiet():
    splits = _splits(name, pathlib.Path(data_dir or cache_directory()).expanduser(), valid_fraction)
    if isinstance(splits, _Texts):
      _refuse(name, 'text', 'augment', augment)
      _refuse(name, 'text', 'task', task if task != 'classification' else None)
      return _text(name, splits, _Part(batch_size, rows), seed, sequence_length or 128)
    _refuse(name, 'images', 'sequence_length', sequence_length)
    return _images(splits, _Part(batch_size, rows), seed, augment, PREPARED[task])


def _refuse(name: str, kind: str, argument: str, value: Any) -> None:
  if value:
    raise ValueError(f'data.load: {name!r} is {kind}, and {argument}={value} means nothing there; leave it out.')


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without TFDS's warnings that OpenCV would be faster and that a directory is not a data set."""
  logger = logging.getLogger('absl')
  level = logger.level
  logger.setLevel(logging.ERROR)
  try:
    yield
  finally:
    logger.setLevel(level)


# Which examples are in a batch.


class _Part(NamedTuple):
  """Of each batch of `batch_size`, these rows."""

  batch_size: int
  rows: slice

  def places(self, step: int) -> np.ndarray:
    return step * self.batch_size + np.arange(self.batch_size)[self.rows]


def _philox(seed: int, epoch: int) -> np.random.Philox:
  return np.random.Philox(key=np.array([seed, epoch], np.uint64))


def _order(seed: int, count: int, epoch: int) -> np.ndarray:
  """The epoch's permutation of `range(count)`, from Philox's raw bits, which NumPy promises never to change."""
  return np.argsort(_philox(seed, epoch).random_raw(count), kind='stable')


class _Shuffled:
  """Grain source of training positions: `{'index', 'epoch'}`, `int64[B]` each, without end.

  Not `MapDataset.shuffle`, which walks a cipher of at least 16 bits until it hits the range: 20 us an index for 1,437
  examples on a 2-core CPU, 3 ms a batch of 128, which is otherwise ready in 0.05 ms.
  """

  def __init__(self, count: int, part: _Part, seed: int):
    self._count, self._part = count, part
    self._order = functools.lru_cache(maxsize=2)(functools.partial(_order, seed, count))

  def __len__(self) -> int:
    return sys.maxsize // self._part.batch_size

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    epoch, at = np.divmod(self._part.places(step), self._count)
    index = [self._order(one)[at[epoch == one]] for one in range(int(epoch[0]), int(epoch[-1]) + 1)]
    return {'index': np.concatenate(index), 'epoch': epoch}


class _InOrder:
  """Grain source of evaluation positions: `{'index', 'weight'}`, every one once, the last batch padded by weight 0."""

  def __init__(self, count: int, part: _Part):
    self._count, self._part = count, part

  def __len__(self) -> int:
    return -(-self._count // self._part.batch_size)

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    at = self._part.places(step)
    return {'index': np.minimum(at, self._count - 1), 'weight': (at < self._count).astype(np.float32)}


def _data(train: grain.MapDataset, valid: grain.MapDataset, test: grain.MapDataset, num_classes: int,
          batch_size: int) -> Data:
  example = {key: jax.ShapeDtypeStruct((batch_size, *value.shape[1:]), value.dtype) for key, value in train[0].items()}
  return Data(Batches(train), Batches(valid), Batches(test), num_classes, example)


# Images.


Read = Callable[[np.ndarray], Batch]  # rows -> {'inputs': uint8[B, H, W, C], 'labels': int32[B]}


class _Images(NamedTuple):
  """Of each split, how to read it and which rows belong to it: training and validation may share a reader."""

  train: tuple[Read, np.ndarray]
  valid: tuple[Read, np.ndarray]
  test: tuple[Read, np.ndarray]
  num_classes: int


def _images(splits: _Images, part: _Part, seed: int, augment: bool, prepared: Callable[..., Any]) -> Data:
  prepare, outputs = prepared(splits)
  train = _batches(_Shuffled(len(splits.train[1]), part, seed), *splits.train)
  if augment:
    train = train.seed(seed).random_map(functools.partial(_shifted, part))
  valid, test = (_batches(_InOrder(len(rows), part), read, rows) for read, rows in (splits.valid, splits.test))
  return _data(*(one.map(prepare) for one in (train, valid, test)), outputs, part.batch_size)


def _batches(positions: _Shuffled | _InOrder, read: Read, rows: np.ndarray) -> grain.MapDataset:
  def batch(at):
    weight = {'weight': at['weight']} if 'weight' in at else {}
    return {**read(rows[at['index']]), **weight}
  return grain.MapDataset.source(positions).map(batch)


def _image_splits(name: str, builder: tfds.core.DatasetBuilder, valid_fraction: float) -> _Images:
  image, label = builder.info.supervised_keys or ('image', 'label')
  features, splits = builder.info.features, builder.info.splits
  kinds = {image: tfds.features.Image, label: tfds.features.ClassLabel}
  fits = all(key in features and isinstance(features[key], kind) for key, kind in kinds.items())
  if not fits or None in features[image].shape or features[image].np_dtype != np.uint8:
    raise ValueError(f'data.load: {name!r} is no set of 8-bit images of one shape with a class each, and no text; '
                     f'its features are {dict(features)}.')
  if missing := {'train', 'test'} - set(splits):
    raise ValueError(f'data.load: {name!r} has no split {errors.some(sorted(missing))}, only {errors.some(splits)}.')
  rows = {split: np.arange(splits[split].num_examples) for split in splits}
  train = _reader(builder, 'train', image, label)
  parts = dict(zip(('train', 'valid'), _cut(len(rows['train']), valid_fraction)))
  own = 'validation' in splits
  return _Images(
      train=(train, rows['train'] if own else parts['train']),
      valid=(_reader(builder, 'validation', image, label), rows['validation']) if own else (train, parts['valid']),
      test=(_reader(builder, 'test', image, label), rows['test']),
      num_classes=features[label].num_classes,
  )


def _cut(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
  """Rows for training and for validation: `fraction` of `count`, evenly spaced. TFDS stores in pseudo-random order."""
  valid = np.diff(np.floor(np.arange(count + 1) * fraction)) > 0
  return np.flatnonzero(~valid), np.flatnonzero(valid)


_REMEMBERED = weakref.WeakValueDictionary()  # (directory, split) -> Read: sets for several seeds share the images


def _reader(builder: tfds.core.DatasetBuilder, split: str, image: str, label: str) -> Read:
  """Reads rows of a split: once if the whole of it fits `IN_MEMORY`, else from the records each time."""
  source = builder.as_data_source(split=split)

  def read(rows):
    examples = source.__getitems__([int(row) for row in rows])
    return {'inputs': np.stack([example[image] for example in examples]),
            'labels': np.array([example[label] for example in examples], np.int32)}

  if len(source) * np.prod(builder.info.features[image].shape) > IN_MEMORY:
    return read
  key = (str(builder.data_path), split)
  if (remembered := _REMEMBERED.get(key)) is None:
    _REMEMBERED[key] = remembered = _remembered(read, len(source))
  return remembered


def _remembered(read: Read, count: int) -> Read:
  known, whole = np.zeros(count, bool), {}

  def remember(rows):
    new = np.unique(rows[~known[rows]])
    for chunk in np.split(new, range(1000, len(new), 1000)) if len(new) else ():
      for key, value in read(chunk).items():
        whole.setdefault(key, np.empty((count, *value.shape[1:]), value.dtype))[chunk] = value
      known[chunk] = True
    return {key: value[rows] for key, value in whole.items()}

  return remember


def _sampled(read: Read, rows: np.ndarray) -> Iterator[np.ndarray]:
  """At most `STATISTICS` of the images, evenly spaced, some at a time."""
  rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), STATISTICS)).astype(int)]
  return (read(rows[start:start + 1000])['inputs'] for start in range(0, len(rows), 1000))


def _standardised(splits: _Images) -> tuple[Callable[[Batch], Batch], int]:
  """Subtract each channel's mean and divide by its deviation, over a sample of the training images; the classes."""
  sums, squares, count = 0, 0, 0
  for images in _sampled(*splits.train):
    shape, pixels = images.shape[1:], images.reshape(-1, images.shape[-1]).astype(np.int64)  # exact in any order
    sums, squares, count = sums + pixels.sum(0), squares + (pixels**2).sum(0), count + len(pixels)
  mean = sums / count
  deviation = np.sqrt(squares / count - mean**2)
  deviation[deviation == 0] = 1
  # As large as an image: NumPy broadcasts over a last axis of three channels eight times slower.
  scale = np.broadcast_to(1 / deviation, shape).astype(np.float32)
  mean = np.broadcast_to(mean, shape).astype(np.float32)
  return lambda batch: {**batch, 'inputs': (batch['inputs'] - mean) * scale}, splits.num_classes


def _halved(splits: _Images) -> tuple[Callable[[Batch], Batch], int]:
  """Images in [0, 1] as labels, the same at half the size as inputs; the channels.

  Divided by the largest value of a sample of the training images: in `digits` that is 16.
  """
  largest = max(int(images.max()) for images in _sampled(*splits.train))
  *_, height, width, channels = next(_sampled(*splits.train)).shape
  if height % 2 or width % 2:
    raise ValueError(f'data.load: images of {height} x {width} have no half; super_resolution needs even sizes.')
  down, across = (np.asarray(jax.image.resize(np.eye(size, dtype=np.float32), (size // 2, size), 'bicubic'))
                  for size in (height, width))

  def prepare(batch):
    images = batch['inputs'].astype(np.float32) / max(largest, 1)
    # One product of two matrices for each image and channel, so that an image does not depend on its neighbours.
    half = down @ images.transpose(0, 3, 1, 2) @ across.T
    return {**batch, 'inputs': np.ascontiguousarray(half.transpose(0, 2, 3, 1)), 'labels': images}

  return prepare, channels


PREPARED = {'classification': _standardised, 'super_resolution': _halved}  # task -> what is done to each batch


def _shifted(part: _Part, batch: Batch, rng: np.random.Generator) -> Batch:
  """Move each image by up to an eighth of its height in both directions; what comes in is 0."""
  count, height, width, channels = batch['inputs'].shape
  most = max(1, height // 8)
  padded = np.pad(batch['inputs'], ((0, 0), (most, most), (most, most), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width, channels), axis=(1, 2, 3))
  down, right = rng.integers(0, 2 * most + 1, (2, part.batch_size))[:, part.rows]  # as for the whole batch
  return {**batch, 'inputs': windows[np.arange(count), down, right, 0]}


# Sentences.


def _sentences(splits: Mapping[str, Batch], part: _Part, seed: int) -> Data:
  def batches(split, positions):
    arrays = splits[split]
    rows = np.arange(len(arrays['labels']))
    return _batches(positions(len(rows)), lambda chosen: {key: value[chosen] for key, value in arrays.items()}, rows)

  train = batches('train', lambda count: _Shuffled(count, part, seed))
  valid, test = (batches(split, lambda count: _InOrder(count, part)) for split in ('valid', 'test'))
  return _data(train, valid, test, sst2.CLASSES, part.batch_size)


# Text.


class _Texts(NamedTuple):
  """The bytes of each split, `uint8[...]`."""

  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray


def _text(name: str, texts: _Texts, part: _Part, seed: int, length: int) -> Data:
  for split, text in texts._asdict().items():
    if len(text) < (needed := 2 * length if split == 'train' else 2):
      raise ValueError(f'data.load: {name!r} has {len(text)} bytes of {split} text, and a sequence length of {length} '
                       f'needs {needed}; use a longer text or shorter sequences.')
  # One window less than fits, so that an epoch can start at any byte of the first.
  positions = _Shuffled((len(texts.train) - length) // length, part, seed)
  train = grain.MapDataset.source(positions).map(functools.partial(_training_windows, texts.train, length, seed))
  valid, test = (grain.MapDataset.source(_InOrder(-(-(len(text) - 1) // length), part))
                 .map(functools.partial(_evaluation_windows, text, length)) for text in (texts.valid, texts.test))
  return _data(train, valid, test, BYTES, part.batch_size)


def _training_windows(text: np.ndarray, length: int, seed: int, at: Batch) -> Batch:
  """Windows side by side, from a start that differs from epoch to epoch so that the cuts do not stay the same."""
  epochs, inverse = np.unique(at['epoch'], return_inverse=True)
  offsets = np.array([_offset(seed, int(epoch), length) for epoch in epochs])[inverse]
  windows = text[(offsets + at['index'] * length)[:, None] + np.arange(length + 1)].astype(np.int32)
  return {'inputs': windows[:, :-1], 'labels': windows[:, 1:]}


def _offset(seed: int, epoch: int, length: int) -> int:
  return int(_philox(seed, epoch).jumped().random_raw() % length)  # jumped: not a number that `_order` used


def _evaluation_windows(text: np.ndarray, length: int, at: Batch) -> Batch:
  """Windows side by side from the first byte: every byte but the first is a label once."""
  places = at['index'][:, None] * length + np.arange(length)
  inside = np.minimum(places, len(text) - 2)
  weight = at['weight'][:, None] * (places == inside).astype(np.float32)
  return {'inputs': text[inside].astype(np.int32), 'labels': text[inside + 1].astype(np.int32), 'weight': weight}


def _joined(source: Any) -> np.ndarray:
  return np.frombuffer(b''.join(example['text'] for example in source), np.uint8)


def _file_splits(path: pathlib.Path, fraction: float) -> _Texts:
  """The file's bytes, cut between characters: all but the last `fraction` for training, the rest in halves."""
  try:
    content = path.read_bytes()
    content.decode('utf-8')
  except OSError as error:
    raise ValueError(f'data.load: cannot read the text file {str(path)!r}: {error.strerror}.') from error
  except UnicodeDecodeError as error:
    raise ValueError(f'data.load: {str(path)!r} is not UTF-8 text: byte {error.start} is not; '
                     'convert it first.') from error
  text = np.frombuffer(content, np.uint8)
  cuts = [_next_character(text, round(len(text) * (1 - part))) for part in (fraction, fraction / 2)]
  return _Texts(*np.split(text, cuts))


def _next_character(text: np.ndarray, at: int) -> int:
  while at < len(text) and text[at] & 0xC0 == 0x80:  # a UTF-8 continuation byte
    at += 1
  return at


# Names.


def _splits(name: str, root: pathlib.Path, valid_fraction: float) -> _Images | _Texts:
  """What `name` stands for: our own set first, then a file, then a TFDS set under `root`."""
  path = pathlib.Path(name).expanduser()
  if name != 'digits' and (path.suffix == '.txt' or path.is_file()):
    return _file_splits(path, valid_fraction)
  builder = digits.prepared(root) if name == 'digits' else _builder(name, root)
  try:
    if 'text' not in builder.info.features:
      return _image_splits(name, builder, valid_fraction)
    return _Texts(*(_joined(builder.as_data_source(split=split)) for split in ('train', 'validation', 'test')))
  except NotImplementedError as error:
    raise ValueError(f'data.load: {name!r} in {str(root)!r} is in the format {builder.info.file_format.value}, which '
                     f'needs TensorFlow to read; {_remedy(name, root)}') from error


def _builder(name: str, root: pathlib.Path) -> tfds.core.DatasetBuilder:
  there = sorted(path.name for path in root.glob('*') if any(path.rglob('dataset_info.json')))
  try:
    builder = tfds.builder(name, data_dir=root)
  except tfds.core.DatasetNotFoundError:
    known = tfds.list_builders(with_community_datasets=False)
    close = difflib.get_close_matches(name.partition('/')[0].partition(':')[0], known, n=3, cutoff=0.5)
    problem = errors.unknown('data.load', 'data set', name, {'digits', sst2.NAME, *there, *close})
    raise ValueError(f'{problem} So are every image set of TFDS and the path of a UTF-8 text file.') from None
  if not (builder.data_path / 'dataset_info.json').exists():
    raise ValueError(f'data.load: {name!r} is not in data_dir {str(root)!r}, where there is '
                     f'{errors.some(there) or "nothing"}; name the directory where it is, or {_remedy(name, root)}')
  return builder


def _remedy(name: str, root: pathlib.Path) -> str:
  return ('prepare it with TensorFlow on a machine with a network: '
          f'tfds build {name} --data_dir {root} --file_format array_record')
