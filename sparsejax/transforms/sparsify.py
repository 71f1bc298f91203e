"""Composes the words to one optax transform around the user's optimizer.

The user's parameters are the sparse ones after every `optax.apply_updates`: a pruned weight's update is minus the
weight. Flows that need dense weights behind the zeros keep them in the state as `master`. The gradient, taken at the
sparse point, is pulled back to the master, and the user's optimizer updates the master. The emitted update moves the
user's parameters to the new sparse point. `optax.contrib.schedule_free` works the same way.

    tx = sparsify(optax.adamw(1e-3), flows.sr_ste(2e-4), selections.leafwise(NM(2, 4)))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import errors, plans, schedules, scores
from sparsejax.arguments import checked
from sparsejax.selections import Selection
from sparsejax.states import SparseState
from sparsejax.transforms import choosing, phases, refusals, small
from sparsejax.transforms.leaves import Leaves, plain_key
from sparsejax.transforms.method import Method
from sparsejax.types import Array, Axes, Flow, Inner, Optimizer, Predicate, PyTree, Schedule, Start

SLOTS = ('kept', 'fresh')


@checked
def sparsify(
    inner: Inner,
    flow: Flow,
    selection: Selection,
    *,
    where: Predicate | PyTree | None = None,
    axes: Mapping[str, Axes] | None = None,
    refresh: Schedule = schedules.every(1),
    dense_steps: int = 0,
    fine_tune_steps: int = 0,
    total_steps: int | None = None,
    slots: str = 'kept',
    key: Array | None = None,
    allow_empty: bool = False,
    memory: scores.Memory | None = None,
    start: Start | None = None,
    first: Selection | None = None,
    pause: bool = False,
    name: str = '',
    tied: Mapping[str, str] | None = None,
    probe: Callable[[PyTree], PyTree] | None = None,
) -> Optimizer:
  """Returns `inner` wrapped so that the parameters that it trains are sparse. Every recipe is a call of `sparsify`.

  `where`: the sparse leaves, a predicate `(path, leaf)` or a prefix pytree of bools. The default is `trees.matrices`,
    and with traced `axes` what the program contracts, see `trees.default_where`.
  `axes`: `sparsejax.contractions(...)`, or a mapping from paths or globs to `Axes`. Leaves that the latter does not
    name, and all leaves by default, follow `conventions`; a leaf without a convention is refused where axes count.
  `refresh`: a schedule of bools, `True` when masks are chosen, on the step counted from the end of the dense phase.
  `dense_steps`: the number of updates before anything is pruned.
  `fine_tune_steps`: the number of updates, the last of `total_steps`, under a fixed mask. In them only kept weights get
    gradients, and the pruned weights are gone from the master too.
  `slots`: the optimizer's memory of a weight that returns, `'kept'` as it was or `'fresh'` as `init` makes it. A slot
    is an array in the state of `inner` whose path ends in the parameter's path and that has the parameter's shape.
    Factored slots, which belong to a row or a column, stay as they are.
  `key`: the PRNG key of random scores.
  `allow_empty`: whether a layer may lose all of its weights. Without it, an empty layer is refused: at trace time where
    the shapes tell the count, else in `init`, unless `init` is traced.
  `memory`: the memory of a score, updated once per step before the weights move. Words read it as `signals.stats`.
  `start`: how the first masks are chosen, see `starts`. The default is one choice by the selection.
  `first`: the selection of the first masks. The default is `selection`.
  `pause`: whether the weights stay as they are on steps that choose masks. The optimizer does not count these steps.
  `tied`: globs of leaves that follow others, mapped to globs of the leaders: `{'**/rho': '**/mean'}`. A follower has
    the mask of its leader, in `where` or not: the same mask, or one entry for each output, kept where the leader keeps
    a weight of the output. A follower of the leader's shape is an entry of the tuple `signals.stats` that scores of the
    leader read, unless there is a memory. The follower of a dense leaf is dense.
  `probe`: a function of the parameters, evaluated at those that the user holds on steps that choose masks, and in
    `init`. The scores of a choice read the result, a tree like the parameters, as `signals.grad`: a gradient of a
    larger batch, or any probe of `starts`. Flow, memory and optimizer have the gradient of the update.
  `name`: the name of the recipe, part of the identity of a state. Without one, the words alone are the identity.

  `init(params, **values)` takes a value for each placeholder (`starts.given`) in `start` and `key`. Keyword arguments
  of `update` go to `inner`. The transform has to be the outermost transform on its leaves. Rescaled updates break the
  zeros (`check` detects and names the transform that rescales). Raises `ValueError` at trace time for leaves that
  cannot carry the pattern, and for the state of other parameters or of another identity, see `SparseState`. An `inner`
  that cannot be right is refused, too: a line search across changes of the mask, or an optimizer that calls a function
  of the parameters at a dense master.
  """
  freeze = _freeze(dense_steps, fine_tune_steps, total_steps)
  if slots not in SLOTS:
    raise errors.unknown('sparsejax', 'slots', slots, SLOTS)
  if start is not None and dense_steps:
    raise ValueError(f'sparsejax: dense_steps={dense_steps}, but this recipe chooses its masks at initialisation.')
  if memory is not None and selection.threshold is not None:
    raise ValueError('sparsejax: the selection gives its thresholds to the flow in signals.stats, where a memory would '
                     'be; leave out memory=.')
  if tied and selection.threshold is not None:
    raise ValueError('sparsejax: the selection has a threshold for each leaf, and a leaf that is tied to another has '
                     'none; leave out tied=.')
  method = Method(
      optax.with_extra_args_support(inner), flow, selection, where, axes, refresh, dense_steps, freeze, slots, key,
      allow_empty, memory, start, first, pause, name, tied, probe)
  return _transform(method)


def _transform(method: Method) -> Optimizer:
  return optax.GradientTransformationExtraArgs(functools.partial(_init, method), functools.partial(_update, method))


def _update(method: Method, /, updates: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any):
  call = phases.opened(method, updates, state, params, extra)
  start = phases.resumed(call)
  point, moves = phases.advanced(call, phases.observed(call, start), lambda: phases.pulled_back(call, start))
  point = phases.settled(call, point)
  point = phases.frozen(call, point)
  moves, new = phases.emitted(call, point, start.masks, moves)
  return refusals.marked(moves, call.leaves, state), new


def _init(method: Method, /, params: PyTree, **values: Any) -> SparseState:
  if small.is_stand_in(params):
    return _stand_in(method, params)
  refusals.refuse_unfilled(method.placeholders, values)
  method = method.filled(values)
  leaves = Leaves.of(method, params)
  refusals.refuse_no_arrays(params)
  point = choosing.began(method, leaves, params)
  point = point._replace(inner=method.inner.init(leaves.put(point.weights, params)))
  if method.flow.dense or not method.never:
    refusals.refuse_line_search(point.inner)
  first = SparseState(jnp.zeros((), jnp.int32), plain_key(method.key), *[None] * 4, plans.fresh(leaves.plan))
  return phases.recorded(method, leaves, point, first)


def _stand_in(method: Method, params: PyTree) -> SparseState:
  """Returns the state of optax's stand-in for the parameters, which says to `optax.tree_map_params` what is like them.

  Masks and master are, and a memory of one array a leaf. Everything else is none of the parameters: a plan, too, has to
  be a leaf here, because `tree_map_params` takes the plan of a state over only in the place of a leaf.
  """
  like = method.memory and jax.eval_shape(method.memory.start, jax.ShapeDtypeStruct((2, 3), jnp.float32))
  shaped = method.memory is None and method.selection.threshold is None or getattr(like, 'shape', ()) == (2, 3)
  return SparseState(0, None if method.key is None else 0, params, params, params if shaped else 0,
                     method.inner.init(params), 0)


def under_name(optimizer: Optimizer, name: str) -> Optimizer:
  """Returns the optimizer of a recipe under the recipe's name, which is part of the identity of its states."""
  method = method_of(optimizer)
  return optimizer if method is None else _transform(dataclasses.replace(method, name=name))


def method_of(optimizer: optax.GradientTransformation) -> Method | None:
  """Returns the `Method` of an optimizer that `sparsify` made, or `None`."""
  method = next(iter(getattr(optimizer.init, 'args', ())), None)
  return method if isinstance(method, Method) else None


@checked
def placeholders(optimizer: optax.GradientTransformation) -> tuple[str, ...]:
  """Returns the names of the values that `optimizer.init` has to be given, see `starts.given`.

  An optimizer that is no recipe, or that wraps one, has none.
  """
  method = method_of(optimizer)
  return () if method is None else method.placeholders


def _freeze(dense_steps: int, fine_tune_steps: int, total_steps: int | None) -> int | None:
  """Returns the step at which the mask is fixed for good, or `None`."""
  if total_steps is None:
    if fine_tune_steps:
      raise ValueError('sparsejax: fine_tune_steps counts from the end of training; pass total_steps= too.')
    return None
  if dense_steps + fine_tune_steps > total_steps:
    raise ValueError(f'sparsejax: dense_steps ({dense_steps}) and fine_tune_steps ({fine_tune_steps}) leave nothing of '
                     f'total_steps ({total_steps}) between them.')
  return total_steps - fine_tune_steps if fine_tune_steps else None
