"""Assigns examples to batches: in shuffled order without end for training, in sequential order for evaluation.

    part = BatchPart(batch_size=64, rows=slice(0, 32))  # the rows of the first of two processes
    ShuffledOrder(1294, part, seed=3)[1000]['index']    # int64[32]
    SequentialOrder(143, part)[2]['weight']             # float32[32]
"""

import functools
import sys
from typing import NamedTuple

import numpy as np


class BatchPart(NamedTuple):
  """A `BatchPart` says which rows of each batch this process reads, out of `batch_size` rows."""

  batch_size: int
  rows: slice

  def positions(self, step: int) -> np.ndarray:
    """Returns the positions of batch `step` in the sequence of all examples, `int64[B]`, for the rows of this part."""
    return step * self.batch_size + np.arange(self.batch_size)[self.rows]


def philox(seed: int, epoch: int) -> np.random.Philox:
  """Returns the generator of an epoch's random bits. NumPy promises never to change the raw bits of Philox."""
  return np.random.Philox(key=np.array([seed, epoch], np.uint64))


def permutation(seed: int, count: int, epoch: int) -> np.ndarray:
  """Returns the order of one epoch: a permutation of `range(count)`, `int64[count]`, from raw bits of Philox."""
  return np.argsort(philox(seed, epoch).random_raw(count), kind='stable')


class ShuffledOrder:
  """A `ShuffledOrder` is a grain source of training positions, `{'index', 'epoch'}` with `int64[B]` each, without end.

  Each epoch contains each index below `count` once, in a permutation of its own. Batches may cross the end of an epoch.

  `MapDataset.shuffle` is not used, because it walks a cipher of at least 16 bits until the result is in the range. For
  1,437 examples it takes 20 us an index on a 2-core CPU. A batch of 128 then takes 3 ms, against 0.05 ms here.
  """

  def __init__(self, count: int, part: BatchPart, seed: int):
    self._count, self._part = count, part
    self._permutation = functools.lru_cache(maxsize=2)(functools.partial(permutation, seed, count))

  def __len__(self) -> int:
    return sys.maxsize // self._part.batch_size

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    epochs, places = np.divmod(self._part.positions(step), self._count)
    index = [self._permutation(epoch)[places[epochs == epoch]] for epoch in range(int(epochs[0]), int(epochs[-1]) + 1)]
    return {'index': np.concatenate(index), 'epoch': epochs}


class SequentialOrder:
  """A `SequentialOrder` is a grain source of evaluation positions, `{'index', 'weight'}`, with each index once.

  `weight`, `float32[B]`, is 1 for an example and 0 for the padding of the last batch, which repeats the last index.
  """

  def __init__(self, count: int, part: BatchPart):
    self._count, self._part = count, part

  def __len__(self) -> int:
    return -(-self._count // self._part.batch_size)

  def __getitem__(self, step: int) -> dict[str, np.ndarray]:
    positions = self._part.positions(step)
    return {'index': np.minimum(positions, self._count - 1), 'weight': (positions < self._count).astype(np.float32)}
