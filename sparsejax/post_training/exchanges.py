"""Exchanges kept and pruned weights of a row so that the mean of its output changes less: DSnoT (Zhang et al. 2023).

All arrays here are one matrix, `[R, K]`, R outputs by K inputs. No weight changes its value.

    mask = exchanged(w, mask, values, InputMoments(mean, variance), cycles=50)
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array


class InputMoments(NamedTuple):
  """An `InputMoments` holds the mean and the variance of each input over the calibration rows, `[K]`.

  DSnoT takes the variance within each batch, averaged over batches by their rows.
  """

  mean: Array
  variance: Array


class _Rows(NamedTuple):
  """A `_Rows` holds all rows during the exchange.

  `error`, `[R]`: how far the mean output is off. `done`, `[R]`: whether a row is finished. `grown` and `pruned`,
  `[R, 2]`: how many candidates were taken so far, with a positive term in column 0 and a negative term in column 1.
  """

  mask: Array
  error: Array
  done: Array
  grown: Array
  pruned: Array


def exchanged(w: Array, mask: Array, scores: Array, inputs: InputMoments, *, cycles: int, threshold: float, guard: bool,
              power: float, group: int | None = None) -> Array:
  """Returns the mask after up to `cycles` exchanges in each row, each of one pruned for one kept weight.

  The terms of a row are `w_j mean_j`, and its error is the sum of the terms of pruned weights. An exchange grows the
  pruned weight with the largest `term / variance^power` of the sign of the error. The exchange prunes the kept weight
  of the other sign with the lowest of `scores`. With `group`, the exchange prunes the lowest score in the group of the
  grown weight. A row is done when its error is at most `threshold` or when it has no candidate. With `guard`, a row is
  also done when the exchange would change the sign of its error. Ties go to the lower index.
  """
  terms = w * inputs.mean[None]
  saliency = terms / jnp.maximum(inputs.variance, jnp.finfo(w.dtype).tiny)[None]**power
  signs = jnp.stack([terms > 0, terms < 0], 1)  # [R, 2, K]
  growable, prunable = signs & ~mask[:, None], signs & mask[:, None]
  grow = _ordered(jnp.where(growable, -jnp.abs(saliency)[:, None], jnp.inf))
  prune = _ordered(jnp.where(prunable, scores[:, None], jnp.inf))
  limits = jnp.sum(growable, 2), jnp.sum(prunable, 2)
  rows, start = jnp.arange(len(w)), jnp.sum(jnp.where(mask, 0, terms), 1)

  def cycle(_, state):
    side = (state.error < 0).astype(jnp.int32)
    j = grow[rows, side, jnp.minimum(state.grown[rows, side], w.shape[1] - 1)]
    there = state.grown[rows, side] < limits[0][rows, side]
    if group is None:
      i = prune[rows, 1 - side, jnp.minimum(state.pruned[rows, 1 - side], w.shape[1] - 1)]
      there &= state.pruned[rows, 1 - side] < limits[1][rows, 1 - side]
    else:
      i, kept = _least_of_group(scores, state.mask & mask, j, group)
      there &= kept
    error = state.error - terms[rows, j] + terms[rows, i]
    takes = ~state.done & there & (jnp.abs(state.error) > threshold)
    if guard:
      takes &= jnp.sign(error) == jnp.sign(start)
    grown = state.grown.at[rows, side].add(takes.astype(jnp.int32))
    pruned = state.pruned.at[rows, 1 - side].add(takes.astype(jnp.int32))
    mask_ = state.mask.at[rows, j].set(jnp.where(takes, True, state.mask[rows, j]))
    mask_ = mask_.at[rows, i].set(jnp.where(takes, False, mask_[rows, i]))
    return _Rows(mask_, jnp.where(takes, error, state.error), ~takes, grown, pruned)

  none = jnp.zeros((len(w), 2), jnp.int32)
  return lax.fori_loop(0, cycles, cycle, _Rows(mask, start, start != start, none, none)).mask


def _ordered(values: Array) -> Array:
  return jnp.argsort(values, 2, stable=True)


def _least_of_group(scores: Array, kept: Array, j: Array, group: int) -> tuple[Array, Array]:
  """Returns the kept weight with the lowest score in the group of weight `j` of each row, and whether there is one."""
  places = (j // group * group)[:, None] + jnp.arange(group)[None]
  own = jnp.where(jnp.take_along_axis(kept, places, 1), jnp.take_along_axis(scores, places, 1), jnp.inf)
  least = jnp.argmin(own, 1)
  return jnp.take_along_axis(places, least[:, None], 1)[:, 0], jnp.isfinite(jnp.min(own, 1))
