"""Computes N:M products in plain `jnp`, for XLA on any platform.

Where wide vectors share positions, features come first. For the outputs g of one vector,
`y^T[g] = W[:, g]^T x^T[rows of g]` is one dot over the rows that the vector keeps.

Where every output has positions of its own, the bits of a position select one of the M inputs of the group. XLA's CPU
client computes the selection, the product and the sum in one loop over the stored weights. The loop is fast only in two
dimensions, `[values, outputs]`, so the tokens run one after another.
"""

import functools

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from sparsejax import neighbours
from sparsejax.formats import NMArray, n_m
from sparsejax.types import Array

FEW_TOKENS = 16  # tokens up to which the product is one batched dot
_SLAB = 512  # outputs of a slab of the dense gradient
_SELECTED = 32  # the largest M up to which inputs are selected; above, a gather is faster


def matmul(x: Array, w: NMArray) -> Array:
  """Returns `x [M, K]` times `w [K, N]`, `[M, N]` in x's dtype, summed in float32."""
  if w.width == 1:
    return products.each_token(functools.partial(_selected, w=w), x)
  rows, values = _rows(w), _by_vector(w.values, w)
  if x.shape[0] <= FEW_TOKENS:
    taken = x.at[:, rows].get(mode='promise_in_bounds')
    y = jnp.einsum('mgl,glv->mgv', taken, values, preferred_element_type=jnp.float32)
    return y.reshape(x.shape[0], -1).astype(x.dtype)
  inputs = x.T
  outputs = lambda args: products.dot(args[1], _taken(inputs, args[0]), 0, 0).astype(x.dtype)
  return jax.lax.map(outputs, (rows, values)).reshape(-1, x.shape[0]).T


def matmul_transposed(dy: Array, w: NMArray) -> Array:
  """Returns `dy [M, N]` times the transpose of `w`, `[M, K]` in dy's dtype, summed in float32.

  Where every output has positions of its own, the weight is unpacked.
  """
  if w.width == 1:
    return products.dot(dy, n_m.to_merged(w), 1, 1).astype(dy.dtype)
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
  if w.width == 1:
    return sampled_by_slab(x, dy, w)
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


def _selected(x: Array, w: NMArray) -> Array:
  """Returns `x [K]` times `w`, of which every output has positions of its own: `[N]` in x's dtype."""
  if w.m > _SELECTED:
    taken = x.at[_rows(w).T].get(mode='promise_in_bounds')
  else:
    # The barrier keeps XLA from repeating the inputs anew for each output.
    inputs = jax.lax.optimization_barrier(jnp.repeat(x.reshape(-1, w.m), w.n, 0))
    candidates = [inputs[:, i, None] for i in range(w.m)]
    for bit in _bits(w):
      pairs = zip(candidates[::2], [*candidates[1::2], *candidates[-1:]])  # the last candidate may have no partner
      candidates = [jnp.where(bit, odd, even) for even, odd in pairs]
    taken = candidates[0]
  return jnp.sum(taken.astype(jnp.float32) * w.values.astype(jnp.float32), 0).astype(x.dtype)


def _bits(w: NMArray) -> list[Array]:
  """Returns the bits of the positions, the lowest first: arrays of bools like `w.values`, read straight from `indices`.
  """
  octets = w.indices.reshape(-(-len(w.values) // 8), neighbours.width(w.m), 1, w.values.shape[1])
  masks = (jnp.uint8(1) << jnp.arange(8, dtype=jnp.uint8))[None, :, None]
  return [((octets[:, i] & masks) != 0).reshape(-1, w.values.shape[1])[:len(w.values)]
          for i in range(neighbours.width(w.m))]


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
