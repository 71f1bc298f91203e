"""Groups of neighbours along one axis: picking entries out of them, putting them back, and positions in few bits.

The array code beneath `formats.NMArray`, and the tiles of `patterns`. Axes are counted from the front; every other axis
stays as it is, so that arrays sharded or batched along those need no communication.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.types import Array

# Up to this many entries a group, a chain of selects (which XLA fuses) beats gathers.
_UNROLLED = 32


def undivided(w: Array, axes: tuple[int, ...], m: int) -> Array:
  """`w` with every group of `m` along `axes` on one device, so that it can be reshaped to groups.

  For meshes with Explicit axes, where a reshape that moves data is an error: `w` is gathered along `axes`, if groups
  are divided there, and stays as it is otherwise. With Auto axes the compiler sees to it, and `w` stays as it is.
  """
  sharding = jax.typeof(w).sharding
  cut = [a for a in axes if sharding.spec[a] is not None]
  if not cut:
    return w
  local = sharding.shard_shape(w.shape)
  if cut == [axes[0]] and math.prod(local[a] for a in axes) % m == 0:
    return w
  spec = [None if a in axes else names for a, names in enumerate(sharding.spec)]
  return jax.sharding.reshard(w, sharding.update(spec=spec))


def everywhere(w: Array) -> Array:
  """`True` everywhere, computed from `w`: under `jit` a constant would lie on every device, whatever `w`'s sharding."""
  return (w == w) | (w != w)


def alike(mask: Array, other: Array) -> Array:
  """`mask` lying on the devices as `other` of its shape does, whatever the mesh."""
  sharding = jax.typeof(other).sharding
  if jax.typeof(mask).sharding.spec != sharding.spec:  # only where the mesh has Explicit axes
    return jax.sharding.reshard(mask, sharding)
  return mask & everywhere(other)  # with Auto axes, an operation of both is what makes the compiler lay them alike


def merged(w: Array, axes: tuple[int, ...], m: int) -> Array:
  """`w` with `axes`, in their order, as one axis in the place of the first of them, `undivided` for groups of `m`."""
  first, w = min(axes), jnp.transpose(undivided(w, axes, m), _order(w.ndim, axes))
  return w.reshape(*w.shape[:first], math.prod(w.shape[first:first + len(axes)]), *w.shape[first + len(axes):])


def unmerged(w: Array, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Array:
  """The inverse of `merged`, for `axes` of these lengths."""
  first = min(axes)
  w = w.reshape(*w.shape[:first], *sizes, *w.shape[first + 1:])
  return jnp.transpose(w, np.argsort(_order(w.ndim, axes)))


def _order(rank: int, axes: tuple[int, ...]) -> list[int]:
  rest = [a for a in range(rank) if a not in axes]
  return [*rest[:min(axes)], *axes, *rest[min(axes):]]


def split(w: Array, m: int, axis: int) -> Array:
  """`[..., K, ...]` as `[..., K / m, m, ...]`; the new axis is `axis + 1`, counted from the front."""
  return w.reshape(*w.shape[:axis], w.shape[axis] // m, m, *w.shape[axis + 1:])


def joined(w: Array, axis: int) -> Array:
  """`[..., G, n, ...]` as `[..., G n, ...]`, where `axis` is that of n, counted from the front."""
  return w.reshape(*w.shape[:axis - 1], w.shape[axis - 1] * w.shape[axis], *w.shape[axis + 1:])


def tiled(w: Array, contracted: tuple[int, ...], output: tuple[int, ...],
          tile: tuple[int, int]) -> tuple[Array, Callable[[Array], Array]]:
  """`w` as `[..., K / k, k, N / n, n]`, all other axes in front, for a `tile` of `(k, n)`, and the way back from it.

  K is the contracted axes merged in their order and N the output axes in theirs, `undivided` for the tiles.
  """
  along = (*contracted, *output)
  order = [*(a for a in range(w.ndim) if a not in along), *along]
  moved = jnp.transpose(undivided(undivided(w, contracted, tile[0]), output, tile[1]), order)
  front, inner, outer = np.split(moved.shape, [w.ndim - len(along), w.ndim - len(output)])
  # One axis after another: on a mesh with explicit axes no reshape may do more at once.
  rows = moved.reshape(*front, *inner, math.prod(outer)).reshape(*front, math.prod(inner), math.prod(outer))
  tiles = split(split(rows, tile[1], rows.ndim - 1), tile[0], rows.ndim - 2)

  def restored(tiles: Array) -> Array:
    rows = joined(joined(tiles, tiles.ndim - 1), tiles.ndim - 3)
    return jnp.transpose(rows.reshape(*front, *inner, math.prod(outer)).reshape(moved.shape), np.argsort(order))

  return tiles, restored


def bits(w: Array) -> Array:
  """`w` as unsigned integers of its width."""
  if w.dtype == jnp.bool_:
    return w.astype(jnp.uint8)
  return jax.lax.bitcast_convert_type(w, jnp.dtype(f'uint{8 * w.dtype.itemsize}'))


def from_bits(integers: Array, dtype: np.dtype) -> Array:
  """The inverse of `bits`."""
  return integers != 0 if dtype == jnp.bool_ else jax.lax.bitcast_convert_type(integers, dtype)


def exactly(move: Callable[..., Array], values: Array | tuple[Array, ...], places: Any, *static: int) -> Array:
  """`move` on the bits of `values`, an array or a tuple of arrays of one dtype.

  Bits have no derivative, so tangents are moved as the numbers that they are.
  """
  dtype = jax.tree.leaves(values)[0].dtype
  on_bits = lambda v, p: from_bits(move(jax.tree.map(bits, v), p, *static), dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    return on_bits(values, places)
  moved = jax.custom_jvp(on_bits)
  moved.defjvp(lambda primals, tangents: (on_bits(*primals), move(tangents[0], primals[1], *static)))
  return moved(values, places)


def filled(values: Array, slots: Array, stored: Array, base: Array) -> Array:
  """`values` at `slots` where `stored`, and `base` elsewhere."""
  filled = jnp.where(stored, values.at[slots].get(mode='clip'), base)
  if values.size == 1 and jnp.issubdtype(values.dtype, jnp.unsignedinteger):
    # LLVM would select between one value and zero as bfloat16, which may flush subnormals; not if a bit could yet flip.
    return filled ^ (~jnp.any(stored)).astype(values.dtype)
  return filled


def first_nonzeros(nonzero: Array, n: int, axis: int) -> Array:
  """Positions of the first `n` nonzeros along `axis`, filled up with the first zeros, increasing: `[..., n, ...]`."""
  m = nonzero.shape[axis]
  before = jnp.cumsum(nonzero, axis=axis, dtype=jnp.int16) - nonzero.astype(jnp.int16)  # nonzeros to the left
  zeros_before = _ramp(m, axis, nonzero.ndim) - before
  spare = n - jnp.sum(nonzero, axis=axis, keepdims=True, dtype=jnp.int16)
  keep = jnp.where(nonzero, before < n, zeros_before < spare)
  kept = jnp.cumsum(keep, axis=axis, dtype=jnp.int16)
  return _below(kept, _ramp(n, axis, nonzero.ndim) + 1, axis).astype(_position_dtype(m))


def take(w: Array, positions: Array, axis: int) -> Array:
  """The entries of `w` at `positions` along `axis`; both have the same other axes."""
  # XLA aborts the process over gathers of a sharded array by narrower integers ("Unsupported indices type: U8").
  return jnp.take_along_axis(w, positions.astype(jnp.int32), axis=axis, mode='promise_in_bounds')


def placed(values: Array, positions: Array, m: int, axis: int) -> Array:
  """Groups of `m` along `axis` with `values` at `positions` and zeros elsewhere."""
  n = values.shape[axis]
  ramp = _ramp(m, axis, values.ndim, positions.dtype)
  if n <= _UNROLLED:
    out = jnp.zeros([m if a == axis else length for a, length in enumerate(values.shape)], values.dtype)
    for i in range(n):
      value, position = (jax.lax.slice_in_dim(a, i, i + 1, axis=axis) for a in (values, positions))
      out = jnp.where(position == ramp, value, out)
    return out
  slots = jnp.minimum(_below(positions, ramp, axis), n - 1)
  return jnp.where(take(positions, slots, axis) == ramp, take(values, slots, axis), jnp.zeros((), values.dtype))


def _below(ordered: Array, queries: Array, axis: int) -> Array:
  """How many of `ordered`, which does not decrease along `axis`, are smaller than each of `queries`; `int16`."""
  length, shape = ordered.shape[axis], list(ordered.shape)
  shape[axis] = queries.shape[axis]
  count = jnp.zeros(shape, jnp.int16)
  if length <= _UNROLLED:
    entries = (jax.lax.slice_in_dim(ordered, i, i + 1, axis=axis) for i in range(length))
    return sum(((entry < queries).astype(jnp.int16) for entry in entries), count)

  def settle_bit(i, count):  # bisection from the highest bit; a loop, so that its steps share their buffers
    step = jnp.left_shift(1, length.bit_length() - 1 - i).astype(jnp.int16)
    probed = take(ordered, jnp.minimum(count + step - 1, length - 1), axis)
    return count + jnp.where((probed < queries) & (count <= length - step), step, 0).astype(jnp.int16)

  return jax.lax.fori_loop(0, length.bit_length(), settle_bit, count)


def _ramp(length: int, axis: int, rank: int, dtype: Any = jnp.int16) -> Array:
  """0, 1, 2, ... along `axis`, length one along the others."""
  return jnp.arange(length, dtype=dtype).reshape([length if a == axis else 1 for a in range(rank)])


def _position_dtype(m: int) -> Any:
  return jnp.uint8 if m <= 256 else jnp.uint16


def width(m: int) -> int:
  """Bits that hold the positions 0 ... m - 1: ceil(log2 m)."""
  return (m - 1).bit_length()


def encoded(positions: Array, m: int, axis: int) -> Array:
  """Every 8 positions along `axis` as `width(m)` bytes: byte p holds bit p of the 8, the first in its lowest bit."""
  pads = [(0, -positions.shape[a] % 8 if a == axis else 0) for a in range(positions.ndim)]
  eights = split(jnp.pad(positions, pads), 8, axis)
  shifts = _ramp(8, axis + 1, eights.ndim, jnp.uint8)
  planes = [((eights >> p) & 1).astype(jnp.uint8) << shifts for p in range(width(m))]
  octets = [jnp.sum(plane, axis=axis + 1, keepdims=True, dtype=jnp.uint8) for plane in planes]
  none = jax.lax.slice_in_dim(eights, 0, 0, axis=axis + 1).astype(jnp.uint8)  # m = 1: no bits at all
  return joined(jnp.concatenate([none, *octets], axis=axis + 1), axis + 1)


def decoded(indices: Array, length: int, m: int, axis: int) -> Array:
  """The inverse of `encoded`, `length` positions of it."""
  if width(m) == 0:
    return jnp.zeros([length if a == axis else size for a, size in enumerate(indices.shape)], jnp.uint8)
  octets = split(indices, width(m), axis)
  shifts, dtype = _ramp(8, axis + 1, octets.ndim, jnp.uint8), _position_dtype(m)
  planes = (jax.lax.slice_in_dim(octets, p, p + 1, axis=axis + 1) for p in range(width(m)))
  parts = [((plane >> shifts) & 1).astype(dtype) << p for p, plane in enumerate(planes)]
  eights = joined(functools.reduce(jnp.bitwise_or, parts), axis + 1)
  return jax.lax.slice_in_dim(eights, 0, length, axis=axis)
