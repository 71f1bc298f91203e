"""Writes selection out in numpy with sorts, for the tests to compare with: slow, obvious, and without JAX."""

import numpy as np


def best(scores, n):
  """Returns the mask of the `n` largest along the last axis: NaN last, -0.0 equal to 0.0, ties from the lower index."""
  s = np.asarray(scores, np.float64)
  s = np.where(s == 0, 0.0, s)
  missing = np.isnan(s)
  place = np.broadcast_to(np.arange(s.shape[-1]), s.shape)
  order = np.lexsort((place, -np.where(missing, 0.0, s), missing), axis=-1)  # the last key is the first to count
  mask = np.zeros(s.shape, bool)
  np.put_along_axis(mask, order[..., :n], True, -1)
  return mask


def n_of_m(scores, n, m, contracted):
  """Returns the mask of the `n` largest of every `m` neighbours of a row, along `contracted` in its order."""
  s = np.asarray(scores, np.float64)
  last = tuple(range(s.ndim - len(contracted), s.ndim))
  moved = np.moveaxis(s, contracted, last)
  mask = best(moved.reshape(-1, m), n)
  return np.moveaxis(mask.reshape(moved.shape), last, contracted)


def vectors_of_m(scores, n, m, width, axes):
  """Returns the mask of the `n` of every `m` neighbours with the largest sums over `width` outputs."""
  s = np.asarray(scores, np.float64)
  along = (*axes.contracted, *axes.output)
  order = [*(a for a in range(s.ndim) if a not in along), *along]
  length = int(np.prod([s.shape[a] for a in axes.output], dtype=int))
  moved = np.transpose(s, order)
  vectors = moved.reshape(-1, m, length // width, width)
  with np.errstate(invalid='ignore'):
    mask = np.moveaxis(best(np.moveaxis(vectors.sum(-1), 1, -1), n), -1, 1)
  return np.transpose(np.broadcast_to(mask[..., None], vectors.shape).reshape(moved.shape), np.argsort(order))


def channels(scores, kept, axes):
  """Returns the mask of the `kept` output channels with the largest sums, in each layer."""
  s = np.asarray(scores, np.float64)
  order = (*axes.layer, *sorted(axes.output), *axes.contracted, *axes.spatial)
  moved = np.transpose(s, order)
  layers = int(np.prod([s.shape[a] for a in axes.layer], dtype=int))
  count = int(np.prod([s.shape[a] for a in axes.output], dtype=int))
  with np.errstate(invalid='ignore'):
    mask = best(moved.reshape(layers, count, -1).sum(-1), kept)
  whole = np.broadcast_to(mask[..., None], (layers, count, s.size // (layers * count))).reshape(moved.shape)
  return np.transpose(whole, np.argsort(order))


def blocks(scores, kept, shape, axes):
  """Returns the mask of the `kept` blocks of `shape`, contraction first, with the largest sums in each layer."""
  if axes.layer:
    layer, *others = axes.layer
    drop = lambda group: tuple(a - (a > layer) for a in group)
    inside = axes._replace(contracted=drop(axes.contracted), output=drop(axes.output), spatial=drop(axes.spatial),
                           layer=drop(others))
    parts = np.moveaxis(np.asarray(scores), layer, 0)
    return np.stack([blocks(part, kept, shape, inside) for part in parts], layer)
  s = np.asarray(scores, np.float64)
  index = np.indices(s.shape)
  along = [np.zeros(s.shape, int) for _ in range(3)]  # taps, contraction, output: each as one axis
  rest = [a for a in range(s.ndim) if a not in (*axes.contracted, *axes.output)]
  for i, group in enumerate((rest, axes.contracted, axes.output)):
    for a in group:
      along[i] = along[i] * s.shape[a] + index[a]
  lengths = [int(place.max()) + 1 for place in along]
  across = lengths[2] // shape[1]
  number = (along[0] * (lengths[1] // shape[0]) + along[1] // shape[0]) * across + along[2] // shape[1]
  sums = np.zeros(s.size // (shape[0] * shape[1]))
  with np.errstate(invalid='ignore'):
    np.add.at(sums, number, s)
  return best(sums, kept)[number]
