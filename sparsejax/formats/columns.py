"""Defines `CSCArray`, a matrix with zeros anywhere in compressed sparse columns.

    packed = formats.CSCArray.from_dense(w, axes=0)      # `w` is `[K, N]`, contracted along K
    packed.values, packed.rows, packed.cols              # the nonzeros, and the row and column of each
    packed.density                                       # the fraction of weights that are stored

`kernels_pallas.unstructured_matmul` multiplies with the format.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import patterns
from sparsejax.formats import arrays, gaps, misfits
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CSCArray(arrays.MatrixArray):
  """A `CSCArray` packs a matrix `[K, N]` with zeros anywhere, or a stack `[..., K, N]` of equally many stored entries.

  `values`, `[..., nnz]`, holds one column after another, sorted by row within a column. Value i lies in row `rows[i]`
  and column `cols[i]`. The values of column j are those from `starts[j]` to `starts[j + 1]`: compressed rows of the
  transpose.

  `order`, for the product with the transpose, lists the values by row and then by column. The values of row k are those
  of `order` from `row_starts[k]` to `row_starts[k + 1]`. All five index arrays are `int32`: 12 bytes beside each
  value. A file stores `values` and one array `gaps` instead, one byte a value; see `formats.gaps`.
  """

  kind = 'csc'
  product = 'unstructured_matmul'
  default_pattern = patterns.Unstructured()
  matrix_rank = 1
  index_bytes = 1

  values: Array
  rows: Array
  cols: Array
  order: Array
  starts: Array
  row_starts: Array
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def from_dense(cls, w: Array, mask: Array | None = None, axes: Axes | int | tuple[int, ...] = -2,
                 signed_zeros: bool = False) -> 'CSCArray':
    """Packs the concrete array `w` on the host: its nonzeros or, with `mask`, its entries where `mask` is `True`.

    `mask` is a bool array of `w`'s shape; entries where it is `True` are stored even if they are zero. Without a mask,
    `-0.0` is stored only with `signed_zeros`. The matrices of a stack must store equally many entries,
    and the stack's axes `axes.layer` must come first. Raises `ValueError` for another stack, for 2^31 weights, for
    traced arrays, and for `axes`, a `mask` or a dtype that does not fit.
    """
    axes = arrays.matrix_axes('CSCArray.from_dense', w, axes)
    if why := misfits.host_misfit(w) or misfits.matrix_misfit(axes) or misfits.mask_misfit(w, mask):
      raise arrays.Misfit('CSCArray.from_dense', w.shape, why)
    stored = arrays.as_matrices(arrays.stored_entries(w, mask, signed_zeros), axes)
    values = arrays.as_matrices(np.asarray(w), axes)
    if misfit := misfits.stack_misfit(stored, 'nonzeros'):
      raise arrays.Misfit('CSCArray.from_dense', w.shape, misfit)
    indices = [_indices(*np.nonzero(matrix.T)[::-1], matrix.shape) for matrix in stored]
    parts = ([v.T[s.T] for v, s in zip(values, stored)], *zip(*indices))
    return cls(*arrays.with_layers(parts, w.shape, axes), *arrays.places(w.shape, axes))

  @classmethod
  def from_pattern(cls, w, pattern, axes, check=True, signed_zeros=False):
    return cls.from_dense(w, axes=axes, signed_zeros=signed_zeros)

  @classmethod
  def pays(cls, w, pattern, axes, signed_zeros=False):
    """Returns whether `w` is a matrix, or a stack of equal counts, that takes fewer bytes packed than dense."""
    if misfits.host_misfit(w) or misfits.matrix_misfit(axes := arrays.matrix_axes('CSCArray', w, axes)):
      return False
    stored = arrays.as_matrices(arrays.stored_entries(w, None, signed_zeros), axes)
    sparsity = 1 - np.count_nonzero(stored) / max(stored.size, 1)
    smaller = cls.expected_nbytes(w.shape, w.dtype, pattern, axes, sparsity) < w.size * w.dtype.itemsize
    return smaller and not misfits.stack_misfit(stored, 'nonzeros')

  @classmethod
  def expected_nbytes(cls, shape, dtype, pattern, axes, sparsity):
    layers, k, n = arrays.matrix_sizes(shape, axes)
    return layers * ((k * n - round(sparsity * k * n)) * (np.dtype(dtype).itemsize + 12) + 4 * (k + n + 2))

  @property
  def density(self) -> float:
    """The fraction of weights that are stored."""
    return self.values.shape[-1] / max(math.prod(self.sizes), 1)

  def in_files(self):
    k, n = self.contracted_size, math.prod(self.output_sizes)
    *lead, count = self.values.shape
    rows, cols = (np.asarray(index, np.int64).reshape(math.prod(lead), count) for index in (self.rows, self.cols))
    layers = np.arange(len(rows))[:, None]
    return {'values': self.values, 'gaps': gaps.encoded((layers * k * n + cols * k + rows).reshape(-1))}

  @classmethod
  def restored(cls, parts, shape, about):
    if 'gaps' not in parts:  # The file has all five index arrays, as version 1 does.
      return super().restored(parts, shape, about)
    values, code, fields = parts['values'], parts['gaps'], cls.matrix_fields(shape, about)
    lead, size = about['stacked'], math.prod(shape)
    contracted = math.prod(shape[a] for a in about['axes'])
    if values.ndim != lead + 1 or values.shape[:-1] != shape[:lead] or code.dtype != np.uint8 or code.ndim != 1:
      raise ValueError(f'values {list(values.shape)} and gaps {code.dtype}{list(code.shape)} are of no stack of {lead} '
                       'axes')
    layers, matrix = math.prod(shape[:lead]), math.prod(shape[lead:])
    if misfit := gaps.misfit(code, values.size, size) or _hollow(
        layers, contracted, matrix // max(contracted, 1), values.size):
      raise ValueError(misfit)
    layer, place = np.divmod(gaps.positions(code), max(matrix, 1))
    if not np.array_equal(layer, np.repeat(np.arange(layers), values.shape[-1])):
      raise ValueError('its gaps do not put equally many values into every matrix of the stack')
    cols, rows = np.divmod(place.reshape(layers, values.shape[-1]), max(contracted, 1))
    indices = [_indices(*pair, (contracted, matrix // max(contracted, 1))) for pair in zip(rows, cols)]
    parts = [np.reshape(part, (*shape[:lead], part.shape[-1])) for part in map(np.stack, zip(*indices))]
    return cls(values, *parts, **fields)

  def coordinates(self):
    return self.rows, self.cols

  def scattered(self, values, coordinates):
    zeros = jnp.zeros((self.contracted_size, math.prod(self.output_sizes)), values.dtype)
    return zeros.at[coordinates].set(values, mode='promise_in_bounds', unique_indices=True)

  def problem(self) -> str | None:
    lead, count = self.values.shape[:-1], self.values.shape[-1]
    k, n = self.contracted_size, math.prod(self.output_sizes)
    if why := _hollow(math.prod(lead), k, n, self.values.size):
      return why
    lengths = {'rows': count, 'cols': count, 'order': count, 'starts': n + 1, 'row_starts': k + 1}
    indices = {name: np.asarray(getattr(self, name)) for name in lengths}
    for name, length in lengths.items():
      if indices[name].shape != (*lead, length) or indices[name].dtype != np.int32:
        return (f'its {name} {indices[name].dtype}{list(indices[name].shape)} must be int32{[*lead, length]} for '
                f'values {list(self.values.shape)}.')
    for given in zip(*map(arrays.as_rows, indices.values())):
      rows, cols = given[:2]
      for name, index, length in (('rows', rows, k), ('cols', cols, n)):
        if count and (index.min() < 0 or index.max() >= length):
          return f'its {name} are not all from 0 to {length - 1}.'
      if (np.diff(cols.astype(np.int64) * k + rows) <= 0).any():
        return 'its values are not in the order of their columns and rows, each once.'
      expected = _indices(rows, cols, (k, n))
      wrong = [name for name, a, b in zip(lengths, given, expected) if not np.array_equal(a, b)]
      if wrong:
        return f'its {" and ".join(wrong)} do not list what is in its rows and cols.'
    return None


def _hollow(layers: int, k: int, n: int, count: int) -> str | None:
  """Returns why a file should not hold `count` values in matrices of this size, or `None`.

  The places where rows and columns begin take memory for each row and column, which a file need not have bytes for.
  """
  most = (1 << 20) + 64 * count
  return None if layers * (k + n) <= most else (
      f"its {layers} matrices have more than {most} rows and columns for {count} values; pack it as 'relative_index'.")


def _indices(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> list[np.ndarray]:
  """Returns `rows`, `cols`, `order`, `starts` and `row_starts` of entries sorted by column and then by row."""
  starts = lambda index, n: np.append(0, np.cumsum(np.bincount(index, minlength=n)))
  indices = (rows, cols, np.lexsort((cols, rows)), starts(cols, shape[1]), starts(rows, shape[0]))
  return [index.astype(np.int32) for index in indices]
