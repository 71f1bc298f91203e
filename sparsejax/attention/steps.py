"""Reads the operations between the two products of attention: how each changes a `Pending`, and how masks combine.

A step takes the equation, its values, the number of the operand that is pending, and a function that computes the
result densely. A step returns the new stand-in, or `None` where the operation is none of attention.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax.attention.edits import HIDDEN
from sparsejax.attention.pending import Edited, Known, Masks, Pending, as_array, constant
from sparsejax.programs import factors, jaxprs
from sparsejax.programs.again import ENTRYWISE

Step = Callable[[Any, list[Any], int, Callable[[], Any]], Pending | None]
ROWS = ('largest', 'total', 'inverse')  # stages with one number for each query


def _moved(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  was = values[i]
  moved = factors.MOVES[eqn.primitive.name](was.dims, eqn, eqn.outvars[0].aval.shape)
  if moved is None or was.stage not in ROWS and not factors.exact(moved.dims):
    return None
  return was.to(compute, dims=moved.dims)


def _passed(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  return values[i].to(compute)


def _stopped(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  """Passes the maximum of a row: of a softmax, the maximum has no derivative. Other stages would lose theirs."""
  return values[i].to(compute) if values[i].stage == 'largest' else None


def _edit(was: Pending, compute: Any, kind: str, array: Any = None) -> Pending:
  return was.to(compute, edits=(*was.edits, Edited(kind, array, was.dims)))


def _scaled(was: Pending, compute: Any, value: Any, by: Callable[[float, float], float]) -> Pending | None:
  """Changes the scale of scores that have no edit but masks yet, if the number is known."""
  known = constant(value)
  early = all(edit.kind == 'mask' for edit in was.edits)
  return was.to(compute, scale=by(was.scale, known)) if known is not None and early else None


def _multiplied(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  was, other = values[i], values[1 - i]
  if isinstance(other, Pending):
    exps, rows = sorted((was, other), key=lambda value: value.stage == 'inverse')
    return _normalised(exps, rows, 'inverse', compute)
  if was.stage == 'scores':
    return _scaled(was, compute, other, lambda a, b: a * b) or _edit(was, compute, 'multiply', other)
  return _edit(was, compute, 'weigh', other) if was.stage == 'weights' else None


def _divided(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  was, other = values[0], values[1]
  if isinstance(was, Pending) and isinstance(other, Pending):
    return _normalised(was, other, 'total', compute)
  if i == 1:
    return other.to(compute, stage='inverse') if other.stage == 'total' and constant(was) == 1 else None
  if was.stage == 'scores':
    return _scaled(was, compute, other, lambda a, b: a / b) or _edit(was, compute, 'divide', other)
  return _edit(was, compute, 'weigh', 1.0 / as_array(other)) if was.stage == 'weights' else None


def _normalised(exps: Pending, rows: Pending, stage: str, compute: Any) -> Pending | None:
  """Returns the weights, if the exponentials are divided by their own sum along the same keys."""
  same = exps.stage == 'exps' and rows.stage == stage and exps.pair is rows.pair and exps.edits == rows.edits
  return exps.to(compute, stage='weights', along=rows.along) if same and _along_rows(exps, rows) else None


def _along_rows(scores: Pending, rows: Pending) -> bool:
  """Returns whether each number of `rows` meets the scores of its own query."""
  mine = [[f for f in dim if f.axes] for dim in rows.dims]
  return len(mine) == len(scores.dims) and all(
      list(dim) == row or (not row and set(factors.over(dim)) <= rows.along) for dim, row in zip(scores.dims, mine))


def _added(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  was, other = values[i], values[1 - i]
  bias = other if isinstance(other, Known) else as_array(other)
  return _edit(was, compute, 'add', bias) if was.stage == 'scores' else None


def _subtracted(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  """Reads the scores minus the largest of their row, and a bias that is subtracted."""
  was, other = values
  if i == 1 and not isinstance(was, Pending):
    return None
  if isinstance(other, Pending) and other.stage == 'largest':
    fits = was.stage == 'scores' and was.pair is other.pair and _along_rows(was, other)
    return was.to(compute, stage='shifted') if fits else None
  return _edit(was, compute, 'add', -as_array(other)) if was.stage == 'scores' else None


def _negated(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  was = values[i]
  return was.to(compute, scale=-was.scale) if was.stage == 'scores' and not was.edits else None


def _squashed(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  return _edit(values[i], compute, 'tanh') if values[i].stage == 'scores' else None


def _exponential(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  was = values[i]
  return was.to(compute, stage='exps') if was.stage in ('scores', 'shifted') else None


def _bounded(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  """Passes the maximum of -inf and the largest score, which a softmax subtracts."""
  return values[i].to(compute) if values[i].stage == 'largest' else None


def _inverted(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  was = values[i]
  return was.to(compute, stage='inverse') if was.stage == 'total' and dict(jaxprs.options(eqn)).get('y') == -1 else None


def _reduced(stage: str, becomes: str) -> Step:
  def step(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
    """Reads a reduction of whole axes of the scores, all of them free axes of one operand."""
    was, dimensions = values[i], [int(a) for a in dict(jaxprs.options(eqn))['axes']]
    along = frozenset(factors.over(f for d in dimensions for f in was.dims[d]))
    left = factors.over(f for d, dim in enumerate(was.dims) if d not in dimensions for f in dim)
    sides = [{a for a in was.pair.axes(side) if was.pair.shape[a] != 1} for side in (0, 1)]
    if was.stage != stage or along & set(left) or not along or not any(along <= side for side in sides):
      return None
    return was.to(compute, stage=becomes, along=along, dims=factors.dropped(was.dims, dimensions).dims)
  return step


def _selected(eqn: Any, values: list[Any], i: int, compute: Any) -> Pending | None:
  """Reads a mask that hides scores, or sets weights to zero."""
  if len(values) != 3 or i == 0 or isinstance(values[3 - i], Pending):
    return None
  was, fill, seen = values[i], constant(values[3 - i]), values[0] if i == 2 else inverted(values[0])
  if fill is None:
    return None
  if was.stage in ('scores', 'shifted') and fill <= HIDDEN or was.stage == 'exps' and fill == 0:
    return _edit(was, compute, 'mask', seen)
  return _edit(was, compute, 'weigh', as_array(seen)) if was.stage == 'weights' and fill == 0 else None


def inverted(mask: Any) -> Any:
  """Returns the mask that is `True` where the given mask is `False`."""
  if isinstance(mask, Known):
    return Known(lambda: jnp.logical_not(mask.dense()))
  return jnp.logical_not(as_array(mask))


# Maps each operation between the two products to its step.
STEPS: dict[str, Step] = {
  **dict.fromkeys(factors.MOVES, _moved), **dict.fromkeys(('convert_element_type', 'copy', 'copy_p', 'name'), _passed),
  'stop_gradient': _stopped, 'mul': _multiplied, 'div': _divided, 'add': _added, 'sub': _subtracted, 'neg': _negated,
  'tanh': _squashed, 'exp': _exponential, 'max': _bounded, 'integer_pow': _inverted, 'select_n': _selected,
  'reduce_max': _reduced('scores', 'largest'), 'reduce_sum': _reduced('exps', 'total')}


# Masks.

_KNOWN = ENTRYWISE | {*factors.MOVES, 'iota', 'rem', 'slice'}


def known(eqn: Any, values: list[Any], bind: Callable[[list[Any]], list[Any]]) -> Known | None:
  """Returns the stand-in of an operation on constants, if its result may be a mask or a number."""
  if eqn.primitive.name not in _KNOWN or any(isinstance(v, (jax.core.Tracer, Masks, Pending)) for v in values):
    return None
  result = eqn.outvars[0].aval
  of_known = all(isinstance(v, Known) or not getattr(v, 'ndim', 0) for v in values)
  if result.ndim and jnp.issubdtype(result.dtype, jnp.inexact) and not of_known:
    return None
  return Known(lambda: bind([as_array(v) for v in values])[0])


def mask(eqn: Any, values: list[Any]) -> Masks | None:
  """Returns the stand-in of a mask after a conjunction, a cast, a broadcast, or another move around lengths of 1."""
  first, shape = values[0] if values else None, eqn.outvars[0].aval.shape if eqn.outvars else ()
  rule = _MASKS.get(eqn.primitive.name)
  if rule is None or not values or not shape or getattr(eqn.invars[0].aval, 'shape', ()) == ():
    return None
  if not isinstance(first, Masks) and (eqn.outvars[0].aval.dtype != bool or eqn.primitive.name not in _BEGIN):
    return None
  shapes = jaxprs.shapes(eqn.invars)
  masks = [v if isinstance(v, Masks) else Masks((_constant(v),), own or ()) for v, own in zip(values, shapes)]
  return rule(eqn, values, masks, shape)


def _both(eqn: Any, values: list[Any], masks: list[Masks], shape: tuple[int, ...]) -> Masks | None:
  known = any(isinstance(v, (Masks, Known)) for v in values)
  plain = known and not all(isinstance(v, Known) for v in values) and eqn.outvars[0].aval.dtype == bool
  return Masks(tuple(part for m in masks for part in m.parts), shape) if plain else None


def _stretched(eqn: Any, values: list[Any], masks: list[Masks], shape: tuple[int, ...]) -> Masks:
  return _spread(masks[0], [int(d) for d in jaxprs.dimensions(eqn)], shape)


def _transposed(eqn: Any, values: list[Any], masks: list[Masks], shape: tuple[int, ...]) -> Masks:
  order = [int(d) for d in jaxprs.dimensions(eqn)]
  parts = tuple(_part(p, masks[0].shape, lambda a: a.transpose(order)) for p in masks[0].parts)
  return dataclasses.replace(masks[0], parts=parts, shape=shape)


def _reshaped(eqn: Any, values: list[Any], masks: list[Masks], shape: tuple[int, ...]) -> Masks | None:
  """Reads a reshape that adds or drops lengths of 1 only."""
  was, kept = masks[0], [i for i, n in enumerate(shape) if n > 1]
  if [shape[i] for i in kept] != [n for n in was.shape if n > 1]:
    return None
  single = tuple(i for i, n in enumerate(was.shape) if n == 1)
  parts = tuple(_part(p, was.shape, lambda a: a.squeeze(single)) for p in was.parts)
  return _spread(dataclasses.replace(was, parts=parts, shape=tuple(shape[i] for i in kept)), kept, shape)


def _cast(eqn: Any, values: list[Any], masks: list[Masks], shape: tuple[int, ...]) -> Masks:
  return dataclasses.replace(masks[0], dtype=eqn.outvars[0].aval.dtype)


def _nonzero(eqn: Any, values: list[Any], masks: list[Masks], shape: tuple[int, ...]) -> Masks | None:
  return dataclasses.replace(masks[0], dtype=bool) if constant(values[1]) == 0 else None


_MASKS: dict[str, Callable[..., Masks | None]] = {
  'and': _both, 'broadcast_in_dim': _stretched, 'transpose': _transposed, 'reshape': _reshaped, 'squeeze': _reshaped,
  'convert_element_type': _cast, 'ne': _nonzero, 'gt': _nonzero}
_BEGIN = ('and', 'broadcast_in_dim')  # operations whose result becomes a stand-in if no operand is one


def _constant(value: Any) -> Any:
  """Returns the stand-in of an array that is known at trace time, and any other value as it is."""
  return value if isinstance(value, (jax.core.Tracer, Known)) else Known(lambda: value)


def _spread(was: Masks, positions: list[int], shape: tuple[int, ...]) -> Masks:
  """Returns the masks at these positions of a longer shape. The parts keep their length of 1 where they repeat."""
  placed = lambda a: a.reshape([a.shape[positions.index(i)] if i in positions else 1 for i in range(len(shape))])
  return dataclasses.replace(was, parts=tuple(_part(p, was.shape, placed) for p in was.parts), shape=shape)


def _part(part: Any, shape: tuple[int, ...], change: Callable[[Any], Any]) -> Any:
  """Returns a part after a change of its dimensions; the part has the rank of `shape` already, or no dimension."""
  ranked = lambda a: change(a if a.ndim == len(shape) else a.reshape([1] * (len(shape) - a.ndim) + list(a.shape)))
  return Known(lambda: ranked(part.dense())) if isinstance(part, Known) else ranked(part)
