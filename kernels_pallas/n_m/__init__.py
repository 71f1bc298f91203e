"""Multiplies by an `NMArray`, which keeps N of every M neighbours along the contraction: `nm_matmul`."""

import dataclasses
import importlib
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch, products
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.n_m import reference
from sparsejax.formats import NMArray, n_m
from sparsejax.types import Array

# From this width and this sparsity on, 'xla' is faster on a CPU than unpacking, by 1.3 to 5 times. With many tokens,
# 'xla' is also faster than a weight that was never packed (one core, float32, 1024 x 1024).
_WIDTH, _LEAST = 32, 0.4
# Where every output has positions of its own, 'xla' selects the inputs, token after token: faster than unpacking up to
# so many stored values times tokens for each weight.
_SELECTED = 2


def nm_matmul(x: Array, w: NMArray, *, implementation: str | None = None,
              explain: bool = False) -> Array | dispatch.Choices:
  """Returns `x [..., K]` times the N:M weight `w`: `[..., *outputs]`, in x's dtype, summed in float32.

  K is the length of the contracted axes of `w`, merged. The result is differentiable in `x` and `w.values`, to every
  order and in both modes. At most a slab of the dense gradient exists at a time. NaN and infinity in `x` do not spread
  through positions that 'xla' does not store. In the other implementations they do, as in a dense product.

  `implementation` is 'xla', 'dense' or 'mosaic_tpu', and raises `ValueError` if it cannot run. 'xla' computes one dot
  for the outputs that share their positions, or selects the inputs of each output, one token after another. 'dense'
  unpacks `w` inside of the program. `None` lets the platform choose when the program is lowered. `explain=True` returns
  the choice of each platform and its reason instead of the product. On CPUs N:M is faster than dense for vectors
  (`NM(n, m, width)`) of 32 and more, and for few tokens from about 1:8 on. Raises `ValueError` with the `refusal` of
  `x` and `w`.
  """
  if reason := refusal(x, w):
    raise ValueError(f'nm_matmul: {reason}.')
  _, _, places = w.value_axes()
  flat, matrix = products.as_matrix(x), _matrix(w)
  if explain:
    return PRODUCT.explained(flat, matrix)
  outputs = [w.values.shape[a] for a in places]
  if 0 in flat.shape or 0 in outputs:
    y = jnp.zeros((flat.shape[0], math.prod(outputs)), x.dtype)
  else:
    y = PRODUCT(flat, matrix, math.prod(outputs), implementation)
  lead = x.ndim - 1
  order = [*range(lead), *(lead + np.argsort(places))]
  return y.reshape(*x.shape[:-1], *outputs).transpose(order)


def refusal(x: Array | jax.ShapeDtypeStruct, w: Any) -> str | None:
  """Returns why `nm_matmul` cannot multiply `x` by `w` in any implementation, with the remedy, or `None`."""
  return products.refusal(x, w, NMArray) or products.refused_stack(w, bool(w.value_axes()[0]))


def prefer(*args: Any) -> Choice:
  """Returns the choice between 'xla' and 'dense' that was faster on a CPU (`make bench`)."""
  w, zeros = args[-1], 1 - args[-1].n / args[-1].m
  if w.width == 1 and len(args[0]) * w.n <= _SELECTED * w.m:
    return Choice('xla', f'{len(args[0])} tokens and {zeros:.0%} zeros: the inputs of each output are selected')
  if w.width < _WIDTH:
    return Choice('dense', f'{w.width} outputs share their positions: unpacked. On CPUs N:M is faster than dense '
                           f'in vectors of {_WIDTH} and more, and for few tokens')
  if zeros < _LEAST:
    return Choice('dense', f'{zeros:.0%} are zero, and vectors pay from {_LEAST:.0%} on')
  return Choice('xla', f'{zeros:.0%} are zero, in vectors of {w.width}: one dot for each')


def _matrix(w: NMArray) -> NMArray:
  """Returns `w` as `[K, N]`, with the outputs of a vector next to each other."""
  _, contracted, outputs = w.value_axes()
  columns = lambda a: math.prod(a.shape[i] for i in outputs)
  flat = lambda a: a.transpose(contracted, *outputs).reshape(a.shape[contracted], columns(a))
  indices = flat(w.indices) if w.width == 1 else w.indices
  return dataclasses.replace(w, values=flat(w.values), indices=indices, axes=(-2,), sizes=(math.prod(w.sizes),),
                             outputs=(-1,) if w.width > 1 else ())


def _kernel(module: str) -> Implementation:
  """Returns the implementation of a module, which is imported at its first use: importing Pallas takes a second."""
  load = lambda: importlib.import_module(f'kernels_pallas.n_m.{module}')
  return Implementation(lambda x, w: load().matmul(x, w), lambda x, w: load().refusal(x, w))


def _none_for_hopper(x: Array, w: NMArray) -> str:
  """Returns why there is no kernel for Hopper, with the remedy, so that the function in its entry never runs."""
  del x
  if (w.n, w.m, w.width) == (2, 4, 1):
    return ("Hopper's sparse tensor cores read 2:4 in an order of their own; pack it as 'sparse24', a "
            'formats.Sparse24Array, and call sparse24_matmul')
  return (f"Hopper's sparse tensor cores multiply 2:4 only, not {w.n}:{w.m}"
          f'{f" in vectors of {w.width}" if w.width > 1 else ""}; prune to 2:4, or leave it to XLA')


PRODUCT = products.TrainableProduct(
    'nm_matmul',
    {'xla': Implementation(reference.matmul),
     'dense': Implementation(lambda x, w: products.dot(x, n_m.to_merged(w), 1, 0).astype(x.dtype)),
     'mosaic_gpu': Implementation(reference.matmul, _none_for_hopper), 'mosaic_tpu': _kernel('tpu')},
    {'xla': Implementation(reference.matmul_transposed),
     'dense': Implementation(lambda dy, w: products.dot(dy, n_m.to_merged(w), 1, 1).astype(dy.dtype))},
    {'xla': Implementation(reference.sampled), 'dense': Implementation(reference.sampled_by_slab)}, prefer)
