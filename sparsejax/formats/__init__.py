"""Packed parameters: arrays that store what is not zero, and dense again bit for bit.

Packed arrays are pytrees, so that `jit`, `vmap`, `scan`, sharding and Orbax take them as they take any parameter. All
the moving is done on the bits, as unsigned integers, because floating units may flush subnormals and quieten NaNs.
`NMArray`, `Sparse24Array` and `BlockSparseArray` follow a pattern; `BitmaskArray` and `RelativeIndexArray` are for
files of zeros anywhere, `CSCArray` for products with such.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import errors, patterns, trees
from sparsejax.formats.anywhere import BitmaskArray, RelativeIndexArray
from sparsejax.formats.arrays import Misfit, PackedArray, nbytes, of_kind
from sparsejax.formats.blocks import BlockSparseArray
from sparsejax.formats.columns import CSCArray
from sparsejax.formats.n_m import NMArray
from sparsejax.formats.sparse24 import Sparse24Array
from sparsejax.types import Array, Axes, PyTree

__all__ = [
    'ANYWHERE', 'BitmaskArray', 'BlockSparseArray', 'CSCArray', 'Misfit', 'NMArray', 'PackedArray',
    'RelativeIndexArray', 'Sparse24Array', 'is_packed', 'matmul', 'nbytes', 'of_kind', 'pack', 'unpack', 'values',
    'with_values',
]

ANYWHERE = {'bitmask': BitmaskArray, 'relative_index': RelativeIndexArray}  # the formats for zeros anywhere, by name
_BY_NAME = (Sparse24Array.kind, CSCArray.kind)  # formats of matrices that no pattern stands for


def is_packed(node: Any) -> bool:
  """Is this a packed array? For `is_leaf`."""
  return isinstance(node, PackedArray)


def pack(params: PyTree, pattern: Any, *, where: Any = trees.matrices, axes: Mapping[str, Axes] | None = None,
         check: bool = True) -> PyTree:
  """Replace the leaves that `where` picks by packed arrays.

  `pattern` is an `NM`, a `Block` for a `BlockSparseArray`, `Unstructured()` for a `BitmaskArray`, or as a string '2:4',
  'bitmask', 'relative_index' for a `RelativeIndexArray`, 'csc' for a `CSCArray`, or 'sparse24' for a `Sparse24Array`;
  or a dict from globs to these. `axes` says which axes are contracted (by default `trees.conventional_axes`); `check`
  is that of `NMArray.from_dense`. Raises `ValueError` for a leaf whose nonzeros do not fit the pattern.
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


def values(tree: PyTree) -> PyTree:
  """What can be trained of `tree`: each packed leaf replaced by its `values`, a float array.

  For `jax.grad` and optax, which refuse the indices beside them; gradients and moments then have the packed size. Back
  with `with_values`: `loss(formats.with_values(params, values))`.
  """
  return jax.tree.map(lambda leaf: leaf.values if is_packed(leaf) else leaf, tree, is_leaf=is_packed)


def with_values(tree: PyTree, values: PyTree) -> PyTree:
  """`tree` with these `values`, as `values(tree)` gives them. Differentiable in `values`."""
  put = lambda leaf, v: dataclasses.replace(leaf, values=v) if is_packed(leaf) else v
  return jax.tree.map(put, tree, values, is_leaf=is_packed)


@jax.jit
def matmul(x: Array, packed: PackedArray) -> Array:
  """`x[..., K]` times the packed `w` over its contracted axes, merged: `[..., *other axes of w]`, in `x`'s dtype.

  The weights are unpacked inside the program and cast to `x`'s dtype; products are summed in float32 at least. Any
  format that knows which axes are contracted; `kernels_pallas` has what is faster.
  """
  if not hasattr(packed, 'axes'):
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


# One leaf: which format, and whether it fits.


def _kind(pattern: Any) -> Any:
  """An `NM`, a `Block`, or the name of a format."""
  if isinstance(pattern, str) and pattern not in (*ANYWHERE, *_BY_NAME):
    pattern = patterns.parse(pattern)
  if isinstance(pattern, patterns.Unstructured):
    return 'bitmask'
  if isinstance(pattern, (patterns.NM, patterns.Block, str)):
    return pattern
  valid = ['NM(n, m)', 'Block((bk, bn))', 'Unstructured()', "'n:m'", *map(repr, (*_BY_NAME, *ANYWHERE))]
  raise errors.unknown('pack', 'pattern', pattern, valid)


def _pack_leaf(path: str, leaf: Array, kind: Any, axes: Mapping[str, Axes] | None, check: bool) -> PackedArray:
  try:
    if kind in ANYWHERE:
      return ANYWHERE[kind].from_dense(leaf)
    at = trees.axes_of('pack', axes, path, leaf.shape)
    if kind == Sparse24Array.kind:
      return Sparse24Array.from_dense(leaf, at, check)
    if kind == CSCArray.kind:
      return CSCArray.from_dense(leaf, axes=at)
    if isinstance(kind, patterns.NM):
      return NMArray.from_dense(leaf, kind.n, kind.m, at, check, kind.width)
    return BlockSparseArray.from_dense(leaf, block=kind.shape, axes=at)
  except Misfit as misfit:
    raise errors.at_leaf('pack', path, leaf.shape, misfit.why) from None
