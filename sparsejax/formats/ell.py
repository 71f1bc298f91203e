"""Defines `ELLArray`, a matrix with zeros anywhere and equally many slots in every column (ELLPACK).

    packed = formats.ELLArray.from_dense(w, axes=0)      # `w` is `[K, N]`, contracted along K
    packed.values, packed.rows                           # `[L, N]`: the nonzeros of each column, and their rows

`kernels_pallas.ell_matmul` multiplies with the format, and `kernels_pallas.prepared` chooses it for few tokens.
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import patterns
from sparsejax.formats import arrays, misfits
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class ELLArray(arrays.MatrixArray):
  """An `ELLArray` packs a matrix `[K, N]` with zeros anywhere, or a stack of matrices, `[..., K, N]`.

  `values` is `[..., L, N]`: the nonzeros of each column in the order of their rows, where L is the largest number of
  nonzeros of a column. `rows`, of the same shape, holds the row of each value. In a column with fewer nonzeros, the
  last slots have the row K and the value zero, and a gradient of zero. `rows` is `uint16` if K is below 2^16, and
  `int32` otherwise.

  The format is for products with few tokens. The more the columns differ, the more bytes the format takes.
  """

  kind = 'ell'
  product = 'ell_matmul'
  default_pattern = patterns.Unstructured()
  matrix_rank = 2

  values: Array
  rows: Array
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def from_dense(cls, w: Array, mask: Array | None = None, axes: Axes | int | tuple[int, ...] = -2,
                 signed_zeros: bool = False) -> 'ELLArray':
    """Packs the concrete array `w` on the host: its nonzeros or, with `mask`, its entries where `mask` is `True`.

    `mask` is a bool array of `w`'s shape; entries where it is `True` are stored even if they are zero. Without a mask,
    `-0.0` is stored only with `signed_zeros`. The axes `axes.layer` of a stack must come first. Raises `ValueError` for
    2^31 weights, for traced arrays, and for `axes`, a `mask` or a dtype that does not fit.
    """
    axes = arrays.matrix_axes('ELLArray.from_dense', w, axes)
    if why := misfits.host_misfit(w) or misfits.matrix_misfit(axes) or misfits.mask_misfit(w, mask):
      raise arrays.Misfit('ELLArray.from_dense', w.shape, why)
    stored = arrays.as_matrices(arrays.stored_entries(w, mask, signed_zeros), axes)
    layers, k, n = stored.shape
    counts = np.count_nonzero(stored, axis=1)
    layer, column, row = np.nonzero(stored.swapaxes(1, 2))
    ends = np.cumsum(counts.reshape(-1))
    slot = np.arange(len(row)) - (ends - counts.reshape(-1))[layer * n + column]
    shape = layers, counts.max(initial=0), n
    values, rows = np.zeros(shape, w.dtype), np.full(shape, k, _row_dtype(k))
    values[layer, slot, column] = arrays.as_matrices(np.asarray(w), axes)[layer, row, column]
    rows[layer, slot, column] = row
    parts: list[Any] = [*arrays.with_layers((values, rows), w.shape, axes), *arrays.places(w.shape, axes)]
    return cls(*parts)

  @classmethod
  def from_pattern(cls, w, pattern, axes, check=True, signed_zeros=False):
    return cls.from_dense(w, axes=axes, signed_zeros=signed_zeros)

  @classmethod
  def expected_nbytes(cls, shape, dtype, pattern, axes, sparsity):
    """Returns the bytes if all columns have equally many nonzeros; more if they differ."""
    layers, k, n = arrays.matrix_sizes(shape, axes)
    return layers * -(-(k * n - round(sparsity * k * n)) // max(n, 1)) * n * (
        np.dtype(dtype).itemsize + np.dtype(_row_dtype(k)).itemsize)

  def coordinates(self):
    return self.rows

  def scattered(self, values, coordinates):
    k, n = self.contracted_size, math.prod(self.output_sizes)
    slots, columns = jnp.indices(values.shape, jnp.int32)
    rows = coordinates.astype(jnp.int32)
    rows = jnp.where(rows == k, k + slots, rows)  # Places behind the end are dropped, and no place is named twice.
    return jnp.zeros((k, n), values.dtype).at[rows, columns].set(values, mode='drop', unique_indices=True)

  def problem(self) -> str | None:
    k, n, rows = self.contracted_size, math.prod(self.output_sizes), np.asarray(self.rows)
    fits = self.values.ndim >= 2 and self.values.shape[-1] == n and rows.shape == self.values.shape
    if not fits or rows.dtype != _row_dtype(k):
      return (f'values {list(self.values.shape)} and rows {rows.dtype}{list(rows.shape)} are not those of {k} x {n}: '
              f'both have {n} columns, and rows have the dtype {np.dtype(_row_dtype(k))}.')
    rows = rows.astype(np.int64)
    rising = (np.diff(rows, axis=-2) > 0) | (rows[..., 1:, :] == k)
    if not rising.all() or (rows.size and (rows.min() < 0 or rows.max() > k)):
      return f'its rows do not increase within each column, from 0 to {k - 1}, with {k} behind the last.'
    if arrays.stored_entries(self.values, None, True)[rows == k].any():
      return 'a slot behind the last nonzero of a column is not zero.'
    return None


def _row_dtype(k: int) -> type:
  """Returns the dtype of `rows`, which holds the numbers 0 to `k`."""
  return np.uint16 if k < 1 << 16 else np.int32
