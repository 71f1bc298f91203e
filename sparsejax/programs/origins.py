"""Follows a program to tell which dimensions of each value run over the examples and positions of the inputs.

An `Origin` relates a value to the axes of an array such as `valid`, `bool[batch, position]`. The origin of a result
follows from those of the operands. An operation that mixes or moves positions ends the origin, with its name as the
reason. A sum over positions, as in attention, drops the axis: the result belongs to the positions that are left.

    found = origins(program, valid.shape)[address]              # of both operands of a product, and of its result
    entries(found[0], valid)                                    # which entries of an operand count, or None
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax.programs import factors, jaxprs, sizes
from sparsejax.programs.factors import Dims, Factor
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.tracing import Program
from sparsejax.types import Array


class Origin(NamedTuple):
  """An `Origin` says how the dimensions of a value run over the axes of the inputs that positions are numbered by.

  `dims`: the dimensions over those axes, or `None` for a value that does not depend on the position. `lost`: why the
  positions of a value are not known, or an empty string.
  """

  dims: Dims | None = None
  lost: str = ''


NOWHERE = Origin()


def origins(program: Program, shape: Sequence[int], function: str = 'prune') -> dict[jaxprs.Address, list[Origin]]:
  """Returns the origins of the first two operands and of the result of each product, by address.

  The inputs whose shapes begin with `shape` have the axes in front. Raises `ValueError`, in the name of `function`, if
  no input has.
  """
  notes: dict[jaxprs.Address, list[Origin]] = {}
  facts = [_input(argument, v.aval.shape, tuple(shape))
           for argument, v in zip(program.arguments, jaxprs.opened(program).invars)]
  if not any(fact.dims for fact in facts):
    raise ValueError(f'{function}: no input of the program has a shape that begins with {tuple(shape)}, the shape of '
                     '`valid`. Give one bool array a batch, of the shape [batch] or [batch, position] of the inputs.')
  follow(program, facts, RULES, notes)
  return notes


def _input(argument: int, shape: tuple[int, ...], axes: tuple[int, ...]) -> Origin:
  if argument == 0 or shape[:len(axes)] != axes:  # the first argument holds the parameters
    return NOWHERE
  return Origin((*factors.whole(axes), *_nowhere(shape[len(axes):])))


def _nowhere(shape: Sequence[int]) -> Dims:
  return tuple((Factor((), n),) if n != 1 else () for n in shape)


def entries(origin: Origin, valid: Array) -> Array | None:
  """Returns which entries of a value count, broadcastable to its shape, or `None` if all do.

  The result has length 1 along dimensions that run over no position. Where the
  value has no dimension over an axis, a row counts if any of its positions is valid. `origin` must not be lost.
  """
  if origin.dims is None:
    return None
  used = sorted({axis for dim in origin.dims for axis in factors.over(dim)})
  if not used:
    return None
  picked = jnp.any(valid, tuple(a for a in range(valid.ndim) if a not in used))
  flat = [f for dim in origin.dims for f in dim]
  mine = sorted((f for f in flat if f.axes), key=lambda f: (f.axes, -(f.stride or 1)))
  split = picked.reshape([f.size for f in mine]).transpose([mine.index(f) for f in flat if f.axes])
  whole = [bool(factors.over(dim)) for dim in origin.dims for _ in dim]
  split = split.reshape([f.size if f.axes else 1 for f in flat])
  split = jnp.broadcast_to(split, [f.size if f.axes or kept else 1 for f, kept in zip(flat, whole)])
  return split.reshape([math.prod(f.size for f in dim) if factors.over(dim) else 1 for dim in origin.dims])


def rows_of(origin: Origin, eqn: Any, operand: int) -> str:
  """Returns why the rows that a product takes from an operand cannot be told apart by position, or an empty string."""
  if origin.lost:
    return origin.lost
  roles = jaxprs.CONTRACTIONS[eqn.primitive.name](eqn).roles[operand]
  batch = jaxprs.convolution(eqn).lhs[0] if roles is None else None
  for i, dim in enumerate(origin.dims or ()):
    if factors.over(dim) and (i != batch if roles is None else roles[i] == 'contracted'):
      return f'{jaxprs.place(eqn)} sums over positions'
  return ''


# Rules for operations map (equation, origins of the operands) to the dimensions of each result, or to `None` where the
# positions are lost.


def _operation(eqn: Any, facts: list[Origin], here: Position) -> list[Origin]:
  results = _results(eqn, facts)
  if eqn.primitive.name in jaxprs.CONTRACTIONS:
    here.notes[here.address] = [*facts[:2], *results]
  return results


def _results(eqn: Any, facts: list[Origin]) -> list[Origin]:
  lost = next((fact for fact in facts if fact.lost), None)
  if lost is not None:
    return [lost] * len(eqn.outvars)
  if not any(factors.over(dim) for fact in facts for dim in fact.dims or ()):
    return [NOWHERE] * len(eqn.outvars)
  rule = _RULES.get(eqn.primitive.name, _like_the_result)
  results = [rule(eqn, facts, shape or ()) for shape in jaxprs.shapes(eqn.outvars)]
  return [Origin(None, f'{jaxprs.place(eqn)} mixes or moves positions') if dims is None or not _exact(dims) else
          Origin(dims) for dims in results]


def _exact(dims: Dims) -> bool:
  return all(len(f.axes) == 1 and f.stride is not None for dim in dims for f in dim if f.axes)


def _dims(fact: Origin, eqn: Any, i: int) -> Dims:
  return _nowhere(eqn.invars[i].aval.shape) if fact.dims is None else fact.dims


def _both(a: tuple[Factor, ...], b: tuple[Factor, ...]) -> tuple[Factor, ...] | None:
  """Returns the dimension of a value made of two values, entry by entry, or `None` if their positions differ."""
  if not factors.over(a):
    return b if factors.over(b) or not a else a
  return a if not factors.over(b) or a == b else None


def _like_the_result(eqn: Any, facts: Sequence[Origin], shape: Sequence[int]) -> Dims | None:
  """Joins operands entry by entry; an operand of another shape must have no positions along what differs."""
  joined: list[Any] = list(_nowhere(shape))
  for i, fact in enumerate(facts):
    dims = _dims(fact, eqn, i)
    if len(dims) != len(shape):
      if any(map(factors.over, dims)):
        return None
      continue
    for j, (dim, n) in enumerate(zip(dims, shape)):
      if factors.over(dim) and factors.shape_of((dim,))[0] != n:
        return None
      both = _both(joined[j], dim if factors.over(dim) else ())
      if both is None:
        return None
      joined[j] = both if factors.over(both) else joined[j]
  return tuple(joined)


def _moved(eqn: Any, facts: Sequence[Origin], shape: Sequence[int]) -> Dims | None:
  move = factors.MOVES[eqn.primitive.name](_dims(facts[0], eqn, 0), eqn, shape)
  return None if move is None else move.dims


def _reduced(eqn: Any, facts: Sequence[Origin], shape: Sequence[int]) -> Dims | None:
  dims = _dims(facts[0], eqn, 0)
  return tuple(dim for i, dim in enumerate(dims) if i not in sizes.along(eqn))


def _cut(eqn: Any, facts: Sequence[Origin], shape: Sequence[int]) -> Dims | None:
  """Keeps dimensions whose length stays; a single position may be picked, several may not."""
  dims, made = _dims(facts[0], eqn, 0), []
  if len(dims) != len(shape) or any(fact.dims and any(map(factors.over, fact.dims)) for fact in facts[1:]):
    return None
  for dim, old, n in zip(dims, factors.shape_of(dims), shape):
    if n != old and n != 1 and factors.over(dim):
      return None
    made.append(dim if n == old else _nowhere((n,))[0])
  return tuple(made)


def _concatenated(eqn: Any, facts: Sequence[Origin], shape: Sequence[int]) -> Dims | None:
  along, joined = jaxprs.dimensions(eqn), list(_nowhere(shape))
  for i, fact in enumerate(facts):
    for j, dim in enumerate(_dims(fact, eqn, i)):
      both = _both(joined[j], dim) if factors.over(dim) else joined[j]
      if both is None or (j == along and factors.over(dim)):
        return None
      joined[j] = both
  return tuple(joined)


def _gathered(eqn: Any, facts: Sequence[Origin], shape: Sequence[int]) -> Dims | None:
  """Gives the result of a look-up the positions of its indices, or of what whole slices are taken from."""
  numbers, source, index = jaxprs.gather_numbers(eqn), _dims(facts[0], eqn, 0), _dims(facts[1], eqn, 1)[:-1]
  picked = (*numbers.collapsed_slice_dims, *numbers.operand_batching_dims)
  kept = [dim for i, dim in enumerate(source) if i not in picked]
  if any(map(factors.over, index)) and any(map(factors.over, source)):
    return None
  places, rest = dict(zip(numbers.offset_dims, kept)), iter(index)
  made = tuple(places[j] if j in places else next(rest) for j in range(len(shape)))
  lengths = factors.shape_of(made)
  return made if all(n == old or not factors.over(d) for d, n, old in zip(made, shape, lengths)) else None


def _sorted(eqn: Any, facts: Sequence[Origin], shape: Sequence[int]) -> Dims | None:
  dims = _like_the_result(eqn, facts, shape)
  return None if dims is None or any(factors.over(dims[i]) for i in sizes.along(eqn)) else dims


def _contracted(eqn: Any, facts: Sequence[Origin], shape: Sequence[int]) -> Dims | None:
  left, right = _dims(facts[0], eqn, 0), _dims(facts[1], eqn, 1)
  if eqn.primitive.name == 'dot_general':
    a, b = jaxprs.dot_numbers(eqn)
    batch = [_both(left[i], right[j]) for i, j in zip(a.batch, b.batch)]
    free = [dims[i] for dims, own in ((left, a), (right, b)) for i in range(len(dims))
            if i not in own.batch + own.contracted]
    return None if None in batch else (*batch, *free)  # type: ignore[arg-type]
  if any(map(factors.over, right)):
    return None
  if eqn.primitive.name == 'ragged_dot_general':
    return (left[0], *_nowhere(shape[1:])) if len(shape) == 2 else None
  asked = jaxprs.convolution(eqn)
  if any(factors.over(dim) for i, dim in enumerate(left) if i != asked.lhs[0]):
    return None
  return tuple(left[asked.lhs[0]] if i == asked.out[0] else dim for i, dim in enumerate(_nowhere(shape)))


_RULES: dict[str, Callable[[Any, Sequence[Origin], Sequence[int]], Dims | None]] = {
  **dict.fromkeys(factors.MOVES, _moved), **dict.fromkeys(jaxprs.CONTRACTIONS, _contracted),
  **dict.fromkeys(('reduce_sum', 'reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or', 'argmax',
                   'argmin'), _reduced),
  **dict.fromkeys(('slice', 'dynamic_slice', 'split', 'pad', 'top_k'), _cut),
  **dict.fromkeys(('sort', 'rev'), _sorted), 'concatenate': _concatenated, 'gather': _gathered}


# Rules for structures.


def _joined(facts: list[Origin]) -> Origin:
  known = [fact for fact in facts if fact != NOWHERE]
  if all(fact == known[0] for fact in known):
    return known[0] if known else NOWHERE
  lost = next((fact.lost for fact in known if fact.lost), 'a loop or a branch gives a value other positions')
  return Origin(None, lost)


def _sliced(fact: Origin, loops: int) -> Origin:
  if fact.dims is None:
    return fact
  if factors.over(fact.dims[0]):
    return Origin(None, 'a loop runs over positions')
  return Origin(fact.dims[1:])


def _stacked(fact: Origin, stacks: list[Origin], length: int) -> Origin:
  return fact if fact.dims is None else Origin((*_nowhere((length,)), *fact.dims))


def _resized(fact: Origin, shape: Sequence[int]) -> Origin:
  same = fact.dims is None or factors.shape_of(fact.dims) == tuple(shape)
  return fact if same else Origin(None, 'a shard_map shows one shard of the positions')


def _merged(notes: dict[Any, Any], parts: list[dict[Any, Any]], eqn: Any, times: int | None) -> None:
  for part in parts:
    notes.update(part)


RULES = FactRules(_operation, _joined, NOWHERE, None, _sliced, _stacked, _resized, dict, _merged)
