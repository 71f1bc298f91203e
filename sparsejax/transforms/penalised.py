"""Trains with a penalty: by its gradient, or by its proximal step, which makes exact zeros.

    tx = optax.chain(transforms.penalised(penalties.l1(1e-4)), optax.adamw(1e-3))
    tx = transforms.proximal(optax.sgd(0.1), penalties.l1(1e-4), learning_rate=0.1)
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import penalties, trees
from sparsejax.arguments import checked
from sparsejax.penalties import Penalty
from sparsejax.transforms import refusals, small
from sparsejax.types import Array, Inner, Optimizer, Predicate, PyTree, Schedule


@checked
def penalised(penalty: Penalty, *, where: Predicate | PyTree = trees.matrices) -> optax.GradientTransformation:
  """Returns a transform that adds the gradient of a penalty to the gradients of the leaves that `where` picks.

  The transform stands in front of an optimizer, as `optax.add_decayed_weights` does.
  """
  def update(grads: PyTree, state: optax.EmptyState, params: PyTree | None = None) -> Any:
    refusals.refuse_no_params(grads, params)
    own, put = _leaves(where, params)
    mine, _ = _leaves(where, params, grads)
    more = jax.grad(lambda leaves: penalty.value(leaves))(own)
    return put({path: g + more[path].astype(g.dtype) for path, g in mine.items()}, grads), state

  return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


class ProximalState(NamedTuple):
  """A `ProximalState` is the number of updates, `int32[]`, and the state of the user's optimizer."""

  step: Array
  inner: Any


@checked
def proximal(inner: Inner, penalty: Penalty, learning_rate: float | Schedule, *,
             where: Predicate | PyTree = trees.matrices) -> Optimizer:
  """Returns `inner` with the proximal step of `penalty` after each of its steps: proximal gradient descent.

  `learning_rate`: the length of the proximal step, that of `inner`, a number or a schedule of the step. The parameters
  hold exact zeros. With an adaptive `inner` the proximal step is not that of the metric of
  `inner` (Yun et al. 2021, ProxGen). Raises `ValueError` for a penalty without `prox`.
  """
  prox = penalties.part('transforms.proximal', penalty, 'prox')
  inner = optax.with_extra_args_support(inner)

  def update(grads: PyTree, state: ProximalState, params: PyTree | None = None, **extra: Any) -> Any:
    refusals.refuse_no_params(grads, params)
    moves, after = inner.update(grads, state.inner, params, **extra)
    rate = learning_rate(state.step) if callable(learning_rate) else learning_rate
    own, put = _leaves(where, params)
    mine, _ = _leaves(where, params, moves)
    near = prox({path: w + mine[path].astype(w.dtype) for path, w in own.items()}, rate)
    return put({path: near[path] - w for path, w in own.items()}, moves), ProximalState(
        optax.safe_increment(state.step), after)

  init = lambda params: ProximalState(jnp.zeros((), jnp.int32), inner.init(params))
  return small.identity(optax.GradientTransformationExtraArgs(init, update), 'proximal')


def _leaves(where: Any, params: PyTree, tree: PyTree | None = None) -> tuple[dict[str, Any], Any]:
  """Returns the picked leaves of `tree` (default: `params`) by path, and a function that puts others in."""
  paths, leaves, treedef = trees.flatten(params)
  own = leaves if tree is None else treedef.flatten_up_to(tree)
  picked = trees.select('transforms.penalised', where, params)
  index = {path: i for i, (path, pick) in enumerate(zip(paths, picked)) if pick}

  def put(values: dict[str, Any], base: PyTree) -> PyTree:
    rest = treedef.flatten_up_to(base)
    for path, value in values.items():
      rest[index[path]] = value
    return treedef.unflatten(rest)

  return {path: own[i] for path, i in index.items()}, put
