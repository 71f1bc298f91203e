"""Counts exactly, in whole numbers of two words, so that numbers above 2^31 need no 64-bit integers.

    n = count(10**10)                             # Count(high=4, low=1410065408)
    totals([[scores > 0, scores == 0]])           # how many entries are positive, and how many are zero
    at_least(minus(counted(n, size), total), total)

Numbers of few entries are `int32`, and `plus`, `minus` and `at_least` take both forms: `counted` says which form.
"""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.types import Array

_RUN = 128  # the number of entries of a mask whose sum is one byte; at most 255
_RUNS = 1 << 18  # a mask of fewer entries is summed by one kernel, which compiles faster
_WORD = 31  # bits of the low word of a `Count`; a sum is split into two words before it needs more than 32 bits


class Count(NamedTuple):
  """A `Count` is the number `high * 2^31 + low`, with `int32` words and `0 <= low < 2^31`.

  Counts are exact up to 2^62 without `jax_enable_x64`. `ranking.count(10**10)` makes a `Count`.
  """

  high: Any
  low: Any


def count(n: Any) -> Count:
  """Returns `n` as a `Count`; `n` is an integer of any size, an integer array, a whole `float32` or a `Count`.

  Negative integers become -1, which keeps nothing; integers that are too large for a `Count` become the largest `high`.
  """
  if isinstance(n, Count):
    return n
  if isinstance(n, (int, np.integer)):
    n = max(int(n), -1)  # a negative number keeps nothing, whatever its size
    return Count(np.int32(min(n >> _WORD, 2**31 - 1)), np.int32(n & ((1 << _WORD) - 1)))
  n = jnp.asarray(n)
  if jnp.issubdtype(n.dtype, jnp.floating):
    high = jnp.floor(n * 2.0**-_WORD)
    return Count(high.astype(jnp.int32), (n - high * 2.0**_WORD).astype(jnp.int32))
  n = n.astype(jnp.int32) if n.dtype.itemsize < 4 else n
  return Count((n >> _WORD).astype(jnp.int32), (n & ((1 << _WORD) - 1)).astype(jnp.int32))


def most() -> int:
  """Returns how many entries are counted in one word."""
  return (1 << _WORD) - 1


def counted(n: Count, size: int) -> Any:
  """Returns `n` in the form in which `size` entries are counted: `int32` below 2^31 entries, else a `Count`.

  The `int32` is -1 for a negative `n`, and `size` for an `n` that is larger than an `int32`.
  """
  if size > most():
    return n
  if isinstance(n.high, (int, np.integer)):  # a number that stays known while JAX traces
    return np.int32(-1 if n.high < 0 else size if n.high > 0 else n.low)
  return jnp.where(n.high < 0, np.int32(-1), jnp.where(n.high > 0, np.int32(size), n.low))


def one(like: Any) -> Any:
  """Returns 1 in the form of `like`, an `int32` or a `Count`."""
  return count(1) if isinstance(like, Count) else np.int32(1)


def plus(a: Count, b: Count) -> Count:
  """Returns `a + b`."""
  carried = _words(jnp.add(a.low, b.low))
  return Count(a.high + b.high + carried.high, carried.low)


def minus(a: Any, b: Any) -> Any:
  """Returns `a - b`, of two `int32` or of two `Count`; the `high` of a negative difference is negative."""
  if not isinstance(a, Count):
    return a - b
  low = a.low - b.low
  return Count(a.high - b.high + (low >> _WORD), low & ((1 << _WORD) - 1))


def at_least(a: Any, b: Any) -> Array:
  """Returns whether `a >= b`, of two `int32` or of two `Count`, elementwise."""
  if not isinstance(a, Count):
    return a >= b
  return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def _words(total: Any) -> Count:
  """Returns an `int32` sum as a `Count`; the sign bit of `total` is read as the bit of value 2^31."""
  return Count(lax.shift_right_logical(total, np.int32(_WORD)), total & ((1 << _WORD) - 1))


def totals(masks: Sequence[Sequence[Array]]) -> list[Any]:
  """Returns, for each `i`, the number of `True` entries of `masks[0][i]`, `masks[1][i]`, ... together.

  `masks[j]` holds the masks of leaf `j`, all of the same shape. Numbers have the form of `counted` for all entries.
  """
  limit, number = (2 << _WORD) - 1, len(masks[0])
  found, entries, wide = [count(0)] * number, 0, False
  sums: list[Any] = [np.int32(0)] * number
  for leaf in masks:
    for size, slab in _slabs(leaf[0].shape, limit):
      if entries + size > limit:
        found, sums, entries, wide = [plus(t, _words(s)) for t, s in zip(found, sums)], [np.int32(0)] * number, 0, True
      more = _sums(leaf if slab is None else [mask & slab for mask in leaf])
      sums, entries = [s + m for s, m in zip(sums, more)], entries + size
  return [plus(t, _words(s)) for t, s in zip(found, sums)] if wide or entries > most() else sums


def _slabs(shape: tuple[int, ...], most: int) -> list[tuple[int, Array | None]]:
  """Returns the parts into which a leaf is split so that each part has at most `most` entries.

  A part is its size and its mask; the mask is `None` if one part is the whole leaf. Masks need no communication, but
  slices or a reshape of a sharded leaf would. Raises `ValueError` if an axis or one slice is too long to be counted.
  """
  size = math.prod(shape)
  axis = int(np.argmax(shape)) if shape else 0
  step = most if size <= most else most // (size // shape[axis])
  if shape and (shape[axis] >= 2**31 or not step):
    raise ValueError(f'ranking: an axis or a slice of a leaf of shape {shape} does not fit 32-bit counts; reshape it '
                     'to more axes, each shorter than 2^31.')
  if size <= most:
    return [(size, None)]
  place = along(axis, shape)
  starts = range(0, shape[axis], step)
  return [(step * (size // shape[axis]), (place >= start) & (place - start < step)) for start in starts]


def along(axis: int, shape: tuple[int, ...]) -> Array:
  """Returns `int32` indices 0, 1, 2, ... along `axis` of a leaf of this shape; all other axes have length 1."""
  return lax.broadcasted_iota(jnp.int32, [n if a == axis else 1 for a, n in enumerate(shape)], axis)


def _sums(masks: Sequence[Array]) -> list[Array]:
  """Returns the number of `True` entries of each mask, as `int32[]`."""
  # XLA:CPU compiles one `reduce` of several arrays to a single loop. Sums become a tree of windows, each with a copy of
  # its mask, which takes ten times as long. Between shards, however, sums become all-reduces, and `reduce` a gather.
  if not one_cpu():
    return [jnp.sum(mask, dtype=jnp.int32) for mask in masks]
  masks, size = [mask.reshape(-1) for mask in masks], masks[0].size
  if size >= _RUNS and size % _RUN == 0:  # processors share the runs, and bytes take a quarter of the instructions
    masks = reduced([mask.reshape(-1, _RUN) for mask in masks], 1, np.uint8)
  return reduced(masks, 0, np.int32)


def reduced(arrays: Sequence[Array], axis: int, dtype: Any) -> list[Array]:
  """Returns the sum of each array along `axis`, computed in `dtype`, by one reduction of all of them."""
  return lax.reduce([array.astype(dtype) for array in arrays], [dtype(0)] * len(arrays), _added, (axis,))


def one_cpu() -> bool:
  return jax.default_backend() == 'cpu' and jax.device_count() == 1


def _added(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
  return [x + y for x, y in zip(a, b)]
