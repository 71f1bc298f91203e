"""Tells which parameters a value inside of a program is made of, and how its dimensions run over the parameters' axes.

A `View` relates one value to one parameter. `shown` computes the views of an operation's results from the views of its
operands. An operation without a rule ends a view, unless its result has the operand's shape.

    w = Value(PARAMETER, (View('w', factors.whole((4, 6))),))
    shown(eqn, [w])[0].views[0].dims      # after `w.T`: ((Factor((1,), 6, 1),), (Factor((0,), 4, 1),))
"""

from collections.abc import Callable, Iterable, Sequence
from fractions import Fraction
from typing import Any, NamedTuple

from jax.extend import core
from jax.extend.core import primitives

from sparsejax.programs import factors, jaxprs
from sparsejax.programs.factors import Dims, Factor, Move, Moved

# The kinds of values. A weight is made of parameters and constants only: a bias added to data is data.
CONSTANT, PARAMETER, DATA = range(3)

JOINED = -1  # stands for an axis along which several parameters were stacked, each at one index of the axis


class View(NamedTuple):
  """A `View` says how a value shows the parameter at `path`.

  `dims` are the dimensions of the value, over the axes of the parameter. `gone` are the axes of which one index was
  picked (`W[3]`, one step of a scan). `share` is the fraction of the value that is this parameter, less than 1 after a
  concatenation. `loops` says, for each scan that sliced the parameter, how many loops are around the scan.
  """

  path: str
  dims: Dims
  gone: frozenset[int] = frozenset()
  share: Fraction = Fraction(1)
  loops: tuple[int, ...] = ()

  def moved(self, move: Moved | None) -> 'View | None':
    """Returns the view after a move, or `None` if the move is `None`."""
    return None if move is None else self._replace(dims=move.dims, gone=self.gone | move.gone)


class Value(NamedTuple):
  """A `Value` says what one variable of a program is made of: its kind, and views of parameters."""

  kind: int = CONSTANT
  views: tuple[View, ...] = ()


def distinct(views: Iterable[View | None]) -> tuple[View, ...]:
  """Returns the views in their order, without repetitions and without `None`."""
  return tuple(dict.fromkeys(view for view in views if view is not None))


def joined(values: Sequence[Value]) -> Value:
  """Returns the value of a variable that is one of several, as the result of a `cond` is."""
  return Value(max(value.kind for value in values), distinct(view for value in values for view in value.views))


def repeated(before: Value, after: Value) -> Value:
  """Returns the value that holds before and after a round of a loop: the views that both have."""
  return Value(max(before.kind, after.kind), tuple(view for view in before.views if view in after.views))


def resized(value: Value, shape: Sequence[int]) -> Value:
  """Returns the value of one shard of an array, or of the array of all shards."""
  return value._replace(views=distinct(view.moved(factors.resized(view.dims, shape)) for view in value.views))


def sliced(value: Value, loops: int) -> Value:
  """Returns the value of one slice of a stack, in a scan with `loops` loops around the scan."""
  slices = (view.moved(factors.dropped(view.dims, (0,)))._replace(loops=(*view.loops, loops)) for view in value.views)
  return value._replace(views=tuple(slices))


def stacked(value: Value, stacks: Sequence[Value], length: int) -> Value:
  """Returns the value of the stacked results of a scan; `stacks` are the stacks that the scan sliced."""
  sources = [view for stack in stacks for view in stack.views]
  return value._replace(views=tuple(_stacked(view, sources, length) for view in value.views))


def _stacked(view: View, sources: Sequence[View], length: int) -> View:
  """Returns the view with the axis that the scan sliced in front, or with a new dimension."""
  for source in sources:
    axes = factors.over(source.dims[0])
    if source.path == view.path and axes and view.gone.issuperset(axes):
      return view._replace(dims=(source.dims[0], *view.dims), gone=view.gone.difference(axes) | source.gone,
                           loops=source.loops)
  return view._replace(dims=((Factor((), length),), *view.dims))


def shown(eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Returns the values of the results of one operation.

  The result of an elementwise operation has the views of all operands, unless an operand is data.
  """
  if eqn.primitive.name in RULES:
    return RULES[eqn.primitive.name](eqn, values)
  move = MOVES.get(eqn.primitive.name, _unmoved)
  pairwise = len(eqn.outvars) > 1 and jaxprs.shapes(eqn.invars) == jaxprs.shapes(eqn.outvars)
  results = []
  for i, shape in enumerate(jaxprs.shapes(eqn.outvars)):
    sources = values[i:i + 1] if pairwise else values
    kind = max((value.kind for value in sources), default=CONSTANT)
    views = [] if kind == DATA else [view for value in sources for view in value.views]
    results.append(Value(kind, distinct(view.moved(move(view.dims, eqn, shape or ())) for view in views)))
  return results


# Moves are those of `factors`, and some more. A view ends where its move is `None`.


def _unmoved(dims: Dims, eqn: Any, shape: Sequence[int]) -> Moved | None:
  """Keeps dimensions that have the shape of the result; stretches a length of 1 where the operation does."""
  lengths = factors.shape_of(dims)
  if lengths == shape and eqn.primitive.name not in MIXING:
    return Moved(dims)
  if eqn.primitive.name in STRETCHING and len(lengths) == len(shape):
    return factors.broadcast(dims, range(len(shape)), shape)
  return None


def _tiled(dims: Dims, eqn: Any, shape: Sequence[int]) -> Moved | None:
  if len(shape) != len(dims):
    return None
  return Moved(tuple(dim if n == old else (Factor((), n // old), *dim)
                     for dim, n, old in zip(dims, shape, factors.shape_of(dims))))


MOVES: dict[str, Move] = {
  **factors.MOVES, 'tile': _tiled, 'unstack': lambda dims, eqn, shape: factors.dropped(dims, (jaxprs.dimensions(eqn),)),
  **dict.fromkeys(('slice', 'split', 'pad', 'all_gather', 'all_gather_invariant', 'reduce_scatter'),
                  lambda dims, eqn, shape: factors.resized(dims, shape))}

# The result may have the operand's shape, but row `i` of the result does not come from row `i` of the operand.
MIXING = {'all_to_all', 'cholesky', 'eigh', 'fft', 'hessenberg', 'householder_product', 'lu', 'schur',
          'triangular_solve'}

# JAX emits these operations for shapes such as `[1, n]` and `[m, n]`, without a `broadcast_in_dim`.
STRETCHING = {'add', 'and', 'atan2', 'complex', 'div', 'max', 'min', 'mul', 'nextafter', 'or', 'pow', 'rem',
              'shift_left', 'shift_right_arithmetic', 'shift_right_logical', 'sub', 'xor'}


# Rules for operations whose operands have different parts map (equation, values) to the values of the results.


def _joined(eqn: Any, values: Sequence[Value]) -> list[Value]:
  """Returns the value of a `concatenate` or a `stack`: each parameter has a share of the result."""
  shape, stack, axis = eqn.outvars[0].aval.shape, eqn.primitive.name == 'stack', jaxprs.dimensions(eqn)
  kind, shares = max(value.kind for value in values), {}
  for value, operand in zip(values, eqn.invars):
    part = Fraction(1 if stack else operand.aval.shape[axis], max(shape[axis], 1))
    for view in value.views if kind != DATA else ():
      along = (Factor(factors.over(() if stack else view.dims[axis]) or (JOINED,), shape[axis]),)
      dims = (*view.dims[:axis], along, *view.dims[axis + (not stack):])
      key = view._replace(dims=dims, share=Fraction(0))
      shares[key] = shares.get(key, Fraction(0)) + view.share * part
  return [Value(kind, tuple(view._replace(share=share) for view, share in shares.items()))]


def _dynamic_slice(eqn: Any, values: Sequence[Value]) -> list[Value]:
  return _picked(values, resized(values[0], eqn.outvars[0].aval.shape).views)


def _gather(eqn: Any, values: Sequence[Value]) -> list[Value]:
  return _picked(values, [_gathered(view, eqn, values[1].kind != DATA) for view in values[0].views])


def _picked(values: Sequence[Value], views: Sequence[View]) -> list[Value]:
  """Returns the value of what an index picks.

  A matrix that is picked by data is a weight (an expert). A row that is picked by data is data (an embedding).
  """
  if values[0].kind == DATA or all(value.kind != DATA for value in values):
    return [Value(max(value.kind for value in values), distinct(views) if values[0].kind != DATA else ())]
  matrices = [view for view in views
              if sum(n > 1 and bool(factors.over(d)) for d, n in zip(view.dims, factors.shape_of(view.dims))) > 1]
  return [Value(PARAMETER if matrices else DATA, distinct(matrices))]


def _gathered(view: View, eqn: Any, known: bool) -> View:
  """Returns the view of a `gather`: kept dimensions keep their factors.

  The dimension of the indices runs over the indexed axis if the indices are `known`, and over no axis otherwise.
  """
  numbers, shape = jaxprs.gather_numbers(eqn), eqn.outvars[0].aval.shape
  collapsed, batching = tuple(numbers.collapsed_slice_dims), tuple(numbers.operand_batching_dims)
  kept = dict(zip(numbers.offset_dims, (i for i in range(len(view.dims)) if i not in collapsed + batching)))
  index_dims = [j for j in range(len(shape)) if j not in kept]
  ordered = known and len(collapsed) == 1 and len(index_dims) - len(batching) == 1
  dims = [view.dims[kept[j]] if j in kept else
          (Factor(factors.over(view.dims[collapsed[0]]) if ordered else (), n),) for j, n in enumerate(shape)]
  for i, j in zip(batching, numbers.start_indices_batching_dims):
    dims[index_dims[j]] = view.dims[i]
  gone = view.gone if ordered else view.gone | factors.dropped(view.dims, collapsed).gone
  return view._replace(dims=factors.resized(tuple(dims), shape).dims, gone=gone)


RULES: dict[str, Callable[[Any, Sequence[Value]], list[Value]]] = {
  'concatenate': _joined, 'stack': _joined, 'dynamic_slice': _dynamic_slice, 'gather': _gather}

# JAX's own operations contract nothing, or have a rule. Every other operation on two arrays may be a contraction.
KNOWN = {p.name for p in vars(primitives).values() if isinstance(p, core.Primitive)}
KNOWN |= {*MOVES, *MIXING, *RULES, 'optimization_barrier', 'psum_invariant', 'scatter-sub', 'shard_alike', 'tie'}
