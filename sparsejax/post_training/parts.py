"""Chooses the mask of a matrix part by part, a part being a few neighbouring inputs, with the exact count of the whole.

    told = shares(mask, choose, block=128)            # how many units each part keeps, or `None` for N:M
    own = best_of_part(choose, scores, among, told[0])      # the mask of the first part of a matrix
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax import counts, ranking
from sparsejax.post_training.recipe import STACKED, Chooser
from sparsejax.types import Array


def divides(choose: Chooser, length: int) -> bool:
  """Returns whether masks can be chosen by parts: whether no unit of the pattern reaches over all `length` inputs."""
  own = counts.units(choose.pattern, (1, _rows(choose), choose.group), STACKED)[1]
  return own == counts.units(choose.pattern, (1, _rows(choose), length), STACKED)[1]


def _rows(choose: Chooser) -> int:
  return choose.pattern.group[1]


def shares(mask: Array, choose: Chooser, block: int) -> np.ndarray | None:
  """Returns how many units each part of `block` inputs keeps, `int32[L, parts, ...]`, or `None` if groups say it.

  The numbers of a stack add up to the count of the pattern. A part keeps units in proportion to those that `mask`
  leaves it, and all of these if the mask is as sparse as asked. Further axes are the outputs of balanced patterns.
  """
  if getattr(choose.pattern, 'fixed', False):
    return None
  there = np.stack([_units(mask[..., start:start + block], choose) for start in range(0, mask.shape[2], block)], 1)
  length, rows = mask.shape[2], mask.shape[1]
  shared = counts.competes(choose.pattern, (1, rows, length), STACKED)  # units of all rows and groups share one count
  together = there.reshape(-1, choose.groups * there.shape[1], *there.shape[2:]) if shared else there
  size = counts.units(choose.pattern, (1, rows * (choose.groups if shared else 1), length), STACKED)[0]
  sparsity = choose.asked
  kept = counts.kept_of(sparsity, size)
  upto = np.cumsum(together, 1)
  all_of_them = np.maximum(upto[:, -1:], 1)
  ends = np.rint(np.minimum(kept / all_of_them, 1) * upto).astype(np.int64)
  return np.diff(ends, axis=1, prepend=0).reshape(there.shape).astype(np.int32)


def _units(mask: Array, choose: Chooser) -> np.ndarray:
  """Returns how many units of one part are in `mask`, at least in part, `[L, ...]`."""
  pool = choose.pattern.pooled(mask.astype(jnp.float32), STACKED)
  others = tuple(a for a in range(pool.scores.ndim) if a not in pool.layers)
  return np.asarray(jnp.sum(pool.scores > 0, others), np.int64)


def best_of_part(choose: Chooser, scores: Array, among: Array, told: Any) -> Array:
  """Returns the mask of the best weights of one part of one matrix; all arrays are `[C, R]`, inputs first.

  `told`: the numbers of units that the part keeps, as `shares` has them, or `None`.
  """
  count = None if told is None else ranking.Count(jnp.zeros_like(told)[None], told[None])
  ranked = jnp.where(among, scores, jnp.nan).T[None]
  return choose.pattern(ranked, count, STACKED)[0].T & among
