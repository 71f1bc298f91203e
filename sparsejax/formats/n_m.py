"""`NMArray`: at most N nonzeros in every group of M neighbours along the contraction."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import groups, patterns
from sparsejax.formats import arrays
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NMArray(arrays.PackedArray, kind='nm'):
  """An array with at most `n` nonzeros in every group of `m` neighbours along its contracted axes.

  The contracted axes, in the order of `axes`, are merged into one of length K in the place of the first of them; all
  other axes keep their order. Along the merged axis `values` has K n / m entries, group after group, and `indices`
  each entry's position in its group, strictly increasing, in b = ceil(log2 m) bits: every 8 consecutive positions
  become b bytes, of which byte p holds bit p of the 8 (the first in the lowest bit). `uint8`, so its length there is
  b ceil(K n / m / 8); the bits behind the last position are zero. `axes` count from the end and `sizes` are the dense
  lengths of just these axes, so that leading axes may come and go (`vmap`, `scan`, stacking).
  """

  values: Array
  indices: Array
  n: int = arrays.static()
  m: int = arrays.static()
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()

  @classmethod
  def from_dense(cls, w: Array, n: int, m: int, axes: Axes | int | tuple[int, ...], check: bool = True) -> 'NMArray':
    """Pack `w`. Groups with fewer than `n` nonzeros are filled with their first zeros.

    Under `jit`, `vmap` and `eval_shape` values cannot be checked, so `check=False` is required there: each group keeps
    its first `n` nonzeros and the rest is dropped. Raises `ValueError` for a group with more, and for a shape, an axis
    or a dtype that cannot be packed.
    """
    axes = arrays.contracted('NMArray.from_dense', w, axes)
    why = _misfit(w, n, m, axes, check)
    if why:
      raise arrays.Misfit('NMArray.from_dense', w.shape, why)
    return _packed(w, int(n), int(m), axes)

  @property
  def axis(self) -> int:
    """Where `values` and `indices` have the merged axis, counted from the end."""
    return min(self.axes) + len(self.axes) - 1

  @property
  def shape(self) -> tuple[int, ...]:
    """The dense shape."""
    rest = iter(np.delete(self.values.shape, self.axis).tolist())
    lengths = dict(zip(self.axes, self.sizes))
    return tuple(lengths[a] if a in lengths else next(rest) for a in range(-self.ndim, 0))

  @property
  def ndim(self) -> int:
    return self.values.ndim + len(self.axes) - 1

  def positions(self) -> Array:
    """Each value's position in its group, shaped like `values`; `uint8`, or `uint16` where m > 256."""
    return groups.decoded(self.indices, self.values.shape[self.axis], self.m, self.values.ndim + self.axis)

  def to_dense(self) -> Array:
    """The dense array, bit for bit. Differentiable in `values`."""
    return _dense(self)

  def described(self) -> dict[str, Any]:
    return {'n': self.n, 'm': self.m, 'axes': [a + self.ndim for a in self.axes]}

  @classmethod
  def restored(cls, parts, shape, about):
    n, m, axes = about['n'], about['m'], about['axes']
    known = axes and set(axes) <= set(range(len(shape))) and len(set(axes)) == len(axes)
    if not known or not 1 <= n <= m <= 1024:
      raise ValueError(f'cannot be {n}:{m} along the axes {axes} of shape {shape}')
    return cls(**parts, n=n, m=m, axes=tuple(a - len(shape) for a in axes), sizes=tuple(shape[a] for a in axes))

  def problem(self) -> str | None:
    return _invalid(self)


def _misfit(w: Array, n: Any, m: int, axes: tuple[int, ...], check: bool) -> str | None:
  """Why `w` cannot be packed along `axes`, with the remedy."""
  if not isinstance(n, (int, np.integer)) or n < 1:
    return f'n must be a known whole number, at least 1, to be packed as n:{m}, not {n!r}.'
  at = Axes(contracted=axes, output=tuple(a for a in range(w.ndim) if a not in axes))
  why = patterns.NM(n, m).validate(tuple(w.shape), at) or arrays.dtype_misfit(w.dtype)
  return why or (_crowded(w, int(n), int(m), axes) if check else None)


def _crowded(w: Array, n: int, m: int, axes: tuple[int, ...]) -> str | None:
  """Says which groups have more than `n` nonzeros, or that nobody can know."""
  if not arrays.concrete(w):
    return arrays.TRACED
  counts = np.asarray(_counts(w, m, axes))
  bad = np.argwhere(counts > n)
  if not len(bad):
    return None
  first = bad[0].tolist()
  place = ', '.join(str(i) if a != min(axes) else f'group {i}' for a, i in enumerate(first))
  found = (f'{len(bad)} of {counts.size} groups of {m} along axes {axes} have more than {n} nonzeros, the first, '
           f'[{place}], has {counts[tuple(first)]}.')
  with np.errstate(invalid='ignore'):  # signalling NaNs
    positive = np.where(np.asarray(w) == 0, np.zeros((), w.dtype), w)
  if (np.asarray(_counts(positive, m, axes)) <= n).all():
    return f'{found} Some are -0.0, which packing keeps: replace them by jnp.where(w == 0, 0, w).'
  return (f'{found} Make them sparse first: project(params, opt_state), or train on into `fine_tune_steps`, or '
          'choose another pattern, axis or `where`. sparsejax.check names every such parameter.')


@functools.partial(jax.jit, static_argnums=(1, 2))
def _counts(w: Array, m: int, axes: tuple[int, ...]) -> Array:
  """Nonzeros of each group: `[..., K / m, ...]`."""
  nonzero = groups.split(groups.bits(groups.merged(w, axes, m)) != 0, m, min(axes))
  return jnp.sum(nonzero, axis=min(axes) + 1, dtype=jnp.int16)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _packed(w: Array, n: int, m: int, axes: tuple[int, ...]) -> NMArray:
  axis = min(axes) + 1
  octets = m * (8 // math.gcd(n, 8))  # the indices of eight neighbours share bytes, across groups
  grouped = groups.split(groups.merged(w, axes, octets), m, axis - 1)
  positions = groups.first_nonzeros(groups.bits(grouped) != 0, n, axis)
  values = groups.joined(groups.exactly(groups.take, grouped, positions, axis), axis)
  indices = groups.encoded(groups.joined(positions, axis), m, axis - 1)
  return NMArray(values, indices, n, m, tuple(a - w.ndim for a in axes), tuple(w.shape[a] for a in axes))


def merged(packed: NMArray) -> Array:
  """`[..., K, ...]`: dense, the contracted axes still merged."""
  axis = packed.values.ndim + packed.axis + 1
  values, positions = (groups.split(a, packed.n, axis - 1) for a in (packed.values, packed.positions()))
  return groups.joined(groups.exactly(groups.placed, values, positions, packed.m, axis), axis)


@jax.jit
def _dense(packed: NMArray) -> Array:
  return groups.unmerged(merged(packed), tuple(a + packed.ndim for a in packed.axes), packed.sizes)


def _invalid(packed: NMArray) -> str | None:
  values, indices, k = packed.values, packed.indices, math.prod(packed.sizes)
  entries, bits = list(values.shape), list(values.shape)
  entries[packed.axis] = k * packed.n // packed.m
  bits[packed.axis] = -(-entries[packed.axis] // 8) * groups.width(packed.m)
  if k % packed.m or list(values.shape) != entries or list(indices.shape) != bits or indices.dtype != jnp.uint8:
    return (f'values {list(values.shape)} and indices {indices.dtype}{list(indices.shape)} do not make groups of '
            f'{packed.n}:{packed.m} along a length of {k}: that takes values {entries} and indices uint8{bits}.')
  if not _ordered(indices, entries[packed.axis], packed.n, packed.m, values.ndim + packed.axis):
    return f'its indices are not strictly increasing positions below {packed.m} in every group, followed by zero bits.'
  return None


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _ordered(indices: Array, length: int, n: int, m: int, axis: int) -> Array:
  positions = groups.decoded(indices, length, m, axis)
  grouped = groups.split(positions, n, axis)
  before, after = (jax.lax.slice_in_dim(grouped, i, n - 1 + i, axis=axis + 1) for i in (0, 1))
  clean = jnp.all(groups.encoded(positions, m, axis) == indices)  # nothing in the padding
  return jnp.all(before < after) & jnp.all(positions.astype(jnp.int32) < m) & clean
