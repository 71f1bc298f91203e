"""Finds `-0.0` by its bits: floating-point units may take subnormals for zeros, and some dtypes have NaN in its place.

    zeros.minus_zero('bfloat16')                       # 0x8000
    zeros.without_signed_zeros(jnp.array([-0.0, 1]))   # [0.0, 1.0]
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import neighbours
from sparsejax.types import Array


@functools.cache
def minus_zero(dtype: Any) -> int:
  """Returns the bits of `-0.0` in `dtype`, or 0 if the dtype has no such number: `float8_e4m3fnuz` has NaN there."""
  if not jnp.issubdtype(dtype, jnp.floating):
    return 0
  dtype = np.dtype(dtype)
  top = np.array(1 << 8 * dtype.itemsize - 1, f'u{dtype.itemsize}')
  return int(top) * bool(top.view(dtype) == 0)


@jax.custom_jvp
def without_signed_zeros(w: Array) -> Array:
  """Returns `w` with `-0.0` replaced by `0.0`, and every other bit as it is. The derivative is that of the identity."""
  negative = minus_zero(w.dtype)
  if not negative:
    return w
  bits = neighbours.bits(w)
  return neighbours.from_bits(jnp.where(bits == bits.dtype.type(negative), bits.dtype.type(0), bits), w.dtype)


without_signed_zeros.defjvp(lambda primals, tangents: (without_signed_zeros(*primals), tangents[0]))
