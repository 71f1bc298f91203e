"""Chooses whole units of groups: the selection that every recipe of structured pruning shares.

    found = structured.groups(apply, params, x)
    selection = structured.grouped(found, 0.5)                 # half of all units, those with the least magnitude
    tx = transforms.sparsify(optax.sgd(0.1), flows.hard(), selection, where=units.belongs(found))
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import ranking, saliences, trees, updates
from sparsejax.arguments import checked
from sparsejax.plans import Plan, SparseLeaf
from sparsejax.saliences import Salience, Units
from sparsejax.selections import Selection
from sparsejax.structured.groups import Groups, UnitGroup
from sparsejax.types import Array, Asked, Axes, PyTree, Schedule, Signals, Update
from sparsejax.units import Places


@checked
def grouped(groups: Groups | Mapping[str, UnitGroup], sparsity: float, *, score: Salience = saliences.mean_magnitude,
            update: Update = updates.reselect, ramp: Schedule | None = None, alone: bool = False,
            multiple_of: int = 1) -> Selection:
  """Returns the selection that prunes whole units of `groups`: all weights of a unit, in all of its members.

  `sparsity` is the fraction of units that go; a unit of a stack, which has a place in each layer, counts once. All
  groups compete, or with `alone` each loses its own fraction. A group keeps at least one unit. With `multiple_of` the
  count of each group is rounded up to a multiple, and a smaller group stays whole. Fewer units may then go than asked.
  Without `multiple_of` the count over all groups is exact. `ramp(step)`, from 0 to 1, is the part of the
  sparsity that is asked at `step`. `update` sees `[rows, units]`, as `score` gives them. To leave groups out, pass a
  dict with the others. Raises `ValueError` if `groups` is empty, or if too few units would be left for all groups.
  """
  if not groups:
    raise ValueError('structured.grouped: there is no group; structured.groups prints what is pinned, and why.')
  selection = _Grouped(dict(groups), sparsity, score, update, ramp, alone, multiple_of)
  selection.refuse_too_few()
  return Selection(selection.plan, selection.select)


@dataclasses.dataclass(frozen=True, eq=False)
class _Grouped:
  """A `_Grouped` holds the words of `grouped`."""

  groups: Mapping[str, UnitGroup]
  sparsity: float
  score: Salience
  update: Update
  ramp: Schedule | None
  alone: bool
  multiple_of: int

  def refuse_too_few(self) -> None:
    """Raises `ValueError` if the groups need more units than are left."""
    sizes = self.sizes
    least, left = int(np.sum(self._least)), int(np.sum(sizes)) - round(self.sparsity * int(np.sum(sizes)))
    if not self.alone and least > left:
      raise ValueError(f'structured.grouped: sparsity={self.sparsity:g} leaves {left} of {np.sum(sizes)} units, but '
                       f'{len(sizes)} groups need {least}, at least {self.multiple_of} each. Ask for less, or leave '
                       'groups out: pass a dict with the others.')

  @property
  def sizes(self) -> np.ndarray:
    """The number of units of each group."""
    return np.array([group.size for group in self.groups.values()])

  @property
  def _least(self) -> np.ndarray:
    """The number of units that each group keeps in any case."""
    return np.minimum(self.sizes, self.multiple_of)

  def plan(self, arrays: dict[str, Array], axes: dict[str, Axes]) -> Plan:
    Places.of(self.groups, arrays)
    return Plan(tuple(SparseLeaf(path, w.shape, axes[path], None, Asked()) for path, w in arrays.items()))

  def select(self, leaves: Any, weights: list[Array], masks: list[Array], signals: list[Signals]) -> Any:
    places = Places.of(self.groups, {leaf.path: w for leaf, w in zip(leaves, weights)})
    scores, progress = self.score(Units(places, weights, signals)), self.ramp and self.ramp(signals[0].step)
    best = lambda scores, drop=None: self._best(places, scores, progress, drop)
    keep = self.update(places.alive(masks), scores, best, scores, signals[0])
    return places.masks(keep), None

  def _best(self, places: Places, scores: Array, progress: Any, drop: Any) -> Array:
    """Returns the units with the largest scores, `bool[rows, units]`, equally many in each layer of a stack."""
    ranks = jnp.where(places.real, jnp.maximum(updates.bounded(scores), jnp.finfo(jnp.float32).min), -jnp.inf)
    order = jnp.argsort(ranks, axis=1, descending=True, stable=True)
    place, sorted_ = jnp.argsort(order, axis=1), jnp.take_along_axis(ranks, order, 1)
    owners = np.array([row.group for row in places.rows])
    layers = np.bincount(owners).astype(np.float32)[:, None]
    slots = jnp.zeros((len(self.sizes), places.width)).at[owners].add(jnp.where(places.real, sorted_, 0)) / layers
    return (place < self._counts(slots, progress, drop)[owners, None]) & places.real

  def _counts(self, slots: Array, progress: Any, drop: Any) -> Array:
    """Returns how many units each group keeps, `int32[groups]`; `slots` holds the scores of each, the best first."""
    sizes, least, m = self.sizes, self._least, self.multiple_of
    if self.alone:
      counts = jnp.maximum(self._left(sizes, progress, drop), least)
    else:
      real = np.arange(slots.shape[1]) < sizes[:, None]
      safe = jnp.where(np.arange(slots.shape[1]) < least[:, None], jnp.inf, slots)
      kept = ranking.top_n(safe[real], self._left(np.sum(sizes), progress, drop))
      counts = jnp.zeros(len(sizes), jnp.int32).at[np.nonzero(real)[0]].add(kept)
    return jnp.minimum(-(-counts // m) * m, sizes)

  def _left(self, sizes: Any, progress: Any, drop: Any) -> Array:
    """Returns how many of `sizes` units are kept, `int32`."""
    pruned = np.round(self.sparsity * sizes)
    left = sizes - jnp.round((1.0 if progress is None else progress) * pruned).astype(jnp.int32)
    return left if drop is None else left - jnp.floor(drop * left.astype(jnp.float32)).astype(jnp.int32)


@checked
def kept(groups: Mapping[str, UnitGroup], masks: PyTree) -> dict[str, np.ndarray]:
  """Returns which units have a kept weight under `masks`, as `keep=` of `cut`.

  `masks` is a mask tree, or `state.masks` of an optimizer, or the parameters themselves: a zero is then not kept.
  """
  paths, leaves, _ = trees.flatten(masks)
  arrays = {path: np.asarray(leaf) != 0 for path, leaf in zip(paths, leaves) if np.ndim(leaf)}
  places = Places.of(groups, arrays)
  return places.by_name(places.alive(list(map(jnp.asarray, arrays.values()))))
