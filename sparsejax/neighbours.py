"""Handles groups of neighbours along one axis: takes entries out, puts entries back, and stores positions in few bits.

The packed formats and the tiles of `patterns` are built on these functions. `axis` is counted from the front. All other
axes stay as they are, so that arrays that are sharded or batched along other axes need no communication.

    groups = neighbours.split(w, 4, axis=0)                            # [K, N] -> [K / 4, 4, N]
    nonzero = neighbours.occupied(groups != 0, axis=1)                 # [K / 4, 1, N], uint8, a bit for each entry
    positions = neighbours.first_nonzeros(nonzero, 2, axis=1)          # [K / 4, 2, N], uint8
    values = neighbours.take(groups, positions, axis=1)                # [K / 4, 2, N]
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.types import Array

# In groups of at most 32 entries, a chain of selects, which XLA fuses, is faster than gathers.
_UNROLLED = 32
_SELECTED = 8  # `take` reads all entries of a group for each that it takes


def undivided(w: Array, axes: tuple[int, ...], m: int) -> Array:
  """Returns `w` sharded so that every group of `m` along `axes` is on one device, and `w` can be reshaped to groups.

  On meshes with Explicit axes, a reshape that needs communication is an error. `w` is therefore gathered along `axes`
  if the sharding divides a group, and returned unchanged otherwise. With Auto axes the compiler inserts the
  communication, and `w` is returned unchanged.
  """
  sharding = jax.typeof(w).sharding
  sharded = [a for a in axes if sharding.spec[a] is not None]
  if not sharded:
    return w
  local = sharding.shard_shape(w.shape)
  if sharded == [axes[0]] and math.prod(local[a] for a in axes) % m == 0:
    return w
  spec = [None if a in axes else names for a, names in enumerate(sharding.spec)]
  return jax.sharding.reshard(w, sharding.update(spec=spec))


def everywhere(w: Array) -> Array:
  """Returns a mask that is `True` everywhere, with the shape and the sharding of `w`.

  The mask is computed from `w`: under `jit`, a constant would be replicated on all devices.
  """
  return (w == w) | (w != w)


def where_kept(mask: Array, kept: Array, other: Any = 0) -> Array:
  """Returns `kept` where `mask` is `True`, and `other`, an array or a number, elsewhere, in the dtype of `kept`.

  The function gives what `jnp.where` gives, by operations that are no call: a step has several for each leaf.
  """
  whole = lambda x: x if jnp.shape(x) == mask.shape else jnp.broadcast_to(x, mask.shape)
  return lax.select(mask, whole(kept), whole(other) if jnp.shape(other) else lax.full_like(whole(kept), other))


def alike(mask: Array, other: Array) -> Array:
  """Returns `mask` with the sharding of `other`, which has the same shape, on meshes of Auto and of Explicit axes."""
  sharding = jax.typeof(other).sharding
  if sharding.mesh.empty:
    return mask
  if jax.typeof(mask).sharding.spec != sharding.spec:  # happens on Explicit axes only
    return jax.sharding.reshard(mask, sharding)
  return mask & everywhere(other)  # with Auto axes, an operation of both makes the compiler shard both alike


def merged(w: Array, axes: tuple[int, ...], m: int) -> Array:
  """Returns `w` with `axes` merged, in the given order, into one axis at the place of the lowest of `axes`.

  `undivided` keeps every group of `m` along the merged axis on one device.
  """
  first, w = min(axes), jnp.transpose(undivided(w, axes, m), _order(w.ndim, axes))
  return w.reshape(*w.shape[:first], math.prod(w.shape[first:first + len(axes)]), *w.shape[first + len(axes):])


def unmerged(w: Array, axes: tuple[int, ...], sizes: tuple[int, ...]) -> Array:
  """Returns `w` with its merged axis split into `axes` of these `sizes`: the inverse of `merged`."""
  first = min(axes)
  w = w.reshape(*w.shape[:first], *sizes, *w.shape[first + 1:])
  return jnp.transpose(w, np.argsort(_order(w.ndim, axes)).tolist())


def _order(rank: int, axes: tuple[int, ...]) -> list[int]:
  rest = [a for a in range(rank) if a not in axes]
  return [*rest[:min(axes)], *axes, *rest[min(axes):]]


def split(w: Array, m: int, axis: int) -> Array:
  """Returns `w`, of shape `[..., K, ...]` with K at `axis`, reshaped to `[..., K / m, m, ...]`."""
  return w.reshape(*w.shape[:axis], w.shape[axis] // m, m, *w.shape[axis + 1:])


def joined(w: Array, axis: int) -> Array:
  """Returns `w`, of shape `[..., G, n, ...]` with n at `axis`, reshaped to `[..., G * n, ...]`."""
  return w.reshape(*w.shape[:axis - 1], w.shape[axis - 1] * w.shape[axis], *w.shape[axis + 1:])


def as_columns(w: Array, axes: tuple[int, ...], m: int) -> Array:
  """Returns the matrix `[m, ...]` whose columns are the groups of `m` neighbours along the merged `axes`."""
  first = min(axes)
  return jnp.moveaxis(split(merged(w, axes, m), m, first), first + 1, 0).reshape(m, -1)


def from_columns(groups: Array, axes: tuple[int, ...], shape: tuple[int, ...]) -> Array:
  """Returns the array of this `shape` from the columns of its groups: the inverse of `columns`."""
  first, m, sizes = min(axes), groups.shape[0], tuple(shape[a] for a in axes)
  whole = list(np.delete(shape, axes))
  whole.insert(first, math.prod(sizes) // m)
  return unmerged(joined(jnp.moveaxis(groups.reshape(m, *whole), 0, first + 1), first + 1), axes, sizes)


def tiled(w: Array, contracted: tuple[int, ...], output: tuple[int, ...],
          tile: tuple[int, int]) -> tuple[Array, Callable[[Array], Array]]:
  """Returns `w` as tiles `[..., K / k, k, N / n, n]`, and the function that maps such tiles back to the shape of `w`.

  `tile` is `(k, n)`. K merges the `contracted` axes and N the `output` axes, each in the given order; all other axes
  come first. `undivided` keeps every tile on one device.
  """
  along = (*contracted, *output)
  order = [*(a for a in range(w.ndim) if a not in along), *along]
  moved = jnp.transpose(undivided(undivided(w, contracted, tile[0]), output, tile[1]), order)
  front, inner, outer = np.split(moved.shape, [w.ndim - len(along), w.ndim - len(output)])
  # Each reshape merges one group of axes: on a mesh with Explicit axes, a reshape may not merge two groups.
  rows = moved.reshape(*front, *inner, math.prod(outer)).reshape(*front, math.prod(inner), math.prod(outer))
  tiles = split(split(rows, tile[1], rows.ndim - 1), tile[0], rows.ndim - 2)

  def restored(tiles: Array) -> Array:
    rows = joined(joined(tiles, tiles.ndim - 1), tiles.ndim - 3)
    return jnp.transpose(rows.reshape(*front, *inner, math.prod(outer)).reshape(moved.shape),
                         np.argsort(order).tolist())

  return tiles, restored


def bits(w: Array) -> Array:
  """Returns the bits of `w` as unsigned integers of the same width; `bool` becomes `uint8`."""
  if w.dtype == jnp.bool_:
    return w.astype(jnp.uint8)
  return jax.lax.bitcast_convert_type(w, jnp.dtype(f'uint{8 * w.dtype.itemsize}'))


def from_bits(integers: Array, dtype: np.dtype) -> Array:
  """Returns the array of type `dtype` that has the bits `integers`: the inverse of `bits`."""
  return integers != 0 if dtype == jnp.bool_ else jax.lax.bitcast_convert_type(integers, dtype)


def exactly(move: Callable[..., Array], values: Array | tuple[Array, ...], places: Any, *static: int) -> Array:
  """Returns `move(values, places, *static)`, computed on the bits of `values`, so that no bit of a value changes.

  `values` is an array or a tuple of arrays of one dtype. Bits have no derivative: `move` is applied to the tangents of
  floating `values` directly.
  """
  dtype = jax.tree.leaves(values)[0].dtype
  on_bits = lambda v, p: from_bits(move(jax.tree.map(bits, v), p, *static), dtype)
  if not jnp.issubdtype(dtype, jnp.floating):
    return on_bits(values, places)
  moved = jax.custom_jvp(on_bits)
  moved.defjvp(lambda primals, tangents: (moved(*primals), move(tangents[0], primals[1], *static)))
  return moved(values, places)


def expanded(values: Array, slots: Array, stored: Array, base: Array) -> Array:
  """Returns `values[slots]` where `stored` is `True`, and `base` elsewhere."""
  result = jnp.where(stored, values.at[slots].get(mode='clip'), base)
  if values.size == 1 and jnp.issubdtype(values.dtype, jnp.unsignedinteger):
    # LLVM would select between a single value and zero as bfloat16, which may flush subnormals. An operation behind it
    # that could flip a bit prevents this.
    return result ^ (~jnp.any(stored)).astype(values.dtype)
  return result


def occupied(nonzero: Array, axis: int) -> Array:
  """Returns the mask `nonzero` as bits: bit i of an unsigned integer, of length 1 along `axis`, says entry i.

  A mask of more than 32 entries along `axis` is returned as it is.
  """
  m = nonzero.shape[axis]
  if m > _UNROLLED:
    return nonzero
  kind = jnp.dtype(next(f'uint{bits}' for bits in (8, 16, 32) if m <= bits))
  each = (entry.astype(kind) << kind.type(i) for i, entry in enumerate(_entries(nonzero, axis)))
  return functools.reduce(jnp.bitwise_or, each)


def numbers(occupied: Array, axis: int) -> Array:
  """Returns how many entries along `axis` are nonzero, of what `occupied` returned, without this axis, as `int16`."""
  if occupied.dtype == jnp.bool_:
    return jnp.sum(occupied, axis, dtype=jnp.int16)
  return jax.lax.population_count(jnp.squeeze(occupied, axis)).astype(jnp.int16)


def first_nonzeros(occupied: Array, n: int, axis: int) -> Array:
  """Returns the positions of the first `n` nonzeros along `axis`, in increasing order, `[..., n, ...]`.

  `occupied` is what the function of this name returned. Where there are fewer than `n` nonzeros, the first zeros along
  `axis` fill the missing places. Positions are `uint8` up to a length of 256, and `uint16` above.
  """
  if occupied.dtype != jnp.bool_:
    return _first_bits(occupied, n, axis)
  nonzero, m = occupied, occupied.shape[axis]
  before = jnp.cumsum(nonzero, axis=axis, dtype=jnp.int16) - nonzero.astype(jnp.int16)  # nonzeros to the left
  zeros_before = _indices_along(m, axis, nonzero.ndim) - before
  spare = n - jnp.sum(nonzero, axis=axis, keepdims=True, dtype=jnp.int16)
  keep = jnp.where(nonzero, before < n, zeros_before < spare)
  kept = jnp.cumsum(keep, axis=axis, dtype=jnp.int16)
  return _below(kept, _indices_along(n, axis, nonzero.ndim) + 1, axis).astype(_position_dtype(m))


def _first_bits(bits: Array, n: int, axis: int) -> Array:
  """Returns the positions of the first `n` bits that are set, after the lowest other bits are set until `n` are."""
  one, number = bits.dtype.type(1), jax.lax.population_count(bits)
  for i in range(n):
    bits = jnp.where(number < n - i, bits | (bits + one), bits)  # sets the lowest bit that is not set
  place = _indices_along(n, axis, bits.ndim, bits.dtype)
  for i in range(n - 1):
    bits = jnp.where(i < place, bits & (bits - one), bits)  # takes the lowest bit away
  return jax.lax.population_count((bits & -bits) - one).astype(jnp.uint8)


def _entries(w: Array, axis: int) -> list[Array]:
  """Returns the entries of `w` along `axis`, each as an array of length 1 along `axis`."""
  return [jax.lax.slice_in_dim(w, i, i + 1, axis=axis) for i in range(w.shape[axis])]


def take(w: Array, positions: Array, axis: int) -> Array:
  """Returns the entries of `w` at `positions` along `axis`; `w` and `positions` agree in all other axes."""
  if 0 < w.shape[axis] <= _SELECTED:
    first, *rest = _entries(w, axis)
    shape = [length if a == axis else max(length, size)
             for a, (length, size) in enumerate(zip(positions.shape, w.shape))]
    taken = jnp.broadcast_to(first, shape)
    for i, entry in enumerate(rest, 1):
      taken = jnp.where(positions == i, entry, taken)
    return taken
  # XLA aborts the process if a sharded array is gathered by narrower integers ("Unsupported indices type: U8").
  return jnp.take_along_axis(w, positions.astype(jnp.int32), axis=axis, mode='promise_in_bounds')


def placed(values: Array, positions: Array, m: int, axis: int) -> Array:
  """Returns groups of `m` along `axis` that hold `values` at `positions` and zeros elsewhere: the inverse of `take`."""
  n = values.shape[axis]
  indices = _indices_along(m, axis, values.ndim, positions.dtype)
  if n <= _UNROLLED:
    out = jnp.zeros([m if a == axis else length for a, length in enumerate(values.shape)], values.dtype)
    for i in range(n):
      value, position = (jax.lax.slice_in_dim(a, i, i + 1, axis=axis) for a in (values, positions))
      out = jnp.where(position == indices, value, out)
    return out
  slots = jnp.minimum(_below(positions, indices, axis), n - 1)
  return jnp.where(take(positions, slots, axis) == indices, take(values, slots, axis), jnp.zeros((), values.dtype))


def _below(ordered: Array, queries: Array, axis: int) -> Array:
  """Returns how many entries of `ordered` are smaller than each entry of `queries`, as `int16`.

  `ordered` does not decrease along `axis`. `queries` may have another length along `axis`.
  """
  length, shape = ordered.shape[axis], list(ordered.shape)
  shape[axis] = queries.shape[axis]
  count = jnp.zeros(shape, jnp.int16)
  if length <= _UNROLLED:
    entries = (jax.lax.slice_in_dim(ordered, i, i + 1, axis=axis) for i in range(length))
    return sum(((entry < queries).astype(jnp.int16) for entry in entries), count)

  def settle_bit(i, count):  # bisects from the highest bit; the steps of a loop share their buffers
    step = jnp.left_shift(1, length.bit_length() - 1 - i).astype(jnp.int16)
    probed = take(ordered, jnp.minimum(count + step - 1, length - 1), axis)
    return count + jnp.where((probed < queries) & (count <= length - step), step, 0).astype(jnp.int16)

  return jax.lax.fori_loop(0, length.bit_length(), settle_bit, count)


def _indices_along(length: int, axis: int, rank: int, dtype: Any = jnp.int16) -> Array:
  """Returns the indices 0, 1, 2, ... along `axis`; all other axes have length 1."""
  return jnp.arange(length, dtype=dtype).reshape([length if a == axis else 1 for a in range(rank)])


def _position_dtype(m: int) -> Any:
  return jnp.uint8 if m <= 256 else jnp.uint16


def width(m: int) -> int:
  """Returns the number of bits that hold the positions 0 to m - 1, which is ceil(log2(m))."""
  return (m - 1).bit_length()


def encoded(positions: Array, m: int, axis: int) -> Array:
  """Returns `positions` below `m` with every 8 positions along `axis` encoded as `width(m)` bytes.

  Byte p holds bit p of each of the 8 positions; the first position is in the lowest bit.
  """
  pads = [(0, -positions.shape[a] % 8 if a == axis else 0) for a in range(positions.ndim)]
  eights = split(jnp.pad(positions, pads), 8, axis)
  shifts = _indices_along(8, axis + 1, eights.ndim, jnp.uint8)
  planes = [((eights >> p) & 1).astype(jnp.uint8) << shifts for p in range(width(m))]
  octets = [jnp.sum(plane, axis=axis + 1, keepdims=True, dtype=jnp.uint8) for plane in planes]
  none = jax.lax.slice_in_dim(eights, 0, 0, axis=axis + 1).astype(jnp.uint8)  # no bits if m = 1
  return joined(jnp.concatenate([none, *octets], axis=axis + 1), axis + 1)


def decoded(indices: Array, length: int, m: int, axis: int) -> Array:
  """Returns the first `length` positions along `axis` that `indices` encodes: the inverse of `encoded`."""
  if width(m) == 0:
    return jnp.zeros([length if a == axis else size for a, size in enumerate(indices.shape)], jnp.uint8)
  octets = split(indices, width(m), axis)
  shifts, dtype = _indices_along(8, axis + 1, octets.ndim, jnp.uint8), _position_dtype(m)
  planes = (jax.lax.slice_in_dim(octets, p, p + 1, axis=axis + 1) for p in range(width(m)))
  parts = [((plane >> shifts) & 1).astype(dtype) << p for p, plane in enumerate(planes)]
  eights = joined(functools.reduce(jnp.bitwise_or, parts), axis + 1)
  return jax.lax.slice_in_dim(eights, 0, length, axis=axis)
