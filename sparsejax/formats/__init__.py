"""Packs parameters: arrays that store only what is not zero, and become dense again bit for bit.

    packed = formats.pack(params, '2:4')     # matrices become `NMArray`s, other leaves stay as they are
    io.save('model.safetensors', packed)     # values and indices are plain tensors of the file
    params = formats.unpack(packed)          # bit for bit what was packed, with -0.0 as 0.0

Packed arrays are pytrees: `jit`, `vmap`, `scan`, sharding and Orbax take them like any parameter. Packing moves the
bits of the weights as unsigned integers, because floating-point units may flush subnormals and quieten NaNs.

`TABLE` holds the formats by name. `NMArray`, `Sparse24Array` and `BlockSparseArray` follow a pattern. `BitmaskArray`
and `RelativeIndexArray` store zeros anywhere in files, `CSCArray` and `ELLArray` do for products. A format of one's own
is a registered dataclass of `PackedArray` and one line, `formats.TABLE['mine'] = MyArray`: `pack`, files, `advise` and
the command line then use it. `AROUND` holds the formats around a packed array: `Scaled` quantizes its values,
`Wrapped` multiplies it by block-diagonal matrices, and `ActiveArray` skips small inputs.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import errors, patterns, states, trees
from sparsejax.arguments import checked
from sparsejax.formats import arrays
from sparsejax.formats.active import ActiveArray
from sparsejax.formats.anywhere import BitmaskArray, RelativeIndexArray
from sparsejax.formats.arrays import Misfit, PackedArray, axes_of, nbytes, with_axes
from sparsejax.formats.blocks import BlockSparseArray
from sparsejax.formats.columns import CSCArray
from sparsejax.formats.ell import ELLArray
from sparsejax.formats.n_m import NMArray
from sparsejax.formats.scaled import Scaled
from sparsejax.formats.sparse24 import Sparse24Array
from sparsejax.formats.wrapped import Wrapped
from sparsejax.patterns import Unstructured
from sparsejax.progress import counted
from sparsejax.types import Array, Axes, Pattern, PyTree, moved

__all__ = [
    'AROUND', 'TABLE', 'ActiveArray', 'BitmaskArray', 'BlockSparseArray', 'CSCArray', 'ELLArray', 'Misfit', 'NMArray',
    'PackedArray', 'Packing', 'RelativeIndexArray', 'Scaled', 'Sparse24Array', 'Wrapped', 'axes_of', 'fitting',
    'freeze_net_trained', 'is_packed', 'matmul', 'nbytes', 'pack', 'packings', 'unfit', 'unpack', 'values', 'with_axes',
    'with_values',
]

# The formats by name. `pack` takes the first format that fits a pattern and pays for a leaf, so the order counts.
TABLE = arrays.TABLE
TABLE.update({each.kind: each for each in (
    NMArray, BlockSparseArray, CSCArray, BitmaskArray, RelativeIndexArray, Sparse24Array, ELLArray)})
# The formats that hold an array of `TABLE`, or a dense one, and change its product; `pack` makes none of them, and
# files have them.
AROUND: dict[str, type[PackedArray]] = {each.kind: each for each in (ActiveArray, Scaled, Wrapped)}


def is_packed(node: Any) -> bool:
  """Returns whether `node` is a packed array. For the argument `is_leaf` of `jax.tree` functions."""
  return isinstance(node, PackedArray)


@checked
def fitting(pattern: Any) -> list[type[PackedArray]]:
  """Returns the formats of `TABLE` that are made for `pattern`, the preferred one first."""
  pattern = patterns.parse(pattern)
  return [each for each in TABLE.values() if each.fits(pattern)]


class Packing(NamedTuple):
  """A `Packing` says how one leaf is to be packed: the first of `formats` that pays, along `axes`, if anything has any.
  """

  path: str
  formats: tuple[type[PackedArray], ...]
  pattern: Pattern
  axes: Axes | None
  signed_zeros: bool = False

  def packed(self, leaf: Array, check: bool = True) -> PackedArray:
    """Returns `leaf` packed. Raises `ValueError` that names the leaf if it cannot be."""
    with self._named(leaf):
      return with_axes(self._format(leaf).from_pattern(leaf, self.pattern, self.axes, check, **self._keep), self.axes)

  def in_blocks(self, leaf: Any) -> tuple[PackedArray, Iterator[Mapping[str, Array]]]:
    """Returns `leaf`, an `io.Stored`, packed, as `PackedArray.in_blocks` does.

    Raises `ValueError` that names the leaf, here or at a later block, if the leaf cannot be packed.
    """
    def named():
      with self._named(leaf):
        yield from blocks

    with self._named(leaf):
      packed, blocks = self._format(leaf).in_blocks(leaf, self.pattern, self.axes, **self._keep)
    return with_axes(packed, self.axes), named()

  def _format(self, leaf: Any) -> type[PackedArray]:
    *others, last = self.formats
    return next((each for each in others if each.pays(leaf, self.pattern, self.axes, **self._keep)), last)

  @property
  def _keep(self) -> dict[str, bool]:
    return {'signed_zeros': True} if self.signed_zeros else {}

  @contextlib.contextmanager
  def _named(self, leaf: Any) -> Iterator[None]:
    """Names the leaf in refusals."""
    try:
      yield
    except Misfit as misfit:
      raise errors.at_leaves('pack', [errors.Problem(self.path, tuple(leaf.shape), misfit.why)]) from None


@checked
def pack(params: PyTree, pattern: Any = None, *, state: Any = None, where: Any = trees.matrices,
         axes: Mapping[str, Axes] | None = None, check: bool = True, signed_zeros: bool = False) -> PyTree:
  """Returns `params` with the leaves that `where` picks replaced by packed arrays.

  `pattern` is a pattern: `NM` is packed in an `NMArray`, `Block` in a `BlockSparseArray`. `Unstructured()` is packed in
  the format whose product is fast, a `CSCArray`, or else in a `BitmaskArray`: if the leaf is no matrix, and if a
  `CSCArray` takes more bytes than the dense leaf, as below 75 % zeros in float32 and 86 % in bfloat16. A string is a
  pattern, as in '2:4' or '128x128 0.9', or the name of a format: 'bitmask', 'relative_index', 'csc', 'sparse24'. The
  first two take the fewest bytes. A dict maps globs to patterns and strings.

  `axes` says which axes of each leaf are contracted; the default is that of `trees.axes_of`. With `state`, an optimizer
  state, its recipe says pattern, `where` and axes, and nothing else may be given. Packed leaves keep the axes, see
  `axes_of`. A leaf that is in several places of `params` is packed once. `check=False` is for traced leaves, see
  `NMArray.from_dense`. `-0.0`, which `w * mask` leaves behind, is a zero and becomes `0.0`; with `signed_zeros` it is
  kept like any weight. Raises `ValueError` for a leaf that is packed already or whose nonzeros do not keep the pattern,
  and for a pattern that no format fits. Raises `ValueError` for a state whose pruned weights are frozen and not zero.
  """
  if state is None:
    plans = packings(params, pattern, where=where, axes=axes)
  elif (pattern, where, axes) != (None, trees.matrices, None):
    raise ValueError('pack: the optimizer state says what is packed; pass either it or pattern, where and axes.')
  else:
    plans = _packings_of(params, state)
  plans = {name: plan._replace(signed_zeros=signed_zeros) for name, plan in plans.items()}
  packed, problems = _packed(plans, params, check, unfit(plans, params))
  if problems:
    refusal = errors.at_leaves('pack', problems)
    raise refusal if state is not None else trees.refused(refusal, where, params)
  return packed


def _packed(plans: Mapping[str, Packing], params: PyTree, check: bool, problems: list[errors.Problem]
            ) -> tuple[PyTree, list[errors.Problem]]:
  """Returns the packed tree and why leaves of it cannot be packed; with `problems`, nothing is packed."""
  names, leaves, treedef = trees.flatten(params, is_leaf=is_packed)
  once: dict[Any, Any] = {}  # A leaf in several places is packed once.
  arrays = []
  work = list(zip(names, leaves)) if not problems else []
  for name, leaf in counted('pack', work, lambda pair: pair[0]):
    key = (id(leaf), *plans[name][1:]) if name in plans else name
    try:
      if key not in once:
        once[key] = plans[name].packed(leaf, check) if name in plans else leaf
      arrays.append(once[key])
    except errors.AtLeaves as refusal:
      problems = [*problems, *refusal.problems]
  return (None if problems else treedef.unflatten(arrays)), problems


def packings(params: PyTree, pattern: Any, *, where: Any = trees.matrices, axes: Mapping[str, Axes] | None = None
             ) -> dict[str, Packing]:
  """Returns how `pack` packs the leaves that `where` picks, by path. Leaves may be `io.Stored`."""
  _refuse_packed(params)
  if pattern is None:
    raise ValueError("pack: give a pattern, as in pack(params, '2:4'), or an optimizer state, pack(params, state=...).")
  names = trees.flatten(params)[0]
  chosen = [name for name, pick in zip(names, trees.select('pack', where, params)) if pick]
  asked = {name: _formats_and_pattern(each)
           for name, each in zip(chosen, trees.per_leaf('pack', 'pattern', pattern, chosen))}
  needed = [name for name, (formats, _) in asked.items() if all(each.takes_axes for each in formats)]
  along = trees.axes_by_path('pack', axes, params, needed)
  along |= _known_axes(params, axes, [name for name in asked if name not in needed])
  return {name: Packing(name, formats, pattern, along.get(name)) for name, (formats, pattern) in asked.items()}


def unfit(plans: Mapping[str, Packing], params: PyTree) -> list[errors.Problem]:
  """Returns why leaves cannot carry their pattern along their axes, as can be said before anything is packed."""
  leaves = dict(zip(*trees.flatten(params)[:2]))
  shapes = {path: tuple(leaves[path].shape) for path, plan in plans.items()
            if all(each.takes_axes for each in plan.formats)}
  problems = [errors.Problem(path, shape, plans[path].pattern.validate(shape, plans[path].axes) or '')
              for path, shape in shapes.items()]
  return [problem for problem in problems if problem.reason]


def _refuse_packed(params: PyTree) -> None:
  names, leaves, _ = trees.flatten(params, is_leaf=is_packed)
  already = [name for name, leaf in zip(names, leaves) if is_packed(leaf)]
  if already:
    raise ValueError(f'pack: {errors.some(already)} already packed; call unpack first.')


def _known_axes(params: PyTree, axes: Mapping[str, Axes] | None, paths: Sequence[str]) -> dict[str, Axes]:
  """Returns the axes of those leaves that have any. Their formats also pack a leaf that no program contracts."""
  try:
    return trees.axes_by_path('pack', axes, params, paths)
  except ValueError:
    if len(paths) < 2:
      return {}
  half = len(paths) // 2
  return _known_axes(params, axes, paths[:half]) | _known_axes(params, axes, paths[half:])


def _packings_of(params: PyTree, opt_state: Any) -> dict[str, Packing]:
  """Returns how the leaves of `params` are packed that an optimizer state made sparse."""
  _refuse_packed(params)
  names, leaves, _ = trees.flatten(params)
  shapes = {name: leaf.shape for name, leaf in zip(names, leaves) if hasattr(leaf, 'shape')}
  plans = {}
  for state in states.find(opt_state):
    if state.plan.flow is not None and state.plan.flow.frozen:
      raise ValueError('pack: the pruned weights of this state are frozen at their first values and not zero; '
                       'formats.freeze_net_trained(params, opt_state) packs what was trained.')
    for leaf in state.plan.leaves:
      extra = len(shapes.get(leaf.path, ())) - len(leaf.shape)
      if leaf.path not in shapes or shapes[leaf.path][max(extra, 0):] != tuple(leaf.shape):
        raise errors.at_leaf('pack', leaf.path, leaf.shape, 'the state has a leaf of this path and shape, and `params` '
                             'do not; pass the parameters of this state.')
      formats, pattern = _formats_and_pattern(Unstructured() if leaf.pattern is None else leaf.pattern)
      plans[leaf.path] = Packing(leaf.path, formats, pattern, leaf.axes.stacked(extra))
  return plans


def _formats_and_pattern(asked: Any) -> tuple[tuple[type[PackedArray], ...], Pattern]:
  """Returns the formats and the pattern that `asked` means, an entry of `pack`'s argument `pattern`."""
  format_ = TABLE.get(asked) if isinstance(asked, str) else None
  if format_ and format_.default_pattern is not None:
    return (format_,), format_.default_pattern
  try:
    pattern = patterns.parse(asked)
  except ValueError as refusal:
    if not str(refusal).startswith('patterns.parse: unknown pattern'):
      raise  # The text spells a pattern that cannot be.
    pattern = None
  formats = [] if pattern is None else fitting(pattern)
  if formats:
    return tuple(formats), pattern
  if pattern is not None and not isinstance(pattern, Mapping):
    raise ValueError(f'pack: no format stores {pattern} smaller than dense by its pattern. Pack as \'unstructured\', '
                     'which stores zeros anywhere, or cut the zeros out of the model.')
  named = [kind for kind, each in TABLE.items() if each.default_pattern is not None]
  spelled = [example for each in patterns.TABLE.values() if fitting(patterns.parse(each.examples[0]))
             for example in each.examples]
  raise errors.unknown('pack', 'pattern', asked, [*spelled, *named])


@checked
def unpack(tree: PyTree, base: PyTree | None = None) -> PyTree:
  """Returns the dense tree, bit for bit: the inverse of `pack`, but for the sign of zeros. Works under `jit`, `vmap`.

  `base` is a dense tree of the same structure. Its entries replace those that a `RelativeIndexArray` does not store,
  instead of zeros. For `recipes.freeze_net`, `base` holds the parameters that the seed gives.
  """
  if base is None:
    return jax.tree.map(lambda leaf: leaf.to_dense() if is_packed(leaf) else leaf, tree, is_leaf=is_packed)
  dense = lambda leaf, base: leaf.to_dense_over(base) if is_packed(leaf) else leaf
  return jax.tree.map(dense, tree, base, is_leaf=is_packed)


@checked
def values(tree: PyTree) -> PyTree:
  """Returns `tree` with each packed leaf replaced by its `values`, the float array that can be trained.

  `jax.grad` and optax refuse the indices of packed leaves and take `values`; gradients and moments then have the packed
  size. `with_values` is the way back: `loss(formats.with_values(params, values))`.
  """
  return jax.tree.map(lambda leaf: leaf.values if is_packed(leaf) else leaf, tree, is_leaf=is_packed)


@checked
def with_values(tree: PyTree, values: PyTree) -> PyTree:
  """Returns `tree` with `values` in its leaves, as `formats.values(tree)` gives them. Differentiable in `values`.

  Raises `ValueError` for values of another structure.
  """
  put = lambda leaf, v: dataclasses.replace(leaf, values=v) if is_packed(leaf) else v
  ours, theirs = (jax.tree.structure(each, is_leaf=is_packed) for each in (tree, values))
  if ours != theirs:
    odd = {*trees.flatten(tree, is_leaf=is_packed)[0]} ^ {*trees.flatten(values)[0]}
    raise ValueError('formats.with_values: `values` have another structure than `tree`; they differ in '
                     f'{errors.some(sorted(odd)) or "a container"}. Give values like those of formats.values(tree).')
  return jax.tree.map(put, tree, values, is_leaf=is_packed)


@checked
def freeze_net_trained(params: PyTree, opt_state: Any) -> PyTree:
  """Returns what `recipes.freeze_net` trained: the kept weights of each sparse leaf and their places, packed.

  Dense leaves are returned as they are. `io.save` writes the result, and `formats.unpack(io.load(path),
  first_parameters)` is `params` again, bit for bit. At 99 % the file has under 2 % of the bytes. Call it outside of
  `jit`.
  """
  packed = lambda w, mask: RelativeIndexArray.from_dense(w, mask) if mask.ndim else w
  return jax.tree.map(packed, params, states.masks(params, opt_state))


states.FORMER['freeze_net_trained'] = freeze_net_trained, 'formats.freeze_net_trained'


@checked
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


moved(__name__, {
    'ANYWHERE': ({kind: TABLE[kind] for kind in ('bitmask', 'relative_index')}, 'formats.TABLE'),
    'of_kind': (TABLE.get, 'formats.TABLE.get')})
