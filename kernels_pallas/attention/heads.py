"""What attention to listed blocks is for a batch, in terms of what it is for heads.

The kernel for Hopper reads the heads of a batch where they lie. XLA and TPUs want them first.
"""

from collections.abc import Callable

import jax.numpy as jnp

from sparsejax.types import Array


def first(attend: Callable[..., Array]) -> Callable[..., Array]:
  """`attend`, which takes and gives `[heads, T, d]` and has lists for each of these heads, for `[batch, T, heads, d]`.

  The lists, `index [heads, blocks, R]` and `counts [heads, blocks]`, are the same for all of a batch.
  """
  def attended(q, k, v, index, counts):
    return split(attend(*map(merged, (q, k, v)), *(repeated(a, len(q)) for a in (index, counts))), q.shape[2])
  return attended


def merged(a: Array) -> Array:
  """`[batch heads, T, d]` of `[batch, T, heads, d]`."""
  return a.swapaxes(1, 2).reshape(-1, a.shape[1], a.shape[3])


def split(a: Array, heads: int) -> Array:
  """The inverse of `merged`."""
  return a.reshape(-1, heads, *a.shape[1:]).swapaxes(1, 2)


def repeated(lists: Array, batch: int) -> Array:
  """The lists of each head of a batch."""
  return jnp.tile(lists, (batch, *[1] * (lists.ndim - 1)))
