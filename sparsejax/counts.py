"""Turns the sparsity that is asked into the count that a pattern is told, and a count into the best units of a leaf.

    counts.kept_of(0.9, 1000)                                            # 100
    counts.count_of(Block((4, 4)), 0.5, (16, 16), axes)                  # 8 of 16 blocks
    select = counts.Selector(Unstructured(), 100, axes); select(scores)  # the mask of the 100 largest
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import ranking
from sparsejax.types import Array, Axes, Pattern, hashes

MATRIX = Axes((0,), (1,))  # the axes of a matrix `[in, out]`


def kept_of(sparsity: Any, size: int, progress: Any = None) -> Any:
  """Returns how many of `size` units are kept: all but `sparsity * size`, rounded half to even.

  A number as `sparsity` gives a Python int. A traced `sparsity` is a `float32` and gives a `ranking.Count`; above 2^24
  units the product may be off by up to `size / 2^23`. All units are kept at 0 and none at 1. With `progress`, traced or
  not, `progress * round(sparsity * size)` units are pruned, and exactly `round(sparsity * size)` from 1 on.
  """
  if sparsity is None:
    raise ValueError('patterns: how many weights are kept? Give a sparsity, as in Unstructured(0.9).')
  if progress is not None:
    return Rising.of(sparsity, size)(progress)
  if isinstance(sparsity, (int, float, np.floating, np.integer)):
    return size - round(float(sparsity) * size)
  fraction = jnp.asarray(sparsity, jnp.float32)
  return ranking.Count(*(jnp.where(fraction < 1, word, 0) for word in _all_but(size, fraction * np.float32(size))))


def _all_but(size: Any, pruned: Array) -> ranking.Count:
  return ranking.minus(ranking.count(size), ranking.count(jnp.round(pruned)))


class Rising(NamedTuple):
  """A `Rising` is the count of a sparsity that rises: `Rising.of(0.9, 1000)(progress)` of 1000 units are kept.

  `pruned`: how many units are pruned at the end, as `float32`. `size`, `last`: how many units there are, and are kept
  at the end. All are numbers, so that leaves of several sizes compute their counts by one program.
  """

  pruned: Any
  size: ranking.Count
  last: ranking.Count

  @classmethod
  def of(cls, sparsity: float, size: int) -> 'Rising':
    pruned = round(sparsity * size)
    return cls(np.float32(pruned), ranking.count(size), ranking.count(size - pruned))

  def __call__(self, progress: Any) -> ranking.Count:
    progress = jnp.asarray(progress, jnp.float32)
    pruned = progress * self.pruned
    kept = _all_but(self.size, pruned)
    return ranking.Count(*(jnp.where(pruned < self.pruned, word, last) for word, last in zip(kept, self.last)))


def fewer(kept: ranking.Count, drop: Any) -> ranking.Count:
  """Returns `kept - floor(drop * kept)`; the product is in `float32`."""
  whole = jnp.asarray(kept.high, jnp.float32) * 2.0**31 + jnp.asarray(kept.low, jnp.float32)
  return ranking.minus(kept, ranking.count(jnp.floor(jnp.asarray(drop, jnp.float32) * whole)))


def checked(function: str, count: Any) -> Any:
  """Returns `count`. Raises `ValueError` for a Python float, which is a sparsity given in the place of a count."""
  if isinstance(count, (float, np.floating)):
    raise ValueError(f'{function}: a count is a whole number of units, not {count!r}. Give the sparsity to the '
                     'pattern, as in Unstructured(0.9), or turn it into a count with counts.kept_of.')
  return count


class Selector(NamedTuple):
  """A `Selector` is a pattern with its count and axes filled in. An update calls it as `select(scores, drop=None)`.

  `drop` is a fraction of the count, rounded down, by which fewer units are kept.
  """

  pattern: Pattern
  count: Any
  axes: Axes

  def __call__(self, scores: Array, drop: Any = None) -> Array:
    if drop is None:
      return self.pattern(scores, self.count, self.axes)
    return survivors(self.pattern, scores, self.count, self.axes, drop)


def survivors(pattern: Pattern, scores: Array, count: Any, axes: Axes, drop: Any) -> Array:
  """Returns the mask of what survives when the fraction `drop` of the count, rounded down, is dropped."""
  if own := getattr(pattern, 'survivors', None):
    return own(scores, count, axes, drop)
  count = count_of(pattern, pattern.sparsity, scores.shape, axes) if count is None else count
  return pattern(scores, fewer(ranking.count(count), drop), axes)


def units(pattern: Pattern, shape: tuple[int, ...], axes: Axes | None) -> tuple[int, int]:
  """Returns how many units a count of the pattern is out of, and how many weights a unit has.

  The units are those of one layer of the leaf; of N:M, the `m` vectors of `width` weights of one group.
  """
  pooled, layers = _pooled(pattern, shape, axes)
  return (math.prod(n for a, n in enumerate(pooled) if a not in layers),
          math.prod(shape) // max(math.prod(pooled), 1))


def competes(pattern: Pattern, shape: tuple[int, ...], axes: Axes) -> bool:
  """Returns whether the leaf can be ranked together with others: its units compete in a whole layer, not in groups."""
  return len(_pooled(pattern, shape, axes)[1]) == len(axes.layer)


def _pooled(pattern: Pattern, shape: tuple[int, ...], axes: Axes | None) -> tuple[tuple[int, ...], tuple[int, ...]]:
  """Returns the shape of the pooled scores of a leaf and their layers, without computing them.

  Leaves of one shape are looked up once. A pattern with a traced number does not hash, nor may a user's.
  """
  return (_pooled_once if hashes(pattern) else _pooled_once.__wrapped__)(pattern, shape, axes)


@functools.lru_cache(maxsize=4096)
def _pooled_once(pattern: Pattern, shape: tuple[int, ...], axes: Axes | None) -> Any:
  layers = []

  def scores(w: Array) -> Array:
    pool = pattern.pooled(w, axes)
    layers.append(pool.layers)
    return pool.scores

  return jax.eval_shape(scores, jax.ShapeDtypeStruct(shape, jnp.float32)).shape, layers[0]


def count_of(pattern: Pattern, sparsity: Any, shape: tuple[int, ...], axes: Axes | None) -> Any:
  """Returns the count that a pattern is told when `sparsity` is asked of a leaf of this shape, see `kept_of`."""
  return kept_of(sparsity, units(pattern, shape, axes)[0])


def best_units(pattern: Pattern, scores: Array, count: Any = None, axes: Axes | None = MATRIX) -> Array:
  """Returns the mask of the `count` units with the largest scores in each layer of a leaf.

  Layers are matrices of their own, however they are stored: a stack of them is as sparse as each of them.
  """
  pooled, layers, whole = pattern.pooled(scores, axes)
  size = math.prod(n for a, n in enumerate(pooled.shape) if a not in layers)
  kept = kept_of(pattern.sparsity, size) if count is None else checked(f'patterns.{pattern}', count)
  if isinstance(kept, ranking.Count) and jnp.ndim(kept.low):  # a count for each layer
    return whole(by_layer(ranking.top_n, layers, [pooled], kept))
  return whole(by_layer(lambda scores: ranking.top_n(scores, kept), layers, [pooled]))


def by_layer(function: Callable[..., Array], layers: tuple[int, ...], arrays: Sequence[Array], *each: Any) -> Array:
  """Returns `function(*arrays, *each)` of each layer by itself; `layers` are the layer axes of arrays and result.

  `each` are pytrees of arrays whose layer axes are the first axes.
  """
  front = tuple(range(len(layers)))
  for _ in layers:
    function = jax.vmap(function)
  return jnp.moveaxis(function(*(jnp.moveaxis(x, layers, front) for x in arrays), *each), front, layers)


def too_many(pattern: Any, w: Array, axes: Axes, sparsity: float | None = None) -> str:
  """Returns in which layer `w` keeps more units than `sparsity` (default: the pattern's own) allows."""
  if why := pattern.validate(w.shape, axes):
    return why
  pool = pattern.pooled((w != 0).astype(jnp.float32), axes)
  units = np.asarray(pool.scores > 0)
  kept = np.sum(units, tuple(a for a in range(units.ndim) if a not in pool.layers)).reshape(-1)
  sparsity = pattern.sparsity if sparsity is None else sparsity
  allowed = kept_of(sparsity or 0, units.size // max(kept.size, 1))
  if not kept.size:  # a stack of no layers
    return ''
  where = f' in layer {kept.argmax()}' if pool.layers else ''
  return f'{kept.max()} {pattern.unit} are kept{where}, {allowed} asked' if kept.max() > allowed else ''
