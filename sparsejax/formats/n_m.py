"""Defines `NMArray`: at most N nonzeros in every group of M neighbours along the contraction.

    packed = formats.NMArray.from_dense(w, 2, 4, axes=0)   # `w` is `[K, N]`, contracted along K
    packed.values, packed.indices                          # `[K / 2, N]`, and two bits for each value
    packed.positions()                                     # each value's position in its group, 0 to 3

`kernels_pallas.nm_matmul` multiplies with the format.
"""

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours, patterns
from sparsejax.arguments import is_known
from sparsejax.formats import arrays, grouping, misfits, zeros
from sparsejax.formats.grouping import Grouping
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NMArray(arrays.PackedArray):
  """An `NMArray` stores an array with at most `n` nonzeros in every group of `m` neighbours along its contracted axes.

  The contracted axes, in the order of `axes`, are merged into one axis of length K at the place of the first of them.
  The remaining axes keep their order. Along the merged axis `values` has K n / m entries, group after group.

  `indices` holds each entry's position in its group, strictly increasing, in b = ceil(log2 m) bits. Every 8 consecutive
  positions become b bytes: byte p holds bit p of the 8 positions, the first position in the lowest bit. `indices` is
  `uint8` and has length b ceil(K n / m / 8) along the merged axis; the bits behind the last position are zero.

  `axes` count from the end, and `sizes` are the dense lengths of exactly these axes. Leading axes may therefore come
  and go (`vmap`, `scan`, stacking).

  With a `width` above 1 (`NM(n, m, width)`), `width` neighbours along the output share their position. The axes
  `outputs`, counted from the end and merged in this order, have length N. `indices` is then
  `[..., b ceil(K n / m / 8), N / width]`, with all other axes in front; `values` is the same as without a width.
  Without a width `outputs` is empty.
  """

  kind = 'nm'
  product = 'nm_matmul'
  takes_axes = True
  index_bytes = 1

  values: Array
  indices: Array
  n: int = arrays.static()
  m: int = arrays.static()
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()
  width: int = arrays.static(default=1)
  outputs: tuple[int, ...] = arrays.static(default=())
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def from_dense(cls, w: Array, n: int, m: int, axes: Axes | int | tuple[int, ...], check: bool = True,
                 width: int = 1, signed_zeros: bool = False) -> 'NMArray':
    """Packs `w`. Groups with fewer than `n` nonzeros also store their first zeros.

    With `signed_zeros`, `-0.0` counts as a nonzero; otherwise it becomes `0.0`.

    With a `width`, a vector of `width` outputs counts as a nonzero if one of its weights is. If `axes` are not `Axes`,
    all axes that are not contracted are outputs.

    Under `jit`, `vmap` and `eval_shape` values cannot be checked, and `check=False` is required: each group then keeps
    its first `n` nonzeros and drops the rest. Raises `ValueError` for a group with more nonzeros, and for a shape, an
    axis or a dtype that cannot be packed.
    """
    contracted = arrays.contracted_axes('NMArray.from_dense', w, axes)
    groups = Grouping(n, m, contracted, width, _outputs(w, axes, width))
    why = _misfit(w, groups, check)
    if not why:
      groups = Grouping(int(n), int(m), contracted, int(width), groups.outputs)
      w = w if isinstance(w, jax.Array) else jax.device_put(w)  # once for all programs
      occupied = grouping.occupied(w, groups, signed_zeros)
      why = _crowded(w, occupied, groups, signed_zeros) if check else None
    if why:
      raise arrays.Misfit('NMArray.from_dense', w.shape, why)
    return _packed(w, occupied, groups, signed_zeros)

  @classmethod
  def fits(cls, pattern):
    return isinstance(pattern, patterns.NM)

  @classmethod
  def from_pattern(cls, w, pattern, axes, check=True, signed_zeros=False):
    return cls.from_dense(w, pattern.n, pattern.m, axes, check, pattern.width, signed_zeros)

  @classmethod
  def in_blocks(cls, leaf, pattern, axes, signed_zeros=False):
    w = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    whole = jax.eval_shape(lambda w: cls.from_pattern(w, pattern, axes, check=False), w)
    multiple = _multiple_of_rows(pattern, leaf.shape, axes.contracted)
    if not leaf.blocks or not leaf.size or not multiple:
      return super().in_blocks(leaf, pattern, axes, signed_zeros)

    def packed():
      for block in leaf.in_multiples(multiple):
        try:
          yield cls.from_pattern(block, pattern, axes, signed_zeros=signed_zeros).arrays()
        except arrays.Misfit:  # The refusal of the whole leaf counts all of its groups.
          cls.from_pattern(leaf.load(), pattern, axes, signed_zeros=signed_zeros)
          raise

    return whole, packed()

  @property
  def pattern(self):
    return patterns.NM(self.n, self.m, self.width)

  @property
  def axis(self) -> int:
    """The merged axis of `values` and, without a `width`, of `indices`, counted from the end."""
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

  @property
  def leading(self) -> int:
    return self.ndim + min(*self.axes, *self.outputs, -1)

  def positions(self) -> Array:
    """Returns each value's position in its group, shaped like `values`; `uint8`, or `uint16` where m > 256."""
    if self.width == 1:
      return neighbours.decoded(self.indices, self.values.shape[self.axis], self.m, self.values.ndim + self.axis)
    shared = self.shared_positions()
    positions = jnp.broadcast_to(shared[..., None], (*shared.shape, self.width))
    front, contraction, outputs = self.value_axes()
    lengths = [self.values.shape[a] for a in outputs]
    return _in_place(neighbours.joined(positions, shared.ndim), (front, contraction, outputs), lengths)

  def value_axes(self) -> tuple[list[int], int, list[int]]:
    """Returns the axes of `values`, counted from the front: axes in front, the merged contraction, output axes.

    Without a `width` all axes that are not contracted are outputs.
    """
    axes, outputs = (tuple(a + self.ndim for a in group) for group in (self.axes, self.outputs))
    return _value_axes(self.ndim, axes, outputs or tuple(a for a in range(self.ndim) if a not in axes))

  def shared_positions(self) -> Array:
    """Returns each vector's position in its group: `[..., K n / m, N / width]`, all other axes in front.

    Only an array with a `width` above 1 has vectors.
    """
    return neighbours.decoded(self.indices, self.values.shape[self.axis], self.m, self.indices.ndim - 2)

  @jax.jit
  def to_dense(self) -> Array:
    return neighbours.unmerged(to_merged(self), tuple(a + self.ndim for a in self.axes), self.sizes)

  def described(self) -> dict[str, Any]:
    vectors = {'width': self.width, 'outputs': [a + self.ndim for a in self.outputs]} if self.width > 1 else {}
    return {'n': self.n, 'm': self.m, 'axes': [a + self.ndim for a in self.axes], **vectors}

  @classmethod
  def restored(cls, parts, shape, about):
    n, m, axes = about['n'], about['m'], about['axes']
    width, outputs = about.get('width', 1), about.get('outputs', [])  # Files without vectors have neither.
    along = [*axes, *outputs]
    arrays.refuse_other_numbers([n, m, width, *along])
    distinct = axes and set(along) <= set(range(len(shape))) and len(set(along)) == len(along)
    if not distinct or not 1 <= n <= m <= 1024 or width < 1 or bool(outputs) != (width > 1):
      raise ValueError(f'cannot be {n}:{m} along the axes {axes}, in vectors of {width} along the axes {outputs} of '
                       f'shape {shape}')
    return cls(**parts, n=n, m=m, axes=arrays.from_end(axes, len(shape)), sizes=tuple(shape[a] for a in axes),
               width=width, outputs=arrays.from_end(outputs, len(shape)))

  def problem(self) -> str | None:
    values, indices, k = self.values, self.indices, math.prod(self.sizes)
    if self.leading < 0:
      return f'values {list(values.shape)} do not have the axes {(*self.axes, *self.outputs)} of its dense shape.'
    entries, (front, contraction, outputs) = list(values.shape), self.value_axes()
    entries[contraction] = k * self.n // self.m
    n_outputs = math.prod(values.shape[a] for a in outputs)
    expected, axis = (entries, contraction) if self.width == 1 else (
        [*(values.shape[a] for a in front), entries[contraction], n_outputs // self.width], len(front))
    expected = [-(-n // 8) * neighbours.width(self.m) if a == axis else n for a, n in enumerate(expected)]
    divided = k % self.m == 0 and n_outputs % self.width == 0
    if not divided or list(values.shape) != entries or list(indices.shape) != expected or indices.dtype != jnp.uint8:
      return (f'values {list(values.shape)} and indices {indices.dtype}{list(indices.shape)} do not make groups of '
              f'{patterns.NM(self.n, self.m, self.width)} along a length of {k}: that takes values {entries} and '
              f'indices uint8{expected}.')
    if not _ordered(indices, entries[contraction], self.n, self.m, axis):
      return f'its indices are not strictly increasing positions below {self.m} in every group, followed by zero bits.'
    return None


def _multiple_of_rows(pattern: patterns.NM, shape: tuple[int, ...], axes: tuple[int, ...]) -> int | None:
  """Returns a number of rows of which multiples, packed one after another, are the packed array; `None` if none is."""
  if pattern.width > 1 or 0 in axes[1:]:
    return None
  octets = pattern.m * (8 // math.gcd(pattern.n, 8)) if axes[0] == 0 else 1
  return octets // math.gcd(octets, math.prod(shape[a] for a in axes[1:]))


def _outputs(w: Array, axes: Axes | int | tuple[int, ...], width: int) -> tuple[int, ...]:
  """Returns the output axes of vectors, counted from the front; none if `width` is 1 and there are no vectors."""
  if width == 1:
    return ()
  if isinstance(axes, Axes):
    return arrays.contracted_axes('NMArray.from_dense', w, axes.output)
  return arrays.matrix_axes('NMArray.from_dense', w, axes).output


def _misfit(w: Array, groups: Grouping, check: bool) -> str | None:
  """Returns why no values of `w` could be packed, or why they cannot be checked; `None` if they can."""
  n, m, axes, width, outputs = groups
  if not isinstance(n, (int, np.integer)) or n < 1:
    return f'n must be a known whole number, at least 1, to be packed as n:{m}, not {n!r}.'
  why = patterns.NM(n, m, width).validate(tuple(w.shape), Axes(axes, outputs)) or misfits.dtype_misfit(w.dtype)
  return why or (misfits.TRACED if check and not is_known(w) else None)


def _crowded(w: Array, occupied: Array, groups: Grouping, signed_zeros: bool) -> str | None:
  """Returns which groups have more than `n` nonzeros, with the remedy; `None` if no group has."""
  n, m, axes, width, _ = groups
  if grouping.fullest(occupied, groups) <= n:
    return None
  counts = np.asarray(neighbours.numbers(occupied, groups.along(occupied.ndim)))
  bad = np.argwhere(counts > n)
  merged = min(axes) if width == 1 else counts.ndim - 2
  place = ', '.join(str(i) if a != merged else f'group {i}' for a, i in enumerate(bad[0]))
  units = 'nonzeros' if width == 1 else f'vectors of {width} that are not zero'
  problem = (f'{len(bad)} of {counts.size} groups of {m} along axes {axes} have more than {n} {units}, the first, '
             f'[{place}], has {counts[tuple(bad[0])]}.')
  if signed_zeros and grouping.fullest(grouping.occupied(w, groups, False), groups) <= n:
    return f'{problem} Some are -0.0: leave signed_zeros out.'
  return (f'{problem} Make them sparse first: project(params, opt_state), or train on into `fine_tune_steps`, or '
          'choose another pattern, axis or `where`. sparsejax.check names every such parameter.')


def _packed(w: Array, occupied: Array, groups: Grouping, signed_zeros: bool) -> NMArray:
  # Several programs, because a single program would compute the positions again for the values and for the indices.
  positions = _positions(occupied, groups)
  values, indices, axes = _values(w, positions, groups, signed_zeros), _encoded(positions, groups), groups.axes
  return NMArray(values, indices, groups.n, groups.m, arrays.from_end(axes, w.ndim), tuple(w.shape[a] for a in axes),
                 groups.width, arrays.from_end(groups.outputs, w.ndim))


@functools.partial(jax.jit, static_argnums=1)
def _positions(occupied: Array, groups: Grouping) -> Array:
  """Returns the positions of the stored weights, or vectors, of each group: `n` instead of `m` entries."""
  return neighbours.first_nonzeros(occupied, groups.n, groups.along(occupied.ndim))


@functools.partial(jax.jit, static_argnums=(2, 3))
def _values(w: Array, positions: Array, groups: Grouping, signed_zeros: bool) -> Array:
  """Returns the `values` at the `positions` of the groups."""
  w = w if signed_zeros else zeros.without_signed_zeros(w)
  grouped, axis = groups.of(w)
  if groups.width == 1:
    return neighbours.joined(neighbours.exactly(neighbours.take, grouped, positions, axis), axis)
  taken = neighbours.exactly(neighbours.take, grouped, positions[..., None], axis)
  rows = neighbours.joined(neighbours.joined(taken, grouped.ndim - 1), axis)
  return _in_place(rows, _value_axes(w.ndim, groups.axes, groups.outputs), [w.shape[a] for a in groups.outputs])


@functools.partial(jax.jit, static_argnums=1)
def _encoded(positions: Array, groups: Grouping) -> Array:
  """Returns the `indices` of the positions of all groups."""
  along = groups.along(positions.ndim)
  return neighbours.encoded(neighbours.joined(positions, along), groups.m, along - 1)


def _value_axes(rank: int, axes: tuple[int, ...], outputs: tuple[int, ...]) -> tuple[list[int], int, list[int]]:
  """Returns which axes of `values` are in front, which one is the merged contraction, and which are the `outputs`.

  `axes` and `outputs` are axes of a dense array of `rank` axes.
  """
  rest, contraction = [a for a in range(rank) if a not in axes], min(axes)
  order = [*rest[:contraction], None, *rest[contraction:]]
  front = [i for i, a in enumerate(order) if a is not None and a not in outputs]
  return front, contraction, [order.index(a) for a in outputs]


def _in_place(rows: Array, value_axes: tuple[list[int], int, list[int]], lengths: list[int]) -> Array:
  """Returns `rows`, `[..., K n / m, N]`, with N split into outputs of these `lengths` and in the order of `values`."""
  front, contraction, outputs = value_axes
  return jnp.transpose(rows.reshape(*rows.shape[:-1], *lengths), np.argsort([*front, contraction, *outputs]).tolist())


def to_merged(packed: NMArray) -> Array:
  """Returns the dense array with its contracted axes still merged, `[..., K, ...]`."""
  axis = packed.values.ndim + packed.axis + 1
  values, positions = (neighbours.split(a, packed.n, axis - 1) for a in (packed.values, packed.positions()))
  return neighbours.joined(neighbours.exactly(neighbours.placed, values, positions, packed.m, axis), axis)


@functools.partial(jax.jit, static_argnums=(1, 2, 3, 4))
def _ordered(indices: Array, length: int, n: int, m: int, axis: int) -> Array:
  """Returns whether positions increase within each group and stay below `m`, and whether the padding bits are zero."""
  positions = neighbours.decoded(indices, length, m, axis)
  grouped = neighbours.split(positions, n, axis)
  before, after = (jax.lax.slice_in_dim(grouped, i, n - 1 + i, axis=axis + 1) for i in (0, 1))
  padded = jnp.all(neighbours.encoded(positions, m, axis) == indices)
  return jnp.all(before < after) & jnp.all(positions.astype(jnp.int32) < m) & padded
