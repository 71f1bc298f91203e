"""Defines the phases of one update of a sparse optimizer as functions over a `Point`.

`sparsify.update` calls the phases in the order in which they stand here. Each phase returns the `Point` after it.

    call = Call(method, leaves, state, held, grads, ...)
    point, moves = advanced(call, point, lambda: pulled_back(call, point))
    point = settled(call, point)
"""

from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from sparsejax import flows, kinds, neighbours, plans
from sparsejax.programs import again
from sparsejax.states import SparseState
from sparsejax.transforms import choosing, refusals
from sparsejax.transforms.choosing import Call, Point, signals_of
from sparsejax.transforms.leaves import Leaves
from sparsejax.transforms.method import Method
from sparsejax.types import Array, Flow, PyTree, Signals, hashes


def opened(method: Method, updates: PyTree, state: SparseState, params: PyTree | None, extra: Any) -> Call:
  """Returns the checked arguments of one `update`. Raises `ValueError` where they do not belong together."""
  refusals.refuse_no_params(updates, params)
  leaves = Leaves.of(method, params)
  refusals.refuse_others(leaves.plan, state)
  refusals.refuse_damaged(leaves, state, method.key is not None)
  refusals.refuse_other_shapes(leaves, state, updates)
  refusals.refuse_other_memory(method.memory, leaves, state)
  if method.flow.dense:
    refusals.refuse_functions(extra)
  return Call(method, leaves, state, params, updates, leaves.pick(params), leaves.pick(updates),
              optax.safe_increment(state.step), extra)


def resumed(call: Call) -> Point:
  """Returns the point at which the state stands."""
  state, pick = call.state, call.leaves.pick
  weights = pick(state.master) if call.method.flow.dense else call.held
  masks = [mask.astype(bool) for mask in pick(state.masks)]  # optax.contrib.sam blends old and new states as numbers
  return Point(weights, masks, pick(state.stats), state.inner)


def pulled_back(call: Call, point: Point) -> list[Array]:
  """Returns the gradients of the master: the gradients at the sparse point, pulled back by the flow."""
  rows, signals = zip(call.grads, point.weights, point.masks), signals_of(call, point, call.state.step)
  return _each(_pulled, call.method.until_freeze, rows, signals)


def _pulled(flow: Flow, g: Array, w: Array, m: Array, s: Signals) -> Array:
  return flow.pull_back(g.astype(w.dtype), w, m, s)


def observed(call: Call, point: Point) -> Point:
  """Returns the point with the memory updated, once per step, before the weights move.

  An entry that would not be finite stays as it was: an optimizer may skip a step with such gradients
  (`optax.apply_if_finite`), and the memory would keep a NaN for ever. The rule holds for each entry, since a rule for
  the whole step would read all gradients once more. In a skipped step the finite entries are taken in.
  """
  memory = call.method.memory
  if memory is None:
    return point
  rows = zip(point.stats, point.weights, signals_of(call, point, call.state.step))
  return point._replace(stats=[jax.tree.map(_where_finite, memory.observe(*row), row[0]) for row in rows])


def _where_finite(new: Array, old: Array) -> Array:
  """Returns the entries of `new` that are finite, and the entries of `old` in the place of the others."""
  return jnp.where(jnp.isfinite(new), new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new


def advanced(call: Call, point: Point, gradients: Callable[[], list[Array]]) -> tuple[Point, PyTree]:
  """Returns the point after the optimizer's step and the choice of the masks, and the optimizer's updates.

  Masks are chosen by the weights after the step. With `pause`, a step that chooses masks moves nothing, so that the
  choice comes first: XLA would otherwise compute the step once more, for weights that are thrown away.
  """
  method = call.method
  if method.pause:
    return _paused(call, choosing.chosen(call, point), gradients)
  step = stepped(call, point, gradients)
  if method.once:  # a program for a single choice is not worth its size
    step = step._replace(again=None)
  after, later = point._replace(inner=step.second), step.again is not None and method.memory is not None
  if method.flow.dense and not later:
    after = after._replace(weights=_moved(call, point, step.first))
    return choosing.chosen(call, after), step.first
  # Between two choices nothing reads the weights after the step, so that the branch computes them by itself.
  weights = lambda: _moved(call, point, step.first if step.again is None else step.again(step.second))
  new = choosing.chosen(call, after, weights, later and method.flow.dense)
  moves = step.again(new.inner) if step.again and step.entrywise and method.slots == 'fresh' else step.first
  return new._replace(weights=_moved(call, new, moves)) if method.flow.dense else new, moves


def _paused(call: Call, point: Point, gradients: Callable[[], list[Array]]) -> tuple[Point, PyTree]:
  """Returns what `advanced` does, after the choice: a step that chose masks leaves weights and state as they are."""
  step, due = stepped(call, point, gradients), call.method.due(call.step)
  if not isinstance(due, jax.core.Tracer):  # outside of `jit`, where a selection would be compiled for each shape
    still = lambda old, new: old if due else new
  else:
    still = lambda old, new: jax.tree.map(lambda a, b: jnp.where(due, a, b), old, new)
  inner = still(point.inner, step.second)
  moves = step.again(inner) if step.again else step.first
  moves = still(jax.tree.map(jnp.zeros_like, moves), moves)
  return point._replace(weights=_moved(call, point, moves), inner=inner), moves


def stepped(call: Call, point: Point, gradients: Callable[[], list[Array]]) -> again.Halves:
  """Returns the step of the user's optimizer: the updates of all parameters, and the optimizer's next state."""
  put, update = call.leaves.put, call.method.inner.update
  return again.halves(lambda inner: update(put(gradients(), call.updates), inner, put(point.weights, call.params),
                                           **call.extra), point.inner)


def _moved(call: Call, point: Point, moves: PyTree) -> list[Array]:
  """Returns the weights of the point after the optimizer's updates."""
  told = point.weights, call.leaves.pick(moves)
  traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves(told))
  return _sums(*told) if traced else _sums_at_once(*told)


def _sums(weights: list[Array], updates: list[Array]) -> list[Array]:
  # An operation of `lax` takes a third of the time of an operator to trace, and a step has one for each leaf.
  moved = lambda w, u: lax.add(w, u) if jax.typeof(w) == jax.typeof(u) else (w + u).astype(w.dtype)
  return [moved(w, u) for w, u in zip(weights, updates)]


_sums_at_once = jax.jit(_sums)


def _each(function: Callable[..., Array], flow: Flow, rows: Iterable[tuple[Array, ...]], signals: list[Signals]
          ) -> list[Array]:
  """Returns `function(flow, *row, signals)` of each leaf. Leaves of one kind share a program, which is traced once."""
  rows, axes = list(rows), tuple(own.axes for own in signals)
  if not rows:
    return []
  told = [(*row, own._replace(step=None, axes=None)) for row, own in zip(rows, signals)]
  if not any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((rows, signals))):
    at_once = _at_once if hashes((flow, axes)) else _of_all
    return at_once(function, flow, axes, told, signals[0].step)
  now = flows.at(flow, signals[0].step)
  one = lambda axes, row: function(now, *row[:-2], row[-2]._replace(step=row[-1], axes=axes))
  return kinds.each(one, axes, told, (signals[0].step,), inline=True)


def _of_all(function: Callable[..., Array], flow: Flow, axes: Any, rows: Any, step: Any) -> list[Array]:
  return [function(flow, *row[:-1], row[-1]._replace(step=step, axes=own)) for row, own in zip(rows, axes)]


# A single program for all leaves outside of `jit`: each operation by itself would be compiled for each shape.
_at_once = jax.jit(_of_all, static_argnums=(0, 1, 2))


def settled(call: Call, point: Point) -> Point:
  """Returns the point with the weights that the flow settles at, after the step and the choice of the masks."""
  settle = call.method.until_freeze.settle
  if settle is None:
    return point
  signals = call.leaves.signals(call.step, point.stats)
  return point._replace(weights=[settle(w, m, s) for w, m, s in zip(point.weights, point.masks, signals)])


def frozen(call: Call, point: Point) -> Point:
  """Returns the point whose master becomes the sparse point at step `freeze`, where the fine-tune phase begins."""
  method = call.method
  if method.freeze is None or not method.flow.dense:
    return point
  project, signals = method.flow.project, call.leaves.signals(call.step, point.stats)
  return point._replace(weights=[
      jnp.where(call.step == method.freeze, jnp.where(m, project(w, m, s), 0).astype(w.dtype), w)
      for w, m, s in zip(point.weights, point.masks, signals)])


def emitted(call: Call, point: Point, before: list[Array], moves: PyTree) -> tuple[PyTree, SparseState]:
  """Returns the updates that move the user's parameters to the sparse point, and the new state.

  With a master the update is q - p, recomputed from the master: the part that p + (q - p) rounds away returns with the
  next step. Without a master a kept weight moves by the optimizer's update, and a weight that has just grown stays at
  zero.
  """
  flow, signals = call.method.until_freeze, call.leaves.signals(call.step, point.stats)
  if call.method.flow.dense:
    deltas = _each(_to_point, flow, zip(call.held, point.masks, point.weights), signals)
  else:
    deltas = _each(_kept_moves, flow, zip(call.held, point.masks, before, call.leaves.pick(moves)), signals)
  return call.leaves.put(deltas, moves), recorded(call.method, call.leaves, point, call.state._replace(step=call.step))


def _to_point(flow: Flow, p: Array, m: Array, w: Array, s: Signals) -> Array:
  return flow.project(w, m, s).astype(p.dtype) - p


def _kept_moves(flow: Flow, p: Array, m: Array, old: Array, u: Array, s: Signals) -> Array:
  return neighbours.where_kept(m & old, u.astype(p.dtype), flow.project(p, m, s) - p)  # both are 0 where m has grown


def recorded(method: Method, leaves: Leaves, point: Point, state: SparseState) -> SparseState:
  """Returns `state`, of which step, key and identity hold, with the point recorded in it."""
  master = leaves.put(point.weights if method.flow.dense else None)
  return state._replace(masks=leaves.put(point.masks), master=master, stats=leaves.put(point.stats), inner=point.inner,
                        plan=leaves.plan.carrying(plans.owned(state.plan.identity)))
