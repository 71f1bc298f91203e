"""Packed parameters: arrays that store what is not zero, and dense again bit for bit.

What counts as zero is the bit pattern of `+0.0`: `-0.0`, NaN payloads and subnormals are values and survive. All the
moving is done on the bits, as unsigned integers, because floating units may flush subnormals and quieten NaNs. Packed
arrays are pytrees, so that `jit`, `vmap`, `scan`, sharding and Orbax take them as they take any parameter.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, gaps, groups, patterns, trees
from sparsejax.types import Array, Axes, PyTree

_static = functools.partial(dataclasses.field, metadata={'static': True})


class _Sizes:
  """What is the same in all packed arrays."""

  @property
  def ndim(self) -> int:
    return len(self.shape)

  @property
  def dtype(self) -> np.dtype:
    return self.values.dtype

  @property
  def nbytes(self) -> int:
    """The bytes of all its arrays."""
    return nbytes(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class NMArray(_Sizes):
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
  n: int = _static()
  m: int = _static()
  axes: tuple[int, ...] = _static()
  sizes: tuple[int, ...] = _static()

  @classmethod
  def from_dense(cls, w: Array, n: int, m: int, axes: Axes | int | tuple[int, ...], check: bool = True) -> 'NMArray':
    """Pack `w`. Groups with fewer than `n` nonzeros are filled with their first zeros.

    Under `jit`, `vmap` and `eval_shape` values cannot be checked, so `check=False` is required there: each group keeps
    its first `n` nonzeros and the rest is dropped. Raises `ValueError` for a group with more, and for a shape, an axis
    or a dtype that cannot be packed.
    """
    axes = _contracted(w, axes)
    misfit = _nm_misfit(w, n, m, axes, check)
    if misfit:
      raise ValueError(f'NMArray.from_dense: array of shape {tuple(w.shape)}: {misfit}')
    return _nm_packed(w, int(n), int(m), axes)

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
    return _nm_dense(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class BitmaskArray(_Sizes):
  """An array with zeros anywhere: its other `values` in row-major order, and `mask` with one bit a weight.

  `mask` is `uint8[ceil(size / 8)]`, the first weight in the lowest bit, 1 = stored; bits behind the last are zero. The
  number of values depends on the data, so packing happens on concrete arrays and leading axes cannot be added.
  """

  values: Array
  mask: Array
  shape: tuple[int, ...] = _static()

  @classmethod
  def from_dense(cls, w: Array) -> 'BitmaskArray':
    """Pack the concrete array `w`, on the host. Raises `ValueError` for a traced one."""
    misfit = _host_misfit(w)
    if misfit:
      raise ValueError(f'BitmaskArray.from_dense: array of shape {tuple(w.shape)}: {misfit}')
    return _bitmask_packed(w)

  def to_dense(self) -> Array:
    """The dense array, bit for bit. Differentiable in `values`."""
    return _bitmask_dense(self)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class RelativeIndexArray(_Sizes):
  """An array of which few entries are stored: these `values` in row-major order, and the `gaps` between their places.

  For 88 % sparsity and more, where a byte a value is less than a bit a weight. A gap is the number of entries skipped
  since the last stored one, in `uint8`: a byte below 255 ends it, 255 says to skip 255 and read on (the relative index
  of Han et al. 2016, arXiv 1510.00149, which stores a filler zero there). So gaps take a byte a value, and at most one
  more for every 255 entries: at 99 % sparsity float32 has at most 1.35 % of the dense bytes, 1.27 % where places are
  random, and bfloat16 1.70 % and 1.54 %. Packed on concrete arrays, as `BitmaskArray` is.
  """

  values: Array
  gaps: Array
  shape: tuple[int, ...] = _static()

  @classmethod
  def from_dense(cls, w: Array, mask: Array | None = None) -> 'RelativeIndexArray':
    """Pack what is not zero of the concrete array `w`, or what it has where `mask` is `True`, zero or not, on the host.

    With `mask`, a bool array of `w`'s shape, what is elsewhere is not stored: give it to `to_dense` again, from
    wherever it came (FreezeNet draws it from a seed). Raises `ValueError` for traced arrays and for another mask.
    """
    misfit = _host_misfit(w) or (None if mask is None else _mask_misfit(w, mask))
    if misfit:
      raise ValueError(f'RelativeIndexArray.from_dense: array of shape {tuple(w.shape)}: {misfit}')
    return _relative_packed(w, mask)

  def to_dense(self, base: Array | None = None) -> Array:
    """The dense array, bit for bit: what is not stored is zero, or that of `base`, an array of this shape and dtype.

    Differentiable in `values` and `base`.
    """
    if base is not None and (tuple(base.shape), base.dtype) != (self.shape, self.dtype):
      raise ValueError(f'RelativeIndexArray.to_dense: base of shape {tuple(base.shape)} and dtype {base.dtype} must '
                       f'have the shape {self.shape} and dtype {self.dtype} of the packed array.')
    return _relative_dense(self, base)


Packed = NMArray | BitmaskArray | RelativeIndexArray
ANYWHERE = {'bitmask': BitmaskArray, 'relative_index': RelativeIndexArray}  # the formats for zeros anywhere, by name

_TRACED = ('its values are not known here (traced, or a mere shape), so its zeros cannot be counted. Pack outside of '
           'jit, vmap and grad, or, for N:M, with check=False: then each group keeps its first N nonzeros only.')


def is_packed(node: Any) -> bool:
  """Is this a packed array? For `is_leaf`."""
  return isinstance(node, Packed)


def pack(params: PyTree, pattern: Any, *, where: Any = trees.matrices, axes: Mapping[str, Axes] | None = None,
         check: bool = True) -> PyTree:
  """Replace the leaves that `where` picks by packed arrays.

  `pattern` is an `NM`, or `Unstructured()` for a `BitmaskArray`, or as a string '2:4', 'bitmask', or 'relative_index'
  for a `RelativeIndexArray`; or a dict from globs to these. `axes` says which axes are contracted (by default
  `trees.conventional_axes`); `check` is that of `NMArray.from_dense`. Raises `ValueError` for a leaf whose nonzeros do
  not fit the pattern.
  """
  names, leaves, treedef = trees.flatten(params, is_leaf=is_packed)
  already = [name for name, leaf in zip(names, leaves) if is_packed(leaf)]
  if already:
    raise ValueError(f'pack: {errors.some(already)} already packed; call unpack first.')
  picked = trees.select('pack', where, params)
  chosen = [name for name, pick in zip(names, picked) if pick]
  asked = dict(zip(chosen, trees.per_leaf('pack', 'pattern', pattern, chosen)))
  kinds = {name: _kind(kind) for name, kind in asked.items()}
  return treedef.unflatten([_pack_leaf(name, leaf, kinds[name], axes, check) if name in kinds else leaf
                            for name, leaf in zip(names, leaves)])


def unpack(tree: PyTree, base: PyTree | None = None) -> PyTree:
  """The dense tree, bit for bit: the inverse of `pack`. Works under `jit` and `vmap`.

  `base`, a dense tree of this structure, is what stands where a `RelativeIndexArray` stores nothing, instead of zeros:
  for `recipes.freeze_net` the parameters that the seed gives.
  """
  if base is None:
    return jax.tree.map(lambda leaf: leaf.to_dense() if is_packed(leaf) else leaf, tree, is_leaf=is_packed)
  whole = lambda leaf, old: leaf.to_dense(old) if isinstance(leaf, RelativeIndexArray) else leaf
  return unpack(jax.tree.map(whole, tree, base, is_leaf=is_packed))


def nbytes(tree: PyTree) -> int:
  """Bytes of all arrays in `tree`, packed or not."""
  return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


@jax.jit
def matmul(x: Array, packed: NMArray) -> Array:
  """`x[..., K]` times the packed `w` over its merged contracted axis: `[..., *other axes of w]`, in `x`'s dtype.

  The weights are unpacked inside the program and cast to `x`'s dtype; products are summed in float32 at least.
  """
  k = math.prod(packed.sizes)
  if x.shape[-1] != k:
    raise ValueError(f'formats.matmul: x of shape {x.shape} must end in the contracted length {k} of the packed array '
                     f'of shape {packed.shape}; reshape x so that its last axis has that length.')
  w = _nm_merged(packed).astype(x.dtype)
  sums = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else None
  contraction = (((x.ndim - 1,), (w.ndim + packed.axis,)), ((), ()))
  return jax.lax.dot_general(x, w, contraction, preferred_element_type=sums).astype(x.dtype)


def problem(packed: Packed) -> str | None:
  """Why a concrete packed array is not one that `from_dense` makes, or `None`. For arrays from untrusted files."""
  invalid = {NMArray: _nm_invalid, BitmaskArray: _bitmask_invalid, RelativeIndexArray: _relative_invalid}
  return invalid[type(packed)](packed)


# One leaf: which format, and whether it fits.


def _kind(pattern: Any) -> Any:
  """An `NM`, 'bitmask' or 'relative_index'."""
  if isinstance(pattern, str) and pattern not in ANYWHERE:
    pattern = patterns.parse(pattern)
  if isinstance(pattern, patterns.Unstructured):
    return 'bitmask'
  if isinstance(pattern, (patterns.NM, str)):
    return pattern
  valid = ['NM(n, m)', 'Unstructured()', "'n:m'", *map(repr, ANYWHERE)]
  raise errors.unknown('pack', 'pattern', pattern, valid)


def _pack_leaf(path: str, leaf: Array, kind: Any, axes: Mapping[str, Axes] | None, check: bool) -> Packed:
  anywhere = kind in ANYWHERE
  contracted = () if anywhere else trees.axes_of('pack', axes, path, leaf.shape).contracted
  misfit = _host_misfit(leaf) if anywhere else _nm_misfit(leaf, kind.n, kind.m, contracted, check)
  if misfit:
    raise errors.at_leaf('pack', path, leaf.shape, misfit)
  return ANYWHERE[kind].from_dense(leaf) if anywhere else _nm_packed(leaf, int(kind.n), int(kind.m), contracted)


def _contracted(w: Array, axes: Axes | int | tuple[int, ...]) -> tuple[int, ...]:
  """The contracted axes, counted from the front."""
  axes = axes.contracted if isinstance(axes, Axes) else (axes,) if isinstance(axes, int) else tuple(axes)
  if not all(-w.ndim <= a < w.ndim for a in axes) or len({a % w.ndim for a in axes}) != len(axes):
    raise ValueError(f'NMArray.from_dense: axes {axes} are not different axes of an array of shape {tuple(w.shape)}.')
  return tuple(a % w.ndim for a in axes)


def _dtype_misfit(dtype: np.dtype) -> str | None:
  bits = 8 if jnp.issubdtype(dtype, jnp.bool_) else None
  if jnp.issubdtype(dtype, jnp.floating) or jnp.issubdtype(dtype, jnp.integer):
    bits = (jnp.finfo if jnp.issubdtype(dtype, jnp.floating) else jnp.iinfo)(dtype).bits
  if bits not in (8, 16, 32, 64):
    return f'dtype {dtype} cannot be packed; real numbers of 8, 16, 32 and 64 bits can. Leave it out of `where`.'
  if jax.dtypes.canonicalize_dtype(dtype) != dtype:
    return f'dtype {dtype} would be truncated; set jax_enable_x64, or cast it to 32 bits first.'
  return None


def _nm_misfit(w: Array, n: Any, m: int, axes: tuple[int, ...], check: bool) -> str | None:
  """Why `w` cannot be packed along `axes`, with the remedy."""
  if not isinstance(n, (int, np.integer)) or n < 1:
    return f'n must be a known whole number, at least 1, to be packed as n:{m}, not {n!r}.'
  at = Axes(contracted=axes, output=tuple(a for a in range(w.ndim) if a not in axes))
  misfit = patterns.NM(n, m).validate(tuple(w.shape), at) or _dtype_misfit(w.dtype)
  return misfit or (_crowded(w, int(n), int(m), axes) if check else None)


def _host_misfit(w: Array) -> str | None:
  if w.size >= 2**31:
    return 'it has 2^31 weights or more; leave it out of `where`.'
  return _dtype_misfit(w.dtype) or (None if _concrete(w) else _TRACED)


def _mask_misfit(w: Array, mask: Array) -> str | None:
  if tuple(mask.shape) != tuple(w.shape) or mask.dtype != bool:
    return f'mask of shape {tuple(mask.shape)} and dtype {mask.dtype} must be bool of the same shape.'
  return None if _concrete(mask) else 'its mask has no values here (traced, or a mere shape). Pack outside of jit.'


def _concrete(w: Array) -> bool:
  return not isinstance(w, (jax.core.Tracer, jax.ShapeDtypeStruct))


def _crowded(w: Array, n: int, m: int, axes: tuple[int, ...]) -> str | None:
  """Says which groups have more than `n` nonzeros, or that nobody can know."""
  if not _concrete(w):
    return _TRACED
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


# N:M.


@functools.partial(jax.jit, static_argnums=(1, 2))
def _counts(w: Array, m: int, axes: tuple[int, ...]) -> Array:
  """Nonzeros of each group: `[..., K / m, ...]`."""
  nonzero = groups.split(groups.bits(groups.merged(w, axes, m)) != 0, m, min(axes))
  return jnp.sum(nonzero, axis=min(axes) + 1, dtype=jnp.int16)


@functools.partial(jax.jit, static_argnums=(1, 2, 3))
def _nm_packed(w: Array, n: int, m: int, axes: tuple[int, ...]) -> NMArray:
  axis = min(axes) + 1
  octets = m * (8 // math.gcd(n, 8))  # the indices of eight neighbours share bytes, across groups
  grouped = groups.split(groups.merged(w, axes, octets), m, axis - 1)
  positions = groups.first_nonzeros(groups.bits(grouped) != 0, n, axis)
  values = groups.joined(groups.exactly(groups.take, grouped, positions, axis), axis)
  indices = groups.encoded(groups.joined(positions, axis), m, axis - 1)
  return NMArray(values, indices, n, m, tuple(a - w.ndim for a in axes), tuple(w.shape[a] for a in axes))


def _nm_merged(packed: NMArray) -> Array:
  """`[..., K, ...]`: dense, the contracted axes still merged."""
  axis = packed.values.ndim + packed.axis + 1
  values, positions = (groups.split(a, packed.n, axis - 1) for a in (packed.values, packed.positions()))
  return groups.joined(groups.exactly(groups.placed, values, positions, packed.m, axis), axis)


@jax.jit
def _nm_dense(packed: NMArray) -> Array:
  return groups.unmerged(_nm_merged(packed), tuple(a + packed.ndim for a in packed.axes), packed.sizes)


def _nm_invalid(packed: NMArray) -> str | None:
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


# Bitmask: zeros anywhere.


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
  return groups.filled(values, slots.reshape(-1)[:size], stored, jnp.zeros((), values.dtype))


@jax.jit
def _bitmask_dense(packed: BitmaskArray) -> Array:
  return groups.exactly(_spread, packed.values, packed.mask, math.prod(packed.shape)).reshape(packed.shape)


def _bitmask_invalid(packed: BitmaskArray) -> str | None:
  size = math.prod(packed.shape)
  if packed.mask.dtype != jnp.uint8 or packed.mask.shape != (-(-size // 8),) or packed.values.ndim != 1:
    return (f'mask {packed.mask.dtype}{list(packed.mask.shape)} and values {list(packed.values.shape)} do not '
            f'belong to shape {packed.shape}: that takes a mask uint8[{-(-size // 8)}] and one axis of values.')
  bits = np.unpackbits(np.asarray(packed.mask), bitorder='little')
  if bits.sum() != len(packed.values) or bits[size:].any():
    return f'its mask has {bits.sum()} bits set, {bits[size:].sum()} past the end, for {len(packed.values)} values.'
  return None


# Relative indices: few entries anywhere.


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
  return groups.filled(values, jnp.cumsum(stored, dtype=jnp.int32) - 1, stored, base)


@jax.jit
def _relative_dense(packed: RelativeIndexArray, base: Array | None) -> Array:
  entries = (packed.values,) if base is None else (packed.values, base.reshape(-1))
  return groups.exactly(_put, entries, packed.gaps, math.prod(packed.shape)).reshape(packed.shape)


def _relative_invalid(packed: RelativeIndexArray) -> str | None:
  if packed.gaps.dtype != jnp.uint8 or packed.gaps.ndim != 1 or packed.values.ndim != 1:
    return (f'gaps {packed.gaps.dtype}{list(packed.gaps.shape)} and values {list(packed.values.shape)} do not belong '
            'together: that takes one axis of each, and uint8 gaps.')
  return gaps.misfit(np.asarray(packed.gaps), len(packed.values), math.prod(packed.shape))
