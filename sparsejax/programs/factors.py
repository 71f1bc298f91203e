"""Tells how the dimensions of a value run over the axes of the array that the value comes from.

A dimension is a product of `Factor`s, major first. An operation that moves dimensions (`MOVES`) deals the factors out
anew. A reshape that straddles two factors mixes them, and a slice leaves a part of a factor; both results are factors
without a stride. `exact` tells whether all factors have one, so that a caller may refuse the others.

    whole((4, 6))                        # ((Factor((0,), 4, 1),), (Factor((1,), 6, 1),))
    reshaped(whole((4, 6)), (2, 12))     # ((Factor((0,), 2, 2),), (Factor((0,), 2, 1), Factor((1,), 6, 1)))
    exact(reshaped(whole((4, 6)), (6, 4)).dims)   # False: mixed
"""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from sparsejax.programs import jaxprs


class Factor(NamedTuple):
  """A `Factor` of a dimension is `size` indices over the axes `axes`, `stride` apart.

  `axes` is empty for a broadcast, and has several axes after a reshape that mixed them. `stride` is `None` for a
  broadcast, after a slice or padding, and for mixed axes.
  """

  axes: tuple[int, ...]
  size: int
  stride: int | None = None


Dims = tuple[tuple[Factor, ...], ...]


class Moved(NamedTuple):
  """`Moved` holds the dimensions after a move, and the axes of which the move picked one index."""

  dims: Dims
  gone: frozenset[int] = frozenset()


def whole(shape: Sequence[int]) -> Dims:
  """Returns the dimensions of an array itself: each runs over its own axis."""
  return tuple((Factor((axis,), n, 1),) for axis, n in enumerate(shape))


def shape_of(dims: Dims) -> tuple[int, ...]:
  """Returns the length of each dimension."""
  return tuple(math.prod(factor.size for factor in dim) for dim in dims)


def over(factors: Iterable[Factor]) -> tuple[int, ...]:
  """Returns the axes that the factors of a dimension run over."""
  return tuple(dict.fromkeys(axis for factor in factors for axis in factor.axes))


def exact(dims: Dims) -> bool:
  """Returns whether every factor is evenly spaced over one axis, so that the dimensions are a rearrangement."""
  return all(len(factor.axes) == 1 and factor.stride is not None for dim in dims for factor in dim)


def arranged(array: Any, dims: Dims, lead: Sequence[int] = ()) -> Any:
  """Returns the array of shape `(*lead, *shape_of(dims))`, given with the factors of `dims` in another order.

  After the axes of length `lead`, the given array has the factors in the order of their axes, major first. `dims` must
  be `exact`.
  """
  order, parts = _in_order(dims)
  split = array.reshape(*lead, *(factor.size for factor in order))
  split = split.transpose(*range(len(lead)), *(len(lead) + order.index(factor) for factor in parts))
  return split.reshape(*lead, *shape_of(dims))


def restored(array: Any, dims: Dims) -> Any:
  """Returns the array whose `arranged` form is the given one, with the axes of `dims` in their order."""
  order, parts = _in_order(dims)
  split = array.reshape([factor.size for factor in parts]).transpose([parts.index(factor) for factor in order])
  return split.reshape([math.prod(f.size for f in order if f.axes == axes) for axes in dict.fromkeys(
      factor.axes for factor in order)])


def _in_order(dims: Dims) -> tuple[list[Factor], list[Factor]]:
  """Returns the factors in the order of their axes, major first, and in the order of the dimensions."""
  parts: list[Any] = [factor for dim in dims for factor in dim]
  return sorted(parts, key=lambda factor: (factor.axes, -factor.stride)), parts


def resized(dims: Dims, shape: Sequence[int]) -> Moved | None:
  """Returns the dimensions after a slice, padding or sharding, or `None` if the rank changes.

  A dimension whose length changes runs over the same axes, without a stride.
  """
  if len(shape) != len(dims):
    return None
  return Moved(tuple(dim if n == old else (Factor(over(dim), n),) for dim, n, old in zip(dims, shape, shape_of(dims))))


def dropped(dims: Dims, positions: Sequence[int]) -> Moved:
  """Returns the dimensions without those at `positions`, of each of which one index is picked."""
  gone = frozenset(axis for i in positions for axis in over(dims[i]))
  return Moved(tuple(dim for i, dim in enumerate(dims) if i not in positions), gone)


def broadcast(dims: Dims, positions: Sequence[int], shape: Sequence[int]) -> Moved:
  """Returns the dimensions put at `positions` of `shape`; new and stretched dimensions run over no axis."""
  stretched = [i for i, n in enumerate(shape_of(dims)) if n != shape[positions[i]]]
  kept = {position: dims[i] for i, position in enumerate(positions) if i not in stretched}
  placed = tuple(kept.get(j, (Factor((), n),) if n != 1 else ()) for j, n in enumerate(shape))
  return Moved(placed, dropped(dims, stretched).gone)


def reshaped(dims: Dims, shape: Sequence[int]) -> Moved | None:
  """Returns the factors dealt out to the new dimensions, major first; neighbours that straddle are mixed.

  Returns `None` if a length is 0.
  """
  if 0 in shape:
    return None
  queue, gone, new = [factor for dim in dims for factor in dim], [], []
  for n in shape:
    while n != 1 and queue[0].size == 1:
      gone.append(queue.pop(0))
    new.append(_dealt(queue, n))
  return Moved(tuple(new), frozenset(over(gone + queue)))


def _dealt(queue: list[Factor], n: int) -> tuple[Factor, ...]:
  """Takes factors with the product `n` from the head of the queue."""
  if n == 1:
    return (queue.pop(0),) if queue and queue[0].size == 1 else ()
  dealt = []
  while n > 1:
    head = queue.pop(0)
    while n % head.size and head.size % n:
      following = queue.pop(0)
      head = Factor(over((head, following)), head.size * following.size)
    minor = head.size // min(n, head.size)
    dealt.append(Factor(head.axes, head.size // minor, head.stride and head.stride * minor))
    if minor > 1:
      queue.insert(0, head._replace(size=minor))
    n //= head.size // minor
  return tuple(dealt)


def _reshape(dims: Dims, eqn: Any, shape: Sequence[int]) -> Moved | None:
  order = jaxprs.dimensions(eqn) or range(len(dims))  # Some batching rules transpose and reshape at once.
  return reshaped(tuple(dims[i] for i in order), shape)


# Maps each primitive that moves dimensions to its rule: (dimensions, equation, new shape) -> `Moved`, or `None`.
Move = Callable[[Dims, Any, Sequence[int]], Moved | None]
MOVES: dict[str, Move] = {
  'broadcast_in_dim': lambda dims, eqn, shape: broadcast(dims, jaxprs.dimensions(eqn), shape),
  'reshape': _reshape,
  'squeeze': lambda dims, eqn, shape: dropped(dims, jaxprs.dimensions(eqn)),
  'transpose': lambda dims, eqn, shape: Moved(tuple(dims[i] for i in jaxprs.dimensions(eqn))),
}
