"""Exact-count selection: the only place where ties, NaN and rounding are decided.

Every function keeps exactly the asked number. Equal scores are kept from the lower index up (row-major within the
group or the leaf), -0.0 equals 0.0, and NaN ranks below everything, -inf included. There is no sort: small groups count
for each element how many beat it, everything else bisects the bits of the score, which needs compares and sums only.
"""

import functools
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array

# Counting who beats whom costs m compares an element, bisection about 31 passes over memory. Measured on a 2-core CPU,
# 4096 x 4096 float32: counting takes half the time of bisection at m = 64, twice at m = 128.
_COUNT_MOST = 64


def order_keys(scores: Array) -> Array:
  """`int32` like `scores`, ordered as the scores are: `a > b` for keys is `a` before `b`. NaN becomes the least.

  Exact for float32, bfloat16, float16 and float8; a float64 score is compared as float32.
  """
  # On the bits alone: comparing the floats as well costs a third more in a group of four, where this is most of it.
  bits = lax.bitcast_convert_type(scores.astype(jnp.float32), jnp.int32)
  least = jnp.int32(jnp.iinfo(jnp.int32).min)  # the bits of -0.0, and below the key of -inf
  ordered = jnp.where(bits == least, jnp.int32(0), bits ^ ((bits >> 31) & jnp.int32(0x7FFFFFFF)))
  return jnp.where((bits & jnp.int32(0x7FFFFFFF)) > jnp.int32(0x7F800000), least, ordered)


def key_scores(keys: Array) -> Array:
  """The `float32` scores of `order_keys`; the least key comes back as NaN."""
  return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ jnp.int32(0x7FFFFFFF), keys), jnp.float32)


def largest_key(count_at_least: Any, n: Any, like: Array) -> Array:
  """The largest key `t` with `count_at_least(t) >= n`, elementwise over `like`'s shape: 32 counts, one for each bit.

  That is the `n`-th largest key (counting from 1) of whatever `count_at_least` counts.
  """
  least = jnp.full_like(like, jnp.iinfo(jnp.int32).min, dtype=jnp.int32)
  start = jnp.where(count_at_least(jnp.zeros_like(least)) >= n, 0, least)

  def settle_bit(i, t):
    candidate = t + jnp.left_shift(jnp.int32(1), jnp.asarray(30 - i, jnp.int32))
    return jnp.where(count_at_least(candidate) >= n, candidate, t)

  return lax.fori_loop(0, 31, settle_bit, start)


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
  least = largest_key(lambda t: count(keys >= t), n, like)
  equal = keys == least
  missing = n - count(keys > least)
  stop = jnp.zeros_like(like)
  for bit in reversed(range(keys.shape[axis].bit_length())):
    candidate = stop + (1 << bit)
    stop = jnp.where(count(equal & (place < candidate)) <= missing, candidate, stop)
  return (keys > least) | (equal & (place < stop))


def top_n(scores: Array, n: Any) -> Array:
  """Mask of the `n` largest of the whole leaf. `n` may be traced. A leaf of 2^31 elements and more is refused."""
  _check_countable([scores])
  keys, n = order_keys(scores), jnp.asarray(n, jnp.int32)
  least = largest_key(lambda t: jnp.sum(keys >= t, dtype=jnp.int32), n, jnp.int32(0))
  equal, missing = keys == least, n - jnp.sum(keys > least, dtype=jnp.int32)
  place = _row_major_place(keys.shape)
  bits = max(keys.size, 1).bit_length()

  def settle_bit(i, stop):
    candidate = stop + jnp.left_shift(jnp.int32(1), jnp.asarray(bits - 1 - i, jnp.int32))
    fits = (candidate > 0) & (jnp.sum(equal & (place < candidate), dtype=jnp.int32) <= missing)
    return jnp.where(fits, candidate, stop)

  stop = lax.fori_loop(0, bits, settle_bit, jnp.int32(0))
  return (keys > least) | (equal & (place < stop))


def quantile(leaves: Sequence[Array], q: Any) -> Array:
  """The `q`-quantile, `float32[]`, of all leaves taken as one, with linear interpolation at `(size - 1) * q`.

  `jnp.quantile` of the concatenation, without making it. `q` may be traced; NaN counts as the least.
  """
  _check_countable(leaves)
  keys = [order_keys(leaf) for leaf in leaves]
  size = sum(leaf.size for leaf in leaves)
  place = jnp.float32(size - 1) * jnp.asarray(q, jnp.float32)
  below = jnp.floor(place).astype(jnp.int32)
  count = lambda t: sum(jnp.sum(k >= t, dtype=jnp.int32) for k in keys)
  low = largest_key(count, size - below, jnp.int32(0))
  # The next larger one: the least key above `low`, unless `low` itself fills that place too.
  most = jnp.int32(jnp.iinfo(jnp.int32).max)
  above = functools.reduce(jnp.minimum, [jnp.min(k, initial=most, where=k > low) for k in keys])
  high = jnp.where((count(low + 1) >= size - below - 1) & (below < size - 1), above, low)
  low, high = key_scores(low), key_scores(high)
  return low + (place - below.astype(jnp.float32)) * (high - low)


def _row_major_place(shape: tuple[int, ...]) -> Array:
  """`int32` of this shape: each element's index in the flattened leaf, without a reshape that would gather shards."""
  place = jnp.zeros(shape, jnp.int32)
  stride = 1
  for axis in reversed(range(len(shape))):
    place += lax.broadcasted_iota(jnp.int32, shape, axis) * stride
    stride *= shape[axis]
  return place


def _check_countable(leaves: Sequence[Array]) -> None:
  size = sum(leaf.size for leaf in leaves)
  if size >= 2**31 - 1:
    raise ValueError(f'ranking: {size} elements ranked together do not fit 32-bit counts; rank them leaf by leaf '
                     'or split the stack.')
