"""Multiplies few tokens by an `ELLArray`, which has zeros anywhere: `ell_matmul`."""

import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.ell import reference
from sparsejax.formats import ELLArray
from sparsejax.types import Array

# Measured on a CPU, float32, 4096 x 4096: to gather and to multiply take 2.3 ns for a slot and a token. To unpack takes
# as long as about 16 tokens.
_MOST_TOKENS = 16


def ell_matmul(x: Array, w: ELLArray, *, implementation: str | None = None,
               explain: bool = False) -> Array | dispatch.Choices:
  """Returns `x [..., K]` times `w` with zeros anywhere: `[..., *outputs]`, in x's dtype, summed in float32.

  K is the length of the contracted axes of `w`, merged. The result is differentiable in `x` and `w.values`. The
  gradients unpack the weight, and compute the dense gradient on the way. NaN and infinity in `x` do not spread to
  outputs that store no weight for them.

  `implementation` is 'xla' or 'dense', and raises `ValueError` if it cannot run. 'xla' gathers the input of every
  stored weight, one token after another. 'dense' unpacks `w` inside of the program. There are no kernels for GPUs and
  TPUs. `None` chooses by `prefer`. `explain=True` returns the choice of each platform and its reason instead of the
  product. Raises `ValueError` with the `refusal` of `x` and `w`.
  """
  if reason := refusal(x, w):
    raise ValueError(f'ell_matmul: {reason}.')
  flat, shape = products.as_matrix(x), (*x.shape[:-1], *w.output_sizes)
  if explain:
    return PRODUCT.explained(flat, w)
  if 0 in flat.shape or 0 in shape:
    return jnp.zeros(shape, x.dtype)
  return PRODUCT(flat, w, math.prod(w.output_sizes), implementation).reshape(shape)


def refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `ell_matmul` cannot multiply `x` by `w` in any implementation, with the remedy, or `None`."""
  return products.refusal(x, w, ELLArray) or products.refused_stack(w, w.values.ndim != 2)


def prefer(*args: Array | ELLArray) -> Choice:
  """Returns the choice between 'xla' and 'dense' that was faster on a CPU (`make bench`)."""
  tokens = args[0].shape[0]
  if tokens > _MOST_TOKENS:
    return Choice('dense', f'{tokens} tokens: unpacked; slots pay up to {_MOST_TOKENS} tokens')
  return Choice('xla', f'{tokens} tokens: the inputs of all slots are gathered')


PRODUCT = products.TrainableProduct(
    'ell_matmul', {'xla': Implementation(reference.matmul), 'dense': Implementation(reference.matmul_unpacked)},
    dict.fromkeys(('xla', 'dense'), Implementation(reference.matmul_transposed)),
    dict.fromkeys(('xla', 'dense'), Implementation(reference.sampled)), prefer)
