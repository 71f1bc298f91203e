"""Selects the largest keys of small leaves by one loop, which compiles to few kernels.

    masks = top_n_of_rows([keys], [starts], 100)     # of a stack `[rows, ...]`, the 100 largest of all rows together
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.keys import varying
from sparsejax.types import Array
from sparsejax.wholes import along, totals

_TURN, _LEAST, _STOP, _NUMBER = range(4)  # the entries of a search


def top_n_of_rows(keys: list[Array], starts: Sequence[np.ndarray], n: Any) -> list[Array]:
  """Returns the masks of the `n` largest keys of all stacks `[rows, ...]` together, whose rows begin at `starts`.

  A single loop settles the bits of the least key that is kept, and then those of the place before which equal keys are
  kept. The loop ends as soon as the number is right: without ties, after about as many bits as tell the keys apart.

  A search is `int32[4]`: how many bits are settled, the least key, the place, and the number of entries that are kept.
  An entry is kept above the key, or equal to the key and before the place. XLA:CPU compiles a kernel for each number,
  and one for an array of numbers.
  """
  info, size = jnp.iinfo(keys[0].dtype), sum(key.size for key in keys)
  turns = info.bits + size.bit_length()

  def kept(now: Array) -> list[list[Array]]:
    turn, least, stop = (lax.index_in_dim(now, i, keepdims=False) for i in (_TURN, _LEAST, _STOP))
    stop = lax.select(turn > info.bits, stop, np.int32(size))  # all equal keys count until their places are settled
    # An iota is made anew in each turn. XLA would make its sum with the starts an array, an operand of the loop.
    places = [index_along(range(1, key.ndim), key.shape) for key in keys]
    stops = [stop - lax.expand_dims(start, range(1, key.ndim)) for key, start in zip(keys, starts)]
    return [[key > least.astype(key.dtype), (key == least.astype(key.dtype)) & (place < end)]
            for key, place, end in zip(keys, places, stops)]

  number = lambda now: sum(totals(kept(now)))

  def settle(now: Array) -> Array:
    turn = lax.index_in_dim(now, _TURN, keepdims=False)
    tied = turn >= info.bits
    # XLA would compute what does not depend on the turn before the loop, by kernels of their own.
    entry = lambda which: lax.iota(jnp.int32, 4) + turn == which + turn
    step = lax.shift_left(np.int32(1), lax.select(tied, np.int32(turns - 1), np.int32(info.bits - 1)) - turn)
    settled = entry(lax.select(tied, np.int32(_STOP), np.int32(_LEAST)))
    tried = now + entry(_TURN).astype(jnp.int32) + step * settled.astype(jnp.int32)
    found = number(tried)
    fits = (found <= n) & tied | (found >= n) & ~tied | entry(_TURN)
    return lax.select(fits, lax.select(entry(_NUMBER), lax.full_like(now, found), tried), now)

  def goes_on(now: Array) -> Array:
    turn, found = (lax.index_in_dim(now, i, keepdims=False) for i in (_TURN, _NUMBER))
    return (found != n) & (turn < turns)

  start = varying(jnp.array([0, info.min, 0, size], jnp.int32), lambda ts: [number(ts[0])])
  return [larger | equal for larger, equal in kept(lax.while_loop(goes_on, settle, start))]


def index_along(axes: Sequence[int], shape: tuple[int, ...]) -> Array:
  """Returns the index that merges `axes`, row-major, of each entry: `int32`, of length 1 along all other axes."""
  if len(axes) == 1:
    return along(axes[0], shape)
  place, stride = jnp.zeros([1] * len(shape), jnp.int32), 1
  for axis in reversed(axes):
    place, stride = place + along(axis, shape) * np.int32(stride), stride * shape[axis]
  return place
