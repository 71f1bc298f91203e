"""Allocations divide the sparsity of a whole model among its leaves.

An allocation is a function `allocation(leaves, sparsity, axes) -> sparsities`. `leaves` maps the paths of all sparse
leaves to the leaves, and the result maps the same paths to sparsities. An allocation reads only shapes, so that the
sparsity of each leaf is known before the program runs. A `Ranked` allocation ranks the scores of all leaves together;
the number of weights that a leaf keeps is then counted at each mask update.

    allocation.erk({'a': a, 'b': b}, 0.9)                              # {'a': ..., 'b': ...}
    tx = recipes.rigl(optax.adamw(1e-3), 0.9, allocation=allocation.erk, total_steps=10_000, key=key)
    tx = recipes.magnitude_at_init(optax.adamw(1e-3), 0.9, allocation=allocation.global_())
"""

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax.numpy as jnp

from sparsejax import arguments, errors, trees
from sparsejax.argument_kinds import is_number
from sparsejax.arguments import checked
from sparsejax.types import Allocation, Array, Axes, Score

__all__ = [
  'Ranked', 'custom', 'erdos_renyi', 'erk', 'from_scores', 'global_', 'knapsack', 'lamp', 'named', 'shared_by',
  'uniform', 'uniform_plus',
]

OF_ITS_OWN = 'sparsities of its own'  # an allocation with this fact does not look at the sparsity that is asked
_ROUNDED = 1e-6  # A formula may leave the range from 0 to 1 by a rounding error.


def shares(allocation: Allocation, leaves: Mapping[str, Array], sparsity: Any, axes: Mapping[str, Axes]
           ) -> Mapping[str, float]:
  """Returns what an allocation gives. Raises `ValueError` unless that is a number from 0 to 1 for each of the leaves.
  """
  given = allocation(leaves, sparsity, axes)
  if not isinstance(given, Mapping) or given.keys() != leaves.keys():
    missing = [path for path in leaves if path not in given] if isinstance(given, Mapping) else list(leaves)
    raise ValueError('sparsejax: `allocation` returned no dict with exactly the paths of the sparse leaves; missing: '
                     f'{errors.some(missing) or "none"}. Give each of {errors.some(list(leaves))} a sparsity.')
  for path, own in given.items():
    number = own.item() if arguments.is_known(own) and getattr(own, 'shape', None) == () else own
    if not is_number(number) or not -_ROUNDED <= number <= 1 + _ROUNDED:
      raise errors.at_leaf('sparsejax', path, leaves[path].shape, f'`allocation` gave it the sparsity {own!r}; give '
                           'a number from 0 to 1.')
  return given


class Ranked(NamedTuple):
  """A `Ranked` allocation ranks all leaves together, and thereby counts how many weights each leaf keeps.

  The pattern and the score of the recipe choose the weights that a leaf keeps. `normalise(scores)` makes the scores of
  different leaves comparable. `score` is the score that is ranked, if not that of the recipe. The count over all leaves
  together is exact; among equal scores, those of the earlier leaf are kept. N:M patterns, which fix the count of every
  group, are refused, and so are units of different sizes, such as channels of unequal layers.
  """

  normalise: Callable[[Array], Array] | None = None
  score: Score | None = None


@checked
def uniform(leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """Returns the same sparsity for every leaf."""
  del axes
  return dict.fromkeys(leaves, sparsity)


@checked
def erdos_renyi(
    leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """Returns Erdos-Renyi (ER) sparsities, with densities proportional to `(n_in + n_out) / (n_in * n_out)`.

  The formula is equation 3 of SET (Mocanu et al. 2018). `n_in` is the length of the contracted axes and `n_out` that of
  the output axes, by `axes` or else by the conventions. Taps and layers do not count. Of a leaf with unknown axes, all
  dimensions count. A leaf whose density would exceed 1 is dense, and the other leaves share the remaining weights
  (Evci et al. 2020, RigL, section 3 (1)).
  Deviation: the code of RigL first rounds the number of zeros of each leaf down.
  """
  return _by_dimensions(leaves, sparsity, axes, lambda inner, outer, taps: (inner, outer))


@checked
def erk(leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None = None) -> dict[str, float]:
  """Returns Erdos-Renyi-Kernel (ERK) sparsities: like `erdos_renyi`, with the taps of convolutions.

  Densities are proportional to `(n_in + n_out + w + h) / (n_in * n_out * w * h)` for kernels of `w` by `h`
  taps (Evci et al. 2020, section 3 (1)). The deviation is that of `erdos_renyi`.
  """
  return _by_dimensions(leaves, sparsity, axes, lambda inner, outer, taps: (inner, outer, *taps))


@checked
def uniform_plus(first: str | None = None, last: str | None = None, least: float = 0.2) -> Allocation:
  """Returns the allocation Uniform+ (Gale et al. 2019, The State of Sparsity, section 5.2).

  Leaves that match the glob `first` are dense. Leaves that match the glob `last` have at least the density `least`. All
  other leaves share one sparsity, with which the whole model has the sparsity that is asked for. A pytree does not tell
  its first and last layer: both are given by name, and either may be left out. Deviation: the code of Liu et al. 2022
  divides by the size of all leaves, which gives a model that is denser than asked for.

  The allocation raises `ValueError` for a glob without a leaf, and if the other leaves cannot hold enough zeros.
  """
  def allocate(leaves, sparsity, axes=None):
    del axes
    fixed: dict[str, Any] = {}
    for glob, most in ((first, 0.0), (last, min(sparsity, 1 - least))):
      paths = [path for path in leaves if glob is not None and trees.matches(glob, path)]
      if glob is not None and not paths:
        raise errors.unknown('allocation.uniform_plus', 'path', glob, leaves)
      fixed |= dict.fromkeys(paths, most)
    sizes = {path: math.prod(w.shape) for path, w in leaves.items()}
    zeros = sparsity * sum(sizes.values()) - sum(sizes[path] * own for path, own in fixed.items())
    others = sum(sizes.values()) - sum(sizes[path] for path in fixed)
    if zeros > others:
      raise ValueError(
          f'allocation.uniform_plus: sparsity {sparsity} asks for {zeros:.0f} zeros in the {others} weights that are '
          f'neither {first!r} nor {last!r}. Ask for less, or a `least` below {least}, or leave out `first`.')
    return {path: fixed.get(path, zeros / max(others, 1)) for path in leaves}

  return allocate


@checked
def custom(sparsities: Mapping[str, float]) -> Allocation:
  """Returns the allocation with the sparsities of a dict by globs, such as `{'block_0/**': 0.5, '**': 0.9}`.

  The first glob that matches a leaf decides. The allocation raises `ValueError` for a leaf that no glob matches, and
  for a glob that matches no leaf.
  """
  numbers = {glob: arguments.verified('allocation.custom', 'sparsity', value) for glob, value in sparsities.items()}

  def allocate(leaves, sparsity, axes=None):
    del sparsity, axes
    return dict(zip(leaves, trees.per_leaf('allocation.custom', 'sparsities', numbers, list(leaves))))

  allocate.facts = (OF_ITS_OWN,)
  return allocate


def global_() -> Ranked:
  """Returns the allocation that ranks all leaves together by the score of the recipe."""
  return Ranked()


@checked
def from_scores(score: Score) -> Ranked:
  """Returns the allocation in which each leaf keeps as many weights as if `score` ranked all leaves together.

  The score of the recipe chooses the weights that a leaf keeps. `scores.snip`, together with random masks, gives the
  SNIP ratios of Liu et al. 2022, section 3.1.
  """
  return Ranked(score=score)


def lamp() -> Ranked:
  """Returns the allocation LAMP, which ranks all leaves together by normalised squares (Lee et al. 2021, equation 1).

  The normalised square of a weight is w^2 divided by the sum of all squares of the leaf that are at least as large. The
  score of the recipe stands in place of |w|. LAMP sorts each leaf, and so suits masks that are seldom updated.
  """
  return Ranked(normalise=_lamp)


def _lamp(scores: Array) -> Array:
  squares = jnp.square(jnp.nan_to_num(scores.astype(jnp.float32), nan=0.0)).reshape(-1)
  order = jnp.argsort(squares, descending=True, stable=True)
  as_large = jnp.cumsum(squares[order])
  ranked = squares[order] / jnp.where(as_large > 0, as_large, 1.0)
  return jnp.zeros_like(squares).at[order].set(ranked).reshape(scores.shape)


@checked
def named(name: Any) -> Allocation | Ranked:
  """Returns the allocation that a configuration gives by `name`; raises `ValueError` for an unknown name.

  `name` is a name such as 'erk', the dict `{'name': 'uniform_plus', 'last': 'head/*'}`, a dict by globs for `custom`,
  or an allocation, which is returned as it is.
  """
  if isinstance(name, Mapping) and name.get('name') == 'uniform_plus':
    return uniform_plus(**{key: value for key, value in name.items() if key != 'name'})
  if isinstance(name, Mapping):
    return custom(name)
  if callable(name) or isinstance(name, Ranked):
    return name
  known = {'uniform': uniform, 'erdos_renyi': erdos_renyi, 'erk': erk, 'global': global_(), 'lamp': lamp()}
  if name not in known:
    raise errors.unknown('allocation.named', 'allocation', name, known)
  return known[name]


@checked
def shared_by(scores: Mapping[str, float], most: float,
              groups: Callable[[str], str] = lambda path: path) -> Allocation:
  """Returns the allocation that keeps more where `scores` are higher: ECoFLaP (Sung et al. 2023, 2310.02998).

  Leaves with equal `groups(path)` share one sparsity, which is at most `most`, and their scores add up. Each group
  keeps at least `1 - most`, and the rest is shared out in proportion to the scores. A group that is full leaves its
  part to the others. The numbers of kept weights are whole and add up to `round((1 - sparsity) * size)` exactly, by
  largest remainders. Deviation: the authors' code doubles what rounding up takes too much.

  `scores` maps the paths of all sparse leaves, or more, to numbers, at least 0, such as those of
  `sensitivities.zeroth_order`. Raises `ValueError` for a leaf without a score, and if `most` is below the sparsity.
  """
  most = arguments.verified('allocation.shared_by', 'most', most)
  scores = {path: _score_of(path, score) for path, score in scores.items()}

  def allocate(leaves, sparsity, axes=None):
    del axes
    sizes = {path: math.prod(w.shape) for path, w in leaves.items()}
    if missing := sorted(sizes.keys() - scores.keys()):
      raise errors.unknown('allocation.shared_by', 'path without a score', missing[0], scores)
    if sparsity > most:
      raise ValueError(f'allocation.shared_by: sparsity {sparsity} is more than most={most}, which no leaf may exceed. '
                       'Raise `most`, or ask for less.')
    members: dict[str, list[str]] = {}
    for path in sizes:
      members.setdefault(groups(path), []).append(path)
    room = {group: sum(sizes[path] for path in paths) for group, paths in members.items()}
    weight = {group: sum(scores[path] for path in paths) for group, paths in members.items()}
    total = sum(room.values()) - round(sparsity * sum(room.values()))
    kept = _whole(_filled(room, weight, {group: (1 - most) * n for group, n in room.items()}, total), room, total)
    shares: dict[str, float] = {}
    for group, paths in members.items():
      own = {path: sizes[path] for path in paths}
      exact = {path: kept[group] * n / max(room[group], 1) for path, n in own.items()}
      shares |= {path: 1 - n / max(own[path], 1) for path, n in _whole(exact, own, kept[group]).items()}
    return {path: shares[path] for path in leaves}

  return allocate


def _score_of(path: str, score: Any) -> float:
  scalar = getattr(score, 'ndim', None) == 0
  number = score.item() if scalar else score
  if not is_number(number) or not (math.isfinite(number) and number >= 0):
    raise ValueError(f'allocation.shared_by: the score of {path!r} is {arguments.shown(score)}; a score is a number, '
                     'finite and at least 0.')
  return float(number)


def _filled(room: Mapping[str, int], weight: Mapping[str, float], least: Mapping[str, float],
            total: float) -> dict[str, float]:
  """Returns how much each group keeps, `total` in all: `least`, and a part of the rest in proportion to its weight."""
  kept, free = dict(least), {group for group in room if room[group]}
  while free and total - sum(kept.values()) > 1e-9 * max(total, 1):
    rest = total - sum(kept.values())
    # Where no score is left that is above 0, the sizes decide.
    weights = {group: weight[group] for group in free} if sum(weight[group] for group in free) else {
        group: float(room[group]) for group in free}
    for group in list(free):
      kept[group] += rest * weights[group] / sum(weights.values())
      if kept[group] >= room[group]:
        kept[group] = float(room[group])
        free.discard(group)
  return kept


def _whole(exact: Mapping[str, float], room: Mapping[str, int], total: int) -> dict[str, int]:
  """Returns whole numbers next to `exact`, at most `room`, that add up to `total`: the largest remainders round up."""
  kept = {name: min(math.floor(number + 1e-9), room[name]) for name, number in exact.items()}
  order = sorted(exact, key=lambda name: kept[name] - exact[name])
  for name in itertools.islice((name for name in order if kept[name] < room[name]), total - sum(kept.values())):
    kept[name] += 1
  return kept


@checked
def knapsack(costs: Sequence[Sequence[float]], sizes: Sequence[Sequence[float]], budget: float) -> tuple[int, ...]:
  """Returns the choice of each layer with the least sum of costs whose sizes add up to at most `budget`.

  `costs[l][c]` and `sizes[l][c]` belong to choice `c` of layer `l`. The multiple-choice knapsack of CalibTIP (Hubara et
  al. 2020), solved exactly: among partial choices, only those that are not both larger and costlier than
  another one are continued. Ties go to the smaller size. Raises `ValueError` if even the smallest choices do not fit.
  """
  best: list[tuple[float, float, tuple[int, ...]]] = [(0.0, 0.0, ())]  # size, cost, choices; sizes grow and costs fall
  smallest = list(itertools.accumulate((min(own) for own in reversed(sizes)), initial=0.0))[::-1]
  for layer, (cost, size) in enumerate(zip(costs, sizes, strict=True)):
    longer = sorted((s + size[c], e + cost[c], (*chosen, c)) for s, e, chosen in best
                    for c in range(len(_as_long(layer, cost, size))))
    best, least = [], math.inf
    for s, e, chosen in longer:
      if e < least and s + smallest[layer + 1] <= budget:
        best, least = [*best, (s, e, chosen)], e
  if not best:
    raise ValueError(f'allocation.knapsack: the smallest choices have size {smallest[0]:g}, more than budget={budget}.')
  return best[-1][2]


def _as_long(layer: int, cost: Sequence[float], size: Sequence[float]) -> Sequence[float]:
  if len(cost) != len(size) or not len(cost) or not all(math.isfinite(x) for x in (*cost, *size)):
    raise ValueError(f'allocation.knapsack: layer {layer} has {len(cost)} costs and {len(size)} sizes; give one finite '
                     'cost and size for each choice.')
  return cost


def _by_dimensions(
    leaves: Mapping[str, Array], sparsity: float, axes: Mapping[str, Axes] | None, lengths: Callable[..., Any],
) -> dict[str, float]:
  """Returns sparsities whose densities, at most 1, are proportional to a ratio of the dimensions of each leaf.

  The ratio is the sum of the numbers `lengths(n_in, n_out, taps)` divided by their product.
  """
  known, size, ratio = trees.axes_by_path('allocation', axes, dict(leaves)), {}, {}
  for path, w in leaves.items():
    own = known[path]
    inner, outer = (math.prod(w.shape[a] for a in group) for group in (own.contracted, own.output))
    parts = w.shape if own.source == 'unknown' else lengths(inner, outer, [w.shape[a] for a in own.spatial])
    size[path], ratio[path] = math.prod(w.shape), sum(parts) / math.prod(parts)
  full: set[str] = set()
  while True:
    free = [path for path in leaves if path not in full]
    kept = (1 - sparsity) * sum(size.values()) - sum(size[path] for path in full)
    scale = kept / max(sum(ratio[path] * size[path] for path in free), 1e-30)
    largest = max((ratio[path] for path in free), default=0.0)
    if scale * largest <= 1:
      return {path: 0.0 if path in full else 1 - scale * ratio[path] for path in leaves}
    full |= {path for path in free if ratio[path] == largest}

