"""How a value inside of a program shows the parameters that it is made of.

A `View` says of each dimension of a value which axes of the parameter it runs over. `follow` gives the views of an
operation's results from those of its operands; an operation that it does not know ends them, unless its result has the
operand's shape. Contractions and calls of other programs are `tracing`'s.
"""

import math
from collections.abc import Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jax.extend import core
from jax.extend.core import primitives

# What a value is made of. Only what is made of parameters (and constants) is a weight: a bias added to data is not.
CONSTANT, PARAMETER, DATA = range(3)

JOINED = -1  # stands for a leaf axis along which several parameters were stacked, each being one place of it


class Factor(NamedTuple):
  """A factor of one dimension: the leaf axes it runs over, none if it is a broadcast, two if a reshape mixed them."""

  axes: tuple[int, ...]
  size: int


class View(NamedTuple):
  """How a value shows a parameter: the factors of each dimension, major first; their product is its length.

  `gone`: leaf axes of which an index was picked (`W[3]`, one step of a scan). `share`: the part of the value that is
  this parameter, less than one after a concatenation.
  """

  path: str
  dims: tuple[tuple[Factor, ...], ...]
  gone: frozenset[int] = frozenset()
  share: Fraction = Fraction(1)


class Value(NamedTuple):
  """What is known of one variable of the program."""

  kind: int = CONSTANT
  views: tuple[View, ...] = ()


def whole(path: str, shape: tuple[int, ...]) -> View:
  """The parameter itself."""
  return View(path, tuple((Factor((axis,), n),) for axis, n in enumerate(shape)))


def shape_of(view: View) -> tuple[int, ...]:
  return tuple(math.prod(factor.size for factor in dim) for dim in view.dims)


def over(dim: Sequence[Factor]) -> tuple[int, ...]:
  """The leaf axes that a dimension runs over."""
  return tuple(dict.fromkeys(axis for factor in dim for axis in factor.axes))


def distinct(views: Iterable[View | None]) -> tuple[View, ...]:
  return tuple(dict.fromkeys(view for view in views if view is not None))


def follow(eqn: Any, values: list[Value]) -> list[Value]:
  """What the results of one operation show. Anything elementwise shows all of its operands, if none of them is data."""
  name = eqn.primitive.name
  if name in RULES:
    return RULES[name](eqn, values)
  move, pairwise = MOVES.get(name, _unmoved), len(eqn.outvars) > 1 and _shapes(eqn.invars) == _shapes(eqn.outvars)
  results = []
  for i, out in enumerate(eqn.outvars):
    sources = values[i:i + 1] if pairwise else values
    kind = max((value.kind for value in sources), default=CONSTANT)
    views = [] if kind == DATA else [view for value in sources for view in value.views]
    results.append(Value(kind, distinct(move(view, eqn, getattr(out.aval, 'shape', ())) for view in views)))
  return results


def _shapes(variables: Sequence[Any]) -> list[Any]:
  return [getattr(v.aval, 'shape', None) for v in variables]


# One view of one operand, moved: (view, equation, shape of the result) -> view, or `None` if it ends here.


def _unmoved(view: View, eqn: Any, shape: tuple[int, ...]) -> View | None:
  return view if shape_of(view) == shape and eqn.primitive.name not in MIXING else None


def _resized(view: View, eqn: Any, shape: tuple[int, ...]) -> View | None:
  return resized(view, shape)


def resized(view: View, shape: tuple[int, ...]) -> View | None:
  """Slices, padding, shards: a dimension of another length runs over the same leaf axes."""
  if len(shape) != len(view.dims):
    return None
  return view._replace(dims=tuple(dim if n == old else (Factor(over(dim), n),)
                                  for dim, n, old in zip(view.dims, shape, shape_of(view))))


def dropped(view: View, dims: Sequence[int]) -> View:
  """Without these dimensions, of each of which one index is left."""
  gone = view.gone.union(*(over(view.dims[i]) for i in dims))
  return view._replace(dims=tuple(dim for i, dim in enumerate(view.dims) if i not in dims), gone=gone)


def _broadcast(view: View, eqn: Any, shape: tuple[int, ...]) -> View:
  old, dims, stretched = shape_of(view), [(Factor((), n),) if n != 1 else () for n in shape], []
  for i, j in enumerate(eqn.params['broadcast_dimensions']):
    if old[i] == shape[j]:
      dims[j] = view.dims[i]
    else:
      stretched.append(i)
  return view._replace(dims=tuple(dims), gone=dropped(view, stretched).gone)


def _tiled(view: View, eqn: Any, shape: tuple[int, ...]) -> View | None:
  if len(shape) != len(view.dims):
    return None
  return view._replace(dims=tuple(dim if n == old else (Factor((), n // old), *dim)
                                  for dim, n, old in zip(view.dims, shape, shape_of(view))))


def _reshaped(view: View, eqn: Any, shape: tuple[int, ...]) -> View | None:
  """Deals the factors out to the new dimensions, major first; neighbours that do not fit are mixed."""
  if 0 in shape:
    return None
  order = eqn.params.get('dimensions') or range(len(view.dims))  # some batching rules transpose and reshape at once
  queue, gone, dims = [factor for i in order for factor in view.dims[i]], view.gone, []
  for n in shape:
    while n != 1 and queue[0].size == 1:
      gone = gone.union(queue.pop(0).axes)
    dims.append(_dealt(queue, n))
  return view._replace(dims=tuple(dims), gone=gone.union(over(queue)))


def _dealt(queue: list[Factor], n: int) -> tuple[Factor, ...]:
  """Takes factors with the product `n` from the head of the queue."""
  if n == 1:
    return (queue.pop(0),) if queue and queue[0].size == 1 else ()
  dealt = []
  while n > 1:
    head = queue.pop(0)
    while n % head.size and head.size % n:
      other = queue.pop(0)
      head = Factor(over((head, other)), head.size * other.size)
    part = min(n, head.size)
    dealt.append(head._replace(size=part))
    if part < head.size:
      queue.insert(0, head._replace(size=head.size // part))
    n //= part
  return tuple(dealt)


MOVES = {
  'reshape': _reshaped, 'broadcast_in_dim': _broadcast, 'tile': _tiled,
  'transpose': lambda view, eqn, shape: view._replace(dims=tuple(view.dims[i] for i in eqn.params['permutation'])),
  'squeeze': lambda view, eqn, shape: dropped(view, eqn.params['dimensions']),
  'unstack': lambda view, eqn, shape: dropped(view, (eqn.params['axis'],)),
  **dict.fromkeys(('slice', 'split', 'pad', 'all_gather', 'all_gather_invariant', 'reduce_scatter'), _resized)}

# Their results may have the operand's shape, but row i of the one has nothing to do with row i of the other.
MIXING = {'all_to_all', 'cholesky', 'eigh', 'fft', 'hessenberg', 'householder_product', 'lu', 'schur',
          'triangular_solve'}


# Operations in which not all operands are alike: (equation, values) -> values of the results.


def _joined(eqn: Any, values: list[Value]) -> list[Value]:
  """`concatenate` and `stack`: each parameter is a part of the result, by its share of it."""
  shape, stack = eqn.outvars[0].aval.shape, eqn.primitive.name == 'stack'
  axis = eqn.params['axis' if stack else 'dimension']
  kind, shares = max(value.kind for value in values), {}
  for value, operand in zip(values, eqn.invars):
    part = Fraction(1 if stack else operand.aval.shape[axis], max(shape[axis], 1))
    for view in value.views if kind != DATA else ():
      along = (Factor(over(() if stack else view.dims[axis]) or (JOINED,), shape[axis]),)
      dims = (*view.dims[:axis], along, *view.dims[axis + (not stack):])
      key = view._replace(dims=dims, share=Fraction(0))
      shares[key] = shares.get(key, Fraction(0)) + view.share * part
  return [Value(kind, tuple(view._replace(share=share) for view, share in shares.items()))]


def _dynamic_slice(eqn: Any, values: list[Value]) -> list[Value]:
  return _picked(values, [resized(view, eqn.outvars[0].aval.shape) for view in values[0].views])


def _gather(eqn: Any, values: list[Value]) -> list[Value]:
  known = values[1].kind != DATA
  return _picked(values, [_gathered(view, eqn, known) for view in values[0].views])


def _picked(values: list[Value], views: list[View]) -> list[Value]:
  """What an index picks. Picked by data, a matrix is a weight (an expert) but a row is data (an embedding)."""
  if values[0].kind == DATA or all(value.kind != DATA for value in values):
    return [Value(max(value.kind for value in values), distinct(views) if values[0].kind != DATA else ())]
  matrices = [view for view in views if sum(n > 1 and bool(over(d)) for d, n in zip(view.dims, shape_of(view))) > 1]
  return [Value(PARAMETER if matrices else DATA, distinct(matrices))]


def _gathered(view: View, eqn: Any, known: bool) -> View:
  """Kept dimensions keep their factors; those of the indices run over the indexed axis if they are a `known` order."""
  numbers, shape = eqn.params['dimension_numbers'], eqn.outvars[0].aval.shape
  collapsed, batching = tuple(numbers.collapsed_slice_dims), tuple(numbers.operand_batching_dims)
  kept = dict(zip(numbers.offset_dims, (i for i in range(len(view.dims)) if i not in collapsed + batching)))
  index_dims = [j for j in range(len(shape)) if j not in kept]
  order = known and len(collapsed) == 1 and len(index_dims) - len(batching) == 1
  dims = [view.dims[kept[j]] if j in kept else (Factor(over(view.dims[collapsed[0]]) if order else (), n),)
          for j, n in enumerate(shape)]
  for i, j in zip(batching, numbers.start_indices_batching_dims):
    dims[index_dims[j]] = view.dims[i]
  gone = view.gone if order else dropped(view, collapsed).gone
  return resized(view._replace(dims=tuple(dims), gone=gone), shape)


RULES = {'concatenate': _joined, 'stack': _joined, 'dynamic_slice': _dynamic_slice, 'gather': _gather}

# JAX's own operations: they contract nothing, or are followed. What else takes two arrays may contract them.
KNOWN = {p.name for p in vars(primitives).values() if isinstance(p, core.Primitive)}
KNOWN |= {*MOVES, *MIXING, *RULES, 'optimization_barrier', 'psum_invariant', 'scatter-sub', 'shard_alike', 'tie'}
