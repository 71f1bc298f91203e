"""Settles which parameters `prune` changes, by which pattern and sparsity, and in which uses the program shows them.

A `Target` is one parameter that is to be pruned. A *unit* is one layer of a target that the program takes by itself: a
layer of a scan, or the whole parameter.

    made = targets('prune', program, params, recipe, where=None, axes=None, keep=None)
    made['blocks/up/kernel'].units                       # [(0,), (1,), (2,)]: the layers of a scan
"""

import dataclasses
import functools
import itertools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, errors, patterns, scores, selections, trees
from sparsejax.post_training.recipe import Recipe
from sparsejax.programs.arrangements import Arrangement, arrangement_of
from sparsejax.programs.contractions import Contractions, Use, read
from sparsejax.programs.heads import ends
from sparsejax.programs.jaxprs import Address, equations
from sparsejax.programs.tracing import Program
from sparsejax.states import SparseLeaf
from sparsejax.types import Array, Axes, Pattern, Predicate, PyTree

Index = tuple[int, ...]


@dataclasses.dataclass(frozen=True, eq=False)
class Target:
  """A `Target` is a parameter that is to be pruned, with the pattern that is asked and its uses in the program.

  `kept`: `bool` shaped like the parameter, `False` for weights that are pruned already. `uses`: the products with data.
  `arrangements`: that of each use, by the number of the use. `gone`: the axes of which each use takes one index.
  """

  path: str
  array: Array
  leaf: SparseLeaf
  pattern: Pattern
  kept: Array
  uses: Mapping[int, Use]
  arrangements: Mapping[int, Arrangement]

  @property
  def gone(self) -> tuple[int, ...]:
    return next(iter(self.arrangements.values())).gone

  @functools.cached_property
  def units(self) -> list[Index]:
    """The index of each unit along the axes `gone`."""
    return list(itertools.product(*(range(self.array.shape[a]) for a in self.gone)))

  def at(self, array: Array, unit: Index) -> Array:
    """Returns the part of an array like the parameter that is one unit."""
    picked = dict(zip(self.gone, unit))
    return array[tuple(picked.get(a, slice(None)) for a in range(array.ndim))]

  def joined(self, parts: Mapping[Index, Array]) -> Array:
    """Returns an array like the parameter from the parts of all units."""
    if not self.gone:
      return parts[()]
    sizes = [self.array.shape[a] for a in self.gone]
    stack = jnp.stack([parts[unit] for unit in self.units])
    return jnp.moveaxis(stack.reshape(*sizes, *stack.shape[1:]), range(len(sizes)), self.gone)


def names_of(target: Target, unit: Index, matrix: int | None = None) -> str:
  """Returns how messages and reports name a unit, or a matrix of it: `blocks/up/kernel[2]`."""
  numbers = [*unit, *([] if matrix is None else [f'matrix {matrix}'])]
  return target.path + (f'[{", ".join(map(str, numbers))}]' if numbers else '')


def targets(function: str, program: Program, params: PyTree, recipe: Recipe, where: Predicate | PyTree | None,
            axes: Mapping[str, Axes] | None, keep: Any) -> tuple[dict[str, Target], dict[str, str]]:
  """Returns the targets by path, in the order of the program, and the reason for each parameter that is left dense."""
  found = read(program)
  head = _head(program, found)
  picked = _picked(function, found, head, params, where)
  paths, leaves, _ = trees.flatten(params)
  held = {path: leaf for path, leaf, pick in zip(paths, leaves, picked) if pick}
  arguments.refuse_unknown(function, held)
  arrays = {path: jnp.asarray(leaf) for path, leaf in held.items()}
  order = [path for path in found if path in arrays]
  arrays = {path: arrays[path] for path in (*order, *(path for path in arrays if path not in order))}
  _refuse(function, params, where, {path: _unused(found, path, array) for path, array in arrays.items()}, arrays)
  made = _arranged(program, found, arrays)
  _refuse(function, params, where, {path: each for path, each in made.items() if isinstance(each, str)}, arrays)
  own = {path: _axes(function, found, axes, path, array) for path, array in arrays.items()}
  chosen = words_of(recipe).plan(arrays, own)
  by_path = dict(zip(arrays, trees.per_leaf(function, 'pattern', patterns.parse(recipe.pattern), list(arrays))))
  kept = _kept(function, params, arrays, keep)
  uses = {path: {i: use for i, use in enumerate(found.uses[path]) if use.data} for path in arrays}
  return ({leaf.path: Target(leaf.path, arrays[leaf.path], leaf, by_path[leaf.path], kept[leaf.path],
                             uses[leaf.path], made[leaf.path]) for leaf in chosen.leaves},
          _left_dense(found, head, params, arrays, where))


def words_of(recipe: Recipe) -> selections.Selection:
  """Returns the selection that shares out the sparsity of a recipe, and chooses all masks where no data are needed."""
  return selections.leafwise(recipe.pattern, score=recipe.score or scores.magnitude,
                             sparsity=recipe.sparsity, allocation=recipe.allocation)


def _picked(function: str, found: Contractions, head: str | None, params: PyTree, where: Any) -> list[bool]:
  """Returns whether each leaf is pruned. Without `where`, all that is contracted, but look-ups and the head."""
  if where is not None:
    return trees.select(function, where, params)
  picked = trees.select(function, trees.default_where(found), params)
  rest = [pick and path != head and any(use.data for use in found.uses.get(path, ()))
          for path, pick in zip(trees.flatten(params)[0], picked)]
  if not any(rest):
    raise ValueError(f'{function}: the one product with a parameter that can be pruned takes {head!r}, and is the last '
                     f"one, the head, which stays dense by default. Pass where=sj.trees.named({head!r}) to prune it.")
  return rest


def _head(program: Program, found: Contractions) -> str | None:
  """Returns the path of the parameter in the last product with data, if the product ends the program."""
  uses = [(use.address, path) for path, uses in found.uses.items() for use in uses if use.data]
  address, path = max(uses, default=((), None))
  return path if address in ends(program) else None


def _left_dense(found: Contractions, head: str | None, params: PyTree, arrays: Mapping[str, Array], where: Any
                ) -> dict[str, str]:
  """Returns why each contracted parameter, and each look-up, that is not pruned is left dense."""
  reasons = {}
  for path, leaf in zip(*trees.flatten(params)[:2]):
    dtype = jnp.result_type(leaf)
    if path not in arrays and (path in found or path in found.lookups):
      reasons[path] = ('left out by `where`' if where is not None else 'looked up by data' if path in found.lookups
                       else 'the last product of the program' if path == head else
                       f'of dtype {dtype}' if not jnp.issubdtype(dtype, jnp.floating) else
                       'a vector' if any(use.data for use in found.uses[path]) else 'no product takes it with data')
  return reasons


@jax.jit
def _finite(array: Array) -> Array:
  return jnp.all(jnp.isfinite(array))


def _unused(found: Contractions, path: str, array: Array) -> str:
  """Returns why a parameter cannot be pruned by data, or an empty string."""
  if not bool(_finite(array)):
    return 'it holds NaN or infinities. Repair it, or leave it out of `where`.'
  if path not in found.uses:
    return (f'the program contracts it nowhere ({found.elsewhere.get(path, "nothing uses it")}). '
            'Leave it out of `where`.')
  return '' if any(use.data for use in found.uses[path]) else 'no product takes it with data. Leave it out of `where`.'


def _arranged(program: Program, found: Contractions, arrays: Mapping[str, Array]) -> dict[str, Any]:
  """Returns the arrangements of the uses of each parameter, or the reason why one use has none."""
  wanted: dict[Address, Any] = {use.address: None for path in arrays for use in found.uses[path]}
  wanted |= {address: eqn for address, eqn in equations(program) if address in wanted}
  made: dict[str, Any] = {}
  for path, array in arrays.items():
    if path in found.ambiguous:
      made[path] = found.ambiguous[path] + ' Leave it out of `where`.'
      continue
    each: dict[int, Any] = {i: arrangement_of(use, wanted[use.address], array.shape)
                            for i, use in enumerate(found.uses[path])}
    problem = next((own for own in each.values() if isinstance(own, str)), None)
    if problem is None and len({own.gone for own in each.values()}) > 1:
      problem = 'products take different layers of it at once. Leave it out of `where`.'
    made[path] = problem or each
  return made


def _axes(function: str, found: Contractions, axes: Mapping[str, Axes] | None, path: str, array: Array) -> Axes:
  """Returns the axes of a parameter in the program; refuses axes of the user that differ."""
  traced = found[path]
  if axes is not None:
    own = trees.axes_of(function, axes, path, array.shape)
    sets = lambda each: [{a for a in group if array.shape[a] != 1} for group in each[:4]]
    if own.source != 'convention' and sets(own) != sets(traced):
      raise errors.at_leaf(function, path, array.shape, f'axes= says {own[:4]}, and the program has {traced[:4]}. '
                           'Leave axes= out: the program decides what is pruned together.')
  return traced


def _kept(function: str, params: PyTree, arrays: Mapping[str, Array], keep: Any) -> dict[str, Array]:
  """Returns the mask of the weights of each parameter that are not pruned yet."""
  if keep is False:
    return {path: jnp.ones(array.shape, bool) for path, array in arrays.items()}
  if keep is None or isinstance(keep, str):
    if keep not in (None, 'zeros'):
      raise errors.unknown(function, '`keep`', keep, ['zeros', 'False', 'a tree of masks'])
    return {path: array != 0 for path, array in arrays.items()}
  if str(jax.tree.structure(keep)) != str(jax.tree.structure(params)):
    raise ValueError(f'{function}: the masks in `keep` have another structure than the parameters; pass masks as '
                     'prune returns them, or keep="zeros".')
  masks = dict(zip(*trees.flatten(keep)[:2]))
  for path, array in arrays.items():
    if np.shape(masks[path]) not in ((), array.shape):
      raise errors.at_leaf(function, path, array.shape, f'its mask in `keep` has the shape {np.shape(masks[path])}. '
                           "Give a mask of the parameter's shape, or True.")
  return {path: jnp.broadcast_to(jnp.asarray(masks[path], bool), array.shape) for path, array in arrays.items()}


def _refuse(function: str, params: PyTree, where: Any, reasons: Mapping[str, str], arrays: Mapping[str, Array]) -> None:
  problems = [errors.Problem(path, arrays[path].shape, why) for path, why in reasons.items() if why]
  if problems:
    usual = trees.matrices if where is None else where
    raise trees.refused(errors.at_leaves(function, problems), usual, params)

