"""Defines the memory of a sparse optimizer, and functions that find the memory again inside of any optimizer state.

A recipe may be wrapped, chained and partitioned by any transform of optax. The functions here find its masks there.

    state = sj.recipes.sr_ste(optax.adamw(1e-3)).init(params)
    params = states.project(params, state)
    masks = states.masks(params, state)     # `True` where kept
"""

import functools
import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import arguments, errors, plans, trees
from sparsejax.plans import Plan, SparseLeaf
from sparsejax.types import Array, PyTree, Signals, moved

__all__ = ['Plan', 'SparseLeaf', 'SparseState', 'apply_masks', 'bdwp_backward', 'by_path', 'find', 'masks',
            'project', 'reproject', 'surroundings']


class SparseState(NamedTuple):
  """A `SparseState` is the memory of a sparse optimizer. Its trees have the structure of the parameters.

  `optax.MaskedNode` stands where nothing is stored of a leaf. `step`: `int32[]`, the number of updates so far. `key`:
  the key of random scores, `uint32[2]`, or `None`. `masks`: `bool`, shaped like the sparse parameters, of the point
  that the user holds. `master`: the dense weights behind the point, in float32 for narrower parameters; none for fixed
  masks. `stats`: a threshold that the selection gives to the flow, or the memory of a score: nothing, a scalar, or
  arrays shaped like the leaf. `inner`: the state of the user's optimizer. `plan`: the `Plan`, which is static but for
  one array, `plan.identity`, `uint8[256]`, the fingerprint of the plan with which the state was made.

  Recipe, pattern, flow and the set of sparse leaves are the identity: a state of another identity is refused with both
  in words. In one process `update` refuses it at trace time. The state of a file is refused wherever its values are
  known: in `report`, `check`, `project`, `masks`, and in `update` outside of `jit`. Under `jit` the values are not
  known while JAX traces, so the first sparse leaf gets NaN as its update, and `check` then says why. A checkpoint
  without `plan.identity`, from before there was one, has another structure, and its tool refuses it.
  """

  step: Array
  key: Array | None
  masks: PyTree
  master: PyTree
  stats: PyTree
  inner: Any
  plan: Plan


def _plan(state: SparseState) -> Plan:
  """Returns the plan of a state. Flax reads each field before it looks up how to save it: the moment to say how."""
  _make_known_to(sys.modules.get('flax.serialization'))
  return state[-1]


@functools.cache
def _make_known_to(serialization: Any) -> None:
  """Tells `flax.serialization`, where it is in use, to save the array of a plan and to take the rest of the target."""
  if hasattr(serialization, 'register_serialization_state'):
    serialization.register_serialization_state(
        Plan, lambda plan: {'identity': plan.identity}, lambda plan, saved: plan.carrying(saved['identity']),
        override=True)


SparseState.plan = property(_plan)


def find(opt_state: Any) -> list[SparseState]:
  """Returns every `SparseState` inside an optimizer state, however it was wrapped, chained or partitioned.

  Raises `ValueError` if there is none, or if the arrays in a state come from an optimizer of another identity.
  """
  is_state = lambda node: isinstance(node, SparseState)
  sparse = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
  if not sparse:
    raise ValueError('sparsejax: no SparseState in this optimizer state. Wrap the optimizer in a recipe, as in '
                     'sparsejax.recipes.sr_ste(optax.adamw(1e-3)), and pass the state that init or update returned.')
  for state in sparse:
    if isinstance(state.plan, Plan):
      plans.refuse_unless_of(state.plan, state.plan.identity)
  return sparse


def surroundings(opt_state: Any) -> list[str]:
  """Returns what surrounds each `SparseState`, from the outside in, in the order of `find`.

  A transform that surrounds a recipe may change the recipe's updates.
  """
  is_state = lambda node: isinstance(node, SparseState)
  with_paths, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_state)
  return [', '.join(_around(opt_state, keys)) for keys, node in with_paths if is_state(node)]


def _around(node: Any, keys: Sequence[Any]) -> list[str]:
  places = []
  for key in keys:
    if type(node) is tuple and key.idx + 1 < len(node):  # the state of `optax.chain`
      later = [type(member).__name__ for member in node[key.idx + 1:]]
      places.append(f'member {key.idx + 1} of a chain, before {" and ".join(later)}')
    elif isinstance(node, tuple) and type(node) is not tuple:
      places.append(f'in {type(node).__name__}')
    node = _children(node)[key]
  return places


def _children(node: Any) -> dict[Any, Any]:
  """Maps the keys of the members of one container to the members."""
  with_paths, _ = jax.tree_util.tree_flatten_with_path(node, is_leaf=lambda child: child is not node)
  return {key: child for (key,), child in with_paths}


def by_path(tree: PyTree) -> dict[str, Any]:
  """Maps the path of each sparse leaf to its entry in `tree`. Dense leaves are left out."""
  names, leaves, _ = trees.flatten(tree)
  return dict(zip(names, leaves))


def reproject(params: PyTree, opt_state: Any, point: Callable[[Array, SparseLeaf], Array]) -> PyTree:
  """Returns `params` with `point(weight, leaf)` for every sparse leaf; `weight` is the master where one is stored."""
  return _replace(params, opt_state, lambda state, leaf, w, mask, stats: point(w, leaf))


@arguments.checked
def project(params: PyTree, opt_state: Any) -> PyTree:
  """Returns the sparse point of an optimizer state, in the parameters' structure and dtypes; dense leaves as they are.

  The user's parameters are at this point after each update, so `project` is needed only before the first update. A
  state that was made under `jax.vmap` has to be projected under `jax.vmap` too. Raises `ValueError` if the state does
  not belong to these parameters.
  """
  def point(state: SparseState, leaf: SparseLeaf, w: Array, mask: Array, stats: Any) -> Array:
    signals = Signals(stats=stats, step=jax.tree.leaves(state.step)[0], axes=leaf.axes)
    return state.plan.flow.project(w, mask, signals)

  return _replace(params, opt_state, point)


def _replace(params: PyTree, opt_state: Any, point: Callable[..., Array]) -> PyTree:
  """Returns `params` with `point(state, leaf, weight, mask, stats)` for every sparse leaf, in the dtype of the leaf."""
  paths, leaves, treedef = trees.flatten(params)
  place = {path: i for i, path in enumerate(paths)}
  for state in find(opt_state):
    if jax.tree.leaves(state.step)[0].ndim:
      raise ValueError('sparsejax: this state was made under jax.vmap; call this under jax.vmap too.')
    masks, masters, stats = by_path(state.masks), by_path(state.master), by_path(state.stats)
    for leaf in state.plan.leaves:
      _refuse_unless_among(paths, leaf.path)
      w, mask = leaves[place[leaf.path]], masks[leaf.path]
      for array in (w, mask):
        arguments.refuse_unknown('sparsejax.project', {leaf.path: array}, traced=True)
      if mask.shape != w.shape:
        raise errors.at_leaf('sparsejax', leaf.path, w.shape, f'the state holds a mask of shape {mask.shape}; make the '
                             'state from these parameters: tx.init(params).')
      new = point(state, leaf, masters.get(leaf.path, w), mask, stats.get(leaf.path))
      leaves[place[leaf.path]] = new.astype(w.dtype)
  return treedef.unflatten(leaves)


def _refuse_unless_among(paths: Sequence[str], path: str) -> None:
  if path not in paths:
    raise ValueError(f'sparsejax: the state has a mask of {path!r}, which is not among the parameters '
                     f'{errors.some(paths)}. Make the state from these parameters: tx.init(params).')


@arguments.checked
def apply_masks(tree: PyTree, opt_state: Any) -> PyTree:
  """Returns `tree`, which has the parameters' structure, with zeros where the state's masks prune.

  Averages of parameters from different updates (EMA, SWA, schedule-free's) need these zeros: an average is zero only
  where all of the averaged parameters are zero.
  """
  zeroed = lambda x, mask: jnp.where(mask, x, jnp.zeros((), x.dtype)) if mask.ndim else x
  return jax.tree.map(zeroed, tree, masks(tree, opt_state))


@arguments.checked
def masks(params: PyTree, opt_state: Any) -> PyTree:
  """Returns the masks in the parameters' structure, `True` where kept; the scalar `True` for a dense leaf."""
  sparse = {path: mask for state in find(opt_state) for path, mask in by_path(state.masks).items()}
  paths, _, treedef = trees.flatten(params)
  for path in sparse:
    _refuse_unless_among(paths, path)
  return treedef.unflatten([sparse.get(path, jnp.ones((), bool)) for path in paths])


@arguments.checked
def bdwp_backward(params: PyTree, opt_state: Any) -> PyTree:
  """Returns m_b W for `recipes.bdwp`: the weights of the input-gradient product, N:M along each leaf's output axes."""
  return reproject(params, opt_state, _along_output)


def _along_output(master: Array, leaf: SparseLeaf) -> Array:
  turned = leaf.axes._replace(contracted=leaf.axes.output, output=leaf.axes.contracted)
  if why := leaf.pattern.validate(leaf.shape, turned):
    raise errors.at_leaf('states.bdwp_backward', leaf.path, leaf.shape, why)
  return jnp.where(leaf.pattern(jnp.abs(master).astype(jnp.float32), None, turned), master, 0)


# Former names of this module; the modules where the objects are now add them.
FORMER: dict[str, tuple[Any, str]] = {}
moved(__name__, FORMER)
