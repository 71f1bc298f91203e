"""Block-sparse products on TPUs: one step of the grid for each stored block, its place read from scalar memory.

The blocks of an output are neighbours in the walk: they are summed in VMEM, zeroed at the first and stored at the last.
Two layouts, because a tile's last axis must be a multiple of the 128 lanes: with blocks of such lengths tokens are
rows; with smaller ones tokens lie along the lanes, x and y are transposed outside, and the matrix unit is not filled.
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

_TOKENS = 512  # of a tile, at most


def matmul(x: Array, w: BlockSparseArray, *, interpret: Any = False) -> Array:
  """`x [M, Kb bk]` times `w`: `[M, Nb bn]` in x's dtype, to which the blocks are cast, summed in float32."""
  steps = (w.rows, w.cols, jnp.arange(w.rows.shape[0], dtype=jnp.int32))
  return _product(x, w, steps, w.grid[1], 0, interpret)


def matmul_transposed(dy: Array, w: BlockSparseArray, *, interpret: Any = False) -> Array:
  """`dy [M, Nb bn]` times the transpose of `w`: `[M, Kb bk]`. The blocks are read in another order, not copied."""
  return _product(dy, w, (w.cols[w.order], w.rows[w.order], w.order), w.grid[0], 1, interpret)


def sampled(x: Array, dy: Array, w: BlockSparseArray, *, interpret: Any = False) -> Array:
  """The stored blocks of `x^T dy`, `x [M, Kb bk]`, `dy [M, Nb bn]`, summed in float32: like `w.values`."""
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
  """Why no product of `x` and `w` can run on a TPU, with the remedy."""
  if why := mosaic_tpu.refused_dtypes(x, w):
    return why
  if math.gcd(*w.block) % 8:
    return f'TPUs take blocks of multiples of 8, not {w.block}; pack with block=(128, 128)'
  fixed, each = _bytes(w.block, 4)
  if fixed + mosaic_tpu.LANES * each > mosaic_tpu.TILES:
    return f'blocks of {w.block} do not fit into the memory of a TPU core; pack with block=(512, 512) or smaller'
  if 12 * (nnz := w.rows.shape[0]) > mosaic_tpu.SCALARS:
    return (f'the places of its {nnz} blocks do not fit into scalar memory, {mosaic_tpu.SCALARS // 12} do; pack with '
            f'larger blocks than {w.block}, or split the weight along its outputs')
  return None


def _product(x: Array, w: BlockSparseArray, steps: tuple[Array, Array, Array], n_blocks: int, contracted: int,
             interpret: Any) -> Array:
  """`steps` is, for each block, which block of `x` it meets, which of the result it adds to, in order, and its own."""
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
  here = target[i]

  @pl.when((i == 0) | (target[jnp.maximum(i - 1, 0)] != here))
  def zero():
    sum_ref[...] = jnp.zeros_like(sum_ref)

  x = x_ref[...]
  w = w_ref[...].astype(x.dtype)
  sum_ref[...] += mosaic_tpu.dot(x, w, 1, contracted) if wide else mosaic_tpu.dot(w, x, contracted, 0)

  @pl.when((i == nnz - 1) | (target[jnp.minimum(i + 1, nnz - 1)] != here))
  def store():
    y_ref[...] = sum_ref[...].astype(y_ref.dtype)


def _wide(block: tuple[int, int]) -> bool:
  """Whether tokens are the rows of a tile and not its lanes."""
  return math.gcd(*block) % mosaic_tpu.LANES == 0


def _shape(wide: bool, tokens: int, length: int) -> tuple[int, int]:
  return (tokens, length) if wide else (length, tokens)


def _strip(wide: bool, tokens: int, length: int, place: Any) -> pl.BlockSpec:
  """A tile of tokens and one block of x or y, at `place(*grid, *scalars)`, whatever the layout."""
  return pl.BlockSpec(_shape(wide, tokens, length), lambda *at: place(*at)[::1 if wide else -1])


def _tokens(x: Array, w: BlockSparseArray) -> int:
  """How many tokens a tile has."""
  fixed, each = _bytes(w.block, max(x.dtype.itemsize, w.dtype.itemsize))
  multiple = mosaic_tpu.SUBLANES if _wide(w.block) else mosaic_tpu.LANES
  return mosaic_tpu.tile(x.shape[0], min(_TOKENS, (mosaic_tpu.TILES - fixed) // each), multiple)


def _bytes(block: tuple[int, int], itemsize: int) -> tuple[int, int]:
  """What a step holds in VMEM whatever the tokens, and for each token. What goes in and out is there twice."""
  return math.prod(block) * (8 + 2 * itemsize), sum(block) * (2 * itemsize + 8)
