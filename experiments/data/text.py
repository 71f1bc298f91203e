"""Reads text as bytes: the three splits of a file or of a TFDS set, in windows for a language model.

    splits = file_splits(pathlib.Path('book.txt'), valid_fraction=0.1)
    data = text_batches('book.txt', splits, BatchPart(32, slice(None)), seed=3, length=128)
    data.train[0]['labels']  # int32[32, 128], the byte after each byte of `inputs`
"""

import functools
import pathlib
from typing import NamedTuple

import grain
import numpy as np
import tensorflow_datasets as tfds

from experiments.data.batches import Batch, Data, from_datasets, refuse_too_large
from experiments.data.order import BatchPart, SequentialOrder, ShuffledOrder, philox

BYTES = 256  # the size of the vocabulary
LENGTH = 128  # bytes of a window if `sequence_length` is not given


class TextSplits(NamedTuple):
  """A `TextSplits` holds the bytes of each split, `uint8[...]`."""

  train: np.ndarray
  valid: np.ndarray
  test: np.ndarray


def text_batches(name: str, splits: TextSplits, part: BatchPart, seed: int, length: int) -> Data:
  """Returns the batches of windows of `length` bytes. Raises `ValueError` if a split is too short."""
  for split, text in splits._asdict().items():
    if len(text) < (needed := 2 * length if split == 'train' else 2):
      raise ValueError(f'data.load: {name!r} has {len(text)} bytes of {split} text, and a sequence length of {length} '
                       f'needs {needed}; use a longer text or shorter sequences.')
  refuse_too_large(part, 8 * (length + 1))  # a window is cut as int32, and split in two
  # There is one window less than fits, so that an epoch can start at any byte of the first window.
  order = ShuffledOrder((len(splits.train) - length) // length, part, seed)
  train = grain.MapDataset.source(order).map(functools.partial(_training_windows, splits.train, length, seed))
  valid, test = (grain.MapDataset.source(SequentialOrder(-(-(len(text) - 1) // length), part))
                 .map(functools.partial(_evaluation_windows, text, length)) for text in (splits.valid, splits.test))
  return from_datasets(train, valid, test, BYTES, part.batch_size)


def _training_windows(text: np.ndarray, length: int, seed: int, positions: Batch) -> Batch:
  """Returns adjacent windows. Each epoch starts at another byte, so that the text is cut at other positions."""
  epochs, inverse = np.unique(positions['epoch'], return_inverse=True)
  offsets = np.array([_offset(seed, int(epoch), length) for epoch in epochs])[inverse]
  windows = text[(offsets + positions['index'] * length)[:, None] + np.arange(length + 1)].astype(np.int32)
  return {'inputs': windows[:, :-1], 'labels': windows[:, 1:]}


def _offset(seed: int, epoch: int, length: int) -> int:
  return int(philox(seed, epoch).jumped().random_raw() % length)  # The jump avoids the bits that `permutation` uses.


def _evaluation_windows(text: np.ndarray, length: int, positions: Batch) -> Batch:
  """Returns adjacent windows from the first byte on. Every byte but the first is a label with weight 1 once."""
  places = positions['index'][:, None] * length + np.arange(length)
  inside = np.minimum(places, len(text) - 2)
  weight = positions['weight'][:, None] * (places == inside).astype(np.float32)
  return {'inputs': text[inside].astype(np.int32), 'labels': text[inside + 1].astype(np.int32), 'weight': weight}


class Reaching:
  """A `Reaching` holds windows of text whose middle is left out, so that short windows reach over many positions.

  Row i has `inputs`, `int32[length, 2]`, each byte and its position, and `labels`, `int32[length]`, the bytes that
  follow. The position jumps once, in the middle half, by 0 to `reach - length`, and so does the text. A passage of at
  least `passage` bytes before the jump stands again behind it. A model that is trained on such windows knows distances
  up to `reach`, at the cost of short windows. A row is a function of `seed` and i alone.
  Reference: Zhu et al. 2023, PoSE, arXiv 2309.10400, with two chunks; the paper does not repeat passages.
  Raises `ValueError` for windows that the text, the reach or the passage leaves no room for.
  """

  def __init__(self, content: bytes, length: int, reach: int, seed: int, passage: int = 16):
    if not 4 * passage <= length <= reach < len(content):
      raise ValueError(f'data: windows of {length} bytes need passages of at most a quarter ({passage}), a reach '
                       f'({reach}) that is not shorter, and a text ({len(content)} bytes) that is longer than that.')
    self._text = np.frombuffer(content, np.uint8).astype(np.int32)
    self._length, self._reach, self._seed, self._passage = length, reach, seed, passage

  def __len__(self) -> int:
    return len(self._text) // self._length

  def __getitem__(self, row: int) -> Batch:
    if not 0 <= row < len(self):
      raise IndexError(f'data: no window {row}; there are {len(self)}.')
    draw, length, least = np.random.default_rng((self._seed, row)).integers, self._length, self._passage
    jump, first = draw(self._reach - length + 1), draw(length // 4, length + 2 - length // 4)
    places = np.arange(length + 1) + jump * (np.arange(length + 1) >= first)
    tokens = self._text[draw(len(self._text) - self._reach) + places]
    most = min(first, length + 1 - first)
    count = draw(max(least, most // 2), most + 1)
    begin, again = draw(first - count + 1), draw(first, length + 2 - count)
    tokens[again:again + count] = tokens[begin:begin + count]
    return {'inputs': np.stack([tokens[:-1], places[:-1]], 1).astype(np.int32), 'labels': tokens[1:]}


# Splits.


def builder_splits(builder: tfds.core.DatasetBuilder) -> TextSplits:
  """Returns the joined texts of the splits `train`, `validation` and `test` of a TFDS set."""
  sources = (builder.as_data_source(split=split) for split in ('train', 'validation', 'test'))
  return TextSplits(*(np.frombuffer(b''.join(example['text'] for example in source), np.uint8) for source in sources))


def file_splits(path: pathlib.Path, valid_fraction: float) -> TextSplits:
  """Returns the bytes of a UTF-8 file, cut between characters.

  Half of the last `valid_fraction` is `valid`, the other half `test`, and all before is `train`. Raises `ValueError`
  for a file that cannot be read, and for a file that is not UTF-8.
  """
  text = np.frombuffer(utf8(path, 'Give the path of another file as data.name.'), np.uint8)
  cuts = [_next_character(text, round(len(text) * (1 - part))) for part in (valid_fraction, valid_fraction / 2)]
  return TextSplits(*np.split(text, cuts))


def utf8(path: pathlib.Path, remedy: str) -> bytes:
  """Returns the bytes of a UTF-8 file. Raises `ValueError` for another encoding, and, with `remedy`, without a file."""
  try:
    content = path.read_bytes()
    content.decode('utf-8')
  except OSError as error:
    raise ValueError(f'data.load: cannot read the text file {str(path)!r}: {error.strerror}. {remedy}') from error
  except UnicodeDecodeError as error:
    raise ValueError(f'data.load: {str(path)!r} is not UTF-8 text: byte {error.start} is not; '
                     'convert it first.') from error
  return content


def _next_character(text: np.ndarray, position: int) -> int:
  while position < len(text) and text[position] & 0xC0 == 0x80:  # a UTF-8 continuation byte
    position += 1
  return position
