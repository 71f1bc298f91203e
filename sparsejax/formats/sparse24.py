"""`Sparse24Array`: 2:4 along the contraction as Hopper's sparse tensor cores read it; the format of that kernel."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours
from sparsejax.formats import arrays
from sparsejax.types import Array, Axes

ROWS, DEPTH = 64, 128  # what `metadata` covers at a time: the outputs of one instruction, and four of its depths of 32


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Sparse24Array(arrays.MatrixArray, kind='sparse24', stored=2):
  """A matrix `[K, N]` with at most 2 nonzeros in every 4 neighbours along K; or a stack of such, `[..., K, N]`.

  `values` is `[..., N, K / 2]`, transposed, so that what is contracted lies together. K is filled up with zeros to a
  multiple of 128 and N to one of 64. `metadata` is `int32[..., N / 64, K / 128, 128, 2]`: the registers that each of
  128 threads hands to `wgmma.mma_async.sp` for 64 outputs. In those of thread t = 32 w + 4 q + 2 s + h, register j has
  the outputs 16 w + q (low 16 bits) and 16 w + q + 8 (high) at the depths 64 j + 32 s + 16 h and on: for each of four
  neighbours four bits, the place of the first stored value and, above it, of the second. `s` is the instruction's
  sparsity selector; so no bit is stored twice, and metadata take an eighth of the bytes of 16-bit values.
  """

  values: Array
  metadata: Array
  axes: tuple[int, ...] = arrays.static()
  sizes: tuple[int, ...] = arrays.static()

  @classmethod
  def from_dense(cls, w: Array, axes: Axes | int | tuple[int, ...] = -2, check: bool = True) -> 'Sparse24Array':
    """Pack `w`. Fours with fewer than two nonzeros are filled with their first zeros.

    Under `jit`, `vmap` and `eval_shape` values cannot be checked, so `check=False` is required there: every four keep
    their first two nonzeros and the rest is dropped. Raises `ValueError` for four with more, and for an `axes` or a
    dtype that does not fit.
    """
    at = arrays.matrix_axes('Sparse24Array.from_dense', w, axes)
    why = arrays.matrix_misfit(at) or arrays.dtype_misfit(w.dtype) or (_crowded(w, at) if check else None)
    if why:
      raise arrays.Misfit('Sparse24Array.from_dense', w.shape, why)
    values, metadata = _packed(w, at)
    sizes = tuple(w.shape[len(at.layer):])
    return cls(values, metadata, tuple(a - w.ndim for a in at.contracted), sizes)

  def positions(self) -> Array:
    """Each value's place in its four, shaped like `values`; `uint8`."""
    return _decoded(self.metadata)

  def places(self):
    return self.positions()

  def placed(self, values, places):
    return jnp.swapaxes(matrices(values, places)[..., :math.prod(self.output_sizes), :self.contracted], -1, -2)

  def problem(self) -> str | None:
    return _invalid(self)


def _matrices(w: Array, at: Axes) -> Array:
  """`[layers..., N, K]`, filled up with zeros."""
  w = jnp.transpose(w, (*at.layer, *sorted(at.output), *at.contracted))
  lead = w.shape[:len(at.layer)]
  n = math.prod(w.shape[len(lead):len(lead) + len(at.output)])
  w = w.reshape(*lead, n, math.prod(w.shape[len(lead) + len(at.output):]))
  return jnp.pad(w, [*((0, 0) for _ in lead), (0, -n % ROWS), (0, -w.shape[-1] % DEPTH)])


def _crowded(w: Array, at: Axes) -> str | None:
  """Says how many fours have more than two nonzeros, or that nobody can know."""
  if not arrays.concrete(w):
    return arrays.TRACED
  counts = np.asarray(_counts(w, at))
  bad = np.argwhere(counts > 2)
  if not len(bad):
    return None
  *_, output, four = bad[0].tolist()
  return (f'{len(bad)} fours along axes {at.contracted} have more than 2 nonzeros, the first, four {four} of output '
          f'{output}, has {counts[tuple(bad[0])]}. Make them sparse first (-0.0 is no zero here): '
          'sparsejax.project(params, opt_state), or choose another pattern, axis or `where`.')


@functools.partial(jax.jit, static_argnums=1)
def _counts(w: Array, at: Axes) -> Array:
  """Nonzeros of every four: `[..., N, K / 4]`."""
  fours = neighbours.split(_matrices(neighbours.bits(w), at) != 0, 4, len(at.layer) + 1)
  return jnp.sum(fours, axis=-1, dtype=jnp.int8)


@functools.partial(jax.jit, static_argnums=1)
def _packed(w: Array, at: Axes) -> tuple[Array, Array]:
  nonzero = neighbours.split(_matrices(neighbours.bits(w), at) != 0, 4, len(at.layer) + 1)
  positions = neighbours.first_nonzeros(nonzero, 2, len(at.layer) + 2)

  def kept(w, positions):
    fours = neighbours.split(_matrices(w, at), 4, len(at.layer) + 1)
    return neighbours.joined(neighbours.take(fours, positions, fours.ndim - 1), fours.ndim - 1)

  return neighbours.exactly(kept, w, positions), _encoded(positions)


def _encoded(positions: Array) -> Array:
  """`metadata` of the places `[..., N, K / 4, 2]`."""
  *lead, n, fours, _ = positions.shape
  places = positions.astype(jnp.uint32)
  nibbles = (places[..., 0] | places[..., 1] << 2).reshape(*lead, n, fours // 4, 4)
  shifts = jnp.arange(0, 16, 4, dtype=jnp.uint32).reshape([1] * (nibbles.ndim - 1) + [4])
  halves = jnp.sum(nibbles << shifts, axis=-1, dtype=jnp.uint32)
  a = len(lead)  # [..., N / 64, w, low or high, q, K / 128, j, s, h]
  halves = halves.reshape(*lead, n // ROWS, 4, 2, 8, 4 * fours // DEPTH, 2, 2, 2)
  low, high = (jax.lax.index_in_dim(halves, i, a + 2, keepdims=False) for i in (0, 1))
  registers = jnp.transpose(low | high << 16, (*range(a), *(a + b for b in (0, 3, 1, 2, 5, 6, 4))))
  registers = registers.reshape(*lead, n // ROWS, 4 * fours // DEPTH, 128, 2)
  return jax.lax.bitcast_convert_type(registers, jnp.int32)


def _decoded(metadata: Array) -> Array:
  """The inverse of `_encoded`, the places of both values of a four side by side: `uint8[..., N, K / 2]`."""
  *lead, rows, depths, _, _ = metadata.shape
  registers = jax.lax.bitcast_convert_type(metadata, jnp.uint32).reshape(*lead, rows, depths, 4, 8, 2, 2, 2)
  a = len(lead)
  registers = jnp.transpose(registers, (*range(a), *(a + b for b in (0, 2, 3, 1, 6, 4, 5))))  # w, q, K / 128, j, s, h
  halves = jnp.stack([registers & 0xFFFF, registers >> 16], axis=a + 2)
  shifts = jnp.arange(0, 16, 2, dtype=jnp.uint32).reshape([1] * halves.ndim + [8])
  places = (halves[..., None] >> shifts & 3).astype(jnp.uint8)
  return places.reshape(*lead, rows * ROWS, depths * DEPTH // 2)


def matrices(values: Array, positions: Array) -> Array:
  """`[..., N, K]`: dense, transposed, the axes still merged and filled up."""
  axis = values.ndim
  pairs = (neighbours.split(a, 2, axis - 1) for a in (values, positions))
  return neighbours.joined(neighbours.placed(*pairs, 4, axis), axis)


def _invalid(packed: Sparse24Array) -> str | None:
  n, k = math.prod(packed.output_sizes), packed.contracted
  rows, depths = -(-n // ROWS), -(-k // DEPTH)
  lead = packed.values.shape[:-2]
  entries, registers = (*lead, rows * ROWS, depths * DEPTH // 2), (*lead, rows, depths, 128, 2)
  if packed.values.shape != entries or packed.metadata.shape != registers or packed.metadata.dtype != jnp.int32:
    return (f'values {list(packed.values.shape)} and metadata {packed.metadata.dtype}{list(packed.metadata.shape)} '
            f'are not those of {k} x {n}: that takes values {list(entries)} and metadata int32{list(registers)}.')
  places = np.asarray(_decoded(jnp.asarray(packed.metadata))).reshape(*entries[:-1], -1, 2)
  if (places[..., 0] >= places[..., 1]).any():
    return 'its metadata are not two increasing places in every four.'
  at = 4 * np.arange(places.shape[-2])[:, None] + places
  stored = np.asarray(packed.values)
  stored = stored.view(f'u{stored.dtype.itemsize}').reshape(places.shape) != 0
  if stored[..., n:, :, :].any() or stored[at >= k].any():
    return 'what fills up K and N is not zero.'
  return None
