"""Contains the smallest starts of some methods in plain JAX, with which the `init` of recipes is compared.

    tx = STARTS['random masks, by hand'](optax.adamw(1e-3))
    state = tx.init(params)

Each start has the masks of its method, by hand, for float32 matrices `[in, out]`, and the state of the optimizer.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from benchmarks.floor_masks import by_rows, largest, two_of_four
from benchmarks.floors import DECAY, SPARSITY, Step


def first_two_of_four(inner: optax.GradientTransformation) -> Step:
  """Returns only the `init` of a method with a master and 2:4 masks: copies, masks, and what `inner` keeps."""
  made = jax.jit(lambda params: jax.tree.map(lambda w: (w.copy(), two_of_four(jnp.abs(w))), params))
  return Step(lambda params: (made(params), inner.init(params)), _no_update)


def first_calls(inner: optax.GradientTransformation) -> Step:
  """Returns SR-STE with 2:4 for calls outside of `jit`: three programs, and `inner` as its user calls it."""
  sparse = lambda w: jnp.where(two_of_four(jnp.abs(w)), w, 0) if w.ndim == 2 else w
  pulled = lambda g, w, p: g + jnp.where(p == 0, DECAY * w, 0) if w.ndim == 2 else g
  zeroed = jax.jit(lambda master: jax.tree.map(sparse, master))
  refined = jax.jit(lambda *trees: jax.tree.map(pulled, *trees))
  moved = jax.jit(lambda master, moves: jax.tree.map(jnp.add, master, moves))

  def init(params):
    return zeroed(params), jax.tree.map(jnp.copy, params), inner.init(params)

  def update(grads, state, params, **extra):
    held, master, own = state
    moves, own = inner.update(refined(grads, master, params), own, master)
    master = moved(master, moves)
    return zeroed(master), (held, master, own)

  return Step(init, update)


def first_asp(inner: optax.GradientTransformation) -> Step:
  """Returns ASP with 2:4 for calls outside of `jit`: three programs, and `inner` as its user calls it."""
  return _kept(inner, lambda matrices: [two_of_four(jnp.abs(w)) for w in matrices])


def first_rigl(inner: optax.GradientTransformation) -> Step:
  """Returns RigL for calls outside of `jit` up to its first choice, with random masks of an exact count.

  The `init` draws a random number for each weight, for all matrices at once, and ranks the numbers.
  """
  def chosen(matrices):
    sizes = [w.size for w in matrices]
    drawn = jnp.split(jax.random.uniform(jax.random.key(0), (sum(sizes),)), np.cumsum(sizes)[:-1])
    drawn = [scores.reshape(w.shape) for scores, w in zip(drawn, matrices)]
    return by_rows(lambda scores, size: largest(scores, jnp.round((1 - SPARSITY) * size)), drawn)

  return _kept(inner, chosen)


def _kept(inner: optax.GradientTransformation, chosen: Callable[[list[jax.Array]], list[jax.Array]]) -> Step:
  """Returns a method whose masks are `chosen` in `init` alone, for calls outside of `jit`."""
  matrices = lambda tree: [w for w in jax.tree.leaves(tree) if w.ndim == 2]

  def with_masks(function, tree, masks, *more):
    masks = iter(masks)
    return jax.tree.map(lambda x, *rest: function(next(masks), x, *rest) if x.ndim == 2 else x, tree, *more)

  made = jax.jit(lambda params: chosen(matrices(params)))
  pulled = jax.jit(lambda grads, masks: with_masks(lambda m, g: jnp.where(m, g, 0), grads, masks))
  moved = jax.jit(lambda moves, masks, params: with_masks(lambda m, u, w: jnp.where(m, u, -w), moves, masks, params))

  def update(grads, state, params, **extra):
    masks, own = state
    moves, own = inner.update(pulled(grads, masks), own, params)
    return moved(moves, masks, params), (masks, own)

  return Step(lambda params: (made(params), inner.init(params)), update)


def first_random(inner: optax.GradientTransformation) -> Step:
  """Returns only the `init` of a method with random masks of an exact count, which reads no weight and ranks nothing.

  Places are drawn as often as weights are kept, and then as often as places are missing, until all are different.
  Every draw is uniform, and so is the mask over all masks of its count. Few draws suffice where little is kept.
  """
  def drawn(key, size):
    keep = round((1 - SPARSITY) * size)
    chunk = max(keep // 8, 1)  # about a twentieth of the first draws are repeated

    def more(now):
      mask, missing, key = now
      key, use = jax.random.split(key)
      place = jax.random.bits(use, (chunk,)) % np.uint32(size)
      place = jnp.where(jnp.arange(chunk) < missing, place, np.uint32(size))
      return _counted(mask.at[place].set(True, mode='drop'), keep, key)

    key, use = jax.random.split(key)
    place = jax.random.bits(use, (keep,)) % np.uint32(size)
    start = _counted(jnp.zeros(size, bool).at[place].set(True, mode='promise_in_bounds'), keep, key)
    return jax.lax.while_loop(lambda now: now[1] > 0, more, start)[0]

  def init(params):
    leaves = jax.tree.leaves(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return [made(key, w.size).reshape(w.shape) for key, w in zip(keys, leaves)], inner.init(params)

  made = jax.jit(drawn, static_argnums=1)
  return Step(init, _no_update)


def _counted(mask: jax.Array, keep: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the mask, how many places it misses, and the key."""
  words = lax.bitcast_convert_type(mask.astype(jnp.uint8).reshape(-1, 4), jnp.uint32)
  return mask, keep - jnp.sum(lax.population_count(words), dtype=jnp.int32), key


def _no_update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
  raise NotImplementedError('benchmarks.beginnings: only the `init` of this method is by hand.')


FIRST_CALLS = {'sr_ste, by hand': first_calls, 'asp, by hand': first_asp, 'rigl, by hand': first_rigl}
STARTS = {'a master and 2:4 masks, by hand': first_two_of_four, 'random masks, by hand': first_random}
