"""Activation-sparse products on TPUs: of the weight, only the active rows are copied to VMEM, some blocks at a time.

With few tokens the product takes as long as these rows take to be read: while some are multiplied, the next are under
way. x, which is small, is brought into their order outside.
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

_TOKENS = 128  # at most; the rows of more are nearly all active
_ROWS, _OUTPUTS = 256, 1024  # of a tile of the weight, as a rule at most


def matmul(x: Array, w: Array, block: int, capacity: int, *, interpret: Any = False) -> Array:
  """`x [M, K]`, mostly zeros, times `w [K, N]`: `[M, N]` in x's dtype, summed in float32; dense above the capacity."""
  order, count = reference.active_blocks(x, block)
  few = lambda: _product(x, w, order, count, block, interpret)
  return jax.lax.cond(count <= capacity, few, lambda: reference.dense(x, w.astype(x.dtype)))


def refusal(x: Array, w: Array, block: int) -> str | None:
  """Why the product cannot run on a TPU, with the remedy."""
  if why := mosaic_tpu.refused_dtypes(x, w):
    return why
  if x.shape[0] > _TOKENS:
    return f'it is for few tokens, up to {_TOKENS}, not {x.shape[0]}; give them in parts, or multiply dense'
  if block % (least := 32 // w.dtype.itemsize):
    return f'blocks of {block} rows do not fit its tiles of {w.dtype}; take a multiple of {least}'
  if w.shape[1] % mosaic_tpu.LANES:
    return f'a weight of shape {w.shape} must have a multiple of {mosaic_tpu.LANES} outputs; fill up with zeros'
  together, columns = _tile(w, block)
  held = 2 * together * block * columns * w.dtype.itemsize + 8 * x.size
  if held > mosaic_tpu.TILES or 4 * w.shape[0] // block > mosaic_tpu.SCALARS:
    return (f'{x.shape[0]} tokens of {x.shape[1]} in blocks of {block} do not fit into the memory of a core; take '
            'fewer, or smaller blocks')
  return None


def _tile(w: Array, block: int) -> tuple[int, int]:
  """How many blocks are read at a time, and how many outputs of them."""
  columns = max(n for n in range(mosaic_tpu.LANES, _OUTPUTS + 1, mosaic_tpu.LANES) if w.shape[1] % n == 0)
  return max(min(_ROWS, w.shape[0]) // block, 1), columns


def _product(x: Array, w: Array, order: Array, count: Array, block: int, interpret: Any) -> Array:
  tokens, (blocks, (together, columns)) = x.shape[0], (order.shape[0], _tile(w, block))
  # What fills up the last step is an active block again, times zeros: what is not active may be NaN.
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
