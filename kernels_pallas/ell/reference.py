"""Computes products with an `ELLArray` in plain `jnp`: gathers the input of every slot, and sums over the slots.

XLA's CPU client computes the gather, the product and the sum in one loop over the stored weights. The loop is fast only
in two dimensions, `[slots, outputs]`, so the tokens run one after another.
"""

import jax.numpy as jnp

from kernels_pallas import products
from sparsejax import neighbours
from sparsejax.formats import ELLArray
from sparsejax.types import Array


def matmul(x: Array, w: ELLArray) -> Array:
  """Returns `x [M, K]` times `w [K, N]`, `[M, N]` in x's dtype, summed in float32."""
  inputs = jnp.pad(x, ((0, 0), (0, 1)))  # Row K, that of slots without a weight, is zero.

  def token(inputs):
    taken = inputs.at[w.rows.astype(jnp.int32)].get(mode='promise_in_bounds')
    return jnp.sum(taken.astype(jnp.float32) * w.values.astype(jnp.float32), 0).astype(x.dtype)

  return products.each_token(token, inputs)


def matmul_unpacked(x: Array, w: ELLArray) -> Array:
  """Returns the same as `matmul`, by a dense product."""
  return products.dot(x, _matrix(w), 1, 0).astype(x.dtype)


def matmul_transposed(dy: Array, w: ELLArray) -> Array:
  """Returns `dy [M, N]` times the transpose of `w`, `[M, K]` in dy's dtype, summed in float32."""
  return products.dot(dy, _matrix(w), 1, 1).astype(dy.dtype)


def sampled(x: Array, dy: Array, w: ELLArray) -> Array:
  """Returns `x^T dy` at the rows of `w`, with the shape and dtype of `w.values`, and zero where no weight is stored."""
  dense = jnp.pad(products.dot(x, dy, 0, 0), ((0, 1), (0, 0)))
  return neighbours.take(dense, w.rows, 0).astype(w.dtype)


def _matrix(w: ELLArray) -> Array:
  return w.scattered(w.values, w.rows)
