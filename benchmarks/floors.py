"""Contains the smallest steps of three methods in plain JAX, which `compile_time` compares with their recipes.

Each step has nothing but its method, by hand, for float32 matrices `[in, out]` that AdamW trains: no other pattern,
container, dtype, schedule or phase, and no message. What it takes to compile is the least that its method takes.

    tx = STEPS['sr_ste, by hand'](optax.adamw(1e-3))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
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
  """Returns gradual magnitude pruning of each matrix: one branch, in which matrices of one shape are a stack."""
  def init(params):
    return jnp.zeros((), jnp.int32), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def update(grads, state, params, **extra):
    step, masks, own = state
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    share = SPARSITY * (1 - (1 - jnp.clip(step / END, 0, 1)) ** 3)
    choose = lambda: _by_shape(lambda w, u: largest(jnp.abs(w + u), share), params, moves)
    masks = lax.cond(step % EVERY == 0, choose, lambda: masks)
    return jax.tree.map(lambda m, w, u: jnp.where(m, u, -w), masks, params, moves), (step + 1, masks, own)

  return Step(init, update)


def rigl(inner: optax.GradientTransformation) -> Step:
  """Returns RigL of each matrix: one branch drops by magnitude and grows by gradient, and the weights wait for it."""
  def init(params):
    return jnp.zeros((), jnp.int32), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def moved(w, g, m, fraction):
    alive = m & largest(jnp.where(m, jnp.abs(w), -1), 1 - (1 - SPARSITY) * (1 - fraction))
    return largest(jnp.where(alive, jnp.inf, jnp.abs(g)), SPARSITY)

  def update(grads, state, params, **extra):
    step, masks, own = state
    fraction, due = FRACTION / 2 * (1 + jnp.cos(jnp.pi * step / END)), step % EVERY == 0
    choose = lambda: _by_shape(lambda *each: moved(*each, fraction), params, grads, masks)
    new = lax.cond(due, choose, lambda: masks)
    moves, after = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    own = jax.tree.map(lambda a, b: jnp.where(due, a, b), own, after)
    moves = jax.tree.map(lambda m, u, w: jnp.where(m, jnp.where(due, 0, u), -w), new, moves, params)
    return moves, (step + 1, new, own)

  return Step(init, update)


def _by_shape(function: Callable[..., jax.Array], *trees: Any) -> Any:
  """Returns the tree of `function` of each leaf, computed by `vmap` over the stack of the leaves of each shape."""
  leaves, structure = zip(*map(jax.tree.flatten, trees))
  found: list[Any] = [None] * len(leaves[0])
  for shape in dict.fromkeys(x.shape for x in leaves[0]):
    places = [i for i, x in enumerate(leaves[0]) if x.shape == shape]
    stack = jax.vmap(function)(*(jnp.stack([own[i] for i in places]) for own in leaves))
    for row, i in enumerate(places):
      found[i] = stack[row]
  return jax.tree.unflatten(structure[0], found)


def largest(scores: jax.Array, sparsity: Any) -> jax.Array:
  """Returns the mask of all but a fraction of the scores, which are no NaN; ties keep the lower index.

  Bisection settles the bits of the least score that is kept, and then the index before which ties are kept.
  """
  keep = scores.size - jnp.round(sparsity * scores.size).astype(jnp.int32)
  keys = lax.bitcast_convert_type(scores, jnp.int32)
  least = _settled(lambda key: jnp.sum(keys >= key) >= keep, 31)
  equal, missing = keys == least, keep - jnp.sum(keys > least)
  place = jnp.arange(scores.size).reshape(scores.shape)
  stop = _settled(lambda stop: jnp.sum(equal & (place < stop)) <= missing, scores.size.bit_length())
  return (keys > least) | (equal & (place < stop))


def _settled(holds: Callable[[jax.Array], jax.Array], bits: int) -> jax.Array:
  """Returns the largest number of so many bits for which `holds` is `True`."""
  def settle(i, number):
    more = number + (1 << (bits - 1 - i))
    return jnp.where(holds(more), more, number)

  return lax.fori_loop(0, bits, settle, jnp.zeros((), jnp.int32))


STEPS = {'a master under a fixed mask': least_master, 'sr_ste, by hand': sr_ste, 'gradual_magnitude, by hand': gradual,
         'rigl, by hand': rigl}
