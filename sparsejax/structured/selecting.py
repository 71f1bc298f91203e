"""Chooses whole units of groups: the selection that every recipe of structured pruning shares.

    found = structured.groups(apply, params, x)
    selection = structured.grouped(found, 0.5)                 # half of all units, those with the least magnitude
    tx = transforms.sparsify(optax.sgd(0.1), flows.hard(), selection, where=units.belongs(found))
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import counts, errors, ranking, saliences, trees, updates
from sparsejax.arguments import checked
from sparsejax.plans import Plan, SparseLeaf
from sparsejax.saliences import Salience, Units
from sparsejax.selections import Selection
from sparsejax.structured.costs import Allowance, Cost
from sparsejax.structured.erasing import disconnects
from sparsejax.structured.groups import Groups, UnitGroup
from sparsejax.structured.removal import masks
from sparsejax.types import Array, Asked, Axes, PyTree, Schedule, Signals, Update
from sparsejax.units import Places, belongs


@checked
def grouped(groups: Groups | Mapping[str, UnitGroup], sparsity: float = 0.5, *, budget: Allowance | None = None,
            score: Salience = saliences.mean_magnitude, update: Update = updates.reselect, ramp: Schedule | None = None,
            alone: bool = False, multiple_of: int = 1, erase: Sequence[str] = ()) -> Selection:
  """Returns the selection that prunes whole units of `groups`: all weights of a unit, in all of its members.

  `sparsity` is the fraction of units that go; a unit of a stack, which has a place in each layer, counts once. All
  groups compete, or with `alone` each loses its own fraction. A group keeps at least one unit, but the groups in
  `erase`, which must be `erasable` together, may vanish. With `multiple_of` the count of each group is rounded up to a
  multiple, and a smaller group stays whole. Fewer units may then go than asked. Without `multiple_of` the count over
  all groups is exact. `budget`, such as `flops(0.5)`, takes the place of `sparsity`: the best units stay, as many as
  the cost allows. `ramp(step)`, from 0 to 1, is the part of the sparsity, or of the saving, that is asked at `step`.
  `update` sees `[rows, units]`, as `score` gives them. To leave groups out, take `groups.only(...)`, or pass a dict
  with the others. Raises `ValueError` if `groups` is empty, or if too few units would be left for all groups.
  """
  selection = chooser(groups, sparsity, budget, score, update, ramp, alone, multiple_of, erase)
  return Selection(selection.plan, selection.select)


def chooser(groups: Any, sparsity: float, budget: Allowance | None, score: Salience, update: Update,
            ramp: Schedule | None, alone: bool, multiple_of: int, erase: Sequence[str]) -> 'UnitChooser':
  """Returns the `UnitChooser` of the arguments of `grouped`, which are verified."""
  if not groups:
    raise ValueError('structured.grouped: there is no group; structured.groups prints what is pinned, and why.')
  for name in erase:
    if name not in groups:
      raise errors.unknown('structured.grouped', 'group to erase', name, groups)
  if (budget or erase) and not isinstance(groups, Groups):
    raise ValueError('structured.grouped: `budget` and `erase` need the program of the groups; pass the Groups, or '
                     'groups.only(...), and no dict.')
  if budget and alone:
    raise ValueError('structured.grouped: a budget is shared by all groups; leave out alone=True.')
  if disconnects(groups, erase):
    raise ValueError(f'structured.grouped: without all of {errors.some(erase)}, a result depends on no input; '
                     'structured.erasable(groups) says which groups may vanish together.')
  return UnitChooser(dict(groups), sparsity, score, update, ramp, alone, multiple_of, tuple(erase),
                     budget and budget.fraction, budget and budget.cost(groups))


@dataclasses.dataclass(frozen=True, eq=False)
class UnitChooser:
  """A `UnitChooser` holds the words of `grouped`. `fraction` and `cost` are those of its budget."""

  groups: Mapping[str, UnitGroup]
  sparsity: float
  score: Salience
  update: Update
  ramp: Schedule | None
  alone: bool
  multiple_of: int
  erase: tuple[str, ...]
  fraction: float | None
  cost: Cost | None

  def __post_init__(self) -> None:
    """Raises `ValueError` if the groups need more units than are left, or cost more than the budget."""
    sizes, least = self.sizes, self._least
    left = int(np.sum(sizes)) - round(self.sparsity * int(np.sum(sizes)))
    if self.cost is not None:
      most, cost = self.fraction * self.cost({}), float(self._cost_of(least))
      if cost > most:
        raise ValueError(f'structured.grouped: a budget of {self.fraction:g} is {most:.4g}, but the model costs '
                         f'{cost:.4g} with the least units of each group. Ask for less, or take more groups.')
    elif not self.alone and np.sum(least) > left:
      raise ValueError(f'structured.grouped: sparsity={self.sparsity:g} leaves {left} of {np.sum(sizes)} units, but '
                       f'{len(sizes)} groups need {np.sum(least)}, at least {self.multiple_of} each. Ask for less, or '
                       'leave groups out: pass a dict with the others.')

  @property
  def sizes(self) -> np.ndarray:
    """The number of units of each group."""
    return np.array([group.size for group in self.groups.values()])

  @property
  def _least(self) -> np.ndarray:
    """The number of units that each group keeps in any case."""
    return np.minimum(self.sizes, [0 if name in self.erase else self.multiple_of for name in self.groups])

  def _cost_of(self, counts: Any) -> Any:
    return self.cost(dict(zip(self.groups, counts))) if self.cost else 0

  def plan(self, arrays: dict[str, Array], axes: dict[str, Axes]) -> Plan:
    Places.of(self.groups, arrays)
    return Plan(tuple(SparseLeaf(path, w.shape, axes[path], None, Asked()) for path, w in arrays.items()))

  def select(self, leaves: Any, weights: list[Array], masks: list[Array], signals: list[Signals]) -> Any:
    places = Places.of(self.groups, {leaf.path: w for leaf, w in zip(leaves, weights)})
    return places.masks(self.keep(places, weights, places.alive(masks), signals)), None

  def keep(self, places: Places, weights: Sequence[Array], alive: Array, signals: Sequence[Signals]) -> Array:
    """Returns the chosen units, `bool[rows, units]`; `alive` are those that were kept before."""
    scores, progress = self.score(Units(places, weights, signals)), self.ramp and self.ramp(signals[0].step)
    best = lambda scores, drop=None: self._best(places, scores, progress, drop)
    return self.update(alive, scores, best, scores, signals[0])

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
    if self.alone:
      left = jnp.stack([self._left(int(size), progress, drop) for size in self.sizes])
      return self._rounded(jnp.maximum(left, self._least))
    real = np.arange(slots.shape[1]) < self.sizes[:, None]
    safe = jnp.where(np.arange(slots.shape[1]) < self._least[:, None], jnp.inf, slots)[real]

    def dealt(number: Array) -> Array:
      kept = ranking.top_n(safe, number)
      return self._rounded(jnp.zeros(len(self.sizes), jnp.int32).at[np.nonzero(real)[0]].add(kept))

    if self.cost is None:
      return dealt(self._left(int(np.sum(self.sizes)), progress, drop))
    number = self._affordable(dealt, progress)
    return dealt(number if drop is None else number - jnp.floor(drop * number.astype(jnp.float32)).astype(jnp.int32))

  def _rounded(self, number: Array) -> Array:
    return jnp.minimum(-(-number // self.multiple_of) * self.multiple_of, self.sizes)

  def _left(self, size: int, progress: Any, drop: Any) -> Array:
    """Returns how many of `size` units are kept, `int32[]`."""
    left = ranking.count(counts.kept_of(self.sparsity, size, progress))
    return jnp.asarray(left.low if drop is None else counts.fewer(left, drop).low, jnp.int32)

  def _affordable(self, dealt: Callable[[Array], Array], progress: Any) -> Array:
    """Returns the largest number of units whose cost is within the budget, found by bisection, `int32[]`."""
    whole, fraction = (self.cost({}) if self.cost else 0), self.fraction or 0.0
    most = whole * (1 - (1 - fraction) * (1.0 if progress is None else progress)) * (1 + 1e-6)  # rounding

    def halved(_: Any, ends: tuple[Array, Array]) -> tuple[Array, Array]:
      low, high = ends
      middle = (low + high + 1) // 2
      fits = self._cost_of(dealt(middle).astype(jnp.float32)) <= most
      return jnp.where(fits, middle, low), jnp.where(fits, high, middle - 1)

    total = int(np.sum(self.sizes))
    ends = jnp.int32(np.sum(self._least)), jnp.int32(total)
    return jax.lax.fori_loop(0, total.bit_length(), halved, ends)[0]


@checked
def choose(groups: Groups, params: PyTree, sparsity: float = 0.5, *, budget: Allowance | None = None,
           score: Salience = saliences.mean_magnitude, grads: PyTree | None = None, alone: bool = False,
           multiple_of: int = 1, erase: Sequence[str] = (), among: Mapping[str, Any] | None = None
           ) -> dict[str, np.ndarray]:
  """Returns the units that stay, by the name of their group, as `keep=` of `cut`, without training.

  The arguments are those of `grouped`. `grads`: the gradients of the loss, for scores that read them. `among`: the
  units of an earlier choice; all others have gone, and stay so.
  """
  own = chooser(groups, sparsity, budget, score, updates.prune_to, None, alone, multiple_of, erase)
  paths, leaves, treedef = trees.flatten(params)
  picked = [i for i, pair in enumerate(zip(paths, leaves)) if belongs(groups)(*pair)]
  slopes = [None] * len(leaves) if grads is None else treedef.flatten_up_to(grads)
  places = Places.of(groups, {paths[i]: leaves[i] for i in picked})
  alive = jnp.asarray(places.real if among is None else places.rows_of(among))
  keep = own.keep(places, [leaves[i] for i in picked], alive, [Signals(grad=slopes[i]) for i in picked])
  return places.by_name(keep)


@checked
def choose_in_rounds(groups: Groups, params: PyTree, sparsities: Sequence[float],
                     tune: Callable[[PyTree, PyTree], PyTree], *, grads: Callable[[PyTree], PyTree] | None = None,
                     **options: Any) -> tuple[PyTree, dict[str, np.ndarray]]:
  """Returns the parameters and the kept units after several choices with training in between (iterative pruning).

  For each of the rising `sparsities`, units go by `choose(..., **options)`, and `tune(params, masks)` trains what is
  left, for example with `recipes.fixed(optimizer, masks)`. `grads(params)`: the gradients for scores that read them.
  With a single sparsity, pruning is one-shot. `cut(groups, params, keep)` then makes the model smaller.
  """
  if not sparsities or sorted(sparsities) != [*sparsities]:
    raise ValueError(f'structured.choose_in_rounds: `sparsities` must rise, as in (0.25, 0.5), not {sparsities!r}.')
  keep = None
  for sparsity in sparsities:
    slopes = None if grads is None else grads(params)
    keep = choose(groups, params, sparsity, grads=slopes, among=keep, **options)
    mask = masks(groups, keep)
    zeroed = jax.tree.map(lambda w, m: w if not np.ndim(m) else jnp.where(m, w, jnp.zeros((), w.dtype)), params, mask)
    params = tune(zeroed, mask)
  return params, keep or {}


@checked
def kept(groups: Mapping[str, UnitGroup], masks: PyTree) -> dict[str, np.ndarray]:
  """Returns which units have a kept weight under `masks`, as `keep=` of `cut`.

  `masks` is a mask tree, or `state.masks` of an optimizer, or the parameters themselves: a zero is then not kept.
  """
  paths, leaves, _ = trees.flatten(masks)
  arrays = {path: np.asarray(leaf) != 0 for path, leaf in zip(paths, leaves) if np.ndim(leaf)}
  places = Places.of(groups, arrays)
  return places.by_name(places.alive(list(map(jnp.asarray, arrays.values()))))
