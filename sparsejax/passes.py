"""Selects the largest scores of a leaf that no cache holds, by passes over memory that read few bytes of each score.

    least = least_key([a, b], 1000)     # the key of the 1000th largest score of both
    mask = top_n_of_large(scores, 1000)

The functions of this module take longer to compile than the passes of `ranking`, which give the same bits.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax import wholes
from sparsejax.keys import byte_of, largest_key, order_keys, varying
from sparsejax.types import Array
from sparsejax.wholes import along, at_least, minus, most, one, reduced, totals

_SAMPLE = 1 << 15  # entries of a leaf, among which a bracket of the key is looked for
_RUN = 128  # neighbouring entries that are gathered together if one of them may be at the cut
_GATHERED = 64  # a leaf has so many runs for each run that is gathered at most


def top_n_of_large(leaf: Array, n: Any) -> Array:
  """Returns the mask of the `n` largest scores of one leaf that does not fit into the caches of a processor.

  The keys are never written to memory, and ties at the cut take a single pass. Where everything is kept, as at the
  start of a ramp, nothing is read. The program takes longer to compile.
  """
  everything = at_least(n, wholes.counted(wholes.count(leaf.size), leaf.size))
  return lax.cond(everything, lambda: (leaf == leaf) | (leaf != leaf), lambda: _top_n(leaf, n))


def _top_n(leaf: Array, n: Any) -> Array:
  if wholes.one_cpu() and leaf.size <= most():
    return _top_n_by_sample(leaf, jnp.asarray(n, jnp.int32))
  least = least_key([leaf], n)
  keys = functools.partial(order_keys, leaf, keyed([leaf]))
  larger, equals = totals([[keys() > least, keys() == least]])
  return (keys() > least) | _first(lambda: keys() == least, minus(n, larger), equals)


class _Cut(NamedTuple):
  """A `_Cut` is where the search of `_top_n_by_sample` stands after a pass.

  The `n`-th largest key is one of the `low + 0`, ..., `low + span`, which are the keys of the byte `least`. `bytes`: of
  each score, ordered as the scores are. `larger`, `equals`: how many bytes are above the least, and equal to it.
  `runs`: how many bytes of each run of neighbours are equal to the least. `done`: whether few runs hold such bytes, or
  all of their keys are equal.
  """

  passes: Any
  low: Any
  span: Any
  bytes: Any
  least: Any
  larger: Any
  equals: Any
  runs: Any
  done: Any


def _top_n_by_sample(leaf: Array, n: Array) -> Array:
  """Returns what `top_n_of_large` does.

  A sample gives two keys between which the last key that is kept lies, all but surely. A pass divides what lies between
  them into as many intervals as a byte can tell apart. Counts show in which interval the key is, and whether it was
  between the two keys at all. If not, further passes settle all bits. Few runs of neighbours then hold a key of the
  interval, and they are gathered and ranked by themselves. Where they are many, a further pass divides the interval.
  """
  run = _RUN if leaf.size % _RUN == 0 else leaf.size
  rank, none = jnp.maximum(n, 1), np.int32(0)  # a mask without entries is one whose ties are all left out
  low, span = _bracket(leaf, rank)
  start = _Cut(none, low, span, jnp.zeros(leaf.shape, jnp.int8), np.int8(0), none, none,
               jnp.zeros(leaf.size // run, jnp.uint8 if run == _RUN else jnp.int32), False)
  cut = lax.while_loop(lambda cut: ~cut.done, lambda cut: _divided(leaf, rank, run, cut), start)
  # Each branch compares by itself: an operand of the branch would be 16 MB more for 16 million scores.
  exact = lambda: (cut.bytes > cut.least) | _first(lambda: cut.bytes == cut.least, n - cut.larger, cut.equals)
  return exact() if run == leaf.size else lax.cond(cut.span == 0, exact, lambda: _ranked_in_runs(leaf, n, cut))


def _bracket(leaf: Array, n: Array) -> tuple[Array, Array]:
  """Returns a key, and the most that is added to it for the key of the `n`-th largest score, as `int32` each.

  The places of the sample have equal distances. The margin is four standard deviations of the rank in a random sample.
  """
  step = max(leaf.size // _SAMPLE, 1) | 1  # odd, so that a period of the leaf, such as its width, is no bias
  keys = order_keys(lax.slice_in_dim(leaf.reshape(-1), 0, None, step), keyed([leaf]))
  share = jnp.asarray(n, jnp.float32) / leaf.size
  margin = 4 * jnp.sqrt(keys.size * share * jnp.maximum(1 - share, 0)) + 2
  ranks = jnp.stack([(share * keys.size + side * margin).astype(jnp.int32) for side in (1, -1)])
  enough = lambda ts: [c >= ranks for c in reduced([keys[None] >= t[:, None] for t in ts], 1, np.int32)]
  low, high = largest_key(enough, jnp.zeros(2, keys.dtype)).astype(jnp.int32)
  return low, high - low


def _divided(leaf: Array, n: Array, run: int, cut: _Cut) -> _Cut:
  """Returns the cut after one more pass, which divides the keys of the last interval by the bytes 1 to 254.

  The byte 0, counted from the least, is that of the keys below the interval. Bytes behind those of the interval are
  those of the keys above.
  """
  keys = order_keys(lax.optimization_barrier((leaf, cut.passes))[0], keyed([leaf]))
  kind, info = keys.dtype, jnp.iinfo(keys.dtype)
  shift, last = _shift_of(cut.span)
  width = jnp.left_shift(np.int32(1), shift)
  origin = jnp.where(cut.low < info.min + width, info.min, cut.low - width)
  bytes_ = byte_of(keys, origin.astype(kind), shift.astype(kind))
  least = largest_key(functools.partial(_enough, bytes_, n), jnp.int8(0), skip=(8 - _bits(last + 2)) // 2)
  interval = least.astype(jnp.int32) + 128
  missed = (cut.passes == 0) & ((interval == 0) | (interval > last + 1))
  # A branch reads the bytes, where XLA would compute them anew from the scores.
  larger, runs = lax.cond(missed, lambda: [jnp.zeros_like(cut.runs)] * 2, lambda: reduced(
      [mask.reshape(-1, run) for mask in (bytes_ > least, bytes_ == least)], 1, cut.runs.dtype.type))
  larger, equals = jnp.sum(larger, dtype=jnp.int32), jnp.sum(runs, dtype=jnp.int32)
  few = jnp.sum(runs > 0, dtype=jnp.int32) <= _most_runs(runs) if run < leaf.size else False
  low = jnp.where(missed, info.min, origin + jnp.left_shift(interval, shift))
  span = jnp.where(missed, np.int32(-1 if info.bits == 32 else 2**16 - 1), width - 1)
  return _Cut(cut.passes + 1, low, span, bytes_, least, larger, equals, runs, ~missed & (few | (shift == 0)))


def _shift_of(span: Array) -> tuple[Array, Array]:
  """Returns the least shift for which intervals have bytes from 1 to 254, and the number of intervals less one."""
  shift = jnp.maximum(_bits(span) - 8, 0)
  shift += (lax.shift_right_logical(span, shift) > 253).astype(jnp.int32)
  return shift, lax.shift_right_logical(span, shift)


def _bits(number: Array) -> Array:
  return 32 - lax.clz(jnp.asarray(number))


def _most_runs(runs: Array) -> int:
  return max(runs.size // _GATHERED, 1)


def _ranked_in_runs(leaf: Array, n: Array, cut: _Cut) -> Array:
  """Returns the mask where few runs have a key of the byte `least`: only these runs are ranked by all of their bits.

  Runs are gathered in the order of the leaf, so that the ties at the cut are in this order, too.
  """
  # A sort of numbers takes two thirds of the time of `jnp.nonzero`, and compiles ten times as fast.
  places = jnp.where(cut.runs > 0, along(0, cut.runs.shape), cut.runs.size)
  index = lax.slice_in_dim(lax.sort(places, is_stable=False), 0, _most_runs(cut.runs))
  scores = leaf.reshape(-1, _RUN).at[index].get(mode='fill', fill_value=0)
  keys = order_keys(scores, keyed([leaf])).astype(jnp.int32)
  end = jnp.where(cut.low + cut.span < cut.low, jnp.iinfo(jnp.int32).max, cut.low + cut.span)
  held = (keys >= cut.low) & (keys <= end) & (index < cut.runs.size)[:, None]
  places, wanted = jnp.where(held, keys - cut.low, -1), n - cut.larger
  place = _largest(lambda ts: _enough(places, wanted, ts), cut.span)
  equal, order = places == place, along(0, (keys.size,)).reshape(keys.shape)
  larger, equals = totals([[places > place, equal]])
  fits = wanted - larger >= equals
  before = lambda ts: [count <= wanted - larger for count in totals([[equal & (order < t) for t in ts]])]
  stop = _largest(before, jnp.where(fits, 0, np.int32(keys.size)))
  kept = (places > place) | (equal & (fits | (order < stop))) | (keys > end)
  mask = cut.bytes.reshape(-1, _RUN) > cut.least
  return mask.at[index].set(kept, mode='drop', indices_are_sorted=True).reshape(leaf.shape)


def _largest(enough: Callable[[list[Array]], list[Array]], most: Any) -> Array:
  """Returns the largest number of as many bits as `most` for which `enough` is `True`, or 0, as `int32[]`."""
  least = np.int32(-2**31)
  return largest_key(lambda ts: enough([t - least for t in ts]), jnp.int32(0), skip=(32 - _bits(most)) // 2) - least


def _enough(keys: Array, n: Array, tried: list[Array]) -> list[Array]:
  """Returns whether at least `n` of the keys are as large as each key that is tried."""
  return [count >= n for count in totals([[keys >= t for t in tried]])]


def keyed(leaves: Sequence[Array]) -> Any:
  """Returns the dtype whose bits order all leaves: bfloat16 or float16 if all leaves have this dtype, else float32."""
  dtypes = {leaf.dtype for leaf in leaves}
  return dtypes.pop() if dtypes in ({jnp.dtype(jnp.bfloat16)}, {jnp.dtype(jnp.float16)}) else jnp.dtype(jnp.float32)


def least_key(leaves: Sequence[Array], n: Any) -> Array:
  """Returns the key of the `n`-th largest score of all leaves, or the least integer if there are fewer scores.

  Each byte of the key is settled by passes over one byte of each score, a quarter of the memory of the scores.
  """
  dtype = keyed(leaves)
  kind = jnp.dtype(jnp.int32 if dtype.itemsize == 4 else jnp.int16).type

  def enough(keys):
    return lambda ts: [at_least(c, n) for c in totals([[k >= t for t in ts] for k in keys])]

  def settle_byte(i, key):
    shift = jnp.asarray(8 * (dtype.itemsize - 1 - i), kind)
    # To compute the keys anew for each byte takes less time than to read keys, and no memory. Without the barrier, XLA
    # computes them once before the loop.
    anew = lax.optimization_barrier((leaves, i))[0]
    byte = largest_key(enough([byte_of(order_keys(leaf, dtype), key, shift) for leaf in anew]), jnp.int8(0))
    return key + jnp.left_shift(byte.astype(kind) + kind(128), shift)

  start = varying(jnp.asarray(jnp.iinfo(kind).min, kind), enough([order_keys(leaf, dtype) for leaf in leaves]))
  size = sum(leaf.size for leaf in leaves)
  everything = at_least(n, wholes.counted(wholes.count(size), size))  # as at the start of a ramp: no pass is needed
  return lax.fori_loop(jnp.where(everything, dtype.itemsize, 0), dtype.itemsize, settle_byte, start)


def _first(mask: Callable[[], Array], n: Any, total: Any) -> Array:
  """Returns the mask of the first `n` entries, in row-major order, of the `total` entries that are `True` in `mask()`.

  The mask is a function, so that XLA computes the mask anew in each pass, and a branch that is not taken needs none.
  """
  fits, shape = at_least(n, total), jax.eval_shape(mask).shape
  decided, whole = fits | ~at_least(n, one(n)), jnp.where(fits, jnp.asarray(shape, jnp.int32), 0)
  if wholes.one_cpu() and 0 < math.prod(shape) <= most():
    stop = lax.cond(decided, lambda: whole, lambda: _stop_in_rows(mask(), n))
    return _before(mask(), fits, stop)
  return _before(mask(), fits, _stop(mask(), n, fits, decided, whole))


def _before(mask: Array, fits: Array, stop: Array) -> Array:
  """Returns the entries of `mask` whose multi-index comes before `stop`; all entries if `fits`."""
  earlier = fits
  for axis in reversed(range(mask.ndim)):
    place = along(axis, mask.shape)
    earlier = (place < stop[axis]) | ((place == stop[axis]) & earlier)
  return mask & earlier


def _stop_in_rows(mask: Array, n: Array) -> Array:
  """Returns the multi-index of the entry of `mask` that `n` entries precede, as `int32[ndim]`.

  A single pass counts the entries at each index of the first axis. The rest happens within the index that is cut.
  """
  stop: list[Array] = []
  for length in mask.shape:
    rows = mask.reshape(length, -1)
    kept, left = reduced([rows, ~rows], 1, np.int32)
    # The sum is `kept`, but XLA:CPU makes a tree of windows where `kept` is alone.
    at, before = _cut((kept - left + rows.shape[1]) >> 1, n)
    stop, n, mask = [*stop, at], n - before, lax.dynamic_index_in_dim(mask, at, 0, keepdims=False)
  return jnp.stack(stop)


def _cut(counts: Array, n: Array) -> tuple[Array, Array]:
  """Returns the index of the count that is cut if `n` are taken in order, and the sum of the counts before it."""
  place = along(0, counts.shape)
  before = lambda at: jnp.sum(jnp.where(place < at, counts, 0), dtype=jnp.int32)
  stop = largest_key(lambda ats: [before(at) <= n for at in ats], jnp.int32(0))
  return stop, before(stop)


def _stop(mask: Array, n: Any, fits: Array, decided: Array, whole: Array) -> Array:
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
    counts = totals([[_before(mask, fits, s) for s in stops]])
    return stop + step * sum((at_least(n, c) & jnp.all(s >= 0)).astype(jnp.int32) for s, c in zip(stops, counts))

  return lax.fori_loop(jnp.where(decided, len(steps), 0), len(steps), settle_digit, whole)
