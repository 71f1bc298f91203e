"""Computes products with zeros anywhere by the sparse routine of XLA's CPU client, through `jax.experimental.sparse`.

The routine multiplies compressed rows by a dense matrix in float32; here it computes `W^T x^T`. The routine reads a row
of `x^T` for each value, so it pays only with several tokens: a single token takes longer than eight.
"""

import jax
import jax.numpy as jnp
from jax.experimental import sparse

from kernels_pallas import dispatch, products
from sparsejax.formats import CSCArray
from sparsejax.types import Array


def matmul(x: Array, w: CSCArray) -> Array:
  """Returns `x [M, K]` times `w [K, N]`, `[M, N]` in x's dtype, summed in float32."""
  return _rows_times(x, w.values, w.rows, w.starts)


def matmul_transposed(dy: Array, w: CSCArray) -> Array:
  """Returns `dy [M, N]` times the transpose of `w`, `[M, K]` in dy's dtype, summed in float32."""
  by_row = lambda a: a.at[w.order].get(mode='promise_in_bounds')
  return _rows_times(dy, by_row(w.values), by_row(w.cols), w.row_starts)


def sampled(x: Array, dy: Array, w: CSCArray) -> Array:
  """Returns `x^T dy`, sampled at the stored positions, with the shape of `w.values`.

  The dense gradient is computed on the way: on CPUs nothing is faster.
  """
  dense = products.dot(dy, x, 0, 0).reshape(-1)  # transposed, so that values are read in the order of memory
  return dense.at[w.cols * x.shape[1] + w.rows].get(mode='promise_in_bounds').astype(w.dtype)


_LEAST = 8  # tokens to which fewer tokens are padded
_SLAB, _SLABS = 8 << 20, 8  # bytes of a slab of x, which stays in the cache, and the most slabs


@jax.custom_batching.custom_vmap
def _rows_times(x: Array, values: Array, indices: Array, starts: Array) -> Array:
  """Returns `x [M, K]` times the transpose of the compressed rows, `[N, K]`: `[M, N]` in x's dtype."""
  rows = sparse.BCSR((values.astype(jnp.float32), indices, starts), shape=(len(starts) - 1, x.shape[1]))
  filled = jnp.pad(x, ((0, max(_LEAST - x.shape[0], 0)), (0, 0))).astype(jnp.float32)
  slabs = jnp.array_split(filled, min(-(-filled.nbytes // _SLAB), _SLABS))
  y = jnp.concatenate([(rows @ slab.T).T for slab in slabs])[:x.shape[0]].astype(x.dtype)
  return dispatch.varying_alike(y, x, values)[0]  # Within `shard_map`, the routine does not mark its result.


@_rows_times.def_vmap
def _batched(size, batched, x, *arrays):
  """Returns the batched product, and that it is batched: the sparse routine itself has no batches.

  If only `x` is batched, its examples are more tokens. Otherwise the examples run one after the other.
  """
  if batched[0] and not any(batched[1:]):
    return _rows_times(x.reshape(size * x.shape[1], -1), *arrays).reshape(size, x.shape[1], -1), True
  take = lambda i: [a[i] if b else a for a, b in zip((x, *arrays), batched)]
  return jax.lax.map(lambda i: _rows_times(*take(i)), jnp.arange(size)), True
