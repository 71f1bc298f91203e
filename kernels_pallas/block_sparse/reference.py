"""Computes block-sparse products in plain `jnp`, for XLA on any platform. On CPUs they are faster than dense.

A block column of the product is one dot. Its left side is the columns of x that the block column needs, gathered side
by side. Its right side is the stored blocks of the column, which are stored one below the other already. Columns with
equally many blocks are one loop, so nothing is padded. Where all gathered columns fit into the cache, one batched dot
for all block columns is faster than a loop of dots. Where there are few block columns, dots without a loop are faster
(`benchmarks/kernels.py`). With a single token, a product for each stored block is fastest.

XLA's CPU client has two libraries for a dot. The faster library takes only dots that contract the last axis of the left
side. XLA folds transposes into dots, so a dot that contracts the last axis here may reach the library in another form.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.formats import BlockSparseArray
from sparsejax.types import Array

CACHE = 3 << 20  # gathered bytes up to which the product is one batched dot
FEW, FEW_TOKENS = 8, 512  # block columns and tokens up to which the product has no loop
PARTS = 4 << 20  # bytes of the parts of dx up to which gradients of at most FEW * FEW blocks have no loop


def matmul(x: Array, w: BlockSparseArray) -> Array:
  """Returns `x [M, Kb bk]` times `w`, `[M, Nb bn]` in x's dtype, summed in float32."""
  tokens, (length, width), n_columns = x.shape[0], w.block, w.grid[1]
  if w.fan_in is None:
    parts = _dots(_taken(_blocks(x, length), w.rows), w.values, 2, 1)
    y = jax.ops.segment_sum(parts, w.cols, n_columns).transpose(1, 0, 2)
    return y.reshape(tokens, n_columns * width).astype(x.dtype)
  if tokens == 1:
    return _by_block(x, w)
  groups = _groups(w.values, w.rows, w.fan_in)
  if tokens * len(w.rows) * length * x.dtype.itemsize <= CACHE:
    return _at_once(x, groups, length)
  if tokens <= FEW_TOKENS and n_columns <= FEW:
    return jnp.concatenate([_dot(_picked(x, row, length), blocks, 1, 0).astype(x.dtype)
                            for row, blocks in _columns(groups)], 1)
  y = jnp.zeros((tokens, n_columns * width), x.dtype)
  for values, rows, columns, _ in groups:
    y = _looped(x, y, values, rows, columns)
  return y


def gradients(x: Array, dy: Array, w: BlockSparseArray) -> tuple[Array, Array]:
  """Returns both gradients: `dy` times the transpose of `w`, and the stored blocks of `x^T dy`.

  `x` is `[M, Kb bk]` and `dy` is `[M, Nb bn]`. The first gradient has the shape and dtype of `x`, and the second those
  of `w.values`. Blocks that are stored only to pad a row or a column are zero.
  """
  cast = dataclasses.replace(w, values=w.values.astype(dy.dtype))
  if w.fan_in is None:
    dx, blocks = _back_blockwise(x, dy, cast)
  elif w.fan_out is not None and len(w.rows) <= FEW * FEW and len(x) * len(w.rows) * w.block[0] * 4 <= PARTS:
    dx, blocks = _back_unrolled(x, dy, cast)
  else:
    dx, blocks = _back_looped(x, dy, cast)
  return dx.astype(x.dtype), trained(blocks, w)


def _back_blockwise(x: Array, dy: Array, w: BlockSparseArray) -> tuple[Array, Array]:
  """Returns both gradients by a batched dot of all blocks, where no column is known at trace time."""
  (bk, bn), kb = w.block, w.grid[0]
  taken = _taken(_blocks(dy, bn), w.cols)
  dx = jax.ops.segment_sum(_dots(taken, w.values, 2, 2), w.rows, kb)
  return dx.transpose(1, 0, 2).reshape(x.shape), _dots(_taken(_blocks(x, bk), w.rows), taken, 1, 1)


def _back_unrolled(x: Array, dy: Array, w: BlockSparseArray) -> tuple[Array, Array]:
  """Returns both gradients by two dots for each block column, several of which may run at the same time."""
  (bk, bn), parts, values = w.block, [], []
  for (row, blocks), part in zip(_columns(_groups(w.values, w.rows, w.fan_in)), jnp.split(dy, w.grid[1], 1)):
    parts.append(_dot(part, blocks, 1, 1))
    # The barrier keeps XLA from transposing the dot instead of its operand.
    values.append(_dot(jax.lax.optimization_barrier(_picked(x, row, bk).T), part, 1, 0))
  parts = jnp.concatenate(parts, 1)  # the part of dx from each stored block
  dx = [sum(jax.lax.dynamic_slice_in_dim(parts, place * bk, bk, 1) for place in places)
        for places in jnp.split(w.order, np.cumsum(w.fan_out)[:-1])]
  return jnp.concatenate(dx, 1), jnp.concatenate(values).reshape(-1, bk, bn)


def _back_looped(x: Array, dy: Array, w: BlockSparseArray) -> tuple[Array, Array]:
  """Returns both gradients by a loop over block columns, which computes both in one pass."""
  (bk, bn), kb, tokens = w.block, w.grid[0], x.shape[0]
  inputs = x.T.reshape(kb, bk, tokens)
  dx, parts, slots = jnp.zeros(x.shape, jnp.float32), [], []
  for values, rows, columns, places in _groups(w.values, w.rows, w.fan_in):
    def column(dx, args, length=values.shape[1]):
      w, row, n = args
      part = jax.lax.dynamic_slice_in_dim(dy, n * bn, bn, 1)
      back = _dot(part, w, 1, 1)
      for r in range(length // bk):
        more = jax.lax.dynamic_slice_in_dim(dx, row[r] * bk, bk, 1) + back[:, r * bk:(r + 1) * bk]
        dx = jax.lax.dynamic_update_slice_in_dim(dx, more, row[r] * bk, 1)
      return dx, _dot(_taken(inputs, row).reshape(length, tokens), part, 1, 0)

    dx, blocks = jax.lax.scan(column, dx, (values, rows, columns))
    parts.append(blocks.reshape(-1, bk, bn))
    slots.append(places)
  return dx, _sorted(parts, slots)


def sampled(x: Array, dy: Array, w: BlockSparseArray) -> Array:
  """Returns the stored blocks of `x^T dy`, the second of the `gradients`."""
  return gradients(x, dy, w)[1]


def trained(blocks: Array, w: BlockSparseArray) -> Array:
  """Returns `blocks` in the dtype of `w`, with zeros for the blocks that are stored only to pad a row or a column."""
  if not w.full:
    blocks = jnp.where(w.kept[:, None, None], blocks, jnp.zeros((), blocks.dtype))
  return blocks.astype(w.dtype)


def _by_block(x: Array, w: BlockSparseArray) -> Array:
  """Returns the product with a single token, `x [1, Kb bk]`: a product for each stored block, summed by column.

  XLA's CPU client computes the products of all blocks in one loop, which copies no block.
  """
  fan = np.asarray(w.fan_in, np.int32)
  inputs = _taken(x.reshape(-1, w.block[0]), w.rows).astype(jnp.float32)
  parts = jnp.sum(inputs[..., None] * w.values.astype(jnp.float32), 1)
  # Every column sums as many parts as the longest column has; part number `len(parts)` is zero.
  slot = np.arange(fan.max(initial=0), dtype=np.int32)[None]
  places = np.where(slot < fan[:, None], (np.cumsum(fan) - fan)[:, None] + slot, len(parts))
  return jnp.sum(_taken(jnp.pad(parts, ((0, 1), (0, 0))), places), 1).reshape(1, -1).astype(x.dtype)


def _looped(x: Array, y: Array, values: Array, rows: Array, columns: Array) -> Array:
  """Returns `y` with the block columns `columns` computed by a loop of dots."""
  width, length = values.shape[-1], values.shape[1] // rows.shape[1]

  def column(y, args):
    w, row, n = args
    outputs = _dot(_picked(x, row, length), w, 1, 0).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(y, outputs, n * width, 1), None

  return jax.lax.scan(column, y, (values, rows, columns), unroll=2)[0]


def _picked(x: Array, row: Array, length: int) -> Array:
  """Returns the columns of x that meet the block rows `row`, side by side."""
  return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, r * length, length, 1) for r in row], 1)


def _at_once(x: Array, groups: Sequence[Any], length: int) -> Array:
  """Returns the product by one batched dot for each group of columns with equally many blocks."""
  parts = [_dots(_gathered(x, rows, length), values, 2, 1).astype(x.dtype) for values, rows, *_ in groups]
  y = _sorted(parts, [columns for *_, columns, _ in groups])
  return y.transpose(1, 0, 2).reshape(x.shape[0], -1)


def _gathered(x: Array, rows: Array, length: int) -> Array:
  """Returns the columns of x that each block column needs, `[columns, M, number * length]`."""
  if rows.size <= FEW * FEW:  # Slices are copied faster than they are gathered, but each is an operation.
    return jnp.concatenate([_picked(x, row, length)[None] for row in rows])
  return _taken(_blocks(x, length), rows).transpose(0, 2, 1, 3).reshape(len(rows), x.shape[0], -1)


def _blocks(x: Array, length: int) -> Array:
  """Returns the columns of `x` in blocks of `length`, `[blocks, M, length]`."""
  return x.reshape(x.shape[0], -1, length).transpose(1, 0, 2)


def _groups(values: Array, rows: Array, fan: Sequence[int]) -> list[tuple[Array, Array, np.ndarray, np.ndarray]]:
  """Returns a group for each number of blocks that a column can have: `(values, rows, columns, places)`.

  `values`, `[columns, number * length, width]`, holds the blocks of the group's columns. `rows`, `[columns, number]`,
  holds their block rows. `columns` says which columns they are, and `places` where their blocks are among all stored
  blocks.
  """
  fan = np.asarray(fan, np.int32)
  first, groups = np.cumsum(fan) - fan, []
  for count in np.unique(fan):
    columns = np.flatnonzero(fan == count).astype(np.int32)
    places = (first[columns][:, None] + np.arange(count)).reshape(-1)
    groups.append((_at(values, places).reshape(len(columns), count * values.shape[1], -1),
                   _at(rows, places).reshape(len(columns), count), columns, places))
  return groups


def _columns(groups: Sequence[Any]) -> list[tuple[Array, Array]]:
  """Returns, for each block column in order, its block rows, `[number]`, and its blocks, `[number * length, width]`."""
  by_column = {n: (rows[i], values[i]) for values, rows, columns, _ in groups for i, n in enumerate(columns.tolist())}
  return [by_column[n] for n in sorted(by_column)]


def _at(a: Array, places: np.ndarray) -> Array:
  """Returns `a[places]`, or `a` itself if `places` counts through `a`."""
  if len(places) == a.shape[0] and (places == np.arange(len(places))).all():
    return a
  return _taken(a, places)


def _taken(a: Array, places: Any) -> Array:
  """Returns `a[places]` without a check of bounds."""
  return a.at[places].get(mode='promise_in_bounds')


def _sorted(parts: list[Array], places: list[np.ndarray]) -> Array:
  """Returns the rows of all parts, in the order of their places."""
  rows = parts[0] if len(parts) == 1 else jnp.concatenate(parts)
  return _at(rows, np.argsort(np.concatenate(places)))


def _dot(a: Array, b: Array, i: int, j: int) -> Array:
  return _summed(a, b, (((i,), (j,)), ((), ())))


def _dots(a: Array, b: Array, i: int, j: int) -> Array:
  """Returns a dot for each block; axis 0 of `a` and of `b` is the block."""
  return _summed(a, b, (((i,), (j,)), ((0,), (0,))))


def _summed(a: Array, b: Array, contraction: Any) -> Array:
  if jax.default_backend() == 'cpu':  # In loops, XLA's CPU client cannot sum products of 16-bit numbers in float32.
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
  return jax.lax.dot_general(a, b, contraction, preferred_element_type=jnp.float32)
