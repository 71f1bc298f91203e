"""Reorders the units of a group, which changes nothing, so that what is kept of a sparse weight lies in blocks.

    order = clustered(found, masks, 'up/kernel:1', 'down/kernel', width=4)
    params = permuted(found, params, {'up/kernel:1': order})       # the same function
    masks = permuted(found, masks, {'up/kernel:1': order})         # more blocks of four are empty

SparseByteNN (2310.17664) reorders the channels of a network in this way; its authors published no code.
"""

from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from sparsejax import errors, trees
from sparsejax.arguments import checked
from sparsejax.structured.groups import Groups
from sparsejax.types import PyTree


@checked
def permuted(groups: Groups, params: PyTree, orders: Mapping[str, np.ndarray]) -> PyTree:
  """Returns parameters, or masks of their shapes, whose unit i is the old unit `orders[name][i]`, in all members.

  The function of the parameters stays, up to the order of sums. Masks may be scalars. Raises `ValueError` for an
  unknown group and for an order that is no permutation of its units.
  """
  paths, leaves, treedef = trees.flatten(params)
  found = dict(zip(paths, leaves))
  for name, order in orders.items():
    group, order = groups[name], np.asarray(order)
    if order.shape != (group.size,) or sorted(order.tolist()) != list(range(group.size)):
      raise ValueError(f'structured.permuted: the order of group {name!r} must hold each of its {group.size} units '
                       'once.')
    for member in group.members:
      leaf = found.get(member.path)
      if leaf is None:
        raise errors.unknown('structured.permuted', 'parameter', member.path, paths)
      for labels in member.labels if np.ndim(leaf) else ():
        leaf = jnp.take(leaf, _places(labels, order), member.axis)
      found[member.path] = leaf
  return treedef.unflatten(list(found.values()))


def _places(labels: np.ndarray, order: np.ndarray) -> np.ndarray:
  """Returns the old position of each position of an axis."""
  places = np.arange(len(labels))
  own = [np.flatnonzero(labels == unit) for unit in range(len(order))]
  for unit, old in enumerate(order):
    places[own[unit]] = own[old]
  return places


@checked
def clustered(groups: Groups, masks: PyTree, name: str, path: str, width: int) -> np.ndarray:
  """Returns the order of the units of a group that puts units with like masks beside each other, `int[units]`.

  The mask at `path` tells which entries of a unit are kept. The search is greedy. A block of `width` begins with the
  unit that keeps most. The units follow that add the fewest entries, less those that they share with the block. Ties go
  to the lower unit. Raises `ValueError` if the group has no plain axis there.
  """
  member = next((each for each in groups[name].members if each.path == path and len(each.labels) == 1), None)
  found = dict(zip(*trees.flatten(masks)[:2]))
  if member is None or path not in found or np.ndim(found[path]) != len(member.shape):
    raise ValueError(f'structured.clustered: group {name!r} has no single place in a mask at {path!r}; it lies in '
                     f'{errors.some(each.name for each in groups[name].members)}.')
  mask = np.moveaxis(np.asarray(found[path], bool), member.axis, 0)
  rows = np.stack([mask[member.labels[0] == unit].reshape(-1) for unit in range(groups[name].size)])
  left, order = list(range(len(rows))), []
  while left:
    block = [max(left, key=lambda unit: (rows[unit].sum(), -unit))]
    left.remove(block[0])
    covered = rows[block[0]].copy()
    while left and len(block) < width:
      new, shared = (rows[left] & ~covered).sum(1), (rows[left] & covered).sum(1)
      nearest = left[int(np.argmin(new - shared))]
      left.remove(nearest)
      block.append(nearest)
      covered |= rows[nearest]
    order += block
  return np.array(order)
