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
_LAST = 6  # bits that are settled last, by the bytes of which the mask is made, too


def top_n_of_large(leaf: Array, n: Any) -> Array:
  """Returns the mask of the `n` largest scores of one leaf that does not fit into the caches of a processor.

  The keys are never written to memory, and ties at the cut take a single pass. Where everything is kept, as at the
  start of a ramp, nothing is read. The program takes longer to compile.
  """
  everything = at_least(n, wholes.counted(wholes.count(leaf.size), leaf.size))
  return lax.cond(everything, lambda: (leaf == leaf) | (leaf != leaf), lambda: _top_n(leaf, n))


def _top_n(leaf: Array, n: Any) -> Array:
  if keyed([leaf]).itemsize == 4 and wholes.one_cpu() and leaf.size <= most():
    return _top_n_by_sample(leaf, jnp.asarray(n, jnp.int32))
  least = least_key([leaf], n)
  keys = functools.partial(order_keys, leaf, keyed([leaf]))
  larger, equals = totals([[keys() > least, keys() == least]])
  return (keys() > least) | _first(lambda: keys() == least, minus(n, larger), equals)


class _Cut(NamedTuple):
  """A `_Cut` is where the search of `_top_n_by_sample` stands: how many times it ran, and what the last run found.

  `bytes`: of each score, ordered as the scores around the cut are. `least`: the byte of the last score that is kept.
  `larger`, `equals`: how many bytes are above the least, and equal to it.
  """

  runs: Any
  bytes: Any
  least: Any
  larger: Any
  equals: Any


def _top_n_by_sample(leaf: Array, n: Array) -> Array:
  """Returns what `top_n_of_large` does, of keys of four bytes.

  A sample gives two keys between which the last key that is kept lies, all but surely. Only the bits in which the two
  keys differ are settled. The counts show whether the key was there. If not, a second run settles all bits.
  """
  everything = n >= leaf.size  # as at the start of a ramp: no pass is needed
  low, differ = _bracket(leaf, n)

  def run(cut: _Cut) -> _Cut:
    first = jnp.where((cut.runs > 0) | everything, jnp.iinfo(jnp.int32).min, low)
    bits = jnp.where(everything, 0, jnp.where(cut.runs > 0, 32, differ))
    return _run(cut.runs, lax.optimization_barrier((leaf, cut.runs))[0], n, first, bits)

  missed = lambda cut: (cut.runs == 1) & ~everything & ((cut.larger >= n) | (cut.larger + cut.equals < n))
  start = _Cut(np.int32(0), jnp.zeros(leaf.shape, jnp.int8), np.int8(0), np.int32(0), np.int32(0))
  cut = lax.while_loop(lambda cut: (cut.runs == 0) | missed(cut), run, start)
  return (cut.bytes > cut.least) | _first(lambda: cut.bytes == cut.least, n - cut.larger, cut.equals)


def _bracket(leaf: Array, n: Array) -> tuple[Array, Array]:
  """Returns a key, and the number of bits of what is added to it for the key of the `n`-th largest score.

  The places of the sample have equal distances. The margin is six standard deviations of the rank in a random sample.
  """
  step = max(leaf.size // _SAMPLE, 1) | 1  # odd, so that a period of the leaf, such as its width, is no bias
  keys = order_keys(lax.slice_in_dim(leaf.reshape(-1), 0, None, step))
  share = jnp.asarray(n, jnp.float32) / leaf.size
  margin = 6 * jnp.sqrt(keys.size * share * jnp.maximum(1 - share, 0)) + 2
  ranks = [(share * keys.size + side * margin).astype(jnp.int32) for side in (1, -1)]
  low, high = (largest_key(functools.partial(_enough_of, keys, rank), jnp.int32(0)) for rank in ranks)
  bits = 32 - lax.clz(high - low)
  all_bits = bits > 24
  return jnp.where(all_bits, jnp.iinfo(jnp.int32).min, low), jnp.where(all_bits, 32, bits)


def _enough_of(keys: Array, n: Array, tried: list[Array]) -> list[Array]:
  """Returns whether at least `n` of few keys are as large as each key that is tried."""
  return [jnp.sum(keys >= t, dtype=jnp.int32) >= n for t in tried]


def _run(runs: Array, leaf: Array, n: Array, first: Array, bits: Array) -> _Cut:
  """Returns the cut at the `n`-th largest score, if its key is `first` or more by a number of so many `bits`.

  The last bits are settled within 256 neighbouring keys, of which a quarter in the middle may be the key. The bytes of
  other keys are then others.
  """
  def settle_byte(now: tuple[Array, Array]) -> tuple[Array, Array]:
    key, left = now
    shift = jnp.maximum(left - 8, _LAST)
    bytes_ = byte_of(order_keys(lax.optimization_barrier((leaf, left))[0]), key, shift)
    byte = largest_key(lambda ts: _enough(bytes_, ts, n), jnp.int8(0), skip=(8 - left + shift) // 2)
    return key + jnp.left_shift(byte.astype(jnp.int32) + 128, shift), shift

  key, left = lax.while_loop(lambda now: now[1] > _LAST, settle_byte, (first, bits))
  info = jnp.iinfo(jnp.int32)
  base = lax.clamp(jnp.int32(info.min), jnp.maximum(key, info.min + 64) - 64, jnp.int32(info.max - 255))
  bytes_ = byte_of(order_keys(leaf), base, jnp.int32(0))
  moved = lambda t: (t.astype(jnp.int32) + (key - base)).astype(jnp.int8)
  enough = lambda ts: _enough(bytes_, [moved(t) for t in ts], n)
  least = moved(largest_key(enough, jnp.int8(0), skip=(8 - jnp.minimum(left, _LAST)) // 2))
  larger, equals = totals([[bytes_ > least, bytes_ == least]])
  return _Cut(runs + 1, bytes_, least, larger, equals)


def _enough(keys: Array, tried: list[Array], n: Array) -> list[Array]:
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
