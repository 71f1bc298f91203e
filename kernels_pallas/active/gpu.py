"""Computes activation-sparse products on Hopper, through Mosaic GPU: only active rows of the weight are copied.

With few tokens the product takes as long as its rows take to arrive. A thread block has 128 outputs and a part of the
sum, so that few outputs still occupy all multiprocessors. XLA adds the parts.

The rows of the weight are inputs in `matmul`: x, which is small, is brought into the order of the active rows outside
of the kernel. In `outputs` the rows are outputs, and the result is brought out of this order. That kernel computes the
transpose of the result, so that tiles need no transpose.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from kernels_pallas import hopper
from kernels_pallas.active import reference
from sparsejax.types import Array

TOKENS = 64  # at most: the rows of one wgmma
DEPTH = 64  # rows of the weight in a step
STAGE = 64  # outputs of a warpgroup, and the side of the square that is written at a time
WIDTH = hopper.COMPUTE * STAGE  # outputs of a tile


class ActivePlan(NamedTuple):
  """An `ActivePlan` holds the sizes of the kernel for active rows.

  A part of a tile has at most `each` steps, of `DEPTH / block` copies of `block` rows.
  """

  block: int
  columns: int  # tiles of outputs
  parts: int
  each: int
  slots: int
  blocks: int  # thread blocks of the grid

  @property
  def copies(self) -> int:
    return DEPTH // self.block


def active_plan(x: Array, w: Array, block: int, interpret: bool) -> ActivePlan:
  """Returns the plan for the product of `x [M, K]` and `w [K, N]` in blocks of `block` rows."""
  columns, steps, blocks = w.shape[1] // WIDTH, -(-w.shape[0] // DEPTH), hopper.cores(interpret)
  parts = min(steps, max(1, blocks // columns))
  staging = hopper.nbytes((hopper.COMPUTE, 1, TOKENS, STAGE), np.float32)
  slots = hopper.slots(hopper.nbytes((TOKENS + WIDTH, DEPTH), x.dtype), staging, 8)
  return ActivePlan(block, columns, parts, -(-steps // parts), slots, min(blocks, parts * columns))


def matmul(x: Array, w: Array, block: int, capacity: int, *, interpret: bool = False) -> Array:
  """Returns `x [M, K]`, mostly zeros, times `w [K, N]`: `[M, N]` in x's dtype, summed in float32.

  If more than `capacity` blocks are active, the product is computed dense.
  """
  order, count = reference.active_blocks(x, block)
  few = lambda: _product(x, w, order, count, block, interpret)
  return lax.cond(count <= capacity, few, lambda: reference.dense(x, w))


def outputs(x: Array, wanted: Array, w: Array, block: int, capacity: int, *, interpret: bool = False) -> Array:
  """Returns `x [M, K]` times the transpose of `w [N, K]`, `[M, N]` in x's dtype, summed in float32.

  Blocks of outputs in which `wanted [M, N]` has only zeros are zeros, and their rows are not read. If more than
  `capacity` blocks are active, the product is computed dense.
  """
  order, count = reference.active_blocks(wanted, block)
  plan = outputs_plan(x, w, block, capacity, hopper.cores(interpret))
  few = lambda: _few_outputs(x, w, order, count, block, plan, interpret)
  return lax.cond(count <= capacity, few, lambda: reference.dense_transposed(x, w))


def refusal(x: Array, w: Array, block: int) -> str | None:
  """Returns why the product of `x` and `w` cannot run on Hopper, with the remedy, or `None`."""
  return _refused(x, w, block, WIDTH, 'outputs')


def outputs_refusal(x: Array, w: Array, block: int) -> str | None:
  """Returns why `x` times outputs of the transpose of `w` cannot run on Hopper, with the remedy, or `None`."""
  return _refused(x, w, block, DEPTH, 'inputs')


def _refused(x: Array, w: Array, block: int, multiple: int, what: str) -> str | None:
  """Returns why a product cannot run on Hopper, or `None`; the second axis of `w` needs a `multiple`."""
  if why := hopper.refused_dtype(x.dtype):
    return why
  if w.dtype != x.dtype:
    return f'x and w must have one dtype, not {x.dtype} and {w.dtype}; cast the weight once, not at each product'
  if x.shape[0] > TOKENS:
    return f'it is for few tokens, up to {TOKENS}, not {x.shape[0]}; split them, or multiply dense'
  if block % 8 or DEPTH % block:
    return f'blocks of {block} rows do not fit its steps of {DEPTH}; take 8, 16, 32 or 64'
  if w.shape[1] % multiple:
    return f'a weight of shape {w.shape} must have a multiple of {multiple} {what}; pad with zeros'
  return None


def _product(x: Array, w: Array, order: Array, count: Array, block: int, interpret: bool) -> Array:
  plan, tokens = active_plan(x, w, block, interpret), x.shape[0]
  taken, place = _ordered(x, order, count, plan)
  taken = hopper.readable(taken, TOKENS, interpret)
  steps = lax.div(count * block + (DEPTH - 1), jnp.int32(DEPTH))
  each = lax.max(lax.div(steps + (plan.parts - 1), jnp.int32(plan.parts)), jnp.int32(1))[None]

  def body(place, each, x, w, y, tile, rows, staging, full, free):
    wg = lax.axis_index('wg')

    def target(i):
      """Returns the part and the tile of outputs with this number."""
      return lax.div(i, jnp.int32(plan.columns)), lax.rem(i, jnp.int32(plan.columns))

    def copy(target, step, slot):
      part, column = target
      at = part * each[0] + step
      plgpu.copy_gmem_to_smem(x.at[pl.ds(0, TOKENS), pl.ds(at * DEPTH, DEPTH)], tile.at[slot], full.at[slot])
      for i in range(plan.copies):
        first = place[at * plan.copies + i] * block
        plgpu.copy_gmem_to_smem(w.at[pl.ds(first, block), pl.ds(column * WIDTH, WIDTH)],
                                rows.at[slot, pl.ds(i * block, block)], full.at[slot])

    def compute(target, count):
      part, column = target

      def summed(acc):
        multiply = lambda slot: plgpu.wgmma(acc, tile.at[slot], rows.at[slot, :, pl.ds(wg * STAGE, STAGE)])
        return hopper.accumulate(multiply, each[0], count, full, free, plan.slots), acc[...]

      count, value = pl.run_scoped(summed, plgpu.ACC((TOKENS, STAGE), jnp.float32))
      hopper.store(value, staging.at[wg], lambda r, c: y.at[
          part, pl.ds(r, STAGE), pl.ds(column * WIDTH + wg * STAGE + c, STAGE)])
      return count

    loop = hopper.share(plan.parts * plan.columns, plan.blocks, target)
    hopper.ring(loop, lambda target: each[0], copy, compute, free, plan.slots)

  out = jax.ShapeDtypeStruct((plan.parts, TOKENS, w.shape[1]), jnp.float32)
  sums = hopper.kernel(body, out, (place, each, taken, w), blocks=plan.blocks, scratch=_scratch(plan, x.dtype),
                       interpret=interpret)
  return jnp.where(count > 0, sums.sum(0)[:tokens], 0).astype(x.dtype)


def _scratch(plan: ActivePlan, dtype: Any) -> dict[str, Any]:
  """Returns the shared memory and the barriers: a ring of tiles of tokens and of active rows."""
  full, free = hopper.barriers(plan.slots, 1 + plan.copies)
  return {'tile': hopper.shared((plan.slots, TOKENS, DEPTH), dtype),
          'rows': hopper.shared((plan.slots, DEPTH, WIDTH), dtype),
          'staging': hopper.shared((hopper.COMPUTE, 1, TOKENS, STAGE), jnp.float32), 'full': full, 'free': free}


def _ordered(x: Array, order: Array, count: Array, plan: ActivePlan) -> tuple[Array, Array]:
  """Returns `x` in the order of its active blocks, and the number of the block in each place of the steps.

  The steps after the last active block have this block times zeros, because rows that are not active may be NaN.
  """
  blocks, tokens = order.shape[0], x.shape[0]
  listed = jnp.arange(blocks) < count
  place = jnp.where(listed, order, order[jnp.maximum(count - 1, 0)])
  taken = jnp.where(listed[:, None], x.reshape(tokens, blocks, plan.block)[:, order], jnp.zeros((), x.dtype))
  missing = plan.parts * plan.each * plan.copies - blocks
  place = jnp.pad(place, (0, missing), mode='edge')
  return jnp.pad(taken, ((0, 0), (0, missing), (0, 0))).reshape(tokens, -1), place


class OutputsPlan(NamedTuple):
  """An `OutputsPlan` holds the sizes of the kernel for active outputs: tiles of rows, and parts of the sum over inputs.

  A tile has `copies` blocks of rows, and a part has at most `each` steps of `DEPTH` inputs.
  """

  copies: int
  tiles: int
  steps: int
  parts: int
  each: int
  slots: int
  blocks: int  # thread blocks of the grid

  def trips(self, part: Array) -> Array:
    """Returns how many steps a part has, at least one."""
    return lax.min(jnp.int32(self.each), jnp.int32(self.steps) - part * self.each)


def outputs_plan(x: Array, w: Array, block: int, capacity: int, cores: int) -> OutputsPlan:
  """Returns the plan for `x [M, K]` and at most `capacity` blocks of `block` rows of `w [N, K]`."""
  copies, steps = WIDTH // block, w.shape[1] // DEPTH
  tiles = max(-(-min(capacity, w.shape[0] // block) // copies), 1)
  each = -(-steps // min(steps, max(1, cores // tiles)))
  staging = hopper.nbytes((hopper.COMPUTE, 1, STAGE, TOKENS), np.float32)
  slots = hopper.slots(hopper.nbytes((TOKENS + WIDTH, DEPTH), x.dtype), staging, 8)
  parts = -(-steps // each)
  return OutputsPlan(copies, tiles, steps, parts, each, slots, min(cores, tiles * parts))


def _few_outputs(x: Array, w: Array, order: Array, count: Array, block: int, plan: OutputsPlan,
                 interpret: bool) -> Array:
  """Returns the product at the first `count` blocks of `order`, and zeros elsewhere."""
  tokens = x.shape[0]
  # The last tile is padded with the last active block, whose outputs are computed again.
  place = jnp.where(jnp.arange(len(order)) < count, order, order[jnp.maximum(count - 1, 0)])
  place = jnp.pad(place, (0, -len(order) % plan.copies), mode='edge')
  listed = lax.max(lax.div(count + (plan.copies - 1), jnp.int32(plan.copies)), jnp.int32(1))[None]
  turned = jnp.pad(x, ((0, TOKENS - tokens), (0, 0))).T

  def body(place, listed, x, w, y, tile, rows, staging, full, free):
    wg = lax.axis_index('wg')

    def target(i):
      """Returns the part and the tile of outputs with this number."""
      return lax.div(i, listed[0]), lax.rem(i, listed[0])

    def copy(target, step, slot):
      along = pl.ds((target[0] * plan.each + step) * DEPTH, DEPTH)
      plgpu.copy_gmem_to_smem(x.at[along], tile.at[slot], full.at[slot])
      for i in range(plan.copies):
        first = place[target[1] * plan.copies + i] * block
        plgpu.copy_gmem_to_smem(w.at[pl.ds(first, block), along], rows.at[slot, pl.ds(i * block, block)], full.at[slot])

    def compute(target, count):
      def summed(acc):
        multiply = lambda slot: plgpu.wgmma(acc, rows.at[slot, pl.ds(wg * STAGE, STAGE)], tile.at[slot])
        return hopper.accumulate(multiply, plan.trips(target[0]), count, full, free, plan.slots), acc[...]

      count, value = pl.run_scoped(summed, plgpu.ACC((STAGE, TOKENS), jnp.float32))
      hopper.store(value, staging.at[wg], lambda r, c: y.at[
          target[0], pl.ds(target[1] * WIDTH + wg * STAGE + r, STAGE), pl.ds(c, STAGE)])
      return count

    loop = hopper.share(listed[0] * plan.parts, plan.blocks, target)
    hopper.ring(loop, lambda target: plan.trips(target[0]), copy, compute, free, plan.slots)

  full, free = hopper.barriers(plan.slots, 1 + plan.copies)
  scratch = {'tile': hopper.shared((plan.slots, DEPTH, TOKENS), x.dtype),
             'rows': hopper.shared((plan.slots, WIDTH, DEPTH), x.dtype),
             'staging': hopper.shared((hopper.COMPUTE, 1, STAGE, TOKENS), jnp.float32), 'full': full, 'free': free}
  out = jax.ShapeDtypeStruct((plan.parts, plan.tiles * WIDTH, TOKENS), jnp.float32)
  found = hopper.kernel(body, out, (place, listed, turned, w), blocks=plan.blocks, scratch=scratch,
                        interpret=interpret)
  found = found.sum(0)[:, :tokens].T.reshape(tokens, -1, block)
  return reference.scattered_blocks(found.astype(x.dtype), order, count)
