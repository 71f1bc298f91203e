"""Builds the batches of image sets: the splits in TFDS, readers that decode each image once, and preparation.

    splits = image_splits('digits', builder, valid_fraction=0.1)
    read, rows = splits.valid
    read(rows[:2])['inputs']  # uint8[2, 8, 8, 1]
"""

import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
import tensorflow_datasets as tfds

from experiments.data.batches import Batch, Data, Reader, from_datasets, ordered
from experiments.data.order import BatchPart
from sparsejax import errors

IN_MEMORY = 2**30  # bytes; a split up to this size is decoded once, and a larger split at each access
STATISTICS = 10_000  # images that the standardisation constants are computed from


class ImageSplits(NamedTuple):
  """An `ImageSplits` holds a reader and the rows for each split; training and validation may share a reader.

  A reader maps rows to `{'inputs': uint8[B, H, W, C], 'labels': int32[B]}`.
  """

  train: tuple[Reader, np.ndarray]
  valid: tuple[Reader, np.ndarray]
  test: tuple[Reader, np.ndarray]
  num_classes: int


Preparation = Callable[[ImageSplits], tuple[Callable[[Batch], Batch], int]]  # -> what maps a batch, number of outputs


def image_batches(splits: ImageSplits, part: BatchPart, seed: int, augment: bool, task: str) -> Data:
  """Returns the batches of images, prepared for `task` as `PREPARATIONS` says; `augment` shifts training images."""
  prepare, outputs = PREPARATIONS[task](splits)
  train, valid, test = ordered((splits.train, splits.valid, splits.test), part, seed)
  if augment:
    train = train.seed(seed).random_map(functools.partial(_shifted, part))
  return from_datasets(*(dataset.map(prepare) for dataset in (train, valid, test)), outputs, part.batch_size)


# Splits and readers.


def image_splits(name: str, builder: tfds.core.DatasetBuilder, valid_fraction: float) -> ImageSplits:
  """Returns the splits of a TFDS set of 8-bit images with classes.

  If the set has no split `validation`, `valid` is `valid_fraction` of the training split. Raises `ValueError` for
  another kind of set, and for a set without a training or a test split.
  """
  image, label = builder.info.supervised_keys or ('image', 'label')
  features, splits = builder.info.features, builder.info.splits
  kinds = {image: tfds.features.Image, label: tfds.features.ClassLabel}
  fits = all(key in features and isinstance(features[key], kind) for key, kind in kinds.items())
  if not fits or None in features[image].shape or features[image].np_dtype != np.uint8:
    raise ValueError(f'data.load: {name!r} is no set of 8-bit images of one shape with a class each, and no text; '
                     f'its features are {dict(features)}.')
  if missing := {'train', 'test'} - set(splits):
    raise ValueError(f'data.load: {name!r} has no split {errors.some(sorted(missing))}, only {errors.some(splits)}.')
  read = {split: (_reader(builder, split, image, label), np.arange(splits[split].num_examples))
          for split in ('train', 'validation', 'test') if split in splits}
  if 'validation' not in splits:
    reader, rows = read['train']
    read['train'], read['validation'] = ((reader, part) for part in held_out(len(rows), valid_fraction))
  return ImageSplits(read['train'], read['validation'], read['test'], features[label].num_classes)


def held_out(count: int, fraction: float) -> tuple[np.ndarray, np.ndarray]:
  """Returns the rows for training and for validation: `fraction` of `count` rows, evenly spaced, are for validation.

  Even spacing is a random sample, because TFDS stores examples in pseudo-random order.
  """
  valid = np.diff(np.floor(np.arange(count + 1) * fraction)) > 0
  return np.flatnonzero(~valid), np.flatnonzero(valid)


_READERS = weakref.WeakValueDictionary()  # (directory, split) -> Reader: sets for several seeds share the images


def _reader(builder: tfds.core.DatasetBuilder, split: str, image: str, label: str) -> Reader:
  """Returns the reader of a split. Each image is decoded once if the split fits `IN_MEMORY`, else at each access."""
  source = builder.as_data_source(split=split)

  def read(rows: np.ndarray) -> Batch:
    examples = source.__getitems__([int(row) for row in rows])
    return {'inputs': np.stack([example[image] for example in examples]),
            'labels': np.array([example[label] for example in examples], np.int32)}

  if len(source) * np.prod(builder.info.features[image].shape) > IN_MEMORY:
    return read
  key = (str(builder.data_path), split)
  if (reader := _READERS.get(key)) is None:
    _READERS[key] = reader = _with_memory(read, len(source))
  return reader


def _with_memory(read: Reader, count: int) -> Reader:
  """Returns a reader of the same `count` rows that calls `read` once for each row, for at most 1000 rows at a time."""
  known, whole = np.zeros(count, bool), {}

  def remember(rows: np.ndarray) -> Batch:
    new = np.unique(rows[~known[rows]])
    for chunk in np.split(new, range(1000, len(new), 1000)) if len(new) else ():
      for key, value in read(chunk).items():
        whole.setdefault(key, np.empty((count, *value.shape[1:]), value.dtype))[chunk] = value
      known[chunk] = True
    return {key: value[rows] for key, value in whole.items()}

  return remember


# Preparation of each batch.


def _sample(read: Reader, rows: np.ndarray) -> Iterator[np.ndarray]:
  """Returns chunks of at most `STATISTICS` of the images, evenly spaced; a chunk has at most 1000 images."""
  rows = rows[np.linspace(0, len(rows) - 1, min(len(rows), STATISTICS)).astype(int)]
  return (read(rows[start:start + 1000])['inputs'] for start in range(0, len(rows), 1000))


def standardisation(splits: ImageSplits) -> tuple[Callable[[Batch], Batch], int]:
  """Returns a function that standardises `inputs` per channel, and the number of classes.

  The function subtracts the mean of each channel and divides by the standard deviation of the channel. The mean and the
  deviation come from a sample of at most `STATISTICS` training images. A constant channel is divided by 1.
  """
  sums, squares, count = 0, 0, 0
  for images in _sample(*splits.train):
    shape, pixels = images.shape[1:], images.reshape(-1, images.shape[-1]).astype(np.int64)  # exact in any order
    sums, squares, count = sums + pixels.sum(0), squares + (pixels**2).sum(0), count + len(pixels)
  mean = sums / count
  deviation = np.sqrt(squares / count - mean**2)
  deviation[deviation == 0] = 1
  # The constants have the shape of an image: NumPy broadcasts over a last axis of three channels eight times slower.
  scale = np.broadcast_to(1 / deviation, shape).astype(np.float32)
  mean = np.broadcast_to(mean, shape).astype(np.float32)
  return lambda batch: {**batch, 'inputs': (batch['inputs'] - mean) * scale}, splits.num_classes


def halving(splits: ImageSplits) -> tuple[Callable[[Batch], Batch], int]:
  """Returns a function that makes images the labels and halved images the inputs, and the number of channels.

  Labels are images in [0, 1], divided by the largest value in a sample of the training images (16 in `digits`). Inputs
  are the labels at half the height and width. Raises `ValueError` for an odd height or width.
  """
  largest = max(int(images.max()) for images in _sample(*splits.train))
  *_, height, width, channels = next(_sample(*splits.train)).shape
  if height % 2 or width % 2:
    raise ValueError(f'data.load: images of {height} x {width} have no half; super_resolution needs even sizes.')
  down, across = (np.asarray(jax.image.resize(np.eye(size, dtype=np.float32), (size // 2, size), 'bicubic'))
                  for size in (height, width))

  def prepare(batch: Batch) -> Batch:
    images = batch['inputs'].astype(np.float32) / max(largest, 1)
    # Two matrix products for each image and channel, so that the result does not depend on the rest of the batch.
    half = down @ images.transpose(0, 3, 1, 2) @ across.T
    return {**batch, 'inputs': np.ascontiguousarray(half.transpose(0, 2, 3, 1)), 'labels': images}

  return prepare, channels


PREPARATIONS: Mapping[str, Preparation] = {'classification': standardisation, 'super_resolution': halving}  # by task


def _shifted(part: BatchPart, batch: Batch, rng: np.random.Generator) -> Batch:
  """Returns the batch with each image moved by up to an eighth of its height in both directions and filled with 0."""
  count, height, width, channels = batch['inputs'].shape
  most = max(1, height // 8)
  padded = np.pad(batch['inputs'], ((0, 0), (most, most), (most, most), (0, 0)))
  windows = np.lib.stride_tricks.sliding_window_view(padded, (height, width, channels), axis=(1, 2, 3))
  # Numbers are drawn for the whole batch, so that each part of a batch gets the same shifts as without parts.
  down, right = rng.integers(0, 2 * most + 1, (2, part.batch_size))[:, part.rows]
  return {**batch, 'inputs': windows[np.arange(count), down, right, 0]}
