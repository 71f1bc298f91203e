"""Lets a program reshape, transpose and contract a packed weight without unpacking it.

`Held` stands in for the dense array of a packed one. Its dimensions are products of `Factor`s of the packed array's
axes (`sparsejax.programs.factors`), and moves rearrange the factors. A product over exactly the axes that the array is
packed along is one call of a kernel: `fitted` tells whether a product qualifies, and `product` computes it.

    w = whole(packed, 'mlp/kernel')                            # a BlockSparseArray of shape (8, 12)
    fit = fitted(w, Numbers(contracted=(0,), batch=()))        # Fitted, or a Refusal with the reason
    y = product(block_sparse_matmul, fit, x, Numbers((1,), ()), held_first=False)   # x @ w
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax

from sparsejax.formats import PackedArray
from sparsejax.formats.arrays import static
from sparsejax.programs import factors
from sparsejax.programs.factors import Dims
from sparsejax.programs.jaxprs import Numbers
from sparsejax.types import Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Held:
  """`Held` holds the packed array of the parameter at `path`, with the dimensions `dims` that the program sees.

  The factors of all dimensions together are the whole array. Dimensions of length 1 have no factor.
  """

  packed: PackedArray
  path: str = static()
  dims: Dims = static()

  @property
  def shape(self) -> tuple[int, ...]:
    return factors.shape_of(self.dims)

  def to_dense(self) -> Array:
    """Returns the dense array that the program sees."""
    return factors.arranged(self.packed.to_dense(), self.dims)


def whole(packed: PackedArray, path: str) -> Held:
  """Returns the stand-in for the packed array itself."""
  dims = zip(factors.whole(packed.shape), packed.shape)
  return Held(packed, path, tuple(dim if n != 1 else () for dim, n in dims))


def moved(held: Held, eqn: Any) -> Held | None:
  """Returns the stand-in after an operation that rearranges dimensions, or `None` for every other operation."""
  move = factors.MOVES.get(eqn.primitive.name)
  result = move and move(held.dims, eqn, eqn.outvars[0].aval.shape)
  return dataclasses.replace(held, dims=result.dims) if result and factors.exact(result.dims) else None


# Stacks.


def stacked(held: Held, dimensions: Sequence[int] = (0,)) -> bool:
  """Returns whether each index of these dimensions is a packed array of the same kind.

  The dimensions must be, in their order, the first axes of a packed stack.
  """
  n = len(dimensions)
  return n <= held.packed.leading and tuple(held.dims[i] for i in dimensions) == factors.whole(held.packed.shape[:n])


def sliced(held: Held) -> Dims:
  """Returns the dimensions of one index of a stack."""
  return tuple(tuple(factor._replace(axes=(factor.axes[0] - 1,)) for factor in dim) for dim in held.dims[1:])


# Products.


class Refusal(NamedTuple):
  """A `Refusal` says why a held operand cannot be contracted while it is packed."""

  why: str


class Fitted(NamedTuple):
  """`Fitted` holds an operand that is contracted over the axes that it is packed along.

  `numbers` are the dimensions of the operand in the product. `stacks` are its batch dimensions longer than 1, in the
  order of the packed axes. `matrix` is the abstract packed array at one index of all these dimensions.
  """

  held: Held
  numbers: Numbers
  stacks: tuple[int, ...]
  matrix: PackedArray

  def front(self, theirs: Numbers, rank: int) -> list[int]:
    """Returns the dimensions of the other operand that are not contracted.

    The partners of `stacks` come first, then those of the other batch dimensions, then the free dimensions.
    """
    partner = dict(zip(self.numbers.batch, theirs.batch))
    batch = [*self.stacks, *(i for i in self.numbers.batch if i not in self.stacks)]
    return [partner[i] for i in batch] + [i for i in range(rank) if i not in (*theirs.contracted, *theirs.batch)]

  def rows(self, x: jax.ShapeDtypeStruct, theirs: Numbers) -> jax.ShapeDtypeStruct:
    """Returns the shape and dtype of the array that an op multiplies by `matrix`, if the other operand is like `x`."""
    lead = [x.shape[i] for i in self.front(theirs, len(x.shape))[len(self.stacks):]]
    contracted = [factors.shape_of(self.held.dims)[i] for i in self.numbers.contracted]
    return jax.ShapeDtypeStruct((*lead, math.prod(contracted)), x.dtype)


def fitted(held: Held, numbers: Numbers) -> Fitted | Refusal:
  """Returns the operand fitted to a product with these dimensions, or why no kernel can contract it."""
  if not held.packed.axes:
    return Refusal(f'the format {held.packed.kind!r} does not say which axes are contracted')
  if 0 in held.shape:
    return Refusal('it is empty')
  packed = {a + held.packed.ndim for a in held.packed.axes}
  along = set(factors.over(factor for i in numbers.contracted for factor in held.dims[i]))
  left = set(factors.over(f for i, dim in enumerate(held.dims) if i not in numbers.contracted for f in dim))
  if along - packed or left & packed:
    mixed = ' in part' if along & left else ''
    return Refusal(f'its axes {sorted(along)} are contracted{mixed}, and it is packed along {sorted(packed)}; give '
                   'pack axes=sparsejax.contractions(apply, params, x) of this program')
  stacks = tuple(sorted((i for i in numbers.batch if held.dims[i]), key=lambda i: held.dims[i][0].axes))
  if not stacked(held, stacks):
    return Refusal('a batch dimension is no leading axis of a stack')
  first = lambda packed: jax.tree.map(lambda array: array[(0,) * len(stacks)], packed)
  return Fitted(held, numbers, stacks, jax.eval_shape(first, held.packed))


def product(op: Callable[[Array, PackedArray], Array], fit: Fitted, x: Array, theirs: Numbers, held_first: bool
            ) -> Array:
  """Returns the product of the held operand and of `x`, whose dimensions in the product are `theirs`.

  The result has the order of `dot_general`: the batch dimensions, the free dimensions of the first operand, the free
  dimensions of the second operand. `held_first` tells which operand is the first. `op(x, packed)` contracts the last
  axis of `x`. In place of this axis the op puts all other axes of the packed array, merged or not.
  """
  held, ours = fit.held, fit.numbers
  front = fit.front(theirs, x.ndim)
  lead = [x.shape[i] for i in front]
  for _ in fit.stacks:
    op = jax.vmap(op)
  y = op(_merged(held, ours, x.transpose(*front, *theirs.contracted), len(front)), held.packed)
  left = [i for i in range(len(held.dims)) if i not in (*ours.contracted, *ours.batch)]
  y = factors.arranged(y, tuple(held.dims[i] for i in left), lead)
  batch = [front.index(i) for i in theirs.batch]
  others, mine = range(len(batch), len(lead)), range(len(lead), y.ndim)
  return y.transpose(*batch, *mine, *others) if held_first else y.transpose(*batch, *others, *mine)


def _merged(held: Held, ours: Numbers, x: Array, lead: int) -> Array:
  """Returns `x` with its dimensions from `lead` on merged, in the order in which the packed array contracts them."""
  parts = [factor for i in ours.contracted for factor in held.dims[i]]
  axes = [a + held.packed.ndim for a in held.packed.axes]
  order = sorted(range(len(parts)), key=lambda i: (axes.index(parts[i].axes[0]), -parts[i].stride))
  sizes = [factor.size for factor in parts]
  x = x.reshape(*x.shape[:lead], *sizes)
  return x.transpose(*range(lead), *(lead + i for i in order)).reshape(*x.shape[:lead], math.prod(sizes))
