"""Arranges the operands of two products of attention as `[batch, T, heads, d]`, and the result as the program wants it.

The axes of the scores have four roles. A *key* axis is summed over by the softmax. A *query* axis numbers the queries.
The other free axis of the queries numbers the heads that share a head of keys. Of the axes that both operands have, the
last numbers heads, and the others number examples.
"""

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.attention.pending import Pair, Pending
from sparsejax.programs import factors, jaxprs
from sparsejax.programs.factors import Dims, Factor
from sparsejax.types import Array


@dataclasses.dataclass(frozen=True)
class AttentionLayout:
  """An `AttentionLayout` holds the axes of the scores by role, and which operand of their product has the keys."""

  pair: Pair
  side: int
  examples: tuple[int, ...]
  heads: tuple[int, ...]
  shared: tuple[int, ...]
  query: tuple[int, ...]
  keys: tuple[int, ...]

  def length(self, axes: tuple[int, ...]) -> int:
    return math.prod(self.pair.shape[a] for a in axes)

  def operand(self, side: int) -> Array:
    """Returns the queries or the keys as `[examples, T, heads, d]`; `heads` of keys are those of `heads` alone."""
    x, number, pair = self.pair.operands[side], self.pair.numbers[side], self.pair
    place = dict(enumerate(number.batch)) | dict(zip(pair.axes(side), pair.free(side)))
    time, heads = (self.keys, self.heads) if side == self.side else (self.query, (*self.heads, *self.shared))
    order = [place[a] for a in (*self.examples, *time, *heads)]
    single = [i for i in range(x.ndim) if i not in (*order, *number.contracted)]
    x = x.transpose(*single, *order, *number.contracted)
    return x.reshape(self.length(self.examples), self.length(time), self.length(heads), -1)

  def values(self, v: Array, dims: Dims) -> Array:
    """Returns the values as `[examples, Tk, heads, d]`; `dims` are those of `v` over the axes of the scores."""
    full = factors.restored(v, dims)
    present = sorted({f.axes[0] for dim in dims for f in dim})
    order = [a for a in (*self.examples, *self.keys, *self.heads) if a in present]
    free = [a for a in present if a >= len(self.pair.shape)]
    y = full.transpose([present.index(a) for a in (*order, *free)])
    heads = self.length(tuple(a for a in self.heads if a in present))
    y = y.reshape(-1, self.length(self.keys), heads, math.prod(y.shape[len(order):]))
    return jnp.broadcast_to(y, (y.shape[0], y.shape[1], self.length(self.heads), y.shape[3]))

  def edit(self, array: Any, dims: Dims) -> Any:
    """Returns the array of an edit as `[examples, heads, Tq, Tk]`, with length 1 where it repeats."""
    if array.ndim == 0:
      return array.reshape(1, 1, 1, 1)
    used = tuple(dim if n != 1 else () for dim, n in zip(dims, array.shape))
    full = factors.restored(array, used)
    present = sorted({f.axes[0] for dim in used for f in dim})
    groups = [self.examples, (*self.heads, *self.shared), self.query, self.keys]
    full = full.transpose([present.index(a) for group in groups for a in group if a in present])
    split = full.reshape([self.pair.shape[a] if a in present else 1 for group in groups for a in group])
    wide = [self.pair.shape[a] if any(b in present for b in group) else 1 for group in groups for a in group]
    split = split if list(split.shape) == wide else _stretched(split, wide)
    lengths = [[self.pair.shape[a] for a in group if any(b in present for b in group)] for group in groups]
    return split.reshape([math.prod(length) for length in lengths])

  def result(self, y: Array, dims: Dims, free: tuple[int, ...]) -> Array:
    """Returns `y [examples, Tq, heads, dv]` with the dimensions that the program wants.

    `free` are the lengths of the free dimensions of the values, whose axes come after those of the scores.
    """
    axes = [*self.examples, *self.query, *self.heads, *self.shared]
    last = range(len(self.pair.shape), len(self.pair.shape) + len(free))
    y = y.reshape([self.pair.shape[a] for a in axes] + list(free))
    order = sorted(range(len(axes) + len(free)), key=[*axes, *last].__getitem__)
    return factors.arranged(y.transpose(order), dims)


def layout(weights: Pending) -> AttentionLayout | str:
  """Returns the roles of the axes of the scores, or why they cannot be told."""
  pair, shape = weights.pair, weights.pair.shape
  side = keys_of(weights)
  real = lambda axes: tuple(a for a in axes if shape[a] != 1)
  keys, batch = real(pair.axes(side)), real(range(len(pair.numbers[0].batch)))
  if weights.along != set(keys):
    return 'the softmax runs over a part of the keys only'
  free = pair.axes(1 - side)
  position = _position(pair, side, [shape[a] for a in free], math.prod(shape[a] for a in keys))
  if position is None:
    return f'which of the query axes of lengths {[shape[a] for a in free]} is the position cannot be told'
  query = real(free[position:position + 1])
  return AttentionLayout(pair, side, batch[:-1], batch[-1:], real(a for a in free if a not in query), query, keys)


def keys_of(weights: Pending) -> int:
  """Returns which operand of the product of queries and keys has the keys: the softmax runs over its free axes."""
  return next(side for side in (0, 1) if weights.along <= set(weights.pair.axes(side)))


def _position(pair: Pair, side: int, lengths: list[int], keys: int) -> int | None:
  """Returns which free axis of the queries has the positions.

  The position is the only axis, or the only one as long as the keys. Otherwise, heads that share a head of keys come
  right after the axis of that head, and the other axis is the position.
  """
  same = [i for i, n in enumerate(lengths) if n == keys]
  if len(lengths) < 2 or len(same) == 1 and keys > 1:
    return same[0] if same else 0
  batch = pair.numbers[1 - side].batch
  others = [i for i, d in enumerate(pair.free(1 - side)) if batch and d != batch[-1] + 1]
  return others[0] if len(others) == 1 else None


def _stretched(array: Any, shape: list[int]) -> Any:
  return (np if isinstance(array, np.ndarray) else jnp).broadcast_to(array, shape)


def value_dims(weights: Pending, eqn: Any, side: int, found: AttentionLayout) -> tuple[Dims, Dims] | str:
  """Returns the dimensions of the values and of the result over the axes of the scores, or why they do not fit.

  `side` is the operand that the weights are. Free dimensions of the values get axes of their own after the scores'.
  """
  mine, theirs = jaxprs.dot_numbers(eqn)[side], jaxprs.dot_numbers(eqn)[1 - side]
  shape = eqn.invars[1 - side].aval.shape
  over = lambda positions: set(factors.over(f for i in positions for f in weights.dims[i]))
  if over(mine.contracted) != set(found.keys):
    return 'the product with the values is not over all keys, or over more'
  if not over(mine.batch) <= {*found.examples, *found.heads}:
    return 'the values have other heads than the keys'
  if over(mine.batch).isdisjoint(found.examples) and found.examples:
    return 'the values are the same for all examples'
  free = [i for i in range(len(shape)) if i not in (*theirs.contracted, *theirs.batch)]
  new: dict[int, Any] = {i: (Factor((len(found.pair.shape) + k,), shape[i], 1),) if shape[i] != 1 else ()
                         for k, i in enumerate(free)}
  paired = dict(zip((*theirs.contracted, *theirs.batch), (*mine.contracted, *mine.batch)))
  of_values = tuple(new[i] if i in new else weights.dims[paired[i]] for i in range(len(shape)))
  left = [weights.dims[i] for i in range(len(weights.dims)) if i not in (*mine.contracted, *mine.batch)]
  sides = [left, list(new.values())]
  ends = sides if side == 0 else sides[::-1]
  return of_values, tuple([weights.dims[i] for i in mine.batch] + ends[0] + ends[1])
