"""Selects an exact number of the largest scores: the only module that decides about ties, NaN and rounding.

Every function keeps exactly the number of entries that its argument `n` gives. Among equal scores the entry of lower
index is kept first, in row-major order within the group or the leaf. -0.0 equals 0.0. NaN ranks below every number,
-inf included.

    ranking.top_n_in_groups(scores, 2, 4, axis=0)            # 2:4 along axis 0
    ranking.top_n(scores, ranking.count(scores.size // 10))  # 10 % of a leaf
    ranking.top_n_of_leaves([a, b], 1000)                    # 1000 of two leaves together

No function sorts. In a small group each entry counts the entries that precede it. In large groups, and in whole leaves,
bisection settles the bits of the least key that is kept, by comparisons and sums only: `keys` says what a key is. The
counts of a leaf are scalars, which add up across shards. A `Count` has two words, so that counts above 2^31 are exact.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.keys import byte_of, key_scores, largest_key, order_keys, varying
from sparsejax.types import Array

# Counting costs m comparisons for each entry of a group of m; bisection costs about 31 passes over memory. On a 2-core
# CPU, for 4096 x 4096 float32, counting takes half the time of bisection at m = 64, and twice the time at m = 128.
_COUNT_MOST = 64
_RUN = 128  # the number of entries of a mask whose sum is one byte; at most 255
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


def plus(a: Count, b: Count) -> Count:
  """Returns `a + b`."""
  carried = _words(jnp.add(a.low, b.low))
  return Count(a.high + b.high + carried.high, carried.low)


def minus(a: Count, b: Count) -> Count:
  """Returns `a - b`; the `high` of a negative difference is negative."""
  low = a.low - b.low
  return Count(a.high - b.high + (low >> _WORD), low & ((1 << _WORD) - 1))


def at_least(a: Count, b: Count) -> Array:
  """Returns whether `a >= b`, as `bool[]`."""
  return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def _words(total: Any) -> Count:
  """Returns an `int32` sum as a `Count`; the sign bit of `total` is read as the bit of value 2^31."""
  return Count(lax.shift_right_logical(total, np.int32(_WORD)), total & ((1 << _WORD) - 1))


def _totals(masks: Sequence[Sequence[Array]]) -> list[Count]:
  """Returns, for each `i`, the number of `True` entries of `masks[0][i]`, `masks[1][i]`, ... together.

  `masks[j]` holds the masks of leaf `j`, all of the same shape.
  """
  most = (2 << _WORD) - 1
  totals, sums, entries = [count(0)] * len(masks[0]), [np.int32(0)] * len(masks[0]), 0
  for leaf in masks:
    for size, slab in _slabs(leaf[0].shape, most):
      if entries + size > most:
        totals, sums, entries = [plus(t, _words(s)) for t, s in zip(totals, sums)], [np.int32(0)] * len(sums), 0
      more = _sums(leaf if slab is None else [mask & slab for mask in leaf])
      sums, entries = [s + m for s, m in zip(sums, more)], entries + size
  return [plus(t, _words(s)) for t, s in zip(totals, sums)]


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
  place = _along(axis, shape)
  starts = range(0, shape[axis], step)
  return [(step * (size // shape[axis]), (place >= start) & (place - start < step)) for start in starts]


def _along(axis: int, shape: tuple[int, ...]) -> Array:
  """Returns `int32` indices 0, 1, 2, ... along `axis` of a leaf of this shape; all other axes have length 1."""
  return lax.broadcasted_iota(jnp.int32, [n if a == axis else 1 for a, n in enumerate(shape)], axis)


def _sums(masks: Sequence[Array]) -> list[Array]:
  """Returns the number of `True` entries of each mask, as `int32[]`."""
  # XLA:CPU compiles one `reduce` of several arrays to a single loop. Sums become a tree of windows, each with a copy of
  # its mask, which takes ten times as long. Between shards, however, sums become all-reduces, and `reduce` a gather.
  if not _one_cpu():
    return [jnp.sum(mask, dtype=jnp.int32) for mask in masks]
  masks, size = [mask.reshape(-1) for mask in masks], masks[0].size
  if size % _RUN == 0:  # the two processors share the runs, and a sum of bytes takes a quarter of the instructions
    masks = _reduced([mask.reshape(-1, _RUN) for mask in masks], 1, np.uint8)
  return _reduced(masks, 0, np.int32)


def _reduced(arrays: Sequence[Array], axis: int, dtype: Any) -> list[Array]:
  """Returns the sum of each array along `axis`, computed in `dtype`, by one reduction of all of them."""
  return lax.reduce([array.astype(dtype) for array in arrays], [dtype(0)] * len(arrays), _added, (axis,))


def _one_cpu() -> bool:
  return jax.default_backend() == 'cpu' and jax.device_count() == 1


def _added(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
  return [x + y for x, y in zip(a, b)]


def top_n_in_groups(scores: Array, n: Any, m: int, axis: int) -> Array:
  """Returns the mask of the `n` largest scores in each group of `m` neighbours along `axis`.

  `n` may be traced. The caller must make sure that `m` divides the length of the axis.
  """
  axis, shape = axis % scores.ndim, scores.shape
  # Two-byte keys halve the work, but along the minor axis XLA:CPU does not vectorize them.
  keys = order_keys(scores, _keyed([scores]) if axis < scores.ndim - 1 else jnp.float32)
  keys = keys.reshape(shape[:axis] + (shape[axis] // m, m) + shape[axis + 1:])
  pick = _count_in_groups if m <= _COUNT_MOST else _bisect_groups
  return pick(keys, jnp.asarray(n, jnp.int32), _along(axis + 1, keys.shape), axis + 1).reshape(shape)


def _count_in_groups(keys: Array, n: Array, place: Array, axis: int) -> Array:
  """Returns the mask of `top_n_in_groups`, by counting.

  An entry is kept if fewer than `n` entries of its group are larger, or equal and of lower index.
  """
  m, kind, minor = keys.shape[axis], keys.dtype, axis == keys.ndim - 1
  # Among equal keys the lower index ranks first: 1 more or 1 less turns > into >= of integer keys. Nothing overflows,
  # because the largest key is that of +inf, and the least that of NaN. Along the minor axis 1 less is the faster.
  if minor and 8 <= m <= 32:  # XLA vectorizes the reduction along the minor axis
    other, i = jnp.expand_dims(keys, axis), jnp.expand_dims(place, axis)
    earlier = (i < jnp.swapaxes(i, axis, axis + 1)).astype(kind)
    return jnp.sum(other > jnp.expand_dims(keys, axis + 1) - earlier, axis + 1, dtype=jnp.int32) < n
  ahead = jnp.zeros_like(keys)
  for j in range(m):
    other, earlier = lax.slice_in_dim(keys, j, j + 1, axis=axis), (j < place).astype(kind)
    ahead += (other > keys - earlier if minor else other + earlier > keys).astype(kind)
  return ahead < jnp.clip(n, 0, m).astype(kind)


def _bisect_groups(keys: Array, n: Array, place: Array, axis: int) -> Array:
  """Returns the mask of `top_n_in_groups`, by bisection.

  The mask keeps every key above the `n`-th largest key, and the first entries whose key equals the `n`-th largest.
  """
  count = lambda kept: jnp.sum(kept, axis, keepdims=True, dtype=jnp.int32)
  like = lax.slice_in_dim(keys, 0, 1, axis=axis)
  least = largest_key(lambda ts: [count(keys >= t) >= n for t in ts], like, bits=1)
  equal = keys == least
  missing = n - count(keys > least)
  stop = jnp.zeros(like.shape, jnp.int32)
  for bit in reversed(range(keys.shape[axis].bit_length())):
    candidate = stop + (1 << bit)
    stop = jnp.where(count(equal & (place < candidate)) <= missing, candidate, stop)
  return (keys > least) | (equal & (place < stop))


def top_n(scores: Array, n: Any) -> Array:
  """Returns the mask of the `n` largest scores of the whole leaf; `n` is any argument of `count`, and may be traced."""
  return top_n_of_leaves([scores], n)[0]


def top_n_of_leaves(leaves: Sequence[Array], n: Any) -> list[Array]:
  """Returns one mask for each leaf, which together keep the `n` largest scores of all leaves.

  Among equal scores those of the earlier leaf are kept first. `n` is any argument of `count`, and may be traced. Leaves
  are not concatenated, and devices exchange only the counts of a sharded leaf.
  """
  return _top_n_of_leaves(list(leaves), count(n))


# The selection is a single program outside of `jit` too. Each sum of a sharded leaf waits for all devices. Many such
# programs in flight have deadlocked XLA:CPU with more devices than cores.
@functools.partial(jax.jit, inline=True)
def _top_n_of_leaves(leaves: list[Array], n: Count) -> list[Array]:
  least = _least_key(leaves, n)
  keys = [functools.partial(order_keys, leaf, _keyed(leaves)) for leaf in leaves]
  counts = [_totals([[k() > least, k() == least]]) for k in keys]
  missing = functools.reduce(minus, [larger for larger, _ in counts], n)
  masks = []
  for k, (_, equals) in zip(keys, counts):
    masks.append((k() > least) | _first(lambda k=k: k() == least, missing, equals))
    missing = minus(missing, equals)
  return masks


def _keyed(leaves: Sequence[Array]) -> Any:
  """Returns the dtype whose bits order all leaves: bfloat16 or float16 if all leaves have this dtype, else float32."""
  dtypes = {leaf.dtype for leaf in leaves}
  return dtypes.pop() if dtypes in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}) else jnp.dtype(jnp.float32)


def _least_key(leaves: Sequence[Array], n: Count) -> Array:
  """Returns the key of the `n`-th largest score of all leaves, or the least integer if there are fewer scores.

  Each byte of the key is settled by passes over one byte of each score, a quarter of the memory of the scores.
  """
  dtype = _keyed(leaves)
  kind = jnp.dtype(jnp.int32 if dtype.itemsize == 4 else jnp.int16).type

  def enough(keys):
    return lambda ts: [at_least(c, n) for c in _totals([[k >= t for t in ts] for k in keys])]

  def settle_byte(i, key):
    shift = jnp.asarray(8 * (dtype.itemsize - 1 - i), kind)
    # To compute the keys anew for each byte takes less time than to read keys, and no memory. Without the barrier, XLA
    # computes them once before the loop.
    anew = lax.optimization_barrier((leaves, i))[0]
    byte = largest_key(enough([byte_of(order_keys(leaf, dtype), key, shift) for leaf in anew]), jnp.int8(0))
    return key + jnp.left_shift(byte.astype(kind) + kind(128), shift)

  start = varying(jnp.asarray(jnp.iinfo(kind).min, kind), enough([order_keys(leaf, dtype) for leaf in leaves]))
  return lax.fori_loop(0, dtype.itemsize, settle_byte, start)


def _first(mask: Callable[[], Array], n: Count, total: Count) -> Array:
  """Returns the mask of the first `n` entries, in row-major order, of the `total` entries that are `True` in `mask()`.

  The mask is a function, so that XLA computes the mask anew in each pass, and a branch that is not taken needs none.
  """
  fits, shape = at_least(n, total), jax.eval_shape(mask).shape
  decided, whole = fits | ~at_least(n, count(1)), jnp.where(fits, jnp.asarray(shape, jnp.int32), 0)
  if _one_cpu() and 0 < math.prod(shape) < 2**31:
    return _before(mask(), fits, lax.cond(decided, lambda: whole, lambda: _stop_in_rows(mask(), n.low)))
  return _before(mask(), fits, _stop(mask(), n, fits, decided, whole))


def _before(mask: Array, fits: Array, stop: Array) -> Array:
  """Returns the entries of `mask` whose multi-index comes before `stop`; all entries if `fits`."""
  earlier = fits
  for axis in reversed(range(mask.ndim)):
    place = _along(axis, mask.shape)
    earlier = (place < stop[axis]) | ((place == stop[axis]) & earlier)
  return mask & earlier


def _stop_in_rows(mask: Array, n: Array) -> Array:
  """Returns the multi-index of the entry of `mask` that `n` entries precede, as `int32[ndim]`.

  A single pass counts the entries at each index of the first axis. The rest happens within the index that is cut.
  """
  stop = []
  for length in mask.shape:
    rows, place = mask.reshape(length, -1), _along(0, (length,))
    kept, left = _reduced([rows, ~rows], 1, np.int32)
    counts = (kept - left + rows.shape[1]) >> 1  # `kept`, but XLA:CPU makes a tree of windows where it is alone
    before = lambda at, counts=counts, place=place: jnp.sum(jnp.where(place < at, counts, 0), dtype=jnp.int32)
    stop.append(largest_key(lambda ats, n=n, before=before: [before(at) <= n for at in ats], jnp.int32(0)))
    n, mask = n - before(stop[-1]), lax.dynamic_index_in_dim(mask, stop[-1], 0, keepdims=False)
  return jnp.stack(stop)


def _stop(mask: Array, n: Count, fits: Array, decided: Array, whole: Array) -> Array:
  """Returns what `_stop_in_rows` does, by bisection of one axis after the other; `whole` if it is `decided`.

  Devices exchange counts only. An index into the flattened leaf would need two words.
  """
  steps = [[1 << shift if a == axis else 0 for a in range(mask.ndim)]
           for axis, length in enumerate(mask.shape) for shift in reversed(range(0, length.bit_length(), 2))]
  if not steps:
    return whole

  def settle_digit(i, stop):
    step = jnp.asarray(steps, jnp.int32)[i]
    stops = [stop + digit * step for digit in (1, 2, 3)]
    counts = _totals([[_before(mask, fits, s) for s in stops]])
    return stop + step * sum((at_least(n, c) & jnp.all(s >= 0)).astype(jnp.int32) for s, c in zip(stops, counts))

  return lax.fori_loop(jnp.where(decided, len(steps), 0), len(steps), settle_digit, whole)


def quantile(leaves: Sequence[Array], q: Any) -> Array:
  """Returns the `q`-quantile of all leaves together, as `float32[]`, like `jnp.quantile` of their concatenation.

  The leaves are not concatenated. The quantile is interpolated linearly at the place `(size - 1) * q` of the increasing
  order. `q` may be traced. NaN counts as the least value. The place is a `float32`, and is off by up to 2^-24 of the
  size.
  """
  keys, size = [order_keys(leaf) for leaf in leaves], sum(leaf.size for leaf in leaves)
  place = jnp.float32(size - 1) * jnp.asarray(q, jnp.float32)
  last = at_least(count(jnp.floor(place)), count(size - 1))
  below = jax.tree.map(functools.partial(jnp.where, last), count(size - 1), count(jnp.floor(place)))
  rank = minus(count(size), below)  # of the lower neighbour; the largest value has rank 1
  low = largest_key(lambda ts: [at_least(c, rank) for c in _totals([[k >= t for t in ts] for k in keys])], jnp.int32(0))
  # `high` is the next key in increasing order: `low` again if the key occurs there as well, else the least key above.
  most = jnp.int32(jnp.iinfo(jnp.int32).max)
  above = functools.reduce(jnp.minimum, [jnp.min(k, initial=most, where=k > low) for k in keys])
  larger, _ = _totals([[k > low, k == low] for k in keys])
  high = jnp.where(at_least(larger, minus(rank, count(1))) & ~last, above, low)
  low, high = key_scores(low), key_scores(high)
  return low + (place - jnp.floor(place)) * (high - low)
