"""Runs the program of a function on smaller parameters, so that removed units are gone from all intermediates.

The program is that of the large parameters, with its own numbers: a mean still divides by the old length. Only lengths
change. The user's function on the smaller parameters could compute something else.

    small = smaller(apply, {'up/kernel:1': kept, 'down/kernel:0': kept})
    small({'up/kernel': up[:, kept], 'down/kernel': down[kept]}, x)       # traced anew for each shape of `x`
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.programs import jaxprs, sizes
from sparsejax.programs.evaluate import Operation, ValueRules, evaluate, inside
from sparsejax.programs.structures import Outcome
from sparsejax.programs.tracing import Program, trace
from sparsejax.structured.dimensions import Dim, length
from sparsejax.structured.layers import layered
from sparsejax.structured.reading import Reading, Symbolic
from sparsejax.structured.rules import RULES
from sparsejax.types import Array, PyTree

# 'path:axis' -> which positions of the large axis are kept, `bool[n]`, or `bool[layers, n]` with equal counts
Kept = Mapping[str, np.ndarray]
SUMS = {*jaxprs.CONTRACTIONS, 'reduce_sum'}  # zero without a summand


def left(mask: np.ndarray) -> int:
  """Returns how many positions of an axis are kept, in each layer."""
  return int(np.count_nonzero(mask)) // (len(mask) if mask.ndim == 2 else 1)


def smaller(apply: Callable[..., Any], kept: Kept) -> Callable[..., Any]:
  """Returns a function like `apply` that takes parameters without the positions that are not `kept`.

  The function traces `apply` with the large shapes for each new shape of its inputs, so it works under `jit`, `grad`
  and `vmap`. The function raises `ValueError` for parameters of other shapes, and for inputs with which the
  removed units cannot be removed.
  """
  runs: dict[Any, _Smaller] = {}

  @functools.wraps(apply)
  def call(params: PyTree, *inputs: Any, **kwargs: Any) -> Any:
    args = (large(params, kept), *inputs)
    key = _key((args, kwargs))
    run = runs.get(key)
    if run is None:
      run = _Smaller(trace(apply, args, kwargs), kept)
      if key is not None:
        runs[key] = run
    arrays = [leaf for leaf in jax.tree.leaves((params, *inputs, kwargs)) if _is_array(leaf)]
    return run(arrays)

  return call


def large(params: PyTree, kept: Kept) -> PyTree:
  """Returns the shapes of the large parameters from small ones; raises `ValueError` where these do not fit `kept`."""
  paths, leaves, treedef = trees.flatten(params)
  if missing := {name.rpartition(':')[0] for name in kept} - set(paths):
    raise errors.unknown('structured.cut', 'parameter', min(missing), paths)
  return treedef.unflatten([_large(path, leaf, kept) for path, leaf in zip(paths, leaves)])


def _large(path: str, leaf: Any, kept: Kept) -> Any:
  if not _is_array(leaf):
    return leaf
  shape = list(leaf.shape)
  for axis, n in enumerate(shape):
    mask = kept.get(f'{path}:{axis}')
    if mask is not None and left(mask) != n:
      raise errors.at_leaf('structured.cut', path, leaf.shape, f'the smaller function keeps {left(mask)} '
                           f'of {mask.shape[-1]} positions of axis {axis}; pass the parameters that `cut` returned.')
    shape[axis] = n if mask is None else mask.shape[-1]
  return jax.ShapeDtypeStruct(tuple(shape), leaf.dtype)


def _is_array(leaf: Any) -> bool:
  return hasattr(leaf, 'shape') and hasattr(leaf, 'dtype') and not isinstance(leaf, np.generic)


def _key(args: Any) -> Any:
  """Returns what decides the program of a call, or `None` if an argument cannot be compared."""
  leaves, treedef = jax.tree.flatten(args)
  about = [(leaf.shape, leaf.dtype, getattr(leaf, 'weak_type', False)) if _is_array(leaf) else (type(leaf), leaf)
           for leaf in leaves]
  key = (treedef, tuple(about))
  try:
    hash(key)
  except TypeError:
    return None
  return key


class _Smaller:
  """A `_Smaller` runs one program on smaller arrays."""

  def __init__(self, program: Program, kept: Kept):
    self.program, self.reading = program, Reading(program, RULES)
    self.reading.run()
    self.keep = _units(self.reading, kept)
    self.masks: dict[tuple[Dim, ...], list[np.ndarray]] = {}
    self.rules = ValueRules(self._operation, concerns=self._concerns)

  def __call__(self, arrays: list[Any]) -> Any:
    results = evaluate(self.program, arrays, self.rules)
    return self.program.unflatten([self._fitted(x, fact) for x, fact in zip(results, self.reading.results)])

  def _kept(self, fact: Symbolic) -> list[np.ndarray]:
    if fact.dims not in self.masks:
      self.masks[fact.dims] = [self.reading.variables.kept(dim, self.keep) for dim in fact.dims]
    return self.masks[fact.dims]

  def _changed(self, fact: Symbolic) -> bool:
    return not all(mask.all() for mask in self._kept(fact))

  def _concerns(self, eqn: Any, values: list[Any], address: tuple[int, ...]) -> bool:
    _, facts, results = self.reading.seen[address]
    return any(map(self._changed, (*facts, *results)))

  def _operation(self, eqn: Any, values: list[Any], here: Operation) -> Outcome | None:
    _, facts, results = self.reading.seen[here.address]
    values, name = list(map(self._fitted, values, facts)), eqn.primitive.name
    if self._vanishes(name, facts, results):
      return [jnp.zeros(sizes.kept_shape(self._kept(fact)), v.aval.dtype) for fact, v in zip(results, eqn.outvars)]
    if name in sizes.RESIZED:
      kept = sizes.Sizes(list(map(self._kept, facts)), list(map(self._kept, results)))
      return sizes.RESIZED[name](eqn, values, kept)
    if not values:  # an `iota`
      return list(map(self._fitted, here.dense(values), results))
    outcome = inside(eqn, values, self.rules, here, functools.partial(self._original, here, facts, results))
    return here.dense(values) if outcome is None else outcome

  def _vanishes(self, name: str, facts: list[Symbolic], results: list[Symbolic]) -> bool:
    """Returns whether nothing is left of the results of an operation, or of what it sums over, so that none is run."""
    empty = lambda fact: not all(mask.any() for mask in self._kept(fact))
    return all(map(empty, results)) or (name in SUMS and any(map(empty, facts)))

  def _fitted(self, x: Any, fact: Symbolic) -> Any:
    """Returns what is kept of a constant, which is whole; other values are smaller already."""
    kept = self._kept(fact)
    return x if np.shape(x) == sizes.kept_shape(kept) else sizes.taken(x, kept)

  def _original(self, here: Operation, facts: list[Symbolic], results: list[Symbolic], arrays: list[Any]) -> list[Any]:
    """Runs an operation with a derivative rule of its own on arrays of the old shapes, and takes what is kept."""
    return list(map(self._fitted, here.dense(list(map(self._spread, arrays, facts))), results))

  def _spread(self, x: Array, fact: Symbolic) -> Array:
    """Returns an array of the old shape: zero at removed positions, or another entry where zero is not what is there.
    """
    for axis, (dim, kept) in enumerate(zip(fact.dims, self._kept(fact))):
      if kept.all():
        continue
      x = jnp.take(x, np.maximum(np.cumsum(kept) - 1, 0), axis)
      if any(v not in fact.live for v in self.reading.variables.leaves(dim) if v in self.keep):
        x = jnp.where(jnp.expand_dims(kept, [a for a in range(x.ndim) if a != axis]), x, jnp.zeros((), x.dtype))
    return x


def _units(reading: Reading, kept: Kept) -> dict[int, np.ndarray]:
  """Returns the kept units of each variable; raises `ValueError` if they do not give the kept positions."""
  keep: dict[int, np.ndarray] = {}
  parameters = reading.parameters()
  first = {name: mask if mask.ndim == 1 else mask[0] for name, mask in kept.items()}
  for name, mask in first.items():
    path, _, axis = name.rpartition(':')
    for v in reading.variables.leaves(parameters[path][int(axis)]):
      for labels in reading.variables.labels(parameters[path][int(axis)], v):
        own = np.zeros(reading.variables.sizes[v], bool)
        own[labels[mask & (labels >= 0)]] = True
        keep[v] = keep.get(v, np.ones_like(own)) & own
  keep = {v: own for v, own in keep.items() if not own.all()}
  layers = layered(reading) if any(mask.ndim == 2 for mask in kept.values()) else {}
  for path, dims in parameters.items():
    for number, dim in enumerate(dims):
      mask = first.get(f'{path}:{number}', np.ones(1, bool))
      fits = np.array_equal(reading.variables.kept(dim, keep), np.broadcast_to(mask, length(dim)))
      free = [v for v in reading.variables.leaves(dim) if v in keep]
      by_layer = kept.get(f'{path}:{number}', mask).ndim == 2
      if not fits or any(reading.variables.pinned.get(v) for v in free) or by_layer and not {*free} & {*layers}:
        raise ValueError(f'structured.cut: with inputs of these shapes, what was removed of axis {number} of {path!r} '
                         'cannot be removed; read the groups with these inputs, and cut again.')
  return keep

