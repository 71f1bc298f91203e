"""Estimates attention by random features, and corrects the estimate on a few blocks: Scatterbrain.

    projections = orthogonal(key, d, features=32)
    y = scatter(q, k, v, of_mask(mask), projections, block=64)
"""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments
from sparsejax.argument_kinds import BLOCKS, POSITIVE, TIMES, shaped
from sparsejax.arguments import checked
from sparsejax.attention.masks import BlockIndex
from sparsejax.types import Array

_HEADS = shaped('[batch, T, heads, d]')
arguments.declare('scatter', q=_HEADS, k=_HEADS, v=_HEADS, index=BLOCKS, block=TIMES, scale=POSITIVE)
arguments.declare('kernel_features scatter', x=shaped('[..., d]'), projections=shaped('[m, d]'))


@checked
def orthogonal(key: Array, d: int, features: int) -> Array:
  """Returns random projections `float32[features, d]`: normal rows, orthogonal to each other in each group of d rows.
  """
  groups = -(-features // d)
  square, lengths = jax.random.split(key)
  q, _ = jnp.linalg.qr(jax.random.normal(square, (groups, d, d)))
  norms = jnp.linalg.norm(jax.random.normal(lengths, (groups * d, d)), axis=1)
  return (q.reshape(-1, d) * norms[:, None])[:features]


@checked
def kernel_features(x: Array, projections: Array) -> Array:
  """Returns the logarithms of positive features of `x [..., d]`: `float32[..., 2 m]` for `projections [m, d]`.

  The product of the features of q and of k is an unbiased estimate of `exp(q k)`, for normal projections: features are
  `exp(+-w x - |x|^2 / 2) / sqrt(2 m)` (Choromanski et al. 2021, 2009.14794, the variant of two signs). Scale q and k by
  `d^-1/4` before.
  """
  if projections.shape[1] != x.shape[-1]:
    raise ValueError(f'attention.kernel_features: projections {projections.shape} must be [m, d] for x [..., d] of '
                     f'shape {x.shape}, as attention.orthogonal makes them.')
  along = x.astype(jnp.float32) @ projections.T
  along = jnp.concatenate([along, -along], -1)
  half = jnp.sum(jnp.square(x.astype(jnp.float32)), -1, keepdims=True) / 2
  return along - half - math.log(along.shape[-1]) / 2


@checked
def scatter(q: Array, k: Array, v: Array, index: BlockIndex, projections: Array, block: int = 64,
            scale: float | None = None) -> Array:
  """Returns attention of `q [batch, T, heads, d]` by random features, exact on the listed blocks of keys.

  The result is `[batch, T, heads, dv]`.
  On the blocks of `index`, `exp(q k)` replaces the estimate, in the sum of values and in the sum that divides. For
  projections that `index` does not depend on, the estimate before the division is unbiased; the quotient is only
  consistent. Scatterbrain (Chen et al. 2021, 2110.15343). The authors' code clamps what the estimate leaves at 1e-24.
  This function takes the row's largest exponent out, and clamps nothing. `block` must divide
  T. Raises `ValueError` for other shapes. There is no causal form.
  """
  if v.shape[:-1] != k.shape[:-1] or (q.shape[0], *q.shape[2:]) != (
      k.shape[0], *k.shape[2:]):
    raise ValueError(f'attention.scatter: q {q.shape}, k {k.shape} and v {v.shape} must be [batch, T, heads, d] and, '
                     'but for d, like k.')
  batch, length, heads, d = q.shape
  if k.shape[1] % block or length % block or k.shape[2] != heads or index.index.ndim != 3:
    raise ValueError(f'attention.scatter: q {q.shape} and k {k.shape} must have equal heads, blocks of {block} must '
                     'divide both lengths, and the index must be int32[heads, nq, R].')
  root = math.sqrt(1 / math.sqrt(d) if scale is None else scale)
  first = lambda a: a.swapaxes(1, 2).astype(jnp.float32)
  q, k, v = first(q) * root, first(k) * root, first(v)
  of_q, of_k = kernel_features(q, projections), kernel_features(k, projections)
  top_q, top_k = of_q.max(-1, keepdims=True), of_k.max((-1, -2), keepdims=True)
  of_q, of_k = jnp.exp(of_q - top_q), jnp.exp(of_k - top_k)
  ones = jnp.concatenate([v, jnp.ones((*v.shape[:-1], 1))], -1)
  row = lambda a: a.reshape(batch, heads, -1, block, a.shape[-1])
  exact, estimate, listed = _listed(row(q), row(of_q), row(k), row(of_k), row(ones), index)
  exponent = row(top_q + top_k)
  largest = jnp.maximum(jnp.where(listed[0], exact, -jnp.inf).max(-1, keepdims=True), exponent)
  low = row(of_q @ (of_k.swapaxes(-1, -2) @ ones)) * jnp.exp(exponent - largest)
  change = jnp.exp(exact - largest) - estimate * jnp.exp(exponent - largest)
  total = low + jnp.where(listed[0], change, 0) @ listed[1]
  y = (total[..., :-1] / total[..., -1:]).reshape(batch, heads, length, -1)
  return y.swapaxes(1, 2)


def _listed(q: Array, of_q: Array, k: Array, of_k: Array, values: Array, index: BlockIndex) -> tuple[Any, Any, Any]:
  """Returns, for the listed keys of each block, the exponents, the estimates, and which count with their values."""
  heads = jnp.arange(k.shape[1])[:, None, None]
  taken = lambda a: a[:, heads, index.index].reshape(*a.shape[:2], index.index.shape[1], -1, a.shape[-1])
  product = lambda a, b: jnp.einsum('bhnqd,bhnkd->bhnqk', a, b)
  used = np.arange(index.index.shape[2])[None, None] < index.counts[..., None]
  count = jnp.repeat(used, k.shape[3], -1)[None, :, :, None]
  return product(q, taken(k)), product(of_q, taken(of_k)), (count, taken(values))
