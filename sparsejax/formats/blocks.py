"""Defines `BlockSparseArray`, a matrix of dense blocks and zero blocks.

    packed = formats.BlockSparseArray.from_dense(w, block=(128, 128), axes=0)    # `w` is `[K, N]`
    packed.values, packed.rows, packed.cols       # `[nnz, 128, 128]`, and the block row and block column of each
    packed.grid, packed.density                   # (ceil(K / 128), ceil(N / 128)), the fraction of blocks stored

`kernels_pallas.block_sparse_matmul` multiplies with the format.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import patterns
from sparsejax.formats import arrays, misfits
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockSparseArray(arrays.MatrixArray):
  """A `BlockSparseArray` packs a matrix `[K, N]` whose blocks `[bk, bn]` are stored or zero, or a stack `[..., K, N]`.

  `values` is `[..., nnz, bk, bn]`: the blocks of one block column after another, sorted by block row within a column.
  Block i lies in block row `rows[i]` and block column `cols[i]`. `order`, for the product with the transpose, lists the
  blocks by row and then by column. All three index arrays are `int32[..., nnz]`.

  Every block row and every block column stores at least one block: a kernel does not visit a row or column that is not
  listed. A row or column without nonzeros stores a block of zeros. `kept`, `bool[..., nnz]`, is `False` for this
  block, and its gradient is zero. `full` says that there is no such block. If `bk` does not divide K, or `bn` not N,
  zeros fill up the last blocks.

  `fan_in` is the number of stored blocks of each block column, `fan_out` that of each block row, as tuples known at
  trace time: a new mask compiles anew unless it is balanced. Both are `None` if the matrices of a stack differ in them.
  """

  kind = 'block_sparse'
  product = 'block_sparse_matmul'
  matrix_rank = 3

  values: Array
  rows: Array
  cols: Array
  order: Array
  kept: Array
  fan_in: tuple[int, ...] | None = arrays.static()
  fan_out: tuple[int, ...] | None = arrays.static()
  full: bool = arrays.static()
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def from_dense(cls, w: Array, mask: Array | None = None, block: tuple[int, int] = (128, 128),
                 axes: Axes | int | tuple[int, ...] = -2, signed_zeros: bool = False) -> 'BlockSparseArray':
    """Packs the concrete array `w` on the host: blocks with a nonzero or, with `mask`, blocks in which it has a `True`.

    `block` holds the lengths of a block along the contraction and along the output. `mask` is a bool array of `w`'s
    shape, `True` means kept; weights where it is `False` are stored as zero. With `signed_zeros` and no mask, `-0.0`
    counts as a nonzero; otherwise it becomes `0.0`. The matrices of a stack must store equally many blocks,
    and the stack's axes `axes.layer` must come first. Raises `ValueError` for another stack, for traced arrays, and for
    `axes`, a `mask` or a dtype that does not fit.
    """
    axes = arrays.matrix_axes('BlockSparseArray.from_dense', w, axes)
    if why := misfits.host_misfit(w) or misfits.matrix_misfit(axes) or _misfit(w, mask, block):
      raise arrays.Misfit('BlockSparseArray.from_dense', w.shape, why)
    chosen = arrays.stored_entries(w, mask, signed_zeros)
    blocks = _split(np.where(chosen, w, np.zeros((), w.dtype)), axes, block)
    kept = _split(chosen, axes, block).any((-2, -1))
    if misfit := misfits.stack_misfit(kept, 'blocks'):
      raise arrays.Misfit('BlockSparseArray.from_dense', w.shape, misfit)
    stored = _equally_many([_in_every_row_and_column(matrix) for matrix in kept])
    return _packed(blocks, stored, kept, axes, w.shape)

  @classmethod
  def fits(cls, pattern):
    return isinstance(pattern, patterns.Block)

  @classmethod
  def from_pattern(cls, w, pattern, axes, check=True, signed_zeros=False):
    return cls.from_dense(w, block=pattern.shape, axes=axes, signed_zeros=signed_zeros)

  @classmethod
  def expected_nbytes(cls, shape, dtype, pattern, axes, sparsity):
    """Returns the bytes if no block row and no block column is empty, or if as few as possible are."""
    layers, *sizes = arrays.matrix_sizes(shape, axes)
    grid = [-(-size // length) for size, length in zip(sizes, pattern.shape)]
    stored = max(math.prod(grid) - round(sparsity * math.prod(grid)), *grid)
    indices = 3 * 4 + 1  # rows, cols and order, and kept
    return layers * stored * (math.prod(pattern.shape) * np.dtype(dtype).itemsize + indices)

  @property
  def block(self) -> tuple[int, int]:
    """The lengths of a block along the contraction and along the output."""
    return self.values.shape[-2:]

  @property
  def pattern(self):
    return patterns.Block(self.block)

  @property
  def grid(self) -> tuple[int, int]:
    """The numbers of blocks along the contraction and along the output, stored or not."""
    bk, bn = self.block
    return -(-self.contracted_size // bk), -(-math.prod(self.output_sizes) // bn)

  @property
  def density(self) -> float:
    """The fraction of blocks that are stored."""
    return self.values.shape[-3] / max(math.prod(self.grid), 1)

  def coordinates(self):
    return self.rows, self.cols

  def scattered(self, values, coordinates):
    (kb, nb), (bk, bn) = self.grid, self.block
    zeros = jnp.zeros((kb, nb, bk, bn), values.dtype)
    blocks = zeros.at[coordinates].set(values, mode='promise_in_bounds', unique_indices=True)
    matrix = blocks.transpose(0, 2, 1, 3).reshape(kb * bk, nb * bn)
    return matrix[:self.contracted_size, :math.prod(self.output_sizes)]

  @classmethod
  def restored(cls, parts, shape, about):
    fields, lead = cls.matrix_fields(shape, about), about['stacked']
    if parts['values'].ndim != lead + 3 or parts['rows'].shape != parts['values'].shape[:-2]:
      raise ValueError(f'values {list(parts["values"].shape)} and rows {list(parts["rows"].shape)} are of no stack of '
                       f'{lead} axes')
    packed = cls(**parts, fan_in=None, fan_out=None, full=bool(np.all(parts['kept'])), **fields)
    if why := _outside(packed):
      raise ValueError(why)
    fans = [_fan(np.asarray(index), n) for index, n in zip((packed.cols, packed.rows), reversed(packed.grid))]
    return dataclasses.replace(packed, fan_in=fans[0], fan_out=fans[1])

  def problem(self) -> str | None:
    indices = [np.asarray(a) for a in (self.rows, self.cols, self.order)]
    if any(a.shape != self.values.shape[:-2] or a.dtype != np.int32 for a in indices):
      return (f'values {list(self.values.shape)} take rows, cols and order int32{list(self.values.shape[:-2])}, not '
              f'{", ".join(f"{a.dtype}{list(a.shape)}" for a in indices)}.')
    if self.kept.shape != self.rows.shape or self.kept.dtype != bool or self.full != self.kept.all():
      return f'its kept must be bool{list(self.rows.shape)}, and its full say whether all are.'
    if why := _outside(self):
      return why
    for rows, cols, order in zip(*map(arrays.as_rows, indices)):
      for name, index, n in zip(('rows', 'cols'), (rows, cols), self.grid):
        if set(index.tolist()) != set(range(n)):
          return f'its {name} must be all of 0 to {n - 1}, each at least once.'
      if (np.diff(cols.astype(np.int64) * self.grid[0] + rows) <= 0).any():
        return 'its blocks are not in the order of their columns and rows, each once.'
      if not np.array_equal(order, np.lexsort((cols, rows))):
        return 'its order is not that of the rows, then the columns, of its blocks.'
    fans = [_fan(a, n) for a, n in zip((indices[1], indices[0]), reversed(self.grid))]
    if fans != [self.fan_in, self.fan_out]:
      return 'its fan_in and fan_out are not the numbers of blocks in its columns and rows.'
    return _padding_problem(self, indices)


def _outside(packed: BlockSparseArray) -> str | None:
  """Returns why blocks lie outside of the grid, or why too few are stored for it, or `None`."""
  for name, index, n in zip(('rows', 'cols'), (packed.rows, packed.cols), packed.grid):
    if n > index.shape[-1] or np.any(np.asarray(index) < 0) or np.any(np.asarray(index) >= n):
      return f'its {name} must be all of 0 to {n - 1}, each at least once.'
  return None


def _misfit(w: Array, mask: Array | None, block: tuple[int, int]) -> str | None:
  if len(block) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in block):
    return f'block must be two whole numbers, as in (128, 128), not {block!r}.'
  return misfits.mask_misfit(w, mask)


def _split(w: np.ndarray, axes: Axes, block: tuple[int, int]) -> np.ndarray:
  """Returns `w` as `[layers, K / bk, N / bn, bk, bn]`, filled up with zeros."""
  matrices = arrays.as_matrices(w, axes)
  padded = np.pad(matrices, [(0, 0), *((0, -n % b) for n, b in zip(matrices.shape[1:], block))])
  layers, k, n = padded.shape
  return padded.reshape(layers, k // block[0], block[0], n // block[1], block[1]).transpose(0, 1, 3, 2, 4)


def _in_every_row_and_column(stored: np.ndarray) -> np.ndarray:
  """Returns `stored`, bool `[Kb, Nb]`, with at least one `True` in every row and column."""
  stored = stored.copy()
  if 0 in stored.shape:
    return stored
  for column in np.flatnonzero(~stored.any(0)):
    stored[np.argmin(stored.sum(1)), column] = True  # The row with the fewest blocks keeps the rows balanced.
  for row in np.flatnonzero(~stored.any(1)):
    stored[row, np.argmin(stored.sum(0))] = True
  return stored


def _equally_many(stored: list[np.ndarray]) -> np.ndarray:
  """Returns the matrices `[Kb, Nb]` of a stack as one array, with as many `True` in each as in the fullest.

  Matrices that keep equally many blocks may have different numbers of empty rows and columns, which are stored too.
  """
  most = max(matrix.sum() for matrix in stored)
  for matrix in stored:
    matrix.reshape(-1)[np.flatnonzero(~matrix)[:most - matrix.sum()]] = True
  return np.stack(stored)


def _packed(blocks: np.ndarray, stored: np.ndarray, kept: np.ndarray, axes: Axes, shape: tuple[int, ...]
            ) -> BlockSparseArray:
  coordinates = [np.nonzero(matrix.T)[::-1] for matrix in stored]  # by column, then by row
  rows, cols = (np.stack(index).astype(np.int32) for index in zip(*coordinates))
  order = np.stack([np.lexsort(index) for index in zip(cols, rows)]).astype(np.int32)
  values, kept = (np.stack([a[r, c] for a, r, c in zip(stack, rows, cols)]) for stack in (blocks, kept))
  parts = arrays.with_layers((values, rows, cols, order, kept), shape, axes)
  fans = _fan(cols, stored.shape[2]), _fan(rows, stored.shape[1])
  return BlockSparseArray(*parts, *fans, bool(kept.all()), *arrays.places(shape, axes))


def _fan(index: np.ndarray, n: int) -> tuple[int, ...] | None:
  """Returns how often each of `n` numbers is in the last axis of `index`, or `None` if its rows differ in this."""
  counts = {tuple(np.bincount(row, minlength=n).tolist()) for row in arrays.as_rows(index)}
  return counts.pop() if len(counts) == 1 else None


def _padding_problem(packed: BlockSparseArray, indices: list[np.ndarray]) -> str | None:
  """Returns why the padding of the last blocks is wrong: a value in it is not zero; or `None`."""
  bits = arrays.stored_entries(packed.values, None, True)
  sizes = packed.contracted_size, math.prod(packed.output_sizes)
  for axis, index, length, size in zip((-2, -1), indices, packed.block, sizes):
    if size % length:
      nonzero = np.take(bits, range(size % length, length), axis).any((-2, -1))
      if (nonzero & (index == size // length)).any():
        return 'what fills up its last blocks is not zero.'
  return None
