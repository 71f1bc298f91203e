"""Removes, or rounds, the weights of a row one by one, each with the best compensation by all weights that are left.

All arrays here are one matrix: weights are `[R, K]`, R outputs by K inputs. Rows do not depend on each other, so that
the cost is linear in R. A row costs about K^3 operations and holds a copy of the inverse Hessian, `[K, K]`.

Each step takes the row and the column of one weight out of the inverse. The steps of a block share one update of the
inverse, a product of matrices: until then, only the rows that the steps read are up to date.

    removal = removals(w, kept, inverse)              # in which order, and at which loss
    w = best_weights(w, mask, hessian)                # the weights of a mask, by least squares
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array

HIGHEST = lax.Precision.HIGHEST
_BLOCK = 32  # steps that share one update of the inverse
_STAGES = 4  # how often what is removed is cut out of the arrays of a row, in equal numbers of steps
_SMALL = 64  # rows with fewer units than this are not cut
_MOST = 1 << 26  # entries of the inverses that exist at a time: fewer rows are then computed at a time
_COPIES = 3.5  # of the inverses that exist at a time: XLA's programs on CPUs hold 2.1 to 3.4, the most for `roundings`


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

  def some(part: tuple[Array, Array]) -> Removals:
    weights, own = part
    there = jnp.any(own.reshape(-1, units, width), 2)
    return _removed(_remainder(weights, inverse, width), there, *(group or (0, units)))

  return _by_rows(some, rows, jnp.where(kept, w, 0), kept)


def _by_rows(function: Callable[[Any], Any], rows: int, *arrays: Array) -> Any:
  """Returns what `function` gives for at most `rows` rows of the arrays at a time; the first is `[R, K]`."""
  count, length = arrays[0].shape
  rows = _at_a_time(rows, count, length)
  parts = [jnp.pad(x, [(0, -count % rows), *[(0, 0)] * (x.ndim - 1)]).reshape(-1, rows, *x.shape[1:]) for x in arrays]
  return jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:])[:count], lax.map(function, tuple(parts)))


def _at_a_time(rows: int, count: int, length: int) -> int:
  return min(rows, count, max(1, _MOST // length**2))


def held(rows: int, shape: tuple[int, ...]) -> int:
  """Returns how many numbers `removals`, `best_weights` and `roundings` hold at most for weights `[..., R, K]`."""
  *_, count, length = shape
  return math.ceil(_COPIES * _at_a_time(rows, count, length) * length**2)


def _removed(rest: '_Remainder', there: Array, least: int, size: int) -> Removals:
  """Returns the removals of n rows in which at least `least` of each `size` neighbouring units stay.

  `there`: `bool[n, units]`, which units were not pruned before.
  """
  count, units = there.shape
  steps, stages = units // size * (size - least), _STAGES if units >= _SMALL else 1
  names = jnp.broadcast_to(jnp.arange(units)[None], there.shape)
  state = (rest, jnp.full((count, units // size), size - least), jnp.zeros((count, steps), rest.w.dtype),
           jnp.zeros((count, steps), jnp.int32))
  for stage in range(stages):
    start, end = (steps * (stage + i) // stages for i in (0, 1))
    if stage:
      left = jnp.argsort(~state[0].left, 1, stable=True)[:, :units - start]
      state = _cut(state[0], left), *state[1:]
      names, there = (_at(x, left) for x in (names, there))
    state = _blocks(state, start, end, _removing(names, there, size))
  place = jnp.arange(count)[:, None], state[3]
  return Removals(state[2], jnp.full((count, units), steps, jnp.int32).at[place].set(jnp.arange(steps)[None]))


class _Remainder(NamedTuple):
  """A `_Remainder` is n rows of weights of which some units are settled, and the inverse Hessians of all others.

  `w`: `[n, K]`. `inverse`: `[n, K, K]`, from before the present block. `taken`: `[n, width * steps of a block, K]`,
  what its steps have taken: the present inverse is `inverse - taken^T taken`. `tiles`: `[n, units, width, width]`, the
  diagonal of the present inverse. `left`: `bool[n, units]`.
  """

  w: Array
  inverse: Array
  taken: Array
  tiles: Array
  left: Array


def _remainder(w: Array, inverse: Array, width: int) -> _Remainder:
  """Returns n rows of which nothing is settled; `inverse` is that of each row, or one for all of them."""
  (count, size), units = w.shape, w.shape[1] // width
  inverse = jnp.broadcast_to(inverse if inverse.ndim == 3 else inverse[None], (count, size, size))
  tiles = inverse.reshape(count, units, width, units, width)[:, jnp.arange(units), :, jnp.arange(units)]
  none = jnp.zeros((count, min(_BLOCK, units) * width, size), w.dtype)
  return _Remainder(w, inverse, none, jnp.swapaxes(tiles, 0, 1), jnp.ones((count, units), bool))


def _cut(rest: _Remainder, units: Array) -> _Remainder:
  """Returns the rows with some of their units alone, `int32[n, units]`. The steps of the last block are done."""
  width, row = rest.tiles.shape[2], jnp.arange(len(units))[:, None]
  inputs = (units[:, :, None] * width + jnp.arange(width)[None, None]).reshape(len(units), -1)
  inverse = rest.inverse[row[..., None], inputs[:, :, None], inputs[:, None]]
  return _Remainder(rest.w[row, inputs], inverse, rest.taken[:, :, :inputs.shape[1]], rest.tiles[row, units],
                    rest.left[row, units])


def _blocks(state: Any, start: int, end: int, step: Callable[[Any, Any, Any], Any]) -> Any:
  """Returns the state after the steps from `start` to `end`. Its first member is a `_Remainder`.

  `step(state, i, slot)` takes step i, whose rows of `taken` begin at `slot`.
  """
  width = state[0].tiles.shape[2]
  size = state[0].taken.shape[1] // width

  def block(number: Any, state: Any) -> Any:
    first = start + number * size
    rest, *others = lax.fori_loop(0, jnp.minimum(size, end - first),
                                  lambda i, state: step(state, first + i, i * width), state)
    taken = jnp.einsum('nbi,nbj->nij', rest.taken, rest.taken, precision=HIGHEST)
    return rest._replace(inverse=rest.inverse - taken, taken=jnp.zeros_like(rest.taken)), *others

  return lax.fori_loop(0, -(-(end - start) // size), block, state)


def _removing(names: Array, there: Array, size: int) -> Callable[[Any, Any, Any], Any]:
  """Returns the step that removes the unit that costs least, of the groups of `size` units that may lose one.

  `names` are the numbers of the units in the whole row. The state counts how many units each group may lose.
  """
  groups = names // size

  def step(state: Any, i: Any, slot: Any) -> Any:
    rest, spare, losses, order = state
    score = jnp.where(there, _losses(rest), -jnp.inf)
    free = rest.left & (_at(spare, groups) > 0)
    unit = jnp.argmin(jnp.where(free, score, jnp.inf), 1)[:, None]
    put = lambda x, column: lax.dynamic_update_slice_in_dim(x, column.astype(x.dtype), i, 1)
    spare = spare - (jnp.arange(spare.shape[1])[None] == _at(groups, unit)).astype(spare.dtype)
    losses, order = put(losses, _at(score, unit) / 2), put(order, _at(names, unit))
    return _settled(rest, unit, slot, jnp.zeros_like(rest.w)), spare, losses, order

  return step


def _losses(rest: _Remainder) -> Array:
  """Returns `w_B [H^-1]_BB^-1 w_B` of each unit that is left, `[n, units]`, below infinity."""
  if rest.tiles.shape[2] == 1:
    losses = jnp.square(rest.w) / _positive(jnp.where(rest.left, rest.tiles[..., 0, 0], 1))
  else:
    parts = rest.w.reshape(*rest.left.shape, -1)
    tiles = jnp.where(rest.left[..., None, None], rest.tiles, jnp.eye(parts.shape[2], dtype=rest.w.dtype)[None, None])
    losses = jnp.sum(parts * jnp.linalg.solve(tiles, parts[..., None])[..., 0], 2)
  return jnp.minimum(losses, jnp.finfo(rest.w.dtype).max)


def _settled(rest: _Remainder, unit: Array, slot: Any, target: Array) -> _Remainder:
  """Returns the rows after one unit of each, `int32[n, 1]`, gets the weights that it has in `target`, `[n, K]`.

  All weights that are left compensate. Rows whose unit is settled already stay as they are.
  """
  width = rest.tiles.shape[2]
  inputs = unit * width + jnp.arange(width)[None]
  pick = lambda x: jnp.take_along_axis(x, inputs[:, None], 2)
  across = jnp.take_along_axis(rest.inverse, inputs[:, :, None], 1)
  across = across - jnp.einsum('nbw,nbk->nwk', pick(rest.taken), rest.taken, precision=HIGHEST)
  change = jnp.swapaxes(pick((rest.w - target)[:, None]), 1, 2)
  # With H^-1_BB = L L^T, the step takes (L^-1 across)^T (L^-1 across) from the inverse.
  taken, part = _whitened(pick(across), across, change)
  live = _at(rest.left, unit)
  taken = jnp.where(live[..., None], taken, 0)
  there = (jnp.arange(rest.left.shape[1])[None] == unit) & live
  w = jnp.where(jnp.repeat(there, width, 1), target, rest.w - jnp.sum(part * taken, 1))
  tall = taken.reshape(len(taken), width, -1, width)
  return _Remainder(w, rest.inverse, lax.dynamic_update_slice_in_dim(rest.taken, taken, slot, 1),
                    rest.tiles - jnp.sum(tall[..., :, None] * tall[..., None, :], 1), rest.left & ~there)


def _whitened(tile: Array, *arrays: Array) -> list[Array]:
  """Returns `L^-1 x` of each array, with `tile = L L^T`."""
  if tile.shape[1] == 1:
    return [x / jnp.sqrt(_positive(tile)) for x in arrays]
  factor = lax.linalg.cholesky(tile, symmetrize_input=False)
  return [lax.linalg.triangular_solve(factor, x, left_side=True, lower=True) for x in arrays]


def _positive(x: Array) -> Array:
  return jnp.maximum(x, jnp.finfo(x.dtype).tiny)


def best_weights(w: Array, mask: Array, hessian: Array, *, most: int | None = None, rows: int = 32) -> Array:
  """Returns the weights on `mask` that minimise `(v - w) H (v - w)^T`, row by row: least squares given the mask.

  `most`: no row of `mask` keeps more weights than this, so that smaller systems are solved.
  """
  def some(part: tuple[Array, Array]) -> Array:
    target, own = part
    place, own = _kept_first(own, most)
    found = jax.vmap(lambda *row: _solved(hessian, *row))(_at(target, place), own, place)
    return _back(found, own, place, w.shape[1])

  return _by_rows(some, rows, jnp.matmul(w, hessian, precision=HIGHEST), mask)


def _kept_first(mask: Array, most: int | None) -> tuple[Array, Array]:
  """Returns the places of the first `most` inputs of each row, kept ones first, and which of them are kept."""
  place = jnp.argsort(~mask, 1, stable=True)[:, :most]
  return place, _at(mask, place)


def _at(x: Array, place: Array) -> Array:
  return jnp.take_along_axis(x, place, 1)


def _back(found: Array, own: Array, place: Array, size: int) -> Array:
  """Returns what was found for some inputs of each row, and zeros for the others, `[n, size]`."""
  row = jnp.arange(len(found))[:, None]
  return jnp.zeros((len(found), size), found.dtype).at[row, place].set(jnp.where(own, found, 0))


def _solved(hessian: Array, target: Array, mask: Array, place: Array) -> Array:
  factor = lax.linalg.cholesky(_restricted(hessian, mask, place), symmetrize_input=False)
  half = lax.linalg.triangular_solve(factor, jnp.where(mask, target, 0)[:, None], left_side=True, lower=True)
  return _backward(factor, half)[:, 0]


def _backward(factor: Array, half: Array) -> Array:
  return lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)


def _restricted(hessian: Array, mask: Array, place: Array) -> Array:
  """Returns the Hessian of the inputs at `place`, with the identity for those that are not in `mask`."""
  own = hessian[place[:, None], place]
  return jnp.where(mask[:, None] & mask[None], own, 0) + jnp.diag((~mask).astype(hessian.dtype))


def roundings(w: Array, mask: Array, hessian: Array, grid: tuple[Array, Array], rounded: Callable[..., Array], *,
              most: int | None = None, rows: int = 32) -> Array:
  """Returns the weights after those in `mask` are rounded one by one: OBQ (Frantar et al. 2022, section 5).

  `grid`: the step of the grid of each row, `[R]`, and what else `rounded` reads, `[R]`. `rounded(w, grid)` gets some
  rows `[n, K]` and their part of the grid, `[n, 1]`. `most`: as in `best_weights`. The next weight is that of the least
  `(w - rounded)^2 / [H^-1]_jj`. Weights may lie outside of the grid after compensation: the one with the largest error
  is then next, as in the authors' code.
  """
  def some(part: Any) -> Array:
    weights, own, *grids = part
    place, own = _kept_first(own, most)
    inverse = jax.vmap(lambda *row: _inverse(_restricted(hessian, *row)))(own, place)
    rest = _remainder(_at(weights, place), inverse, 1)._replace(left=own)
    (rest,) = _blocks((rest,), 0, own.shape[1], _rounding([x[:, None] for x in grids], rounded))
    return _back(rest.w, own, place, weights.shape[1])

  return _by_rows(some, rows, jnp.where(mask, w, 0), mask, *grid)


def _rounding(grid: list[Array], rounded: Callable[..., Array]) -> Callable[[Any, Any, Any], Any]:
  """Returns the step that rounds the weight that costs least, or the one that is farthest outside of the grid."""
  def step(state: Any, i: Any, slot: Any) -> Any:
    del i
    (rest,) = state
    closest = rounded(rest.w, grid)
    errors = jnp.where(rest.left, rest.w - closest, 0)
    losses = jnp.where(rest.left, jnp.square(errors) / _positive(rest.tiles[..., 0, 0]), jnp.inf)
    outside = jnp.any(jnp.abs(errors) > grid[0] / 2 * (1 + 1e-5), 1)
    unit = jnp.where(outside, jnp.argmax(jnp.abs(errors), 1), jnp.argmin(losses, 1))[:, None]
    return (_settled(rest, unit, slot, closest),)

  return step


def _inverse(hessian: Array) -> Array:
  factor = lax.linalg.cholesky(hessian, symmetrize_input=False)
  identity = jnp.eye(len(hessian), dtype=hessian.dtype)
  return _backward(factor, lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True))
