"""Says what operations that move, cut and join dimensions do to dimensions and zeros."""

from collections.abc import Sequence
from typing import Any

from sparsejax.programs import factors, jaxprs, sizes
from sparsejax.programs.follow import Position
from sparsejax.structured.dimensions import Dim, length
from sparsejax.structured.elementwise import elementwise
from sparsejax.structured.reading import Reading, Rule, Symbolic

Facts = list[Symbolic]


def _shape(eqn: Any, i: int = 0) -> tuple[int, ...]:
  return eqn.outvars[i].aval.shape


def _moved(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Deals the factors out anew, as `programs.factors` does; a factor that is split is split in all values."""
  fact = facts[0]
  dims = tuple(map(reading.variables.resolved, fact.dims))
  moved = factors.MOVES[eqn.primitive.name](dims, eqn, _shape(eqn))
  if moved is None:
    return reading.unknown(eqn, facts, here, 'it has a length of 0')
  new: list[Dim] = []
  settled = tuple(_settled(reading, eqn, dim, (here.address, j), new) for j, dim in enumerate(moved.dims))
  for variable, pieces in _pieces(reading, moved.dims, here):
    reading.variables.unify(variable, pieces, ('', eqn))
  return [reading.wider(fact, tuple(map(reading.variables.resolved, settled)), new)]


def _settled(reading: Reading, eqn: Any, dim: Dim, name: Any, new: list[Dim]) -> Dim:
  """Returns a dimension of whole variables for one of parts; a broadcast is appended to `new`."""
  found: Dim = ()
  for k, factor in enumerate(dim):
    if len(factor.axes) == 1 and factor.size == reading.variables.sizes[factor.axes[0]]:
      found += (factor,)
    elif len(factor.axes) == 1 and factor.stride:
      found += _piece(reading, factor, name[0])
    else:
      fresh = reading.variables.named((name, 'new', k), factor.size)
      if factor.axes:
        why = ('it is reshaped across other factors', eqn)
        reading.variables.pin(fresh + tuple(
            factors.Factor((v,), reading.variables.sizes[v], 1) for v in factor.axes), why)
      new.append(fresh)
      found += fresh
  return found


def _piece(reading: Reading, factor: factors.Factor, address: Any) -> Dim:
  return reading.variables.named((address, 'piece', factor), factor.size)


def _pieces(reading: Reading, dims: Sequence[Dim], here: Position) -> list[tuple[Dim, Dim]]:
  """Returns each variable that a reshape splits, with its pieces, major first."""
  found: list[tuple[Dim, Dim]] = []
  part: Dim = ()
  for factor in (factor for dim in dims for factor in dim):
    if len(factor.axes) == 1 and factor.stride and factor.size != reading.variables.sizes[factor.axes[0]]:
      part += _piece(reading, factor, here.address)
      if length(part) == reading.variables.sizes[factor.axes[0]]:
        found.append(((factors.Factor(factor.axes, length(part), 1),), part))
        part = ()
  return found


def _slice(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  dims = [_sliced(reading, eqn, dim, indices, v, (here.address, j)) for j, (dim, indices, v) in enumerate(
      zip(facts[0].dims, sizes.slices(eqn), eqn.invars[0].aval.shape))]
  return [reading.wider(facts[0], dims)]


def _sliced(reading: Reading, eqn: Any, dim: Dim, indices: range, n: int, name: Any) -> Dim:
  """Returns the dimension of a slice: a segment, or the major factor if every `step`-th index is taken."""
  variables, step = reading.variables, indices.step
  if len(indices) == n:
    return dim
  if step == 1 and len(indices):
    parts = variables.cut(dim, (indices.start, indices.stop))
    if parts is not None:
      return parts[int(indices.start > 0)]
  elif n % step == 0 and indices.start < step and len(indices) == n // step:
    high, low = variables.named((name, 'high'), n // step), variables.named((name, 'low'), step)
    variables.unify(dim, high + low, ('', eqn))
    variables.pin(low, ('one of its indices is picked', eqn))
    return high
  variables.pin(dim, ('a slice takes a part of it', eqn))
  return reading.fresh(name, (len(indices),), ('a slice takes a part of it', eqn)).dims[0]


def _split(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  axis, lengths = sizes.split_sizes(eqn)
  fact = facts[0]
  ends = [sum(lengths[:i + 1]) for i in range(len(lengths))]
  parts = reading.variables.cut(fact.dims[axis], ends)
  if parts is None or 0 in lengths:
    why = ('it is split inside of a factor', eqn)
    reading.variables.pin(fact.dims[axis], why)
    parts = [reading.pinned_dim((here.address, i), n, why) for i, n in enumerate(lengths)]
  return [reading.wider(fact, (*fact.dims[:axis], part, *fact.dims[axis + 1:]), []) for part in parts]


def _concatenate(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Unifies the other dimensions; the joined one is the sum of the segments."""
  axis, shape = jaxprs.dimensions(eqn), _shape(eqn)
  joined = reading.variables.named((here.address, 'joined'), shape[axis])
  parts = [fact.dims[axis] for fact, v in zip(facts, eqn.invars) if v.aval.shape[axis]]
  if len(parts) == 1:
    joined = parts[0]
  else:
    reading.variables.join(joined, parts, ('', eqn))
  others = [reading.alike(eqn, [fact.dims[j] for fact in facts]) for j in range(len(shape)) if j != axis]
  return [reading.together(facts, (*others[:axis], reading.variables.resolved(joined), *others[axis:]))]


def _stack(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  axis, why = jaxprs.dimensions(eqn), ('arrays are stacked along it', eqn)
  stacked = reading.pinned_dim((here.address, 'stacked'), len(facts), why)
  others = [reading.alike(eqn, [fact.dims[j] for fact in facts]) for j in range(len(_shape(eqn)) - 1)]
  return [reading.together(facts, (*others[:axis], stacked, *others[axis:]), [stacked])]


def _unstack(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, axis = facts[0], jaxprs.dimensions(eqn)
  reading.variables.pin(fact.dims[axis], ('one of its indices is picked', eqn))
  return [reading.wider(fact, (*fact.dims[:axis], *fact.dims[axis + 1:])) for _ in eqn.outvars]


def _pad(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, why = facts[0], ('it is padded', eqn)
  dims: list[Dim] = []
  for j, (dim, (low, high, inside), n) in enumerate(zip(fact.dims, sizes.padding(eqn), _shape(eqn))):
    if (low, high, inside) == (0, 0, 0):
      dims.append(dim)
    elif inside or low < 0 or high < 0:
      reading.variables.pin(dim, why)
      dims.append(reading.pinned_dim((here.address, j), n, why))
    else:
      parts = [reading.pinned_dim((here.address, (j, 'low')), low, why)] * bool(low) + [dim]
      parts += [reading.pinned_dim((here.address, (j, 'high')), high, why)] * bool(high)
      joined = reading.variables.named((here.address, 'padded', j), n)
      reading.variables.join(joined, parts, why)
      dims.append(reading.variables.resolved(joined))
  return [reading.together((Symbolic(fact.dims, fact.live), facts[1]), dims)]


def _tile(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  new = [reading.variables.named((here.address, j), n) for j, n in enumerate(sizes.repeats(eqn))]
  return [reading.wider(facts[0], [a + b for a, b in zip(new, facts[0].dims)], new)]


def _rev(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  for axis in sizes.along(eqn):
    reading.variables.pin(facts[0].dims[axis], ('it is reversed', eqn))
  return [facts[0]]


def _iota(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  return [reading.fresh(here.address, _shape(eqn))]


def _barrier(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  return facts


def _bitcast(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Reads a cast of bits to a dtype of the same width; a cast to another width changes the shape."""
  alike = eqn.invars[0].aval.shape == _shape(eqn)
  return elementwise(reading, eqn, facts, here) if alike else reading.unknown(eqn, facts, here)


MOVING: dict[str, Rule] = {
  **dict.fromkeys(factors.MOVES, _moved), 'slice': _slice, 'split': _split, 'concatenate': _concatenate,
  'stack': _stack, 'unstack': _unstack, 'pad': _pad, 'tile': _tile, 'rev': _rev, 'iota': _iota,
  'optimization_barrier': _barrier, 'bitcast_convert_type': _bitcast}
