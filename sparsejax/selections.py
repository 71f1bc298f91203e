"""Selections: how the masks of all sparse leaves are chosen, out of the words that look at one leaf."""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import allocation as allocations
from sparsejax import errors, patterns, ranking, scores, trees, updates
from sparsejax.states import Plan, SparseLeaf
from sparsejax.types import Allocation, Array, Axes, Pattern, Schedule, Score, Signals, Start, Update

Leaves, Masks = Sequence[SparseLeaf], list[Array]


class Selection(NamedTuple):
  """How masks are chosen. `plan(arrays, axes)` makes the `SparseLeaf`s; `select(leaves, weights, masks, signals)`
  returns the new masks and what flows see of it as `signals.stats`, each a list over the sparse leaves; `first` is the
  same for the first masks (`None`: `select`), which `start` may call several times, see `starts`. `stat(w)` is a leaf's
  first stat. With `observe(stat, w, signals) -> stat` stats are a memory that changes once an update, before it, and
  `select` only reads them. `instead`: an update that chooses masks does not move the weights."""

  plan: Callable[[dict[str, Array], dict[str, Axes]], Plan]
  select: Callable[[Leaves, list[Array], Masks, list[Signals]], tuple[Masks, list[Any]]]
  first: Callable[[Leaves, list[Array], Masks, list[Signals]], tuple[Masks, list[Any]]] | None = None
  start: Start | None = None
  stat: Callable[[Array], Any] = lambda w: trees.DENSE
  observe: Callable[[Any, Array, Signals], Any] | None = None
  instead: bool = False


def leafwise(
    pattern: Pattern | Mapping[str, Pattern],
    *,
    score: Score = scores.magnitude,
    first: Score | None = None,
    update: Update = updates.reselect,
    progression: Callable[[Pattern], Schedule] | None = None,
    sparsity: float | None = None,
    ramp: Schedule | None = None,
    allocation: Allocation | allocations.Ranked = allocations.uniform,
    memory: scores.Memory | None = None,
    start: Start | None = None,
    instead: bool = False,
) -> Selection:
  """Each leaf by itself, by `pattern` (or one per glob) over `score`; the first mask over `first`, if given.

  `sparsity` (default: the pattern's own) is shared out by `allocation`; N:M without one, and each of several patterns,
  goes to its own. `ramp(step)`, from 0 to 1, is the
  part of it that is asked so far. `progression(pattern)` is a schedule of patterns on the way to the asked one.
  `memory` is what the score remembers. `start` and `instead` as in `Selection`.
  """
  pattern = patterns.parse(pattern)
  if sparsity is None and not isinstance(pattern, (Mapping, patterns.NM)):
    sparsity = pattern.sparsity
  ranked = isinstance(allocation, allocations.Ranked)

  def plan(arrays: dict[str, Array], axes: dict[str, Axes]) -> Plan:
    own = dict(zip(arrays, trees.per_leaf('sparsejax', 'pattern', pattern, list(arrays))))
    asked = dict.fromkeys(arrays) if sparsity is None or ranked else allocation(arrays, sparsity, axes)
    leaves = []
    for path, leaf in arrays.items():
      if asked[path] is None and not ranked and own[path].static and own[path].sparsity is None:
        raise errors.at_leaf('sparsejax', path, leaf.shape, f'{own[path]} has no sparsity; pass `sparsity=`.')
      on_the_way = progression(own[path])(0) if progression else own[path]
      if why := on_the_way.validate(leaf.shape, axes[path]) or own[path].validate(leaf.shape, axes[path]):
        raise errors.at_leaf('sparsejax', path, leaf.shape, why)
      target = own[path].sparsity if asked[path] is None and not ranked else asked[path]
      # A traced n cannot be part of a treedef; then nothing is on record as asked.
      leaves.append(SparseLeaf(path, leaf.shape, axes[path], own[path] if own[path].static else None, target))
    if ranked:
      _check_comparable(leaves, sparsity)
    return Plan(tuple(leaves), sparsity=sparsity if ranked else None)

  def shares(leaves: Leaves, own: list[Pattern], masks: Masks, ranks: list[Array], step: Any) -> list[Any]:
    """What each leaf's pattern is asked for: its share of `sparsity`, or, ranked, counts."""
    asked = lambda target: target if ramp is None else patterns.Ramp(target, ramp(step))
    if ranked:
      return _competed(allocation, leaves, own, ranks, asked(sparsity))
    if ramp is not None:
      return [asked(leaf.sparsity) for leaf in leaves]
    return [None if sparsity is None else leaf.sparsity for leaf in leaves]

  def chosen_by(score: Score, update: Update) -> Callable[..., Any]:
    def select(leaves, weights, masks, signals):
      own = trees.per_leaf('sparsejax', 'pattern', pattern, [leaf.path for leaf in leaves])
      now = [progression(p)(s.step) if progression else p for p, s in zip(own, signals)]
      found = [score(w, s) for w, s in zip(weights, signals)]
      ranks = [allocation.score(w, s) for w, s in zip(weights, signals)] if ranked and allocation.score else found
      if update is updates.prune_to:
        ranks = [updates.kept_first(mask, x) for mask, x in zip(masks, ranks)]
      chosen = []
      for leaf, p, share, mask, x, w, s in zip(
          leaves, now, shares(leaves, now, masks, ranks, signals[0].step), masks, found, weights, signals):
        pick = lambda x, drop=None, p=p, share=share, at=leaf.axes: p(x, share, at, drop)
        chosen.append(update(mask, x, pick, w, s))
      return chosen, [trees.DENSE] * len(chosen)

    return select

  first = first and chosen_by(first, updates.reselect)
  return Selection(plan, chosen_by(score, update), first, start, *_of(memory), instead)


def _of(memory: scores.Memory | None) -> tuple[Any, Any]:
  """`stat` and `observe` of a selection."""
  return memory or (lambda w: trees.DENSE, None)


def _check_comparable(leaves: Leaves, sparsity: float | None) -> None:
  """Raises `ValueError` where leaves cannot be ranked together."""
  if sparsity is None:
    raise ValueError('sparsejax: leaves that are ranked together share one number; pass `sparsity=`.')
  sizes = {}
  for leaf in leaves:
    if not hasattr(leaf.pattern, 'pooled') or getattr(leaf.pattern, 'balanced', False):
      raise errors.at_leaf('sparsejax', leaf.path, leaf.shape, f'{leaf.pattern} fixes how many every group keeps, '
                           'so that leaves cannot be ranked together. Use allocation=allocation.uniform, or another '
                           'pattern.')
    sizes.setdefault(patterns.units(leaf.pattern, leaf.shape, leaf.axes)[1], leaf)
  if len(sizes) > 1:
    (a, one), (b, other) = list(sizes.items())[:2]
    raise errors.at_leaf('sparsejax', other.path, other.shape, f'a unit of {other.pattern} has {b} weights here and '
                         f'{a} in {one.path!r}, so that leaves cannot be ranked together. Use '
                         'allocation=allocation.uniform or erk.')


def _competed(allocation: allocations.Ranked, leaves: Leaves, own: list[Pattern], ranks: list[Array], asked: Any):
  """How many units each layer of each leaf keeps, as `ranking.Count`s, of all of them ranked together."""
  pools = [p.pooled(x, leaf.axes) for p, x, leaf in zip(own, ranks, leaves)]
  values = [_by_layer(allocation.normalise, pool) if allocation.normalise else pool.scores for pool in pools]
  masks = ranking.top_n_of_leaves(values, patterns.kept_of(asked, sum(math.prod(v.shape) for v in values)))
  counts = []
  for mask, pool in zip(masks, pools):
    along = tuple(a for a in range(mask.ndim) if a not in pool.layers)
    counts.append(ranking.count(jnp.sum(mask, along, dtype=jnp.int32)))
  return counts


def _by_layer(normalise: Callable[[Array], Array], pool: patterns.Pooled) -> Array:
  """Layers are matrices of their own, however they are stored."""
  for axis in sorted(pool.layers):
    normalise = jax.vmap(normalise, axis, axis)
  return normalise(pool.scores)


def global_threshold(sparsity: Schedule, target: float, *, scaled: bool = False) -> Selection:
  """All leaves together: keeps what is above the `sparsity(step)`-quantile of |w| over all sparse leaves.

  `scaled`: each leaf is measured in units of `1 / sqrt(sum(shape without layers))`. The stats are the leaf's
  threshold, -1 while the sparsity is 0. The count is the quantile's, linearly interpolated, ties pruned: not exact.
  """
  def plan(arrays: dict[str, Array], axes: dict[str, Axes]) -> Plan:
    leaves = [SparseLeaf(path, w.shape, axes[path], 'global', None) for path, w in arrays.items()]
    return Plan(tuple(leaves), sparsity=target)

  def unit(leaf: SparseLeaf) -> float:
    return sum(n for a, n in enumerate(leaf.shape) if a not in leaf.axes.layer) ** -0.5 if scaled else 1.0

  def select(leaves, weights, masks, signals):
    del masks
    at = sparsity(signals[0].step)
    common = ranking.quantile([jnp.abs(w).astype(jnp.float32) / unit(leaf) for leaf, w in zip(leaves, weights)], at)
    thresholds = [jnp.where(at > 0, common * unit(leaf), jnp.float32(-1)) for leaf in leaves]
    return [jnp.abs(w).astype(jnp.float32) > th for w, th in zip(weights, thresholds)], thresholds

  return Selection(plan, select, stat=lambda w: jnp.float32(-1.0))


def score_threshold(score: Score, threshold: Schedule, *, least: float = 0.005,
                    memory: scores.Memory | None = None) -> Selection:
  """Keeps what scores above `threshold(step)`, in each leaf `int(least * size) + 1` at least, the best of them.

  How sparse that is comes out of training: nothing is on record as asked.
  """
  def plan(arrays: dict[str, Array], axes: dict[str, Axes]) -> Plan:
    return Plan(tuple(SparseLeaf(path, w.shape, axes[path], None, None) for path, w in arrays.items()))

  def select(leaves, weights, masks, signals):
    del masks
    chosen = []
    for leaf, w, s in zip(leaves, weights, signals):
      found = score(w, s)
      floor = patterns.Unstructured()(found, ranking.count(int(least * _layer_size(leaf)) + 1), leaf.axes)
      chosen.append((found > threshold(s.step)) | floor)
    return chosen, [trees.DENSE] * len(chosen)

  return Selection(plan, select, None, None, *_of(memory))


def _layer_size(leaf: SparseLeaf) -> int:
  return math.prod(n for a, n in enumerate(leaf.shape) if a not in leaf.axes.layer)


def redistributed(
    pattern: Pattern, *, grow: Score, fraction: Schedule, sparsity: float | None = None,
    allocation: Allocation = allocations.uniform, memory: scores.Memory | None = None,
) -> Selection:
  """Drops by magnitude in each layer, and grows by `grow` as many as all dropped, most where kept weights score high.

  Sparse momentum (Dettmers and Zettlemoyer 2019, section 3.2). A layer's share of what is grown is the mean of `grow`
  over its kept weights, against all layers; what does not fit into a layer goes to the others, by their shares. The
  count over all layers is the same at every step. The first masks are random, by `allocation`.
  """
  pattern = patterns.parse(pattern)
  sparsity = pattern.sparsity if sparsity is None else sparsity

  def plan(arrays: dict[str, Array], axes: dict[str, Axes]) -> Plan:
    leaves = leafwise(pattern, sparsity=sparsity, allocation=allocation).plan(arrays, axes).leaves
    _check_comparable(leaves, sparsity)
    return Plan(tuple(dataclasses.replace(leaf, sparsity=None) for leaf in leaves), sparsity=sparsity)

  def first(leaves, weights, masks, signals):
    asked = allocation({leaf.path: leaf for leaf in leaves}, sparsity, {leaf.path: leaf.axes for leaf in leaves})
    drawn = [pattern(scores.random(w, s), asked[leaf.path], leaf.axes) for leaf, w, s in zip(leaves, weights, signals)]
    return drawn, [trees.DENSE] * len(drawn)

  def select(leaves, weights, masks, signals):
    drop, growing, survivors = fraction(signals[0].step), [], []
    for leaf, w, mask, s in zip(leaves, weights, masks, signals):
      keep = patterns.fewer(ranking.count(_units_in(pattern, mask, leaf)), drop)
      survivors.append(pattern(updates.kept_first(mask, scores.magnitude(w, s)), keep, leaf.axes) & mask)
      growing.append(grow(w, s))
    per_layer = lambda f, *columns: jnp.concatenate([f(*each).reshape(-1) for each in zip(*columns, leaves)])
    units = lambda mask, leaf: _units_in(pattern, mask, leaf)
    before, left, whole = (per_layer(units, tree) for tree in (masks, survivors, [jnp.ones_like(m) for m in masks]))
    strength = per_layer(_mean_over, masks, growing)
    grown = left + updates.shared_out(jnp.sum(before - left, dtype=jnp.int32), strength, whole - left)
    chosen, at = [], 0
    for leaf, alive, g in zip(leaves, survivors, growing):
      shape = [leaf.shape[a] for a in leaf.axes.layer]
      counts, at = grown[at:at + math.prod(shape)].reshape(shape), at + math.prod(shape)
      chosen.append(pattern(jnp.where(alive, jnp.inf, updates.bounded(g)), ranking.count(counts), leaf.axes))
    return chosen, [trees.DENSE] * len(chosen)

  return Selection(plan, select, first, None, *_of(memory))


def _units_in(pattern: Any, mask: Array, leaf: SparseLeaf) -> Array:
  """How many units of a mask are kept, `int32[*layers]`."""
  pool = pattern.pooled(mask.astype(jnp.float32), leaf.axes)
  return jnp.sum(pool.scores > 0, [a for a in range(pool.scores.ndim) if a not in pool.layers], dtype=jnp.int32)


def _mean_over(mask: Array, values: Array, leaf: SparseLeaf) -> Array:
  """The mean of the values at a mask, `float32[*layers]`, 0 over none."""
  along = [a for a in range(mask.ndim) if a not in leaf.axes.layer]
  total, count = jnp.sum(jnp.where(mask, values, 0), along), jnp.sum(mask, along, dtype=jnp.float32)
  return total / jnp.maximum(count, 1)
