"""Contains the smallest steps of some methods in plain JAX, with which their recipes are compared.

Each step has nothing but its method, by hand, for float32 matrices `[in, out]` that AdamW trains: no other pattern,
container, dtype, schedule or phase, and no message. The time of the step is about the least that its method takes.

    tx = STEPS['sr_ste, by hand'](optax.adamw(1e-3))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

DECAY = 2e-4  # of SR-STE
SPARSITY, END, EVERY, FRACTION = 0.9, 3750, 100, 0.3  # of gradual magnitude pruning and of RigL
Step = optax.GradientTransformationExtraArgs


def least_master(inner: optax.GradientTransformation) -> Step:
  """Returns the least that a dense master can be: `inner` moves it, and the parameters follow under a fixed mask."""
  def init(params):
    return params, jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def update(grads, state, params, **extra):
    master, masks, own = state
    moves, own = inner.update(grads, own, master)
    master = optax.apply_updates(master, moves)
    return jax.tree.map(lambda w, m, p: jnp.where(m, w, 0) - p, master, masks, params), (master, masks, own)

  return Step(init, update)


def sr_ste(inner: optax.GradientTransformation) -> Step:
  """Returns SR-STE with 2:4: a master, and no mask in the state, since the pruned weights are the zeros."""
  def init(params):
    return params, inner.init(params)

  def update(grads, state, params, **extra):
    master, own = state
    refined = jax.tree.map(lambda g, w, p: g + jnp.where(p == 0, DECAY * w, 0), grads, master, params)
    moves, own = inner.update(refined, own, master)
    master = optax.apply_updates(master, moves)
    return jax.tree.map(lambda w, p: jnp.where(two_of_four(jnp.abs(w)), w, 0) - p, master, params), (master, own)

  return Step(init, update)


def two_of_four(scores: jax.Array) -> jax.Array:
  """Returns the mask of the two largest of every four scores along the first axis; ties keep the lower index."""
  groups = scores.reshape(-1, 4, scores.shape[1])
  place = jnp.arange(4)[:, None]
  ahead = [(groups[:, j:j + 1] > groups) | ((groups[:, j:j + 1] == groups) & (j < place)) for j in range(4)]
  return (sum(each.astype(jnp.int32) for each in ahead) < 2).reshape(scores.shape)


def gradual(inner: optax.GradientTransformation) -> Step:
  """Returns gradual magnitude pruning of each matrix, whose masks are chosen in one branch."""
  def init(params):
    return jnp.zeros((), jnp.int32), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def update(grads, state, params, **extra):
    step, masks, own = state
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    share = SPARSITY * (1 - (1 - jnp.clip(step / END, 0, 1)) ** 3)
    chosen = lambda w, size: largest(w, size - jnp.round(share * size))
    choose = lambda: _by_rows(chosen, jax.tree.map(lambda w, u: jnp.abs(w + u), params, moves))
    masks = lax.cond(step % EVERY == 0, choose, lambda: masks)
    return jax.tree.map(lambda m, w, u: jnp.where(m, u, -w), masks, params, moves), (step + 1, masks, own)

  return Step(init, update)


def rigl(inner: optax.GradientTransformation) -> Step:
  """Returns RigL of each matrix: a branch drops by magnitude and grows by gradient, and the weights wait."""
  def init(params):
    return jnp.zeros((), jnp.int32), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def moved(w, g, fraction, size):
    keep = jnp.round((1 - SPARSITY) * size)
    alive = largest(w, jnp.round((1 - fraction) * keep))
    return largest(jnp.where(alive, jnp.inf, g), keep)

  def update(grads, state, params, **extra):
    step, masks, own = state
    fraction, due = FRACTION / 2 * (1 + jnp.cos(jnp.pi * step / END)), step % EVERY == 0
    kept = jax.tree.map(lambda w, m: jnp.where(m, jnp.abs(w), -1), params, masks)
    choose = lambda: _by_rows(lambda w, g, size: moved(w, g, fraction, size), kept, jax.tree.map(jnp.abs, grads))
    new = lax.cond(due, choose, lambda: masks)
    moves, after = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    own = jax.tree.map(lambda a, b: jnp.where(due, a, b), own, after)
    moves = jax.tree.map(lambda m, u, w: jnp.where(m, jnp.where(due, 0, u), -w), new, moves, params)
    return moves, (step + 1, new, own)

  return Step(init, update)


def soft_movement(inner: optax.GradientTransformation) -> Step:
  """Returns soft movement pruning between two choices of the mask: Adam moves the scores, and `inner` the master.

  The matrix of the last layer has no scores. Its gradients are those of a dense weight.
  """
  adam = optax.adam(1e-2)
  sparse = lambda params: {path: params[path] for path in sorted(params)[:-1]}

  def init(params):
    scores, masks = jax.tree.map(jnp.zeros_like, sparse(params)), jax.tree.map(lambda w: w == w, params)
    master = jax.tree.map(jnp.array, params)
    return jnp.zeros((), jnp.int32), master, scores, masks, adam.init(scores), inner.init(params)

  def update(grads, state, params, **extra):
    step, master, scores, masks, held, own = state
    penalty = jnp.clip(step / END, 0, 1)

    def pull(w, g, s):
      gate = jax.nn.sigmoid(s)
      return w * g + penalty * gate * (1 - gate) / w.size

    moves, held = adam.update(jax.tree.map(pull, sparse(master), sparse(grads), scores), held, scores)
    scores = optax.apply_updates(scores, moves)
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, master)
    master = optax.apply_updates(master, moves)
    moves = jax.tree.map(lambda w, m, p: jnp.where(m, w, 0) - p, master, masks, params)
    return moves, (step + 1, master, scores, masks, held, own)

  return Step(init, update)


def first_two_of_four(inner: optax.GradientTransformation) -> Step:
  """Returns only the `init` of a method with a master and 2:4 masks: copies, masks, and what `inner` keeps."""
  made = jax.jit(lambda params: jax.tree.map(lambda w: (w.copy(), two_of_four(jnp.abs(w))), params))
  return Step(lambda params: (made(params), inner.init(params)), _no_update)


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
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(0), len(leaves))
    return [made(key, w.size).reshape(w.shape) for key, w in zip(keys, leaves)], inner.init(params)

  made = jax.jit(drawn, static_argnums=1)
  return Step(init, _no_update)


def _counted(mask: jax.Array, keep: int, key: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Returns the mask, how many places it misses, and the key."""
  words = lax.bitcast_convert_type(mask.astype(jnp.uint8).reshape(-1, 4), jnp.uint32)
  return mask, keep - jnp.sum(lax.population_count(words), dtype=jnp.int32), key


def _no_update(grads: Any, state: Any, params: Any = None, **extra: Any) -> Any:
  raise NotImplementedError('benchmarks.floors: only the `init` of this method is by hand.')


def _by_rows(function: Callable[..., jax.Array], *trees: Any) -> Any:
  """Returns the tree of `function` of each leaf and its size, by a loop over rows of one width, with -1 behind a leaf.

  The places of the rows are results of a branch: XLA:CPU would compile a kernel for each constant place.
  """
  all_leaves, structures = zip(*map(jax.tree.flatten, trees))
  leaves = all_leaves[0]
  width, numbers = max(x.size for x in leaves), [np.int32(i) for i in range(len(leaves))]
  row = lambda x: jnp.pad(x.reshape(-1), (0, width - x.size), constant_values=-1)
  stacks = [jnp.stack([row(x) for x in jax.tree.leaves(tree)]) for tree in trees]
  sizes = np.array([x.size for x in leaves], np.float32)
  masks = lax.map(lambda each: function(*each), (*stacks, sizes))
  places = lax.cond(masks[0, 0], lambda: numbers, lambda: numbers)
  found = [lax.dynamic_index_in_dim(masks, i, 0, keepdims=False)[:x.size].reshape(x.shape)
           for i, x in zip(places, leaves)]
  return jax.tree.unflatten(structures[0], found)


def largest(scores: jax.Array, keep: jax.Array) -> jax.Array:
  """Returns the mask of the `keep` largest of a row of scores that are at least 0; ties keep the lower index.

  A loop settles the bits of the least score that is kept, and then the index before which ties are kept.
  """
  keys, place = lax.bitcast_convert_type(scores, jnp.int32), lax.iota(jnp.int32, scores.size)
  kept = lambda least, stop: (keys > least) | ((keys == least) & (place < stop))
  turns = 31 + scores.size.bit_length()

  def settle(i, now):
    tied, stop = i >= 31, jnp.where(i == 31, 0, now[1])
    step = 1 << (jnp.where(tied, turns - 1, 30) - i)
    tried = jnp.where(tied, now[0], now[0] + step), jnp.where(tied, stop + step, scores.size)
    number = jnp.sum(kept(*tried), dtype=jnp.int32)
    fits = jnp.where(tied, number <= keep, number >= keep)
    return jnp.where(fits, tried[0], now[0]), jnp.where(fits, tried[1], stop)

  return kept(*lax.fori_loop(0, turns, settle, (jnp.int32(0), jnp.int32(0))))


STEPS = {'a master under a fixed mask': least_master, 'sr_ste, by hand': sr_ste, 'gradual_magnitude, by hand': gradual,
         'rigl, by hand': rigl, 'soft_movement_pruning, by hand': soft_movement}
STARTS = {'a master and 2:4 masks, by hand': first_two_of_four, 'random masks, by hand': first_random}
