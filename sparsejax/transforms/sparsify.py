"""The words as one optax transform around the user's optimizer.

The user's parameters are the sparse ones after every `optax.apply_updates`: a pruned weight's update is minus the
weight. Flows that need dense weights behind the zeros keep them in the state as `master`; the gradient, taken at the
sparse point, is pulled back to the master, the user's optimizer updates the master, and the update that comes out moves
the user's parameters to the new sparse point. `optax.contrib.schedule_free` works the same way.
"""

import dataclasses
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import errors, flows, neighbours, patterns, schedules, trees
from sparsejax.selections import Selection
from sparsejax.states import Plan, SparseState
from sparsejax.types import Array, Axes, Flow, Predicate, PyTree, Schedule, Signals

_KEYS = 'threefry2x32'
SLOTS = ('kept', 'fresh')
_LINE_SEARCHES = (optax.ScaleByLBFGSState, optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)


def sparsify(
    inner: optax.GradientTransformation,
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
) -> optax.GradientTransformationExtraArgs:
  """Wraps `inner` so that the parameters it trains are sparse: the one transform behind every recipe.

  `where`: the sparse leaves, a predicate `(path, leaf)` or a prefix pytree of bools; default `trees.matrices`, and with
    `axes` those of them that the traced program contracts.
  `axes`: `sparsejax.contractions(...)`, or any mapping from paths to `Axes`; default the naming conventions.
  `refresh`: when masks are chosen anew, a schedule of bools on the step from the end of the dense phase.
  `dense_steps`: nothing is pruned for so many updates. `fine_tune_steps`: in the last so many of `total_steps` the mask
    is fixed, only kept weights get gradients and the pruned ones are gone from the master too.
  `slots`: what the optimizer remembers of a weight that returns: what it had (`'kept'`), or what `init` gives it
    (`'fresh'`). A slot is an array in `inner`'s state whose path ends in the parameter's and that has its shape, so
    that factored ones, which belong to a row or a column, stay as they are.

  `key`: what random scores draw from. `allow_empty`: a layer may lose all of its weights, which is refused otherwise:
    where the count is known from the shapes at trace time, else in `init`, unless that is traced.

  Keyword arguments of `update` go to `inner`. It has to be the outermost transform on its leaves: one that rescales its
  updates breaks the zeros (`check` finds and names it). Raises `ValueError` at trace time for leaves that cannot carry
  the pattern, for parameters of another state, and for an `inner` that cannot be right: a line search across changes of
  the mask, or one that calls a function of the parameters at a dense master.
  """
  freeze = _freeze_step(dense_steps, fine_tune_steps, total_steps)
  if slots not in SLOTS:
    raise errors.unknown('sparsejax', 'slots', slots, SLOTS)
  inner = optax.with_extra_args_support(inner)
  method, flow = flow, flow if freeze is None else flows.until(flow, freeze)
  always = freeze is None and dense_steps == 0 and refresh == schedules.every(1)
  never = dense_steps == 0 and refresh == schedules.once(0)  # `init` has chosen

  def due(step: Array) -> Array:
    in_time = (step >= dense_steps) if freeze is None else (step >= dense_steps) & (step <= freeze)
    return in_time & ((step == freeze) | refresh(step - dense_steps))

  if selection.start is not None and dense_steps:
    raise ValueError(f'sparsejax: dense_steps={dense_steps}, but this recipe chooses its masks at initialisation.')

  def chosen(select, tree: _Leaves, weights, masks, signals):
    masks, stats = select(tree.plan.leaves, weights, masks, signals)
    masks = [neighbours.alike(mask, w) for mask, w in zip(masks, weights)]
    return masks, [s.stats for s in signals] if selection.observe else stats

  def choose(tree: _Leaves, weights, masks, stats, signals):
    if never:
      return masks, stats
    compute = lambda: chosen(selection.select, tree, weights, masks, signals)
    if always:
      new, stats = compute()
      # JAX drops an argument that nothing reads, and with it its donation. XLA takes this reading away again.
      return [mask & (old | True) for mask, old in zip(new, masks)], stats
    # Only masks and what comes of them leave the branch: whatever a cond returns, it copies.
    if selection.observe:
      return jax.lax.cond(due(signals[0].step), lambda: compute()[0], lambda: masks), stats
    return jax.lax.cond(due(signals[0].step), compute, lambda: (masks, stats))

  def first(tree: _Leaves, params: PyTree, weights, masks, stats):
    """The first masks and stats, and the weights that go with them."""
    def signals(step=0, grads=None, key=key):
      return tree.signals(jnp.asarray(step, jnp.int32), stats, grads, _plain(key))

    begun = lambda masks: [flow.begin(*each) for each in zip(weights, masks, signals())] if flow.begin else weights
    choose = lambda masks, probe=None, step=0, key=key: chosen(
        selection.first or selection.select, tree, begun(masks) if selection.start else weights, masks,
        signals(step, probe and tree.pick(probe), key))
    place = lambda masks: tree.put([flow.project(*each).astype(p.dtype) for *each, p in zip(
        begun(masks), masks, signals(), tree.pick(params))], params)
    if selection.start is None:
      masks, stats = choose(masks)
    else:
      masks = selection.start(lambda *args, **options: choose(*args, **options)[0], place, masks, key)
    if not allow_empty:
      _refuse_empty(tree.plan, masks)
    return masks, stats, begun(masks)

  def init(params: PyTree) -> SparseState:
    tree = _Leaves(params, where, axes, selection, flow)
    weights = [_master_of(w) if flow.dense else w for w in tree.pick(params)]
    masks = [neighbours.everywhere(w) for w in weights]
    stats = [selection.stat(w) for w in weights]
    if not allow_empty:
      _refuse_empty(tree.plan)
    if dense_steps == 0:
      masks, stats, weights = first(tree, params, weights, masks, stats)
    inner_state = inner.init(tree.put(weights, params))
    if flow.dense or not never:
      _refuse_line_search(inner_state)
    return SparseState(
        step=jnp.zeros((), jnp.int32), key=_plain(key), masks=tree.put(masks),
        master=tree.put(weights if flow.dense else None), stats=tree.put(stats), inner=inner_state, plan=tree.plan)

  def update(grads: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any):
    if params is None:
      raise ValueError('sparsejax: update needs the parameters: tx.update(grads, state, params).')
    tree = _Leaves(params, where, axes, selection, flow)
    tree.check_belongs(state, grads)
    if flow.dense:
      _refuse_functions(extra)
    held, grad, masks, stats = (tree.pick(t) for t in (params, grads, state.masks, state.stats))
    weights, step = tree.pick(state.master) if flow.dense else held, optax.safe_increment(state.step)
    signals = tree.signals(state.step, stats, grad, state.key)
    pulled = [flow.pull_back(g.astype(w.dtype), w, m, s) for g, w, m, s in zip(grad, weights, masks, signals)]
    if selection.observe:
      stats = [selection.observe(*each) for each in zip(stats, weights, signals)]
    moves, inner_state = inner.update(tree.put(pulled, grads), state.inner, tree.put(weights, params), **extra)
    if selection.instead:
      pause = lambda old, new: jax.tree.map(lambda a, b: jnp.where(due(step), a, b), old, new)
      moves, inner_state = pause(jax.tree.map(jnp.zeros_like, moves), moves), pause(state.inner, inner_state)
    moved = tree.pick(moves)
    weights = [(w + u).astype(w.dtype) for w, u in zip(weights, moved)]

    before = masks
    masks, stats = choose(tree, weights, masks, stats, tree.signals(step, stats, grad, state.key))
    signals = tree.signals(step, stats)
    if flow.settle is not None:
      weights = [flow.settle(w, m, s) for w, m, s in zip(weights, masks, signals)]
    if slots == 'fresh':
      grown = [new & ~old for new, old in zip(masks, before)]
      inner_state = tree.refreshed(inner_state, inner.init(tree.put(weights, params)), grown)
    if freeze is not None and flow.dense:
      weights = [jnp.where(step == freeze, jnp.where(m, method.project(w, m, s), 0).astype(w.dtype), w)
                 for w, m, s in zip(weights, masks, signals)]
    if flow.dense:
      # Recomputed from the master, not accumulated: what p + (q - p) rounds away is back after the next step.
      moved = [flow.project(w, m, s).astype(p.dtype) - p for w, m, s, p in zip(weights, masks, signals, held)]
    else:  # what has just grown stays as it was, at zero
      moved = [jnp.where(m, jnp.where(old, u.astype(p.dtype), 0), flow.project(p, m, s) - p)
               for m, old, u, p, s in zip(masks, before, moved, held, signals)]
    return tree.put(moved, moves), SparseState(
        step=step, key=state.key, masks=tree.put(masks), master=tree.put(weights if flow.dense else None),
        stats=tree.put(stats), inner=inner_state, plan=tree.plan)

  return optax.GradientTransformationExtraArgs(init, update)


def identity(inner: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
  """`inner` in a `SparseState` with no sparse leaf: what it would do alone, under the same tools as every recipe."""
  inner = optax.with_extra_args_support(inner)

  def wrap(params: PyTree, step: Array, inner_state: Any) -> SparseState:
    nothing = jax.tree.map(lambda _: trees.DENSE, params)
    return SparseState(step, None, nothing, nothing, nothing, inner_state, Plan())

  def init(params: PyTree) -> SparseState:
    return wrap(params, jnp.zeros((), jnp.int32), inner.init(params))

  def update(grads: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any):
    moves, inner_state = inner.update(grads, state.inner, params, **extra)
    return moves, wrap(grads, optax.safe_increment(state.step), inner_state)

  return optax.GradientTransformationExtraArgs(init, update)


def gated(
    selection: Selection, *, where: Predicate | PyTree | None = None, axes: Mapping[str, Axes] | None = None,
    weight_decay: float = 0.0) -> optax.GradientTransformation:
  """Passes the gradients of the weights that `selection` picks at this very step, zero for all other sparse ones.

  For in front of an optimizer, inside of a recipe with the same `where` and `axes`. `weight_decay` times the weight is
  added to all of the sparse ones, picked or not.
  """
  def update(grads: PyTree, state: optax.EmptyState, params: PyTree | None = None):
    tree = _Leaves(params, where, axes, selection, flows.hard())
    weights, picked = tree.pick(params), tree.pick(grads)
    signals = tree.signals(jnp.zeros((), jnp.int32), [trees.DENSE] * len(weights), picked)
    active, _ = selection.select(tree.plan.leaves, weights, [neighbours.everywhere(w) for w in weights], signals)
    passed = [jnp.where(m, g, 0) + (weight_decay * w).astype(g.dtype) for m, g, w in zip(active, picked, weights)]
    return tree.put(passed, grads), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def only(*, where: Predicate | PyTree | None = None, axes: Mapping[str, Axes] | None = None,
         ) -> optax.GradientTransformation:
  """Passes the updates of the sparse leaves; all others stand still. For behind an optimizer, inside of a recipe."""
  def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None):
    leaves, treedef = jax.tree.flatten(updates)
    picked = trees.select('sparsejax', where or _default_where(axes), params)
    return treedef.unflatten([u if p else jnp.zeros_like(u) for u, p in zip(leaves, picked)]), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class _Leaves:
  """One call's view of the parameters: which leaves are sparse, and what was asked of them."""

  def __init__(self, params: PyTree, where: Any, axes: Mapping[str, Axes] | None, selection: Selection, flow: Flow):
    self.paths, leaves, self.treedef = trees.flatten(params)
    paths = self.paths
    picked = trees.select('sparsejax', where or _default_where(axes), params)
    self.index = [i for i, pick in enumerate(picked) if pick]
    arrays = {paths[i]: leaves[i] for i in self.index}
    for path, leaf in arrays.items():
      if leaf.dtype.itemsize < 2:
        raise errors.at_leaf('sparsejax', path, leaf.shape, f'an update of dtype {leaf.dtype} cannot carry the step '
                             'from one sparse point to the next. Keep the parameter in bfloat16 and cast it in the '
                             'forward pass, or leave it out of `where`.')
    self.plan = selection.plan(arrays, {p: trees.axes_of('sparsejax', axes, p, w.shape) for p, w in arrays.items()})
    self.plan, self.keeps_master = dataclasses.replace(self.plan, flow=_static(flow)), flow.dense

  def pick(self, tree: PyTree) -> list[Any]:
    """The sparse leaves of a tree with the parameters' structure. Raises `ValueError` if it has another."""
    try:
      leaves = self.treedef.flatten_up_to(tree)
    except ValueError as problem:
      others = trees.flatten(tree, is_leaf=trees.is_dense)[0]
      odd = errors.some(sorted({*self.paths} ^ {*others}))
      raise ValueError(f'sparsejax: parameters, gradients and state are not of one structure; they differ in {odd}. '
                       'Make the state by tx.init(params), the gradients of the same params.') from problem
    return [leaves[i] for i in self.index]

  def put(self, values: Sequence[Any] | None, base: PyTree | None = None) -> PyTree:
    """A tree with `values` at the sparse leaves, and `base`'s leaves or nothing elsewhere."""
    size = self.treedef.num_leaves
    leaves = [trees.DENSE] * size if base is None else self.treedef.flatten_up_to(base)
    for i, value in zip(self.index, values or [trees.DENSE] * size):
      leaves[i] = value
    return self.treedef.unflatten(leaves)

  def refreshed(self, inner_state: Any, fresh: Any, grown: Sequence[Array]) -> Any:
    """`inner_state` with the slots of the `grown` weights as in `fresh`."""
    names, leaves, treedef = trees.flatten(inner_state)
    sparse = {self.paths[i]: mask for i, mask in zip(self.index, grown)}
    for i, (name, new) in enumerate(zip(names, jax.tree.leaves(fresh))):
      owner = max((path for path in self.paths if f'/{name}'.endswith(f'/{path}')), key=len, default=None)
      if owner in sparse and sparse[owner].shape == new.shape:
        leaves[i] = jnp.where(sparse[owner], new, leaves[i])
    return treedef.unflatten(leaves)

  def signals(self, step: Array, stats: Sequence[Any], grads: Sequence[Any] | None = None, key=None) -> list[Signals]:
    """What the words may look at, one `Signals` for each sparse leaf."""
    now = key if key is None else jax.random.fold_in(jax.random.wrap_key_data(key, impl=_KEYS), step)
    # By the path, so that what else is sparse does not change a leaf's draw.
    names = [zlib.crc32(leaf.path.encode()) for leaf in self.plan.leaves]
    keys = [now if now is None else jax.random.fold_in(now, np.uint32(name)) for name in names]
    grads = [None] * len(self.index) if grads is None else grads
    return [Signals(*each, step, leaf.axes) for *each, leaf in zip(grads, keys, stats, self.plan.leaves)]

  def check_belongs(self, state: SparseState, grads: PyTree) -> None:
    """Raises `ValueError` if state or gradients are of other parameters, or the state is of another kind of recipe."""
    if not isinstance(state, SparseState):
      raise ValueError(f'sparsejax: the state is a {type(state).__name__}, no SparseState. Make it by tx.init(params).')
    asked = {leaf.path: leaf.shape for leaf in self.plan.leaves}
    made = {leaf.path: leaf.shape for leaf in state.plan.leaves}
    for path in [*asked, *made]:
      if asked.get(path) != made.get(path):
        raise ValueError(
            f'sparsejax: parameter {path!r} of shape {asked.get(path, "(not sparse)")} does not belong to this state, '
            f'where it is {made.get(path, "not sparse")}. Make the state from these parameters: tx.init(params).')
    if bool(jax.tree.leaves(state.master)) != self.keeps_master:
      raise ValueError(f'sparsejax: the state has {"no" if self.keeps_master else "a"} dense master, unlike those of '
                       'this recipe: another one made it. Make the state by tx.init(params).')
    for leaf, grad in zip(self.plan.leaves, self.pick(grads)):
      if grad.shape != leaf.shape:
        raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'its gradient has shape {grad.shape}; take it with '
                             'respect to these parameters.')


def _refuse_empty(plan: Plan, masks: Sequence[Array] = ()) -> None:
  """Raises `ValueError` for a layer that keeps nothing: by what was asked of it, or by its mask, if that is known."""
  way_out = 'Ask for less, for another allocation (erk), or accept it with allow_empty=True.'
  for leaf in plan.leaves:
    if isinstance(leaf.pattern, str) or leaf.pattern is None or leaf.sparsity is None:
      continue
    size, _ = patterns.units(leaf.pattern, leaf.shape, leaf.axes)
    if leaf.sparsity > 0 and size and not patterns.kept_of(leaf.sparsity, size):
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'a sparsity of {leaf.sparsity:.6g} keeps nothing of '
                           f'{size} units, and a layer that is empty passes nothing on. {way_out}')
  for leaf, mask in zip(plan.leaves, masks):
    if mask.size and not isinstance(mask, jax.core.Tracer):
      along = tuple(a for a in range(mask.ndim) if a not in leaf.axes.layer)
      if not bool(jnp.all(jnp.any(mask, along))):
        raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'the first mask keeps nothing of it. {way_out}')


def _refuse_line_search(inner_state: Any) -> None:
  """Raises `ValueError` for an optimizer that compares the loss, or gradients, at points with different masks."""
  is_search = lambda node: isinstance(node, _LINE_SEARCHES)
  for node in jax.tree.leaves(inner_state, is_leaf=is_search):
    if is_search(node):
      raise ValueError(
          f'sparsejax: the optimizer holds a {type(node).__name__}, a line search or its curvature, which compares '
          'points along the dense weights, or across a change of the mask, where the model is not. Wrap it in a recipe '
          'whose mask is fixed from the start (asp without dense_steps), or take a first-order optimizer.')


def _refuse_functions(extra: Mapping[str, Any]) -> None:
  """Raises `ValueError` for a function among the extra arguments: the optimizer would call it at the dense master."""
  for name, value in extra.items():
    if callable(value):
      raise ValueError(
          f'sparsejax: update got a function, {name}=, which the optimizer would call at the dense master, but the '
          'model is at the sparse point. Use a recipe that keeps no master (asp), or an optimizer without it.')


def _default_where(axes: Mapping[str, Axes] | None) -> Predicate:
  if axes is None:
    return trees.matrices
  return lambda path, leaf: trees.matrices(path, leaf) and bool(trees.tails(path, axes))


def _plain(key: Array | None) -> Array | None:
  """A key of its own as `uint32[2]`, whatever kind the given one is: NumPy and checkpoints do not know typed keys."""
  return None if key is None else jax.random.key_data(jax.random.key(jax.random.bits(key), impl=_KEYS))


def _master_of(w: Array) -> Array:
  """A copy, float32 at least: a narrow master would round small steps away, a shared one could not be donated."""
  return jnp.array(w, dtype=w.dtype if w.dtype.itemsize > 4 else jnp.float32, copy=True)


def _freeze_step(dense_steps: int, fine_tune_steps: int, total_steps: int | None) -> int | None:
  """The step at which the mask is fixed for good, or `None`."""
  if min(dense_steps, fine_tune_steps) < 0:
    raise ValueError(f'sparsejax: dense_steps ({dense_steps}) and fine_tune_steps ({fine_tune_steps}) count updates.')
  if total_steps is None:
    if fine_tune_steps:
      raise ValueError('sparsejax: fine_tune_steps counts from the end of training; pass total_steps= too.')
    return None
  if dense_steps + fine_tune_steps > total_steps:
    raise ValueError(f'sparsejax: dense_steps ({dense_steps}) and fine_tune_steps ({fine_tune_steps}) leave nothing of '
                     f'total_steps ({total_steps}) between them.')
  return total_steps - fine_tune_steps if fine_tune_steps else None


def _static(flow: Flow) -> Flow | None:
  """The flow if it can be part of a treedef; `None` if its coefficients are arrays (`project` then says so)."""
  try:
    hash(flow)
  except TypeError:
    return None
  return flow
