"""Computes block-sparse products on Hopper, through Mosaic GPU.

A thread block of the grid computes two tiles of tokens of one block column, one tile in each compute warpgroup. The
tiles are summed over the blocks that the column stores. With few tokens, there is one tile, and each compute warpgroup
has half of its outputs. Within a tile the tensor cores are as busy as in a dense product. Time is lost between tiles,
while the last tile is being written, so the loss is larger the fewer blocks a column has (`benchmarks/results.md`,
H200).

    t = tiles(tokens, length, 128, jnp.bfloat16, columns)
    y = matmul(x, w, sizes=dataclasses.replace(t, slots=4))                          # [tokens, outputs]
    y = matmul(x, w, interpret=True)                                                 # on a CPU
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from sparsejax.formats import BlockSparseArray
from sparsejax.types import Array

BLOCKS = ((64, 64), (128, 128), (64, 256), (128, 256))
STAGE = 64  # side of the square of an output tile that is written at a time
BETWEEN = 3  # blocks of 128 x 128, about, that an H200 could multiply in the time that it loses between two tiles
SWEEP = 16 * 2**20  # bytes of activations that go through all columns before the next do, as they stay in the L2 cache


@dataclasses.dataclass(frozen=True)
class BlockTiles:
  """A `BlockTiles` holds the sizes that the kernel for block-sparse products is built with."""

  tokens: int  # of a warpgroup
  depth: int  # contracted length of a step
  slots: int  # steps in shared memory
  cluster: int  # thread blocks that share a weight tile
  sweep: int  # clusters, along the tokens, that go through all columns together
  together: bool = False  # whether the two warpgroups have the same tokens, and half of the outputs each

  @property
  def both(self) -> int:
    """Tokens of the two compute warpgroups."""
    return self.tokens if self.together else hopper.COMPUTE * self.tokens

  @property
  def multiple(self) -> int:
    """Tokens of the thread blocks that share a weight tile."""
    return self.both * self.cluster


def tiles(tokens: int, length: int, width: int, dtype: np.dtype, columns: int) -> BlockTiles:
  """Returns the sizes for `tokens` tokens of `length` inputs, and `columns` block columns of `width` outputs."""
  # `few(rows)` says that tiles of `rows` tokens would leave multiprocessors idle.
  few = lambda rows: -(-tokens // (hopper.COMPUTE * rows)) * columns * 2 <= hopper.cores()
  rows = 128 if width <= 128 and tokens > 128 and not few(128) else 64  # at most 128 registers of sums a thread
  together = tokens <= rows and width >= hopper.COMPUTE * STAGE
  # Elsewhere, a cluster is not worth its waiting.
  cluster = 2 if width > 128 and tokens > hopper.COMPUTE * rows and not few(rows) else 1
  t = BlockTiles(rows, 64, 8 if together else 6, cluster, 1, together)
  stage = hopper.nbytes((t.both + width, t.depth), dtype)
  reserved = hopper.nbytes((hopper.COMPUTE, 2, STAGE, STAGE), dtype)
  return dataclasses.replace(t, slots=hopper.slots(stage, reserved, t.slots),
                             sweep=max(1, SWEEP // hopper.nbytes((t.multiple, length), dtype)))


def refusal(x: Array, w: BlockSparseArray) -> str | None:
  """Returns why these kernels cannot multiply `x` by `w`, with the remedy, or `None`. Dtypes and blocks are read."""
  if w.block not in BLOCKS:
    return f'blocks of {w.block} do not fit wgmma; pack with blocks of {" or ".join(map(str, BLOCKS))}'
  return hopper.refused_dtype(x.dtype)


def matmul(x: Array, w: BlockSparseArray, *, sizes: BlockTiles | None = None, interpret: bool = False) -> Array:
  """Returns `x [M, Kb bk]` times `w`, `[M, Nb bn]` in x's dtype, summed in float32."""
  starts = _starts(w.fan_in, w.cols, w.grid[1])
  return _product(x, w.values.astype(x.dtype), starts, w.rows, None, w.fan_in, sizes, interpret)


def matmul_transposed(dy: Array, w: BlockSparseArray, *, sizes: BlockTiles | None = None,
                      interpret: bool = False) -> Array:
  """Returns `dy [M, Nb bn]` times the transpose of `w`, `[M, Kb bk]` in dy's dtype, summed in float32."""
  starts = _starts(w.fan_out, jnp.sort(w.rows) if w.fan_out is None else w.rows, w.grid[0])
  places = w.cols.at[w.order].get(mode='promise_in_bounds')
  return _product(dy, w.values.astype(dy.dtype), starts, places, w.order, w.fan_out, sizes, interpret)


def _starts(fan: tuple[int, ...] | None, column: Array, n: int) -> Array:
  """Returns where the blocks of each of `n` columns begin, and where the last column ends: `int32[n + 1]`."""
  if fan is not None:
    return jnp.asarray(np.concatenate([[0], np.cumsum(fan)]).astype(np.int32))
  return jnp.searchsorted(column, jnp.arange(n + 1, dtype=jnp.int32)).astype(jnp.int32)


def _order(fan: tuple[int, ...] | None, rows: int, columns: int, sweep: int, blocks: int) -> np.ndarray:
  """Returns the output tiles, numbered `row * columns + column`, in the order in which the kernel computes them.

  `sweep` rows of tiles go through all columns before the next rows do. Columns with many blocks come first, and the
  multiprocessors have equally much to do. If `fan` is `None`, the numbers of blocks are only known at run time,
  where computing an order would take longer than the order saves.
  """
  ranked = np.arange(columns) if fan is None else np.argsort(-np.asarray(fan), kind='stable')
  row = np.arange(rows)
  tiles = np.concatenate([(part[None] * columns + ranked[:, None]).reshape(-1)
                          for part in np.split(row, row[sweep::sweep])])
  if fan is not None and len(set(fan)) > 1:
    tiles = tiles[hopper.scheduled(np.asarray(fan)[tiles % columns] + BETWEEN, blocks)]
  return tiles.astype(np.int32)


def _product(x: Array, values: Array, starts: Array, places: Array, order: Array | None, fan: tuple[int, ...] | None,
             sizes: BlockTiles | None, interpret: bool) -> Array:
  """Returns the product whose block column n is a sum over i from `starts[n]` to `starts[n + 1]`.

  A term of the sum is block column `places[i]` of `x` times the block `values[i]`. If `order` is given, the block is
  the transpose of `values[order[i]]`.
  """
  transposed, (bk, bn) = order is not None, values.shape[1:]
  length, width = (bn, bk) if transposed else (bk, bn)
  tokens, columns = x.shape[0], starts.shape[0] - 1
  t = sizes or tiles(*x.shape, width, x.dtype, columns)
  if interpret:  # Interpret mode does not support clusters.
    t = dataclasses.replace(t, cluster=1)
  x = hopper.readable(x, t.multiple, interpret)
  parts, rows = length // t.depth, -(-tokens // t.multiple)
  outputs = width // hopper.COMPUTE if t.together else width  # of a warpgroup
  blocks = min(hopper.cores(interpret) // t.cluster, rows * columns)

  def body(turns, starts, places, order, x, values, y, tile, block, staging, full, free):
    wg = lax.axis_index('wg')

    def target(i):
      """Returns the row and the column of the i-th output tile."""
      row, column = lax.div(turns[i], jnp.int32(columns)), lax.rem(turns[i], jnp.int32(columns))
      return row * t.cluster + lax.axis_index('cluster') if t.cluster > 1 else row, column

    trips = lambda target: (starts[target[1] + 1] - starts[target[1]]) * parts
    first, across = (0, wg * outputs) if t.together else (wg * t.tokens, 0)  # token and output of this warpgroup

    def copy(target, step, slot):
      row, column = target
      i, part = starts[column] + step // parts, lax.rem(step, jnp.int32(parts)) * t.depth
      along = pl.ds(part, t.depth)
      weight = values.at[order[i], :, along] if transposed else values.at[i, along]
      plgpu.copy_gmem_to_smem(x.at[pl.ds(row * t.both, t.both), pl.ds(places[i] * length + part, t.depth)],
                              tile.at[slot], full.at[slot])
      plgpu.copy_gmem_to_smem(weight, block.at[slot], full.at[slot],
                              collective_axes='cluster' if t.cluster > 1 else None)

    def compute(target, count):
      row, column = target

      def summed(acc):
        def multiply(slot):
          own = pl.ds(across, outputs)
          weight = hopper.transposed(block.at[slot, own]) if transposed else block.at[slot, :, own]
          plgpu.wgmma(acc, tile.at[slot, pl.ds(first, t.tokens)], weight)
        after = hopper.accumulate(multiply, trips(target), count, full, free, t.slots)
        return after, acc[...].astype(y.dtype)

      count, value = pl.run_scoped(summed, plgpu.ACC((t.tokens, outputs), jnp.float32))
      hopper.store(value, staging.at[wg], lambda r, c: y.at[
          pl.ds(row * t.both + first + r, STAGE), pl.ds(column * width + across + c, STAGE)])
      return count

    hopper.ring(hopper.share(rows * columns, blocks, target), trips, copy, compute, free, t.slots)

  out = jax.ShapeDtypeStruct((x.shape[0], columns * width), x.dtype)
  turns = jnp.asarray(_order(fan, rows, columns, t.sweep, blocks))
  operands = (turns, starts, places, starts if order is None else order, x, values)
  y = hopper.kernel(body, out, operands, blocks=blocks, scratch=_scratch(t, width, x.dtype, transposed),
                    cluster=t.cluster, interpret=interpret)
  return y[:tokens]


def _scratch(t: BlockTiles, width: int, dtype: np.dtype, transposed: bool) -> dict[str, Any]:
  """Returns the shared memory and the barriers: a ring of tiles of tokens and of blocks, and staging for outputs."""
  full, free = hopper.barriers(t.slots, 2, t.cluster)
  return {
      'tile': hopper.shared((t.slots, t.both, t.depth), dtype),
      'block': hopper.shared((t.slots, width, t.depth) if transposed else (t.slots, t.depth, width), dtype),
      'staging': hopper.shared((hopper.COMPUTE, 2, STAGE, STAGE), dtype), 'full': full, 'free': free}


def sampled(x: Array, dy: Array, w: BlockSparseArray, *, interpret: bool = False) -> Array:
  """Returns the stored blocks of `x^T dy`, with the shape and the dtype of `w.values`.

  `x` is `[M, Kb bk]` and `dy` is `[M, Nb bn]`. Each compute warpgroup has one block. The two blocks belong to one
  column, so the warpgroups share the tiles of `dy`. Where the sums of a whole block do not fit the registers of a
  warpgroup, each warpgroup has half of one block.
  """
  bk, bn = w.block
  halves = bk * bn > 128 * 128
  rows, depth = (bk // hopper.COMPUTE if halves else bk), 64
  first, second, count = _pairs(w, 1 if halves else hopper.COMPUTE)
  steps = -(-x.shape[0] // depth)
  x, dy = (hopper.readable(a, depth, interpret) for a in (x, dy.astype(x.dtype)))
  staging = hopper.nbytes((hopper.COMPUTE, 2, STAGE, STAGE), w.dtype)
  slots = hopper.slots(hopper.nbytes((depth, hopper.COMPUTE * rows + bn), x.dtype), staging, 6)
  blocks = min(hopper.cores(interpret), first.shape[0])

  def body(first, second, count, places, cols, x, dy, values, left, right, staging, full, free):
    wg = lax.axis_index('wg')

    def copy(pair, step, slot):
      tokens = pl.ds(step * depth, depth)
      for half, block in enumerate((first[pair], second[pair])):
        across = places[block] * bk + (half * rows if halves else 0)
        plgpu.copy_gmem_to_smem(x.at[tokens, pl.ds(across, rows)], left.at[slot, half], full.at[slot])
      plgpu.copy_gmem_to_smem(dy.at[tokens, pl.ds(cols[first[pair]] * bn, bn)], right.at[slot], full.at[slot])

    def compute(pair, count):
      block = jnp.where(wg == 0, first[pair], second[pair])

      def summed(acc):
        multiply = lambda slot: plgpu.wgmma(acc, hopper.transposed(left.at[slot, wg]), right.at[slot])
        after = hopper.accumulate(multiply, jnp.int32(steps), count, full, free, slots)
        return after, acc[...].astype(values.dtype)

      count, value = pl.run_scoped(summed, plgpu.ACC((rows, bn), jnp.float32))
      begin = wg * rows if halves else 0

      @pl.when((wg == 0) | halves | (first[pair] != second[pair]))  # A column of odd length ends in one block.
      def _():
        hopper.store(value, staging.at[wg], lambda row, col: values.at[
            block, pl.ds(begin + row, STAGE), pl.ds(col, STAGE)])
      return count

    pairs = hopper.share(count[0], blocks, lambda i: i)
    hopper.ring(pairs, lambda pair: jnp.int32(steps), copy, compute, free, slots)

  full, free = hopper.barriers(slots, 3)
  scratch = {'left': hopper.shared((slots, hopper.COMPUTE, depth, rows), x.dtype),
             'right': hopper.shared((slots, depth, bn), x.dtype),
             'staging': hopper.shared((hopper.COMPUTE, 2, STAGE, STAGE), w.dtype), 'full': full, 'free': free}
  out = jax.ShapeDtypeStruct(w.values.shape, w.dtype)
  operands = (first, second, count, w.rows, w.cols, x, dy)
  return hopper.kernel(body, out, operands, blocks=blocks, scratch=scratch, interpret=interpret)


def _pairs(w: BlockSparseArray, together: int) -> tuple[Array, Array, Array]:
  """Returns the pairs of blocks of one column that are computed together: `first`, `second`, and the number of pairs.

  `together` is 2, or 1 if every block is computed alone. `first` and `second` are `int32[n]`; a block without a partner
  is both. The number is `int32[1]`; where the lengths of columns are not known at trace time, it can be less than n.
  """
  nnz, columns = w.rows.shape[0], w.grid[1]
  if w.fan_in is not None:
    ends = np.repeat(np.cumsum(w.fan_in), w.fan_in)
    within = np.arange(nnz) - np.repeat(np.cumsum(w.fan_in) - np.asarray(w.fan_in), w.fan_in)
    first = np.flatnonzero(within % together == 0).astype(np.int32)
    second = np.where(first + together - 1 < ends[first], first + together - 1, first).astype(np.int32)
    return jnp.asarray(first), jnp.asarray(second), jnp.full(1, len(first), jnp.int32)
  starts = _starts(None, w.cols, columns)
  leads = (jnp.arange(nnz, dtype=jnp.int32) - starts[w.cols]) % together == 0
  first = jnp.nonzero(leads, size=min(nnz, (nnz + columns) // together), fill_value=0)[0].astype(jnp.int32)
  last = starts[w.cols[first] + 1] - 1
  return first, jnp.minimum(first + together - 1, last), jnp.sum(leads, dtype=jnp.int32)[None]
