"""Removes units by search: each step takes the removal that a loss of the masked model likes best.

    keep = multi_pruner(found, params, loss, 0.2, widths='*/up/*', heads='*/query/*')    # blocks, then MLPs, then heads
    keep = search(found, params, loss, [Stage(('up/kernel:1',), step=64, left=0.8)])
    small = cut(found, params, keep)

No gradient is needed: `loss(params)` is a number, such as the mean loss over a few batches.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import errors, progress, saliences, trees
from sparsejax.arguments import checked
from sparsejax.globs import matches
from sparsejax.saliences import Units
from sparsejax.structured.costs import Cost, weights
from sparsejax.structured.erasing import disconnects
from sparsejax.structured.groups import Groups
from sparsejax.types import Array, PyTree, Signals
from sparsejax.units import Places, belongs

Keep = dict[str, np.ndarray]
SHARES = (0.44, 0.96, 1.0)  # of the saving, after blocks, widths and heads: the authors' 44 : 52 : 4


class Stage(NamedTuple):
  """A `Stage` takes units of `groups` until the cost is at most `left` of the whole model's.

  A removal takes the `step` least units of one group. With `step=None` a removal takes a whole group, if every result
  then still depends on an input.
  """

  groups: tuple[str, ...]
  step: int | None
  left: float


@checked
def multi_pruner(groups: Groups, params: PyTree, loss: Callable[[PyTree], Array], sparsity: float = 0.2, *,
                 widths: str, heads: str, step: int = 64, score: saliences.Salience = saliences.mean_magnitude) -> Keep:
  """Returns the units that stay: whole branches go first, then widths of MLPs, then heads (MultiPruner, 2501.09949).

  `sparsity` is the fraction of all parameters that goes. Each removal is the one after which `loss` is least, without
  training. `widths`, `heads`: globs of the names of groups. A branch vanishes with all units of one of these groups.
  Of widths, `step` units go at once, and of heads one. Within a group the units of the least `score` go first: the
  authors sort by the l1 norm. The last step of a stage may overshoot, as in the authors' code. `cut` takes the result.
  Raises `ValueError` for a glob without a group, and if the groups have too few weights.
  """
  picked = [tuple(name for name in groups if matches(glob, name)) for glob in (widths, heads)]
  for glob, names in zip((widths, heads), picked):
    if not names:
      raise errors.unknown('structured.multi_pruner', 'group', glob, groups)
  left = [1 - share * sparsity for share in SHARES]
  stages = [Stage(picked[0] + picked[1], None, left[0]), Stage(picked[0], step, left[1]), Stage(picked[1], 1, left[2])]
  return search(groups, params, loss, stages, score=score)


@checked
def search(groups: Groups, params: PyTree, loss: Callable[[PyTree], Array], stages: Sequence[Stage], *,
           cost: Cost | None = None, score: saliences.Salience = saliences.mean_magnitude) -> Keep:
  """Returns the units that stay after the removals of all stages, as `keep=` of `cut`.

  Each removal is the one after which `loss` of the masked parameters is least; of equal ones, the first. `cost`: a
  function of sizes, by default the number of parameters. A group with a `step` keeps at least one unit. A stage that
  finds nothing more to remove hands over to the next. Raises `ValueError` if the last stage ends above its cost.
  """
  own, cost = _Masked(groups, params, loss, score), cost or weights(groups)
  keep = {name: np.ones(group.size, bool) for name, group in groups.items()}
  spent = lambda: float(cost({name: int(mask.sum()) for name, mask in keep.items()}))
  whole = spent()
  for stage in stages:
    for name in stage.groups:
      if name not in groups:
        raise errors.unknown('structured.search', 'group', name, groups)
    while spent() > stage.left * whole * (1 + 1e-9):
      candidates = [made for name in stage.groups if (made := _without(own, keep, name, stage.step))]
      if not candidates:
        break
      keep = min(candidates, key=own.loss_of)
      progress.tell(f'search: {spent() / whole:.1%} of the cost is left, {stage.left:.1%} is asked')
  if spent() > stages[-1].left * whole * (1 + 1e-9):
    raise ValueError(f'structured.search: nothing more can go, and {spent() / whole:.1%} of the cost is left, but '
                     f'{stages[-1].left:.1%} is asked. Ask for less, or name more groups.')
  return keep


class _Masked:
  """A `_Masked` evaluates the loss of parameters without some units; all choices share one compiled program."""

  def __init__(self, groups: Groups, params: PyTree, loss: Callable[[PyTree], Array], score: saliences.Salience):
    paths, leaves, treedef = trees.flatten(params)
    picked = [i for i, pair in enumerate(zip(paths, leaves)) if belongs(groups)(*pair)]
    self.groups, self.places = groups, Places.of(groups, {paths[i]: leaves[i] for i in picked})
    weights = [leaves[i] for i in picked]
    ranks = score(Units(self.places, weights, [Signals()] * len(weights)))
    self.order = {name: np.argsort(np.sum(np.atleast_2d(row), 0), kind='stable')
                  for name, row in self._split(ranks).items()}

    def masked(keep: Array, weights: Sequence[Array]) -> Array:
      found = list(leaves)
      for i, w, mask in zip(picked, weights, self.places.masks(keep)):
        found[i] = jnp.where(mask, w, jnp.zeros((), w.dtype))
      return loss(treedef.unflatten(found))

    self._weights, self._run = weights, jax.jit(masked)

  def _split(self, values: Array) -> dict[str, np.ndarray]:
    return self.places.by_name(values)

  def loss_of(self, keep: Mapping[str, np.ndarray]) -> float:
    found = float(self._run(jnp.asarray(self.places.rows_of(keep)), self._weights))
    return found if np.isfinite(found) else np.inf


def _without(own: _Masked, keep: Keep, name: str, step: int | None) -> Keep | None:
  """Returns the units without the `step` least of one group, or without the group; `None` if that may not be."""
  alive = int(keep[name].sum())
  if not alive or step is not None and alive <= step:
    return None
  order = [unit for unit in own.order[name] if keep[name][unit]]
  mask = keep[name].copy()
  mask[order[:step]] = False
  made = {**keep, name: mask}
  gone = [other for other, units in made.items() if not units.any()]
  return made if step is not None or not disconnects(own.groups, gone) else None


# The search of levels by evolution.


def evolved(levels: Mapping[str, int], evaluate: Callable[[Mapping[str, int]], float], start: Mapping[str, int], *,
            generations: int = 50, offspring: int = 128, seed: int = 0) -> tuple[dict[str, int], float]:
  """Returns the level of each group with the least value, and the value: the search of EvoPress (2410.14649).

  `levels`: the number of levels of each group. A child of the best state has some levels lowered
  by one and as many raised, so that the sum stays. The best state survives. A state is evaluated once.
  """
  rng, known = np.random.default_rng(seed), {}

  def value(state: Mapping[str, int]) -> float:
    key = tuple(state.values())
    if key not in known:
      known[key] = float(evaluate(state))
    return known[key]

  best = dict(start)
  for _ in progress.counted('generation', range(1, generations + 1)):
    children = [_child(best, levels, rng) for _ in range(offspring)]
    best = min([best, *children], key=value)
  return best, value(best)


def _child(state: Mapping[str, int], levels: Mapping[str, int], rng: np.random.Generator) -> dict[str, int]:
  """Returns a state after one to four exchanges, the smaller of two draws."""
  child = dict(state)
  for _ in range(int(rng.integers(1, 5, 2).min())):
    down = [name for name, level in child.items() if level > 0]
    up = [name for name, level in child.items() if level < levels[name] - 1]
    pairs = [(a, b) for a in down for b in up if a != b]
    if pairs:
      a, b = pairs[rng.integers(len(pairs))]
      child[a], child[b] = child[a] - 1, child[b] + 1
  return child
