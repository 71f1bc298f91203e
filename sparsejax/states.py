"""Defines the memory of a sparse optimizer, and functions that find the memory again inside of any optimizer state.

A recipe may be wrapped, chained and partitioned by any transform of optax. The functions here find its masks there.

    state = sj.recipes.sr_ste(optax.adamw(1e-3)).init(params)
    params = states.project(params, state)
    masks = states.masks(params, state)     # `True` where kept
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import errors, trees
from sparsejax.types import Array, Asked, Axes, Flow, Pattern, PyTree, Signals, moved


@dataclasses.dataclass(frozen=True)
class SparseLeaf:
  """A `SparseLeaf` says what is asked of one sparse parameter: static, compared by value.

  `pattern` is `None` where none is on record: a score's threshold decides, or the pattern has a traced number.
  """

  path: str
  shape: tuple[int, ...]
  axes: Axes
  pattern: Pattern | None
  asked: Asked = Asked()

  @property
  def sparsity(self) -> float | None:
    """The sparsity that is asked of the leaf by itself, or `None`."""
    return None if self.asked.together else self.asked.sparsity

  @property
  def layer_shape(self) -> tuple[int, ...]:
    """The shape of one layer of the leaf."""
    return tuple(n for a, n in enumerate(self.shape) if a not in self.axes.layer)


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Plan:
  """A `Plan` says what is asked of all sparse leaves. A plan is part of the state's treedef, never saved or traced."""

  leaves: tuple[SparseLeaf, ...] = ()
  flow: Flow | None = None

  @property
  def sparsity(self) -> float | None:
    """The sparsity that is asked of all leaves together, or `None` if each leaf is asked by itself."""
    return next((leaf.asked.sparsity for leaf in self.leaves if leaf.asked.together), None)


class SparseState(NamedTuple):
  """A `SparseState` is the memory of a sparse optimizer. Its trees have the structure of the parameters.

  `optax.MaskedNode` stands where nothing is stored of a leaf. `step`: `int32[]`, the number of updates so far. `key`:
  the key of random scores, `uint32[2]`, or `None`. `masks`: `bool`, shaped like the sparse parameters, of the point
  that the user holds. `master`: the dense weights behind the point, in float32 for narrower parameters; none for fixed
  masks. `stats`: a threshold that the selection gives to the flow, or the memory of a score: nothing, a scalar, or
  arrays shaped like the leaf. `inner`: the state of the user's optimizer.
  """

  step: Array
  key: Array | None
  masks: PyTree
  master: PyTree
  stats: PyTree
  inner: Any
  plan: Plan


def find(opt_state: Any) -> list[SparseState]:
  """Returns every `SparseState` inside an optimizer state, however it was wrapped, chained or partitioned.

  Raises `ValueError` if there is none.
  """
  is_state = lambda node: isinstance(node, SparseState)
  sparse = [node for node in jax.tree.leaves(opt_state, is_leaf=is_state) if is_state(node)]
  if not sparse:
    raise ValueError('sparsejax: no SparseState in this optimizer state. Wrap the optimizer in a recipe, as in '
                     'sparsejax.recipes.sr_ste(optax.adamw(1e-3)), and pass the state that init or update returned.')
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
  """Returns `tree`, which has the parameters' structure, with zeros where the state's masks prune.

  Averages of parameters from different updates (EMA, SWA, schedule-free's) need these zeros: an average is zero only
  where all of the averaged parameters are zero.
  """
  return jax.tree.map(lambda x, mask: jnp.where(mask, x, jnp.zeros((), x.dtype)), tree, masks(tree, opt_state))


def masks(params: PyTree, opt_state: Any) -> PyTree:
  """Returns the masks in the parameters' structure, `True` where kept; the scalar `True` for a dense leaf."""
  sparse = {path: mask for state in find(opt_state) for path, mask in by_path(state.masks).items()}
  paths, _, treedef = trees.flatten(params)
  for path in sparse:
    _refuse_unless_among(paths, path)
  return treedef.unflatten([sparse.get(path, jnp.ones((), bool)) for path in paths])


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
__getattr__ = moved(__name__, FORMER)
