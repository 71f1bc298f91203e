"""Computes activation-sparse products in plain `jnp`: blocks of rows of the weight that meet only zeros are not read.

A loop takes a few active blocks at each step. A step copies their rows, which stay in the cache, and computes one dot.
The number of steps depends on the data, so nothing is padded up to the capacity. The capacity is the number of active
blocks up to which the loop is faster than the dense product.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from sparsejax.types import Array

_ROWS = 128  # rows of the weight of a step


def active_blocks(x: Array, block: int) -> tuple[Array, Array]:
  """Returns the blocks of `x [M, K]`, active blocks first, `int32[K / block]`, and the number of active blocks.

  A block is active if any token has a nonzero in the block.
  """
  nonzero = jnp.any((x != 0).reshape(x.shape[0], -1, block), (0, 2))
  order = jnp.argsort(~nonzero, stable=True)
  return order.astype(jnp.int32), jnp.sum(nonzero, dtype=jnp.int32)


def matmul(x: Array, w: Array, block: int, capacity: int) -> Array:
  """Returns `x [M, K]`, mostly zeros, times `w [K, N]`: `[M, N]` in x's dtype, summed in float32.

  If more than `capacity` blocks are active, the product is computed dense.
  """
  order, count = active_blocks(x, block)
  inputs, weights = x.reshape(len(x), -1, block), w.reshape(-1, block, w.shape[1])

  def add(ids, y):
    taken = inputs.at[:, ids].get(mode='fill', fill_value=0).reshape(len(x), -1)
    return y + products.dot(taken, _rows(weights, ids), 1, 0)

  zeros, *_ = dispatch.varying_alike(jnp.zeros((len(x), w.shape[1]), jnp.float32), x, w)
  few = lambda: _walked(order, count, block, add, zeros).astype(x.dtype)
  return jax.lax.cond(count <= capacity, few, lambda: dense(x, w))


def matmul_transposed(dy: Array, x: Array, w: Array, block: int, capacity: int) -> Array:
  """Returns `dy [M, N]` times the transpose of `w` at the active blocks of `x [M, K]`, and zeros elsewhere: `[M, K]`.

  If more than `capacity` blocks are active, all blocks are computed.
  """
  order, count = active_blocks(x, block)
  weights = w.reshape(-1, block, w.shape[1])

  def put(ids, dx):
    blocks = products.dot(dy, _rows(weights, ids), 1, 1)
    return dx.at[:, ids].set(blocks.reshape(len(dy), -1, block), mode='drop')

  zeros, *_ = dispatch.varying_alike(jnp.zeros((len(dy), len(weights), block), jnp.float32), dy, w)
  few = lambda: _walked(order, count, block, put, zeros)
  every = lambda: products.dot(dy, w, 1, 1).reshape(len(dy), -1, block)
  return jax.lax.cond(count <= capacity, few, every).reshape(x.shape).astype(dy.dtype)


def dense(x: Array, w: Array) -> Array:
  """Returns the dense product of `x [M, K]` and `w [K, N]`, `[M, N]` in x's dtype."""
  return products.dot(x, w, 1, 0).astype(x.dtype)


def dense_transposed(x: Array, w: Array) -> Array:
  """Returns the dense product of `x [M, K]` and the transpose of `w [N, K]`, `[M, N]` in x's dtype."""
  return products.dot(x, w, 1, 1).astype(x.dtype)


def scattered_blocks(found: Array, order: Array, count: Array) -> Array:
  """Returns the first `count` blocks of `found [M, listed, block]` at their places in `order`, and zeros elsewhere.

  The result is `[M, N]`. Blocks from `count` on may hold anything.
  """
  at = jnp.argsort(order)
  blocks = jnp.where((at < count)[:, None], found[:, at], jnp.zeros((), found.dtype))
  return blocks.reshape(len(found), -1)


def blocks_of_step(block: int, blocks: int) -> int:
  """Returns how many blocks a step of the loop takes."""
  return min(max(_ROWS // block, 1), blocks)


def _rows(weights: Array, ids: Array) -> Array:
  """Returns the rows of the blocks `ids` of `[K / block, block, N]`, and zeros for a block past the end."""
  return weights.at[ids].get(mode='fill', fill_value=0).reshape(-1, weights.shape[2])


def _walked(order: Array, count: Array, block: int, step: Callable[[Array, Array], Array], carry: Array) -> Array:
  """Returns the carry of `step(ids, carry)` over the first `count` blocks of `order`, a few blocks at a time.

  The last step is padded with the number of a block past the end.
  """
  few, end = blocks_of_step(block, len(order)), len(order)
  order = jnp.where(jnp.arange(end) < count, order, end)
  order = jnp.pad(order, (0, -end % few), constant_values=end)

  def body(i, carry):
    return step(jax.lax.dynamic_slice(order, (i * few,), (few,)), carry)

  return jax.lax.fori_loop(0, (count + few - 1) // few, body, carry)
