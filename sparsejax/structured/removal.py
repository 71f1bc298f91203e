"""Removes units from parameters, from the function that runs on them, and from optimizer states.

    found = groups(model.apply, variables, x)
    small = cut(found, variables, {'params/up/kernel:1': keep})    # `keep`: `bool[units]`, `True` where kept
    y = small.apply(small.params, x)                               # equals the function with zeros for removed units
    state = cut_state(found, opt_state, small.kept)                # training goes on
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, errors, trees
from sparsejax.programs.tracing import trace
from sparsejax.structured.erasing import disconnects
from sparsejax.structured.groups import Groups, UnitGroup
from sparsejax.structured.reading import Reading
from sparsejax.structured.rules import RULES
from sparsejax.structured.same import is_same
from sparsejax.structured.smaller import Kept, smaller
from sparsejax.types import PyTree
from sparsejax.units import PRODUCED, Places


class Cut(NamedTuple):
  """A `Cut` holds smaller parameters, the function that runs on them, and what is kept of the large parameters.

  `kept` maps 'path:axis' to `bool[n]`, for each axis that is shorter now, or to `bool[layers, n]`. `apply` is the
  user's own function if its program on the smaller parameters is that of the function that `cut` makes.
  """

  params: PyTree
  apply: Callable[..., Any]
  kept: Kept


@arguments.checked
def cut(groups: Groups, params: PyTree, keep: Mapping[str, Any] | None = None) -> Cut:
  """Returns smaller parameters, and the function that computes on them what zeros in the removed units compute.

  `keep` maps names of groups to `bool[units]`, `True` where a unit stays; groups without an entry stay whole. A group
  with `layers` also takes `bool[layers, units]` with equally many units in each layer. The values in removed units do
  not matter. Without `keep`, a unit goes if the function stays the same: if all that the unit adds to any sum is zero,
  for example because the members that produce it are zero. A unit of a stack goes if that is so in each layer. A unit
  whose producing matrix is zero, but which still adds something, is refused with the reason.

  The result computes as the program of `groups.apply` does, with its old counts: a mean still divides by the number of
  channels before the cut. A group may lose all of its units if it is `erasable` with all others that do. Raises
  `ValueError` for parameters of other shapes (groups are those of one model: read them again after a cut), for unknown
  groups, masks of another size, and for groups without which a result depends on no input.
  """
  leaves = leaves_of('structured.cut', groups, params)
  units = _unneeded(groups, leaves) if keep is None else _checked(groups, keep)
  kept = positions(groups, units)
  small = _sliced(params, kept)
  apply = smaller(groups.apply, kept)
  own = is_same(groups.apply, apply, (small, *groups.inputs))
  return Cut(small, groups.apply if own else apply, kept)


@arguments.checked
def masks(groups: Groups, keep: Mapping[str, Any]) -> PyTree:
  """Returns masks shaped like the parameters: `False` in all positions of the units that `keep` does not keep.

  A parameter without such positions has a scalar `True`. `keep` is that of `cut`.
  """
  units = {name: mask for name, mask in _checked(groups, keep).items() if not mask.all()}
  paths, leaves, treedef = trees.flatten(groups.shapes)
  places = Places.of({name: groups[name] for name in units}, {
    path: leaf for path, leaf in zip(paths, leaves) if hasattr(leaf, 'shape')})
  found = dict(zip(places.paths, places.spread(places.rows_of(units), outside=True)))
  masks = [(found.get(path), leaf) for path, leaf in zip(paths, leaves)]
  return treedef.unflatten([np.ones((), bool) if mask is None else np.broadcast_to(mask, leaf.shape)
                            for mask, leaf in masks])


def positions(groups: Groups, units: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
  """Returns the kept positions of each axis that loses some, by 'path:axis'."""
  kept: dict[str, np.ndarray] = {}
  for name, keep in units.items():
    for member in groups[name].members if not keep.all() else ():
      own = member.kept(keep)
      kept[member.name] = kept[member.name] & own if member.name in kept else own
  return kept


def _sliced(params: PyTree, kept: Kept) -> PyTree:
  paths, leaves, treedef = trees.flatten(params)
  return treedef.unflatten([shortened(leaf, path, kept) for path, leaf in zip(paths, leaves)])


def shortened(leaf: Any, path: str, kept: Kept) -> Any:
  """Returns what is kept of an array with the shape of the parameter at `path`."""
  for axis in range(len(getattr(leaf, 'shape', ()))):
    mask = kept.get(f'{path}:{axis}')
    if mask is not None:
      of = np if isinstance(leaf, np.ndarray) else jnp
      leaf = of.take(leaf, np.flatnonzero(mask), axis) if mask.ndim == 1 else of.take_along_axis(
          leaf, _places(mask, axis, leaf.ndim), axis)
  return leaf


def _places(mask: np.ndarray, axis: int, rank: int) -> np.ndarray:
  """Returns the kept places of each layer, for `take_along_axis`."""
  places = np.nonzero(mask)[1].reshape(len(mask), -1)
  return places.reshape([len(mask) if a == 0 else places.shape[1] if a == axis else 1 for a in range(rank)])


def leaves_of(function: str, groups: Groups, params: PyTree) -> dict[str, Any]:
  """Returns the arrays of `params` by path; raises `ValueError` if they are not those of the groups."""
  paths, leaves, treedef = trees.flatten(params)
  of, shapes, tree = trees.flatten(groups.shapes)
  if treedef != tree:
    raise ValueError(f'{function}: the parameters have another structure than those of the groups, with paths such as '
                     f'{errors.some(of, 3)}; call structured.groups with these parameters.')
  for path, leaf, struct in zip(paths, leaves, shapes):
    if np.shape(leaf) != np.shape(struct):
      raise errors.at_leaf(function, path, np.shape(leaf), f'the groups were read with shape {np.shape(struct)}. '
                           'Groups belong to one model; after a cut, call structured.groups again.')
    if hasattr(struct, 'shape') and not isinstance(leaf, (jax.Array, np.ndarray)):
      raise errors.at_leaf(function, path, np.shape(leaf), f'a {type(leaf).__name__} cannot be cut; unpack or load it.')
  return dict(zip(paths, leaves))


def _checked(groups: Groups, keep: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns the kept units of each named group as `bool[units]`; raises `ValueError` for what is none."""
  arguments.refuse_unknown('structured.cut', {f'`keep` of {name}': mask for name, mask in keep.items()})
  units = {name: _mask_of(groups[name], np.asarray(mask)) for name, mask in keep.items()}
  if gone := _disconnected(groups, units):
    raise ValueError(f'structured.cut: `keep` of group {gone!r} keeps none of its {groups[gone].size} units, and then '
                     'a result depends on no input; keep at least one, or take the layer out of the model.')
  return units


def _disconnected(groups: Groups, units: Mapping[str, np.ndarray]) -> str:
  """Returns the first group without a kept unit, if a result then depends on no input, else ''."""
  gone = [name for name, keep in units.items() if not keep.any()]
  return gone[0] if disconnects(groups, gone) else ''


def _mask_of(group: UnitGroup, mask: np.ndarray) -> np.ndarray:
  by_layer = group.layers is not None and mask.shape == (group.layers, group.size)
  if mask.dtype != bool or mask.shape != (group.size,) and not by_layer:
    forms = f'bool[{group.size}]' + f' or bool[{group.layers}, {group.size}]' * (group.layers is not None)
    raise ValueError(f'structured.cut: `keep` of group {group.name!r} is {mask.dtype}{list(mask.shape)}, but the group '
                     f'has {group.size} units; give {forms}, True where a unit stays.')
  counts = np.unique(np.count_nonzero(np.atleast_2d(mask), 1))
  if len(counts) > 1:
    raise ValueError(f'structured.cut: `keep` of group {group.name!r} keeps between {counts[0]} and {counts[-1]} units '
                     'of a layer; layers of one stack have one shape, so keep equally many in each.')
  return mask[0] if by_layer and (mask == mask[0]).all() else mask


# Without `keep`.


def _unneeded(groups: Groups, leaves: Mapping[str, Any]) -> dict[str, np.ndarray]:
  """Returns, for each group, the units without which the function is another one."""
  arguments.refuse_unknown('structured.cut', leaves)
  reading = Reading(trace(groups.apply, (groups.shapes, *groups.inputs)), RULES)
  reading.run()
  free = reading.free()
  reading.zeros = {path: _zeros(leaf) for path, leaf in leaves.items() if hasattr(leaf, 'shape')}
  reading.run()
  units = {}
  for v, group in zip(free, groups.values(), strict=True):
    needed = np.array([bool(reading.variables.pinned.get(v, 0) >> i & 1) for i in range(group.size)])
    why, _ = reading.variables.reasons.get(v, ('', None))
    _refuse_partly_zero(group, needed, reading.zeros, why)
    units[group.name] = needed
  if gone := _disconnected(groups, units):
    raise ValueError(f'structured.cut: no unit of group {gone!r} changes the result, so that nothing would be left '
                     'that depends on an input; pass `keep`, or take the layer out of the model.')
  return units


def _zeros(leaf: Any) -> np.ndarray:
  """Returns which entries of an array are zero; none of an array of PRNG keys."""
  is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
  return np.zeros(leaf.shape, bool) if is_key else np.asarray(leaf) == 0


def _refuse_partly_zero(group: UnitGroup, needed: np.ndarray, zeros: Mapping[str, np.ndarray], why: str) -> None:
  """Raises `ValueError` for a unit that is still needed, though a matrix that produces it is zero there.

  A matrix that is zero everywhere was never trained, and says nothing about its units.
  """
  for member in group.members:
    zero = zeros[member.path]
    if member.side != PRODUCED or zero.ndim < 2 or zero.all():
      continue
    flat = np.asarray(zero.all(axis=tuple(a for a in range(zero.ndim) if a != member.axis)))
    for unit in map(int, np.flatnonzero(needed)):
      if flat[list(member.positions(unit))].all():
        rest = [other.name for other in group.members if other is not member and not zeros[other.path].take(
            other.positions(unit), other.axis).all()]
        raise ValueError(f'structured.cut: unit {unit} of group {group.name!r} is zero in {member.name!r} but not in '
                         f'{errors.some(rest)}: {why}. Set it to zero there, or pass `keep`.')
