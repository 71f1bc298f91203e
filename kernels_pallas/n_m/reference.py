"""Computes N:M products in plain `jnp`, for XLA on any platform. On CPUs they are fast where wide vectors share
positions.

Features come first. For the outputs g of one vector, `y^T[g] = W[:, g]^T x^T[rows of g]` is one dot over the rows that
the vector keeps. Where every output has positions of its own, the dot has a single column: the result is right, but
slower than dense. The implementation 'dense' is for such weights.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from sparsejax import neighbours
from sparsejax.formats import NMArray
from sparsejax.types import Array

FEW_TOKENS = 16  # tokens up to which the product is one batched dot
_SLAB = 512  # outputs of a slab of the dense gradient


def matmul(x: Array, w: NMArray) -> Array:
  """Returns `x [M, K]` times `w [K, N]`, `[M, N]` in x's dtype, summed in float32."""
  rows, values = _rows(w), _by_vector(w.values, w)
  if x.shape[0] <= FEW_TOKENS:
    taken = x.at[:, rows].get(mode='promise_in_bounds')
    y = jnp.einsum('mgl,glv->mgv', taken, values, preferred_element_type=jnp.float32)
    return y.reshape(x.shape[0], -1).astype(x.dtype)
  inputs = x.T
  outputs = lambda args: products.dot(args[1], _taken(inputs, args[0]), 0, 0).astype(x.dtype)
  return jax.lax.map(outputs, (rows, values)).reshape(-1, x.shape[0]).T


def matmul_transposed(dy: Array, w: NMArray) -> Array:
  """Returns `dy [M, N]` times the transpose of `w`, `[M, K]` in dy's dtype, summed in float32."""
  rows, values = _rows(w), _by_vector(w.values, w)
  outputs = dy.T.reshape(len(rows), w.width, -1)

  def add(dx, args):
    row, value, dy = args
    return dx.at[row].add(products.dot(value, dy, 1, 0), mode='promise_in_bounds', unique_indices=True), None

  zeros, *_ = dispatch.varying_alike(jnp.zeros((w.shape[0], dy.shape[0]), jnp.float32), dy, values)
  dx, _ = jax.lax.scan(add, zeros, (rows, values, outputs))
  return dx.T.astype(dy.dtype)


def sampled(x: Array, dy: Array, w: NMArray) -> Array:
  """Returns `x^T dy`, sampled at the stored positions, with the shape of `w.values`, by a dot for each vector."""
  inputs, outputs = x.T, dy.T.reshape(-1, w.width, dy.shape[0])
  gradient = lambda args: products.dot(_taken(inputs, args[0]), args[1], 1, 1).astype(w.dtype)
  return jax.lax.map(gradient, (_rows(w), outputs)).transpose(1, 0, 2).reshape(w.values.shape)


def sampled_by_slab(x: Array, dy: Array, w: NMArray) -> Array:
  """Returns the same as `sampled`, read from the dense `x^T dy`, of which at most one slab of outputs exists."""
  size = min(_SLAB, dy.shape[1])
  rows = _group_starts(w)[:, None] + w.positions().astype(jnp.int32)
  slabs = lambda a: jnp.pad(a, ((0, 0), (0, -a.shape[1] % size))).reshape(len(a), -1, size).transpose(1, 0, 2)
  gradient = lambda args: neighbours.take(products.dot(x, args[0], 0, 0), args[1], 0).astype(w.dtype)
  gradients = jax.lax.map(gradient, (slabs(dy), slabs(rows)))
  return gradients.transpose(1, 0, 2).reshape(len(rows), -1)[:, :dy.shape[1]]


def _group_starts(w: NMArray) -> Array:
  """Returns, for each row of values, the row of the weight in which its group begins."""
  return jnp.repeat(jnp.arange(w.shape[0] // w.m, dtype=jnp.int32) * w.m, w.n)


def _rows(w: NMArray) -> Array:
  """Returns the rows of the weight that each vector keeps, `int32[N / width, K n / m]`."""
  positions = w.shared_positions() if w.width > 1 else w.positions()
  return (_group_starts(w)[:, None] + positions.astype(jnp.int32)).T


def _by_vector(values: Array, w: NMArray) -> Array:
  """Returns the values of each vector, `[N / width, K n / m, width]`."""
  return values.reshape(len(values), -1, w.width).transpose(1, 0, 2)


def _taken(inputs: Array, rows: Array) -> Array:
  return inputs.at[rows].get(mode='promise_in_bounds')
