"""Says what each operation does to dimensions and to zeros: one rule for each operation, in the table `RULES`.

A rule maps the facts of the operands to the facts of the results, and tells the `Reading` which dimensions are equal,
which are pinned, and what a sum needs to be zero. A rule of a user's own operation is one more line of the table.

    RULES['my_activation'] = elementwise
"""

from collections.abc import Sequence
from typing import Any

from sparsejax.programs import factors, jaxprs, sizes
from sparsejax.programs.follow import Position
from sparsejax.structured.dimensions import Dim, length
from sparsejax.structured.elementwise import OPERATIONS, elementwise
from sparsejax.structured.reading import Reading, Rule, Symbolic

Facts = list[Symbolic]


def _shape(eqn: Any, i: int = 0) -> tuple[int, ...]:
  return eqn.outvars[i].aval.shape


def _narrowed(reading: Reading, fact: Symbolic, dims: Sequence[Dim]) -> Symbolic:
  """Returns a value that has some of the dimensions of another value, and its zeros."""
  return Symbolic(tuple(dims), reading.live(fact, dims), fact.value)


def _pinned_dim(reading: Reading, here: Position, name: Any, n: int, why: tuple[str, Any]) -> Dim:
  dim = reading.variables.named((here.address, name), n)
  reading.variables.pin(dim, why)
  return dim


def _wider(reading: Reading, fact: Symbolic, dims: Sequence[Dim], new: Sequence[Dim]) -> Symbolic:
  """Returns a value with the dimensions `dims`, which is nowhere zero along `new`."""
  zero = fact.value == 0
  live = reading.live(fact, dims)
  return Symbolic(tuple(dims), live if zero else {**live, **reading.every(new)}, fact.value)


# Operations that move dimensions.


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
  return [_wider(reading, fact, tuple(map(reading.variables.resolved, settled)), new)]


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
  return [_wider(reading, facts[0], dims, [])]


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
    reading.variables.pin(fact.dims[axis], ('it is split inside of a factor', eqn))
    parts = [_pinned_dim(reading, here, i, n, ('it is split inside of a factor', eqn)) for i, n in enumerate(lengths)]
  return [_wider(reading, fact, (*fact.dims[:axis], part, *fact.dims[axis + 1:]), []) for part in parts]


def _concatenate(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Unifies the other dimensions; the joined one is the sum of the segments."""
  axis, shape = jaxprs.dimensions(eqn), _shape(eqn)
  joined = reading.variables.named((here.address, 'joined'), shape[axis])
  parts = [fact.dims[axis] for fact, v in zip(facts, eqn.invars) if v.aval.shape[axis]]
  if len(parts) == 1:
    joined = parts[0]
  else:
    reading.variables.join(joined, parts, ('', eqn))
  others = [_all_alike(reading, eqn, [fact.dims[j] for fact in facts]) for j in range(len(shape)) if j != axis]
  return [_together(reading, facts, (*others[:axis], reading.variables.resolved(joined), *others[axis:]))]


def _stack(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  axis, why = jaxprs.dimensions(eqn), ('arrays are stacked along it', eqn)
  stacked = _pinned_dim(reading, here, 'stacked', len(facts), why)
  others = [_all_alike(reading, eqn, [fact.dims[j] for fact in facts]) for j in range(len(_shape(eqn)) - 1)]
  return [_together(reading, facts, (*others[:axis], stacked, *others[axis:]), [stacked])]


def _unstack(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, axis = facts[0], jaxprs.dimensions(eqn)
  reading.variables.pin(fact.dims[axis], ('one of its indices is picked', eqn))
  return [_narrowed(reading, fact, (*fact.dims[:axis], *fact.dims[axis + 1:])) for _ in eqn.outvars]


def _all_alike(reading: Reading, eqn: Any, dims: Sequence[Dim]) -> Dim:
  for other in dims[1:]:
    reading.variables.unify(dims[0], other, ('', eqn))
  return reading.variables.resolved(dims[0])


def _together(reading: Reading, facts: Sequence[Symbolic], dims: Sequence[Dim], new: Sequence[Dim] = ()) -> Symbolic:
  """Returns a value whose entries come from several values: live where one of them is, and along `new`."""
  live = reading.every(new)
  for fact in facts:
    # A number fills the dimensions of its own segment; all dimensions count, which is never wrong.
    for v, bits in (reading.live(fact, dims) if fact.value is None or fact.dims else
                    reading.every(dims) if fact.value else {}).items():
      live[v] = live.get(v, 0) | bits
  values = {fact.value for fact in facts}
  return Symbolic(tuple(dims), live, values.pop() if len(values) == 1 else None)


def _pad(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, why = facts[0], ('it is padded', eqn)
  dims: list[Dim] = []
  for j, (dim, (low, high, inside), n) in enumerate(zip(fact.dims, sizes.padding(eqn), _shape(eqn))):
    if (low, high, inside) == (0, 0, 0):
      dims.append(dim)
    elif inside or low < 0 or high < 0:
      reading.variables.pin(dim, why)
      dims.append(_pinned_dim(reading, here, j, n, why))
    else:
      parts = [_pinned_dim(reading, here, (j, 'low'), low, why)] * bool(low) + [dim]
      parts += [_pinned_dim(reading, here, (j, 'high'), high, why)] * bool(high)
      joined = reading.variables.named((here.address, 'padded', j), n)
      reading.variables.join(joined, parts, why)
      dims.append(reading.variables.resolved(joined))
  return [_together(reading, (Symbolic(fact.dims, fact.live), facts[1]), dims)]


def _tile(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  new = [reading.variables.named((here.address, j), n) for j, n in enumerate(sizes.repeats(eqn))]
  return [_wider(reading, facts[0], [a + b for a, b in zip(new, facts[0].dims)], new)]


def _rev(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  for axis in sizes.along(eqn):
    reading.variables.pin(facts[0].dims[axis], ('it is reversed', eqn))
  return [facts[0]]


def _iota(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  return [reading.fresh(here.address, _shape(eqn))]


def _barrier(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  return facts


# Reductions and orders.


def _summed(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, axes = facts[0], sizes.along(eqn)
  why = ('a sum runs over what is not zero where a unit is removed; of a variance, use mean(x^2) - mean(x)^2', eqn)
  reading.require([fact.dims[a] for a in axes], [fact], why)
  return [_without(reading, fact, axes)._replace(value=0 if fact.value == 0 else None)]


def _without(reading: Reading, fact: Symbolic, axes: Sequence[int]) -> Symbolic:
  return _narrowed(reading, fact, [dim for j, dim in enumerate(fact.dims) if j not in axes])._replace(value=None)


def _reduced(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Pins what is reduced: a maximum, a minimum or a product counts removed units, whatever they hold."""
  results = []
  for fact, v in zip(facts[:len(eqn.outvars)], eqn.outvars):
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
  dims = [_all_alike(reading, eqn, [fact.dims[j] for fact in facts]) for j in range(len(_shape(eqn)))]
  reading.variables.pin(dims[sizes.along(eqn)[0]], ('it is sorted', eqn))
  if len(facts) == 1:
    return [_narrowed(reading, facts[0], dims)]
  return [Symbolic(tuple(dims), reading.every(dims)) for _ in facts]


def _top_k(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, (axis,), why = facts[0], sizes.along(eqn), ('its largest entries are picked', eqn)
  reading.variables.pin(fact.dims[axis], why)
  picked = _pinned_dim(reading, here, 'picked', _shape(eqn)[axis], why)
  dims = (*fact.dims[:axis], picked, *fact.dims[axis + 1:])
  return [_wider(reading, fact, dims, [picked]), Symbolic(dims, reading.every(dims))]


def _windowed(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  fact, why = facts[0], ('a window moves over it', eqn)
  dims = []
  for j, (dim, changed, n) in enumerate(zip(fact.dims, sizes.windowed(eqn), _shape(eqn))):
    if changed:
      reading.variables.pin(dim, why)
    dims.append(_pinned_dim(reading, here, j, n, why) if changed else dim)
  return [_wider(reading, fact, dims, [])._replace(value=None)]


# Products.


def _dot(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  (left, right), (a, b) = facts, jaxprs.dot_numbers(eqn)
  return [_product(reading, eqn, left, right, a, b)]


def _product(reading: Reading, eqn: Any, left: Symbolic, right: Symbolic, a: jaxprs.Numbers, b: jaxprs.Numbers
             ) -> Symbolic:
  pairs = [_all_alike(reading, eqn, [left.dims[i], right.dims[j]]) for i, j in zip(a.batch, b.batch)]
  summed = [_all_alike(reading, eqn, [left.dims[i], right.dims[j]]) for i, j in zip(a.contracted, b.contracted)]
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
  narrow = _narrowed(reading, right, [right.dims[i] for i in kept])
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
  dims = [_pinned_dim(reading, here, j, n, why) if j in asked.out[2:] else () for j, n in enumerate(shape)]
  dims[asked.out[0]], dims[asked.out[1]] = batch, variables.resolved(group + own)
  live = {**_both(reading, x, w, [group]), **reading.live(w, [own]), **reading.live(x, [batch]),
          **reading.every(dims[j] for j in asked.out[2:])}
  return [Symbolic(tuple(dims), live)]


# Look-ups and updates.


def _gather(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Passes what is picked whole; pins what is indexed. The dimensions of the indices follow."""
  (x, indices), numbers, shape = facts, jaxprs.gather_numbers(eqn), _shape(eqn)
  collapsed, batching = tuple(numbers.collapsed_slice_dims), tuple(numbers.operand_batching_dims)
  why = ('its entries are looked up', eqn)
  lengths, whole = eqn.invars[0].aval.shape, sizes.picked_sizes(eqn)
  for i in range(len(x.dims)):
    if i in collapsed or i not in batching and whole[i] != lengths[i]:
      reading.variables.pin(x.dims[i], why)
  kept = dict(zip(numbers.offset_dims, (i for i in range(len(x.dims)) if i not in collapsed + batching)))
  rows = [j for j in range(len(shape)) if j not in kept]
  for i, k in zip(batching, numbers.start_indices_batching_dims):
    reading.variables.unify(x.dims[i], indices.dims[k], ('', eqn))
  if indices.dims:
    reading.variables.pin(indices.dims[-1], why)
  dims = [x.dims[kept[j]] if j in kept and whole[kept[j]] == lengths[kept[j]] else
          _pinned_dim(reading, here, j, n, why) if j in kept else indices.dims[rows.index(j)]
          for j, n in enumerate(shape)]
  return [_wider(reading, x, dims, [dims[j] for j in rows])._replace(value=x.value)]


def _dynamic_slice(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  x, why = facts[0], ('its entries are picked by an index', eqn)
  dims = [_picked(reading, dim, here, (j, n), why) if n != old else dim for j, (dim, n, old) in enumerate(
      zip(x.dims, _shape(eqn), eqn.invars[0].aval.shape))]
  return [_wider(reading, x, dims, [])]


def _picked(reading: Reading, dim: Dim, here: Position, name: tuple[int, int], why: tuple[str, Any]) -> Dim:
  reading.variables.pin(dim, why)
  return _pinned_dim(reading, here, name, name[1], why)


def _dynamic_update_slice(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  x, new, why = facts[0], facts[1], ('a part of it is replaced', eqn)
  for a, b, n, m in zip(x.dims, new.dims, eqn.invars[0].aval.shape, eqn.invars[1].aval.shape):
    _paired(reading, a, b, n == m, why)
  return [_together(reading, (x, new), tuple(map(reading.variables.resolved, x.dims)))]


def _paired(reading: Reading, a: Dim, b: Dim, alike: bool, why: tuple[str, Any]) -> None:
  """Unifies two dimensions that are alike, and pins both otherwise."""
  if alike:
    reading.variables.unify(a, b, why)
    return
  reading.variables.pin(a, why)
  reading.variables.pin(b, why)


def _scatter(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  x, _, new = facts
  numbers, why = sizes.scatter_numbers(eqn), ('some of its entries are replaced', eqn)
  outside = (*numbers.inserted_window_dims, *numbers.operand_batching_dims)
  window = [i for i in range(len(x.dims)) if i not in outside]
  shapes = eqn.invars[0].aval.shape, eqn.invars[2].aval.shape
  for i, j in zip(window, numbers.update_window_dims):
    _paired(reading, x.dims[i], new.dims[j], shapes[0][i] == shapes[1][j], why)
  for dim in (*(x.dims[i] for i in outside), *facts[1].dims,
              *(dim for j, dim in enumerate(new.dims) if j not in numbers.update_window_dims)):
    reading.variables.pin(dim, why)
  return [_together(reading, (x, new), tuple(map(reading.variables.resolved, x.dims)))]


def _random(reading: Reading, eqn: Any, facts: Facts, here: Position) -> Facts:
  """Pins random values: an array of another shape has other values."""
  return reading.unknown(eqn, facts, here, 'random values depend on the shape; trace the function without randomness')


RULES: dict[str, Rule] = {
  **dict.fromkeys(OPERATIONS, elementwise), **dict.fromkeys(factors.MOVES, _moved), 'slice': _slice, 'split': _split,
  'concatenate': _concatenate, 'stack': _stack, 'unstack': _unstack, 'pad': _pad, 'tile': _tile, 'rev': _rev,
  'iota': _iota, 'optimization_barrier': _barrier, 'reduce_sum': _summed,
  **dict.fromkeys(('reduce_max', 'reduce_min', 'reduce_prod', 'reduce_and', 'reduce_or', 'reduce_xor'), _reduced),
  'argmax': _places, 'argmin': _places, 'sort': _sort, 'top_k': _top_k,
  **dict.fromkeys(('cumsum', 'cumprod', 'cummax', 'cummin', 'cumlogsumexp'), _cumulative),
  **dict.fromkeys(('reduce_window_sum', 'reduce_window_max', 'reduce_window_min'), _windowed),
  'dot_general': _dot, 'ragged_dot_general': _ragged, 'conv_general_dilated': _conv, 'gather': _gather,
  'dynamic_slice': _dynamic_slice, 'dynamic_update_slice': _dynamic_update_slice,
  **dict.fromkeys(('scatter', 'scatter-add', 'scatter_add', 'scatter-sub', 'scatter-mul', 'scatter_mul'), _scatter),
  **dict.fromkeys(('random_bits', 'random_seed', 'random_wrap', 'random_unwrap', 'random_split', 'random_fold_in',
                   'threefry2x32', 'rng_bit_generator', 'random_gamma', 'random_clone'), _random)}
