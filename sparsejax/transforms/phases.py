"""Defines the phases of one update of a sparse optimizer, and of its `init`, as functions over a `Point`.

`sparsify.update` calls the phases in the order in which they stand here. Each phase returns the `Point` after it.

    call = Call(method, leaves, state, held, grads, ...)
    point, moves = advanced(call, point, lambda: pulled_back(call, point))
    point = settled(call, point)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import flows, neighbours, plans, trees
from sparsejax.programs import again
from sparsejax.states import SparseState
from sparsejax.transforms import refusals
from sparsejax.transforms.leaves import Leaves, master_of, plain_key
from sparsejax.transforms.method import Method
from sparsejax.types import Array, PyTree, Signals


class Point(NamedTuple):
  """A `Point` is where a sparse optimizer stands: lists over the sparse leaves, and the state of the user's optimizer.

  `weights`: the master where the flow stores one, else the user's parameters. `stats`: thresholds, or the memory.
  """

  weights: list[Array]
  masks: list[Array]
  stats: list[Any]
  inner: Any


class Call(NamedTuple):
  """A `Call` holds the arguments of one `update`: whole trees (`params`, `updates`), and the sparse leaves of them.

  `held`: the sparse parameters that the user holds. `grads`: their gradients. `step`: the step after the update.
  """

  method: Method
  leaves: Leaves
  state: SparseState
  params: PyTree
  updates: PyTree
  held: list[Array]
  grads: list[Array]
  step: Array
  extra: Mapping[str, Any]


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
  return [call.method.until_freeze.pull_back(g.astype(w.dtype), w, m, s)
          for g, w, m, s in zip(call.grads, point.weights, point.masks, _signals(call, point, call.state.step))]


def observed(call: Call, point: Point) -> Point:
  """Returns the point with the memory updated, once per step, before the weights move.

  An entry that would not be finite stays as it was: an optimizer may skip a step with such gradients
  (`optax.apply_if_finite`), and the memory would keep a NaN for ever. The rule holds for each entry, since a rule for
  the whole step would read all gradients once more. In a skipped step the finite entries are taken in.
  """
  memory = call.method.memory
  if memory is None:
    return point
  rows = zip(point.stats, point.weights, _signals(call, point, call.state.step))
  return point._replace(stats=[jax.tree.map(_where_finite, memory.observe(*row), row[0]) for row in rows])


def _where_finite(new: Array, old: Array) -> Array:
  """Returns the entries of `new` that are finite, and the entries of `old` in the place of the others."""
  return jnp.where(jnp.isfinite(new), new, old) if jnp.issubdtype(new.dtype, jnp.inexact) else new


def _signals(call: Call, point: Point, step: Array) -> list[Signals]:
  """Returns the signals of the step that the state is at, or of the step that the update leads to."""
  return call.leaves.signals(step, point.stats, call.grads, call.state.key)


def advanced(call: Call, point: Point, gradients: Callable[[], list[Array]]) -> tuple[Point, PyTree]:
  """Returns the point after the optimizer's step and the choice of the masks, and the optimizer's updates.

  Masks are chosen by the weights after the step. With `pause`, a step that chooses masks moves nothing, so that the
  choice comes first: XLA would otherwise compute the step once more, for weights that are thrown away.
  """
  method = call.method
  if method.pause:
    return _paused(call, chosen(call, point, lambda: point.weights), gradients)
  step = stepped(call, point, gradients)
  if method.once:  # a program for a single choice is not worth its size
    step = step._replace(again=None)
  after, later = point._replace(inner=step.second), step.again is not None and method.memory is not None
  if method.flow.dense and not later:
    after = after._replace(weights=_moved(call, point, step.first))
    return chosen(call, after, lambda: after.weights), step.first
  # Between two choices nothing reads the weights after the step, so that the branch computes them by itself.
  weights = lambda: _moved(call, point, step.first if step.again is None else step.again(step.second))
  new = chosen(call, after, weights, later and method.flow.dense)
  moves = step.again(new.inner) if step.again and step.entrywise and method.slots == 'fresh' else step.first
  return new._replace(weights=_moved(call, new, moves)) if method.flow.dense else new, moves


def _paused(call: Call, point: Point, gradients: Callable[[], list[Array]]) -> tuple[Point, PyTree]:
  """Returns what `advanced` does, after the choice: a step that chose masks leaves weights and state as they are."""
  step, due = stepped(call, point, gradients), call.method.due(call.step)
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
  return [(w + u).astype(w.dtype) for w, u in zip(point.weights, call.leaves.pick(moves))]


class Refreshed(NamedTuple):
  """A `Refreshed` is what leaves the branch that chooses masks.

  `thresholds`: `None` if the selection has none. `slots`: the slots of the optimizer that are made fresh. `weights`:
  the weights before the step, if they are to be overwritten after the choice and not before it, else nothing.
  """

  masks: list[Array]
  thresholds: list[Any] | None
  slots: list[Array]
  weights: list[Array]


def chosen(call: Call, point: Point, weights: Callable[[], list[Array]], ordered: bool = False) -> Point:
  """Returns the point with the masks of this step, where masks are due, chosen by `weights()`.

  A schedule that is never due takes no branch, and one that is always due takes one on CPUs alone: XLA:CPU computes a
  mask once for each result that needs it, and a branch only once. A `cond` copies its results, so that only what is
  changed leaves the branch. `ordered`: the weights of the point leave it too, as they are. XLA then sees that they are
  overwritten after the memory has read them, and makes no copy.
  """
  method = call.method
  if method.never:
    return point
  inner, structure = jax.tree.flatten(point.inner)
  slots = call.leaves.slots(point.inner) if method.slots == 'fresh' else {}
  thresholds = None if method.selection.threshold is None else point.stats
  old = Refreshed(point.masks, thresholds, [inner[i] for i in slots], point.weights if ordered else [])
  choose = lambda: _choice(call, point._replace(weights=weights()), slots, old.weights)
  if method.always and jax.default_backend() != 'cpu':
    new = choose()
    # JAX drops an argument that is never read, and its donation with it. XLA removes this reading again.
    new = new._replace(masks=[jax.lax.select(old, mask, mask) for mask, old in zip(new.masks, point.masks)])
  elif isinstance(due := method.due(call.step), jax.core.Tracer):
    # The second branch has the weights as an operand. XLA would compute them anew in each pass over the scores, rounded
    # in different ways, so that the passes would not rank the same scores.
    pick = lambda w: _choice(call, point._replace(weights=w), slots, old.weights)
    within = lambda w: jax.lax.cond(due, pick, lambda _: old, w)
    new = jax.lax.cond(due, lambda: within(weights()), lambda: old)
  else:  # outside of `jit`, where a `cond` would be compiled at each call
    new = choose() if due else old
  for i, slot in zip(slots, new.slots):
    inner[i] = slot
  stats = point.stats if new.thresholds is None else new.thresholds
  return Point(new.weights if ordered else point.weights, new.masks, stats, jax.tree.unflatten(structure, inner))


def _choice(call: Call, point: Point, slots: Mapping[int, int], weights: list[Array]) -> Refreshed:
  """Returns the masks that the selection chooses, the slots, fresh where weights have just grown, and `weights`."""
  weights = jax.lax.optimization_barrier(weights)  # JAX leaves out of a `cond` what every branch hands on as it is
  method, leaves = call.method, call.leaves
  new = _selected(method.selection, leaves, point, _signals(call, point, call.step))
  thresholds = None if method.selection.threshold is None else new.stats
  if not slots:
    return Refreshed(new.masks, thresholds, [], weights)
  grown = [now & ~before for now, before in zip(new.masks, point.masks)]
  fresh = jax.tree.leaves(method.inner.init(leaves.put(point.weights, call.params)))
  held = jax.tree.leaves(point.inner)
  renewed = [jnp.where(grown[k], fresh[i], held[i]) for i, k in slots.items()]
  return Refreshed(new.masks, thresholds, renewed, weights)


def _selected(selection: Any, leaves: Leaves, point: Point, signals: list[Signals]) -> Point:
  """Returns the point with the masks of `selection`, sharded like their weights, and with its thresholds."""
  arrays = [(s.grad, s.key, s.stats) for s in signals]
  told = selection.select, leaves.plan.leaves
  traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((point, signals[0].step)))
  select = _select if traced or not flows.hashes(told) else _select_at_once
  masks, thresholds = select(*told, point.weights, point.masks, arrays, signals[0].step)
  masks = [neighbours.alike(mask, w) for mask, w in zip(masks, point.weights)]
  return point._replace(masks=masks, stats=point.stats if thresholds is None else thresholds)


def _select(select: Any, leaves: Any, weights: list[Array], masks: list[Array], arrays: Any, step: Any) -> Any:
  signals = [Signals(grad, key, stats, step, leaf.axes) for (grad, key, stats), leaf in zip(arrays, leaves)]
  return select(leaves, weights, masks, signals)


# A single program outside of `jit` too: its operations would be compiled one by one, and run without fusion.
_select_at_once = jax.jit(_select, static_argnums=(0, 1), inline=True)


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
  project, signals = call.method.until_freeze.project, call.leaves.signals(call.step, point.stats)
  rows = zip(point.masks, before, point.weights, call.leaves.pick(moves), call.held, signals)
  if call.method.flow.dense:
    deltas = [project(w, m, s).astype(p.dtype) - p for m, _, w, _, p, s in rows]
  else:
    deltas = [jnp.where(m, jnp.where(old, u.astype(p.dtype), 0), project(p, m, s) - p) for m, old, _, u, p, s in rows]
  return call.leaves.put(deltas, moves), recorded(call.method, call.leaves, point, call.state._replace(step=call.step))


def recorded(method: Method, leaves: Leaves, point: Point, state: SparseState) -> SparseState:
  """Returns `state`, of which step, key and identity hold, with the point recorded in it."""
  master = leaves.put(point.weights if method.flow.dense else None)
  return state._replace(masks=leaves.put(point.masks), master=master, stats=leaves.put(point.stats), inner=point.inner,
                        plan=leaves.plan.carrying(plans.owned(state.plan.identity)))


class Beginning(NamedTuple):
  """A `Beginning` holds what the first choice of masks needs: its methods are the `choose` and `place` of a start.

  `leaves`: of the method. `chooser`: the leaves with the plan of `method.first`, where that is given.
  """

  method: Method
  leaves: Leaves
  chooser: Leaves
  params: PyTree
  point: Point

  def signals(self, step: Any = 0, grads: Any = None, key: Array | None = None) -> list[Signals]:
    return self.leaves.signals(jnp.asarray(step, jnp.int32), self.point.stats, grads, plain_key(key))

  def weights(self, masks: list[Array]) -> list[Array]:
    """Returns the weights with which training begins under `masks`."""
    begin = self.method.flow.begin
    if begin is None:
      return self.point.weights
    return [begin(*each) for each in zip(self.point.weights, masks, self.signals(key=self.method.key))]

  def select(self, masks: list[Array], probe: PyTree | None = None, step: Any = 0, key: Array | None = None) -> Point:
    """Returns the point with the masks that the selection chooses when it sees `probe` as the gradient."""
    weights = self.weights(masks) if self.method.start else self.point.weights
    signals = self.signals(step, probe and self.leaves.pick(probe), self.method.key if key is None else key)
    seen = self.point._replace(weights=weights, masks=masks)
    return _selected(self.method.first or self.method.selection, self.chooser, seen, signals)

  def choose(self, masks: list[Array], probe: PyTree | None = None, step: Any = 0, key: Array | None = None) -> Any:
    """Returns the masks that the selection chooses when it sees `probe` as the gradient."""
    return self.select(masks, probe, step, key).masks

  def place(self, masks: list[Array]) -> PyTree:
    """Returns the whole parameter pytree at the point of `masks`."""
    rows = zip(self.weights(masks), masks, self.signals(key=self.method.key), self.leaves.pick(self.params))
    project = self.method.until_freeze.project
    return self.leaves.put([project(w, m, s).astype(p.dtype) for w, m, s, p in rows], self.params)


def began(method: Method, leaves: Leaves, params: PyTree) -> Point:
  """Returns the point before the first update, without the state of the user's optimizer."""
  weights = [master_of(w) if method.flow.dense else w for w in leaves.pick(params)]
  if method.memory is not None:
    stats = [method.memory.start(w) for w in weights]
  else:
    level = method.selection.threshold
    stats = [trees.DENSE if level is None else jnp.float32(level) for _ in weights]
  point = Point(weights, _whole(weights), stats, None)
  if not method.allow_empty:
    refusals.refuse_empty(leaves.plan)
  return point if method.dense_steps else first_masks(method, leaves, params, point)


@functools.partial(jax.jit, inline=True)
def _whole(weights: list[Array]) -> list[Array]:
  """Returns masks that keep everything, by a single program outside of `jit` too."""
  return [neighbours.everywhere(w) for w in weights]


def first_masks(method: Method, leaves: Leaves, params: PyTree, point: Point) -> Point:
  """Returns the point with the first masks, and with the weights that go with them."""
  chooser = leaves if method.first is None else Leaves(params, method.where, method.axes, method.first, method.flow)
  beginning = Beginning(method, leaves, chooser, params, point)
  if method.start is None:
    point = beginning.select(point.masks)._replace(weights=point.weights)
  else:
    point = point._replace(masks=method.start(beginning.choose, beginning.place, point.masks, method.key))
    refusals.refuse_other_masks(leaves.plan, point.masks)
  if not method.allow_empty:
    refusals.refuse_empty(leaves.plan, point.masks)
  return point._replace(weights=beginning.weights(point.masks))
