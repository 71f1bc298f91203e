"""Refuses what cannot be right: empty layers, foreign states, line searches across masks, functions at a dense master.

    refusals.refuse_empty(leaves.plan)         # by what is asked
    refusals.refuse_empty(leaves.plan, masks)  # by the first masks
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import counts, errors
from sparsejax.states import Plan, SparseState
from sparsejax.transforms.leaves import Leaves
from sparsejax.types import Array, PyTree

LINE_SEARCHES = (optax.ScaleByLBFGSState, optax.ScaleByBacktrackingLinesearchState, optax.ScaleByZoomLinesearchState)
_WAY_OUT = 'Ask for less, for another allocation (erk), or accept it with allow_empty=True.'


def refuse_empty(plan: Plan, masks: Sequence[Array] = ()) -> None:
  """Raises `ValueError` for a layer that keeps nothing: by what is asked of it, or by its mask if the mask is known."""
  for leaf in plan.leaves:
    if leaf.pattern is None or leaf.sparsity is None:
      continue
    size, _ = counts.units(leaf.pattern, leaf.shape, leaf.axes)
    if leaf.sparsity > 0 and size and not counts.kept_of(leaf.sparsity, size):
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'a sparsity of {leaf.sparsity:.6g} keeps nothing of '
                           f'{size} units, and a layer that is empty passes nothing on. {_WAY_OUT}')
  for leaf, mask in zip(plan.leaves, masks):
    along = tuple(a for a in range(mask.ndim) if a not in leaf.axes.layer)
    if mask.size and not isinstance(mask, jax.core.Tracer) and not jnp.all(jnp.any(mask, along)):
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'the first mask keeps nothing of it. {_WAY_OUT}')


def refuse_others(leaves: Leaves, keeps_master: bool, state: SparseState, grads: PyTree) -> None:
  """Raises `ValueError` if state or gradients are of other parameters, or the state is of another kind of recipe."""
  if not isinstance(state, SparseState):
    raise ValueError(f'sparsejax: the state is a {type(state).__name__}, no SparseState. Make it by tx.init(params).')
  asked = {leaf.path: leaf.shape for leaf in leaves.plan.leaves}
  made = {leaf.path: leaf.shape for leaf in state.plan.leaves}
  for path in [*asked, *made]:
    if asked.get(path) != made.get(path):
      raise ValueError(
          f'sparsejax: parameter {path!r} of shape {asked.get(path, "(not sparse)")} does not belong to this state, '
          f'where it is {made.get(path, "not sparse")}. Make the state from these parameters: tx.init(params).')
  if bool(jax.tree.leaves(state.master)) != keeps_master:
    raise ValueError(f'sparsejax: the state has {"no" if keeps_master else "a"} dense master, unlike those of '
                     'this recipe: another one made it. Make the state by tx.init(params).')
  for leaf, grad in zip(leaves.plan.leaves, leaves.pick(grads)):
    if grad.shape != leaf.shape:
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'its gradient has shape {grad.shape}; take it with '
                           'respect to these parameters.')


def refuse_line_search(inner_state: Any) -> None:
  """Raises `ValueError` for an optimizer that compares the loss, or gradients, at points with different masks."""
  is_search = lambda node: isinstance(node, LINE_SEARCHES)
  for node in jax.tree.leaves(inner_state, is_leaf=is_search):
    if is_search(node):
      raise ValueError(
          f'sparsejax: the optimizer holds a {type(node).__name__}, a line search or its curvature, which compares '
          'points along the dense weights, or across a change of the mask, where the model is not. Wrap it in a recipe '
          'whose mask is fixed from the start (asp without dense_steps), or take a first-order optimizer.')


def refuse_functions(extra: Mapping[str, Any]) -> None:
  """Raises `ValueError` for a function among the extra arguments: the optimizer would call it at the dense master."""
  for name, value in extra.items():
    if callable(value):
      raise ValueError(
          f'sparsejax: update got a function, {name}=, which the optimizer would call at the dense master, but the '
          'model is at the sparse point. Use a recipe that keeps no master (asp), or an optimizer without it.')


def refuse_unfilled(asked: Sequence[str], values: Mapping[str, Any]) -> None:
  """Raises `ValueError` unless the keyword arguments of `init` are exactly the placeholders of the optimizer."""
  unfilled, unknown = sorted({*asked} - {*values}), sorted({*values} - {*asked})
  if unfilled:
    raise ValueError(f'sparsejax: starts.given stands for {errors.some(unfilled)}, and nothing fills '
                     f'{"it" if len(unfilled) == 1 else "them"}: tx.init(params, '
                     f'{", ".join(f"{name}=..." for name in sorted(asked))}).')
  if unknown:
    raise ValueError(f'sparsejax: init got {errors.some(unknown)}, for which this optimizer has no placeholder '
                     f'(placeholders: {errors.some(sorted(asked)) or "none"}). Leave it out, or make the optimizer '
                     f'with {", ".join(f"{name}=starts.given({name!r})" for name in unknown)}.')
