"""Says what each operation does to dimensions and to zeros; the table `RULES` has the rule of each operation.

A rule maps the facts of the operands to the facts of the results. The rule tells the `Reading` which dimensions are
equal, which are pinned, and which sums need zeros. A rule of a user's own operation is one more line of the table.

    RULES['my_activation'] = elementwise
"""

from collections.abc import Sequence
from typing import Any

from sparsejax.programs import jaxprs, sizes
from sparsejax.programs.follow import Position
from sparsejax.structured.dimensions import Dim, length
from sparsejax.structured.elementwise import OPERATIONS, elementwise
from sparsejax.structured.moving import MOVING
from sparsejax.structured.picking import PICKING
from sparsejax.structured.reading import Reading, Rule, Symbolic

Facts = list[Symbolic]


def _shape(eqn: Any, i: int = 0) -> tuple[int, ...]:
  return eqn.outvars[i].aval.shape


# Reductions and orders.


def _summed(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, axes = facts[0], sizes.along(eqn)
  why = ('a sum runs over what is not zero where a unit is removed; of a variance, use mean(x^2) - mean(x)^2', eqn)
  reading.require([fact.dims[a] for a in axes], [fact], why)
  return [_without(reading, fact, axes)._replace(value=0 if fact.value == 0 else None)]


def _without(reading: Reading, fact: Symbolic, axes: Sequence[int]) -> Symbolic:
  return reading.wider(fact, [dim for j, dim in enumerate(fact.dims) if j not in axes])._replace(value=None)


def _reduced(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Pins what is reduced: a maximum, a minimum or a product counts removed units, whatever they hold."""
  results = []
  for fact in facts[:len(eqn.outvars)]:
    for axis in sizes.along(eqn):
      reading.variables.pin(fact.dims[axis], (f'{eqn.primitive.name} runs over it', eqn))
    results.append(_without(reading, fact, sizes.along(eqn)))
  return results


def _places(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Rules `argmax` and `argmin`, whose results are places."""
  return [Symbolic(fact.dims, reading.every(fact.dims)) for fact in _reduced(reading, eqn, facts, here)]


def _cumulative(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  reading.variables.pin(facts[0].dims[sizes.along(eqn)[0]], (f'{eqn.primitive.name} runs along it', eqn))
  zeros = eqn.primitive.name != 'cumlogsumexp'
  return [Symbolic(facts[0].dims, facts[0].live if zeros else reading.every(facts[0].dims))]


def _sort(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  dims = [reading.alike(eqn, [fact.dims[j] for fact in facts]) for j in range(len(_shape(eqn)))]
  reading.variables.pin(dims[sizes.along(eqn)[0]], ('it is sorted', eqn))
  if len(facts) == 1:
    return [reading.wider(facts[0], dims)]
  return [Symbolic(tuple(dims), reading.every(dims)) for _ in facts]


def _top_k(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, (axis,), why = facts[0], sizes.along(eqn), ('its largest entries are picked', eqn)
  reading.variables.pin(fact.dims[axis], why)
  picked = reading.pinned_dim((here.address, 'picked'), _shape(eqn)[axis], why)
  dims = (*fact.dims[:axis], picked, *fact.dims[axis + 1:])
  return [reading.wider(fact, dims, [picked]), Symbolic(dims, reading.every(dims))]


def _windowed(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, why = facts[0], ('a window moves over it', eqn)
  dims = []
  for j, (dim, changed, n) in enumerate(zip(fact.dims, sizes.windowed(eqn), _shape(eqn))):
    if changed:
      reading.variables.pin(dim, why)
    dims.append(reading.pinned_dim((here.address, j), n, why) if changed else dim)
  return [reading.wider(fact, dims, [])._replace(value=None)]


# Products.


def _dot(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  (left, right), (a, b) = facts, jaxprs.dot_numbers(eqn)
  return [_product(reading, eqn, left, right, a, b)]


def _product(reading: Reading, eqn: Any, left: Symbolic, right: Symbolic, a: jaxprs.Numbers, b: jaxprs.Numbers
             ) -> Symbolic:
  pairs = [reading.alike(eqn, [left.dims[i], right.dims[j]]) for i, j in zip(a.batch, b.batch)]
  summed = [reading.alike(eqn, [left.dims[i], right.dims[j]]) for i, j in zip(a.contracted, b.contracted)]
  reading.require(summed, [left, right], ('both factors of a product are not zero where a unit is removed', eqn))
  own = [[dim for i, dim in enumerate(fact.dims) if i not in (*n.batch, *n.contracted)]
         for fact, n in ((left, a), (right, b))]
  live = _both(reading, left, right, pairs)
  for fact, dims in zip((left, right), own):
    for v, bits in reading.live(fact, dims).items():
      live[v] = live.get(v, 0) | bits
  return Symbolic((*pairs, *own[0], *own[1]), live)


def _both(reading: Reading, left: Symbolic, right: Symbolic, dims: Sequence[Dim]) -> dict[int, int]:
  """Returns the units of `dims`, which both values have, at which both may be other than zero."""
  first, second = reading.live(left, dims), reading.live(right, dims)
  return {v: bits & second[v] for v, bits in first.items() if bits & second.get(v, 0)}


def _ragged(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Reads a product of rows with the matrix of their own group; groups, and rows of the groups, are pinned."""
  left, right, *_ = facts
  c0, c1, b0, b1, ragged, groups = sizes.ragged_numbers(eqn)
  why = ('rows are dealt to groups', eqn)
  for fact, axes in ((left, ragged), (right, groups)):
    for axis in axes:
      reading.variables.pin(fact.dims[axis], why)
  if set(ragged) & {*c0, *b0}:
    return reading.unknown(eqn, facts, here)
  kept = [i for i in range(len(right.dims)) if i not in groups]
  order = {axis: i for i, axis in enumerate(kept)}
  narrow = reading.wider(right, [right.dims[i] for i in kept])
  return [_product(reading, eqn, left, narrow, jaxprs.Numbers(c0, b0),
                   jaxprs.Numbers(tuple(order[i] for i in c1), tuple(order[i] for i in b1)))]


def _conv(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Reads a convolution: input features are groups times kernel inputs, outputs are groups times outputs of each."""
  (x, w), asked, variables = facts, jaxprs.convolution(eqn), reading.variables
  if asked.batch_groups > 1:
    return reading.unknown(eqn, facts, here)
  why = ('a convolution runs over it', eqn)
  for dim in (*(x.dims[i] for i in asked.lhs[2:]), *(w.dims[i] for i in asked.rhs[2:])):
    variables.pin(dim, why)
  out, inside = w.dims[asked.rhs[0]], w.dims[asked.rhs[1]]
  group = variables.named((here.address, 'group'), asked.groups)
  own = variables.named((here.address, 'own'), length(out) // asked.groups)
  variables.unify(x.dims[asked.lhs[1]], group + inside, ('', eqn))
  variables.unify(out, group + own, ('', eqn))
  reading.require([inside], [x, w], ('both factors of a product are not zero where a unit is removed', eqn))
  batch, shape = x.dims[asked.lhs[0]], _shape(eqn)
  dims = [reading.pinned_dim((here.address, j), n, why) if j in asked.out[2:] else () for j, n in enumerate(shape)]
  dims[asked.out[0]], dims[asked.out[1]] = batch, variables.resolved(group + own)
  live = {**_both(reading, x, w, [group]), **reading.live(w, [own]), **reading.live(x, [batch]),
          **reading.every(dims[j] for j in asked.out[2:])}
  return [Symbolic(tuple(dims), live)]


RULES: dict[str, Rule] = {
  **dict.fromkeys(OPERATIONS, elementwise), **MOVING, **PICKING, 'reduce_sum': _summed,
  **dict.fromkeys(('reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or', 'reduce_xor'), _reduced),
  'argmax': _places, 'argmin': _places, 'sort': _sort, 'top_k': _top_k,
  **dict.fromkeys(('cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp'), _cumulative),
  **dict.fromkeys(('reduce_window_sum', 'reduce_window_max', 'reduce_window_min'), _windowed),
  'dot_general': _dot, 'ragged_dot_general': _ragged, 'conv_general_dilated': _conv}
