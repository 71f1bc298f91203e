"""Small transforms for the inside of recipes.

    tx = optax.chain(transforms.updating(selection, weight_decay=1e-4), optax.sgd(0.1))
    tx = optax.chain(optax.sgd(0.1), transforms.only(where=where))
    tx = transforms.identity(optax.sgd(0.1))
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import errors, flows, neighbours, plans, schedules, trees
from sparsejax.arguments import checked
from sparsejax.plans import Plan
from sparsejax.selections import Selection
from sparsejax.states import SparseState
from sparsejax.transforms import refusals
from sparsejax.transforms.leaves import Leaves
from sparsejax.types import ALWAYS, Array, Axes, Inner, Optimizer, Predicate, PyTree, Schedule, says


@checked
def identity(inner: Inner, name: str = '') -> Optimizer:
  """Returns `inner` in a `SparseState` without sparse leaves, so that the tools of recipes work on dense baselines.

  `name`: the name of the recipe, part of the identity of a state. Raises `ValueError` for the state of another.
  """
  inner, plan = optax.with_extra_args_support(inner), Plan(recipe=name, words=('identity',))

  def init(params: PyTree, **values: Any) -> SparseState:
    refusals.refuse_unfilled((), values)
    nothing = params if is_stand_in(params) else jax.tree.map(lambda _: trees.DENSE, params)
    return SparseState(jnp.zeros((), jnp.int32), None, nothing, nothing, nothing, inner.init(params), plans.fresh(plan))

  def update(grads: PyTree, state: SparseState, params: PyTree | None = None, **extra: Any):
    refusals.refuse_others(plan, state)
    moves, inner_state = inner.update(grads, state.inner, params, **extra)
    own = state.plan.carrying(plans.owned(state.plan.identity))
    return moves, state._replace(step=optax.safe_increment(state.step), inner=inner_state, plan=own)

  return optax.GradientTransformationExtraArgs(init, update)


def is_stand_in(params: PyTree) -> bool:
  """Returns whether `params` is what `optax.tree_map_params` gives to `init` in the place of parameters."""
  return type(params).__name__ == '_ParamsPlaceholder'


@checked
def updating(selection: Selection, *, where: Predicate | PyTree | None = None, axes: Mapping[str, Axes] | None = None,
             weight_decay: float = 0.0, refresh: Schedule = schedules.every(1), tied: Mapping[str, str] | None = None,
             ) -> optax.GradientTransformation:
  """Returns a transform that passes the gradients of the weights that `selection` picks at each step, and zero else.

  The transform stands in front of an optimizer, inside of a recipe with the same `where`, `axes` and `tied`.
  `weight_decay` times the weight is added to the gradient of every sparse weight, picked or not. Dense leaves pass.
  `refresh`: a schedule of bools, `True` when weights are picked; the first update, of step 0, always picks. Between
  two choices the picked weights stay the same, as in the gradient masks of SparCL (Wang et al. 2022, section 3.3).
  """
  always = says(refresh, ALWAYS)
  own = lambda params: Leaves(params, where, axes, selection, flows.hard(), tied)

  def update(grads: PyTree, state: Any, params: PyTree | None = None):
    refusals.refuse_no_params(grads, params)
    leaves = own(params)
    weights, picked = leaves.pick(params), leaves.pick(grads)
    signals = leaves.signals(jnp.zeros((), jnp.int32), [trees.DENSE] * len(weights), picked)
    everywhere, select = [neighbours.everywhere(w) for w in weights], leaves.tied(selection.select)
    choose = lambda: select(leaves.plan.leaves, weights, everywhere, signals)[0]
    active = choose() if always else jax.lax.cond(
        (state.count == 0) | refresh(state.count), choose, lambda: leaves.pick(state.masks))
    passed = [jnp.where(m, g, 0) + (weight_decay * w).astype(g.dtype) for m, g, w in zip(active, picked, weights)]
    after = state if always else UpdatingState(optax.safe_increment(state.count), leaves.put(active))
    return leaves.put(passed, grads), after

  def init(params: PyTree) -> Any:
    if always:
      return optax.EmptyState()
    if is_stand_in(params):
      return UpdatingState(0, params)
    leaves = own(params)
    return UpdatingState(jnp.zeros((), jnp.int32), leaves.put([neighbours.everywhere(w) for w in leaves.pick(params)]))

  return optax.GradientTransformation(init, update)


@checked
def protected(inner: Inner, used: PyTree) -> Optimizer:
  """Returns `inner` with no gradient and no update at the weights that `used` marks, bools like the parameters.

  A scalar stands for all of a leaf. Neither weight decay nor momentum moves a marked weight: its update is zero.
  Raises `ValueError`, from `init` on, for marks of other parameters, and for marks that are no bools of the shape of
  their parameter.
  """
  inner = optax.with_extra_args_support(inner)

  def init(params: PyTree, **values: Any) -> Any:
    if not is_stand_in(params):
      _marks(used, params)
    return inner.init(params, **values)

  def update(grads: PyTree, state: Any, params: PyTree | None = None, **extra: Any):
    marks, structure = _marks(used, grads)
    zeroed = lambda mark, x: jnp.where(mark, jnp.zeros((), x.dtype), x)
    stopped = lambda tree: structure.unflatten(list(map(zeroed, marks, structure.flatten_up_to(tree))))
    moves, state = inner.update(stopped(grads), state, params, **extra)
    return stopped(moves), state

  return optax.GradientTransformationExtraArgs(init, update)


def _marks(used: PyTree, tree: PyTree) -> tuple[list[Any], Any]:
  """Returns the marks of the leaves of `tree`, and its structure. Raises `ValueError` for the marks of another tree."""
  paths, leaves, structure = trees.flatten(tree)
  if jax.tree.structure(used) != structure:
    others = trees.flatten(used)[0]
    raise ValueError(f'transforms.protected: `used` marks {errors.some(others)}, and the parameters are '
                     f'{errors.some(paths)}. Give marks of these, as a bank of the same model has them.')
  marks = jax.tree.leaves(used)
  for path, leaf, mark in zip(paths, leaves, marks):
    if jnp.result_type(mark) != jnp.dtype(bool) or jnp.shape(mark) not in ((), leaf.shape):
      raise errors.at_leaf('transforms.protected', path, leaf.shape, f'`used` holds {jnp.result_type(mark)}'
                           f'{list(jnp.shape(mark))} for it. Give bools of its shape, or a scalar for all of it.')
  return marks, structure


@checked
def resting(inner: Inner, begin: int, end: int) -> Optimizer:
  """Returns `inner`, whose updates are zero from update `begin` to update `end - 1`, and which does not see these.

  With an `end` that is not after `begin`, no update is zero.
  """
  inner = optax.with_extra_args_support(inner)

  def update(grads: PyTree, state: 'RestingState', params: PyTree | None = None, **extra: Any):
    rests = (state.count >= begin) & (state.count < end)
    moves, after = jax.lax.cond(
        rests, lambda: (jax.tree.map(jnp.zeros_like, grads), state.inner),
        lambda: inner.update(grads, state.inner, params, **extra))
    return moves, RestingState(optax.safe_increment(state.count), after)

  return optax.GradientTransformationExtraArgs(
      lambda params: RestingState(jnp.zeros((), jnp.int32), inner.init(params)), update)


class RestingState(NamedTuple):
  """A `RestingState` is the number of updates, `int32[]`, and the state of the optimizer, which rests for some."""

  count: Array
  inner: Any


class UpdatingState(NamedTuple):
  """An `UpdatingState` is the number of updates, `int32[]`, and the masks of the weights that are picked for now."""

  count: Array
  masks: PyTree


@checked
def only(*, where: Predicate | PyTree | None = None, axes: Mapping[str, Axes] | None = None,
         ) -> optax.GradientTransformation:
  """Returns a transform that passes the updates of the sparse leaves and stops all other parameters.

  The transform stands behind an optimizer, inside of a recipe with the same `where` and `axes`.
  """
  def update(updates: PyTree, state: optax.EmptyState, params: PyTree | None = None):
    leaves, treedef = jax.tree.flatten(updates)
    picked = trees.select('sparsejax', trees.default_where(axes) if where is None else where, params)
    return jax.tree.unflatten(treedef, [u if p else jnp.zeros_like(u) for u, p in zip(leaves, picked)]), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)
