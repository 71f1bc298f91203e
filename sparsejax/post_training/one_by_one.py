"""Removes, or rounds, the weights of a row one by one, each with the best compensation by all weights that are left.

All arrays here are one matrix: weights are `[R, K]`, R outputs by K inputs. Rows do not depend on each other, so that
the cost is linear in R. A row costs K^3 operations and holds a copy of the inverse Hessian, `[K, K]`.

    removal = removals(w, kept, inverse)              # in which order, and at which loss
    w = best_weights(w, mask, hessian)                # the weights of a mask, by least squares
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array


class Removals(NamedTuple):
  """A `Removals` says in which order the units of each row are removed. A unit is `width` neighbouring weights.

  `losses`: `[R, steps]`, by how much half of `(w - dense) H (w - dense)^T` rises at each step, `-inf` for units that
  were pruned before. `step`: `int32[R, units]`, the step at which a unit is removed; the number of steps if never.
  """

  losses: Array
  step: Array


def removals(w: Array, kept: Array, inverse: Array, *, width: int = 1, group: tuple[int, int] | None = None,
             rows: int = 32) -> Removals:
  """Returns the greedy order in which the units of each row of `w` are removed: OBC (Frantar et al. 2022, algorithm 1).

  Each step removes the unit whose removal costs least, `w_B [H^-1]_BB^-1 w_B / 2`, and compensates. Ties go to the
  lower index. Weights that are not `kept` go first. With `group`, (n, m), at least n of each m neighbours stay.
  `inverse` is the inverse Hessian, `[K, K]`. `rows`: how many rows are computed at a time.
  """
  units = w.shape[1] // width
  steps = units if group is None else units // group[1] * (group[1] - group[0])

  def one(row):
    weights, own = row
    there = jnp.any(own.reshape(units, width), 1)

    def remove(i, state):
      weights, inverse, left, losses, step = state
      score = jnp.where(there, _losses(weights, inverse, left, width), -jnp.inf)
      unit = jnp.argmin(jnp.where(_may_go(left, group), score, jnp.inf))
      weights, inverse = _removed(weights, inverse, unit * width, width)
      return weights, inverse, left.at[unit].set(False), losses.at[i].set(score[unit] / 2), step.at[unit].set(i)

    state = weights, inverse, jnp.ones(units, bool), jnp.zeros(steps, w.dtype), jnp.full(units, steps, jnp.int32)
    return Removals(*lax.fori_loop(0, steps, remove, state)[3:])

  return lax.map(one, (jnp.where(kept, w, 0), kept), batch_size=min(rows, len(w)))


def _may_go(left: Array, group: tuple[int, int] | None) -> Array:
  """Returns which units are left and in a group (n, m) that has more than n of them left."""
  if group is None:
    return left
  spare = jnp.sum(left.reshape(-1, group[1]), 1) > group[0]
  return left & jnp.repeat(spare, group[1], total_repeat_length=len(left))


def _losses(w: Array, inverse: Array, left: Array, width: int) -> Array:
  """Returns `w_B [H^-1]_BB^-1 w_B` of each unit that is left, `[units]`, below infinity."""
  if width == 1:
    losses = jnp.square(w) / _positive(jnp.where(left, jnp.diagonal(inverse), 1))
  else:
    parts, units = w.reshape(-1, width), jnp.arange(len(left))
    tiles = inverse.reshape(len(left), width, len(left), width)[units, :, units]
    tiles = jnp.where(left[:, None, None], tiles, jnp.eye(width, dtype=w.dtype))
    losses = jnp.sum(parts * jnp.linalg.solve(tiles, parts[..., None])[..., 0], 1)
  return jnp.minimum(losses, jnp.finfo(w.dtype).max)


def _removed(w: Array, inverse: Array, start: Any, width: int) -> tuple[Array, Array]:
  """Returns the weights and the inverse Hessian after the `width` weights from `start` on are removed."""
  across = lax.dynamic_slice_in_dim(inverse, start, width, 0)
  tile, part = (lax.dynamic_slice_in_dim(x, start, width, x.ndim - 1) for x in (across, w))
  if width == 1:
    scaled = across / _positive(tile)
  else:
    scaled = jnp.linalg.solve(tile, across)
  w = lax.dynamic_update_slice_in_dim(w - part @ scaled, jnp.zeros_like(part), start, 0)
  return w, inverse - jnp.sum(across[:, :, None] * scaled[:, None], 0)


def _positive(x: Array) -> Array:
  return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def best_weights(w: Array, mask: Array, hessian: Array, *, rows: int = 32) -> Array:
  """Returns the weights on `mask` that minimise `(v - w) H (v - w)^T`, row by row: least squares given the mask."""
  target = jnp.matmul(w, hessian, precision=lax.Precision.HIGHEST)
  return lax.map(lambda row: _solved(hessian, *row), (target, mask), batch_size=min(rows, len(w)))


def _solved(hessian: Array, target: Array, mask: Array) -> Array:
  factor = lax.linalg.cholesky(_restricted(hessian, mask), symmetrize_input=False)
  half = lax.linalg.triangular_solve(factor, jnp.where(mask, target, 0)[:, None], left_side=True, lower=True)
  return jnp.where(mask, _backward(factor, half)[:, 0], 0)


def _backward(factor: Array, half: Array) -> Array:
  return lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)


def _restricted(hessian: Array, mask: Array) -> Array:
  """Returns the Hessian of the weights in `mask`, with the identity in the place of all other weights."""
  return jnp.where(mask[:, None] & mask[None], hessian, 0) + jnp.diag((~mask).astype(hessian.dtype))


def roundings(w: Array, mask: Array, hessian: Array, grid: tuple[Array, Array], rounded: Callable[..., Array], *,
              rows: int = 32) -> Array:
  """Returns the weights after those in `mask` are rounded one by one: OBQ (Frantar et al. 2022, section 5).

  `grid`: the step of the grid of each row, `[R]`, and what else `rounded(w, grid)` reads to round a row `[K]`. The next
  weight is that of the least `(w - rounded)^2 / [H^-1]_jj`. Weights may lie outside of the grid after compensation: the
  one with the largest error is then next, as in the authors' code.
  """
  def one(row):
    weights, own, grid = row
    inverse = _inverse(_restricted(hessian, own))

    def settle(_, state):
      weights, inverse, left = state
      closest = rounded(weights, grid)
      errors = jnp.where(left, weights - closest, 0)
      losses = jnp.where(left, jnp.square(errors) / _positive(jnp.diagonal(inverse)), jnp.inf)
      outside = jnp.any(jnp.abs(errors) > grid[0] / 2 * (1 + 1e-5))
      j = jnp.where(outside, jnp.argmax(jnp.abs(errors)), jnp.argmin(losses))
      across = jnp.where(left[j], inverse[j] / _positive(inverse[j, j]), 0)
      moved = (weights - errors[j] * across).at[j].set(jnp.where(left[j], closest[j], weights[j]))
      return jnp.where(own, moved, 0), inverse - jnp.outer(inverse[j], across), left.at[j].set(False)

    return lax.fori_loop(0, len(weights), settle, (weights, inverse, own))[0]

  return lax.map(one, (jnp.where(mask, w, 0), mask, grid), batch_size=min(rows, len(w)))


def _inverse(hessian: Array) -> Array:
  factor = lax.linalg.cholesky(hessian, symmetrize_input=False)
  identity = jnp.eye(len(hessian), dtype=hessian.dtype)
  return _backward(factor, lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True))
