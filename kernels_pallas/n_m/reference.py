"""N:M products in plain `jnp`, for XLA on any platform. On CPUs fast where wide vectors share their positions.

Feature-major, as the block-sparse product is: for the outputs of one vector, `y^T[g] = W[:, g]^T x^T[rows of g]` is one
dot of what the group keeps. Where every output has positions of its own, that dot is of a single column: right, but
slower than dense; 'dense' is for those.
"""

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from sparsejax import neighbours
from sparsejax.formats import NMArray
from sparsejax.types import Array

FEW_TOKENS = 16  # up to here one batched dot
_SLAB = 512  # outputs of which the dense gradient is made at a time


def matmul(x: Array, w: NMArray) -> Array:
  """`x [M, K]` times `w [K, N]`: `[M, N]` in x's dtype, summed in float32."""
  rows, values = _rows(w), _by_vector(w.values, w)
  if x.shape[0] <= FEW_TOKENS:
    taken = x.at[:, rows].get(mode='promise_in_bounds')
    y = jnp.einsum('mgl,glv->mgv', taken, values, preferred_element_type=jnp.float32)
    return y.reshape(x.shape[0], -1).astype(x.dtype)
  inputs = x.T
  one = lambda args: products.dot(args[1], _taken(inputs, args[0]), 0, 0).astype(x.dtype)
  return jax.lax.map(one, (rows, values)).reshape(-1, x.shape[0]).T


def matmul_transposed(dy: Array, w: NMArray) -> Array:
  """`dy [M, N]` times the transpose of `w`: `[M, K]` in dy's dtype, summed in float32."""
  rows, values = _rows(w), _by_vector(w.values, w)
  outputs = dy.T.reshape(len(rows), w.width, -1)

  def add(dx, args):
    row, value, dy = args
    return dx.at[row].add(products.dot(value, dy, 1, 0), mode='promise_in_bounds', unique_indices=True), None

  zeros, *_ = dispatch.varying_alike(jnp.zeros((w.shape[0], dy.shape[0]), jnp.float32), dy, values)
  dx, _ = jax.lax.scan(add, zeros, (rows, values, outputs))
  return dx.T.astype(dy.dtype)


def sampled(x: Array, dy: Array, w: NMArray) -> Array:
  """What `x^T dy` has where `w` stores values, like these: one dot for each vector."""
  inputs, outputs = x.T, dy.T.reshape(-1, w.width, dy.shape[0])
  one = lambda args: products.dot(_taken(inputs, args[0]), args[1], 1, 1).astype(w.dtype)
  return jax.lax.map(one, (_rows(w), outputs)).transpose(1, 0, 2).reshape(w.values.shape)


def sampled_by_slab(x: Array, dy: Array, w: NMArray) -> Array:
  """The same from the dense `x^T dy`, of which no more than a slab of outputs exists at a time."""
  size = min(_SLAB, dy.shape[1])
  rows = _group_starts(w)[:, None] + w.positions().astype(jnp.int32)
  slabs = lambda a: jnp.pad(a, ((0, 0), (0, -a.shape[1] % size))).reshape(len(a), -1, size).transpose(1, 0, 2)
  one = lambda args: neighbours.take(products.dot(x, args[0], 0, 0), args[1], 0).astype(w.dtype)
  found = jax.lax.map(one, (slabs(dy), slabs(rows)))
  return found.transpose(1, 0, 2).reshape(len(rows), -1)[:, :dy.shape[1]]


def _group_starts(w: NMArray) -> Array:
  """The row in which each value's group begins."""
  return jnp.repeat(jnp.arange(w.shape[0] // w.m, dtype=jnp.int32) * w.m, w.n)


def _rows(w: NMArray) -> Array:
  """The rows that each vector keeps: `int32[N / width, K n / m]`."""
  positions = w.shared_positions() if w.width > 1 else w.positions()
  return (_group_starts(w)[:, None] + positions.astype(jnp.int32)).T


def _by_vector(values: Array, w: NMArray) -> Array:
  """`[N / width, K n / m, width]`."""
  return values.reshape(len(values), -1, w.width).transpose(1, 0, 2)


def _taken(inputs: Array, rows: Array) -> Array:
  return inputs.at[rows].get(mode='promise_in_bounds')
