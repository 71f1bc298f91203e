"""Selects the largest keys of small leaves by one loop, which compiles to few kernels.

    masks = top_n_of_rows([keys], [starts], 100)     # of a stack `[rows, ...]`, the 100 largest of all rows together
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.keys import varying
from sparsejax.types import Array
from sparsejax.wholes import along, totals


class _Search(NamedTuple):
  """A `_Search` is where the search of `top_n_of_rows` stands after `turn` bits.

  `number`: how many entries are above `least`, or equal to it and before the place `stop`.
  """

  turn: Any
  least: Any
  stop: Any
  number: Any


def top_n_of_rows(keys: list[Array], starts: Sequence[np.ndarray], n: Any) -> list[Array]:
  """Returns the masks of the `n` largest keys of all stacks `[rows, ...]` together, whose rows begin at `starts`.

  A single loop settles the bits of the least key that is kept, and then those of the place before which equal keys are
  kept. The loop ends as soon as the number is right: without ties, after about as many bits as tell the keys apart.
  """
  info, size = jnp.iinfo(keys[0].dtype), sum(key.size for key in keys)
  turns = info.bits + size.bit_length()
  places = [index_along(range(1, key.ndim), key.shape) + lax.expand_dims(start, range(1, key.ndim))
            for key, start in zip(keys, starts)]

  def kept(least: Array, stop: Array) -> list[list[Array]]:
    least = least.astype(info.dtype)
    return [[key > least, (key == least) & (place < stop)] for key, place in zip(keys, places)]

  def settle(now: _Search) -> _Search:
    tied, stop = now.turn >= info.bits, jnp.where(now.turn == info.bits, 0, now.stop)
    step = jnp.left_shift(np.int32(1), jnp.where(tied, turns - 1, info.bits - 1) - now.turn)
    tried = jnp.where(tied, now.least, now.least + step), jnp.where(tied, stop + step, size)
    number = sum(totals(kept(*tried)))
    fits = jnp.where(tied, number <= n, number >= n)
    old = now.least, stop, now.number
    return _Search(now.turn + 1, *(jnp.where(fits, a, b) for a, b in zip((*tried, number), old)))

  start = _Search(*map(np.int32, (0, info.min, size, size)))
  start = jax.tree.map(lambda x: varying(jnp.asarray(x), lambda _: totals(kept(start.least, start.stop))), start)
  found = lax.while_loop(lambda now: (now.number != n) & (now.turn < turns), settle, start)
  return [larger | equal for larger, equal in kept(found.least, found.stop)]


def index_along(axes: Sequence[int], shape: tuple[int, ...]) -> Array:
  """Returns the index that merges `axes`, row-major, of each entry: `int32`, of length 1 along all other axes."""
  place, stride = jnp.zeros([1] * len(shape), jnp.int32), 1
  for axis in reversed(axes):
    place, stride = place + along(axis, shape) * np.int32(stride), stride * shape[axis]
  return place
