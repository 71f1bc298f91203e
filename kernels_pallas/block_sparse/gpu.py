"""Block-sparse products on Hopper, through Mosaic GPU.

A block of the grid computes two tiles of tokens of one block column, one in each compute warpgroup, over the blocks
that the column stores; of few tokens, one tile, half of its outputs in each. Within a tile the tensor cores are as busy
as in a dense product. What is lost is lost between tiles, while the last is being written, so the more the fewer blocks
a column has (`benchmarks/results.md`, H200).
"""

import dataclasses

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
STAGE = 64  # of an output tile is written at a time, a square of this side
BETWEEN = 3  # blocks of 128 x 128 that an H200 could multiply in the time that it loses between two tiles, about
SWEEP = 16 * 2**20  # bytes of activations that go through all columns before the next do: they stay in the L2 cache


@dataclasses.dataclass(frozen=True)
class Tiles:
  """Sizes: tokens of a warpgroup, depth of a step, steps in shared memory, blocks that share a weight tile."""

  tokens: int
  depth: int
  slots: int
  cluster: int
  sweep: int  # clusters, along the tokens, that go through all columns together
  together: bool = False  # whether the two warpgroups have the same tokens, and half of the outputs each

  @property
  def both(self) -> int:
    """Tokens of the two warpgroups."""
    return self.tokens if self.together else hopper.COMPUTE * self.tokens

  @property
  def multiple(self) -> int:
    """Tokens of the blocks that share a weight tile."""
    return self.both * self.cluster


def tiles(tokens: int, length: int, width: int, dtype: np.dtype, columns: int) -> Tiles:
  """For that many tokens of `length` each, and so many columns of blocks with outputs of this width."""
  few = lambda rows: -(-tokens // (hopper.COMPUTE * rows)) * columns * 2 <= hopper.cores()  # too few tiles to go round
  rows = 128 if width <= 128 and tokens > 128 and not few(128) else 64  # 128 registers of sums a thread, at most
  together = tokens <= rows and width >= hopper.COMPUTE * STAGE
  cluster = 2 if width > 128 and tokens > hopper.COMPUTE * rows and not few(rows) else 1  # else not worth the waiting
  t = Tiles(rows, 64, 8 if together else 6, cluster, 1, together)
  stage = hopper.nbytes((t.both + width, t.depth), dtype)
  reserved = hopper.nbytes((hopper.COMPUTE, 2, STAGE, STAGE), dtype)
  return dataclasses.replace(t, slots=hopper.slots(stage, reserved, t.slots),
                             sweep=max(1, SWEEP // hopper.nbytes((t.multiple, length), dtype)))


def refusal(x: Array, w: BlockSparseArray) -> str | None:
  """Why these kernels cannot take these shapes and dtypes, and the remedy."""
  if w.block not in BLOCKS:
    return (f'blocks of {w.block} do not fit wgmma as it is used here; pack with one of '
            f'{", ".join(map(str, BLOCKS))}')
  return hopper.refused_dtype(x.dtype)


def matmul(x: Array, w: BlockSparseArray, *, sizes: Tiles | None = None, interpret: bool = False) -> Array:
  """`x [M, Kb bk]` times `w`: `[M, Nb bn]` in x's dtype, summed in float32."""
  starts = _starts(w.fan_in, w.cols, w.grid[1])
  return _product(x, w.values.astype(x.dtype), starts, w.rows, None, w.fan_in, sizes, interpret)


def matmul_transposed(dy: Array, w: BlockSparseArray, *, sizes: Tiles | None = None, interpret: bool = False) -> Array:
  """`dy [M, Nb bn]` times the transpose of `w`: `[M, Kb bk]` in dy's dtype, summed in float32."""
  starts = _starts(w.fan_out, jnp.sort(w.rows) if w.fan_out is None else w.rows, w.grid[0])
  places = w.cols.at[w.order].get(mode='promise_in_bounds')
  return _product(dy, w.values.astype(dy.dtype), starts, places, w.order, w.fan_out, sizes, interpret)


def _starts(fan: tuple[int, ...] | None, column: Array, n: int) -> Array:
  """Where the blocks of each of `n` columns begin, and where the last ends: `int32[n + 1]`."""
  if fan is not None:
    return jnp.asarray(np.concatenate([[0], np.cumsum(fan)]).astype(np.int32))
  return jnp.searchsorted(column, jnp.arange(n + 1, dtype=jnp.int32)).astype(jnp.int32)


def _order(fan: tuple[int, ...] | None, rows: int, columns: int, sweep: int, blocks: int) -> np.ndarray:
  """The tiles `row * columns + column` in the order in which they are taken, `sweep` rows through all columns at once.

  Columns with many blocks come first, and the multiprocessors have equally much to do; but where it is not known at
  trace time how many blocks a column has, to find that out would take longer than it saves.
  """
  ranked = np.arange(columns) if fan is None else np.argsort(-np.asarray(fan), kind='stable')
  row = np.arange(rows)
  tiles = np.concatenate([(part[None] * columns + ranked[:, None]).reshape(-1)
                          for part in np.split(row, row[sweep::sweep])])
  if fan is not None and len(set(fan)) > 1:
    tiles = tiles[hopper.scheduled(np.asarray(fan)[tiles % columns] + BETWEEN, blocks)]
  return tiles.astype(np.int32)


def _product(x: Array, values: Array, starts: Array, places: Array, order: Array | None, fan: tuple[int, ...] | None,
             sizes: Tiles | None, interpret: bool) -> Array:
  """Column n of the product: the sum over i from `starts[n]` of block column `places[i]` of `x` times a block.

  That is `values[i]`; with `order`, it is `values[order[i]]` transposed.
  """
  transposed, (bk, bn) = order is not None, values.shape[1:]
  length, width = (bn, bk) if transposed else (bk, bn)
  tokens, columns = x.shape[0], starts.shape[0] - 1
  t = sizes or tiles(*x.shape, width, x.dtype, columns)
  if interpret:  # which has no clusters
    t = dataclasses.replace(t, cluster=1)
  x = hopper.readable(x, t.multiple, interpret)
  parts, rows = length // t.depth, -(-tokens // t.multiple)
  outputs = width // hopper.COMPUTE if t.together else width  # of a warpgroup
  blocks = min(hopper.cores(interpret) // t.cluster, rows * columns)

  def body(turns, starts, places, order, x, values, y, tile, block, staging, full, free):
    wg = lax.axis_index('wg')

    def named(i):
      """Row and column of the tile of this block."""
      row, column = lax.div(turns[i], jnp.int32(columns)), lax.rem(turns[i], jnp.int32(columns))
      return row * t.cluster + lax.axis_index('cluster') if t.cluster > 1 else row, column

    trips = lambda at: (starts[at[1] + 1] - starts[at[1]]) * parts
    first, across = (0, wg * outputs) if t.together else (wg * t.tokens, 0)  # token and output of this warpgroup

    def copy(at, step, slot):
      row, column = at
      i, part = starts[column] + step // parts, lax.rem(step, jnp.int32(parts)) * t.depth
      along = pl.ds(part, t.depth)
      weight = values.at[order[i], :, along] if transposed else values.at[i, along]
      plgpu.copy_gmem_to_smem(x.at[pl.ds(row * t.both, t.both), pl.ds(places[i] * length + part, t.depth)],
                              tile.at[slot], full.at[slot])
      plgpu.copy_gmem_to_smem(weight, block.at[slot], full.at[slot],
                              collective_axes='cluster' if t.cluster > 1 else None)

    def compute(at, count):
      row, column = at

      def summed(acc):
        def multiply(slot):
          here = pl.ds(across, outputs)
          weight = hopper.transposed(block.at[slot, here]) if transposed else block.at[slot, :, here]
          plgpu.wgmma(acc, tile.at[slot, pl.ds(first, t.tokens)], weight)
        after = hopper.accumulate(multiply, trips(at), count, full, free, t.slots)
        return after, acc[...].astype(y.dtype)

      count, value = pl.run_scoped(summed, plgpu.ACC((t.tokens, outputs), jnp.float32))
      hopper.store(value, staging.at[wg], lambda r, c: y.at[
          pl.ds(row * t.both + first + r, STAGE), pl.ds(column * width + across + c, STAGE)])
      return count

    hopper.ring(hopper.share(rows * columns, blocks, named), trips, copy, compute, free, t.slots)

  full, free = hopper.barriers(t.slots, 2, t.cluster)
  scratch = {
      'tile': hopper.shared((t.slots, t.both, t.depth), x.dtype),
      'block': hopper.shared((t.slots, width, t.depth) if transposed else (t.slots, t.depth, width), x.dtype),
      'staging': hopper.shared((hopper.COMPUTE, 2, STAGE, STAGE), x.dtype), 'full': full, 'free': free}
  out = jax.ShapeDtypeStruct((x.shape[0], columns * width), x.dtype)
  turns = jnp.asarray(_order(fan, rows, columns, t.sweep, blocks))
  operands = (turns, starts, places, starts if order is None else order, x, values)
  y = hopper.kernel(body, out, operands, blocks=blocks, scratch=scratch, cluster=t.cluster, interpret=interpret)
  return y[:tokens]


def sampled(x: Array, dy: Array, w: BlockSparseArray, *, interpret: bool = False) -> Array:
  """The stored blocks of `x^T dy`, `x [M, Kb bk]`, `dy [M, Nb bn]`: shape and dtype of `w.values`.

  Each compute warpgroup has one block, two of a column at a time, so that they share what is read of `dy`; or, where
  sums of a whole block would not fit its registers, half of a block.
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

      @pl.when((wg == 0) | halves | (first[pair] != second[pair]))  # the last of a column may be alone
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
  """Blocks that are computed together, at most two, of one column: the first, the second or the first again, how many.

  The two are `int32[n]`, of which only that many count where the columns' lengths are not known at trace time.
  """
  nnz, columns = w.rows.shape[0], w.grid[1]
  if w.fan_in is not None:
    ends = np.repeat(np.cumsum(w.fan_in), w.fan_in)
    within = np.arange(nnz) - np.repeat(np.cumsum(w.fan_in) - np.asarray(w.fan_in), w.fan_in)
    first = np.flatnonzero(within % together == 0).astype(np.int32)
    second = np.where(first + together - 1 < ends[first], first + together - 1, first).astype(np.int32)
    return jnp.asarray(first), jnp.asarray(second), jnp.full(1, len(first), jnp.int32)
  starts = _starts(None, w.cols, columns)
  at = jnp.arange(nnz, dtype=jnp.int32)
  leads = (at - starts[w.cols]) % together == 0
  first = jnp.nonzero(leads, size=min(nnz, (nnz + columns) // together), fill_value=0)[0].astype(jnp.int32)
  last = starts[w.cols[first] + 1] - 1
  return first, jnp.minimum(first + together - 1, last), jnp.sum(leads, dtype=jnp.int32)[None]
