"""Encodes increasing positions as the gaps between them, one byte each.

    gaps.encoded(np.array([0, 2, 300]))   # [0, 1, 255, 42]

`formats.RelativeIndexArray` stores the code. A gap is the number of positions skipped since the last position, or since
the beginning. A byte below 255 ends a gap. A byte of 255 skips 255 positions, and the next byte continues the same gap.
Every list of positions has one code.
"""

import jax.numpy as jnp
import numpy as np

from sparsejax.types import Array

_ON = 255


def encoded(positions: np.ndarray) -> np.ndarray:
  """Returns the code of increasing `positions`, `uint8`, computed on the host."""
  escapes, last = np.divmod(np.diff(positions, prepend=-1) - 1, _ON)
  ends = np.cumsum(escapes + 1) - 1
  code = np.full(ends[-1] + 1 if len(ends) else 0, _ON, np.uint8)
  code[ends] = last
  return code


def positions(code: np.ndarray) -> np.ndarray:
  """Returns the positions that `code` encodes, `int64`, computed on the host."""
  ends = code != _ON
  return (np.cumsum(code.astype(np.int64) + ends) - 1)[ends]


def stored(code: Array, size: int) -> Array:
  """Returns `bool[size]`, `True` at the positions that `code` encodes."""
  ends = code != _ON
  positions = jnp.cumsum(code.astype(jnp.int32) + ends.astype(jnp.int32)) - 1
  return jnp.zeros(size, bool).at[jnp.where(ends, positions, size)].set(True, mode='drop')


def misfit(code: np.ndarray, count: int, size: int) -> str | None:
  """Returns why `code` does not encode `count` positions below `size`, or `None`."""
  ends = int(np.count_nonzero(code != _ON))
  reach = int(np.sum(code, dtype=np.int64)) + ends
  if ends != count or len(code) and code[-1] == _ON or reach > size:
    return f'its gaps end {ends} times, reach place {reach} of {size}, and are for {count} values.'
  return None
