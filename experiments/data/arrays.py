"""Takes in data of the user's own: NumPy arrays, or sources with random access such as those of TFDS and grain.

    config.data = {'train': (images, labels), 'test': (others, their_labels)}
    config.data = lambda: {split: builder.as_data_source(split=split) for split in ('train', 'test')}

A split without `valid` holds out a part of `train`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from experiments.data import images
from experiments.data.batches import Batch, Data, Reader, from_datasets, ordered
from experiments.data.order import BatchPart
from sparsejax import errors

FORM = ('a pair (inputs, labels) of arrays, a dict {"inputs": ..., "labels": ...} of arrays, or a source of dicts with '
        '"inputs" and "labels", or "image" and "label"')
PAIRS = (('inputs', 'labels'), ('image', 'label'))
SPLITS = ('train', 'valid', 'validation', 'test')


def own_batches(splits: Any, part: BatchPart, seed: int, valid_fraction: float, num_classes: int | None) -> Data:
  """Returns the batches of `splits`, as `own_splits` reads them.

  `num_classes` is the largest label plus one if not given. Raises `ValueError` as `own_splits` does.
  """
  read = own_splits(splits, valid_fraction)
  least, classes = (0, num_classes) if num_classes else _classes(*read['train'])
  sets = ordered((read['train'], read['valid'], read['test']), part, seed)
  return from_datasets(*sets, classes, part.batch_size)._replace(least=least)


def own_splits(splits: Any, valid_fraction: float) -> dict[str, tuple[Reader, np.ndarray]]:
  """Returns a reader and the rows for `train`, `valid` and `test` of `splits`, a mapping or a function that returns it.

  Floating arrays become `float32` and integers `int32`; images of bytes, `uint8[N, H, W, C]`, become `float32` in
  [0, 1]. Without `valid`, `valid_fraction` of `train` is held out, evenly spaced; `validation` is another name of
  `valid`. Raises `ValueError` for another form of data.
  """
  splits = splits() if callable(splits) else splits
  if not isinstance(splits, Mapping) or not {'train', 'test'} <= set(splits):
    raise ValueError('data.load: own data are a mapping with the splits "train" and "test", each of them '
                     f'{FORM}; not {_kind(splits)}.')
  for name in splits:
    if name not in SPLITS:
      raise errors.unknown('data.load', 'split of own data', name, SPLITS)
  read = {name: _split(name, split) for name, split in splits.items()}
  valid = read.get('valid', read.get('validation'))
  if valid is None:
    reader, rows = read['train']
    read['train'], valid = ((reader, half) for half in images.held_out(len(rows), valid_fraction))
  return {**read, 'valid': valid}


def _split(name: str, split: Any) -> tuple[Reader, np.ndarray]:
  """Returns a reader and the rows of one split."""
  if isinstance(split, tuple | list) and len(split) == 2:
    split = dict(zip(PAIRS[0], split))
  if isinstance(split, Mapping):
    arrays = _pair(name, split)
    arrays = tuple(_array(name, each) for each in arrays)
    if (sizes := {*map(len, arrays)}) and len(sizes) > 1:
      raise ValueError(f'data.load: inputs and labels of {name!r} have {" and ".join(map(str, sorted(sizes)))} rows; '
                       'give as many labels as inputs.')
    inputs, labels = arrays
    count, reader = len(inputs), lambda rows: _prepared(inputs[rows], labels[rows])
  elif hasattr(split, '__getitem__') and hasattr(split, '__len__'):
    count, reader = len(split), lambda rows: _prepared(*(_array(name, np.stack(values)) for values in zip(
        *(_pair(name, split[int(row)]) for row in rows))))
  else:
    raise ValueError(f'data.load: the split {name!r} is {_kind(split)}; give {FORM}.')
  if not count:
    raise ValueError(f'data.load: the split {name!r} is empty; give at least one example.')
  reader(np.arange(1))  # A wrong form is refused before the training, and not where the split is read.
  return reader, np.arange(count)


def _pair(name: str, values: Any) -> tuple[Any, Any]:
  """Returns inputs and labels of a mapping, by whichever of the names in `PAIRS` the mapping has."""
  for pair in PAIRS:
    if isinstance(values, Mapping) and all(key in values for key in pair):
      return values[pair[0]], values[pair[1]]
  raise ValueError(f'data.load: the split {name!r} holds {_kind(values)}; give {FORM}.')


def _array(name: str, values: Any) -> np.ndarray:
  """Returns values as an array. Raises `ValueError` for rows of different shapes, and for what is no real number."""
  try:
    array = np.asarray(values)
  except ValueError as error:
    raise ValueError(f'data.load: the split {name!r} holds rows of different shapes ({error}); pad them.') from error
  real = array.dtype == bool or np.issubdtype(array.dtype, np.integer) or np.issubdtype(array.dtype, np.floating)
  if not real or not array.ndim:
    raise ValueError(f'data.load: the split {name!r} holds {array.dtype}{[*array.shape]}; give real numbers, in an '
                     'array with an axis of examples.')
  if np.issubdtype(array.dtype, np.integer) and array.size and not -2**31 <= array.min() <= array.max() < 2**31:
    raise ValueError(f'data.load: the split {name!r} holds whole numbers from {array.min()} to {array.max()}, which 32 '
                     'bits do not hold; give smaller or floating numbers.')
  return array


def _prepared(inputs: np.ndarray, labels: np.ndarray) -> Batch:
  if inputs.dtype == np.uint8 and inputs.ndim == 4:
    inputs = inputs.astype(np.float32) / 255
  return {'inputs': _narrow(inputs), 'labels': _narrow(labels)}


def _narrow(array: np.ndarray) -> np.ndarray:
  return array.astype(np.float32 if np.issubdtype(array.dtype, np.floating) else np.int32)


def _classes(read: Callable[[np.ndarray], Batch], rows: np.ndarray) -> tuple[int, int]:
  """Returns the smallest label, and the largest plus one, or 0 and the last axis' size of labels that are no integers.
  """
  chunks = (read(rows[start:start + 1000])['labels'] for start in range(0, len(rows), 1000))
  first = next(chunks)
  if np.issubdtype(first.dtype, np.floating):
    return 0, first.shape[-1] if first.ndim > 1 else 1
  ends = [(int(labels.min()), int(labels.max())) for labels in (first, *chunks)]
  return min(low for low, _ in ends), max(0, *(high for _, high in ends)) + 1


def _kind(value: Any) -> str:
  return f'a mapping of {errors.some(list(value))}' if isinstance(value, Mapping) else f'a {type(value).__name__}'
