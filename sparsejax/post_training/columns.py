"""Prunes a matrix column by column and spreads the error of each column on the columns behind it: SparseGPT's sweep.

All arrays here are one matrix. Weights are `[R, K]`, R outputs by K inputs, and blocks of columns are `[width, R]`.

    w, mask = swept(w, factor.reversed, Sweep(block=128, group=128, choose=choose))
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array

HIGHEST = lax.Precision.HIGHEST  # a GPU would multiply in TF32, and a TPU in bfloat16
_WIDE = 512  # columns on which errors are spread by one product


class Sweep(NamedTuple):
  """A `Sweep` says what is chosen where, and how kept weights are rounded, while a matrix is pruned by columns.

  `block`: how many columns are compensated before the columns behind them are. `group`: how many columns are chosen
  together, from their compensated weights: all of the block, or the m of N:M. `choose(scores, start)` returns the mask
  for the scores `[columns, R]` of the columns from `start` on. `rounded(w)` returns kept weights `[R]` as they are
  stored.
  """

  block: int
  group: int
  choose: Callable[[Array, Any], Array]
  rounded: Callable[[Array], Array] = lambda w: w


def swept(w: Array, reversed: Array, sweep: Sweep) -> tuple[Array, Array]:
  """Returns the pruned and compensated weights and their mask, `[R, K]`; `reversed` is that of an `InverseFactor`."""
  length, block = w.shape[1], min(sweep.block, w.shape[1])
  (blocks, rest), wide = divmod(length, block), min(_WIDE, length)

  def one(i, state, width=block):
    w, mask = state
    start = i * block
    part, kept, errors = _block(_columns(w, start, width), _upper(reversed, start, start, (width, width)), sweep, start)
    w, mask = _put(w, part, start), _put(mask, kept, start)
    spread = functools.partial(_spread, reversed=reversed, errors=errors.T, start=start)
    return lax.fori_loop((start + width) // wide, -(-length // wide), lambda j, w: spread(w, j, wide), w), mask

  state = lax.fori_loop(0, blocks, one, (w, jnp.zeros(w.shape, bool)))
  return one(blocks, state, rest) if rest else state


def _block(part: Array, upper: Array, sweep: Sweep, first: Any) -> tuple[Array, Array, Array]:
  """Returns the weights, the mask and the errors of one block of columns, `[width, R]`."""
  width = len(part)
  late = sweep.group < sweep.block  # groups are chosen when the columns before them are compensated
  step = sweep.group if late else _step(width)
  mask = jnp.zeros(part.shape, bool) if late else sweep.choose(_scores(part, upper), first)

  def one(i, state):
    part, mask, errors = state
    start = i * step
    few, own = _rows(part, start, step), _tile(upper, start, start, (step, step))
    kept = sweep.choose(_scores(few, own), first + start) if late else _rows(mask, start, step)
    few, found = _few(few, own, kept, sweep.rounded)
    behind = jnp.where((jnp.arange(width) >= start + step)[None], _tile(upper, start, 0, (step, width)), 0)
    part = _fill(part - jnp.matmul(behind.T, found, precision=HIGHEST), few, start)
    return part, _fill(mask, kept, start), _fill(errors, found, start)

  return lax.fori_loop(0, width // step, one, (part, mask, jnp.zeros_like(part)))


def _few(part: Array, upper: Array, mask: Array, rounded: Callable[[Array], Array]) -> tuple[Array, Array]:
  """Returns the weights and the errors of a few columns, `[width, R]`, one column after the other."""
  place = jnp.arange(len(part))

  def one(i, state):
    part, errors = state
    kept, row = jnp.where(mask[i], rounded(part[i]), 0), upper[i]
    error = (part[i] - kept) / row[i]
    part = part - jnp.where(place > i, row, 0)[:, None] * error[None]
    return part.at[i].set(kept), errors.at[i].set(error)

  return lax.fori_loop(0, len(part), one, (part, jnp.zeros_like(part)))


def _scores(w: Array, upper: Array) -> Array:
  """Returns `w^2 / U_jj^2`, the loss of removing a weight while all columns behind it may compensate.

  `U_jj^2` is a diagonal entry of the inverse of the Hessian of the columns from j on: the square is no mistake. The
  formula of OBS, `w^2 / [H^-1]_jj`, is about the columns that are not settled yet.
  """
  return jnp.square(w / jnp.diagonal(upper)[:, None])


def _spread(w: Array, part: Any, wide: int, *, reversed: Array, errors: Array, start: Any) -> Array:
  """Returns `w` after the errors `[R, width]` of the block at `start` are spread on a part of the columns behind it."""
  first = jnp.minimum(part * wide, w.shape[1] - wide)  # the last part may begin in the one before it
  place = first + jnp.arange(wide)
  behind = (place >= start + errors.shape[1]) & (place >= part * wide)
  across = jnp.where(behind[None], _upper(reversed, start, first, (errors.shape[1], wide)), 0)
  own = lax.dynamic_slice_in_dim(w, first, wide, 1) - jnp.matmul(errors, across, precision=HIGHEST)
  return lax.dynamic_update_slice_in_dim(w, own, first, 1)


def _step(width: int) -> int:
  """Returns the largest divisor of `width` up to 16: the columns of a step stay in the cache."""
  return max(step for step in range(1, min(width, 16) + 1) if width % step == 0)


def _columns(w: Array, start: Any, width: int) -> Array:
  """Returns the columns of `w` from `start` on, `[width, R]`."""
  return lax.dynamic_slice_in_dim(w, start, width, 1).T


def _put(w: Array, columns: Array, start: Any) -> Array:
  return lax.dynamic_update_slice_in_dim(w, columns.T, start, 1)


def _upper(reversed: Array, row: Any, column: Any, shape: tuple[int, int]) -> Array:
  """Returns a tile of the upper factor, of which only the reversed one is in memory."""
  start = [len(reversed) - at - size for at, size in zip((row, column), shape)]
  return lax.dynamic_slice(reversed, start, shape)[::-1, ::-1]


def _rows(w: Array, start: Any, width: int) -> Array:
  return lax.dynamic_slice_in_dim(w, start, width, 0)


def _tile(w: Array, row: Any, column: Any, shape: tuple[int, int]) -> Array:
  return lax.dynamic_slice(w, (row, column), shape)


def _fill(w: Array, rows: Array, start: Any) -> Array:
  return lax.dynamic_update_slice_in_dim(w, rows, start, 0)
