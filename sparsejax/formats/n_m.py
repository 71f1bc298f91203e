"""`NMArray`: at most N nonzeros in every group of M neighbours along the contraction."""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours, patterns
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

  With a `width` above 1 (`NM(n, m, width)`), `width` neighbours along the output share their positions: the axes
  `outputs`, merged in this order, have length N, and `indices` is `[..., b ceil(K n / m / 8), N / width]`, all other
  axes in front. `values` is as it always is. Without a width `outputs` is empty.
  """

  values: Array
  indices: Array
  n: int = arrays.static()
  m: int = arrays.static()
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()
  width: int = arrays.static(default=1)
  outputs: tuple[int, ...] = arrays.static(default=())

  @classmethod
  def from_dense(cls, w: Array, n: int, m: int, axes: Axes | int | tuple[int, ...], check: bool = True,
                 width: int = 1) -> 'NMArray':
    """Pack `w`. Groups with fewer than `n` nonzeros are filled with their first zeros.

    With a `width`, a vector of that many outputs counts as a nonzero if one of them is; if `axes` are not `Axes`, all
    other axes are outputs.

    Under `jit`, `vmap` and `eval_shape` values cannot be checked, so `check=False` is required there: each group keeps
    its first `n` nonzeros and the rest is dropped. Raises `ValueError` for a group with more, and for a shape, an axis
    or a dtype that cannot be packed.
    """
    outputs = _outputs(w, axes, width)
    axes = arrays.contracted('NMArray.from_dense', w, axes)
    why = _misfit(w, n, m, axes, check, width, outputs)
    if why:
      raise arrays.Misfit('NMArray.from_dense', w.shape, why)
    if width > 1:
      return _packed_vectors(w, int(n), int(m), axes, int(width), outputs)
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
    if self.width == 1:
      return neighbours.decoded(self.indices, self.values.shape[self.axis], self.m, self.values.ndim + self.axis)
    shared = self.shared_positions()
    whole = jnp.broadcast_to(shared[..., None], (*shared.shape, self.width))
    front, at, outputs = self.places()
    sizes = [self.values.shape[a] for a in outputs]
    return _in_place(neighbours.joined(whole, shared.ndim), (front, at, outputs), sizes)

  def places(self) -> tuple[list[int], int, list[int]]:
    """Which axes `values` has, counted from the front: those in front, the merged contraction, and `outputs`.

    Without a `width` all that are not contracted are outputs.
    """
    axes, others = (tuple(a + self.ndim for a in group) for group in (self.axes, self.outputs))
    return _places(self.ndim, axes, others or tuple(a for a in range(self.ndim) if a not in axes))

  def shared_positions(self) -> Array:
    """Each vector's position in its group, with a `width`: `[..., K n / m, N / width]`, all other axes in front."""
    return neighbours.decoded(self.indices, self.values.shape[self.axis], self.m, self.indices.ndim - 2)

  def to_dense(self) -> Array:
    """The dense array, bit for bit. Differentiable in `values`."""
    return _dense(self)

  def described(self) -> dict[str, Any]:
    vectors = {'width': self.width, 'outputs': [a + self.ndim for a in self.outputs]} if self.width > 1 else {}
    return {'n': self.n, 'm': self.m, 'axes': [a + self.ndim for a in self.axes], **vectors}

  @classmethod
  def restored(cls, parts, shape, about):
    n, m, axes = about['n'], about['m'], about['axes']
    known = axes and set(axes) <= set(range(len(shape))) and len(set(axes)) == len(axes)
    if not known or not 1 <= n <= m <= 1024:
      raise ValueError(f'cannot be {n}:{m} along the axes {axes} of shape {shape}')
    width, outputs = about.get('width', 1), about.get('outputs', [])  # files without vectors have neither
    along = [*axes, *outputs]
    if not set(along) <= set(range(len(shape))) or len(set(along)) < len(along) or width < 1 or (
        bool(outputs) != (width > 1)):
      raise ValueError(f'cannot have vectors of {width} along the axes {outputs} of shape {shape}')
    from_end = lambda group: tuple(a - len(shape) for a in group)
    return cls(**parts, n=n, m=m, axes=from_end(axes), sizes=tuple(shape[a] for a in axes), width=width,
               outputs=from_end(outputs))

  def problem(self) -> str | None:
    return _invalid(self)


def _outputs(w: Array, axes: Axes | int | tuple[int, ...], width: int) -> tuple[int, ...]:
  """The output axes that vectors lie along, counted from the front; none where there are no vectors."""
  if width == 1:
    return ()
  if isinstance(axes, Axes):
    return arrays.contracted('NMArray.from_dense', w, axes.output)
  picked = arrays.contracted('NMArray.from_dense', w, axes)
  return tuple(a for a in range(w.ndim) if a not in picked)


def _misfit(w: Array, n: Any, m: int, axes: tuple[int, ...], check: bool, width: int, outputs: tuple[int, ...]
            ) -> str | None:
  """Why `w` cannot be packed along `axes`, with the remedy."""
  if not isinstance(n, (int, np.integer)) or n < 1:
    return f'n must be a known whole number, at least 1, to be packed as n:{m}, not {n!r}.'
  why = patterns.NM(n, m, width).validate(tuple(w.shape), Axes(axes, outputs)) or arrays.dtype_misfit(w.dtype)
  return why or (_crowded(w, int(n), int(m), axes, int(width), outputs) if check else None)


def _crowded(w: Array, n: int, m: int, axes: tuple[int, ...], width: int, outputs: tuple[int, ...]) -> str | None:
  """Says which groups have more than `n` nonzeros, or that nobody can know."""
  if not arrays.concrete(w):
    return arrays.TRACED
  count = lambda w: np.asarray(_counts(w, m, axes) if width == 1 else _vector_counts(w, m, axes, width, outputs))
  counts = count(w)
  bad = np.argwhere(counts > n)
  if not len(bad):
    return None
  first, along = bad[0].tolist(), min(axes) if width == 1 else counts.ndim - 2
  place = ', '.join(str(i) if a != along else f'group {i}' for a, i in enumerate(first))
  what = 'nonzeros' if width == 1 else f'vectors of {width} that are not zero'
  found = (f'{len(bad)} of {counts.size} groups of {m} along axes {axes} have more than {n} {what}, the first, '
           f'[{place}], has {counts[tuple(first)]}.')
  with np.errstate(invalid='ignore'):  # signalling NaNs
    positive = np.where(np.asarray(w) == 0, np.zeros((), w.dtype), w)
  if (count(positive) <= n).all():
    return f'{found} Some are -0.0, which packing keeps: replace them by jnp.where(w == 0, 0, w).'
  return (f'{found} Make them sparse first: project(params, opt_state), or train on into `fine_tune_steps`, or '
          'choose another pattern, axis or `where`. sparsejax.check names every such parameter.')


@functools.partial(jax.jit, static_argnums=(1, 2))
def _counts(w: Array, m: int, axes: tuple[int, ...]) -> Array:
  """Nonzeros of each group: `[..., K / m, ...]`."""
  nonzero = neighbours.split(neighbours.bits(neighbours.merged(w, axes, m)) != 0, m, min(axes))
  return jnp.sum(nonzero, axis=min(axes) + 1, dtype=jnp.int16)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _vector_counts(w: Array, m: int, axes: tuple[int, ...], width: int, outputs: tuple[int, ...]) -> Array:
  """Vectors of each group that are not zero: `[..., K / m, N / width]`."""
  vectors = neighbours.tiled(neighbours.bits(w) != 0, axes, outputs, (m, width))[0]
  return jnp.sum(jnp.any(vectors, -1), -2, dtype=jnp.int16)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _packed(w: Array, n: int, m: int, axes: tuple[int, ...]) -> NMArray:
  axis = min(axes) + 1
  octets = m * (8 // math.gcd(n, 8))  # the indices of eight neighbours share bytes, across groups
  grouped = neighbours.split(neighbours.merged(w, axes, octets), m, axis - 1)
  positions = neighbours.first_nonzeros(neighbours.bits(grouped) != 0, n, axis)
  values = neighbours.joined(neighbours.exactly(neighbours.take, grouped, positions, axis), axis)
  indices = neighbours.encoded(neighbours.joined(positions, axis), m, axis - 1)
  return NMArray(values, indices, n, m, tuple(a - w.ndim for a in axes), tuple(w.shape[a] for a in axes))


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4, 5))
def _packed_vectors(w: Array, n: int, m: int, axes: tuple[int, ...], width: int, outputs: tuple[int, ...]) -> NMArray:
  octets = m * (8 // math.gcd(n, 8))
  # [..., K/m, m, N/V, V]
  vectors = neighbours.tiled(neighbours.undivided(w, axes, octets), axes, outputs, (m, width))[0]
  axis = vectors.ndim - 3
  positions = neighbours.first_nonzeros(jnp.any(neighbours.bits(vectors) != 0, -1), n, axis)
  taken = neighbours.exactly(neighbours.take, vectors, positions[..., None], axis)
  indices = neighbours.encoded(neighbours.joined(positions, axis), m, axis - 1)
  from_end = lambda group: tuple(a - w.ndim for a in group)
  rows = neighbours.joined(neighbours.joined(taken, vectors.ndim - 1), axis)
  values = _in_place(rows, _places(w.ndim, axes, outputs), [w.shape[a] for a in outputs])
  from_end = lambda group: tuple(a - w.ndim for a in group)
  return NMArray(values, indices, n, m, from_end(axes), tuple(w.shape[a] for a in axes), width, from_end(outputs))


def _places(rank: int, axes: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[list[int], int, list[int]]:
  """Where the axes of a dense array are in `values`: those in front, the merged contraction, and the outputs."""
  rest, at = [a for a in range(rank) if a not in axes], min(axes)
  order = [*rest[:at], None, *rest[at:]]
  front = [i for i, a in enumerate(order) if a is not None and a not in outputs]
  return front, at, [order.index(a) for a in outputs]


def _in_place(rows: Array, places: tuple[list[int], int, list[int]], lengths: list[int]) -> Array:
  """`[..., K n / m, N]`, all other axes in front and outputs of these `lengths`, with its axes in their `places`."""
  front, at, outputs = places
  return jnp.transpose(rows.reshape(*rows.shape[:-1], *lengths), np.argsort([*front, at, *outputs]))


def merged(packed: NMArray) -> Array:
  """`[..., K, ...]`: dense, the contracted axes still merged."""
  axis = packed.values.ndim + packed.axis + 1
  values, positions = (neighbours.split(a, packed.n, axis - 1) for a in (packed.values, packed.positions()))
  return neighbours.joined(neighbours.exactly(neighbours.placed, values, positions, packed.m, axis), axis)


@jax.jit
def _dense(packed: NMArray) -> Array:
  return neighbours.unmerged(merged(packed), tuple(a + packed.ndim for a in packed.axes), packed.sizes)


def _invalid(packed: NMArray) -> str | None:
  values, indices, k = packed.values, packed.indices, math.prod(packed.sizes)
  if packed.ndim < -min(*packed.axes, *packed.outputs, -1):
    return f'values {list(values.shape)} do not have the axes {(*packed.axes, *packed.outputs)} of its dense shape.'
  entries, (front, at, outputs) = list(values.shape), packed.places()
  entries[at] = k * packed.n // packed.m
  across = math.prod(values.shape[a] for a in outputs)
  bits, axis = (entries, at) if packed.width == 1 else (
      [*(values.shape[a] for a in front), entries[at], across // packed.width], len(front))
  bits = [-(-n // 8) * neighbours.width(packed.m) if a == axis else n for a, n in enumerate(bits)]
  whole = k % packed.m == 0 and across % packed.width == 0
  if not whole or list(values.shape) != entries or list(indices.shape) != bits or indices.dtype != jnp.uint8:
    return (f'values {list(values.shape)} and indices {indices.dtype}{list(indices.shape)} do not make groups of '
            f'{patterns.NM(packed.n, packed.m, packed.width)} along a length of {k}: that takes values {entries} and '
            f'indices uint8{bits}.')
  if not _ordered(indices, entries[at], packed.n, packed.m, axis):
    return f'its indices are not strictly increasing positions below {packed.m} in every group, followed by zero bits.'
  return None


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _ordered(indices: Array, length: int, n: int, m: int, axis: int) -> Array:
  positions = neighbours.decoded(indices, length, m, axis)
  grouped = neighbours.split(positions, n, axis)
  before, after = (jax.lax.slice_in_dim(grouped, i, n - 1 + i, axis=axis + 1) for i in (0, 1))
  clean = jnp.all(neighbours.encoded(positions, m, axis) == indices)  # nothing in the padding
  return jnp.all(before < after) & jnp.all(positions.astype(jnp.int32) < m) & clean
