"""Increasing places in a row as the gaps between them, a byte each.

The array code beneath `formats.RelativeIndexArray`. A gap is the number of places skipped since the last one, or since
the beginning. A byte below 255 ends a gap; 255 says: skip 255 places and read on. So every row of places has one code.
"""

import jax.numpy as jnp
import numpy as np

from sparsejax.types import Array

_ON = 255


def encoded(places: np.ndarray) -> np.ndarray:
  """The code of increasing `places`, `uint8`, on the host."""
  escapes, last = np.divmod(np.diff(places, prepend=-1) - 1, _ON)
  ends = np.cumsum(escapes + 1) - 1
  code = np.full(ends[-1] + 1 if len(ends) else 0, _ON, np.uint8)
  code[ends] = last
  return code


def stored(code: Array, size: int) -> Array:
  """Which of `size` places are in `code`: `bool[size]`."""
  ends = code != _ON
  places = jnp.cumsum(code.astype(jnp.int32) + ends.astype(jnp.int32)) - 1
  return jnp.zeros(size, bool).at[jnp.where(ends, places, size)].set(True, mode='drop')


def misfit(code: np.ndarray, count: int, size: int) -> str | None:
  """Why `code` is none of `count` places below `size`."""
  ends = int(np.count_nonzero(code != _ON))
  reach = int(np.sum(code, dtype=np.int64)) + ends
  if ends != count or len(code) and code[-1] == _ON or reach > size:
    return f'its gaps end {ends} times, reach place {reach} of {size}, and are for {count} values.'
  return None
