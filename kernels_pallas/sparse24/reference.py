"""The product with a 2:4 weight in plain `jnp`: unpacked inside of the program. As fast as dense, not faster."""

from kernels_pallas.products import dot
from sparsejax import groups
from sparsejax.formats import Sparse24Array, sparse24
from sparsejax.types import Array


def matmul(x: Array, w: Sparse24Array) -> Array:
  """`x [M, Kp]`, filled up as `w` is, times `w`: `[M, Np]` in x's dtype, summed in float32."""
  return dot(x, _matrix(w).astype(x.dtype), 1, 1).astype(x.dtype)


def matmul_transposed(dy: Array, w: Sparse24Array) -> Array:
  """`dy [M, Np]` times the transpose of `w`: `[M, Kp]` in dy's dtype, summed in float32."""
  return dot(dy, _matrix(w).astype(dy.dtype), 1, 0).astype(dy.dtype)


def sampled(x: Array, dy: Array, w: Sparse24Array) -> Array:
  """What x^T dy has where `w` stores values: shape and dtype of `w.values`. Makes the dense gradient."""
  fours = groups.split(dot(dy, x, 0, 0), 4, 1)
  places = groups.split(w.positions(), 2, 1)
  return groups.joined(groups.take(fours, places, 2), 2).astype(w.dtype)


def _matrix(w: Sparse24Array) -> Array:
  """`[Np, Kp]`."""
  return groups.exactly(sparse24.matrices, w.values, w.positions())
