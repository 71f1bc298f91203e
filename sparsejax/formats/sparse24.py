"""Defines `Sparse24Array`: 2:4 along the contraction in the layout that Hopper's sparse tensor cores read.

    packed = formats.Sparse24Array.from_dense(w, axes=0)   # `w` is `[K, N]`, contracted along K
    packed.values, packed.metadata                         # `[N, K / 2]`, and the operands of `wgmma.mma_async.sp`
    packed.positions()                                     # each value's position in its group of four, 0 to 3

`kernels_pallas.sparse24_matmul` multiplies with the format.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours, patterns
from sparsejax.arguments import is_known
from sparsejax.formats import arrays, misfits, zeros
from sparsejax.types import Array, Axes

# `metadata` covers the outputs of one instruction, and four times its depth of 32, at a time.
ROWS, DEPTH = 64, 128


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sparse24Array(arrays.MatrixArray):
  """A `Sparse24Array` packs a matrix `[K, N]` with at most 2 nonzeros in every 4 neighbours along K, or a stack.

  `values` is `[..., N, K / 2]`: the transpose, in which contracted weights are contiguous. Zeros fill K up to a
  multiple of 128 and N to a multiple of 64.

  `metadata` is `int32[..., N / 64, K / 128, 128, 2]`: the two registers that each of 128 threads hands to
  `wgmma.mma_async.sp` for 64 outputs. Write a thread as t = 32 w + 4 q + 2 s + h. Its register j describes output
  16 w + q in the low 16 bits, and output 16 w + q + 8 in the high 16 bits. The depths of register j begin at
  64 j + 32 s + 16 h. Each group of four neighbours takes four bits: the position of the first stored value and, above
  it, of the second.

  `s` is the sparsity selector of the instruction, and no bit is stored twice. Metadata take an eighth of the bytes of
  16-bit values.
  """

  kind = 'sparse24'
  product = 'sparse24_matmul'
  default_pattern = patterns.NM(2, 4)
  matrix_rank = 2

  values: Array
  metadata: Array
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def from_dense(cls, w: Array, axes: Axes | int | tuple[int, ...] = -2, check: bool = True,
                 signed_zeros: bool = False) -> 'Sparse24Array':
    """Packs `w`. Groups with fewer than two nonzeros also store their first zeros.

    With `signed_zeros`, `-0.0` counts as a nonzero; otherwise it becomes `0.0`.

    Under `jit`, `vmap` and `eval_shape` values cannot be checked, and `check=False` is required: every group then keeps
    its first two nonzeros and drops the rest. Raises `ValueError` for a group with more nonzeros, and for `axes` or a
    dtype that does not fit.
    """
    axes = arrays.matrix_axes('Sparse24Array.from_dense', w, axes)
    why = misfits.matrix_misfit(axes) or misfits.dtype_misfit(w.dtype) or (
        _crowded(w, axes, signed_zeros) if check else None)
    if why:
      raise arrays.Misfit('Sparse24Array.from_dense', w.shape, why)
    values, metadata = _packed(w, axes, signed_zeros)
    return cls(values, metadata, *arrays.places(w.shape, axes))

  @classmethod
  def fits(cls, pattern):
    return isinstance(pattern, patterns.NM) and pattern.static and (pattern.m, pattern.width) == (4, 1) and (
        1 <= pattern.n <= 2)

  @classmethod
  def from_pattern(cls, w, pattern, axes, check=True, signed_zeros=False):
    return cls.from_dense(w, axes, check, signed_zeros)

  def positions(self) -> Array:
    """Returns each value's position in its group of four, shaped like `values`; `uint8`."""
    return _decoded(self.metadata)

  def coordinates(self):
    return self.positions()

  def scattered(self, values, coordinates):
    dense = dense_transposed(values, coordinates)
    return jnp.swapaxes(dense[..., :math.prod(self.output_sizes), :self.contracted_size], -1, -2)

  def problem(self) -> str | None:
    n, k = math.prod(self.output_sizes), self.contracted_size
    rows, depths = -(-n // ROWS), -(-k // DEPTH)
    lead = self.values.shape[:-2]
    entries, registers = (*lead, rows * ROWS, depths * DEPTH // 2), (*lead, rows, depths, 128, 2)
    if self.values.shape != entries or self.metadata.shape != registers or self.metadata.dtype != jnp.int32:
      return (f'values {list(self.values.shape)} and metadata {self.metadata.dtype}{list(self.metadata.shape)} '
              f'are not those of {k} x {n}: that takes values {list(entries)} and metadata int32{list(registers)}.')
    positions = np.asarray(_decoded(jnp.asarray(self.metadata))).reshape(*entries[:-1], -1, 2)
    if (positions[..., 0] >= positions[..., 1]).any():
      return 'its metadata are not two increasing places in every four.'
    depth = 4 * np.arange(positions.shape[-2])[:, None] + positions
    nonzero = arrays.stored_entries(self.values, None, True).reshape(positions.shape)
    if nonzero[..., n:, :, :].any() or nonzero[depth >= k].any():
      return 'what fills up K and N is not zero.'
    return None


def _padded(w: Array, axes: Axes) -> Array:
  """Returns `w` as `[layers..., N, K]`, filled up with zeros."""
  w = jnp.transpose(w, (*axes.layer, *sorted(axes.output), *axes.contracted))
  lead = w.shape[:len(axes.layer)]
  n = math.prod(w.shape[len(lead):len(lead) + len(axes.output)])
  w = w.reshape(*lead, n, math.prod(w.shape[len(lead) + len(axes.output):]))
  return jnp.pad(w, [*((0, 0) for _ in lead), (0, -n % ROWS), (0, -w.shape[-1] % DEPTH)])


def _crowded(w: Array, axes: Axes, signed_zeros: bool) -> str | None:
  """Returns how many groups have more than two nonzeros, or that nobody can know; `None` if no group has."""
  if not is_known(w):
    return misfits.TRACED
  counts = np.asarray(_counts(w, axes, signed_zeros))
  if counts.max(initial=0) <= 2:
    return None
  bad = np.argwhere(counts > 2)
  *_, output, group = bad[0].tolist()
  return (f'{len(bad)} fours along axes {axes.contracted} have more than 2 nonzeros, the first, four {group} of output '
          f'{output}, has {counts[tuple(bad[0])]}. Make them sparse first: '
          'sparsejax.project(params, opt_state), or choose another pattern, axis or `where`.')


@functools.partial(jax.jit, static_argnums=(1, 2))
def _counts(w: Array, axes: Axes, signed_zeros: bool) -> Array:
  """Returns the number of nonzeros of every group: `[..., N, K / 4]`."""
  w = w if signed_zeros else zeros.without_signed_zeros(w)
  return jnp.sum(_nonzero(w, axes), axis=-1, dtype=jnp.int8)


def _nonzero(w: Array, axes: Axes) -> Array:
  """Returns `bool[..., N, K / 4, 4]`, `True` where a weight is not zero."""
  return neighbours.split(_padded(neighbours.bits(w), axes) != 0, 4, len(axes.layer) + 1)


def _packed(w: Array, axes: Axes, signed_zeros: bool) -> tuple[Array, Array]:
  """Returns `values` and `metadata`. A single program would compute the positions twice, so each has its own."""
  positions = _positions(w, axes, signed_zeros)
  return _values(w, positions, axes, signed_zeros), _encoded(positions)


@functools.partial(jax.jit, static_argnums=(1, 2))
def _positions(w: Array, axes: Axes, signed_zeros: bool) -> Array:
  """Returns the positions of both stored weights of each group, `[..., N, K / 4, 2]`."""
  w = w if signed_zeros else zeros.without_signed_zeros(w)
  along = len(axes.layer) + 2
  return neighbours.first_nonzeros(neighbours.occupied(_nonzero(w, axes), along), 2, along)


@functools.partial(jax.jit, static_argnums=(2, 3))
def _values(w: Array, positions: Array, axes: Axes, signed_zeros: bool) -> Array:
  """Returns the `values` at the `positions` of the groups."""
  w = w if signed_zeros else zeros.without_signed_zeros(w)

  def kept(w, positions):
    groups = neighbours.split(_padded(w, axes), 4, len(axes.layer) + 1)
    return neighbours.joined(neighbours.take(groups, positions, groups.ndim - 1), groups.ndim - 1)

  return neighbours.exactly(kept, w, positions)


@jax.jit
def _encoded(positions: Array) -> Array:
  """Returns the `metadata` of the positions `[..., N, K / 4, 2]`."""
  *lead, n, groups, _ = positions.shape
  positions = positions.astype(jnp.uint32)
  nibbles = (positions[..., 0] | positions[..., 1] << 2).reshape(*lead, n, groups // 4, 4)
  shifts = jnp.arange(0, 16, 4, dtype=jnp.uint32).reshape([1] * (nibbles.ndim - 1) + [4])
  halves = jnp.sum(nibbles << shifts, axis=-1, dtype=jnp.uint32)
  a = len(lead)  # [..., N / 64, w, low or high, q, K / 128, j, s, h]
  halves = halves.reshape(*lead, n // ROWS, 4, 2, 8, 4 * groups // DEPTH, 2, 2, 2)
  low, high = (jax.lax.index_in_dim(halves, i, a + 2, keepdims=False) for i in (0, 1))
  registers = jnp.transpose(low | high << 16, (*range(a), *(a + b for b in (0, 3, 1, 2, 5, 6, 4))))
  registers = registers.reshape(*lead, n // ROWS, 4 * groups // DEPTH, 128, 2)
  return jax.lax.bitcast_convert_type(registers, jnp.int32)


def _decoded(metadata: Array) -> Array:
  """Returns the positions that `metadata` encodes, both of a group side by side: `uint8[..., N, K / 2]`."""
  *lead, rows, depths, _, _ = metadata.shape
  registers = jax.lax.bitcast_convert_type(metadata, jnp.uint32).reshape(*lead, rows, depths, 4, 8, 2, 2, 2)
  a = len(lead)
  registers = jnp.transpose(registers, (*range(a), *(a + b for b in (0, 2, 3, 1, 6, 4, 5))))  # w, q, K / 128, j, s, h
  halves = jnp.stack([registers & 0xFFFF, registers >> 16], axis=a + 2)
  shifts = jnp.arange(0, 16, 2, dtype=jnp.uint32).reshape([1] * halves.ndim + [8])
  positions = (halves[..., None] >> shifts & 3).astype(jnp.uint8)
  return positions.reshape(*lead, rows * ROWS, depths * DEPTH // 2)


def dense_transposed(values: Array, positions: Array) -> Array:
  """Returns the dense matrices `[..., N, K]`, with axes merged and zeros filled up."""
  axis = values.ndim
  pairs = (neighbours.split(a, 2, axis - 1) for a in (values, positions))
  return neighbours.joined(neighbours.placed(*pairs, 4, axis), axis)
