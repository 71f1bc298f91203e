"""Computes block-sparse products on TPUs, with one step of the grid for each stored block.

The place of a block is read from scalar memory. The blocks of an output follow each other in the grid. Their sum is
kept in VMEM; it is zeroed at the first block and stored at the last.

There are two layouts, because the last axis of a tile must be a multiple of the 128 lanes. If the lengths of a block
are such multiples, tokens are the rows of a tile. With smaller blocks, tokens are the lanes: x and y are transposed
outside of the kernel, and the matrix unit is not filled.
"""

import functools
import math
from typing import Any

import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from kernels_pallas import mosaic_tpu
from sparsejax.formats import BlockSparseArray
from sparsejax.types import Array

_TOKENS = 512  # at most, of a tile


def matmul(x: Array, w: BlockSparseArray, *, interpret: Any = False) -> Array:
  """Returns `x [M, Kb bk]` times `w`, `[M, Nb bn]`, summed in float32. The blocks are cast to x's dtype."""
  steps = (w.rows, w.cols, jnp.arange(w.rows.shape[0], dtype=jnp.int32))
  return _product(x, w, steps, w.grid[1], 0, interpret)


def matmul_transposed(dy: Array, w: BlockSparseArray, *, interpret: Any = False) -> Array:
  """Returns `dy [M, Nb bn]` times the transpose of `w`, `[M, Kb bk]`. Blocks are read in another order, not copied."""
  return _product(dy, w, (w.cols[w.order], w.rows[w.order], w.order), w.grid[0], 1, interpret)


def sampled(x: Array, dy: Array, w: BlockSparseArray, *, interpret: Any = False) -> Array:
  """Returns the stored blocks of `x^T dy`, summed in float32, with the shape and dtype of `w.values`.

  `x` is `[M, Kb bk]`, and `dy` is `[M, Nb bn]`.
  """
  (bk, bn), nnz, wide = w.block, w.rows.shape[0], _wide(w.block)
  tokens = _tokens(x, w)
  x, dy = (mosaic_tpu.filled(a if wide else a.T, 1 - wide, tokens) for a in (x, dy))
  steps = x.shape[1 - wide] // tokens

  def kernel(rows, cols, x_ref, dy_ref, out_ref, sum_ref):
    step = pl.program_id(1)

    @pl.when(step == 0)
    def zero():
      sum_ref[...] = jnp.zeros_like(sum_ref)

    sum_ref[...] += mosaic_tpu.dot(x_ref[...], dy_ref[...].astype(x_ref.dtype), 1 - wide, 1 - wide)

    @pl.when(step == steps - 1)
    def store():
      out_ref[...] = sum_ref[...].astype(out_ref.dtype)

  strip = lambda length, of: _strip(wide, tokens, length, lambda i, m, *scalars: (m, scalars[of][i]))
  spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2, grid=(nnz, steps), in_specs=[strip(bk, 0), strip(bn, 1)],
      out_specs=pl.BlockSpec((None, bk, bn), lambda i, m, *scalars: (i, 0, 0)),
      scratch_shapes=[pltpu.VMEM((bk, bn), jnp.float32)])
  call = pl.pallas_call(
      kernel, grid_spec=spec, out_shape=mosaic_tpu.result((nnz, bk, bn), w.dtype, x, dy, w.rows), interpret=interpret,
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')), name='block_sparse_sampled')
  return call(w.rows, w.cols, x, dy)


def refusal(x: Array, w: BlockSparseArray) -> str | None:
  """Returns why no product of `x` and `w` can run on a TPU, with the remedy, or `None`."""
  if why := mosaic_tpu.refused_dtypes(x, w):
    return why
  if math.gcd(*w.block) % 8:
    return f'TPUs take blocks of multiples of 8, not {w.block}; pack with block=(128, 128)'
  fixed, each = _bytes(w.block, 4)
  if fixed + mosaic_tpu.LANES * each > mosaic_tpu.TILES:
    return f'blocks of {w.block} do not fit into the memory of a TPU core; pack with block=(512, 512) or smaller'
  if 12 * (nnz := w.rows.shape[0]) > mosaic_tpu.SCALARS:
    return (f'the places of its {nnz} blocks do not fit into scalar memory, which holds {mosaic_tpu.SCALARS // 12}; '
            f'pack with larger blocks than {w.block}, or split the weight along its outputs')
  return None


def _product(x: Array, w: BlockSparseArray, steps: tuple[Array, Array, Array], n_blocks: int, contracted: int,
             interpret: Any) -> Array:
  """Returns the product as a walk over the stored blocks.

  `steps` is `(source, target, block)`, each with an entry for each step. `block` is the index of a stored block in
  `w.values`. `source` is the block column of `x` that is multiplied by the block, and `target` is the block column of
  the result, in increasing order. `contracted` is the axis of a block that is contracted.
  """
  wide, nnz = _wide(w.block), w.rows.shape[0]
  length, width = w.block[contracted], w.block[1 - contracted]
  tokens, count = _tokens(x, w), x.shape[0]
  x = mosaic_tpu.filled(x if wide else x.T, 1 - wide, tokens)
  lead = x.shape[1 - wide]
  strip = functools.partial(_strip, wide, tokens)
  spec = pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=3, grid=(lead // tokens, nnz),
      in_specs=[strip(length, lambda m, i, source, target, block: (m, source[i])),
                pl.BlockSpec((None, *w.block), lambda m, i, source, target, block: (block[i], 0, 0))],
      out_specs=strip(width, lambda m, i, source, target, block: (m, target[i])),
      scratch_shapes=[pltpu.VMEM(_shape(wide, tokens, width), jnp.float32)])
  call = pl.pallas_call(
      functools.partial(_kernel, wide=wide, contracted=contracted, nnz=nnz), grid_spec=spec, interpret=interpret,
      out_shape=mosaic_tpu.result(_shape(wide, lead, n_blocks * width), x.dtype, x, w.values, w.rows),
      compiler_params=pltpu.CompilerParams(dimension_semantics=('parallel', 'arbitrary')),
      name=f'block_sparse_matmul{"_transposed" * contracted}')
  y = call(*steps, x, w.values)
  return y[:count] if wide else y[:, :count].T


def _kernel(source, target, block, x_ref, w_ref, y_ref, sum_ref, *, wide: bool, contracted: int, nnz: int):
  i = pl.program_id(1)
  output = target[i]

  @pl.when((i == 0) | (target[jnp.maximum(i - 1, 0)] != output))
  def zero():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  x = x_ref[...]
  w = w_ref[...].astype(x.dtype)
  sum_ref[...] += mosaic_tpu.dot(x, w, 1, contracted) if wide else mosaic_tpu.dot(w, x, contracted, 0)

  @pl.when((i == nnz - 1) | (target[jnp.minimum(i + 1, nnz - 1)] != output))
  def store():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _wide(block: tuple[int, int]) -> bool:
  """Returns whether tokens are the rows of a tile, and not its lanes."""
  return math.gcd(*block) % mosaic_tpu.LANES == 0


def _shape(wide: bool, tokens: int, length: int) -> tuple[int, int]:
  return (tokens, length) if wide else (length, tokens)


def _strip(wide: bool, tokens: int, length: int, place: Any) -> pl.BlockSpec:
  """Returns the specification of a tile of tokens and one block of x or y, at `place(*grid, *scalars)`."""
  return pl.BlockSpec(_shape(wide, tokens, length), lambda *indices: place(*indices)[::1 if wide else -1])


def _tokens(x: Array, w: BlockSparseArray) -> int:
  """Returns how many tokens a tile has."""
  fixed, each = _bytes(w.block, max(x.dtype.itemsize, w.dtype.itemsize))
  multiple = mosaic_tpu.SUBLANES if _wide(w.block) else mosaic_tpu.LANES
  return mosaic_tpu.tile(x.shape[0], min(_TOKENS, (mosaic_tpu.TILES - fixed) // each), multiple)


def _bytes(block: tuple[int, int], itemsize: int) -> tuple[int, int]:
  """Returns the bytes of VMEM of a step that do not depend on the tokens, and the bytes for each token.

  Inputs and outputs are counted twice, because they are double-buffered.
  """
  return math.prod(block) * (8 + 2 * itemsize), sum(block) * (2 * itemsize + 8)
