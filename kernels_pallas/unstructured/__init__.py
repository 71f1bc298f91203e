"""Multiplies by a `CSCArray`, which has zeros anywhere: `unstructured_matmul`."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.unstructured import reference
from sparsejax.formats import CSCArray
from sparsejax.types import Array

# From these tokens and this sparsity on, the sparse routine is faster than a weight that was never packed.
_LEAST_TOKENS, _LEAST_SPARSITY = 64, 0.85
# Measured on one CPU core, float32, 1024 x 1024, 50 to 90 % sparsity: the sparse routine takes 0.085 ns for a value and
# a token. The dense product takes 0.02 ns for a weight and a token. Unpacking a value takes 6 ns, as long as 70 tokens.
_UNPACKED, _DENSE = 70, 0.02 / 0.085


def unstructured_matmul(x: Array, w: CSCArray, *, implementation: str | None = None,
                        explain: bool = False) -> Array | dispatch.Choices:
  """Returns `x [..., K]` times `w` with zeros anywhere: `[..., *outputs]`, in x's dtype, summed in float32.

  K is the length of the contracted axes of `w`, merged. The result is differentiable in `x` and `w.values`, to every
  order and in both modes. The gradient of the values has the shape of the values, but the dense gradient is computed on
  the way. NaN and infinity in `x` do not spread through zeros in 'xla'. In 'dense' they do, as in a dense product.

  `implementation` is 'xla' or 'dense', and raises `ValueError` if it cannot run. 'xla' is the sparse routine of XLA's
  CPU client, and on other platforms `jax.experimental.sparse`. 'dense' unpacks `w` inside of the program. There are no
  kernels for GPUs and TPUs. `None` chooses by `prefer`. `explain=True` returns the choice of each platform and its
  reason instead of the product. Raises `ValueError` with the `refusal` of `x` and `w`.
  """
  if reason := refusal(x, w):
    raise ValueError(f'unstructured_matmul: {reason}.')
  flat = products.as_matrix(x)
  if explain:
    return PRODUCT.explained(flat, w)
  shape = (*x.shape[:-1], *w.output_sizes)
  if 0 in flat.shape or 0 in shape:
    return jnp.zeros(shape, x.dtype)
  return PRODUCT(flat, w, math.prod(w.output_sizes), implementation).reshape(shape)


def refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `unstructured_matmul` cannot multiply `x` by `w` in any implementation, with the remedy, or `None`."""
  return products.refusal(x, w, CSCArray) or products.refused_stack(w, w.values.ndim != 1)


def prefer(*args: Array | CSCArray) -> Choice:
  """Returns the choice between 'xla' and 'dense' that was faster on a CPU (`make bench`).

  'dense' unpacks the weight again in each call.
  """
  tokens, density = args[0].shape[0], args[-1].density
  pays = tokens >= _LEAST_TOKENS and 1 - density >= _LEAST_SPARSITY
  slower = '' if pays else (f'; sparse pays from {_LEAST_SPARSITY:.0%} and {_LEAST_TOKENS} tokens on, and a weight '
                            'that is left dense, with its zeros, is faster here')
  if density * (tokens - _UNPACKED) > tokens * _DENSE:
    return Choice('dense', f'{1 - density:.0%} are zero, {tokens} tokens: unpacked{slower}')
  return Choice('xla', f'{1 - density:.0%} are zero, {tokens} tokens: the sparse routine of XLA on CPUs{slower}')


# The implementation 'dense' unpacks the weight inside of the program.


def _matrix(w: CSCArray) -> Array:
  empty = jnp.zeros((len(w.row_starts) - 1, len(w.starts) - 1), w.dtype)
  return empty.at[w.rows, w.cols].set(w.values, mode='promise_in_bounds')


PRODUCT = products.TrainableProduct(
    'unstructured_matmul',
    {'xla': Implementation(reference.matmul),
     'dense': Implementation(lambda x, w: products.dot(x, _matrix(w), 1, 0).astype(x.dtype))},
    {'xla': Implementation(reference.matmul_transposed),
     'dense': Implementation(lambda dy, w: products.dot(dy, _matrix(w), 1, 1).astype(dy.dtype))},
    {'xla': Implementation(reference.sampled)}, prefer)
