"""Exact-count selection: the only place where ties, NaN and rounding are decided.

Every function keeps exactly the asked number. Equal scores are kept from the lower index up (row-major within the
group or the leaf), -0.0 equals 0.0, and NaN ranks below everything, -inf included. There is no sort: small groups count
for each element how many beat it, everything else settles the bits of the least kept score, which needs compares and
sums only. Counts of a leaf are scalars, so that they add up across shards, and have two words, so that they are exact
beyond 2^31 elements.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.types import Array

# Counting who beats whom costs m compares an element, bisection about 31 passes over memory. Measured on a 2-core
# CPU, 4096 x 4096 float32: counting takes half the time of bisection at m = 64, twice at m = 128.
_COUNT_MOST = 64
_WORD = 31  # bits of a count's low word; a sum is split into words before it has more than one bit more


class Count(NamedTuple):
  """The number `high * 2^31 + low`, both `int32`, `0 <= low < 2^31`: 64 bits without `jax_enable_x64`."""

  high: Any
  low: Any


def count(n: Any) -> Count:
  """`n` in two words: an integer of any size, an integer array, a whole `float32`, or a `Count` as it is."""
  if isinstance(n, Count):
    return n
  if isinstance(n, (int, np.integer)):
    n = max(int(n), -1)  # whatever is below zero keeps as little
    return Count(np.int32(min(n >> _WORD, 2**31 - 1)), np.int32(n & ((1 << _WORD) - 1)))
  n = jnp.asarray(n)
  if jnp.issubdtype(n.dtype, jnp.floating):
    high = jnp.floor(n * 2.0**-_WORD)
    return Count(high.astype(jnp.int32), (n - high * 2.0**_WORD).astype(jnp.int32))
  n = n.astype(jnp.int32) if n.dtype.itemsize < 4 else n
  return Count((n >> _WORD).astype(jnp.int32), (n & ((1 << _WORD) - 1)).astype(jnp.int32))


def plus(a: Count, b: Count) -> Count:
  """`a + b`."""
  carried = _words(jnp.add(a.low, b.low))
  return Count(a.high + b.high + carried.high, carried.low)


def minus(a: Count, b: Count) -> Count:
  """`a - b`; a negative difference has a negative `high`."""
  low = a.low - b.low
  return Count(a.high - b.high + (low >> _WORD), low & ((1 << _WORD) - 1))


def at_least(a: Count, b: Count) -> Array:
  """`a >= b`, `bool`."""
  return (a.high > b.high) | ((a.high == b.high) & (a.low >= b.low))


def _words(total: Any) -> Count:
  """An `int32` sum that may have filled its sign bit too, in two words."""
  return Count(lax.shift_right_logical(total, np.int32(_WORD)), total & ((1 << _WORD) - 1))


def _totals(masks: Sequence[Sequence[Array]]) -> list[Count]:
  """How many are `True` in `masks[0][i]`, `masks[1][i]` ... together, for each `i`; `masks[j]` are of one shape."""
  most = (2 << _WORD) - 1
  totals, sums, held = [count(0)] * len(masks[0]), [np.int32(0)] * len(masks[0]), 0
  for leaf in masks:
    for size, slab in _slabs(leaf[0].shape, most):
      if held + size > most:
        totals, sums, held = [plus(t, _words(s)) for t, s in zip(totals, sums)], [np.int32(0)] * len(sums), 0
      more = _sums(leaf if slab is None else [mask & slab for mask in leaf])
      sums, held = [s + m for s, m in zip(sums, more)], held + size
  return [plus(t, _words(s)) for t, s in zip(totals, sums)]


def _slabs(shape: tuple[int, ...], most: int) -> list[tuple[int, Array | None]]:
  """Parts of a leaf that have at most `most` elements: the size and the mask of each, `None` for the whole leaf.

  By a mask, not by slices or a reshape: those would move what is sharded.
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
  """`int32`, 0, 1, 2 ... along one axis of a leaf of this shape, length one along the others."""
  return lax.broadcasted_iota(jnp.int32, [n if a == axis else 1 for a, n in enumerate(shape)], axis)


def _sums(masks: Sequence[Array]) -> list[Array]:
  """How many are `True` in each of the masks, `int32[]`."""
  # One reduction of several arrays is a single loop in XLA:CPU, ten times as fast as the tree of windows, each with a
  # copy of its mask, that it makes of sums. But between shards only a sum becomes an all-reduce, the other a gather.
  if _one_cpu():
    ones = [mask.astype(jnp.int32) for mask in masks]
    return lax.reduce(ones, [np.int32(0)] * len(masks), _added, tuple(range(masks[0].ndim)))
  return [jnp.sum(mask, dtype=jnp.int32) for mask in masks]


def _one_cpu() -> bool:
  return jax.default_backend() == 'cpu' and jax.device_count() == 1


def _added(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
  return [x + y for x, y in zip(a, b)]


def order_keys(scores: Array, dtype: Any = jnp.float32) -> Array:
  """Integers like `scores`, ordered as the scores are: `a > b` for keys is `a` before `b`. NaN becomes the least.

  `int32` of the scores as `float32`: exact for float32, bfloat16, float16 and float8; a float64 score is compared as
  float32. With a `dtype` of two bytes, `int16` of the scores as that.
  """
  # On the bits alone: comparing the floats as well costs a third more in a group of four, where this is most of it.
  kind = jnp.int32 if jnp.dtype(dtype).itemsize == 4 else jnp.int16
  infinity, most, least = np.array(np.inf, dtype).view(kind), jnp.iinfo(kind).max, kind(jnp.iinfo(kind).min)
  bits = lax.bitcast_convert_type(scores.astype(dtype), kind)
  # `least` has the bits of -0.0, and is below the key of -inf.
  ordered = jnp.where(bits == least, kind(0), bits ^ ((bits >> (jnp.iinfo(kind).bits - 1)) & kind(most)))
  return jnp.where((bits & kind(most)) > infinity, least, ordered)


def key_scores(keys: Array) -> Array:
  """The `float32` scores of `order_keys`; the least key comes back as NaN."""
  return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ jnp.int32(0x7FFFFFFF), keys), jnp.float32)


def largest_key(enough: Callable[[list[Array]], list[Array]], like: Array, bits: int = 2) -> Array:
  """The largest key for which `enough` holds, elementwise in the shape and dtype of `like`; the least if for none.

  `enough` is asked about `2^bits - 1` increasing keys a pass, to settle as many bits, and must not hold again above a
  key for which it does not. With "at least n are as large", that is the `n`-th largest key, counting from 1.
  """
  info = jnp.iinfo(like.dtype)

  def settle_bits(i, t):
    step = jnp.left_shift(like.dtype.type(1), jnp.asarray(info.bits - bits - bits * i, like.dtype))
    return t + step * sum(hold.astype(like.dtype) for hold in enough([t + k * step for k in range(1, 2**bits)]))

  # The first ones outside the loop: within shard_map what goes round must vary between devices from the start.
  start = settle_bits(0, jnp.full_like(like, info.min))
  return lax.fori_loop(1, info.bits // bits, settle_bits, start)


def top_n_in_groups(scores: Array, n: Any, m: int, axis: int) -> Array:
  """Mask of the `n` largest in each group of `m` neighbours along `axis`. `n` may be traced; `m` divides the axis."""
  axis = axis % scores.ndim
  shape = scores.shape
  keys = order_keys(scores).reshape(shape[:axis] + (shape[axis] // m, m) + shape[axis + 1:])
  place = lax.broadcasted_iota(jnp.int32, (m,) + (1,) * (scores.ndim - axis - 1), 0)
  place = place.reshape((1,) * (axis + 1) + place.shape)
  pick = _count_those_ahead if m <= _COUNT_MOST else _bisect_groups
  return pick(keys, jnp.asarray(n, jnp.int32), place, axis + 1).reshape(shape)


def _count_those_ahead(keys: Array, n: Array, place: Array, axis: int) -> Array:
  """Keeps an element if fewer than `n` of its group are ahead of it: larger, or equal and earlier."""
  m = keys.shape[axis]
  if axis == keys.ndim - 1 and 8 <= m <= 32:  # groups along the minor axis: XLA vectorizes the reduction instead
    other, i = jnp.expand_dims(keys, axis), jnp.expand_dims(place, axis)
    earlier = (i < jnp.swapaxes(i, axis, axis + 1)).astype(jnp.int32)
    return jnp.sum(other + earlier > jnp.expand_dims(keys, axis + 1), axis + 1, dtype=jnp.int32) < n
  ahead = jnp.zeros_like(keys)
  for j in range(m):
    # An earlier one wins ties: adding one to an integer key turns > into >=. The largest key is +inf's, no overflow.
    other = lax.slice_in_dim(keys, j, j + 1, axis=axis) + (j < place).astype(jnp.int32)
    ahead += (other > keys).astype(jnp.int32)
  return ahead < n


def _bisect_groups(keys: Array, n: Array, place: Array, axis: int) -> Array:
  """Keeps what is above the `n`-th largest key, and of its equals the first ones, found by bisecting the place."""
  count = lambda kept: jnp.sum(kept, axis, keepdims=True, dtype=jnp.int32)
  like = lax.slice_in_dim(keys, 0, 1, axis=axis)
  least = largest_key(lambda ts: [count(keys >= t) >= n for t in ts], like, bits=1)
  equal = keys == least
  missing = n - count(keys > least)
  stop = jnp.zeros_like(like)
  for bit in reversed(range(keys.shape[axis].bit_length())):
    candidate = stop + (1 << bit)
    stop = jnp.where(count(equal & (place < candidate)) <= missing, candidate, stop)
  return (keys > least) | (equal & (place < stop))


def top_n(scores: Array, n: Any) -> Array:
  """Mask of the `n` largest of the whole leaf. `n` is whatever `count` takes, traced or not."""
  return top_n_of_leaves([scores], n)[0]


def top_n_of_leaves(leaves: Sequence[Array], n: Any) -> list[Array]:
  """Masks of the `n` largest of all leaves taken as one; equals are kept from the earlier leaf first.

  `n` is whatever `count` takes, traced or not. Nothing is concatenated, and of a sharded leaf only counts are shared.
  """
  return _top_n_of_leaves(list(leaves), count(n))


# One program outside of `jit` too: each sum of a sharded leaf waits for all devices, and many such programs in flight
# have deadlocked XLA:CPU with more devices than cores.
@functools.partial(jax.jit, inline=True)
def _top_n_of_leaves(leaves: list[Array], n: Count) -> list[Array]:
  keys = _keys(leaves)
  enough = lambda ts: [at_least(c, n) for c in _totals([[k >= t for t in ts] for k in keys])]
  least = largest_key(enough, jnp.zeros((), keys[0].dtype))
  counts = [_totals([[k > least, k == least]]) for k in keys]
  missing = functools.reduce(minus, [larger for larger, _ in counts], n)
  masks = []
  for k, (_, equals) in zip(keys, counts):
    masks.append((k > least) | _first(k == least, missing, equals))
    missing = minus(missing, equals)
  return masks


def _keys(leaves: Sequence[Array]) -> list[Array]:
  """Keys of one dtype for all leaves: of two bytes if all are of one such dtype."""
  kinds = {leaf.dtype for leaf in leaves}
  narrow = len(kinds) == 1 and kinds <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
  return [order_keys(leaf, leaf.dtype if narrow else jnp.float32) for leaf in leaves]


def _first(mask: Array, n: Count, total: Count) -> Array:
  """Mask of the first `n` of the `total` that are `True` in `mask`, in row-major order.

  Settles, axis after axis, the index before which they lie: no place in the flattened leaf, which would need two words.
  """
  fits = at_least(n, total)
  digits = [(axis, shift) for axis, length in enumerate(mask.shape)
            for shift in reversed(range(0, length.bit_length(), 2))]
  if not digits:
    return mask & fits
  axis_of, shift_of = jnp.asarray(digits, jnp.int32).T

  def before(stop):
    earlier = fits
    for axis in reversed(range(mask.ndim)):
      place = _along(axis, mask.shape)
      earlier = (place < stop[axis]) | ((place == stop[axis]) & earlier)
    return mask & earlier

  def settle_digit(i, stop):
    step = jnp.where(jnp.arange(mask.ndim) == axis_of[i], jnp.left_shift(jnp.int32(1), shift_of[i]), 0)
    stops = [stop + digit * step for digit in (1, 2, 3)]
    found = zip(stops, _totals([[before(s) for s in stops]]))
    return stop + step * sum((at_least(n, c) & jnp.all(s >= 0)).astype(jnp.int32) for s, c in found)

  settled = fits | ~at_least(n, count(1))
  stop = jnp.where(fits, jnp.asarray(mask.shape, jnp.int32), 0)
  return before(lax.fori_loop(jnp.where(settled, len(digits), 0), len(digits), settle_digit, stop))


def quantile(leaves: Sequence[Array], q: Any) -> Array:
  """The `q`-quantile, `float32[]`, of all leaves taken as one, with linear interpolation at `(size - 1) * q`.

  `jnp.quantile` of the concatenation, without making it. `q` may be traced; NaN counts as the least. The place is a
  `float32`, off by up to 2^-24 of the size.
  """
  keys, size = [order_keys(leaf) for leaf in leaves], sum(leaf.size for leaf in leaves)
  place = jnp.float32(size - 1) * jnp.asarray(q, jnp.float32)
  last = at_least(count(jnp.floor(place)), count(size - 1))
  below = jax.tree.map(functools.partial(jnp.where, last), count(size - 1), count(jnp.floor(place)))
  rank = minus(count(size), below)  # from the largest, counting from 1
  low = largest_key(lambda ts: [at_least(c, rank) for c in _totals([[k >= t for t in ts] for k in keys])], jnp.int32(0))
  # The next larger one: the least key above `low`, unless `low` itself fills that place too.
  most = jnp.int32(jnp.iinfo(jnp.int32).max)
  above = functools.reduce(jnp.minimum, [jnp.min(k, initial=most, where=k > low) for k in keys])
  larger, _ = _totals([[k > low, k == low] for k in keys])
  high = jnp.where(at_least(larger, minus(rank, count(1))) & ~last, above, low)
  low, high = key_scores(low), key_scores(high)
  return low + (place - jnp.floor(place)) * (high - low)
