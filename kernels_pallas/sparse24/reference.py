"""Computes the product with a 2:4 weight in plain `jnp`: unpacks the weight inside of the program, as fast as dense."""

import jax
import jax.numpy as jnp

from kernels_pallas.products import dot
from sparsejax import neighbours
from sparsejax.formats import Sparse24Array, sparse24
from sparsejax.types import Array

_SLAB = 1024  # outputs of a slab of the dense gradient


def matmul(x: Array, w: Sparse24Array) -> Array:
  """Returns `x [M, Kp]` times `w`, `[M, Np]` in x's dtype, summed in float32. `x` is padded to Kp like `w`."""
  return dot(x, _matrix(w).astype(x.dtype), 1, 1).astype(x.dtype)


def matmul_transposed(dy: Array, w: Sparse24Array) -> Array:
  """Returns `dy [M, Np]` times the transpose of `w`, `[M, Kp]` in dy's dtype, summed in float32."""
  return dot(dy, _matrix(w).astype(dy.dtype), 1, 0).astype(dy.dtype)


def sampled(x: Array, dy: Array, w: Sparse24Array) -> Array:
  """Returns `x^T dy`, sampled at the stored positions, with the shape and dtype of `w.values`.

  At most one slab of outputs of the dense gradient exists at a time.
  """
  size, positions = min(_SLAB, dy.shape[1]), w.positions()

  def gradient(args):
    dy, positions = args
    taken = neighbours.take(neighbours.split(dot(dy, x, 0, 0), 4, 1), neighbours.split(positions, 2, 1), 2)
    return neighbours.joined(taken, 2).astype(w.dtype)

  slabs = lambda a: jnp.pad(a, ((0, -len(a) % size), (0, 0))).reshape(-1, size, a.shape[1])
  args = slabs(dy.T).swapaxes(1, 2), slabs(positions)
  return jax.lax.map(gradient, args).reshape(-1, positions.shape[1])[:len(positions)]


def _matrix(w: Sparse24Array) -> Array:
  """Returns the dense weight, transposed and padded, `[Np, Kp]`."""
  return neighbours.exactly(sparse24.dense_transposed, w.values, w.positions())
