"""Refuses what cannot be right: empty layers, foreign states, line searches across masks, functions at a dense master.

    refusals.refuse_empty(leaves.plan)         # by what is asked
    refusals.refuse_empty(leaves.plan, masks)  # by the first masks
"""

import functools
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparsejax import arguments, counts, errors, neighbours, plans, trees
from sparsejax.plans import Plan
from sparsejax.scores import Memory
from sparsejax.states import SparseState
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
  if any(isinstance(mask, jax.core.Tracer) for mask in masks):
    return
  layers = tuple(leaf.axes.layer for leaf in plan.leaves)
  here = all(mask.is_fully_addressable and {d.platform for d in mask.devices()} == {'cpu'} for mask in masks)
  passes = map(_passes_on, layers, masks) if here else _pass_on(layers, list(masks))
  for leaf, one in zip(plan.leaves, passes):
    if not one:
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, 'the first mask keeps nothing of it, as where its '
                           f'scores or the loss are NaN. {_WAY_OUT}')


def _passes_on(layers: tuple[int, ...], mask: Array) -> bool:
  """Returns what `_pass_on` does of one mask. NumPy reads until it finds a kept weight, and compiles nothing."""
  rows = np.moveaxis(np.asarray(mask), layers, range(len(layers)))
  return bool(all(row.any() for row in rows.reshape(math.prod(rows.shape[:len(layers)]), -1)) or not mask.size)


@functools.partial(jax.jit, static_argnums=0)
def _pass_on(layers: tuple[tuple[int, ...], ...], masks: list[Array]) -> list[Array]:
  """Returns of each mask whether each of its layers keeps something; a mask without entries counts as one."""
  kept = [jnp.any(mask, tuple(a for a in range(mask.ndim) if a not in own)) for mask, own in zip(masks, layers)]
  return [jnp.all(each) | (mask.size == 0) for mask, each in zip(masks, kept)]


def refuse_no_params(grads: PyTree, params: PyTree | None) -> None:
  """Raises `ValueError` with the line to write if `update` is called without parameters, as many scripts call it.

  A whole model of Equinox, with its functions, is refused too. The line is that of Equinox where `grads` hold a module.
  """
  if params is not None and not any(map(callable, jax.tree.leaves(params))):
    return
  module = getattr(sys.modules.get('equinox'), 'Module', ())
  equinox = any(isinstance(leaf, module) for leaf in jax.tree.leaves(grads, is_leaf=lambda x: isinstance(x, module)))
  held = 'eqx.filter(model, eqx.is_inexact_array)' if equinox else 'params'
  given = 'are missing' if params is None else 'hold functions, too'
  raise ValueError(f'sparsejax: update needs the parameters to keep pruned weights at zero, but they {given}. Write\n'
                   f'updates, opt_state = tx.update(grads, opt_state, {held})')


def refuse_no_arrays(params: PyTree) -> None:
  """Raises `ValueError` for a function, a text or a mere shape among the parameters: no optimizer starts from these."""
  for path, leaf in zip(*trees.flatten(params)[:2]):
    if callable(leaf) or isinstance(leaf, (str, bytes)):
      raise ValueError(f'sparsejax: the parameters hold {arguments.shown(leaf)} at {path!r}, and init takes arrays. Of '
                       'a model of Equinox, write tx.init(eqx.filter(model, eqx.is_inexact_array)).')
    if isinstance(leaf, jax.ShapeDtypeStruct):
      raise errors.at_leaf('sparsejax', path, leaf.shape, 'it is a mere shape; write jax.eval_shape(tx.init, params).')


def refuse_others(plan: Plan, state: SparseState) -> None:
  """Raises `ValueError` with both identities if another recipe, pattern, flow or choice of leaves made the state.

  The plan of the state is compared at trace time, and its array wherever the values are known: outside of `jit`.
  """
  if not isinstance(state, SparseState):
    raise ValueError(f'sparsejax: the state is a {type(state).__name__}, no SparseState. Make it by tx.init(params).')
  if not isinstance(state.plan, Plan):
    raise ValueError(f'sparsejax: the plan of the state is gone; a {type(state.plan).__name__} is in its place. Make '
                     'the state by tx.init(params), or restore it into such a state.')
  if not np.array_equal(state.plan.fingerprint, plan.fingerprint):
    raise plans.refusal(state.plan.text, plan, _first_difference(state.plan, plan))
  plans.refuse_unless_of(plan, state.plan.identity)


def _first_difference(made: Plan, asked: Plan) -> str:
  """Returns a sentence about the first leaf that only one of two plans has, or an empty string."""
  ours, theirs = ({leaf.path: leaf.shape for leaf in plan.leaves} for plan in (asked, made))
  for path in [*ours, *theirs]:
    if ours.get(path) != theirs.get(path):
      return (f'Parameter {path!r} of shape {ours.get(path, "(not sparse)")} does not belong to this state, where it '
              f'is {theirs.get(path, "not sparse")}. ')
  return ''


def refuse_other_shapes(leaves: Leaves, state: SparseState, grads: PyTree) -> None:
  """Raises `ValueError` if gradients, masks, master or memory have not the shapes of the sparse leaves."""
  for leaf, grad, *kept in zip(leaves.plan.leaves, *map(leaves.pick, (grads, state.masks, state.master))):
    if (shape := getattr(grad, 'shape', None)) != leaf.shape:
      what = 'is None' if grad is None else f'has shape {shape}'
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'its gradient {what}; take it with respect to these '
                           'parameters.')
    for each in kept:
      if not trees.is_dense(each) and each.shape != leaf.shape:
        raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'the state holds an array of shape {each.shape} for '
                             'it; make the state from these parameters: tx.init(params).')


def refuse_damaged(leaves: Leaves, state: SparseState, keyed: bool) -> None:
  """Raises `ValueError` for a state whose arrays were lost or cast on the way, as by a cast of a whole training state.

  `keyed`: whether the optimizer has a PRNG key. Masks may be numbers: `optax.contrib.sam` blends states as numbers.
  """
  remedy = 'restore it into a state of tx.init(params), in the dtypes of that state.'
  shown = lambda array: 'gone' if array is None else f'{jnp.result_type(array)}{[*jnp.shape(array)]}'
  if state.step is None or jnp.shape(state.step) or not jnp.issubdtype(jnp.result_type(state.step), jnp.integer):
    raise ValueError(f'sparsejax: the step of the state is {shown(state.step)}, and not int32[]; {remedy}')
  if keyed != (state.key is not None) or keyed and jnp.result_type(state.key) != jnp.uint32:
    raise ValueError(f'sparsejax: the PRNG key of the state is {shown(state.key)}, and this optimizer has ' +
                     (f'one, uint32[2]; {remedy}' if keyed else 'none; make the state by tx.init(params).'))
  for leaf, mask, master in zip(leaves.plan.leaves, *map(leaves.pick, (state.masks, state.master))):
    lost = [name for name, array in (('mask', mask), ('master', master)) if array is None]
    if lost:
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'its {lost[0]} in the state is None; {remedy}')
    if not trees.is_dense(master) and master.dtype.itemsize < 4:
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'its master in the state is {master.dtype}, in which '
                           f'small steps are rounded away; {remedy}')


def refuse_other_masks(plan: Plan, masks: Sequence[Array]) -> None:
  """Raises `ValueError` for a first mask that has not the shape of its parameter, as a start of one's own may give."""
  for leaf, mask in zip(plan.leaves, masks):
    if mask.shape != leaf.shape:
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'its first mask has shape {mask.shape}. Give masks, or '
                           'scores of a probe, that have the shape of their parameter.')


def masks_of(leaves: Leaves, tree: PyTree) -> list[Array]:
  """Returns the masks of the sparse leaves in `tree`. Raises `ValueError` for a leaf that is no mask."""
  masks = [jnp.asarray(mask) for mask in leaves.pick(tree)]
  for leaf, mask in zip(leaves.plan.leaves, masks):
    if mask.dtype != bool or mask.shape not in ((), leaf.shape):
      raise errors.at_leaf('starts.masks', leaf.path, leaf.shape, f'the tree holds {mask.dtype}{list(mask.shape)} for '
                           'it. Give bools of its shape, as in params != 0, or a scalar for all of it.')
  return [mask if mask.ndim else mask & neighbours.everywhere(leaves.arrays[leaf.path])
          for mask, leaf in zip(masks, leaves.plan.leaves)]


def refuse_other_memory(memory: Memory | None, leaves: Leaves, state: SparseState) -> None:
  """Raises `ValueError` if the state's memory of the first leaf has another structure than that of `memory`."""
  if memory is None or not leaves.index:
    return
  path, w = next(iter(leaves.arrays.items()))
  new = jax.tree.structure(jax.eval_shape(memory.start, jax.ShapeDtypeStruct(w.shape, jnp.float32)))
  old = jax.tree.structure(leaves.pick(state.stats)[0])
  if old != new:
    raise errors.at_leaf('sparsejax', path, w.shape, f'the memory in the state is {old}, and that of this optimizer is '
                         f'{new}. Keep the optimizer of the score, or make the state by tx.init(params).')


def marked(updates: PyTree, leaves: Leaves, state: SparseState) -> PyTree:
  """Returns the updates, with NaN for the first sparse leaf if the state, under `jit`, is of another identity.

  The identity of a restored state is not known while JAX traces, so the program compares the arrays. The bytes of the
  hash are compared one by one, as a part of the kernel of the leaf. A sum would be a kernel of its own. A byte stays an
  array of one entry: XLA moves its reshape past one operation at a time, and repeats all of its passes each time. A
  callback of the host, which could raise, would keep the program out of JAX's cache.
  """
  if plans.values_of(state.plan.identity) is not None or not leaves.index:
    return updates  # compared already
  theirs, ours = jnp.asarray(state.plan.identity, jnp.uint8), leaves.plan.fingerprint
  differ = [lax.ne(lax.slice(theirs, (i,), (i + 1,)), ours[i:i + 1]) for i in range(plans.HASHED)]
  other = lax.squeeze(functools.reduce(lax.bitwise_or, differ), (0,))
  first, *rest = leaves.pick(updates)
  return leaves.put([lax.select(other, lax.full_like(first, jnp.nan), first), *rest], updates)


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
