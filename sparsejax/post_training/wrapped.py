"""Writes a matrix as a 2:4 core between two block-diagonal matrices: ARMOR.

    found = factorised(w, statistic.square / statistic.rows[:, None], key=jax.random.key(0))     # of one matrix [R, K]
    dense = product(found.left, found.core, found.right)         # close to `w`, and without zeros

The product is dense, so that no leaf can hold it as zeros: a program multiplies by the three factors in turn. Their
overhead is `block / R + block / K` of the dense weights.
"""

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from sparsejax import arguments
from sparsejax.patterns import NM
from sparsejax.types import Array, Axes

GROUP, KEPT = 4, 2
PAIRS = np.array(list(itertools.combinations(range(GROUP), KEPT)))  # the masks of a group
_ROWS = Axes((1,), (0,), source='given')
_RIDGE = 1e-9, 1e-8  # the authors' constants of the small linear systems


class WrappedFit(NamedTuple):
  """A `WrappedFit` is a matrix `[R, K]` as a product of three: `left @ core @ right`, the outer two block-diagonal.

  `left`: `[R / b, b, b]`. `core`: `[R, K]`, 2:4 along K. `right`: `[K / b, b, b]`. `loss`: the weighted squared error
  over the weighted squared norm, both of the normalised matrix. `start`: the loss of the best 2:4 core alone.
  """

  left: Array
  core: Array
  right: Array
  loss: Array
  start: Array


def product(left: Array, core: Array, right: Array) -> Array:
  """Returns the dense matrix `[R, K]` of the three factors."""
  (rows, b, _), (columns, c, _) = left.shape, right.shape
  return jnp.einsum('iab,ibkc,kcd->iakd', left, core.reshape(rows, b, columns, c), right,
                    precision=lax.Precision.HIGHEST).reshape(core.shape)


def loss(w: Array, square: Array, left: Array, core: Array, right: Array) -> Array:
  """Returns the sum of `square_j (w - left core right)_ij^2` over that of `square_j w_ij^2`."""
  off = w - product(left, core, right)
  energy = lambda each: jnp.sum(square[None] * jnp.square(each))
  return energy(off) / jnp.maximum(energy(w), jnp.finfo(w.dtype).tiny)


def factorised(w: Array, square: Array, *, key: Array, block: int = 32, iterations: int = 3000, patience: int = 100,
               learning_rate: float = 1e-4) -> WrappedFit:
  """Returns the factors of one matrix `[R, K]`: ARMOR (Liu et al. 2025), for inputs with mean squares `square` `[K]`.

  Columns and then rows are normalised. The start is the 2:4 core that is best alone. Each iteration takes one Adam step
  on all three factors. The iteration then chooses one group of four in each block of the core anew, by least squares.
  `key` draws the group, in proportion to the gradient. The loop ends after `iterations`, or after `patience` of them
  without progress.

  Deviation: the factors with the least loss are returned, so that the loss is never above that of the start. The
  authors' code returns the last ones, which may be worse. Raises `ValueError` unless `block` divides both axes.
  """
  if jnp.ndim(w) != 2 or square.shape != w.shape[1:] or block % GROUP or any(size % block for size in w.shape):
    raise ValueError(f'post_training.wrapped: a matrix {w.shape} with mean squares {square.shape} and block={block}; '
                     f'give [R, K] and [K], and a block that divides both and is a multiple of {GROUP}.')
  learning_rate = arguments.verified('post_training.wrapped', 'learning_rate', learning_rate)
  with jax.numpy_dtype_promotion('standard'):  # Adam counts its steps in int32
    return _factorised(w.astype(jnp.float32), square, key, learning_rate, (block, iterations, patience))


@functools.partial(jax.jit, static_argnums=4)
def _factorised(w: Array, square: Array, key: Array, rate: Any, sizes: tuple[int, int, int]) -> WrappedFit:
  block, iterations, patience = sizes
  columns, rows = _norms(w)
  w = w / columns[None] / rows[:, None]
  core = jnp.where(NM(KEPT, GROUP)(jnp.square(w) * square[None], None, _ROWS), w, 0)
  eyes = [jnp.broadcast_to(jnp.eye(block), (size // block, block, block)) for size in w.shape]
  first, adam = (eyes[0], core, eyes[1]), optax.adam(rate)
  start = loss(w, square, *first)

  def step(state: Any) -> Any:
    i, since, factors, moments, best, least = state
    mask = factors[1] != 0
    slope = jax.grad(lambda each: loss(w, square, *each))(factors)
    update, moments = adam.update((slope[0], jnp.where(mask, slope[1], 0), slope[2]), moments)
    # The mask stops Adam's moments, which would move a pruned weight of the core although its gradient is zero.
    factors = optax.apply_updates(factors, (update[0], jnp.where(mask, update[1], 0), update[2]))
    factors = factors[0], _chosen_anew(w, square, factors, slope[1], jax.random.fold_in(key, i)), factors[2]
    now = loss(w, square, *factors)
    better = now < least
    best = jax.tree.map(lambda new, old: jnp.where(better, new, old), factors, best)
    since = jnp.where(now < least * (1 - 1e-6), 0, since + 1)
    return i + 1, since, factors, moments, best, jnp.minimum(now, least)

  going = lambda state: (state[0] < iterations) & (state[1] < patience)
  *_, (left, core, right), least = lax.while_loop(going, step, (0, 0, first, adam.init(first), first, start))
  left = left * rows.reshape(-1, block, 1)  # undoes the normalisation
  return WrappedFit(left, core, right * columns.reshape(-1, 1, block), least, start)


def _norms(w: Array) -> tuple[Array, Array]:
  """Returns the norms of the columns, and those of the rows after the columns are normalised; 1 instead of 0."""
  one = lambda norm: jnp.where(norm == 0, 1, norm)
  columns = one(jnp.linalg.norm(w, axis=0))
  return columns, one(jnp.linalg.norm(w / columns[None], axis=1))


def _chosen_anew(w: Array, square: Array, factors: tuple[Array, Array, Array], slope: Array, key: Array) -> Array:
  """Returns the core after one group of each block is chosen and fitted anew, drawn in proportion to `slope`."""
  left, core, right = factors
  tiles = functools.partial(_tiles, block=left.shape[1])
  weight = jnp.sum(jnp.abs(tiles(slope)).reshape(len(left), len(right), -1, GROUP), -1)
  drawn = jax.random.categorical(key, jnp.log(weight + jnp.finfo(w.dtype).tiny))
  groups = right.shape[1] // GROUP
  one = lambda w, root, a, s, b, at: refitted(w, root, a, s, b, at // groups, at % groups)
  across = jax.vmap(one, (0, 0, None, 0, 0, 0))
  root = jnp.sqrt(square).reshape(len(right), -1)
  new = jax.vmap(across, (0, None, 0, 0, None, 0))(tiles(w), root, left, tiles(core), right, drawn)
  return new.transpose(0, 2, 1, 3).reshape(core.shape)


def _tiles(w: Array, block: int) -> Array:
  """Returns the blocks `[R / b, K / b, b, b]` of a matrix."""
  return w.reshape(w.shape[0] // block, block, -1, block).transpose(0, 2, 1, 3)


def refitted(w: Array, root: Array, left: Array, core: Array, right: Array, row: Any, group: Any) -> Array:
  """Returns one block of the core with the best pair of weights in one group of one row, all else fixed.

  `w`, `core`: `[b, c]`. `left`: `[b, b]`. `right`: `[c, c]`. `root`: the roots of the mean squares, `[c]`. The best of
  the six pairs s minimises `|(left core right - w) root|^2`, of which s is a small least-squares problem.
  """
  dot = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)
  place = group * GROUP
  without = lax.dynamic_update_slice(core, jnp.zeros((1, GROUP), core.dtype), (row, place))
  rest = (dot(dot(left, without), right) - w) * root[None]
  column = lax.dynamic_index_in_dim(left, row, 1, keepdims=False)
  basis = lax.dynamic_slice_in_dim(right, place, GROUP, 0) * root[None]
  v, gram = dot(basis, dot(rest.T, column)), dot(basis, basis.T)

  def solved(pair: Array) -> tuple[Array, Array]:
    own = gram[pair][:, pair]
    half = jnp.linalg.solve(own + _RIDGE[0] * jnp.eye(KEPT), v[pair])
    return v[pair] @ half, -half / (column @ column + _RIDGE[1])

  gain, weights = jax.vmap(solved)(jnp.asarray(PAIRS))
  best = jnp.argmax(gain)
  fitted = jnp.zeros(GROUP, core.dtype).at[jnp.asarray(PAIRS)[best]].set(weights[best])
  return lax.dynamic_update_slice(without, fitted[None], (row, place))
