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
import itertools
import math
import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import kinds, rows, wholes
from sparsejax.keys import key_scores, largest_key, order_keys
from sparsejax.networks import top_n_by_network
from sparsejax.passes import keyed, least_key, top_n_of_large
from sparsejax.searches import index_along, top_n_of_rows
from sparsejax.types import Array
from sparsejax.wholes import Count, along, at_least, count, counted, minus, most, one, plus, totals

__all__ = ['Count', 'at_least', 'count', 'key_scores', 'minus', 'number', 'order_keys', 'plus', 'quantile',
           'shares_of_leaves', 'top_n', 'top_n_in_groups', 'top_n_of_leaves']

# Counting costs m comparisons for each entry of a group of m; bisection costs about 31 passes over memory. On a 2-core
# CPU, for 4096 x 4096 float32, counting takes half the time of bisection at m = 64, and twice the time at m = 128.
_COUNT_MOST = 64
# A network takes 0.4 of the time of counting at m = 32, 0.8 at m = 16, and compiles for twice as long.
_NETWORK = range(17, 33)
LARGE = 1 << 20  # scores that take passes which read few bytes: below, a program that compiles fast


def top_n_in_groups(scores: Array, n: Any, m: int, axis: int) -> Array:
  """Returns the mask of the `n` largest scores in each group of `m` neighbours along `axis`.

  `n` may be traced. The caller must make sure that `m` divides the length of the axis.
  """
  axis, shape = axis % scores.ndim, scores.shape
  keys = order_keys(scores, keyed([scores])).reshape(shape[:axis] + (shape[axis] // m, m) + shape[axis + 1:])
  if m in _NETWORK and isinstance(n, (int, np.integer)) and 0 < n < m and axis < scores.ndim - 1 and _on_one_cpu(keys):
    return top_n_by_network(keys, int(n), axis + 1).reshape(shape)
  pick = _count_in_groups if m <= _COUNT_MOST else _bisect_groups
  return pick(keys, jnp.asarray(n, jnp.int32), along(axis + 1, keys.shape), axis + 1).reshape(shape)


def _on_one_cpu(keys: Array) -> bool:
  return wholes.one_cpu() and keys.size > 0


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
  of one shape, dtype and sharding are stacked, and other leaves are not concatenated. Devices exchange only counts.
  """
  return _top_n_of_leaves(list(leaves), counted(count(n), sum(leaf.size for leaf in leaves)))


def shares_of_leaves(leaves: Sequence[Array], n: Any) -> list[Count]:
  """Returns how many of the `n` largest scores of all leaves each leaf has: the sums of `top_n_of_leaves`."""
  return _shares_of_leaves(list(leaves), counted(count(n), sum(leaf.size for leaf in leaves)))


def number(mask: Array) -> Count:
  """Returns the number of `True` entries of a mask."""
  return count(totals([[mask]])[0])


# The selection is a single program outside of `jit` too. Each sum of a sharded leaf waits for all devices. Many such
# programs in flight have deadlocked XLA:CPU with more devices than cores.
@functools.partial(jax.jit, inline=True)
def _top_n_of_leaves(leaves: list[Array], n: Any) -> list[Array]:
  if _small(leaves):
    groups, keys = _rows(leaves)
    return _of_leaves(leaves, groups, top_n_of_rows(keys, _starts(leaves, groups), n))
  if len(leaves) == 1 and leaves[0].size >= LARGE:
    return [top_n_of_large(leaves[0], n)]
  groups, keys, least, counts = _ranked(leaves, n)
  missing = _missing(n, groups, counts)
  masks = [(k > least) | _first(k == least, each, equals) for k, each, (_, equals) in zip(keys, missing, counts)]
  return _of_leaves(leaves, groups, masks)


def stacks(leaves: Sequence[Array]) -> bool:
  """Returns whether `top_n_of_leaves` reads each leaf once, to copy the leaf into a stack with others."""
  return _small(leaves) and all(len(places) > 1 for places in _alike(leaves))


def _small(leaves: Sequence[Array]) -> bool:
  return sum(leaf.size for leaf in leaves) < min(LARGE, most())


def _of_leaves(leaves: Sequence[Array], groups: Sequence[Sequence[int]], masks: Sequence[Array]) -> list[Array]:
  """Returns the mask of each leaf; `masks` holds one array `[rows, ...]` for each stack, with a row for each leaf."""
  found = dict(zip(itertools.chain(*groups), itertools.chain(*map(kinds.apart, masks))))
  return [rows.from_rows(found[i], leaf.shape, found[i].size) for i, leaf in enumerate(leaves)]


@functools.partial(jax.jit, inline=True)
def _shares_of_leaves(leaves: list[Array], n: Any) -> list[Count]:
  found: dict[int, Any] = {}
  if _small(leaves):
    groups, keys = _rows(leaves)
    masks = top_n_of_rows(keys, _starts(leaves, groups), n)
    for places, key, mask in zip(groups, keys, masks):
      found |= zip(places, kinds.apart(_of_rows([mask & (key > jnp.iinfo(key.dtype).min)], False)[0]))
    return [count(found[i]) for i in range(len(leaves))]
  groups, _, _, counts = _ranked(leaves, n)
  for places, missing, (larger, equals) in zip(groups, _missing(n, groups, counts), counts):
    none = jax.tree.map(jnp.zeros_like, equals)
    ties = _where(at_least(missing, none), _where(at_least(equals, missing), missing, equals), none)
    found |= zip(places, kinds.apart(minus(larger, minus(none, ties))))
  return [count(found[i]) for i in range(len(leaves))]


def _where(condition: Array, a: Any, b: Any) -> Any:
  return jax.tree.map(functools.partial(jnp.where, condition), a, b)


def _ranked(leaves: Sequence[Array], n: Any) -> tuple[list[list[int]], list[Array], Array, list[list[Any]]]:
  """Returns the places of the leaves of each stack, the keys of each stack, and the `n`-th largest of all keys.

  The last result holds the numbers of keys above the `n`-th largest, and of keys equal to it, `[rows]` for each stack.
  """
  groups, stacks = _stacks(leaves)
  keys, least = [order_keys(stack, keyed(stacks)) for stack in stacks], least_key(stacks, n)
  return groups, keys, least, [_of_rows([k > least, k == least], isinstance(n, Count)) for k in keys]


def _starts(leaves: Sequence[Array], groups: Sequence[Sequence[int]]) -> list[np.ndarray]:
  """Returns how many entries the leaves before each leaf have together, `int32[rows]` for each stack."""
  starts = np.cumsum([0, *(leaf.size for leaf in leaves)]).astype(np.int32)
  return [starts[list(places)] for places in groups]


def _stacks(leaves: Sequence[Array]) -> tuple[list[list[int]], list[Array]]:
  """Returns the places of the leaves of each kind, and the leaves of each kind as one array, `[leaves, ...]`.

  A leaf that is too large for 32-bit counts is a kind of its own.
  """
  groups = []
  for places in kinds.of(leaves):
    first = leaves[places[0]]
    groups += [places] if first.size <= most() and kinds.stackable(first) else [[i] for i in places]
  return groups, [kinds.together([leaves[i] for i in places]) for places in groups]


def _rows(leaves: Sequence[Array]) -> tuple[list[list[int]], list[Array]]:
  """Returns what `_stacks` does, with the keys in the place of the leaves, for leaves that are written as rows.

  The key behind the last entry of a row is below that of NaN. A leaf that cannot be stacked stays as it is, and a leaf
  on a mesh is stacked with leaves of its own type alone: another shape would be moved between the devices.
  """
  groups, widths, dtype = _alike(leaves), rows.widths([leaf.size for leaf in leaves]), keyed(leaves)

  def stack(places: list[int]) -> Array:
    scores = [leaves[i].astype(dtype) for i in places]
    if len({x.shape for x in scores}) == 1:
      return order_keys(kinds.together(scores), dtype)
    keys = order_keys(kinds.together([rows.as_row(x, x.shape, widths[i]) for i, x in zip(places, scores)]), dtype)
    sizes = np.array([[leaves[i].size] for i in places], np.int32)
    return jnp.where(along(1, keys.shape) < sizes, keys, jnp.iinfo(keys.dtype).min)

  return groups, list(map(stack, groups))


def _alike(leaves: Sequence[Array]) -> list[list[int]]:
  """Returns the places of the leaves of each stack of `_rows`."""
  found: dict[Any, list[int]] = {}
  for i, (leaf, width) in enumerate(zip(leaves, rows.widths([leaf.size for leaf in leaves]))):
    alike: Any = width if jax.typeof(leaf).sharding.mesh.size < 2 else jax.typeof(leaf)
    found.setdefault(alike if kinds.stackable(leaf) else (i,), []).append(i)
  return list(found.values())


def _of_rows(masks: Sequence[Array], wide: bool) -> list[Any]:
  """Returns the numbers of `True` entries in each row of masks `[rows, ...]`; with `wide`, as a `Count`."""
  numbers = jax.vmap(lambda *row: totals([row]))(*masks)
  return [Count(jnp.zeros_like(n), n) if wide and not isinstance(n, Count) else n for n in numbers]


def _missing(n: Any, groups: Sequence[Sequence[int]], counts: Sequence[Sequence[Any]]) -> list[Any]:
  """Returns how many of its scores with the least key each leaf keeps, `[rows]` for each stack.

  `counts`: the numbers of scores above the least key, and with the least key, `[rows]` for each stack. Earlier leaves
  keep theirs first, so that a number may be larger than there are scores, or negative.
  """
  place = np.concatenate(groups)  # of each row among the leaves
  if len(place) == 1:
    return [minus(jax.tree.map(lambda word: jnp.asarray(word)[None], n), counts[0][0])]
  larger, equals = (jax.tree.map(lambda *each: jnp.concatenate(each), *of_stacks) for of_stacks in zip(*counts))
  moved = np.any(np.diff(place) < 0)  # the stacks are not in the order of the leaves
  placed = lambda words, index: jax.tree.map(operator.itemgetter(index), words) if moved else words
  _, missing = _taken(_taken(jax.tree.map(jnp.asarray, n), larger)[0], placed(equals, np.argsort(place)))
  ends = np.cumsum(list(map(len, groups)))
  part = lambda first, end: jax.tree.map(lambda word: lax.slice_in_dim(word, first, end), placed(missing, place))
  return [part(int(end) - len(places), int(end)) for places, end in zip(groups, ends)]


def _taken(n: Any, counts: Any) -> tuple[Any, Any]:
  """Returns what is left of `n` after all of the counts `[rows]` are taken away, and before each of them, `[rows]`."""
  return lax.scan(lambda left, taken: (minus(left, taken), left), n, counts)


def _first(mask: Array, n: Any, total: Any) -> Array:
  """Returns the mask of the first `n[i]` entries, in row-major order, of the `total[i]` that are `True` in `mask[i]`.

  Bisection settles the index at which the mask of a row stops. A row has several indices if one would not fit 32 bits.
  """
  indices = _indices(mask.shape)
  lengths = np.array([math.prod(mask.shape[a] for a in axes) for axes in indices], np.int32)
  places = [index_along(axes, mask.shape) for axes in indices]
  steps = np.array([[1 << shift if j == i else 0 for j in range(len(indices))] for i, length in enumerate(lengths)
                    for shift in reversed(range(0, max(int(length), 1).bit_length(), 2))], np.int32)

  def before(stop):  # `[indices, rows]`
    earlier: Any = None
    for place, end in reversed(list(zip(places, stop))):
      end = lax.expand_dims(end, range(1, mask.ndim))
      earlier = place < end if earlier is None else (place < end) | ((place == end) & earlier)
    return mask & earlier

  def settle_digit(i, stop):
    step = lax.dynamic_index_in_dim(steps, i, 0, keepdims=False, allow_negative_indices=False)[:, None]
    stops = [stop + digit * step for digit in (1, 2, 3)]
    fit = [at_least(n, c) & (functools.reduce(jnp.minimum, s) >= 0)
           for s, c in zip(stops, _of_rows([before(s) for s in stops], isinstance(n, Count)))]
    return stop + step * sum(f.astype(jnp.int32) for f in fit)[None]

  fits = at_least(n, total)
  decided = fits | ~at_least(n, one(n))
  stop = jnp.where(fits, lengths[:, None], 0)
  return before(lax.fori_loop(jnp.where(jnp.all(decided), len(steps), 0), len(steps), settle_digit, stop))


def _indices(shape: tuple[int, ...]) -> list[list[int]]:
  """Returns the axes that each index of an entry of a row merges. A row that fits 32 bits has a single index."""
  indices: list[list[int]] = [[]]
  size = 1
  for axis, length in list(enumerate(shape))[1:]:
    if size * length > most():
      indices, size = [*indices, []], 1
    indices[-1].append(axis)
    size *= length
  return [axes for axes in indices if axes] or [[]]


def quantile(leaves: Sequence[Array], q: Any) -> Array:
  """Returns the `q`-quantile of all leaves together, as `float32[]`, like `jnp.quantile` of their concatenation.

  The leaves are not concatenated. The quantile is interpolated linearly at the place `(size - 1) * q` of the increasing
  order. `q` may be traced. NaN counts as the least value. The place is a `float32`, and is off by up to 2^-24 of the
  size.
  """
  leaves = [leaf.astype(jnp.float32) for leaf in leaves]  # keys of two bytes are no scores
  keys = _rows(leaves)[1] if _small(leaves) else [order_keys(stack) for stack in _stacks(leaves)[1]]
  size = sum(leaf.size for leaf in leaves)
  whole = lambda n: counted(count(n), size)
  place = jnp.float32(size - 1) * jnp.asarray(q, jnp.float32)
  last = at_least(whole(jnp.floor(place)), whole(size - 1))
  below = jax.tree.map(functools.partial(jnp.where, last), whole(size - 1), whole(jnp.floor(place)))
  rank = minus(whole(size), below)  # of the lower neighbour; the largest value has rank 1
  low = largest_key(lambda ts: [at_least(c, rank) for c in totals([[k >= t for t in ts] for k in keys])], jnp.int32(0))
  # `high` is the next key in increasing order: `low` again if the key occurs there as well, else the least key above.
  larger, above = _above(keys, low)
  high = jnp.where(at_least(larger, minus(rank, whole(1))) & ~last, above, low)
  low, high = key_scores(low), key_scores(high)
  return low + (place - jnp.floor(place)) * (high - low)


def _above(keys: Sequence[Array], low: Array) -> tuple[Any, Array]:
  """Returns how many keys are above `low`, and the least of them, or the largest integer if there is none."""
  most = np.int32(jnp.iinfo(jnp.int32).max)
  if wholes.one_cpu() and sum(key.size for key in keys) < LARGE:
    # XLA:CPU compiles one kernel of this, and several of each sum and each minimum.
    both = lambda a, b: (a[0] + b[0], jnp.minimum(a[1], b[1]))
    found = [lax.reduce(((k > low).astype(jnp.int32), jnp.where(k > low, k, most)), (np.int32(0), most), both,
                        range(k.ndim)) for k in keys]
    return functools.reduce(both, found)
  larger, _ = totals([[k > low, k == low] for k in keys])
  return larger, functools.reduce(jnp.minimum, [jnp.min(k, initial=most, where=k > low) for k in keys])
