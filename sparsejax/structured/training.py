"""Cuts what belongs to parameters: optimizer states, masks and other trees, so that training goes on.

    small = cut(found, params, keep)
    opt_state = cut_state(found, opt_state, small.kept)       # moments, masks and masters become smaller alike
    updates, opt_state = tx.update(grads, opt_state, small.params)
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.arguments import checked
from sparsejax.plans import SparseLeaf
from sparsejax.states import SparseState
from sparsejax.structured.groups import Groups
from sparsejax.structured.removal import shortened
from sparsejax.structured.smaller import Kept, left
from sparsejax.types import PyTree


@checked
def cut_state(groups: Groups, state: PyTree, kept: Kept) -> PyTree:
  """Returns an optimizer state for the smaller parameters; `kept` is that of the `Cut`.

  A leaf belongs to the parameter whose path is the tail of the leaf's own path, as optax makes its moments. The leaf
  loses the same positions. Masks, masters and plans of a `SparseState` are cut as well. Any tree that holds trees like
  the parameters will do, such as batch statistics. Scalars, PRNG keys and other arrays of integers stay as they are.

  Raises `ValueError` if no leaf belongs to a parameter, since the state is that of another model. A leaf of another
  shape than its parameter, as factored moments have, is refused as well.
  """
  paths, leaves, treedef = trees.flatten(state)
  shapes = {path: tuple(leaf.shape) for path, leaf in zip(*trees.flatten(groups.shapes)[:2]) if hasattr(leaf, 'shape')}
  owners = [_owner(path, shapes) for path in paths]
  arrays = [path for path, leaf in zip(paths, leaves) if getattr(leaf, 'ndim', 0)]
  if arrays and not any(owners):
    raise ValueError(f'structured.cut_state: the state of another model: none of {errors.some(arrays, 3)} belongs to '
                     f'one of the parameters {errors.some(shapes, 3)}.')
  small = [_cut_leaf(path, leaf, owner, shapes, kept) for path, leaf, owner in zip(paths, leaves, owners)]
  is_sparse = lambda node: isinstance(node, SparseState)
  return jax.tree.map(lambda node: _replanned(node, kept) if is_sparse(node) else node, treedef.unflatten(small),
                      is_leaf=is_sparse)


def _owner(path: str, shapes: dict[str, tuple[int, ...]]) -> str | None:
  """Returns the longest path of a parameter that is the tail of `path`."""
  keys = path.split('/')
  return next((tail for i in range(len(keys)) if (tail := '/'.join(keys[i:])) in shapes), None)


def _cut_leaf(path: str, leaf: Any, owner: str | None, shapes: dict[str, tuple[int, ...]], kept: Kept) -> Any:
  if not getattr(leaf, 'ndim', 0):
    return leaf
  if owner is None:
    if jnp.issubdtype(leaf.dtype, np.inexact):
      raise errors.at_leaf('structured.cut_state', path, leaf.shape, 'it belongs to no parameter of the groups; cut '
                           'the state that was made for these parameters.')
    return leaf
  if leaf.shape == shapes[owner]:
    return shortened(leaf, owner, kept)
  if any(name.rpartition(':')[0] == owner for name in kept):
    raise errors.at_leaf('structured.cut_state', path, leaf.shape, f'its parameter has shape {shapes[owner]}, so that '
                         'nothing says what to cut; make a new state for the smaller parameters.')
  return leaf


def _replanned(state: SparseState, kept: Kept) -> SparseState:
  """Returns a state whose plan has the smaller shapes."""
  leaves = tuple(_smaller_leaf(leaf, kept) for leaf in state.plan.leaves)
  plan = dataclasses.replace(state.plan, leaves=leaves)
  return state._replace(plan=plan.carrying(jnp.asarray(plan.fingerprint)))


def _smaller_leaf(leaf: SparseLeaf, kept: Kept) -> SparseLeaf:
  lengths = [kept.get(f'{leaf.path}:{axis}') for axis in range(len(leaf.shape))]
  shape = tuple(n if own is None else left(own) for n, own in zip(leaf.shape, lengths))
  problem = leaf.pattern.validate(shape, leaf.axes) if leaf.pattern is not None else None
  if problem:
    raise errors.at_leaf('structured.cut_state', leaf.path, shape, f'the smaller parameter cannot carry '
                         f'{leaf.pattern}: {problem}')
  return dataclasses.replace(leaf, shape=shape)
