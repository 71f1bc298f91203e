"""`BlockSparseArray`: dense blocks of a matrix, the others zero; the format of the block-sparse kernels."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors
from sparsejax.formats import arrays
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BlockSparseArray(arrays.MatrixArray, kind='block_sparse', stored=3):
  """A matrix `[K, N]` of which blocks of `[bk, bn]` are stored, or are zero; or a stack of such, `[..., K, N]`.

  `values` is `[..., nnz, bk, bn]`, the blocks of one output column after another, in each by row; block i lies in block
  row `rows[i]` and block column `cols[i]`. `order` lists the blocks the other way round, by row and then by column, for
  the product with the transpose; all three are `int32[..., nnz]`. Every row and every column of blocks has at least one
  that is stored, because a kernel does not visit what is not listed: if need be one of zeros, for which `kept`,
  `bool[..., nnz]`, is `False`, and whose gradient is zero; `full` says that there is none. Where `bk` does not divide K
  or `bn` not N, the last blocks are filled up with zeros.

  `fan_in` is the number of blocks of each column and `fan_out` that of each row, as tuples known at trace time, so that
  a new mask compiles anew unless it is balanced; `None` where the matrices of a stack differ in it.
  """

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

  @classmethod
  def from_dense(cls, w: Array, mask: Array | None = None, block: tuple[int, int] = (128, 128),
                 axes: Axes | int | tuple[int, ...] = -2) -> 'BlockSparseArray':
    """Pack the concrete array `w`, on the host: the blocks that have a nonzero, or those in which `mask` has a `True`.

    `block` is the lengths along the contraction and along the output. `mask` is a bool array like `w`, `True` is kept:
    what it does not keep is stored as zero. Matrices of a stack (`axes.layer`, which must lead) must store equally
    many blocks. Raises `ValueError` for that, for traced arrays, and for an `axes`, `mask` or dtype that does not fit.
    """
    at = arrays.matrix_axes('BlockSparseArray.from_dense', w, axes)
    if why := arrays.host_misfit(w) or arrays.matrix_misfit(at) or _misfit(w, mask, block):
      raise arrays.Misfit('BlockSparseArray.from_dense', w.shape, why)
    w, mask = np.asarray(w), None if mask is None else np.asarray(mask)
    blocks = _split(w if mask is None else np.where(mask, w, np.zeros((), w.dtype)), at, block)
    stored = _any(blocks.view(f'u{w.dtype.itemsize}') != 0) if mask is None else _any(_split(mask, at, block))
    kept, stored = stored, np.stack([_everywhere(one) for one in stored])
    if len(counts := {str(one.sum()) for one in stored}) > 1:
      raise arrays.Misfit('BlockSparseArray.from_dense', w.shape, 'the matrices of the stack have different numbers of '
                          f'blocks, {errors.some(sorted(counts))}; pack them one by one, or prune all to the same.')
    return _packed(blocks, stored, kept, at, w.shape)

  @property
  def block(self) -> tuple[int, int]:
    """The lengths of a block along the contraction and along the output."""
    return self.values.shape[-2:]

  @property
  def grid(self) -> tuple[int, int]:
    """How many blocks there are along the contraction and along the output, stored or not."""
    bk, bn = self.block
    return -(-self.contracted // bk), -(-math.prod(self.output_sizes) // bn)

  @property
  def density(self) -> float:
    """The share of blocks that are stored."""
    return self.values.shape[-3] / math.prod(self.grid)

  def places(self):
    return self.rows, self.cols

  def placed(self, values, places):
    (kb, nb), (bk, bn) = self.grid, values.shape[-2:]

    def matrix(values, places):
      whole = jnp.zeros((kb, nb, bk, bn), values.dtype)
      whole = whole.at[places].set(values, mode='promise_in_bounds', unique_indices=True)
      return whole.transpose(0, 2, 1, 3).reshape(kb * bk, nb * bn)

    for _ in values.shape[:-3]:
      matrix = jax.vmap(matrix)
    return matrix(values, places)[..., :self.contracted, :math.prod(self.output_sizes)]

  @classmethod
  def restored(cls, parts, shape, about):
    matrix, lead = cls.matrix_of(shape, about), about['stacked']
    if parts['values'].ndim != lead + 3 or parts['rows'].shape != parts['values'].shape[:-2]:
      raise ValueError(f'values {list(parts["values"].shape)} and rows {list(parts["rows"].shape)} are of no stack of '
                       f'{lead} axes')
    whole = cls(**parts, fan_in=None, fan_out=None, full=bool(np.all(parts['kept'])), **matrix)
    fans = [_fan(np.asarray(index), n) for index, n in zip((whole.cols, whole.rows), reversed(whole.grid))]
    return dataclasses.replace(whole, fan_in=fans[0], fan_out=fans[1])

  def problem(self) -> str | None:
    return _invalid(self)


def _misfit(w: Array, mask: Array | None, block: tuple[int, int]) -> str | None:
  if len(block) != 2 or not all(isinstance(n, (int, np.integer)) and n >= 1 for n in block):
    return f'block must be two whole numbers, as in (128, 128), not {block!r}.'
  return arrays.mask_misfit(w, mask)


def _split(w: np.ndarray, at: Axes, block: tuple[int, int]) -> np.ndarray:
  """`[layers, K / bk, N / bn, bk, bn]`, filled up with zeros."""
  matrices = arrays.matrices(w, at)
  padded = np.pad(matrices, [(0, 0), *((0, -n % b) for n, b in zip(matrices.shape[1:], block))])
  layers, k, n = padded.shape
  return padded.reshape(layers, k // block[0], block[0], n // block[1], block[1]).transpose(0, 1, 3, 2, 4)


def _any(blocks: np.ndarray) -> np.ndarray:
  return blocks.any((-2, -1))


def _everywhere(stored: np.ndarray) -> np.ndarray:
  """`stored`, bool `[Kb, Nb]`, and what it takes for one block at least in every row and column."""
  stored = stored.copy()
  for column in np.flatnonzero(~stored.any(0)):
    stored[np.argmin(stored.sum(1)), column] = True  # where there are fewest, so that rows stay as equal as they are
  for row in np.flatnonzero(~stored.any(1)):
    stored[row, np.argmin(stored.sum(0))] = True
  return stored


def _packed(blocks: np.ndarray, stored: np.ndarray, kept: np.ndarray, at: Axes, shape: tuple[int, ...]
            ) -> BlockSparseArray:
  lead = [shape[a] for a in at.layer]
  index = [np.nonzero(one.T)[::-1] for one in stored]  # by column, then by row
  rows, cols = (np.stack(each).astype(np.int32) for each in zip(*index))
  order = np.stack([np.lexsort(each) for each in zip(cols, rows)]).astype(np.int32)
  values, kept = (np.stack([one[r, c] for one, r, c in zip(of, rows, cols)]) for of in (blocks, kept))
  stacked = lambda a: jnp.asarray(a.reshape(*lead, *a.shape[1:]))
  return BlockSparseArray(
      stacked(values), stacked(rows), stacked(cols), stacked(order), stacked(kept), _fan(cols, stored.shape[2]),
      _fan(rows, stored.shape[1]), bool(kept.all()), tuple(a - len(shape) for a in at.contracted),
      tuple(shape[len(lead):]))


def _fan(index: np.ndarray, n: int) -> tuple[int, ...] | None:
  """How often each of `n` is in the last axis of `index`, if that is the same all over its other axes."""
  counts = {tuple(np.bincount(one, minlength=n).tolist()) for one in index.reshape(-1, index.shape[-1])}
  return counts.pop() if len(counts) == 1 else None


def _invalid(packed: BlockSparseArray) -> str | None:
  index = [np.asarray(a) for a in (packed.rows, packed.cols, packed.order)]
  if any(a.shape != packed.values.shape[:-2] or a.dtype != np.int32 for a in index):
    return (f'values {list(packed.values.shape)} take rows, cols and order int32{list(packed.values.shape[:-2])}, not '
            f'{", ".join(f"{a.dtype}{list(a.shape)}" for a in index)}.')
  if packed.kept.shape != packed.rows.shape or packed.kept.dtype != bool or packed.full != packed.kept.all():
    return f'its kept must be bool{list(packed.rows.shape)}, and its full say whether all are.'
  for rows, cols, order in zip(*(a.reshape(-1, a.shape[-1]) for a in index)):
    for name, where, n in zip(('rows', 'cols'), (rows, cols), packed.grid):
      if set(where.tolist()) != set(range(n)):
        return f'its {name} must be all of 0 to {n - 1}, each at least once.'
    if (np.diff(cols.astype(np.int64) * packed.grid[0] + rows) <= 0).any():
      return 'its blocks are not in the order of their columns and rows, each once.'
    if not np.array_equal(order, np.lexsort((cols, rows))):
      return 'its order is not that of the rows, then the columns, of its blocks.'
  fans = [_fan(a, n) for a, n in zip((index[1], index[0]), reversed(packed.grid))]
  if fans != [packed.fan_in, packed.fan_out]:
    return 'its fan_in and fan_out are not the numbers of blocks in its columns and rows.'
  return _padding(packed, index)


def _padding(packed: BlockSparseArray, index: list[np.ndarray]) -> str | None:
  """Whether what fills up the last blocks is zero."""
  values = np.asarray(packed.values)
  bits = values.view(f'u{values.dtype.itemsize}') != 0
  sizes = packed.contracted, math.prod(packed.output_sizes)
  for axis, where, length, size in zip((-2, -1), index, packed.block, sizes):
    if size % length:
      filled = np.take(bits, range(size % length, length), axis).any((-2, -1))
      if (filled & (where == size // length)).any():
        return 'what fills up its last blocks is not zero.'
  return None
