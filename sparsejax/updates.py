"""Updates: how a mask follows from the one before it.

An update is `update(mask, scores, select) -> mask`, leafwise; `select(scores) -> mask` is the pattern with its count
and axes filled in, so that whatever an update does, the pattern and the count are kept.
"""

from collections.abc import Callable

import jax.numpy as jnp

from sparsejax.types import Array


def reselect(mask: Array, scores: Array, select: Callable[[Array], Array]) -> Array:
  """Forgets the mask: the best of all. A pruned weight returns as soon as its score is high enough."""
  del mask
  return select(scores)


def prune_to(mask: Array, scores: Array, select: Callable[[Array], Array]) -> Array:
  """The best of those still kept: what is pruned stays pruned, as long as the pattern does not ask for more."""
  least = jnp.finfo(jnp.float32).min  # a kept NaN or -inf still goes before what is pruned
  kept = jnp.nan_to_num(scores.astype(jnp.float32), nan=least, neginf=least)
  return select(jnp.where(mask, kept, -jnp.inf))
