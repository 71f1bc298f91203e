"""Writes leaves of several shapes as rows of one width, so that one program computes the leaves of all of these shapes.

    widths([4096, 8192, 8000, 64])                                   # [8192, 8192, 8192, 64]
    row = as_row((mask, w), (64, 64), 8192)                          # two arrays `[8192]`, zeros behind the entries
    mask, w = from_rows(row, (64, 64), 8192)

A word with the fact `types.ELEMENTWISE` gives the entries of a row as it gives those of the leaf, bit by bit.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array, PyTree

_ROOM = 2  # a row is less than this many times as long as the leaf that is written into it


def widths(sizes: Sequence[int]) -> list[int]:
  """Returns the width of the row for each size: the largest size that is at most twice as large.

  Widths are settled from the largest size down, so that there are as few as possible.
  """
  found: dict[int, int] = {}
  width = 0
  for size in sorted(set(sizes), reverse=True):
    width = width if size * _ROOM >= width > 0 else size
    found[size] = width
  return [found[size] for size in sizes]


def as_row(tree: PyTree, shape: tuple[int, ...], width: int, padding: Any = 0) -> PyTree:
  """Returns `tree` with each array of the leaf's `shape` as a row `[width]`, with `padding` behind."""
  more = width - math.prod(shape)
  padded = lambda x: lax.pad(x, jnp.asarray(padding, x.dtype), [(0, more, 0)]) if more else x
  return jax.tree.map(lambda x: padded(x.reshape(-1)) if x.shape == shape else x, tree)


def from_rows(tree: PyTree, shape: tuple[int, ...], width: int) -> PyTree:
  """Returns `tree` with the leaf that is written in each row `[width]` in the place of the row."""
  size = math.prod(shape)
  own = lambda x: lax.slice_in_dim(x, 0, size) if size < width else x
  return jax.tree.map(lambda x: own(x).reshape(shape) if x.shape == (width,) else x, tree)


def padding_last(scores: Array, size: Array) -> Array:
  """Returns the scores of a row of which `size` entries are written, with NaN, which ranks last, behind them."""
  return jnp.where(lax.iota(jnp.int32, scores.size) < size, scores, jnp.nan)
