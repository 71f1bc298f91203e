"""Packs arrays with zeros anywhere: `BitmaskArray` takes one bit a weight, `RelativeIndexArray` one byte a value.

    packed = formats.BitmaskArray.from_dense(w)         # on the host: the number of values depends on `w`
    packed.values, packed.mask                          # the nonzeros in row-major order; `uint8[ceil(size / 8)]`
    formats.RelativeIndexArray.from_dense(w, mask)      # smaller at 88 % sparsity and more

Both formats are for files, and become dense again bit for bit.
"""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours, patterns
from sparsejax.formats import arrays, gaps, misfits, pieces
from sparsejax.types import Array, Axes


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BitmaskArray(arrays.PackedArray):
  """A `BitmaskArray` stores the nonzero `values` of an array in row-major order, and in `mask` one bit a weight.

  `mask` is `uint8[ceil(size / 8)]` with the first weight in the lowest bit; 1 means stored. Bits behind the last weight
  are zero. The number of values depends on the data: only concrete arrays can be packed, and leading axes cannot be
  added.
  """

  kind = 'bitmask'
  default_pattern = patterns.Unstructured()
  index_bytes = 1

  values: Array
  mask: Array
  shape: tuple[int, ...] = arrays.static()
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def from_dense(cls, w: Array, signed_zeros: bool = False) -> 'BitmaskArray':
    """Packs the concrete array `w` on the host. With `signed_zeros`, stores `-0.0` as well.

    Raises `ValueError` if `w` is traced.
    """
    if misfit := misfits.host_misfit(w):
      raise arrays.Misfit('BitmaskArray.from_dense', w.shape, misfit)
    values, mask = pieces.compacted(np.asarray(w).reshape(-1), signed_zeros)
    return cls(jax.device_put(values), jnp.asarray(mask), tuple(w.shape))

  @classmethod
  def from_pattern(cls, w, pattern, axes, check=True, signed_zeros=False):
    return cls.from_dense(w, signed_zeros)

  @classmethod
  def in_blocks(cls, leaf, pattern, axes, signed_zeros=False):
    if not leaf.blocks or not leaf.size or misfits.host_misfit(leaf):
      return super().in_blocks(leaf, pattern, axes, signed_zeros)
    octets = 8 // math.gcd(8, math.prod(leaf.shape[1:]))
    values, count, masks = np.empty(leaf.size, leaf.dtype), 0, []  # Memory is taken only where values are written.
    for block in leaf.in_multiples(octets):
      found, mask = pieces.compacted(block.reshape(-1), signed_zeros)
      values[count:count + len(found)] = found
      count += len(found)
      masks.append(mask)
    packed = cls(values[:count], np.concatenate(masks), tuple(leaf.shape))
    return packed, iter([packed.arrays()])

  @classmethod
  def expected_nbytes(cls, shape, dtype, pattern, axes, sparsity):
    size = math.prod(shape)
    return (size - round(sparsity * size)) * np.dtype(dtype).itemsize + -(-size // 8)

  def to_dense(self) -> Array:
    if pieces.on_host(self.values, self.mask):
      dense = pieces.spread(np.asarray(self.values), np.asarray(self.mask), math.prod(self.shape))
      return pieces.as_array(dense.reshape(self.shape), self.values)
    return _bitmask_dense(self, *_words(self.mask))  # A single program would be four times as slow.

  def problem(self) -> str | None:
    size = math.prod(self.shape)
    if self.mask.dtype != jnp.uint8 or self.mask.shape != (-(-size // 8),) or self.values.ndim != 1:
      return (f'mask {self.mask.dtype}{list(self.mask.shape)} and values {list(self.values.shape)} do not '
              f'belong to shape {self.shape}: that takes a mask uint8[{-(-size // 8)}] and one axis of values.')
    bits = np.unpackbits(np.asarray(self.mask), bitorder='little')
    if bits.sum() != len(self.values) or bits[size:].any():
      return f'its mask has {bits.sum()} bits set, {bits[size:].sum()} past the end, for {len(self.values)} values.'
    return None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RelativeIndexArray(arrays.PackedArray):
  """A `RelativeIndexArray` stores the `values` of few entries, in row-major order, and the `gaps` between positions.

  The format is for 88 % sparsity and more, where one byte a value is less than one bit a weight. A gap is the number of
  entries skipped since the last stored entry, in `uint8`. A byte below 255 ends the gap; 255 skips 255 entries and
  continues the gap. The relative index of Han et al. 2016 (arXiv 1510.00149) stores a filler zero there instead.

  Gaps take one byte a value, and at most one more byte for every 255 entries. At 99 % sparsity float32 takes at most
  1.35 % of the dense bytes, and 1.27 % where positions are random; bfloat16 takes 1.70 % and 1.54 %. Only concrete
  arrays can be packed, as for `BitmaskArray`.
  """

  kind = 'relative_index'
  default_pattern = patterns.Unstructured()
  index_bytes = 1

  values: Array
  gaps: Array
  shape: tuple[int, ...] = arrays.static()
  roles: Axes | None = arrays.static(default=None)

  @classmethod
  def from_dense(cls, w: Array, mask: Array | None = None, signed_zeros: bool = False) -> 'RelativeIndexArray':
    """Packs the concrete array `w` on the host: its nonzeros or, with `mask`, its entries where `mask` is `True`.

    `mask` is a bool array of `w`'s shape; entries where it is `True` are stored even if they are zero. Without a mask,
    `-0.0` is stored only with `signed_zeros`. The other entries of `w` are not stored: give them to `to_dense` as
    `base`. FreezeNet, for example, draws them from a seed. Raises `ValueError` if an argument is traced, and if `mask`
    has another shape or dtype.
    """
    if misfit := misfits.host_misfit(w) or misfits.mask_misfit(w, mask):
      raise arrays.Misfit('RelativeIndexArray.from_dense', w.shape, misfit)
    kept = arrays.stored_entries(w, mask, signed_zeros)
    code = gaps.encoded(np.flatnonzero(kept))
    return cls(jnp.asarray(arrays.entries_at(np.asarray(w), kept)), jnp.asarray(code), tuple(w.shape))

  @classmethod
  def from_pattern(cls, w, pattern, axes, check=True, signed_zeros=False):
    return cls.from_dense(w, None, signed_zeros)

  @classmethod
  def expected_nbytes(cls, shape, dtype, pattern, axes, sparsity):
    """Returns an upper bound: positions may need one more byte of gaps for every 255 entries."""
    size = math.prod(shape)
    return (size - round(sparsity * size)) * (np.dtype(dtype).itemsize + 1) + size // 255

  def to_dense(self, base: Array | None = None) -> Array:
    """Returns the dense array, bit for bit; entries that are not stored are zero or, with `base`, those of `base`.

    `base` has the shape and dtype of the packed array. Differentiable in `values` and `base`.
    """
    if base is not None and (tuple(base.shape), base.dtype) != (self.shape, self.dtype):
      raise ValueError(f'RelativeIndexArray.to_dense: base of shape {tuple(base.shape)} and dtype {base.dtype} must '
                       f'have the shape {self.shape} and dtype {self.dtype} of the packed array.')
    return _relative_dense(self, base)

  def to_dense_over(self, base: Array) -> Array:
    return self.to_dense(base)

  def problem(self) -> str | None:
    if self.gaps.dtype != jnp.uint8 or self.gaps.ndim != 1 or self.values.ndim != 1:
      return (f'gaps {self.gaps.dtype}{list(self.gaps.shape)} and values {list(self.values.shape)} do not belong '
              'together: that takes one axis of each, and uint8 gaps.')
    return gaps.misfit(np.asarray(self.gaps), len(self.values), math.prod(self.shape))


# Bitmask.


@jax.jit
def _words(mask: Array) -> tuple[Array, Array]:
  """Returns `mask` as `uint32`, zeros behind its end, and for each of these words the number of bits set before it."""
  octets = jnp.pad(mask, (0, -len(mask) % 4)).reshape(-1, 4).astype(jnp.uint32)
  words = functools.reduce(jnp.bitwise_or, (octets[:, i] << 8 * i for i in range(4)))
  ones = jax.lax.population_count(words).astype(jnp.int32)
  return words, jax.lax.associative_scan(jnp.add, ones) - ones if len(words) else ones


def _spread(values: Array, places: tuple[Array, Array], size: int) -> Array:
  """Returns `[size]`: `values` in the order of the set bits of the `_words`, zeros elsewhere."""
  if not values.size:
    return jnp.zeros(size, values.dtype)
  words, before = (each[:, None] for each in places)
  bits = jnp.uint32(1) << jnp.arange(32, dtype=jnp.uint32)[None]
  slots = before + jax.lax.population_count(words & (bits - 1)).astype(jnp.int32)
  stored = (words & bits) != 0
  return neighbours.expanded(values, slots.reshape(-1)[:size], stored.reshape(-1)[:size], jnp.zeros((), values.dtype))


@jax.jit
def _bitmask_dense(packed: BitmaskArray, words: Array, before: Array) -> Array:
  return neighbours.exactly(_spread, packed.values, (words, before), math.prod(packed.shape)).reshape(packed.shape)


# Relative indices.


def _put(entries: tuple[Array, ...], code: Array, size: int) -> Array:
  """Returns `[size]`: the first of `entries` at the positions of `code`; elsewhere the second, or zeros without it."""
  values, base = entries if len(entries) == 2 else (*entries, jnp.zeros(size, entries[0].dtype))
  if not values.size:
    return base
  stored = gaps.stored(code, size)
  return neighbours.expanded(values, jnp.cumsum(stored, dtype=jnp.int32) - 1, stored, base)


@jax.jit
def _relative_dense(packed: RelativeIndexArray, base: Array | None) -> Array:
  entries = (packed.values,) if base is None else (packed.values, base.reshape(-1))
  return neighbours.exactly(_put, entries, packed.gaps, math.prod(packed.shape)).reshape(packed.shape)
