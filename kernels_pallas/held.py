"""A packed weight as the program sees it: reshaped and transposed, without being unpacked, and then contracted.

`Held` says of each dimension that the program sees which parts of which axes of the packed array it runs over. Moves
rearrange those parts; a contraction whose parts are those that the array is packed along is one call of a kernel.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sparsejax.formats import PackedArray
from sparsejax.formats.arrays import static
from sparsejax.types import Array


class Part(NamedTuple):
  """A part of an axis of the packed array: `size` places, `stride` apart. An axis as a whole has stride 1."""

  axis: int
  stride: int
  size: int


Dims = tuple[tuple[Part, ...], ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, eq=False)
class Held:
  """`packed`, of the parameter `path`, with the dimensions `dims`, each the product of its parts, major first.

  The parts of all dimensions are together all of the array. Dimensions of length one have none.
  """

  packed: PackedArray
  path: str = static()
  dims: Dims = static()

  @property
  def shape(self) -> tuple[int, ...]:
    return tuple(math.prod(part.size for part in dim) for dim in self.dims)

  def to_dense(self) -> Array:
    """What the program sees, unpacked."""
    parts = _in_order(part for dim in self.dims for part in dim)
    split = self.packed.to_dense().reshape([part.size for part in parts])
    return split.transpose([parts.index(part) for dim in self.dims for part in dim]).reshape(self.shape)


def whole(packed: PackedArray, path: str) -> Held:
  """The packed array itself."""
  return Held(packed, path, tuple((Part(axis, 1, n),) if n != 1 else () for axis, n in enumerate(packed.shape)))


def _in_order(parts: Any) -> list[Part]:
  """As the parts lie in the packed array."""
  return sorted(parts, key=lambda part: (part.axis, -part.stride))


# Moves: the new dimensions, or `None` where they are no rearrangement of the parts.


def moved(held: Held, eqn: Any) -> Held | None:
  """What an operation of `MOVES` makes of it, or `None`."""
  dims = MOVES[eqn.primitive.name](held, eqn.params, eqn.outvars[0].aval.shape)
  return None if dims is None else dataclasses.replace(held, dims=dims)


def _reshaped(held: Held, params: Any, shape: tuple[int, ...]) -> Dims | None:
  """Deals the parts out to the new dimensions, major first; one that straddles two of them is split if it can be."""
  if params.get('dimensions') is not None or 0 in shape:
    return None
  queue, dims = [part for dim in held.dims for part in dim], []
  for n in shape:
    dim = []
    while n > 1:
      part = queue.pop(0)
      size = math.gcd(n, part.size)
      if size != min(n, part.size):
        return None
      minor = part.size // size
      dim.append(Part(part.axis, part.stride * minor, size))
      queue[:0] = [part._replace(size=minor)] if minor > 1 else []
      n //= size
    dims.append(tuple(dim))
  return tuple(dims)


def _broadcast(held: Held, params: Any, shape: tuple[int, ...]) -> Dims | None:
  """New dimensions of length one."""
  dims: list[tuple[Part, ...]] = [()] * len(shape)
  for dim, i in zip(held.dims, params['broadcast_dimensions']):
    dims[i] = dim
  return tuple(dims) if math.prod(shape) == math.prod(held.shape) else None


MOVES: dict[str, Callable[[Held, Any, tuple[int, ...]], Dims | None]] = {
  'reshape': _reshaped, 'broadcast_in_dim': _broadcast,
  'transpose': lambda held, params, shape: tuple(held.dims[i] for i in params['permutation']),
  'squeeze': lambda held, params, shape: tuple(d for i, d in enumerate(held.dims) if i not in params['dimensions'])}


# Stacks.


def stacked(held: Held) -> bool:
  """Is its first dimension the first axis of the packed array, and each index of it a packed array of the same kind?"""
  lead = held.packed.shape[0] if held.packed.shape else 1
  within = {*_axes(held.packed), *getattr(held.packed, 'outputs', ())}  # of NMArray axes, of others lengths
  if not held.dims or held.dims[0] != (Part(0, 1, lead),) or -held.packed.ndim in within:
    return False
  return jax.eval_shape(_first, held.packed).shape == held.packed.shape[1:]


def _first(packed: PackedArray) -> PackedArray:
  return jax.tree.map(lambda array: array[0], packed)


def sliced(held: Held) -> Dims:
  """The dimensions of one index of a stack."""
  return tuple(tuple(part._replace(axis=part.axis - 1) for part in dim) for dim in held.dims[1:])


def _axes(packed: PackedArray) -> tuple[int, ...]:
  return getattr(packed, 'axes', ())


# Contractions.


class Numbers(NamedTuple):
  """Which dimensions of an operand are contracted and which are batch dimensions, each paired with the other's."""

  contracted: tuple[int, ...]
  batch: tuple[int, ...]


def misfit(held: Held, numbers: Numbers) -> str | None:
  """Why no kernel can contract it like this, or `None`."""
  if not _axes(held.packed):
    return f'the format {held.packed.kind!r} does not say which axes are contracted'
  if 0 in held.shape:
    return 'it is empty'
  packed = {a + held.packed.ndim for a in held.packed.axes}
  along = {part.axis for i in numbers.contracted for part in held.dims[i]}
  left = {part.axis for i, dim in enumerate(held.dims) if i not in numbers.contracted for part in dim}
  if along - packed or left & packed:
    mixed = ' in part' if along & left else ''
    return (f'its axes {sorted(along)} are contracted{mixed}, and it is packed along {sorted(packed)}; give pack '
            'axes=sparsejax.contractions(apply, params, x) of this program')
  batch = _batch(held, numbers)
  front = dataclasses.replace(held, dims=(*(held.dims[i] for i in batch), *(
      dim for i, dim in enumerate(held.dims) if i not in batch)))
  for _ in batch:
    if not stacked(front):
      return 'a batch dimension is no leading axis of a stack'
    front = Held(jax.eval_shape(_first, front.packed), front.path, sliced(front))
  return None


def _batch(held: Held, numbers: Numbers) -> list[int]:
  """The batch dimensions that are longer than one, in the order of the packed array's axes."""
  return sorted((i for i in numbers.batch if held.dims[i]), key=lambda i: held.dims[i][0].axis)


def product(op: Callable[[Array, PackedArray], Array], held: Held, ours: Numbers, x: Array, theirs: Numbers,
            ours_first: bool) -> Array:
  """`x` times what is held, as `dot_general` has it: batch dimensions, then those left of the first, of the second.

  `op(x, packed)` contracts the last axis of `x`, which has the length of the packed contraction, and puts all other
  axes of the packed array, merged or not, in its place.
  """
  stacks = _batch(held, ours)
  partner = dict(zip(ours.batch, theirs.batch))
  single = [i for i in ours.batch if i not in stacks]
  free = [i for i in range(x.ndim) if i not in (*theirs.contracted, *theirs.batch)]
  left = [i for i in range(len(held.dims)) if i not in (*ours.contracted, *ours.batch)]
  front = [partner[i] for i in (*stacks, *single)] + free
  rows = _merged(held, ours, x.transpose(*front, *theirs.contracted), len(front))
  for _ in stacks:
    op = jax.vmap(op)
  y = op(rows, held.packed)
  parts = [part for i in left for part in held.dims[i]]
  order, lead = _in_order(parts), [x.shape[i] for i in front]
  y = y.reshape(*lead, *(part.size for part in order))
  y = y.transpose(*range(len(lead)), *(len(lead) + order.index(part) for part in parts))
  y = y.reshape(*lead, *(held.shape[i] for i in left))
  batch = [(*stacks, *single).index(i) for i in ours.batch]
  others, mine = range(len(batch), len(lead)), range(len(lead), y.ndim)
  return y.transpose(*batch, *mine, *others) if ours_first else y.transpose(*batch, *others, *mine)


def _merged(held: Held, ours: Numbers, x: Array, lead: int) -> Array:
  """`x` with its dimensions from `lead` on merged in the order in which the packed array contracts them."""
  parts = [part for i in ours.contracted for part in held.dims[i]]
  axes = [a + held.packed.ndim for a in held.packed.axes]
  order = sorted(range(len(parts)), key=lambda i: (axes.index(parts[i].axis), -parts[i].stride))
  x = x.reshape(*x.shape[:lead], *(part.size for part in parts))
  return x.transpose(*range(lead), *(lead + i for i in order)).reshape(*x.shape[:lead], -1)


