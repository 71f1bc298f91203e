"""Defines `Batches`, which reads a batch by its number, and `Data`, the three splits of a data set.

    batches = Batches(in_order(SequentialOrder(143, part), read, rows))
    batches[2]['inputs']  # the third batch, read now
    len(batches)          # 3 for a batch size of 64
"""

import math
import operator
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import grain
import jax
import numpy as np

from experiments.data.order import BatchPart, SequentialOrder, ShuffledOrder

Batch = Mapping[str, np.ndarray]
_OF_POSITIONS = 32  # bytes of an example's place in the order, while a batch is put together
Reader = Callable[[np.ndarray], Batch]  # rows of a split -> their `inputs` and `labels`


class Batches(Sequence):
  """A `Batches` gives each batch as a pure function of its number, in any order and at the same cost."""

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
  """A `Data` holds the training, validation and test batches of one data set.

  `train[step]` has `inputs` and `labels`, for every `step >= 0`. Each epoch contains every example once, in an order
  that depends on the seed and the epoch. `valid` and `test` contain every example once, in a fixed order. A `weight` in
  their batches is 0 where the last batch is padded, and 1 elsewhere.

  `num_classes` is how many numbers a model returns for each label. For text it is the size of the vocabulary, for
  super-resolution the number of channels. `example` is one training batch of the whole batch size, as
  `jax.ShapeDtypeStruct`. `least` is the smallest label of own data; below 0, labels are no classes.
  """

  train: Batches
  valid: Batches
  test: Batches
  num_classes: int
  example: dict[str, jax.ShapeDtypeStruct]
  least: int = 0


def from_datasets(train: grain.MapDataset, valid: grain.MapDataset, test: grain.MapDataset, num_classes: int,
                  batch_size: int) -> Data:
  """Returns the `Data` of three grain data sets. The first training batch gives the shapes of `example`."""
  example = {key: jax.ShapeDtypeStruct((batch_size, *value.shape[1:]), value.dtype) for key, value in train[0].items()}
  return Data(Batches(train), Batches(valid), Batches(test), num_classes, example)


def ordered(splits: Sequence[tuple[Reader, np.ndarray]], part: BatchPart, seed: int) -> list[grain.MapDataset]:
  """Returns the data set of each split, a reader and its rows: the first split without end, shuffled by `seed`.

  The other splits are read in order, and their batches have a `weight`. Raises `ValueError` for a batch that the memory
  cannot hold.
  """
  (read, rows), *others = splits
  refuse_too_large(part, sum(array.nbytes for array in read(rows[:1]).values()))
  return [in_order(ShuffledOrder(len(rows), part, seed), read, rows),
          *(in_order(SequentialOrder(len(rows), part), read, rows) for read, rows in others)]


def refuse_too_large(part: BatchPart, of_example: int) -> None:
  """Raises `ValueError` if a batch of examples of `of_example` bytes each is larger than the free memory."""
  rows = len(range(*part.rows.indices(part.batch_size)))
  needed, free = rows * (of_example + _OF_POSITIONS), host_memory()
  if needed > free:
    raise ValueError(f'data.load: a batch of batch_size={part.batch_size} takes {needed:,} bytes, of which {rows:,} '
                     f'examples are read here, and {free:,} are free; give a smaller batch.')


def host_memory() -> int:
  """Returns the bytes of memory that are available on this machine."""
  pages = ('SC_AVPHYS_PAGES', 'SC_PAGE_SIZE')
  try:
    lines = pathlib.Path('/proc/meminfo').read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith('MemAvailable'))
  except (OSError, StopIteration):  # Not Linux.
    return math.prod(map(os.sysconf, pages)) if set(pages) <= set(os.sysconf_names) else sys.maxsize


def in_order(order: ShuffledOrder | SequentialOrder, read: Reader, rows: np.ndarray) -> grain.MapDataset:
  """Returns the data set of the batches `read(rows[index])` for each `index` of `order`, with its `weight` if any."""
  def batch(positions: Batch) -> Batch:
    weight = {'weight': positions['weight']} if 'weight' in positions else {}
    return {**read(rows[positions['index']]), **weight}
  return grain.MapDataset.source(order).map(batch)
