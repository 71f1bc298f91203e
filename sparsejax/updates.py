"""Updates: how a mask follows from the one before it.

An update is `update(mask, scores, select, w, signals) -> mask`, leafwise; `select(scores, drop=None) -> mask` is the
pattern with its count and axes filled in, so that whatever an update does, the pattern and the count are kept. `drop`
is a fraction of the count, rounded down, by which fewer are kept.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from sparsejax import ranking
from sparsejax.types import Array, Schedule, Score, Signals, Update


def reselect(mask: Array, scores: Array, select: Callable[..., Array], w: Array, signals: Signals) -> Array:
  """Forgets the mask: the best of all. A pruned weight returns as soon as its score is high enough."""
  del mask, w, signals
  return select(scores)


def prune_to(mask: Array, scores: Array, select: Callable[..., Array], w: Array, signals: Signals) -> Array:
  """The best of those still kept: what is pruned stays pruned, as long as the pattern does not ask for more."""
  del w, signals
  return select(kept_first(mask, scores))


def kept_first(mask: Array, scores: Array) -> Array:
  """Scores that rank everything pruned last; a kept NaN or -inf still goes before it is its turn."""
  return jnp.where(mask, bounded(scores), -jnp.inf)


def bounded(scores: Array) -> Array:
  """The scores in `float32`, NaN as the least, clipped so that no sum over a unit of them is as large as infinity."""
  most = jnp.finfo(jnp.float32).max / (2 * max(scores.size, 1))
  return jnp.clip(jnp.nan_to_num(scores.astype(jnp.float32), nan=-most), -most, most)


def drop_and_grow(grow: Score, fraction: Schedule) -> Update:
  """Drops `fraction(step)` of the kept, rounded down, by `scores`, and grows as many by `grow` (Evci et al. 2020).

  Algorithm 1 there; Mocanu et al. 2018, section 2, with `scores.random`. The count is the same at every step. Just
  dropped ones are candidates, and keep their value if they return. The authors' code ranks everything when it drops,
  with noise of 1e-5, so that an inactive weight may be revived with its old value; here only kept ones survive. Where
  the pattern has units, whole units are dropped and grown; with N:M survivors are chosen over the layer, and each
  group is filled up to N.
  """
  def update(mask, scores, select, w, signals):
    survivors = select(kept_first(mask, scores), fraction(signals.step)) & mask
    return select(jnp.where(survivors, jnp.inf, bounded(grow(w, signals))))

  return update


def swap(fraction: Schedule) -> Update:
  """Exchanges at most `fraction(step)`, rounded up, of what would change: the short restriction of lottery jackpots.

  Zhang et al. 2023, Lottery Jackpots Exist in Pre-trained Models, section 3.3: of the pruned weights that `select`
  would keep the best are taken in, for the worst of those that it would not. Counts per layer, so unstructured only.
  The released code changes nothing where scores tie at the border; here ties keep the lower index.
  """
  def exchanged(mask, new, scores, share):
    come, go = new & ~mask, mask & ~new
    changes, scores = jnp.sum(come, dtype=jnp.int32), bounded(scores)  # NaN would go last into either direction
    most = jnp.ceil(share * changes.astype(jnp.float32)).astype(jnp.int32)
    taken = ranking.top_n(jnp.where(come, scores, -jnp.inf), most) & come
    left = ranking.top_n(jnp.where(go, -scores, -jnp.inf), most) & go
    return (mask | taken) & ~left

  def update(mask, scores, select, w, signals):
    layers, each = signals.axes.layer if signals.axes else (), exchanged
    for _ in layers:
      each = jax.vmap(each, in_axes=(0, 0, 0, None))
    front = tuple(range(len(layers)))
    moved = [jnp.moveaxis(x, layers, front) for x in (mask, select(scores), scores)]
    return jnp.moveaxis(each(*moved, jnp.asarray(fraction(signals.step), jnp.float32)), front, layers)

  return update


def shared_out(total: Array, weights: Array, room: Array) -> Array:
  """`total`, shared out in the ratio of `weights`, none more than its `room`: `int32`, exactly `total` together.

  What does not fit, and what rounding down leaves, goes to those that still have room, the largest weights first.
  Raises nothing: the caller sees to it that `total` fits into all the room.
  """
  given, weights = jnp.zeros_like(room), jnp.maximum(bounded(weights), 0)
  for _ in range(weights.size):
    open_, missing = jnp.where(given < room, weights, 0), total - jnp.sum(given)
    part = open_ / jnp.maximum(jnp.sum(open_), jnp.finfo(jnp.float32).tiny)
    more = jnp.minimum(jnp.floor(part * missing.astype(jnp.float32)).astype(jnp.int32), room - given)
    given += jnp.clip(missing - (jnp.cumsum(more) - more), 0, more)  # above 2^24 a float32 rounds up, too
  order = jnp.argsort(-weights, stable=True)
  left = (room - given)[order]
  before = jnp.cumsum(left) - left
  extra = jnp.clip(total - jnp.sum(given) - before, 0, left)
  return given.at[order].add(extra)
