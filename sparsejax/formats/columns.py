"""`CSCArray`: a matrix with zeros anywhere, in compressed sparse columns; the format of the unstructured products."""

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
class CSCArray(arrays.MatrixArray, kind='csc', stored=1):
  """A matrix `[K, N]` with zeros anywhere, or a stack of such with equally many stored, `[..., K, N]`.

  `values`, `[..., nnz]`, is what is stored of one column after the other, in each by row: value i lies in row
  `rows[i]` and column `cols[i]`, and those of column j from `starts[j]` to `starts[j + 1]`: the compressed rows of the
  transpose. For the product with the transpose, `order` lists the values the other way round, by row and then by
  column, those of row k from `row_starts[k]` to `row_starts[k + 1]`. All five are `int32`: 12 bytes beside each value,
  so it is for products, not for small files.
  """

  values: Array
  rows: Array
  cols: Array
  order: Array
  starts: Array
  row_starts: Array
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()

  @classmethod
  def from_dense(cls, w: Array, mask: Array | None = None, axes: Axes | int | tuple[int, ...] = -2) -> 'CSCArray':
    """Pack the concrete array `w`, on the host: what is not zero, or what it has where `mask` is `True`, zero or not.

    `mask` is a bool array like `w`. Matrices of a stack (`axes.layer`, which must lead) must store equally many.
    Raises `ValueError` for that, for 2^31 weights, for traced arrays, and for an `axes`, `mask` or dtype that does not
    fit.
    """
    at = arrays.matrix_axes('CSCArray.from_dense', w, axes)
    if why := arrays.host_misfit(w) or arrays.matrix_misfit(at) or arrays.mask_misfit(w, mask):
      raise arrays.Misfit('CSCArray.from_dense', w.shape, why)
    w = np.asarray(w)
    stored = w.view(f'u{w.dtype.itemsize}') != 0 if mask is None else np.asarray(mask)
    values, stored = (arrays.matrices(a, at) for a in (w, stored))
    if len(counts := {str(one.sum()) for one in stored}) > 1:
      raise arrays.Misfit('CSCArray.from_dense', w.shape, 'the matrices of the stack have different numbers of '
                          f'nonzeros, {errors.some(sorted(counts))}; pack them one by one, or prune all to the same.')
    each = [_listed(*np.nonzero(one.T)[::-1], one.shape) for one in stored]
    lead = [w.shape[a] for a in at.layer]
    stacked = lambda parts: jnp.asarray(np.stack(parts).reshape(*lead, len(parts[0])))
    parts = [stacked(part) for part in ([v.T[s.T] for v, s in zip(values, stored)], *zip(*each))]
    return cls(*parts, tuple(a - w.ndim for a in at.contracted), tuple(w.shape[len(lead):]))

  @property
  def density(self) -> float:
    """The share of weights that are stored."""
    return self.values.shape[-1] / max(math.prod(self.sizes), 1)

  def places(self):
    return self.rows, self.cols

  def placed(self, values, places):
    def matrix(values, places):
      whole = jnp.zeros((self.contracted, math.prod(self.output_sizes)), values.dtype)
      return whole.at[places].set(values, mode='promise_in_bounds')

    for _ in values.shape[:-1]:
      matrix = jax.vmap(matrix)
    return matrix(values, places)

  def problem(self) -> str | None:
    return _invalid(self)


def _listed(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> list[np.ndarray]:
  """All indices, of places in the order of their columns, then rows."""
  starts = lambda index, n: np.append(0, np.cumsum(np.bincount(index, minlength=n)))
  found = (rows, cols, np.lexsort((cols, rows)), starts(cols, shape[1]), starts(rows, shape[0]))
  return [a.astype(np.int32) for a in found]


def _invalid(packed: CSCArray) -> str | None:
  lead, count = packed.values.shape[:-1], packed.values.shape[-1]
  k, n = packed.contracted, math.prod(packed.output_sizes)
  lengths = {'rows': count, 'cols': count, 'order': count, 'starts': n + 1, 'row_starts': k + 1}
  index = {name: np.asarray(getattr(packed, name)) for name in lengths}
  for name, length in lengths.items():
    if index[name].shape != (*lead, length) or index[name].dtype != np.int32:
      return (f'its {name} {index[name].dtype}{list(index[name].shape)} must be int32{[*lead, length]} for values '
              f'{list(packed.values.shape)}.')
  for found in zip(*(a.reshape(math.prod(lead), a.shape[-1]) for a in index.values())):
    for name, where, length in zip(('rows', 'cols'), found, (k, n)):
      if count and (where.min() < 0 or where.max() >= length):
        return f'its {name} are not all from 0 to {length - 1}.'
    rows, cols = found[:2]
    if (np.diff(cols.astype(np.int64) * k + rows) <= 0).any():
      return 'its values are not in the order of their columns and rows, each once.'
    wrong = [name for name, a, b in zip(lengths, found, _listed(rows, cols, (k, n))) if not np.array_equal(a, b)]
    if wrong:
      return f'its {" and ".join(wrong)} do not list what is in its rows and cols.'
  return None
