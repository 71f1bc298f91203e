"""`Leaves` say which leaves of the parameters are sparse, and pick them out of any tree with the same structure.

    leaves = Leaves(params, where=None, axes=None, selection=selection, flow=flows.hard())
    weights = leaves.pick(params)                  # the sparse leaves, in the order of `leaves.plan.leaves`
    params = leaves.put(weights, params)           # back into the parameters' structure
"""

import dataclasses
import functools
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import conventions, errors, flows, kinds, trees
from sparsejax.selections import Selection, refuse
from sparsejax.transforms import tying
from sparsejax.types import Array, Axes, Flow, PyTree, Signals

_AS_MADE = 'Make the state by tx.init(params), the gradients of the same params.'
_LIKE_PARAMETERS = 'Give arrays shaped like the parameters.'

KEYS = 'threefry2x32'


class Leaves:
  """A `Leaves` is the view that one call has of the parameters: the paths, the sparse leaves, and the plan of them.

  `leaders`: of each leaf that is tied to another, the place of the other. Tied leaves are the last of all leaves.
  """

  @classmethod
  def of(cls, method: Any, params: PyTree) -> 'Leaves':
    """Returns the leaves of a `Method`, with a plan that carries the method's identity."""
    leaves = cls(params, method.where, method.axes, method.selection, method.until_freeze, method.tied)
    leaves.plan = dataclasses.replace(leaves.plan, recipe=method.name, words=method.words, once=method.once)
    return leaves

  def __init__(self, params: PyTree, where: Any, axes: Mapping[str, Axes] | None, selection: Selection, flow: Flow,
               tied: Mapping[str, str] | None = None):
    self.paths, leaves, self.treedef = trees.flatten(params)
    where = trees.default_where(axes) if where is None else where
    picked = trees.select('sparsejax', where, params)
    leader_of = tying.leader_of(tied, dict(zip(self.paths, leaves))) if tied else {}
    tying.refuse_alone(leader_of, dict(zip(self.paths, picked)))
    alone = [i for i, pick in enumerate(picked) if pick and self.paths[i] not in leader_of]
    self.arrays = {self.paths[i]: leaves[i] for i in alone}
    try:
      if where is trees.matrices:
        refuse_complex(self.paths, leaves, self.treedef)
      refuse(self.arrays, map(narrow, self.arrays.values()))
      self.axes = trees.axes_by_path('sparsejax', axes, params, self.arrays)
      refuse(self.arrays, (unoriented(flow, own) for own in self.axes.values()))
      self.plan = dataclasses.replace(selection.plan(self.arrays, self.axes), flow=flows.recorded(flow))
      self._follow(leader_of, alone, leaves)
    except errors.AtLeaves as refusal:
      raise trees.refused(refusal, where, params) from None

  def _follow(self, leader_of: Mapping[str, str], alone: list[int], leaves: list[Array]) -> None:
    """Adds the leaves that follow a sparse leaf; those of a dense leaf are dense."""
    place, own = {path: i for i, path in enumerate(self.arrays)}, {path: i for i, path in enumerate(self.paths)}
    tied = {own[path]: place[leader] for path, leader in leader_of.items() if leader in place}
    self.leaders, self.index = tuple(tied.values()), [*alone, *tied]
    more = [tying.follower(self.plan.leaves[i], self.paths[at], leaves[at].shape) for at, i in tied.items()]
    self.arrays |= {self.paths[at]: leaves[at] for at in tied}
    self.axes |= {leaf.path: leaf.axes for leaf in more}
    refuse(self.arrays, map(narrow, self.arrays.values()))
    self.plan = dataclasses.replace(self.plan, leaves=(*self.plan.leaves, *more))

  def tied(self, select: Any) -> Any:
    """Returns `select` of a selection for all leaves, where some of them follow others."""
    return tying.Tied(select, self.leaders) if self.leaders else select

  def pick(self, tree: PyTree, what: str = 'parameters, gradients and state', remedy: str = _AS_MADE) -> list[Any]:
    """Returns the sparse leaves of a tree. Raises `ValueError` if its structure is not that of the parameters."""
    try:
      leaves = self.treedef.flatten_up_to(tree)
    except ValueError as problem:
      others = trees.flatten(tree, is_leaf=trees.is_dense)[0]
      odd = errors.some(sorted({*self.paths} ^ {*others}))
      raise ValueError(f'sparsejax: {what} are not of one structure; they differ in '
                       f'{odd or "the containers, although the paths are the same"}. {remedy}') from problem
    return [leaves[i] for i in self.index]

  def probed(self, tree: PyTree) -> list[Array]:
    """Returns the sparse leaves of the result of a probe. Raises `ValueError` for a leaf of another shape."""
    found = self.pick(tree, 'parameters and the `ticket`, or the result of the probe,', _LIKE_PARAMETERS)
    refuse(self.arrays, (None if jnp.shape(x) == w.shape else (
        f'the probe returns shape {jnp.shape(x)} for it, or the `ticket` has this shape. {_LIKE_PARAMETERS}')
        for x, w in zip(found, self.arrays.values())))
    return found

  def put(self, values: Sequence[Any] | None, base: PyTree | None = None) -> PyTree:
    """Returns a tree with `values` at the sparse leaves, and with the leaves of `base`, or nothing, elsewhere."""
    size = self.treedef.num_leaves
    leaves = [trees.DENSE] * size if base is None else self.treedef.flatten_up_to(base)
    for i, value in zip(self.index, values or [trees.DENSE] * size):
      leaves[i] = value
    return self.treedef.unflatten(leaves)

  def slots(self, inner: Any) -> dict[int, int]:
    """Maps the number of each slot among the leaves of an optimizer state to the number of the slot's sparse leaf."""
    names, leaves, _ = trees.flatten(inner)
    place = {self.paths[i]: number for number, i in enumerate(self.index)}
    found = {}
    for i, (name, slot) in enumerate(zip(names, leaves)):
      owner = max((path for path in self.paths if f'/{name}'.endswith(f'/{path}')), key=len, default=None)
      if owner in place and self.arrays[owner].shape == jnp.shape(slot):
        found[i] = place[owner]
    return found

  def signals(self, step: Array, stats: Sequence[Any], grads: Sequence[Any] | None = None,
              key: Array | None = None) -> list[Signals]:
    """Returns what words may read, one `Signals` for each sparse leaf. Every leaf and step has its own key."""
    keys = [None] * len(self.index) if key is None else self._keys(step, key)
    grads = [None] * len(self.index) if grads is None else grads
    return [Signals(*each, step, leaf.axes) for *each, leaf in zip(grads, keys, stats, self.plan.leaves)]


  def _keys(self, step: Array, key: Array) -> list[Array]:
    """Returns the key of each leaf at `step`. A key depends on the path, so that other leaves do not change a draw."""
    names = np.array([zlib.crc32(leaf.path.encode()) for leaf in self.plan.leaves], np.uint32)
    return _folded(key, step, names)


def refuse_complex(paths: Sequence[str], leaves: Sequence[Any], treedef: Any) -> None:
  """Raises `ValueError` for complex matrices: the default `where` would pass over them in silence."""
  found = {path: w for path, w in zip(paths, leaves) if jnp.issubdtype(getattr(w, 'dtype', None), jnp.complexfloating)}
  if found:
    real = [jax.ShapeDtypeStruct(w.shape, jnp.float32) if path in found else w for path, w in zip(paths, leaves)]
    picked = trees.select('sparsejax', trees.matrices, treedef.unflatten(real))
    found = {path: found[path] for path, pick in zip(paths, picked) if pick and path in found}
    refuse(found, (f'dtype {w.dtype} is not floating; say in `where` that it stays dense.' for w in found.values()))


def narrow(leaf: Array) -> str | None:
  """Returns why a leaf of this dtype cannot be sparse, or `None` if it can."""
  return None if leaf.dtype.itemsize >= 2 else (
      f'an update of dtype {leaf.dtype} cannot carry the step from one sparse point to the next. Keep the parameter in '
      'bfloat16 and cast it in the forward pass, or leave it out of `where`.')


def unoriented(flow: Flow, axes: Axes) -> str | None:
  """Returns why a flow that lies along axes cannot be that of a leaf with these axes, or `None` if it can."""
  return None if not flow.along_axes or axes.source != 'unknown' else (
      'the flow of this recipe lies along axes, and neither name, rank nor container says what those of the parameter '
      f'mean. {conventions.REMEDY}')


# A single program outside of `jit`, where each operation would be compiled by itself.
@functools.partial(jax.jit, inline=True)
def _folded(key: Array, step: Array, names: np.ndarray) -> list[Array]:
  """Returns a key for each name, of the key `uint32[2]` at `step`."""
  now = jax.random.fold_in(jax.random.wrap_key_data(key, impl=KEYS), step)
  keys = jax.vmap(jax.random.fold_in, (None, 0))(now, names)
  return [jax.random.wrap_key_data(data, impl=KEYS) for data in kinds.apart(jax.random.key_data(keys))]


def plain_key(key: Array | None) -> Array | None:
  """Returns a new key as `uint32[2]`, whatever the kind of `key`: NumPy and checkpoints do not know typed keys."""
  return None if key is None else _plain(key)


@functools.partial(jax.jit, inline=True)
def _plain(key: Array) -> Array:
  return jax.random.key_data(jax.random.key(jax.random.bits(key), impl=KEYS))


def master_of(w: Array) -> Array:
  """Returns a copy of `w` in float32 or wider: a narrow master rounds small steps away, a shared one is not donated."""
  return jnp.array(w, dtype=w.dtype if w.dtype.itemsize > 4 else jnp.float32, copy=True)
