"""Chooses the masks of a sparse optimizer: the first masks in `init`, and new ones in the steps that are due.

    call = Call(method, leaves, state, held, grads, ...)
    point = chosen(call, point, lambda: weights)          # under `jit`, one branch
    point = began(method, leaves, params)                 # in `init`
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import neighbours, ranking, trees
from sparsejax.states import SparseState
from sparsejax.transforms import refusals, tying
from sparsejax.transforms.leaves import Leaves, master_of, plain_key
from sparsejax.transforms.method import Method
from sparsejax.types import Array, PyTree, Signals, hashes


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


def signals_of(call: Call, point: Point, step: Array) -> list[Signals]:
  """Returns the signals of the step that the state is at, or of the step that the update leads to."""
  return call.leaves.signals(step, point.stats, call.grads, call.state.key)


def _seen(call: Call, point: Point) -> list[Signals]:
  """Returns the signals of a choice, with the probe in the place of the gradient where the method has one."""
  probe = call.method.probe
  grads = call.grads if probe is None else call.leaves.probed(probe(call.params))
  return call.leaves.signals(call.step, point.stats, grads, call.state.key)


class Refreshed(NamedTuple):
  """A `Refreshed` is what leaves the branch that chooses masks.

  `thresholds`: `None` if the selection has none. `slots`: the slots of the optimizer that are made fresh. `weights`:
  the weights before the step, if they are to be overwritten after the choice and not before it, else nothing.
  """

  masks: list[Array]
  thresholds: list[Any] | None
  slots: list[Array]
  weights: list[Array]


def chosen(call: Call, point: Point, weights: Callable[[], list[Array]] | None = None, ordered: bool = False) -> Point:
  """Returns the point with the masks of this step, where masks are due, chosen by `weights()`.

  Without `weights`, the weights of the point choose, which are there already. The branch else computes `weights()`.
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
  choose = lambda: _choice(call, point._replace(weights=weights()) if weights else point, slots, old.weights)
  if method.always and jax.default_backend() != 'cpu':
    new = choose()
    # JAX drops an argument that is never read, and its donation with it. XLA removes this reading again.
    new = new._replace(masks=[jax.lax.select(old, mask, mask) for mask, old in zip(new.masks, point.masks)])
  elif isinstance(due := method.due(call.step), jax.core.Tracer):
    spare = method.always and sum(mask.size for mask in point.masks) >= ranking.LARGE
    stay = functools.partial(_stay, old, spare)
    anew = weights and functools.partial(_computed, call, point, weights, slots, stay, old.weights)
    new = jax.lax.cond(due, anew or choose, stay)
  else:  # outside of `jit`, where a `cond` would be compiled at each call
    new = choose() if due else old
  for i, slot in zip(slots, new.slots):
    inner[i] = slot
  stats = point.stats if new.thresholds is None else new.thresholds
  return Point(new.weights if ordered else point.weights, new.masks, stats, jax.tree.unflatten(structure, inner))


def _stay(old: Refreshed, spare: bool) -> Refreshed:
  """Returns what leaves the branch that chooses nothing: `old`, or masks of zeros where that branch is never taken.

  Masks that no branch hands on need no memory beside the new masks, which saves a byte for each weight. The zeros of
  each shape are a kernel of their own, which small leaves are not worth.
  """
  return old._replace(masks=list(map(jnp.zeros_like, old.masks))) if spare else old


def _computed(call: Call, point: Point, weights: Callable[[], list[Array]], slots: Mapping[int, int],
              stay: Callable[[], Refreshed], old: list[Array]) -> Refreshed:
  """Returns the choice by weights that the branch computes by itself. `stay`: the other branch; `old`: its weights."""
  point = point._replace(weights=weights())
  if _reads_once(call, point):
    return _choice(call, point, slots, old)
  # A second branch has the weights as an operand. XLA would compute them anew in each pass over the scores, rounded in
  # different ways, so that the passes would not rank the same scores.
  pick = lambda w: _choice(call, point._replace(weights=w), slots, old)
  return jax.lax.cond(call.method.due(call.step), pick, lambda _: stay(), point.weights)


def _reads_once(call: Call, point: Point) -> bool:
  """Returns whether the selection is known to read each weight of the point once, into a stack."""
  once, leaves = call.method.selection.once, call.leaves
  if once is None:
    return False
  told = leaves.plan.leaves, point.weights, point.masks, signals_of(call, point, call.step)
  return once(*(tying.Tied(once, leaves.leaders).of_leaders(*told) if leaves.leaders else told))


def _choice(call: Call, point: Point, slots: Mapping[int, int], weights: list[Array]) -> Refreshed:
  """Returns the masks that the selection chooses, the slots, fresh where weights have just grown, and `weights`."""
  weights = jax.lax.optimization_barrier(weights)  # JAX leaves out of a `cond` what every branch hands on as it is
  method, leaves = call.method, call.leaves
  new = _selected(method.selection, leaves, point, _seen(call, point))
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
  arrays = [(None if selection.gradient_free else s.grad, s.key, s.stats) for s in signals]
  told = leaves.tied(selection.select), leaves.plan.leaves
  traced = any(isinstance(x, jax.core.Tracer) for x in jax.tree.leaves((point, signals[0].step)))
  select = _select if traced or not hashes(told) else _select_at_once
  masks, thresholds = select(*told, point.weights, point.masks, arrays, signals[0].step)
  masks = [neighbours.alike(mask, w) for mask, w in zip(masks, point.weights)]
  return point._replace(masks=masks, stats=point.stats if thresholds is None else thresholds)


def _select(select: Any, leaves: Any, weights: list[Array], masks: list[Array], arrays: Any, step: Any) -> Any:
  signals = [Signals(grad, key, stats, step, leaf.axes) for (grad, key, stats), leaf in zip(arrays, leaves)]
  return select(leaves, weights, masks, signals)


# A single program outside of `jit` too: its operations would be compiled one by one, and run without fusion.
_select_at_once = jax.jit(_select, static_argnums=(0, 1), inline=True)


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
    method = self.method
    weights = self.weights(masks) if method.start else self.point.weights
    if probe is None and method.probe is not None and method.first is None:
      probe = method.probe(self.place(masks))
    grads = None if probe is None else self.leaves.probed(probe)
    signals = self.signals(step, grads, method.key if key is None else key)
    seen, selection = self.point._replace(weights=weights, masks=masks), method.first or method.selection
    if selection.whole and isinstance(step, int) and selection.whole(step):
      return seen._replace(masks=_whole(weights))
    return _selected(selection, self.chooser, seen, signals)

  def choose(self, masks: list[Array], probe: PyTree | None = None, step: Any = 0, key: Array | None = None,
             given: PyTree | None = None) -> Any:
    """Returns the masks that the selection chooses when it sees `probe` as the gradient, or the masks in `given`."""
    return self.select(masks, probe, step, key).masks if given is None else refusals.masks_of(self.leaves, given)

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
  chooser = leaves if method.first is None else Leaves(
      params, method.where, method.axes, method.first, method.flow, method.tied)
  beginning = Beginning(method, leaves, chooser, params, point)
  if method.start is None:
    point = beginning.select(point.masks)._replace(weights=point.weights)
  else:
    point = point._replace(masks=method.start(beginning.choose, beginning.place, point.masks, method.key))
    refusals.refuse_other_masks(leaves.plan, point.masks)
  if not method.allow_empty:
    refusals.refuse_empty(leaves.plan, point.masks)
  return point._replace(weights=beginning.weights(point.masks))
