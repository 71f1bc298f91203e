"""A selection chooses the masks of all sparse leaves, out of the words that look at one leaf.

    selection = selections.leafwise(Unstructured(0.9), score=scores.magnitude, update=updates.prune_to)
    plan = selection.plan({'w': w}, {'w': axes})                              # what is asked of each leaf
    masks, thresholds = selection.select(plan.leaves, [w], [mask], [signals])
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.flatten_util import ravel_pytree

from sparsejax import allocation as allocations
from sparsejax import choices, competitions, counts, errors, patterns, ranking, scores, trees, types, updates
from sparsejax.arguments import checked
from sparsejax.states import Plan, SparseLeaf
from sparsejax.types import Allocation, Array, Asked, Axes, Bound, Pattern, Schedule, Score, Signals, Update, says

__all__ = ['Selection', 'global_threshold', 'leafwise', 'redistributed', 'score_threshold']

Leaves, Masks = Sequence[SparseLeaf], list[Array]


class Selection(NamedTuple):
  """A `Selection` says what is asked of each leaf, and chooses the masks of all leaves.

  `plan(arrays, axes)` returns a `Plan` with a `SparseLeaf` for each array. `select(leaves, weights, masks, signals)`
  returns the new masks, and `None` or a threshold for each leaf. `threshold`: each leaf's threshold before the first
  choice. If it is given, flows read the thresholds as `signals.stats`. `once(leaves, weights, masks, signals)`: whether
  `select` reads each weight only once, into a stack; `None` if that is not known. `whole(step)`: whether `select` is
  known to keep every weight at a step that is a number. `gradient_free`: whether `select` reads no gradient.
  """

  plan: Callable[[dict[str, Array], dict[str, Axes]], Plan]
  select: Callable[[Leaves, list[Array], Masks, list[Signals]], tuple[Masks, list[Any] | None]]
  threshold: float | None = None
  once: Callable[[Leaves, list[Array], Masks, list[Signals]], bool] | None = None
  whole: Callable[[int], bool] | None = None
  gradient_free: bool = False


@checked
def leafwise(
    pattern: Pattern | Mapping[str, Pattern],
    *,
    score: Score = scores.magnitude,
    update: Update = updates.reselect,
    sparsity: float | None = None,
    ramp: Schedule | None = None,
    allocation: Allocation | allocations.Ranked = allocations.uniform,
) -> Selection:
  """Returns the selection that prunes each leaf by `pattern`, or by one pattern per glob, over `score`.

  `sparsity` (default: the pattern's own) is shared out by `allocation`. If `sparsity` is `None`, N:M patterns, and
  every pattern of a dict, use the sparsity that they define themselves. `ramp(step)`, from 0 to 1, is the part of the
  sparsity that is asked at `step`.
  """
  pattern = patterns.parse(pattern)
  if sparsity is None and not isinstance(pattern, Mapping) and not getattr(pattern, 'fixed', False):
    sparsity = pattern.sparsity
  words = _Leafwise(pattern, score, update, sparsity, ramp, allocation)
  return Selection(words.plan, words.select, once=words.once, whole=words.whole,
                   gradient_free=_gradient_free(words.words))


@dataclasses.dataclass(frozen=True)
class _Leafwise:
  """A `_Leafwise` holds the words of `leafwise`."""

  pattern: Pattern | Mapping[str, Pattern]
  score: Score
  update: Update
  sparsity: float | None
  ramp: Schedule | None
  allocation: Allocation | allocations.Ranked

  @property
  def ranked(self) -> bool:
    return isinstance(self.allocation, allocations.Ranked)

  @property
  def words(self) -> tuple[Any, ...]:
    return self.score, self.update, *filter(None, [getattr(self.allocation, 'score', None)])

  def of(self, paths: Sequence[str]) -> list[Pattern]:
    """Returns the pattern of each leaf."""
    return trees.per_leaf('sparsejax', 'pattern', self.pattern, list(paths))

  def plan(self, arrays: dict[str, Array], axes: dict[str, Axes]) -> Plan:
    paths_and_patterns = list(zip(arrays, self.of(arrays)))
    alone = self.sparsity is not None and not self.ranked
    carried = [pattern.validate(arrays[path].shape, axes[path]) for path, pattern in paths_and_patterns]
    refuse(arrays, carried)
    shares = allocations.shares(self.allocation, arrays, self.sparsity, axes) if alone else {}
    asked = [Asked(self.sparsity if self.ranked else shares.get(path, pattern.sparsity), self.ranked)
             for path, pattern in paths_and_patterns]
    refuse(arrays, [self._unasked(pattern, each) for (_, pattern), each in zip(paths_and_patterns, asked)])
    leaves = tuple(SparseLeaf(path, arrays[path].shape, axes[path], on_record(pattern), each)
                   for (path, pattern), each in zip(paths_and_patterns, asked))
    if self.ranked:
      competitions.check_comparable(leaves)
    return Plan(leaves)

  def _unasked(self, pattern: Pattern, asked: Asked) -> str | None:
    """Returns why the pattern cannot have the sparsity that is asked of a leaf, or `None` if it can."""
    if hasattr(pattern, 'at') and (self.ramp or self.sparsity is not None and not self.ranked):
      return f'the stages on the way to {pattern} have counts of their own. Leave out `sparsity=` and `ramp=`.'
    if pattern.static and asked.sparsity is None and not self.ranked:
      return f'{pattern} has no sparsity; pass `sparsity=`.'
    alone = getattr(pattern, 'fixed', False) and pattern.static and not self.ranked
    if alone and not math.isclose(asked.sparsity, pattern.sparsity, abs_tol=0.005):  # 0.67 stands for 1:3
      return (f'{pattern} keeps {1 - pattern.sparsity:.4g} of every group, and sparsity={asked.sparsity:.4g} asks for '
              'another fraction. Leave out `sparsity=`, or take the pattern that keeps as many.')
    return None

  def select(self, leaves: Leaves, weights: list[Array], masks: Masks, signals: list[Signals]) -> tuple[Masks, None]:
    own, rows = self.of([leaf.path for leaf in leaves]), list(zip(masks, weights, _arrays(signals, *self.words)))
    chosen = functools.partial(self._masks, signals[0].step)
    return choices.by_stage(chosen, leaves, own, rows, signals[0].step, words=self.words), None

  def _masks(self, step: Any, leaves: Leaves, own: list[Pattern], rows: list[Any]) -> Masks:
    now, progress = [choices.at(pattern, step) for pattern in own], self.ramp and self.ramp(step)
    told: list[Any]
    if self.ranked:
      ranks = self._ranks(leaves, now, rows, step)
      race = competitions.Race.of(leaves, now, ranks, self.allocation.normalise, progress)
      if self._race_decides():
        return race.masks()
      told = race.counts()
    else:
      told = self._told(leaves, now)

    def chosen(alike: choices.Alike, row: Any) -> Array:
      mask, w, arrays, count, size, step, progress = row
      signals = Signals(*arrays, step, alike.leaf.axes)
      if isinstance(count, counts.Rising):
        count = ranking.counted(count(progress), math.prod(alike.leaf.shape))
      best = counts.Selector(choices.at(alike.pattern, step), count, alike.leaf.axes)
      select = lambda values, drop=None: best(alike.ranked(values, size), drop)
      return self.update(mask, scores.applied(self.score, w, signals), select, w, signals)

    rows = [(*row, count) for row, count in zip(rows, told)]
    return choices.each(chosen, leaves, own, rows, (step, progress), words=self.words)

  def once(self, leaves: Leaves, weights: list[Array], masks: Masks, signals: list[Signals]) -> bool:
    rows, own = list(zip(masks, weights, _arrays(signals, *self.words))), self.of([leaf.path for leaf in leaves])
    if not self.ranked:
      return choices.stacks(leaves, own, rows)
    each = all(isinstance(pattern, patterns.Unstructured) for pattern in own)  # each weight is a unit
    each &= all(says(word, types.ELEMENTWISE) for word in self.words)
    return self._race_decides() and each and ranking.stacks(weights)

  def whole(self, step: int) -> bool:
    """Returns whether the ramp has not begun, where an update takes the best of all: the count is that of all units."""
    if self.ramp is None or not says(self.update, types.TAKES_BEST):
      return False
    with jax.ensure_compile_time_eval():
      return not jax.jit(self.ramp)(np.int32(step))

  def _told(self, leaves: Leaves, now: list[Pattern]) -> list[Any]:
    """Returns the count that the pattern of each leaf is told; `None` stands for the pattern's own count."""
    if self.sparsity is None and self.ramp is None:
      return [None] * len(leaves)
    told: dict[Any, Any] = {}  # once for leaves that are alike
    same = [(id(pattern), leaf.asked.sparsity, leaf.shape, leaf.axes) for pattern, leaf in zip(now, leaves)]
    for pattern, alike in zip(now, same):
      if alike not in told:
        told[alike] = self._count(pattern, *alike[1:])
    return [told[alike] for alike in same]

  def _count(self, pattern: Pattern, sparsity: Any, shape: tuple[int, ...], axes: Axes) -> Any:
    if self.ramp is not None and sparsity is not None:
      return counts.Rising.of(sparsity, counts.units(pattern, shape, axes)[0])
    return ranking.counted(ranking.count(counts.count_of(pattern, sparsity, shape, axes)), math.prod(shape))

  def _ranks(self, leaves: Leaves, now: list[Pattern], rows: Any, step: Any) -> list[Array]:
    """Returns the scores by which the weights of each leaf compete, where all leaves are ranked together."""
    score = self.allocation.score or self.score

    def ranks(alike: choices.Alike, row: Any) -> Array:
      mask, w, arrays, _, step = row
      signals = Signals(*arrays, step, alike.leaf.axes)
      return updates.ranked_by(self.update, mask, scores.applied(score, w, signals), w, signals)

    return choices.each(ranks, leaves, now, rows, (step,), loop=False)

  def _race_decides(self) -> bool:
    """Returns whether the best of all leaves together are the mask, so that no leaf is ranked a second time."""
    alone = self.allocation.score is None and self.allocation.normalise is None
    return alone and says(self.update, types.TAKES_BEST)


def _arrays(signals: list[Signals], *words: Any) -> list[tuple[Any, Any, Any]]:
  """Returns the signals of each leaf that are arrays, without the gradients if no word reads them."""
  free = _gradient_free(words)
  return [(None if free else own.grad, own.key, own.stats) for own in signals]


def _gradient_free(words: Sequence[Any]) -> bool:
  return all(says(word, types.GRADIENT_FREE) for word in words)


def refuse(arrays: Mapping[str, Array], reasons: Sequence[str | None]) -> None:
  """Raises one `ValueError` for all leaves that have a reason, see `errors.at_leaves`."""
  problems = [errors.Problem(path, w.shape, why) for (path, w), why in zip(arrays.items(), reasons) if why]
  if problems:
    raise errors.at_leaves('sparsejax', problems)


def on_record(pattern: Pattern) -> Pattern | None:
  """Returns the pattern that a leaf records; none for a traced N, which cannot be part of a treedef."""
  return getattr(pattern, 'target', pattern) if pattern.static else None


@checked
def global_threshold(sparsity: Schedule, target: float, *, scaled: bool = False) -> Selection:
  """Returns the selection that keeps the weights above the `sparsity(step)`-quantile of |w| over all sparse leaves.

  `scaled`: each leaf is measured in units of `1 / sqrt(sum(shape without layers))`. A leaf's threshold is -1 while the
  sparsity is 0. The count is that of the linearly interpolated quantile, with ties pruned: the count is not exact.
  """
  def select(leaves, weights, masks, signals):
    units = [sum(leaf.layer_shape) ** -0.5 if scaled else 1.0 for leaf in leaves]
    share, sizes = sparsity(signals[0].step), [jnp.abs(w).astype(jnp.float32) for w in weights]
    common = ranking.quantile([size / unit for size, unit in zip(sizes, units)], share)
    of_unit = {unit: jnp.where(share > 0, common * unit, jnp.float32(-1)) for unit in units}  # once for equal units
    thresholds = [of_unit[unit] for unit in units]
    return [size > th for size, th in zip(sizes, thresholds)], thresholds

  plan = Bound(_all_alike, (patterns.Unstructured(), Asked(target, together=True)))
  return Selection(plan, select, threshold=-1.0, gradient_free=True)


@checked
def score_threshold(score: Score, threshold: Schedule, *, least: float = 0.005) -> Selection:
  """Returns the selection that keeps the weights with a score above `threshold(step)`.

  Each layer keeps at least `int(least * size) + 1` weights, the best of the layer. The sparsity comes out of training,
  so nothing is on record as asked.
  """
  def chosen(alike, row):
    w, arrays, fewest, size, step = row
    values = scores.applied(score, w, Signals(*arrays, step, alike.leaf.axes))
    return (values > threshold(step)) | alike.pattern(alike.ranked(values, size), fewest, alike.leaf.axes)

  def select(leaves, weights, masks, signals):
    sizes = [math.prod(leaf.layer_shape) for leaf in leaves]
    fewest = [ranking.counted(ranking.count(int(least * size) + 1), size) for size in sizes]
    rows, own = list(zip(weights, _arrays(signals, score), fewest)), [patterns.Unstructured()] * len(leaves)
    return choices.each(chosen, leaves, own, rows, (signals[0].step,), words=(score,)), None

  return Selection(Bound(_all_alike, (None, Asked())), select, gradient_free=_gradient_free([score]))


def _all_alike(arrays: dict[str, Array], axes: dict[str, Axes], pattern: Pattern | None, asked: Asked) -> Plan:
  """Returns the plan that asks the same of all leaves."""
  return Plan(tuple(SparseLeaf(path, w.shape, axes[path], pattern, asked) for path, w in arrays.items()))


@checked
def redistributed(pattern: Pattern, *, grow: Score, fraction: Schedule, sparsity: float | None = None,
                  allocation: Allocation = allocations.uniform) -> Selection:
  """Returns the selection that drops by magnitude in each layer and grows as many weights by `grow` in all layers.

  The rule is that of sparse momentum (Dettmers and Zettlemoyer 2019, section 3.2). A layer's share of the grown weights
  is the mean of `grow` over its kept weights, against all layers. The excess over the room of a layer goes to the other
  layers, by their shares. The count over all layers is the same at every step.
  """
  pattern = patterns.parse(pattern)
  sparsity = pattern.sparsity if sparsity is None else sparsity

  def plan(arrays: dict[str, Array], axes: dict[str, Axes]) -> Plan:
    alone = leafwise(pattern, sparsity=sparsity, allocation=allocation).plan(arrays, axes).leaves
    leaves = tuple(dataclasses.replace(leaf, asked=Asked(sparsity, together=True)) for leaf in alone)
    competitions.check_comparable(leaves)
    return Plan(leaves)

  def select(leaves, weights, masks, signals):
    step, own = signals[0].step, [pattern] * len(leaves)
    rows = list(zip(masks, weights, _arrays(signals, grow)))
    survived, regrown = functools.partial(_survived, grow), functools.partial(_regrown, grow)
    survivors = choices.each(survived, leaves, own, rows, (step, fraction(step)), words=(grow,))
    grown = _grown([numbers for _, numbers in survivors])
    rows = [(alive, count, w, arrays) for (alive, _), count, (_, w, arrays) in zip(survivors, grown, rows)]
    return choices.each(regrown, leaves, own, rows, (step,), words=(grow,)), None

  return Selection(plan, select, gradient_free=_gradient_free([grow]))


class _Numbers(NamedTuple):
  """A `_Numbers` says of each layer of a leaf, `[*layers]`, how many units were kept, survive, and could be kept.

  `strength`: the mean of the growth scores over the kept weights. Numbers are `int32`: a layer has below 2^31 units.
  """

  before: Array
  left: Array
  most: Array
  strength: Array


def _survived(grow: Score, alike: choices.Alike, row: Any) -> tuple[Array, _Numbers]:
  """Returns the mask of the kept weights of a leaf without the smallest of each layer, and the numbers of its units."""
  (leaf, pattern, _), (mask, w, arrays, size, step, drop) = alike, row
  signals = Signals(*arrays, step, leaf.axes)
  before = _units_in(pattern, mask, leaf)
  keep = counts.fewer(ranking.count(before), drop)
  alive = pattern(updates.kept_first(mask, scores.magnitude(w, signals)), keep, leaf.axes) & mask
  all_ = alike.ranked(jnp.ones(mask.shape, jnp.float32), size) > 0
  left, most = (_units_in(pattern, each, leaf) for each in (alive, all_))
  return alive, _Numbers(before, left, most, _mean_over(mask, grow(w, signals), leaf))


def _regrown(grow: Score, alike: choices.Alike, row: Any) -> Array:
  """Returns the mask of the survivors and of the best others, `count` units in each layer."""
  (leaf, pattern, _), (alive, count, w, arrays, size, step) = alike, row
  values = updates.bounded(grow(w, Signals(*arrays, step, leaf.axes)))
  return pattern(alike.ranked(jnp.where(alive, jnp.inf, values), size), ranking.count(count), leaf.axes)


def _grown(numbers: Sequence[_Numbers]) -> list[Array]:
  """Returns how many units each layer of each leaf keeps after growth, `int32[*layers]` for each leaf."""
  (before, restored), *others = (ravel_pytree(list(each)) for each in zip(*numbers))
  left, most, strength = (flat for flat, _ in others)
  return restored(left + updates.shared_out(jnp.sum(before - left, dtype=jnp.int32), strength, most - left))


def _units_in(pattern: Pattern, mask: Array, leaf: SparseLeaf) -> Array:
  """Returns how many units of a mask are kept, `int32[*layers]`: fewer than 2^31 in each layer."""
  pool = pattern.pooled(mask.astype(jnp.float32), leaf.axes)
  return competitions.per_layer(pool.scores > 0, pool).low


def _mean_over(mask: Array, values: Array, leaf: SparseLeaf) -> Array:
  """Returns the mean of the values at a mask, `float32[*layers]`, 0 over an empty mask."""
  along = [a for a in range(mask.ndim) if a not in leaf.axes.layer]
  total, count = jnp.sum(jnp.where(mask, values, 0), along), jnp.sum(mask, along, dtype=jnp.float32)
  return total / jnp.maximum(count, 1)
