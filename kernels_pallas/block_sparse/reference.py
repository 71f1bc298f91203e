"""Block-sparse products in plain `jnp`, for XLA on any platform; on CPUs faster than dense.

Fast on a CPU is feature-major: `y^T[n] = W[:, n]^T x^T[rows of n]` is one dot of a whole block column for each output
block, so that partial sums never leave the registers' tiles. Columns with equally many blocks are one `lax.map`, so
nothing is padded. With few tokens a loop costs more than its dots, and one batched dot is faster.
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.formats import BlockSparseArray
from sparsejax.types import Array

FEW_TOKENS = 16  # up to here one batched dot


def matmul(x: Array, w: BlockSparseArray) -> Array:
  """`x [M, Kb bk]` times `w`: `[M, Nb bn]` in x's dtype, summed in float32."""
  return _product(x, w.values, w.rows, w.cols, w.fan_in, w.grid[1], 0)


def matmul_transposed(dy: Array, w: BlockSparseArray) -> Array:
  """`dy [M, Nb bn]` times the transpose of `w`: `[M, Kb bk]` in dy's dtype, summed in float32."""
  by_row = lambda a: a.at[w.order].get(mode='promise_in_bounds')
  return _product(dy, by_row(w.values), by_row(w.cols), by_row(w.rows), w.fan_out, w.grid[0], 1)


def sampled(x: Array, dy: Array, w: BlockSparseArray) -> Array:
  """The stored blocks of `x^T dy`, `x [M, Kb bk]`, `dy [M, Nb bn]`: shape and dtype of `w.values`."""
  (bk, bn), (kb, nb), tokens = w.block, w.grid, x.shape[0]
  inputs, outputs = x.T.reshape(kb, bk, tokens), dy.reshape(tokens, nb, bn).transpose(1, 0, 2)
  if w.fan_in is None:
    blocks = _dots(inputs[w.rows], outputs[w.cols], 2, 1)
    return blocks.astype(w.dtype)
  parts, slots = [], []
  for fan, columns, places in _alike(w.fan_in):
    rows = _at(w.rows, places).reshape(len(columns), fan)
    one = lambda args, length=fan * bk: _dot(inputs[args[0]].reshape(length, tokens), args[1], 1, 0)
    found = jax.lax.map(one, (rows, _at(outputs, columns)))
    parts.append(found.reshape(len(columns) * fan, bk, bn).astype(w.dtype))
    slots.append(places)
  return _sorted(parts, slots)


def _product(x: Array, values: Array, rows: Array, cols: Array, fan: tuple[int, ...] | None, n_blocks: int,
             contracted: int) -> Array:
  """`x` times the blocks `values`, of which axis `1 + contracted` is `[bk]` or, transposed, `[bn]`."""
  tokens, length = x.shape[0], values.shape[1 + contracted]
  width = values.shape[2 - contracted]
  if fan is None:
    blocks = x.reshape(tokens, -1, length).transpose(1, 0, 2)[rows]
    parts = _dots(blocks, values, 2, 1 + contracted)
    y = jax.ops.segment_sum(parts, cols, n_blocks)
    return y.transpose(1, 0, 2).reshape(tokens, n_blocks * width).astype(x.dtype)
  product = _at_once if tokens <= FEW_TOKENS else _by_column
  parts, places = [], []
  for count, columns, slots in _alike(fan):
    parts.append(product(x, _at(values, slots), _at(rows, slots).reshape(len(columns), count), contracted))
    places.append(columns)
  y = _sorted(parts, places)  # [n_blocks, width, tokens]
  return y.transpose(2, 0, 1).reshape(tokens, n_blocks * width).astype(x.dtype)


def _by_column(x: Array, values: Array, rows: Array, contracted: int) -> Array:
  columns, fan = rows.shape
  length = values.shape[1 + contracted]
  inputs = x.T.reshape(-1, length, x.shape[0])

  def one(args):
    w, row = args
    gathered = inputs[row].reshape(fan * length, x.shape[0])
    if contracted:
      w = w.transpose(0, 2, 1)
    return _dot(w.reshape(fan * length, -1), gathered, 0, 0).astype(x.dtype)

  return jax.lax.map(one, (values.reshape(columns, fan, *values.shape[1:]), rows))


def _at_once(x: Array, values: Array, rows: Array, contracted: int) -> Array:
  columns, fan = rows.shape
  length, tokens = values.shape[1 + contracted], x.shape[0]
  gathered = x.reshape(tokens, -1, length).transpose(1, 0, 2)[rows].transpose(0, 2, 1, 3)
  if contracted:
    values = values.transpose(0, 2, 1)
  y = _dots(gathered.reshape(columns, tokens, fan * length), values.reshape(columns, fan * length, -1), 2, 1)
  return y.transpose(0, 2, 1).astype(x.dtype)


def _alike(fan: Sequence[int]) -> list[tuple[int, np.ndarray, np.ndarray]]:
  """`(count, columns, their places among the stored blocks)` for each different number of blocks in a column."""
  fan = np.asarray(fan)
  first = np.cumsum(fan) - fan
  return [(int(count), columns, (first[columns][:, None] + np.arange(count)).reshape(-1))
          for count in np.unique(fan) for columns in [np.flatnonzero(fan == count)]]


def _at(a: Array, places: np.ndarray) -> Array:
  """`a[places]`; `a` itself if that is all of it."""
  if len(places) == a.shape[0] and (places == np.arange(len(places))).all():
    return a
  return a.at[places].get(mode='promise_in_bounds')


def _sorted(parts: list[Array], places: list[np.ndarray]) -> Array:
  """The rows of all parts in the order of their places."""
  whole = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
  return _at(whole, np.argsort(np.concatenate(places)))


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
  return _summed(a, b, (((i,), (j,)), ((), ())))


def _dots(a: Array, b: Array, i: int, j: int) -> Array:
  """A dot for each block: axis 0 of both is the block."""
  return _summed(a, b, (((i,), (j,)), ((0,), (0,))))


def _summed(a: Array, b: Array, contraction: Any) -> Array:
  if jax.default_backend() == 'cpu':  # which has no products of two bytes summed in float32 inside of loops
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jax.lax.dot_general(a, b, contraction, preferred_element_type=jnp.float32)

