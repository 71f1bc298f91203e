"""Multiplies by a `Sparse24Array`, 2:4 in the layout that the sparse tensor cores of Hopper read: `sparse24_matmul`."""

import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp

from kernels_pallas import dispatch, products
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.sparse24 import reference
from sparsejax.formats import Sparse24Array
from sparsejax.types import Array


def sparse24_matmul(x: Array, w: Sparse24Array, *, implementation: str | None = None,
                    explain: bool = False) -> Array | dispatch.Choices:
  """Returns `x [..., K]` times the 2:4 weight `w`: `[..., *outputs]`, in x's dtype, summed in float32.

  K is the length of the contracted axes of `w`, merged. The result is differentiable in `x` and `w.values`, by XLA, to
  every order and in both modes. The gradient of `x` unpacks the weight. The gradient of the values reads the dense
  gradient by slabs of outputs. In 'xla', NaN and infinity in `x` spread through zeros, as in a dense product.

  `implementation` is 'xla', which unpacks inside of the program, or 'mosaic_gpu', and raises `ValueError` if it cannot
  run. `None` lets the platform choose when the program is lowered. `explain=True` returns the choice of each platform
  and its reason instead of the product. Where the number of outputs is no multiple of 128, the kernel pads a copy of
  the weight. Raises `ValueError` with the `refusal` of `x` and `w`.
  """
  if reason := refusal(x, w):
    raise ValueError(f'sparse24_matmul: {reason}.')
  flat, length = products.as_matrix(x), 2 * w.values.shape[1]
  flat = jnp.pad(flat, ((0, 0), (0, length - flat.shape[1])))
  if explain:
    return PRODUCT.explained(flat, w)
  outputs = math.prod(w.output_sizes)
  if 0 in flat.shape or outputs == 0:
    return jnp.zeros((*x.shape[:-1], *w.output_sizes), x.dtype)
  return PRODUCT(flat, w, len(w.values), implementation)[:, :outputs].reshape(*x.shape[:-1], *w.output_sizes)


def refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `sparse24_matmul` cannot multiply `x` by `w` in any implementation, with the remedy, or `None`."""
  return products.refusal(x, w, Sparse24Array) or products.refused_stack(w, w.values.ndim != 2)


def prefer(*args: Any) -> Choice:
  """Returns the choice 'xla': only the sparse tensor cores of Hopper are faster at 2:4 than a dense product."""
  return Choice('xla', 'only the sparse tensor cores of Hopper are faster at 2:4 than a dense product')


def _load() -> Any:
  """Returns the module of the kernel, which is imported at its first use: importing Pallas takes a second."""
  return importlib.import_module('kernels_pallas.sparse24.gpu')


PRODUCT = products.TrainableProduct(
    'sparse24_matmul',
    {'xla': Implementation(reference.matmul),
     'mosaic_gpu': Implementation(lambda x, w: _load().matmul(x, w), lambda x, w: _load().refusal(x, w))},
    {'xla': Implementation(reference.matmul_transposed)}, {'xla': Implementation(reference.sampled)}, prefer)
