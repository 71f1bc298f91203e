"""Integers that are ordered as scores are, so that scores are compared by their bits, and bisected bit by bit.

    keys = order_keys(scores)                                             # int32, NaN below -inf, and -0.0 equal to 0.0
    largest_key(lambda ts: [(keys >= t).sum() >= n for t in ts], keys[0])  # the key of the n-th largest score
    key_scores(keys)                                                      # the scores
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.types import Array


def order_keys(scores: Array, dtype: Any = jnp.float32) -> Array:
  """Returns integer keys, shaped like `scores`, that are ordered as the scores are; NaN gets the key below -inf.

  The score with the larger key ranks first. Keys are the `int32` of the scores as `float32`: exact for float32,
  bfloat16, float16 and float8; a float64 score is compared as float32. If `dtype` has two bytes, the scores are cast to
  `dtype`, and keys are `int16`.
  """
  # The keys are computed from the bits alone: XLA:CPU compares floats below the normal range as zeros. In groups of
  # four the keys are most of the work, so that the sign is applied by two operations without a selection.
  kind = jnp.int32 if jnp.dtype(dtype).itemsize == 4 else jnp.int16
  infinity, most = np.array(np.inf, dtype).view(kind), kind(jnp.iinfo(kind).max)
  bits = lax.bitcast_convert_type(scores.astype(dtype), kind)
  magnitude, sign = bits & most, bits >> (jnp.iinfo(kind).bits - 1)
  return lax.select(magnitude > infinity, lax.full_like(bits, -infinity - kind(1)), (magnitude ^ sign) - sign)


def key_scores(keys: Array) -> Array:
  """Returns the `float32` scores that have these `int32` keys; the key of NaN gives NaN."""
  return lax.bitcast_convert_type(jnp.where(keys < 0, jnp.int32(jnp.iinfo(jnp.int32).min) - keys, keys), jnp.float32)


def largest_key(enough: Callable[[list[Array]], list[Array]], like: Array, bits: int = 2, skip: Any = 0) -> Array:
  """Returns the largest key for which `enough` is `True`, elementwise, in the shape and dtype of `like`.

  If `enough` is `True` for no key, the result is the least key. `enough` maps a list of `2^bits - 1` increasing keys to
  a list of bools; each call settles `bits` bits. `enough` must be `False` above every key for which it is `False`. If
  `enough` says that at least `n` entries are as large as the key, the result is the `n`-th largest key, counted from 1.
  `skip`: how many of the calls are left out, because the bits that they settle are known to be those of the least key.
  """
  info = jnp.iinfo(like.dtype)

  def settle_bits(i, t):
    step = jnp.left_shift(like.dtype.type(1), jnp.asarray(info.bits - bits - bits * i, like.dtype))
    return t + step * sum(hold.astype(like.dtype) for hold in enough([t + k * step for k in range(1, 2**bits)]))

  return lax.fori_loop(skip, info.bits // bits, settle_bits, varying(jnp.full_like(like, info.min), enough))


def varying(keys: Array, enough: Callable[[list[Array]], list[Array]]) -> Array:
  """Returns `keys`, as an array that varies between the devices of a `shard_map` as the answers of `enough` do."""
  if not jax.sharding.get_abstract_mesh().manual_axes:
    return keys
  # The carry of a loop must vary from the start. XLA removes the product with zero, and with it the call.
  return keys + 0 * enough([keys])[0].astype(keys.dtype)


def byte_of(keys: Array, prefix: Array, shift: Array) -> Array:
  """Returns the byte of each key above `shift`, as `int8` in increasing order; `prefix` has the bytes before it.

  A key below all keys with this prefix gets the least byte, and one above all of them the largest.
  """
  last = prefix + (jnp.left_shift(prefix.dtype.type(1), shift + 8) - 1)  # the shift leaves 0 for the first byte
  last = jnp.where(last < prefix, prefix.dtype.type(jnp.iinfo(prefix.dtype).max), last)
  return (lax.shift_right_logical(lax.clamp(prefix, keys, last) - prefix, shift) ^ 128).astype(jnp.int8)
