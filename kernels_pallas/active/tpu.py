"""Computes activation-sparse products on TPUs: copies only the active rows of the weight to VMEM, some blocks at a
time.

With few tokens the product takes as long as reading the active rows takes: while some rows are multiplied, the next
rows are copied. x, which is small, is brought into the order of the active rows outside of the kernel.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from kernels_pallas.active import reference
from sparsejax.types import Array

_TOKENS = 128  # at most: with more tokens, nearly all rows are active
_ROWS, _OUTPUTS = 256, 1024  # rows and outputs of a tile of the weight, as a rule at most


def matmul(x: Array, w: Array, block: int, capacity: int, *, interpret: Any = False) -> Array:
  """Returns `x [M, K]`, mostly zeros, times `w [K, N]`: `[M, N]` in x's dtype, summed in float32.

  If more than `capacity` blocks are active, the product is computed dense.
  """
  order, count = reference.active_blocks(x, block)
  few = lambda: _product(x, w, order, count, block, interpret)
  return jax.lax.cond(count <= capacity, few, lambda: reference.dense(x, w.astype(x.dtype)))


def refusal(x: Array, w: Array, block: int) -> str | None:
  """Returns why the product of `x` and `w` cannot run on a TPU, with the remedy, or `None`."""
  if why := mosaic_tpu.refused_dtypes(x, w):
    return why
  if x.shape[0] > _TOKENS:
    return f'it is for few tokens, up to {_TOKENS}, not {x.shape[0]}; split them, or multiply dense'
  if block % (least := 32 // w.dtype.itemsize):
    return f'blocks of {block} rows do not fit its tiles of {w.dtype}; take a multiple of {least}'
  if w.shape[1] % mosaic_tpu.LANES:
    return f'a weight of shape {w.shape} must have a multiple of {mosaic_tpu.LANES} outputs; pad with zeros'
  together, columns = _tile(w, block)
  held = 2 * together * block * columns * w.dtype.itemsize + 8 * x.size
  if held > mosaic_tpu.TILES or 4 * w.shape[0] // block > mosaic_tpu.SCALARS:
    return (f'{x.shape[0]} tokens of {x.shape[1]} in blocks of {block} do not fit into the memory of a core; '
            'take fewer tokens, or smaller blocks')
  return None


def _tile(w: Array, block: int) -> tuple[int, int]:
  """Returns how many blocks are read at a time, and how many outputs of each."""
  columns = max(n for n in range(mosaic_tpu.LANES, _OUTPUTS + 1, mosaic_tpu.LANES) if w.shape[1] % n == 0)
  return max(min(_ROWS, w.shape[0]) // block, 1), columns


def _product(x: Array, w: Array, order: Array, count: Array, block: int, interpret: Any) -> Array:
  tokens, (blocks, (together, columns)) = x.shape[0], (order.shape[0], _tile(w, block))
  # The last step is padded with an active block times zeros, because rows that are not active may be NaN.
  listed = jnp.arange(blocks) < count
  place = jnp.where(listed, order, order[jnp.maximum(count - 1, 0)])
  taken = jnp.where(listed[:, None], x.reshape(tokens, blocks, block)[:, order], jnp.zeros((), x.dtype))
  taken = mosaic_tpu.filled(mosaic_tpu.filled(taken, 1, together), 0, mosaic_tpu.SUBLANES)
  steps = taken.shape[1] // together
  ordered = taken.reshape(taken.shape[0], steps, together * block).transpose(1, 0, 2)
  place = jnp.pad(place, (0, steps * together - blocks), mode='edge')
  shape = (ordered.shape[1], columns)
  spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(w.shape[1] // columns,),
      in_specs=[pl.BlockSpec(ordered.shape, lambda j, *scalars: (0, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
      out_specs=pl.BlockSpec(shape, lambda j, *scalars: (0, j)),
      scratch_shapes=[pltpu.VMEM((2, together * block, columns), w.dtype), pltpu.VMEM(shape, jnp.float32),
                      pltpu.SemaphoreType.DMA((2,))])
  call = pl.pallas_call(
      functools.partial(_kernel, block=block, together=together), grid_spec=spec, interpret=interpret,
      out_shape=mosaic_tpu.result((shape[0], w.shape[1]), x.dtype, ordered, w, place), name='active_matmul',
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel',)))
  return call(place, -(-count // together)[None], ordered, w)[:tokens]


def _kernel(place, steps, x_ref, w_ref, y_ref, tile_ref, sum_ref, arrived, *, block: int, together: int):
  columns = y_ref.shape[1]
  across = pl.ds(pl.multiple_of(pl.program_id(0) * columns, columns), columns)
  slot = lambda step: jax.lax.rem(step, 2)

  def copies(step):
    for i in range(together):
      row = pl.multiple_of(place[step * together + i] * block, block)
      to = tile_ref.at[slot(step), pl.ds(i * block, block)]
      yield pltpu.make_async_copy(w_ref.at[pl.ds(row, block), across], to, arrived.at[slot(step)])

  def start(step):
    for copy in copies(step):
      copy.start()

  def add(step, _):
    pl.when(step + 1 < steps[0])(lambda: start(step + 1))
    for copy in copies(step):
      copy.wait()
    sum_ref[...] += mosaic_tpu.dot(x_ref[step], tile_ref[slot(step)].astype(x_ref.dtype), 1, 0)

  sum_ref[...] = jnp.zeros_like(sum_ref)
  pl.when(steps[0] > 0)(lambda: start(jnp.int32(0)))
  jax.lax.fori_loop(0, steps[0], add, None)
  y_ref[...] = sum_ref[...].astype(y_ref.dtype)
