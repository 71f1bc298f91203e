"""Packs parameters: arrays that store only what is not zero, and become dense again bit for bit.

    packed = formats.pack(params, '2:4')     # matrices become `NMArray`s, other leaves stay as they are
    io.save('model.safetensors', packed)     # values and indices are plain tensors of the file
    params = formats.unpack(packed)          # bit for bit what was packed

Packed arrays are pytrees: `jit`, `vmap`, `scan`, sharding and Orbax take them like any parameter. Packing moves the
bits of the weights as unsigned integers, because floating-point units may flush subnormals and quieten NaNs.

`TABLE` holds the formats by name. `NMArray`, `Sparse24Array` and `BlockSparseArray` follow a pattern. `BitmaskArray`
and `RelativeIndexArray` store zeros anywhere in files, `CSCArray` does for products. A format of one's own is a
registered dataclass of `PackedArray` and one line, `formats.TABLE['mine'] = MyArray`: `pack`, files, `advise` and the
command line then use it.
"""

import contextlib
import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import errors, patterns, trees
from sparsejax.formats.anywhere import BitmaskArray, RelativeIndexArray
from sparsejax.formats.arrays import Misfit, PackedArray, nbytes
from sparsejax.formats.blocks import BlockSparseArray
from sparsejax.formats.columns import CSCArray
from sparsejax.formats.n_m import NMArray
from sparsejax.formats.sparse24 import Sparse24Array
from sparsejax.types import Array, Axes, Pattern, PyTree, moved

__all__ = [
    'TABLE', 'BitmaskArray', 'BlockSparseArray', 'CSCArray', 'Misfit', 'NMArray', 'PackedArray', 'RelativeIndexArray',
    'Sparse24Array', 'fitting', 'is_packed', 'matmul', 'nbytes', 'pack', 'unpack', 'values', 'with_values',
]

# The formats by name. `pack` takes the first format that fits a pattern, so the order says which one is preferred.
TABLE: dict[str, type[PackedArray]] = {each.kind: each for each in (
    NMArray, BlockSparseArray, BitmaskArray, RelativeIndexArray, CSCArray, Sparse24Array)}


def is_packed(node: Any) -> bool:
  """Returns whether `node` is a packed array. For the argument `is_leaf` of `jax.tree` functions."""
  return isinstance(node, PackedArray)


def fitting(pattern: Any) -> list[type[PackedArray]]:
  """Returns the formats of `TABLE` that are made for `pattern`, the preferred one first."""
  return [each for each in TABLE.values() if each.fits(pattern)]


def pack(params: PyTree, pattern: Any, *, where: Any = trees.matrices, axes: Mapping[str, Axes] | None = None,
         check: bool = True) -> PyTree:
  """Returns `params` with the leaves that `where` picks replaced by packed arrays.

  `pattern` is a pattern, which is packed in the first format of `TABLE` that fits it: `NM` in an `NMArray`, `Block` in
  a `BlockSparseArray`, `Unstructured()` in a `BitmaskArray`. A string is a pattern, as in '2:4', or the name of a
  format: 'bitmask', 'relative_index', 'csc', 'sparse24'. A dict maps globs to patterns and strings.

  `axes` says which axes of each leaf are contracted, see `trees.axes_of`; else `conventions` do. `check=False` is for
  traced leaves, see `NMArray.from_dense`. Raises `ValueError` for a leaf that is packed already or whose nonzeros
  do not keep the pattern, and for a pattern that no format fits.
  """
  names, leaves, treedef = trees.flatten(params, is_leaf=is_packed)
  already = [name for name, leaf in zip(names, leaves) if is_packed(leaf)]
  if already:
    raise ValueError(f'pack: {errors.some(already)} already packed; call unpack first.')
  chosen = [name for name, pick in zip(names, trees.select('pack', where, params)) if pick]
  plans = {name: _format_and_pattern(asked)
           for name, asked in zip(chosen, trees.per_leaf('pack', 'pattern', pattern, chosen))}
  oriented = [name for name, (format_, _) in plans.items() if format_.takes_axes]
  known = trees.axes_by_path('pack', axes, params, oriented)
  return treedef.unflatten([_pack_leaf(name, leaf, *plans[name], known.get(name), check) if name in plans else leaf
                            for name, leaf in zip(names, leaves)])


def _format_and_pattern(asked: Any) -> tuple[type[PackedArray], Pattern]:
  """Returns the format and the pattern that `asked` means, an entry of `pack`'s argument `pattern`."""
  format_ = TABLE.get(asked) if isinstance(asked, str) else None
  if format_ and format_.default_pattern is not None:
    return format_, format_.default_pattern
  formats = []
  with contextlib.suppress(ValueError):  # A string may spell no pattern.
    formats = fitting(pattern := patterns.parse(asked))
  if formats:
    return formats[0], pattern
  named = [kind for kind, each in TABLE.items() if each.default_pattern is not None]
  spelled = [example for each in patterns.TABLE.values() if fitting(patterns.parse(each.examples[0]))
             for example in each.examples]
  raise errors.unknown('pack', 'pattern', asked, [*spelled, *named])


def _pack_leaf(path: str, leaf: Array, format_: type[PackedArray], pattern: Pattern, axes: Axes | None,
               check: bool) -> PackedArray:
  try:
    return format_.from_pattern(leaf, pattern, axes, check)
  except Misfit as misfit:
    raise errors.at_leaf('pack', path, leaf.shape, misfit.why) from None


def unpack(tree: PyTree, base: PyTree | None = None) -> PyTree:
  """Returns the dense tree, bit for bit: the inverse of `pack`. Works under `jit` and `vmap`.

  `base` is a dense tree of the same structure. Its entries replace those that a `RelativeIndexArray` does not store,
  instead of zeros. For `recipes.freeze_net`, `base` holds the parameters that the seed gives.
  """
  if base is None:
    return jax.tree.map(lambda leaf: leaf.to_dense() if is_packed(leaf) else leaf, tree, is_leaf=is_packed)
  dense = lambda leaf, base: leaf.to_dense_over(base) if is_packed(leaf) else leaf
  return jax.tree.map(dense, tree, base, is_leaf=is_packed)


def values(tree: PyTree) -> PyTree:
  """Returns `tree` with each packed leaf replaced by its `values`, the float array that can be trained.

  `jax.grad` and optax refuse the indices of packed leaves and take `values`; gradients and moments then have the packed
  size. `with_values` is the way back: `loss(formats.with_values(params, values))`.
  """
  return jax.tree.map(lambda leaf: leaf.values if is_packed(leaf) else leaf, tree, is_leaf=is_packed)


def with_values(tree: PyTree, values: PyTree) -> PyTree:
  """Returns `tree` with `values` in its leaves, as `formats.values(tree)` gives them. Differentiable in `values`."""
  put = lambda leaf, v: dataclasses.replace(leaf, values=v) if is_packed(leaf) else v
  return jax.tree.map(put, tree, values, is_leaf=is_packed)


@jax.jit
def matmul(x: Array, packed: PackedArray) -> Array:
  """Returns `x[..., K]` times the weight in `packed`: `[..., *other axes of the weight]`, in `x`'s dtype.

  The contracted axes of the weight, merged, have length K. The program unpacks the weight and casts it to `x`'s dtype;
  products are summed in float32 or wider. Takes any format that knows its contracted axes; `kernels_pallas` has faster
  products. Raises `ValueError` for another format, and if `x` does not end in K.
  """
  if not packed.axes:
    raise ValueError(f'formats.matmul: {type(packed).__name__} does not say which axes are contracted; unpack it.')
  axes = tuple(a + packed.ndim for a in packed.axes)
  sizes = tuple(packed.shape[a] for a in axes)
  if x.shape[-1] != math.prod(sizes):
    raise ValueError(f'formats.matmul: x of shape {x.shape} must end in the contracted length {math.prod(sizes)} of '
                     f'the packed array of shape {packed.shape}; reshape x so that its last axis has that length.')
  sums = jnp.float32 if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4 else None
  x, lead = x.reshape(*x.shape[:-1], *sizes), x.ndim - 1
  contraction = ((tuple(range(lead, x.ndim)), axes), ((), ()))
  w = packed.to_dense().astype(x.dtype)
  return jax.lax.dot_general(x, w, contraction, preferred_element_type=sums).astype(x.dtype)


__getattr__ = moved(__name__, {
    'ANYWHERE': ({kind: TABLE[kind] for kind in ('bitmask', 'relative_index')}, 'formats.TABLE'),
    'of_kind': (TABLE.get, 'formats.TABLE.get')})
