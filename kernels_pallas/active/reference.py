"""Activation-sparse products in plain `jnp`: blocks of rows of the weight that meet only zeros are not read.

The active blocks are walked in steps of a few, each a copy of their rows that stays in the cache and one dot. The
number of steps is that of the data, so nothing is rounded up to the capacity; it bounds what is worth it.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from sparsejax.types import Array

_ROWS = 128  # of a step


def active_blocks(x: Array, block: int) -> tuple[Array, Array]:
  """The blocks of `x [M, K]` in which one token has a nonzero, these first, `int32[K / block]`, and how many."""
  nonzero = jnp.any((x != 0).reshape(x.shape[0], -1, block), (0, 2))
  order = jnp.argsort(~nonzero, stable=True)
  return order.astype(jnp.int32), jnp.sum(nonzero, dtype=jnp.int32)


def matmul(x: Array, w: Array, block: int, capacity: int) -> Array:
  """`x [M, K]`, mostly zeros, times `w [K, N]`: `[M, N]` in x's dtype, summed in float32; dense above the capacity."""
  order, count = active_blocks(x, block)
  inputs, weights = x.reshape(len(x), -1, block), w.reshape(-1, block, w.shape[1])

  def add(ids, y):
    taken = inputs.at[:, ids].get(mode='fill', fill_value=0).reshape(len(x), -1)
    return y + products.dot(taken, _rows(weights, ids), 1, 0)

  zeros, *_ = dispatch.varying_alike(jnp.zeros((len(x), w.shape[1]), jnp.float32), x, w)
  few = lambda: _walked(order, count, block, add, zeros).astype(x.dtype)
  return jax.lax.cond(count <= capacity, few, lambda: dense(x, w))


def matmul_transposed(dy: Array, x: Array, w: Array, block: int, capacity: int) -> Array:
  """`dy [M, N]` times the transpose of `w` at the active blocks of `x [M, K]`, zeros elsewhere: `[M, K]`."""
  order, count = active_blocks(x, block)
  weights = w.reshape(-1, block, w.shape[1])

  def put(ids, dx):
    found = products.dot(dy, _rows(weights, ids), 1, 1)
    return dx.at[:, ids].set(found.reshape(len(dy), -1, block), mode='drop')

  zeros, *_ = dispatch.varying_alike(jnp.zeros((len(dy), len(weights), block), jnp.float32), dy, w)
  few = lambda: _walked(order, count, block, put, zeros)
  whole = lambda: products.dot(dy, w, 1, 1).reshape(len(dy), -1, block)
  return jax.lax.cond(count <= capacity, few, whole).reshape(x.shape).astype(dy.dtype)


def dense(x: Array, w: Array) -> Array:
  """The product as if nothing were zero."""
  return products.dot(x, w, 1, 0).astype(x.dtype)


def _rows(weights: Array, ids: Array) -> Array:
  """The rows of these blocks of `[K / block, block, N]`; of a block past the end, zeros."""
  return weights.at[ids].get(mode='fill', fill_value=0).reshape(-1, weights.shape[2])


def _walked(order: Array, count: Array, block: int, step: Callable[[Array, Array], Array], carry: Array) -> Array:
  """`step(ids, carry)` over the first `count` of `order`, a few at a time, filled up with what is past the end."""
  few, end = min(max(_ROWS // block, 1), len(order)), len(order)
  order = jnp.where(jnp.arange(end) < count, order, end)
  order = jnp.pad(order, (0, -end % few), constant_values=end)

  def body(i, carry):
    return step(jax.lax.dynamic_slice(order, (i * few,), (few,)), carry)

  return jax.lax.fori_loop(0, (count + few - 1) // few, body, carry)
