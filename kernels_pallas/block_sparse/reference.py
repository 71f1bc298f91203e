"""Block-sparse products in plain `jnp`, for XLA on any platform; on CPUs faster than dense.

A block column of the product is one dot: the columns of x that it needs, gathered side by side, times its blocks, which
lie one below the other already. Columns with equally many blocks are one loop, so nothing is padded. Where all that is
gathered fits the cache, one batched dot for all columns is faster than a loop of dots (`benchmarks/kernels.py`).
"""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.formats import BlockSparseArray
from sparsejax.types import Array

CACHE = 3 << 20  # bytes gathered, up to which one batched dot is taken
FEW_COLUMNS, FEW_TOKENS = 8, 512  # up to which the loop over the columns is unrolled


def matmul(x: Array, w: BlockSparseArray) -> Array:
  """`x [M, Kb bk]` times `w`: `[M, Nb bn]` in x's dtype, summed in float32."""
  return _product(x, w.values, w.rows, w.cols, w.fan_in, w.grid[1])


def gradients(x: Array, dy: Array, w: BlockSparseArray) -> tuple[Array, Array]:
  """`dy` times the transpose of `w`, in x's dtype, and the stored blocks of `x^T dy`, like `w.values`, in one pass.

  `x` is `[M, Kb bk]`, `dy` `[M, Nb bn]`. Blocks that only fill up a row or a column are zero.
  """
  (bk, bn), kb, tokens = w.block, w.grid[0], x.shape[0]
  inputs = x.T.reshape(kb, bk, tokens)
  if w.fan_in is None:
    parts = _dots(_taken(_blocks(dy, bn), w.cols), w.values, 2, 2)
    dx = jax.ops.segment_sum(parts, w.rows, kb).transpose(1, 0, 2).reshape(x.shape)
    return dx.astype(x.dtype), trained(_dots(_taken(inputs, w.rows), _taken(_blocks(dy, bn), w.cols), 2, 1), w)
  if _few(x, w.fan_in):
    product = lambda x, values: _side_by_side(x, _groups(values, w.rows, w.fan_in), bk)
    dx, found = jax.vjp(product, x, w.values.astype(x.dtype))[1](dy)
    return dx, trained(found, w)
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

    dx, found = jax.lax.scan(column, dx, (values, rows, columns))
    parts.append(found.reshape(-1, bk, bn))
    slots.append(places)
  return dx.astype(x.dtype), trained(_sorted(parts, slots), w)


def sampled(x: Array, dy: Array, w: BlockSparseArray) -> Array:
  """The second of the `gradients`."""
  return gradients(x, dy, w)[1]


def trained(blocks: Array, w: BlockSparseArray) -> Array:
  """`blocks` in the dtype of `w`, zero where one is stored only to fill up its row or column."""
  if not w.full:
    blocks = jnp.where(w.kept[:, None, None], blocks, jnp.zeros((), blocks.dtype))
  return blocks.astype(w.dtype)


def _product(x: Array, values: Array, rows: Array, cols: Array, fan: tuple[int, ...] | None, n_columns: int) -> Array:
  """`x` times the blocks `values [nnz, length, width]`, block column after block column, at `rows` and `cols`."""
  tokens, (length, width) = x.shape[0], values.shape[1:]
  if fan is None:
    parts = _dots(_taken(_blocks(x, length), rows), values, 2, 1)
    y = jax.ops.segment_sum(parts, cols, n_columns).transpose(1, 0, 2)
    return y.reshape(tokens, n_columns * width).astype(x.dtype)
  groups = _groups(values, rows, fan)
  if x.shape[0] * len(values) * length * x.dtype.itemsize <= CACHE:
    return _at_once(x, groups, length)
  if _few(x, fan):
    return _side_by_side(x, groups, length)
  y = jnp.zeros((tokens, n_columns * width), x.dtype)
  for one in groups:
    y = _one_by_one(x, y, *one[:3])
  return y


def _one_by_one(x: Array, y: Array, values: Array, rows: Array, columns: Array) -> Array:
  """`y` with these columns filled in."""
  width, length = values.shape[-1], values.shape[1] // rows.shape[1]

  def column(y, args):
    w, row, n = args
    found = _dot(_picked(x, row, length), w, 1, 0).astype(x.dtype)
    return jax.lax.dynamic_update_slice_in_dim(y, found, n * width, 1), None

  return jax.lax.scan(column, y, (values, rows, columns))[0]


def _side_by_side(x: Array, groups: Sequence[Any], length: int) -> Array:
  """Unrolled, so that the dots of several columns may run at the same time."""
  found = {n: _dot(_picked(x, rows[i], length), values[i], 1, 0).astype(x.dtype)
           for values, rows, columns, _ in groups for i, n in enumerate(columns.tolist())}
  return jnp.concatenate([found[n] for n in sorted(found)], 1)


def _picked(x: Array, row: Array, length: int) -> Array:
  """The columns of x in these block rows, side by side."""
  return jnp.concatenate([jax.lax.dynamic_slice_in_dim(x, r * length, length, 1) for r in row], 1)


def _few(x: Array, fan: Sequence[int]) -> bool:
  return len(fan) <= FEW_COLUMNS and x.shape[0] <= FEW_TOKENS


def _at_once(x: Array, groups: Sequence[Any], length: int) -> Array:
  tokens, parts = x.shape[0], []
  for values, rows, *_ in groups:
    gathered = _taken(_blocks(x, length), rows).transpose(0, 2, 1, 3).reshape(len(rows), tokens, -1)
    parts.append(_dots(gathered, values, 2, 1).astype(x.dtype))
  y = _sorted(parts, [columns for *_, columns, _ in groups])
  return y.transpose(1, 0, 2).reshape(tokens, -1)


def _blocks(x: Array, length: int) -> Array:
  """`[blocks, M, length]`."""
  return x.reshape(x.shape[0], -1, length).transpose(1, 0, 2)


def _groups(values: Array, rows: Array, fan: Sequence[int]) -> list[tuple[Array, Array, np.ndarray, np.ndarray]]:
  """For each number of blocks in a column: its columns' blocks, `[columns, number * length, width]`, their rows,
  `[columns, number]`, which columns they are, and the places of the blocks among all."""
  fan = np.asarray(fan, np.int32)
  first, groups = np.cumsum(fan) - fan, []
  for count in np.unique(fan):
    columns = np.flatnonzero(fan == count).astype(np.int32)
    places = (first[columns][:, None] + np.arange(count)).reshape(-1)
    groups.append((_at(values, places).reshape(len(columns), count * values.shape[1], -1),
                   _at(rows, places).reshape(len(columns), count), columns, places))
  return groups


def _at(a: Array, places: np.ndarray) -> Array:
  """`a[places]`; `a` itself if that is all of it."""
  if len(places) == a.shape[0] and (places == np.arange(len(places))).all():
    return a
  return _taken(a, places)


def _taken(a: Array, places: Any) -> Array:
  """`a[places]`, without looking whether they are there."""
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
