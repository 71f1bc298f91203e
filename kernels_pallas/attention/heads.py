"""What attention to listed blocks is for a batch, in terms of what it is for heads.

The kernel for Hopper reads the heads of a batch where they lie. XLA and TPUs want them first.
"""

from collections.abc import Callable

import jax.numpy as jnp

from sparsejax.types import Array


def first(attend: Callable[..., Array]) -> Callable[..., Array]:
  """`attend`, which takes and gives `[heads, T, d]` and has lists for each of these heads, for `[batch, T, heads, d]`.

  The lists, `index [heads, blocks, R]` and `counts [heads, blocks]`, are the same for all of a batch. Without counts,
  all R count.
  """
  def attended(q, k, v, index, counts=None):
    return split(attend(*map(merged, (q, k, v)), *lists(len(q), index, counts)), q.shape[2])
  return attended


def merged(a: Array) -> Array:
  """`[batch heads, T, d]` of `[batch, T, heads, d]`."""
  return a.swapaxes(1, 2).reshape(-1, a.shape[1], a.shape[3])


def split(a: Array, heads: int) -> Array:
  """The inverse of `merged`."""
  return a.reshape(-1, heads, *a.shape[1:]).swapaxes(1, 2)


def lists(batch: int, index: Array, counts: Array | None = None) -> tuple[Array, Array]:
  """The lists of each head of a batch, and how much of them counts."""
  counts = jnp.full(index.shape[:2], index.shape[2], jnp.int32) if counts is None else counts
  return jnp.tile(index, (batch, 1, 1)), jnp.tile(counts, (batch, 1))
