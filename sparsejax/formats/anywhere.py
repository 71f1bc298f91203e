"""Zeros anywhere: `BitmaskArray` with a bit a weight, `RelativeIndexArray` with a byte a stored value. For files."""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours
from sparsejax.formats import arrays, gaps
from sparsejax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BitmaskArray(arrays.PackedArray, kind='bitmask'):
  """An array with zeros anywhere: its other `values` in row-major order, and `mask` with one bit a weight.

  `mask` is `uint8[ceil(size / 8)]`, the first weight in the lowest bit, 1 = stored; bits behind the last are zero. The
  number of values depends on the data, so packing happens on concrete arrays and leading axes cannot be added.
  """

  values: Array
  mask: Array
  shape: tuple[int, ...] = arrays.static()

  @classmethod
  def from_dense(cls, w: Array) -> 'BitmaskArray':
    """Pack the concrete array `w`, on the host. Raises `ValueError` for a traced one."""
    if misfit := arrays.host_misfit(w):
      raise arrays.Misfit('BitmaskArray.from_dense', w.shape, misfit)
    return _bitmask_packed(w)

  def to_dense(self) -> Array:
    """The dense array, bit for bit. Differentiable in `values`."""
    return _bitmask_dense(self)

  def problem(self) -> str | None:
    return _bitmask_invalid(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RelativeIndexArray(arrays.PackedArray, kind='relative_index'):
  """An array of which few entries are stored: these `values` in row-major order, and the `gaps` between their places.

  For 88 % sparsity and more, where a byte a value is less than a bit a weight. A gap is the number of entries skipped
  since the last stored one, in `uint8`: a byte below 255 ends it, 255 says to skip 255 and read on (the relative index
  of Han et al. 2016, arXiv 1510.00149, which stores a filler zero there). So gaps take a byte a value, and at most one
  more for every 255 entries: at 99 % sparsity float32 has at most 1.35 % of the dense bytes, 1.27 % where places are
  random, and bfloat16 1.70 % and 1.54 %. Packed on concrete arrays, as `BitmaskArray` is.
  """

  values: Array
  gaps: Array
  shape: tuple[int, ...] = arrays.static()

  @classmethod
  def from_dense(cls, w: Array, mask: Array | None = None) -> 'RelativeIndexArray':
    """Pack what is not zero of the concrete array `w`, or what it has where `mask` is `True`, zero or not, on the host.

    With `mask`, a bool array of `w`'s shape, what is elsewhere is not stored: give it to `to_dense` again, from
    wherever it came (FreezeNet draws it from a seed). Raises `ValueError` for traced arrays and for another mask.
    """
    if misfit := arrays.host_misfit(w) or (None if mask is None else _mask_misfit(w, mask)):
      raise arrays.Misfit('RelativeIndexArray.from_dense', w.shape, misfit)
    return _relative_packed(w, mask)

  def to_dense(self, base: Array | None = None) -> Array:
    """The dense array, bit for bit: what is not stored is zero, or that of `base`, an array of this shape and dtype.

    Differentiable in `values` and `base`.
    """
    if base is not None and (tuple(base.shape), base.dtype) != (self.shape, self.dtype):
      raise ValueError(f'RelativeIndexArray.to_dense: base of shape {tuple(base.shape)} and dtype {base.dtype} must '
                       f'have the shape {self.shape} and dtype {self.dtype} of the packed array.')
    return _relative_dense(self, base)

  def problem(self) -> str | None:
    return _relative_invalid(self)


# Bitmask.


def _bitmask_packed(w: Array) -> BitmaskArray:
  flat = np.asarray(w).reshape(-1)
  kept = flat.view(f'u{flat.dtype.itemsize}') != 0
  return BitmaskArray(jnp.asarray(flat[kept]), jnp.asarray(np.packbits(kept, bitorder='little')), tuple(w.shape))


def _spread(values: Array, mask: Array, size: int) -> Array:
  """`values` in the order of the set bits of `mask`, zeros elsewhere: `[size]`."""
  if not values.size:
    return jnp.zeros(size, values.dtype)
  ones = jax.lax.population_count(mask).astype(jnp.int32)
  shifts = jnp.arange(8, dtype=jnp.uint8)[None]
  below = mask[:, None] & ((jnp.uint8(1) << shifts) - jnp.uint8(1))
  slots = (jnp.cumsum(ones) - ones)[:, None] + jax.lax.population_count(below).astype(jnp.int32)
  stored = ((mask[:, None] >> shifts) & 1).astype(bool).reshape(-1)[:size]
  return neighbours.filled(values, slots.reshape(-1)[:size], stored, jnp.zeros((), values.dtype))


@jax.jit
def _bitmask_dense(packed: BitmaskArray) -> Array:
  return neighbours.exactly(_spread, packed.values, packed.mask, math.prod(packed.shape)).reshape(packed.shape)


def _bitmask_invalid(packed: BitmaskArray) -> str | None:
  size = math.prod(packed.shape)
  if packed.mask.dtype != jnp.uint8 or packed.mask.shape != (-(-size // 8),) or packed.values.ndim != 1:
    return (f'mask {packed.mask.dtype}{list(packed.mask.shape)} and values {list(packed.values.shape)} do not '
            f'belong to shape {packed.shape}: that takes a mask uint8[{-(-size // 8)}] and one axis of values.')
  bits = np.unpackbits(np.asarray(packed.mask), bitorder='little')
  if bits.sum() != len(packed.values) or bits[size:].any():
    return f'its mask has {bits.sum()} bits set, {bits[size:].sum()} past the end, for {len(packed.values)} values.'
  return None


# Relative indices.


def _mask_misfit(w: Array, mask: Array) -> str | None:
  if tuple(mask.shape) != tuple(w.shape) or mask.dtype != bool:
    return f'mask of shape {tuple(mask.shape)} and dtype {mask.dtype} must be bool of the same shape.'
  return None if arrays.concrete(mask) else 'its mask has no values here (traced, or a shape). Pack outside of jit.'


def _relative_packed(w: Array, mask: Array | None) -> RelativeIndexArray:
  flat = np.asarray(w).reshape(-1)
  kept = flat.view(f'u{flat.dtype.itemsize}') != 0 if mask is None else np.asarray(mask).reshape(-1)
  code = gaps.encoded(np.flatnonzero(kept))
  return RelativeIndexArray(jnp.asarray(flat[kept]), jnp.asarray(code), tuple(w.shape))


def _put(entries: tuple[Array, ...], code: Array, size: int) -> Array:
  """The first of `entries` at the places of `code`; elsewhere the second, `[size]`, or zeros if there is none."""
  values, base = entries if len(entries) == 2 else (*entries, jnp.zeros(size, entries[0].dtype))
  if not values.size:
    return base
  stored = gaps.stored(code, size)
  return neighbours.filled(values, jnp.cumsum(stored, dtype=jnp.int32) - 1, stored, base)


@jax.jit
def _relative_dense(packed: RelativeIndexArray, base: Array | None) -> Array:
  entries = (packed.values,) if base is None else (packed.values, base.reshape(-1))
  return neighbours.exactly(_put, entries, packed.gaps, math.prod(packed.shape)).reshape(packed.shape)


def _relative_invalid(packed: RelativeIndexArray) -> str | None:
  if packed.gaps.dtype != jnp.uint8 or packed.gaps.ndim != 1 or packed.values.ndim != 1:
    return (f'gaps {packed.gaps.dtype}{list(packed.gaps.shape)} and values {list(packed.values.shape)} do not belong '
            'together: that takes one axis of each, and uint8 gaps.')
  return gaps.misfit(np.asarray(packed.gaps), len(packed.values), math.prod(packed.shape))
