"""The memory of a sparse optimizer, and finding it again inside any optimizer state.

A recipe may be wrapped, chained and partitioned by anything of optax's; whoever wants its masks asks here.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import errors, trees
from sparsejax.types import Array, Axes, Flow, PyTree, Signals


@dataclasses.dataclass(frozen=True)
class SparseLeaf:
  """What was asked of one sparse parameter: static, compared by value."""

  path: str
  shape: tuple[int, ...]
  axes: Axes
  pattern: Any
  sparsity: float | None


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
  """What was asked of all of them. Lives in the state's treedef: it has no leaves, is never saved and never traced."""

  leaves: tuple[SparseLeaf, ...] = ()
  flow: Flow | None = None
  sparsity: float | None = None  # asked of all leaves together, where no leaf has a share of its own


class SparseState(NamedTuple):
  """The memory of a sparse optimizer. Trees have the parameters' structure, `optax.MaskedNode` where nothing is kept.

  `step`: `int32[]`, updates so far. `key`: of random scores, `uint32[2]`, or `None`. `masks`: `bool` like the sparse
  parameters, of the point that the user holds. `master`: dense weights behind it (none for fixed masks), float32 for
  narrower parameters. `stats`: what the selection hands to the flow or remembers of a leaf: nothing, a scalar, or
  arrays like it. `inner`: the user's optimizer's state.
  """

  step: Array
  key: Array | None
  masks: PyTree
  master: PyTree
  stats: PyTree
  inner: Any
  plan: Plan


def find(opt_state: Any) -> list[SparseState]:
  """Every `SparseState` inside an optimizer state, however it was wrapped, chained or partitioned.

  Raises `ValueError` if there is none.
  """
  is_state = lambda node: isinstance(node, SparseState)
  found = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
  if not found:
    raise ValueError('sparsejax: no SparseState in this optimizer state. Wrap the optimizer in a recipe, as in '
                     'sparsejax.recipes.sr_ste(optax.adamw(1e-3)), and pass the state that init or update returned.')
  return found


def surroundings(opt_state: Any) -> list[str]:
  """What each `SparseState` lies in, from the outside in, in `find`'s order: who may change the recipe's updates."""
  is_state = lambda node: isinstance(node, SparseState)
  with_paths, _ = jax.tree_util.tree_flatten_with_path(opt_state, is_leaf=is_state)
  return [', '.join(_around(opt_state, keys)) for keys, node in with_paths if is_state(node)]


def _around(node: Any, keys: Sequence[Any]) -> list[str]:
  found = []
  for key in keys:
    if type(node) is tuple and key.idx + 1 < len(node):  # the state of `optax.chain`
      later = [type(member).__name__ for member in node[key.idx + 1:]]
      found.append(f'member {key.idx + 1} of a chain, before {" and ".join(later)}')
    elif isinstance(node, tuple) and type(node) is not tuple:
      found.append(f'in {type(node).__name__}')
    # Whatever container it is, one of these is how its parts are had.
    if isinstance(key, jax.tree_util.GetAttrKey):
      node = getattr(node, key.name)
    elif isinstance(key, (jax.tree_util.SequenceKey, jax.tree_util.DictKey)):
      node = node[getattr(key, 'idx', getattr(key, 'key', None))]
    else:
      return found
  return found


def by_path(tree: PyTree) -> dict[str, Any]:
  """What is kept of each leaf, without those of which nothing is."""
  names, leaves, _ = trees.flatten(tree)
  return dict(zip(names, leaves))


def reproject(params: PyTree, opt_state: Any, point: Callable[[Array, SparseLeaf], Array]) -> PyTree:
  """`point(weight, leaf)` in the place of every sparse leaf, from the dense master where the state keeps one."""
  return _replace(params, opt_state, lambda state, leaf, w, mask, stats: point(w, leaf))


def project(params: PyTree, opt_state: Any) -> PyTree:
  """The sparse point of an optimizer state, in the parameters' structure and dtypes; dense leaves as they are.

  Where the user's parameters are after each update; needed only before the first one. For a state made under
  `jax.vmap`, call it under `jax.vmap` too. Raises `ValueError` if the state is not of these parameters.
  """
  def point(state: SparseState, leaf: SparseLeaf, w: Array, mask: Array, stats: Any) -> Array:
    if state.plan.flow is None:
      raise ValueError('sparsejax.project: the flow has coefficients that are arrays; give numbers to the recipe.')
    signals = Signals(stats=stats, step=jax.tree.leaves(state.step)[0], axes=leaf.axes)
    return state.plan.flow.project(w, mask, signals)

  return _replace(params, opt_state, point)


def _replace(params: PyTree, opt_state: Any, point: Callable[..., Array]) -> PyTree:
  """`point(state, leaf, weight, mask, stats)` in the place of every sparse leaf, in that leaf's dtype."""
  paths, leaves, treedef = trees.flatten(params)
  place = {path: i for i, path in enumerate(paths)}
  for state in find(opt_state):
    if jax.tree.leaves(state.step)[0].ndim:
      raise ValueError('sparsejax: this state was made under jax.vmap; call this under jax.vmap too.')
    masks, masters, stats = by_path(state.masks), by_path(state.master), by_path(state.stats)
    for leaf in state.plan.leaves:
      _refuse_unless_among(paths, leaf.path)
      w, mask = leaves[place[leaf.path]], masks[leaf.path]
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


def apply_masks(tree: PyTree, opt_state: Any) -> PyTree:
  """`tree`, anything in the parameters' structure, with zeros where the state's masks prune.

  For what is made of parameters from different updates, as an average of them is (EMA, SWA, schedule-free's): it has
  a zero only where all of them had one.
  """
  return jax.tree.map(lambda x, mask: jnp.where(mask, x, jnp.zeros((), x.dtype)), tree, masks(tree, opt_state))


def masks(params: PyTree, opt_state: Any) -> PyTree:
  """The masks in the parameters' structure, `True` where kept; the scalar `True` for a leaf that is dense."""
  found = {}
  for state in find(opt_state):
    found.update(by_path(state.masks))
  paths, _, treedef = trees.flatten(params)
  for path in found:
    _refuse_unless_among(paths, path)
  return treedef.unflatten([found.get(path, jnp.ones((), bool)) for path in paths])


def plans(opt_state: Any) -> list[Plan]:
  """What was asked, for each `SparseState` in an optimizer state."""
  return [state.plan for state in find(opt_state)]
