"""Selects an exact number of the largest scores: the only module that decides about ties, NaN and rounding.

Every function keeps exactly the number of entries that its argument `n` gives. Among equal scores the entry of lower
index is kept first, in row-major order within the group or the leaf. -0.0 equals 0.0. NaN ranks below every number,
-inf included.

    ranking.top_n_in_groups(scores, 2, 4, axis=0)            # 2:4 along axis 0
    ranking.top_n(scores, ranking.count(scores.size // 10))  # 10 % of a leaf
    ranking.top_n_of_leaves([a, b], 1000)                    # 1000 of two leaves together

No function sorts. In a small group each entry counts the entries that precede it. In large groups, and in whole leaves,
bisection settles the bits of the least score that is kept, by comparisons and sums only. The counts of a leaf are
scalars, which add up across shards. A `Count` has two words, so that counts above 2^31 are exact.
"""

import functools
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import kinds
from sparsejax.types import Array

# Counting costs m comparisons for each entry of a group of m; bisection costs about 31 passes over memory. On a 2-core
# CPU, for 4096 x 4096 float32, counting takes half the time of bisection at m = 64, and twice the time at m = 128.
_COUNT_MOST = 64
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


def counted(n: Count, size: int) -> Any:
  """Returns `n` in the form in which `size` entries are counted: `int32` below 2^31 entries, else a `Count`.

  The `int32` is -1 for a negative `n`, and `size` for an `n` that is larger than an `int32`.
  """
  if size > _most():
    return n
  where = np.where if isinstance(n.high, (int, np.integer)) else jnp.where
  return where(n.high < 0, np.int32(-1), where(n.high > 0, np.int32(size), n.low))


def _most() -> int:
  """Returns how many entries are counted in one word."""
  return (1 << _WORD) - 1


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


def _totals(masks: Sequence[Sequence[Array]]) -> list[Any]:
  """Returns, for each `i`, the number of `True` entries of `masks[0][i]`, `masks[1][i]`, ... together.

  `masks[j]` holds the masks of leaf `j`, all of the same shape. Numbers have the form of `counted` of all entries.
  """
  most, number = (2 << _WORD) - 1, len(masks[0])
  totals, sums, entries, wide = [count(0)] * number, [np.int32(0)] * number, 0, False
  for leaf in masks:
    for size, slab in _slabs(leaf[0].shape, most):
      if entries + size > most:
        totals, sums, entries, wide = [plus(t, _words(s)) for t, s in zip(totals, sums)], [np.int32(0)] * number, 0, True
      more = _sums(leaf if slab is None else [mask & slab for mask in leaf])
      sums, entries = [s + m for s, m in zip(sums, more)], entries + size
  return [plus(t, _words(s)) for t, s in zip(totals, sums)] if wide or entries > _most() else sums


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
  if _one_cpu():
    ones = [mask.astype(jnp.int32) for mask in masks]
    return lax.reduce(ones, [np.int32(0)] * len(masks), _added, tuple(range(masks[0].ndim)))
  return [jnp.sum(mask, dtype=jnp.int32) for mask in masks]


def _one_cpu() -> bool:
  return jax.default_backend() == 'cpu' and jax.device_count() == 1


def _added(a: Sequence[Array], b: Sequence[Array]) -> list[Array]:
  return [x + y for x, y in zip(a, b)]


def order_keys(scores: Array, dtype: Any = jnp.float32) -> Array:
  """Returns integer keys, shaped like `scores`, that are ordered as the scores are; NaN gets the least key.

  The score with the larger key ranks first. Keys are the `int32` of the scores as `float32`: exact for float32,
  bfloat16, float16 and float8; a float64 score is compared as float32. If `dtype` has two bytes, the scores are cast to
  `dtype`, and keys are `int16`.
  """
  # The keys are computed from the bits alone. In groups of four the keys are most of the work, and comparing the floats
  # as well would take a third longer.
  kind = jnp.int32 if jnp.dtype(dtype).itemsize == 4 else jnp.int16
  infinity, most, least = np.array(np.inf, dtype).view(kind), jnp.iinfo(kind).max, kind(jnp.iinfo(kind).min)
  bits = lax.bitcast_convert_type(scores.astype(dtype), kind)
  # `least` has the bits of -0.0, and is less than the key of -inf.
  ordered = jnp.where(bits == least, kind(0), bits ^ ((bits >> (jnp.iinfo(kind).bits - 1)) & kind(most)))
  return jnp.where((bits & kind(most)) > infinity, least, ordered)


def key_scores(keys: Array) -> Array:
  """Returns the `float32` scores that have these `int32` keys; the least key gives NaN."""
  return lax.bitcast_convert_type(jnp.where(keys < 0, keys ^ jnp.int32(0x7FFFFFFF), keys), jnp.float32)


def largest_key(enough: Callable[[list[Array]], list[Array]], like: Array, bits: int = 2) -> Array:
  """Returns the largest key for which `enough` is `True`, elementwise, in the shape and dtype of `like`.

  If `enough` is `True` for no key, the result is the least key. `enough` maps a list of `2^bits - 1` increasing keys to
  a list of bools; each call settles `bits` bits. `enough` must be `False` above every key for which it is `False`. If
  `enough` says that at least `n` entries are as large as the key, the result is the `n`-th largest key, counted from 1.
  """
  info = jnp.iinfo(like.dtype)

  def settle_bits(i, t):
    step = jnp.left_shift(like.dtype.type(1), jnp.asarray(info.bits - bits - bits * i, like.dtype))
    return t + step * sum(hold.astype(like.dtype) for hold in enough([t + k * step for k in range(1, 2**bits)]))

  # The first bits are settled outside the loop: within `shard_map` the carry must vary between devices from the start.
  start = settle_bits(0, jnp.full_like(like, info.min))
  return lax.fori_loop(1, info.bits // bits, settle_bits, start)


def top_n_in_groups(scores: Array, n: Any, m: int, axis: int) -> Array:
  """Returns the mask of the `n` largest scores in each group of `m` neighbours along `axis`.

  `n` may be traced. The caller must make sure that `m` divides the length of the axis.
  """
  axis, shape = axis % scores.ndim, scores.shape
  keys = order_keys(scores).reshape(shape[:axis] + (shape[axis] // m, m) + shape[axis + 1:])
  pick = _count_in_groups if m <= _COUNT_MOST else _bisect_groups
  return pick(keys, jnp.asarray(n, jnp.int32), _along(axis + 1, keys.shape), axis + 1).reshape(shape)


def _count_in_groups(keys: Array, n: Array, place: Array, axis: int) -> Array:
  """Returns the mask of `top_n_in_groups`, by counting.

  An entry is kept if fewer than `n` entries of its group are larger, or equal and of lower index.
  """
  m = keys.shape[axis]
  if axis == keys.ndim - 1 and 8 <= m <= 32:  # XLA vectorizes the reduction along the minor axis
    other, i = jnp.expand_dims(keys, axis), jnp.expand_dims(place, axis)
    earlier = (i < jnp.swapaxes(i, axis, axis + 1)).astype(jnp.int32)
    return jnp.sum(other + earlier > jnp.expand_dims(keys, axis + 1), axis + 1, dtype=jnp.int32) < n
  ahead = jnp.zeros_like(keys)
  for j in range(m):
    # Among equal keys the lower index ranks first: adding 1 to an integer key turns > into >=. The addition does not
    # overflow, because the largest key is that of +inf.
    other = lax.slice_in_dim(keys, j, j + 1, axis=axis) + (j < place).astype(jnp.int32)
    ahead += (other > keys).astype(jnp.int32)
  return ahead < n


def _bisect_groups(keys: Array, n: Array, place: Array, axis: int) -> Array:
  """Returns the mask of `top_n_in_groups`, by bisection.

  The mask keeps every key above the `n`-th largest key, and the first entries whose key equals the `n`-th largest.
  """
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
  """Returns the mask of the `n` largest scores of the whole leaf; `n` is any argument of `count`, and may be traced."""
  return top_n_of_leaves([scores], n)[0]


def top_n_of_leaves(leaves: Sequence[Array], n: Any) -> list[Array]:
  """Returns one mask for each leaf, which together keep the `n` largest scores of all leaves.

  Among equal scores those of the earlier leaf are kept first. `n` is any argument of `count`, and may be traced. Leaves
  are not concatenated, and devices exchange only the counts of a sharded leaf.
  """
  return _top_n_of_leaves(list(leaves), counted(count(n), sum(leaf.size for leaf in leaves)))


# The selection is a single program outside of `jit` too. Each sum of a sharded leaf waits for all devices. Many such
# programs in flight have deadlocked XLA:CPU with more devices than cores.
@functools.partial(jax.jit, inline=True)
def _top_n_of_leaves(leaves: list[Array], n: Any) -> list[Array]:
  groups, stacks = _stacks(leaves)
  keys = _keys(stacks)
  enough = lambda ts: [at_least(c, n) for c in _totals([[k >= t for t in ts] for k in keys])]
  least = largest_key(enough, jnp.zeros((), keys[0].dtype))
  counts = [_of_rows([k > least, k == least], isinstance(n, Count)) for k in keys]
  missing = _missing(n, groups, counts)
  masks = [(k > least) | _first(k == least, each, equals) for k, each, (_, equals) in zip(keys, missing, counts)]
  rows = dict(zip(itertools.chain(*groups), itertools.chain(*map(kinds.unstacked, masks))))
  return [rows[i] for i in range(len(leaves))]


def _stacks(leaves: Sequence[Array]) -> tuple[list[list[int]], list[Array]]:
  """Returns the places of the leaves of each kind, and the leaves of each kind as one array, `[leaves, ...]`.

  A leaf that is too large for 32-bit counts is a kind of its own.
  """
  groups = []
  for places in kinds.of(leaves):
    first = leaves[places[0]]
    groups += [places] if first.size <= _most() and kinds.stackable(first) else [[i] for i in places]
  return groups, [kinds.stacked([leaves[i] for i in places]) for places in groups]


def _of_rows(masks: Sequence[Array], wide: bool) -> list[Any]:
  """Returns the numbers of `True` entries in each row of masks `[rows, ...]`; with `wide`, as a `Count`."""
  numbers = jax.vmap(lambda *row: _totals([row]))(*masks)
  return [Count(jnp.zeros_like(n), n) if wide and not isinstance(n, Count) else n for n in numbers]


def _missing(n: Any, groups: Sequence[Sequence[int]], counts: Sequence[Sequence[Any]]) -> list[Any]:
  """Returns how many of its scores with the least key each leaf keeps, `[rows]` for each stack.

  `counts`: the numbers of scores above the least key, and with the least key, `[rows]` for each stack. Earlier leaves
  keep theirs first, so that a number may be larger than there are scores, or negative.
  """
  larger, equals = (jax.tree.map(lambda *each: jnp.concatenate(each), *of_stacks) for of_stacks in zip(*counts))
  place = np.concatenate(groups)  # of each row among the leaves
  if len(place) == 1:
    return [minus(jax.tree.map(lambda word: jnp.asarray(word)[None], n), larger)]
  left, _ = _before(n, larger)
  _, missing = _before(left, jax.tree.map(lambda word: word[np.argsort(place)], equals))
  return [jax.tree.map(lambda word: word[np.asarray(places)], missing) for places in groups]


def _before(n: Any, counts: Any) -> tuple[Any, Any]:
  """Returns what is left of `n` after all of the counts `[rows]` are taken away, and before each of them, `[rows]`."""
  return lax.scan(lambda left, taken: (minus(left, taken), left), n, counts)


def _keys(leaves: Sequence[Array]) -> list[Array]:
  """Returns the keys of all leaves in one dtype: `int16` if all are bfloat16 or all are float16, else `int32`."""
  dtypes = {leaf.dtype for leaf in leaves}
  narrow = len(dtypes) == 1 and dtypes <= {jnp.dtype(jnp.bfloat16), jnp.dtype(jnp.float16)}
  return [order_keys(leaf, leaf.dtype if narrow else jnp.float32) for leaf in leaves]


def _first(mask: Array, n: Any, total: Any) -> Array:
  """Returns the mask of the first `n[i]` entries, in row-major order, of the `total[i]` that are `True` in `mask[i]`.

  Bisection settles the index at which the mask of a row stops. A row has several indices if one would not fit 32 bits.
  """
  indices = _indices(mask.shape)
  lengths = np.array([math.prod(mask.shape[a] for a in axes) for axes in indices], np.int32)
  places = [_index(axes, mask.shape) for axes in indices]
  steps = np.array([[1 << shift if j == i else 0 for j in range(len(indices))] for i, length in enumerate(lengths)
                    for shift in reversed(range(0, max(int(length), 1).bit_length(), 2))], np.int32)

  def before(stop):  # `[indices, rows]`
    earlier = False
    for place, one in reversed(list(zip(places, stop))):
      one = lax.expand_dims(one, range(1, mask.ndim))
      earlier = (place < one) | ((place == one) & earlier) if earlier is not False else place < one
    return mask & earlier

  def settle_digit(i, stop):
    step = lax.dynamic_index_in_dim(steps, i, 0, keepdims=False, allow_negative_indices=False)[:, None]
    stops = [stop + digit * step for digit in (1, 2, 3)]
    fit = [at_least(n, c) & (functools.reduce(jnp.minimum, s) >= 0)
           for s, c in zip(stops, _of_rows([before(s) for s in stops], isinstance(n, Count)))]
    return stop + step * sum(f.astype(jnp.int32) for f in fit)[None]

  fits = at_least(n, total)
  decided = fits | ~at_least(n, count(1) if isinstance(n, Count) else 1)
  stop = jnp.where(fits, lengths[:, None], 0)
  return before(lax.fori_loop(jnp.where(jnp.all(decided), len(steps), 0), len(steps), settle_digit, stop))


def _indices(shape: tuple[int, ...]) -> list[list[int]]:
  """Returns the axes that each index of an entry of a row merges: one index if a row of `shape` fits 32 bits."""
  indices, size = [[]], 1
  for axis, length in list(enumerate(shape))[1:]:
    if size * length > _most():
      indices, size = [*indices, []], 1
    indices[-1].append(axis)
    size *= length
  return [axes for axes in indices if axes] or [[]]


def _index(axes: Sequence[int], shape: tuple[int, ...]) -> Array:
  """Returns the index that merges `axes`, row-major, of each entry: `int32`, of length 1 along all other axes."""
  place, stride = jnp.zeros([1] * len(shape), jnp.int32), 1
  for axis in reversed(axes):
    place, stride = place + _along(axis, shape) * np.int32(stride), stride * shape[axis]
  return place


def quantile(leaves: Sequence[Array], q: Any) -> Array:
  """Returns the `q`-quantile of all leaves together, as `float32[]`, like `jnp.quantile` of their concatenation.

  The leaves are not concatenated. The quantile is interpolated linearly at the place `(size - 1) * q` of the increasing
  order. `q` may be traced. NaN counts as the least value. The place is a `float32`, and is off by up to 2^-24 of the
  size.
  """
  keys, size = [order_keys(stack) for stack in _stacks(leaves)[1]], sum(leaf.size for leaf in leaves)
  number = lambda n: counted(count(n), size)
  place = jnp.float32(size - 1) * jnp.asarray(q, jnp.float32)
  last = at_least(number(jnp.floor(place)), number(size - 1))
  below = jax.tree.map(functools.partial(jnp.where, last), number(size - 1), number(jnp.floor(place)))
  rank = minus(number(size), below)  # of the lower neighbour; the largest value has rank 1
  low = largest_key(lambda ts: [at_least(c, rank) for c in _totals([[k >= t for t in ts] for k in keys])], jnp.int32(0))
  # `high` is the next key in increasing order: `low` again if the key occurs there as well, else the least key above.
  most = jnp.int32(jnp.iinfo(jnp.int32).max)
  above = functools.reduce(jnp.minimum, [jnp.min(k, initial=most, where=k > low) for k in keys])
  larger, _ = _totals([[k > low, k == low] for k in keys])
  high = jnp.where(at_least(larger, minus(rank, number(1))) & ~last, above, low)
  low, high = key_scores(low), key_scores(high)
  return low + (place - jnp.floor(place)) * (high - low)
