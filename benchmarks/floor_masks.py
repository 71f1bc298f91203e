"""Contains the choices of masks by hand, in plain JAX, for the smallest steps in `floors`."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


def two_of_four(scores: jax.Array) -> jax.Array:
  """Returns the mask of the two largest of every four scores along the first axis; ties keep the lower index."""
  groups = scores.reshape(-1, 4, scores.shape[1])
  place = jnp.arange(4)[:, None]
  ahead = [(groups[:, j:j + 1] > groups) | ((groups[:, j:j + 1] == groups) & (j < place)) for j in range(4)]
  return (sum(each.astype(jnp.int32) for each in ahead) < 2).reshape(scores.shape)


def half_of_groups(scores: jax.Array, m: int) -> jax.Array:
  """Returns the mask of the larger half of every `m` scores along the first axis; ties keep the lower index."""
  groups = scores.reshape(-1, m, scores.shape[1])
  place, ahead = jnp.arange(m)[:, None], jnp.zeros(groups.shape, jnp.int32)
  for j in range(m):
    ahead += (groups[:, j:j + 1] > groups) | ((groups[:, j:j + 1] == groups) & (j < place))
  return (ahead < m // 2).reshape(scores.shape)


def apart(whole: jax.Array, sizes: Sequence[int]) -> list[jax.Array]:
  """Returns the parts of so many columns, at places that are results of a branch, see `by_rows`."""
  numbers = [np.int32(n) for n in np.cumsum([0, *sizes[:-1]])]
  places = lax.cond(whole[0, 0], lambda: numbers, lambda: numbers)
  return [lax.dynamic_slice_in_dim(whole, place, size, 1) for place, size in zip(places, sizes)]


def by_rows(function: Callable[..., jax.Array], *trees: Any, places: bool = False) -> Any:
  """Returns the tree of `function` of each leaf and its size, by a loop over rows of one width, with -1 behind a leaf.

  Numbers are handed on as they are. `places`: whether the function gets the place of the leaf, too, before the size.
  The places of the rows are results of a branch: XLA:CPU would compile a kernel for each constant place.
  """
  all_leaves, structures = zip(*map(jax.tree.flatten, trees))
  leaves = all_leaves[0]
  width, numbers = max(x.size for x in leaves), [np.int32(i) for i in range(len(leaves))]
  row = lambda x: jnp.pad(x.reshape(-1), (0, width - x.size), constant_values=-1) if x.ndim else x
  stacks = [jnp.stack([row(x) for x in jax.tree.leaves(tree)]) for tree in trees]
  sizes = np.array([x.size for x in leaves], np.float32)
  given = (*stacks, np.arange(len(leaves)), sizes) if places else (*stacks, sizes)
  masks = lax.map(lambda each: function(*each), given)
  opaque = lax.cond(masks[0, 0], lambda: numbers, lambda: numbers)
  found = [lax.dynamic_index_in_dim(masks, i, 0, keepdims=False)[:x.size].reshape(x.shape)
           for i, x in zip(opaque, leaves)]
  return jax.tree.unflatten(structures[0], found)


def over_all(trees: Any, keep: jax.Array) -> Any:
  """Returns the masks of the `keep` largest scores of all leaves together, which a single row holds."""
  leaves, structure = jax.tree.flatten(trees)
  whole = largest(jnp.concatenate([x.reshape(-1) for x in leaves]), keep)
  parts = apart(whole[None], [x.size for x in leaves])
  return jax.tree.unflatten(structure, [part.reshape(x.shape) for part, x in zip(parts, leaves)])


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
