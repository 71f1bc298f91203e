"""Holds initializers of weights that a sparse model may start from, in the signature of `jax.nn.initializers`.

    layer = flax.linen.Dense(256, kernel_init=sparsejax.inits.zero())
    inits.zero()(None, (3, 2))         # [[1, 0], [0, 1], [0, 0]]
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from sparsejax.arguments import checked
from sparsejax.types import Array

__all__ = ['zero']


@checked
def zero() -> Callable[..., Array]:
  """Returns the initializer `(key, shape, dtype) -> kernel` of ZerO, which draws nothing (Zhao et al. 2021).

  2110.12661, algorithm 1. A kernel `[in, out]` that does not widen starts as a partial identity. A kernel that widens
  starts as the corner of a Hadamard matrix of order p, divided by sqrt(p). The order is the least power of two from
  `out` on. A partial identity alone would leave the rank at `in`. A convolution kernel `[*spatial, in, out]` starts
  with this matrix at one tap, of index `length // 2` along each spatial axis, and with zeros elsewhere. The paper
  gives no rule for an even length, and the authors' code covers matrices alone. `key` is not read.

  The paper further sets the last layer of each residual branch, and every bias, to zero: `jax.nn.initializers.zeros`.
  Magnitudes of such a start tie almost everywhere, so that pruning at initialisation needs a score with a gradient.
  Raises `ValueError` for shapes of rank 0 or 1, and for a dtype that is not floating.
  """
  return _zero


def _zero(key: Any, shape: Sequence[int], dtype: Any = jnp.float32) -> Array:
  del key
  if len(shape) < 2 or not jnp.issubdtype(dtype, jnp.floating):
    raise ValueError(f'inits.zero: shape {tuple(shape)} of {jnp.dtype(dtype)}: kernels are [in, out] or [*spatial, in, '
                     'out], of a floating dtype; a bias starts at zero by jax.nn.initializers.zeros.')
  *spatial, inputs, outputs = shape
  matrix = np.eye(inputs, outputs) if outputs <= inputs else _hadamard(inputs, outputs)
  kernel = np.zeros(shape)
  kernel[tuple(length // 2 for length in spatial)] = matrix
  return jnp.asarray(kernel, dtype)


def _hadamard(inputs: int, outputs: int) -> np.ndarray:
  """Returns the corner `[inputs, outputs]` of the orthonormal Hadamard matrix, whose signs are parities of i AND j."""
  order = math.ceil(math.log2(outputs))
  both = np.arange(inputs)[:, None] & np.arange(outputs)
  odd = sum((both >> bit) & 1 for bit in range(max(order, 1))) % 2
  return np.asarray((1.0 - 2.0 * odd) / 2 ** (order / 2))
