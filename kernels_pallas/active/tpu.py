"""Computes activation-sparse products on TPUs: copies only the active rows of the weight to VMEM, some blocks at a
time.

With few tokens the product takes as long as reading the active rows takes: while some rows are multiplied, the next
rows are copied. Rows are inputs in `matmul`: x, which is small, is brought into the order of the active rows outside of
the kernel. Rows are outputs in `outputs`, whose result is brought out of this order.
"""

import functools
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

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


def outputs(x: Array, wanted: Array, w: Array, block: int, capacity: int, *, interpret: Any = False) -> Array:
  """Returns `x [M, K]` times the transpose of `w [N, K]`, `[M, N]` in x's dtype, summed in float32.

  Blocks of outputs in which `wanted [M, N]` has only zeros are zeros, and their rows are not read. If more than
  `capacity` blocks are active, the product is computed dense.
  """
  order, count = reference.active_blocks(wanted, block)
  few = lambda: _few_outputs(x, w, order, count, block, interpret)
  return jax.lax.cond(count <= capacity, few, lambda: reference.dense_transposed(x, w))


def refusal(x: Array, w: Array, block: int) -> str | None:
  """Returns why the product of `x` and `w` cannot run on a TPU, with the remedy, or `None`."""
  return _refused(x, w, block, 'outputs', 0)


def outputs_refusal(x: Array, w: Array, block: int) -> str | None:
  """Returns why `x` times outputs of the transpose of `w` cannot run on a TPU, with the remedy, or `None`."""
  return _refused(x, w, block, 'inputs', x.shape[0] * w.shape[0])


def _refused(x: Array, w: Array, block: int, last: str, more: int) -> str | None:
  """Returns why a kernel cannot run; `last` names the last axis of `w`, and `more` numbers are held beside x."""
  if why := mosaic_tpu.refused_dtypes(x, w):
    return why
  if x.shape[0] > _TOKENS:
    return f'it is for few tokens, up to {_TOKENS}, not {x.shape[0]}; split them, or multiply dense'
  if block % (least := 32 // w.dtype.itemsize):
    return f'blocks of {block} rows do not fit its tiles of {w.dtype}; take a multiple of {least}'
  if w.shape[1] % mosaic_tpu.LANES:
    return f'a weight of shape {w.shape} must have a multiple of {mosaic_tpu.LANES} {last}; pad with zeros'
  together, columns = _tile(w, block)
  held = 2 * together * block * columns * w.dtype.itemsize + 8 * (x.size + more)
  if held > mosaic_tpu.TILES or 4 * w.shape[0] // block > mosaic_tpu.SCALARS:
    return (f'{x.shape[0]} tokens of {x.shape[1]} in blocks of {block} do not fit into the memory of a core; '
            'take fewer tokens, or smaller blocks')
  return None


def _tile(w: Array, block: int) -> tuple[int, int]:
  """Returns how many blocks of rows are read at a time, and how many columns of each."""
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

  def add(step, slot):
    sum_ref[...] += mosaic_tpu.dot(x_ref[step], tile_ref[slot].astype(x_ref.dtype), 1, 0)

  sum_ref[...] = jnp.zeros_like(sum_ref)
  rows = _Rows(place, w_ref, tile_ref, arrived, block, together)
  _stream(steps[0], lambda step: rows.copies(step, across, jax.lax.rem(step, 2)), add)
  y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _few_outputs(x: Array, w: Array, order: Array, count: Array, block: int, interpret: Any) -> Array:
  """Returns the product at the first `count` blocks of `order`, and zeros elsewhere."""
  tokens, (together, columns), blocks = x.shape[0], _tile(w, block), order.shape[0]
  # The last step is padded with the last active block, whose result is computed again.
  place = jnp.where(jnp.arange(blocks) < count, order, order[jnp.maximum(count - 1, 0)])
  place = jnp.pad(place, (0, -blocks % together), mode='edge')
  parts = mosaic_tpu.filled(x, 0, mosaic_tpu.SUBLANES)
  parts = parts.reshape(len(parts), -1, columns).transpose(1, 0, 2)
  steps, size = len(place) // together, (parts.shape[1], together * block)
  spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(1,),
      in_specs=[pl.BlockSpec(parts.shape, lambda j, *scalars: (0, 0, 0)), pl.BlockSpec(memory_space=pl.ANY)],
      out_specs=pl.BlockSpec((steps, *size), lambda j, *scalars: (0, 0, 0)),
      scratch_shapes=[pltpu.VMEM((2, together * block, columns), w.dtype), pltpu.VMEM(size, jnp.float32),
                      pltpu.SemaphoreType.DMA((2,))])
  call = pl.pallas_call(
      functools.partial(_outputs_kernel, block=block, together=together), grid_spec=spec, interpret=interpret,
      out_shape=mosaic_tpu.result((steps, *size), x.dtype, parts, w, place), name='active_outputs')
  found = call(place, -(-count // together)[None], parts, w)
  found = found.reshape(steps, -1, together, block).swapaxes(0, 1)[:tokens]
  return reference.scattered_blocks(found.reshape(tokens, -1, block), order, count)


def _outputs_kernel(place, steps, x_ref, w_ref, y_ref, tile_ref, sum_ref, arrived, *, block: int, together: int):
  parts, _, columns = x_ref.shape
  rows = _Rows(place, w_ref, tile_ref, arrived, block, together)
  step_of, part_of = lambda i: jax.lax.div(i, parts), lambda i: jax.lax.rem(i, parts)

  def copies(i):
    across = pl.ds(pl.multiple_of(part_of(i) * columns, columns), columns)
    return rows.copies(step_of(i), across, jax.lax.rem(i, 2))

  def add(i, slot):
    product = mosaic_tpu.dot(x_ref[part_of(i)], tile_ref[slot].astype(x_ref.dtype), 1, 1)
    sum_ref[...] = jnp.where(part_of(i) == 0, product, sum_ref[...] + product)

    @pl.when(part_of(i) == parts - 1)
    def _():
      y_ref[step_of(i)] = sum_ref[...].astype(y_ref.dtype)

  _stream(steps[0] * parts, copies, add)


class _Rows(NamedTuple):
  """A `_Rows` copies listed blocks of rows of the weight, `together` at a time, to one of two tiles."""

  place: Any
  weight: Any
  tile: Any
  arrived: Any
  block: int
  together: int

  def copies(self, step: Array, across: Any, slot: Array) -> Iterator[Any]:
    for i in range(self.together):
      row = pl.multiple_of(self.place[step * self.together + i] * self.block, self.block)
      to = self.tile.at[slot, pl.ds(i * self.block, self.block)]
      yield pltpu.make_async_copy(self.weight.at[pl.ds(row, self.block), across], to, self.arrived.at[slot])


def _stream(count: Array, copies: Callable[[Array], Iterator[Any]], use: Callable[[Array, Array], None]) -> None:
  """Calls `use(i, slot)` for `count` tiles, one after the other, while the next tile is copied."""
  def start(i):
    for copy in copies(i):
      copy.start()

  def each(i, _):
    pl.when(i + 1 < count)(lambda: start(i + 1))
    for copy in copies(i):
      copy.wait()
    use(i, jax.lax.rem(i, 2))

  pl.when(count > 0)(lambda: start(jnp.int32(0)))
  jax.lax.fori_loop(0, count, each, None)
