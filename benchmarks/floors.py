"""Contains the smallest steps of some methods in plain JAX, with which their recipes are compared.

Each step has nothing but its method, by hand, for float32 matrices `[in, out]` that AdamW trains: no other pattern,
container, dtype, schedule or phase, and no message. The time of the step is about the least that its method takes.

    tx = STEPS['sr_ste, by hand'](optax.adamw(1e-3))
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
"""

from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import lax

from benchmarks.floor_masks import apart, by_rows, half_of_groups, largest, over_all, two_of_four

DECAY = 2e-4  # of SR-STE
STAGES = 5000  # steps of the decay of MdGf, and of SdGf-geometric
SPARSITY, END, EVERY, FRACTION = 0.9, 3750, 100, 0.3  # of gradual magnitude pruning and of RigL
Step = optax.GradientTransformationExtraArgs


def _copied(params: Any) -> Any:
  """Returns a copy of the parameters, which a step that donates its arguments can update beside them."""
  return jax.tree.map(jnp.array, params)


def least_master(inner: optax.GradientTransformation) -> Step:
  """Returns the least that a dense master can be: `inner` moves it, and the parameters follow under a fixed mask."""
  def init(params):
    return _copied(params), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def update(grads, state, params, **extra):
    master, masks, own = state
    moves, own = inner.update(grads, own, master)
    master = optax.apply_updates(master, moves)
    return jax.tree.map(lambda w, m, p: jnp.where(m, w, 0) - p, master, masks, params), (master, masks, own)

  return Step(init, update)


def sr_ste(inner: optax.GradientTransformation) -> Step:
  """Returns SR-STE with 2:4: a master, and no mask in the state, since the pruned weights are the zeros."""
  def init(params):
    return _copied(params), inner.init(params)

  def update(grads, state, params, **extra):
    master, own = state
    refined = jax.tree.map(lambda g, w, p: g + jnp.where(p == 0, DECAY * w, 0), grads, master, params)
    moves, own = inner.update(refined, own, master)
    master = optax.apply_updates(master, moves)
    return jax.tree.map(lambda w, p: jnp.where(two_of_four(jnp.abs(w)), w, 0) - p, master, params), (master, own)

  return Step(init, update)


def mdgf(inner: optax.GradientTransformation) -> Step:
  """Returns MdGf with 2:4 and a linear decay, which scales pruned weights and their gradients: a master, and masks."""
  def init(params):
    masks = jax.tree.map(lambda w: two_of_four(jnp.abs(w)), params)
    return jnp.zeros((), jnp.int32), _copied(params), masks, inner.init(params)

  def update(grads, state, params, **extra):
    step, master, masks, own = state
    before, after = (1 - jnp.minimum(each / STAGES, 1) for each in (step, step + 1))
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, before * g), grads, masks), own, master)
    master = optax.apply_updates(master, moves)
    masks = jax.tree.map(lambda w: two_of_four(jnp.abs(w)), master)
    point = jax.tree.map(lambda w, m, p: jnp.where(m, w, after * w) - p, master, masks, params)
    return point, (step + 1, master, masks, own)

  return Step(init, update)


def sdgf_geometric(inner: optax.GradientTransformation) -> Step:
  """Returns SdGf-geometric on the way to 2:4: a master, and 16:32, 8:16, 4:8 and 2:4, each for a quarter of the steps.

  The groups of all matrices are the columns of a single one, so that the mask of a stage is one program.
  """
  def init(params):
    return jnp.zeros((), jnp.int32), _copied(params), inner.init(params)

  def masks(step, master):
    groups = jax.tree.map(lambda w: w.reshape(-1, 32, w.shape[1]), master)
    columns = [jnp.abs(w).swapaxes(0, 1).reshape(32, -1) for w in jax.tree.leaves(groups)]
    stages = [lambda scores, m=m: half_of_groups(scores, m) for m in (32, 16, 8, 4)]
    whole = lax.switch(jnp.minimum(step // (STAGES // 4), 3), stages, jnp.concatenate(columns, 1))
    found = iter(apart(whole, [x.shape[1] for x in columns]))
    back = lambda w: next(found).reshape(32, -1, w.shape[2]).swapaxes(0, 1).reshape(-1, w.shape[2])
    return jax.tree.map(back, groups)

  def update(grads, state, params, **extra):
    step, master, own = state
    moves, own = inner.update(grads, own, master)
    master = optax.apply_updates(master, moves)
    point = jax.tree.map(lambda w, m, p: jnp.where(m, w, 0) - p, master, masks(step, master), params)
    return point, (step + 1, master, own)

  return Step(init, update)


def fixed(inner: optax.GradientTransformation) -> Step:
  """Returns training under a fixed mask: the gradients of kept weights count, and pruned weights go to zero."""
  def init(params):
    return jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def update(grads, state, params, **extra):
    masks, own = state
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    return jax.tree.map(lambda m, u, w: jnp.where(m, u, -w), masks, moves, params), (masks, own)

  return Step(init, update)


def gradual(inner: optax.GradientTransformation, again: bool = False, together: bool = False) -> Step:
  """Returns gradual magnitude pruning of each matrix, whose masks are chosen in one branch.

  The branch gets the updates, which every step then writes to memory: at 60 matrices a step takes 1.2 times as long.
  With `again` the branch computes the updates of AdamW out of the slots, as the recipe does. With `together`, too, and
  all matrices are ranked together. Pruned weights rank last, since the moments of AdamW still move them.
  """
  def init(params):
    return jnp.zeros((), jnp.int32), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def update(grads, state, params, **extra):
    step, masks, own = state
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    share = SPARSITY * (1 - (1 - jnp.clip(step / END, 0, 1)) ** 3)
    chosen_of = lambda size: size - jnp.round(share * size)
    chosen = lambda w, size: largest(w, chosen_of(size))
    after = lambda: _adamw_moves(own, params) if again or together else moves
    sizes = lambda: jax.tree.map(lambda w, u, m: jnp.where(m, jnp.abs(w + u), -1), params, after(), masks)
    total = sum(w.size for w in jax.tree.leaves(params))
    choose = lambda: over_all(sizes(), chosen_of(total)) if together else by_rows(chosen, sizes())
    masks = lax.cond(step % EVERY == 0, choose, lambda: masks)
    return jax.tree.map(lambda m, w, u: jnp.where(m, u, -w), masks, params, moves), (step + 1, masks, own)

  return Step(init, update)


def _adamw_moves(own: Any, params: Any) -> Any:
  """Returns the updates of `optax.adamw(1e-3)` with this next state."""
  count, mu, nu = own[0]
  first, second = 1 - 0.9 ** count.astype(jnp.float32), 1 - 0.999 ** count.astype(jnp.float32)
  move = lambda m, v, w: -1e-3 * (m / first / (jnp.sqrt(v / second) + 1e-8) + 1e-4 * w)
  return jax.tree.map(move, mu, nu, params)


def sparse_momentum(inner: optax.GradientTransformation) -> Step:
  """Returns GSM: every step ranks |w dL/dw| over all matrices, and a branch chooses the last masks by magnitude."""
  def init(params):
    return jnp.zeros((), jnp.int32), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def update(grads, state, params, **extra):
    step, masks, own = state
    keep = jnp.round((1 - SPARSITY) * sum(w.size for w in jax.tree.leaves(params)))
    active = over_all(jax.tree.map(lambda w, g: jnp.abs(w * g), params, grads), keep)
    passed = lambda g, a, w, m: jnp.where(m, jnp.where(a, g, 0) + 1e-4 * w, 0)
    moves, own = inner.update(jax.tree.map(passed, grads, active, params, masks), own, params)
    choose = lambda: over_all(jax.tree.map(lambda w, u: jnp.abs(w + u), params, _adamw_moves(own, params)), keep)
    masks = lax.cond(step == END, choose, lambda: masks)
    return jax.tree.map(lambda m, w, u: jnp.where(m, u, -w), masks, params, moves), (step + 1, masks, own)

  return Step(init, update)


def set_(inner: optax.GradientTransformation) -> Step:
  """Returns SET of each matrix: a branch drops by magnitude after the step, and grows at random."""
  def init(params):
    return jnp.zeros((), jnp.int32), jax.tree.map(lambda w: jnp.ones(w.shape, bool), params), inner.init(params)

  def moved(w, fraction, step, place, size):
    keep = jnp.round((1 - SPARSITY) * size)
    alive = largest(w, jnp.round((1 - fraction) * keep))
    draws = jax.random.uniform(jax.random.fold_in(jax.random.fold_in(jax.random.key(0), step), place), w.shape)
    return largest(jnp.where(alive, jnp.inf, jnp.where(lax.iota(jnp.int32, w.size) < size, draws, -1)), keep)

  def update(grads, state, params, **extra):
    step, masks, own = state
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    fraction = FRACTION / 2 * (1 + jnp.cos(jnp.pi * step / END))
    kept = lambda: jax.tree.map(lambda w, u, m: jnp.where(m, jnp.abs(w + u), -1), params, moves, masks)
    grow = lambda w, place, size: moved(w, fraction, step, place, size)
    new = lax.cond(step % EVERY == 0, lambda: by_rows(grow, kept(), places=True), lambda: masks)
    moves = jax.tree.map(lambda m, old, u, w: jnp.where(m, jnp.where(old, u, 0), -w), new, masks, moves, params)
    return moves, (step + 1, new, own)

  return Step(init, update)


def snfs(inner: optax.GradientTransformation) -> Step:
  """Returns sparse momentum: a branch ranks magnitudes in each matrix, shares out what it drops, and ranks momenta."""
  def init(params):
    masks, zeros = (jax.tree.map(make, params) for make in (lambda w: jnp.ones(w.shape, bool), jnp.zeros_like))
    return jnp.zeros((), jnp.int32), masks, zeros, inner.init(params)

  def chosen(fraction, masks, weights, momenta):
    before = jax.tree.map(lambda m: jnp.sum(m, dtype=jnp.float32), masks)
    left = jax.tree.map(lambda n: jnp.round((1 - fraction) * n), before)
    kept = jax.tree.map(lambda w, m: jnp.where(m, w, -1), weights, masks)
    alive = by_rows(lambda w, n, size: largest(w, n), kept, left)
    strength = jax.tree.map(lambda v, m, n: jnp.sum(jnp.where(m, v, 0)) / n, momenta, masks, before)
    total = lambda tree: sum(jax.tree.leaves(tree))
    free = total(before) - total(left)
    more = jax.tree.map(lambda n, s: n + jnp.floor(free * s / total(strength)), left, strength)
    grow = jax.tree.map(lambda a, v: jnp.where(a, jnp.inf, v), alive, momenta)
    return by_rows(lambda v, n, size: largest(v, n), grow, more)

  def update(grads, state, params, **extra):
    step, masks, momenta, own = state
    momenta = jax.tree.map(lambda v, g: 0.9 * v + 0.1 * g, momenta, grads)
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    fraction, sizes = FRACTION / 2 * (1 + jnp.cos(jnp.pi * step / END)), lambda tree: jax.tree.map(jnp.abs, tree)
    choose = lambda: chosen(fraction, masks, sizes(jax.tree.map(jnp.add, params, moves)), sizes(momenta))
    new = lax.cond(step % EVERY == 0, choose, lambda: masks)
    moves = jax.tree.map(lambda m, old, u, w: jnp.where(m, jnp.where(old, u, 0), -w), new, masks, moves, params)
    return moves, (step + 1, new, momenta, own)

  return Step(init, update)


def soft(inner: optax.GradientTransformation) -> Step:
  """Returns ST-3: soft thresholding of a master by one threshold over all matrices, which is found at every step.

  Each output channel is rescaled by the magnitude that the mask takes from the channel. The state holds the masks, as
  all other steps do: a report and a packed file read them.
  """
  def init(params):
    masks = jax.tree.map(lambda w: jnp.ones(w.shape, bool), params)
    return jnp.zeros((), jnp.int32), masks, _copied(params), inner.init(params)

  def update(grads, state, params, **extra):
    step, _, master, own = state
    moves, own = inner.update(grads, own, master)
    master = optax.apply_updates(master, moves)
    flat = jnp.concatenate([jnp.abs(w).reshape(-1) for w in jax.tree.leaves(master)])
    share = SPARSITY * (1 - (1 - jnp.clip(step / END, 0, 1)) ** 3)
    keys, keep = lax.bitcast_convert_type(flat, jnp.int32), jnp.round((1 - share) * flat.size)
    enough = lambda least: jnp.sum(keys >= least, dtype=jnp.int32) >= keep
    tried = lambda i, least: least + (1 << (30 - i))
    settle = lambda i, least: jnp.where(enough(tried(i, least)), tried(i, least), least)
    level = lax.bitcast_convert_type(lax.fori_loop(0, 31, settle, jnp.int32(0)), jnp.float32)

    def shrunk(w, p):
      size = jnp.abs(w)
      left = (jnp.mean(jnp.where(size > level, size, 0), 0) + 1e-6) / (jnp.mean(size, 0) + 1e-6)
      return 1.01 / (left + 0.01) * jnp.sign(w) * jnp.maximum(size - level, 0) - p

    masks = jax.tree.map(lambda w: jnp.abs(w) > level, master)
    return jax.tree.map(shrunk, master, params), (step + 1, masks, master, own)

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
    choose = lambda: by_rows(lambda w, g, size: moved(w, g, fraction, size), kept, jax.tree.map(jnp.abs, grads))
    new = lax.cond(due, choose, lambda: masks)
    moves, after = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, params)
    own = jax.tree.map(lambda a, b: jnp.where(due, a, b), own, after)
    moves = jax.tree.map(lambda m, u, w: jnp.where(m, jnp.where(due, 0, u), -w), new, moves, params)
    return moves, (step + 1, new, own)

  return Step(init, update)


def soft_movement(inner: optax.GradientTransformation, choosing: bool = False) -> Step:
  """Returns soft movement pruning between two choices of the mask: Adam moves the scores, and `inner` the master.

  The matrix of the last layer has no scores. Its gradients are those of a dense weight. With `choosing` every step
  chooses the masks, as the method does: a threshold on sigmoid(S), and at least half a percent of each matrix.
  """
  adam = optax.adam(1e-2)
  sparse = lambda params: params if choosing else {path: params[path] for path in sorted(params)[:-1]}

  def init(params):
    scores, masks = jax.tree.map(jnp.zeros_like, sparse(params)), jax.tree.map(lambda w: w == w, params)
    master = _copied(params)
    return jnp.zeros((), jnp.int32), master, scores, masks, adam.init(scores), inner.init(params)

  def update(grads, state, params, **extra):
    step, master, scores, masks, held, own = state
    rise = jnp.clip(step / END, 0, 1)

    def pull(w, g, s):
      gate = jax.nn.sigmoid(s)
      return w * g + rise * gate * (1 - gate) / w.size

    moves, held = adam.update(jax.tree.map(pull, sparse(master), sparse(grads), scores), held, scores)
    scores = optax.apply_updates(scores, moves)
    moves, own = inner.update(jax.tree.map(lambda g, m: jnp.where(m, g, 0), grads, masks), own, master)
    master = optax.apply_updates(master, moves)
    if choosing:
      pick = lambda gate, size: (gate > 0.1 * rise) | largest(gate, jnp.floor(0.005 * size) + 1)
      masks = by_rows(pick, jax.tree.map(jax.nn.sigmoid, scores))
    moves = jax.tree.map(lambda w, m, p: jnp.where(m, w, 0) - p, master, masks, params)
    return moves, (step + 1, master, scores, masks, held, own)

  return Step(init, update)


STEPS = {'a master under a fixed mask': least_master, 'sr_ste, by hand': sr_ste,
         'mdgf, by hand': mdgf, 'sdgf_geometric, by hand': sdgf_geometric, 'random_pruning, by hand': fixed,
         'gradual_magnitude, by hand': gradual,
         'gradual_magnitude, by hand, again': lambda inner: gradual(inner, again=True),
         'gradual_magnitude, global, by hand': lambda inner: gradual(inner, together=True),
         'global_sparse_momentum, by hand': sparse_momentum,
         'set_, by hand': set_, 'rigl, by hand': rigl, 'snfs, by hand': snfs, 'st3, by hand': soft,
         'soft_movement_pruning, by hand': soft_movement,
         'soft_movement_pruning, by hand, with a choice': lambda inner: soft_movement(inner, choosing=True)}
