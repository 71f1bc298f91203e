"""Products with a `CSCArray`, zeros anywhere: `unstructured_matmul`."""

from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.unstructured import reference
from sparsejax.formats import CSCArray
from sparsejax.types import Array

_LEAST_TOKENS, _LEAST_SPARSITY = 64, 0.85  # from here on faster than a weight that was never packed
# One CPU core, float32, 1024 x 1024, of 50 to 90 % sparsity: a value and a token take the sparse routine 0.085 ns, a
# dense weight and a token 0.02 ns, and unpacking a value 6 ns, as long as 70 tokens.
_UNPACKED, _DENSE = 70, 0.02 / 0.085


def unstructured_matmul(x: Array, w: CSCArray, *, implementation: str | None = None,
                        explain: bool = False) -> Array | dispatch.Explanation:
  """`x [..., K]` times `w` with zeros anywhere, over its contracted axes merged: `[..., *outputs]`, in x's dtype.

  Sums are float32. Differentiable in `x` and `w.values`; the gradient of the values is of their shape, but the dense
  product that it is read from is made on the way. `implementation` is 'xla', the sparse routine of XLA's CPU client
  (elsewhere what `jax.experimental.sparse` has), or 'dense', which unpacks `w` inside of the program; they run or raise
  `ValueError`. `None` chooses, and `explain=True` returns what it would choose, and why. There are no kernels for GPUs
  and TPUs.
  """
  if reason := refusal(x, w):
    raise ValueError(f'unstructured_matmul: {reason}.')
  flat = x.reshape(-1, x.shape[-1])
  if explain:
    return PRODUCT.explained(flat, w)
  shape = (*x.shape[:-1], *w.output_sizes)
  if 0 in flat.shape or 0 in shape:
    return jnp.zeros(shape, x.dtype)
  return PRODUCT(flat, w, implementation).reshape(shape)


def refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `unstructured_matmul` cannot multiply `x` by `w` in any implementation, with the remedy, or `None`."""
  return products.refusal(x, w, CSCArray) or products.refused_stack(w, w.values.ndim != 1)


def prefer(*args: Array | CSCArray) -> Choice:
  """'xla' or 'dense', by what was measured on a CPU (`make bench`): a weight is unpacked anew in each call."""
  tokens, density = args[0].shape[0], args[-1].density
  pays = tokens >= _LEAST_TOKENS and 1 - density >= _LEAST_SPARSITY
  slower = '' if pays else (f'; sparse pays from {_LEAST_SPARSITY:.0%} and {_LEAST_TOKENS} tokens on, and a weight '
                            'that is left dense, with its zeros, is faster here')
  if density * (tokens - _UNPACKED) > tokens * _DENSE:
    return Choice('dense', f'{1 - density:.0%} are zero, {tokens} tokens: unpacked{slower}')
  return Choice('xla', f'{1 - density:.0%} are zero, {tokens} tokens: the sparse routine of XLA on CPUs{slower}')


# 'dense': the weight unpacked inside of the program.


def _matrix(w: CSCArray) -> Array:
  empty = jnp.zeros((len(w.row_starts) - 1, len(w.starts) - 1), w.dtype)
  return empty.at[w.rows, w.cols].set(w.values, mode='promise_in_bounds')


PRODUCT = products.Product(
    'unstructured_matmul',
    {'xla': Implementation(reference.matmul),
     'dense': Implementation(lambda x, w: products.dot(x, _matrix(w), 1, 0).astype(x.dtype))},
    {'xla': Implementation(products.both(reference.matmul_transposed, reference.sampled)),
     'dense': Implementation(products.both(
         lambda dy, w: products.dot(dy, _matrix(w), 1, 1).astype(dy.dtype), reference.sampled))}, prefer)
