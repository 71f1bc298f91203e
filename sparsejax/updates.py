"""An update makes a mask out of the mask before it.

An update is `update(mask, scores, select, w, signals) -> mask`, called for each leaf. `select(scores, drop=None)` is a
`counts.Selector`: the pattern with its count and axes filled in. The pattern and the count are kept under every update.
`drop` is a fraction of the count, rounded down, by which fewer weights are kept.

    select = counts.Selector(NM(2, 4), None, axes)
    mask = updates.prune_to(mask, scores.magnitude(w), select, w, signals)
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from sparsejax import counts, ranking
from sparsejax.arguments import checked
from sparsejax.neighbours import where_kept
from sparsejax.types import (
  ELEMENTWISE,
  GRADIENT_FREE,
  Array,
  Bound,
  Schedule,
  Score,
  Signals,
  Update,
  elementwise,
  gradient_free,
  says,
  takes_best,
)

__all__ = ['below_zero', 'drop_and_grow', 'prune_to', 'ranked_by', 'reselect', 'swap']


@takes_best
@gradient_free
@elementwise
def reselect(mask: Array, scores: Array, select: Callable[..., Array], w: Array, signals: Signals) -> Array:
  """Returns the mask of the best of all weights. A pruned weight returns as soon as its score is high enough."""
  return select(scores)


@takes_best
@gradient_free
@elementwise
def prune_to(mask: Array, scores: Array, select: Callable[..., Array], w: Array, signals: Signals) -> Array:
  """Returns the mask of the best of the kept weights. A pruned weight stays pruned unless the count needs it."""
  return select(kept_first(mask, scores))


@checked
def below_zero(until: int | None = None) -> Update:
  """Returns the update that prunes the entries whose score is below zero. A pruned entry stays pruned.

  The best of the count are kept whatever their scores, so that the count is the least that is kept. NaN is kept. From
  step `until` on all others are pruned whatever their scores, so that the count is reached.
  """
  return Bound(_below_zero, (until,), (GRADIENT_FREE, ELEMENTWISE))


def _below_zero(mask: Array, scores: Array, select: Callable[..., Array], w: Array, signals: Signals,
                until: int | None) -> Array:
  spared = ~(scores < 0) if until is None else ~(scores < 0) & (signals.step < until)
  return mask & (spared | select(kept_first(mask, scores)))


def kept_first(mask: Array, scores: Array) -> Array:
  """Returns scores that rank every pruned weight last; a kept NaN or -inf still ranks before all pruned weights."""
  return where_kept(mask, bounded(scores), -jnp.inf)


def bounded(scores: Array) -> Array:
  """Returns the scores in `float32`, NaN as the least, clipped so that the sum over any unit is finite."""
  most, scores = jnp.finfo(jnp.float32).max / (2 * max(scores.size, 1)), scores.astype(jnp.float32)
  return where_kept(scores == scores, lax.clamp(-most, scores, most), -most)


def ranked_by(update: Update, mask: Array, scores: Array, w: Array, signals: Signals) -> Array:
  """Returns the scores that `update` first hands to `select`: leaves that compete for a count are compared by them.

  `reselect` hands on the scores themselves, `prune_to` ranks every pruned weight last. Raises `ValueError` for an
  update that calls `select` inside of `lax.cond` or a loop, where the scores do not leave the branch.
  """
  handed, here = [], core.get_opaque_trace_state(convention='flax')

  def select(scores: Array, drop: Array | None = None) -> Array:
    if core.get_opaque_trace_state(convention='flax') != here:
      raise ValueError('sparsejax: leaves are ranked together by the scores that the update hands to `select`, and '
                       'this update calls it inside of lax.cond or a loop. Call it outside, with jnp.where on the '
                       'scores, or use allocation=allocation.uniform.')
    handed.append(scores)
    return mask

  update(mask, scores, select, w, signals)
  return handed[0] if handed else scores


@checked
def drop_and_grow(grow: Score, fraction: Schedule) -> Update:
  """Returns an update that drops `fraction(step)` of the kept weights by `scores` and grows as many by `grow`.

  Evci et al. 2020, algorithm 1; with `scores.random` as `grow`, Mocanu et al. 2018, section 2. The number of dropped
  weights is rounded down, and the count is the same at every step. Weights that were just dropped are candidates, and
  keep their value if they return. The authors' code ranks all weights when it drops, with noise of 1e-5, so an inactive
  weight may be revived with its old value. This update ranks kept weights only. Where the pattern has units, whole
  units are dropped and grown. With N:M, survivors are chosen over the layer, and each group is filled up to N.
  """
  def update(mask, scores, select, w, signals):
    survivors = select(kept_first(mask, scores), fraction(signals.step)) & mask
    return select(jnp.where(survivors, jnp.inf, bounded(grow(w, signals))))

  own = elementwise(update) if says(grow, ELEMENTWISE) else update
  return gradient_free(own) if says(grow, GRADIENT_FREE) else own


@checked
def swap(fraction: Schedule) -> Update:
  """Returns an update that makes at most `fraction(step)`, rounded up, of the changes that `select` would make.

  The update is the short restriction of Zhang et al. 2023, Lottery Jackpots Exist in Pre-trained Models, section 3.3.
  The best of the pruned weights that `select` would keep replace the worst of the kept weights that it would prune.
  Counts hold for each layer, so the pattern has to be unstructured. The released code changes nothing where scores tie
  at the border; here ties keep the lower index.
  """
  def update(mask, scores, select, w, signals):
    layers, part = signals.axes.layer if signals.axes else (), jnp.asarray(fraction(signals.step), jnp.float32)
    return counts.by_layer(lambda *each: _swapped(*each, part), layers, [mask, select(scores), scores])

  return gradient_free(elementwise(update))


def _swapped(mask: Array, new: Array, scores: Array, fraction: Array) -> Array:
  """Returns `mask` with the given fraction of the changes to `new`, the best weights in and the worst weights out."""
  come, go = new & ~mask, mask & ~new
  changes, scores = jnp.sum(come, dtype=jnp.int32), bounded(scores)  # NaN would rank last in either direction
  most = jnp.ceil(fraction * changes.astype(jnp.float32)).astype(jnp.int32)
  taken = ranking.top_n(jnp.where(come, scores, -jnp.inf), most) & come
  left = ranking.top_n(jnp.where(go, -scores, -jnp.inf), most) & go
  return (mask | taken) & ~left


def shared_out(total: Array, weights: Array, room: Array) -> Array:
  """Returns `total` shared out in the ratio of `weights`, each part at most its `room`: `int32`, with the sum `total`.

  The excess over a part's room, and the rest that rounding down leaves, go to the parts that still have room, the
  largest weights first. The caller ensures that `total` fits into the room of all parts together; nothing is raised
  otherwise.
  """
  weights = jnp.maximum(bounded(weights), 0)

  def share(_, given):
    open_, missing = jnp.where(given < room, weights, 0), total - jnp.sum(given)
    part = open_ / jnp.maximum(jnp.sum(open_), jnp.finfo(jnp.float32).tiny)
    more = jnp.minimum(jnp.floor(part * missing.astype(jnp.float32)).astype(jnp.int32), room - given)
    return given + jnp.clip(missing - (jnp.cumsum(more) - more), 0, more)  # above 2^24 a float32 product rounds up, too

  given = jax.lax.fori_loop(0, weights.size, share, jnp.zeros_like(room))
  order = jnp.argsort(-weights, stable=True)
  left = (room - given)[order]
  before = jnp.cumsum(left) - left
  extra = jnp.clip(total - jnp.sum(given) - before, 0, left)
  return given.at[order].add(extra)
