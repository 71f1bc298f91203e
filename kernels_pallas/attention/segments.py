"""Finds the queries that see no key of their own segment, and gives them the value of their own key.

A segment is a number of queries and keys: a query sees the keys of its own number alone. The kernels for TPUs and for
Hopper compute these masks, and what is here comes after a kernel.
"""

import functools

import jax
import jax.numpy as jnp

from sparsejax.types import Array


def with_own_values(y: Array, v: Array, index: Array, counts: Array, queries: Array, keys: Array, *, block_q: int,
                    block_k: int, causal: bool) -> Array:
  """Returns `y [heads, Tq, d]`, with the value of its own key for each query that has no listed key of its number.

  `v` is `[kv_heads, Tk, d]`, and the numbers are `queries`, `int32[Tq]`, and `keys`, `int32[Tk]`. The result of such a
  query is zero if its own key is not listed.
  """
  seen = sees(index, counts, queries, keys, block_q=block_q, block_k=block_k, causal=causal)
  own = _own_values(v, index, counts, y.shape[1], block_q, block_k)
  return jnp.where(seen[..., None], y, own.astype(y.dtype))


def batched(y: Array, v: Array, index: Array, counts: Array, queries: Array, keys: Array, **options: bool | int
            ) -> Array:
  """Returns `with_own_values` of `y [batch, Tq, heads, d]`, `v [batch, Tk, kv_heads, d]` and `int32[batch, T]`."""
  whole = functools.partial(with_own_values, index=index, counts=counts, **options)
  run = jax.vmap(lambda y, v, queries, keys: whole(y, v, queries=queries, keys=keys))
  return run(y.swapaxes(1, 2), v.swapaxes(1, 2), queries, keys).swapaxes(1, 2)


def sees(index: Array, counts: Array, queries: Array, keys: Array, *, block_q: int, block_k: int, causal: bool
         ) -> Array:
  """Returns whether each query has a listed key of its own number, `bool[heads, Tq]`."""
  blocks, rows = keys.reshape(-1, block_k), queries.reshape(1, -1, block_q, 1, 1)
  same = rows == jnp.take(blocks, index, 0, mode='clip')[:, :, None]  # [heads, blocks, block_q, R, block_k]
  slot = jax.lax.broadcasted_iota(jnp.int32, same.shape, 3)
  same &= slot < counts[..., None, None, None]
  if causal:
    row, of_row, of_key = (jax.lax.broadcasted_iota(jnp.int32, same.shape, axis) for axis in (1, 2, 4))
    same &= index[:, :, None, :, None] * block_k + of_key <= row * block_q + of_row
  return jnp.any(same, (3, 4)).reshape(len(index), -1)


def _own_values(v: Array, index: Array, counts: Array, queries: int, block_q: int, block_k: int) -> Array:
  """Returns the value of each query's own key, `[heads, Tq, d]`, or zeros where the key is not listed."""
  own = jnp.minimum(jnp.arange(queries, dtype=jnp.int32), v.shape[1] - 1)
  used = jax.lax.broadcasted_iota(jnp.int32, index.shape, 2) < counts[..., None]
  lists = (jnp.repeat(a, block_q, 1) for a in (index, used))
  listed = jnp.any((next(lists) == own[None, :, None] // block_k) & next(lists), -1)
  values = jnp.repeat(v[:, own], len(index) // len(v), 0)
  return jnp.where(listed[..., None], values, jnp.zeros((), v.dtype))
