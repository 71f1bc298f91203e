"""Ranks all leaves together: the units of all leaves compete for one count.

    race = Race.of(leaves, patterns, ranks, None, progress)
    race.counts()   # how many units each layer of each leaf keeps
    race.masks()    # the best units of all leaves, as masks of the weights
"""

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import counts, errors, ranking
from sparsejax.states import SparseLeaf
from sparsejax.types import Array, Pattern, Pooled

Leaves = Sequence[SparseLeaf]


class Race(NamedTuple):
  """A `Race` holds the units of each leaf, the scores by which the units compete, and how many units are kept."""

  pools: list[Pooled]
  values: list[Array]
  kept: Any

  @classmethod
  def of(cls, leaves: Leaves, own: Sequence[Pattern], ranks: Sequence[Array],
         normalise: Callable[[Array], Array] | None, progress: Any) -> 'Race':
    """Returns the race of leaves with the scores `ranks`; `progress`: the part of the sparsity that is asked now."""
    pools = [pattern.pooled(x, leaf.axes) for pattern, x, leaf in zip(own, ranks, leaves)]
    # Layers are matrices of their own, however they are stored.
    values = [counts.by_layer(normalise, pool.layers, [pool.scores]) if normalise else pool.scores for pool in pools]
    kept = counts.kept_of(leaves[0].asked.sparsity, sum(math.prod(v.shape) for v in values), progress)
    return cls(pools, values, kept)

  def counts(self) -> list[ranking.Count]:
    """Returns how many units each layer of each leaf keeps, a `Count` of words `int32[*layers]`."""
    if not any(pool.layers for pool in self.pools):
      return list(map(ranking.count, ranking.shares_of_leaves(self.values, self.kept)))
    return list(map(per_layer, ranking.top_n_of_leaves(self.values, self.kept), self.pools))

  def masks(self) -> list[Array]:
    """Returns the mask of the best units of each leaf. A second ranking by `counts` would give the same mask.

    Ties are kept in row-major order over all leaves, and therefore in row-major order within each layer.
    """
    return [pool.whole(mask) for pool, mask in zip(self.pools, ranking.top_n_of_leaves(self.values, self.kept))]


def per_layer(kept: Array, pool: Pooled) -> ranking.Count:
  """Returns how many units each layer keeps, a `Count` of words `int32[*layers]`, of a mask of the units."""
  number = ranking.number
  for _ in pool.layers:
    number = jax.vmap(number)
  return number(jnp.moveaxis(kept, pool.layers, range(len(pool.layers))))


def check_comparable(leaves: Leaves) -> None:
  """Raises one `ValueError` for all leaves that cannot be ranked together."""
  if any(leaf.asked.sparsity is None for leaf in leaves):
    raise ValueError('sparsejax: leaves that are ranked together share one number; pass `sparsity=`.')
  others = [errors.Problem(leaf.path, leaf.shape, f'{leaf.pattern} fixes how many every group keeps, so that leaves '
                           'cannot be ranked together. Use allocation=allocation.uniform, or another pattern.')
            for leaf in leaves if leaf.pattern is None or not counts.competes(leaf.pattern, leaf.shape, leaf.axes)]
  if others:
    raise errors.at_leaves('sparsejax', others)
  sizes = [(counts.units(leaf.pattern, leaf.shape, leaf.axes)[1], leaf) for leaf in leaves if leaf.pattern]
  usual, first = sizes[0]
  others = [errors.Problem(leaf.path, leaf.shape, f'a unit of {leaf.pattern} has {size} weights here and {usual} in '
                           f'{first.path!r}, so that leaves cannot be ranked together. Use '
                           'allocation=allocation.uniform or erk.') for size, leaf in sizes if size != usual]
  if others:
    raise errors.at_leaves('sparsejax', others)
