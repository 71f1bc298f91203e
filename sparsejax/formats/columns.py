"""`CSCArray`: a matrix with zeros anywhere, in compressed sparse columns; the format of the unstructured products."""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, groups
from sparsejax.formats import arrays
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class CSCArray(arrays.PackedArray, kind='csc'):
  """A matrix `[K, N]` with zeros anywhere, or a stack of such with equally many stored, `[..., K, N]`.

  `values`, `[..., nnz]`, is what is stored of one column after the other, in each by row: value i lies in row
  `rows[i]` and column `cols[i]`, and those of column j from `starts[j]` to `starts[j + 1]`: the compressed rows of the
  transpose. For the product with the transpose, `order` lists the values the other way round, by row and then by
  column, those of row k from `row_starts[k]` to `row_starts[k + 1]`. All five are `int32`: 12 bytes beside each value,
  so it is for products, not for small files.

  `sizes` is the dense shape without the leading axes of a stack, which may come and go (`vmap`, `scan`); `axes` are
  those of its axes, counted from the end, that are contracted and, in this order, make up K. The others make up N.
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
    if why := arrays.host_misfit(w) or arrays.matrix_misfit(at) or _mask_misfit(w, mask):
      raise arrays.Misfit('CSCArray.from_dense', w.shape, why)
    w = np.asarray(w)
    stored = w.view(f'u{w.dtype.itemsize}') != 0 if mask is None else np.asarray(mask)
    values, stored = _matrices(w, at), _matrices(stored, at)
    if len(counts := {str(one.sum()) for one in stored}) > 1:
      raise arrays.Misfit('CSCArray.from_dense', w.shape, 'the matrices of the stack have different numbers of '
                          f'nonzeros, {errors.some(sorted(counts))}; pack them one by one, or prune all to the same.')
    each = [_listed(*np.nonzero(one.T)[::-1], one.shape) for one in stored]
    lead = [w.shape[a] for a in at.layer]
    stacked = lambda parts: jnp.asarray(np.stack(parts).reshape(*lead, len(parts[0])))
    parts = [stacked(part) for part in ([v.T[s.T] for v, s in zip(values, stored)], *zip(*each))]
    return cls(*parts, tuple(a - w.ndim for a in at.contracted), tuple(w.shape[len(lead):]))

  @property
  def shape(self) -> tuple[int, ...]:
    """The dense shape."""
    return (*self.values.shape[:-1], *self.sizes)

  @property
  def contracted(self) -> int:
    """K, the length of the contraction."""
    return math.prod(self.sizes[a] for a in self.axes)

  @property
  def outputs(self) -> tuple[int, ...]:
    """The axes that are not contracted; N is their product."""
    return tuple(n for a, n in enumerate(self.sizes) if a - len(self.sizes) not in self.axes)

  @property
  def density(self) -> float:
    """The share of weights that are stored."""
    return self.values.shape[-1] / max(math.prod(self.sizes), 1)

  def to_dense(self) -> Array:
    """The dense array, bit for bit. Differentiable in `values`."""
    return _dense(self)

  def described(self) -> dict[str, Any]:
    return {'axes': [a + self.ndim for a in self.axes], 'stacked': self.values.ndim - 1}

  @classmethod
  def restored(cls, parts, shape, about):
    axes, lead = about['axes'], about['stacked']
    if not 0 <= lead < len(shape) or not axes or len(set(axes)) < len(axes) or (
        not set(axes) < set(range(lead, len(shape)))):
      raise ValueError(f'cannot be a stack of {lead} axes, contracted along {axes}, of shape {shape}')
    return cls(**parts, axes=tuple(a - len(shape) for a in axes), sizes=tuple(shape[lead:]))

  def problem(self) -> str | None:
    return _invalid(self)


def _mask_misfit(w: Array, mask: Array | None) -> str | None:
  if mask is not None and (tuple(mask.shape) != tuple(w.shape) or mask.dtype != bool):
    return f'mask of shape {tuple(mask.shape)} and dtype {mask.dtype} must be bool of the same shape.'
  return None if mask is None or arrays.concrete(mask) else arrays.TRACED


def _matrices(w: np.ndarray, at: Axes) -> np.ndarray:
  """`[layers, K, N]`."""
  lengths = [math.prod(w.shape[a] for a in axes) for axes in (at.layer, at.contracted, at.output)]
  return np.transpose(w, (*at.layer, *at.contracted, *sorted(at.output))).reshape(lengths)


def _listed(rows: np.ndarray, cols: np.ndarray, shape: tuple[int, int]) -> list[np.ndarray]:
  """All indices, of places in the order of their columns, then rows."""
  starts = lambda index, n: np.append(0, np.cumsum(np.bincount(index, minlength=n)))
  found = (rows, cols, np.lexsort((cols, rows)), starts(cols, shape[1]), starts(rows, shape[0]))
  return [a.astype(np.int32) for a in found]


@jax.jit
def _dense(packed: CSCArray) -> Array:
  k, n = packed.contracted, math.prod(packed.outputs)

  def matrix(values, places):
    return jnp.zeros((k, n), values.dtype).at[places].set(values, mode='promise_in_bounds')

  place, lead = matrix, packed.values.shape[:-1]
  for _ in lead:
    place = jax.vmap(place)
  whole = groups.exactly(place, packed.values, (packed.rows, packed.cols))
  whole = whole.reshape(*lead, *(packed.sizes[a] for a in packed.axes), *packed.outputs)
  outputs = [a for a in range(-len(packed.sizes), 0) if a not in packed.axes]
  back = np.argsort([a + len(packed.sizes) for a in (*packed.axes, *outputs)])
  return jnp.transpose(whole, (*range(len(lead)), *(len(lead) + back)))


def _invalid(packed: CSCArray) -> str | None:
  lead, count = packed.values.shape[:-1], packed.values.shape[-1]
  k, n = packed.contracted, math.prod(packed.outputs)
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
