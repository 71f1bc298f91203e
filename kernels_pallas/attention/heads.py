"""Turns attention of `[heads, T, d]` into attention of `[batch, T, heads, d]`.

The kernel for Hopper reads the heads of a batch in place. The implementations for XLA and TPUs take heads first.
"""

from collections.abc import Callable

import jax.numpy as jnp

from sparsejax.types import Array


def first(attend: Callable[..., Array]) -> Callable[..., Array]:
  """Returns a function of `[batch, T, heads, d]` that calls `attend(q, k, v, index, counts)` with heads first.

  `attend` takes and returns `[heads, T, d]`, with a list for each head. The lists, `index [heads, blocks, R]` and
  `counts [heads, blocks]`, are the same for all examples of a batch. Without `counts`, lists are used in full.
  """
  def attended(q, k, v, index, counts=None):
    return heads_last(attend(*map(heads_first, (q, k, v)), *lists(len(q), index, counts)), q.shape[2])
  return attended


def heads_first(a: Array) -> Array:
  """Returns `[batch, T, heads, d]` as `[batch heads, T, d]`."""
  return a.swapaxes(1, 2).reshape(-1, a.shape[1], a.shape[3])


def heads_last(a: Array, heads: int) -> Array:
  """Returns `[batch heads, T, d]` as `[batch, T, heads, d]`, the inverse of `heads_first`."""
  return a.reshape(-1, heads, *a.shape[1:]).swapaxes(1, 2)


def lists(batch: int, index: Array, counts: Array | None = None) -> tuple[Array, Array]:
  """Returns the list of each head of each example, and how many blocks of a list are used."""
  counts = jnp.full(index.shape[:2], index.shape[2], jnp.int32) if counts is None else counts
  return jnp.tile(index, (batch, 1, 1)), jnp.tile(counts, (batch, 1))
