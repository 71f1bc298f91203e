"""Products with an `NMArray`, N of every M neighbours along the contraction: `nm_matmul`."""

import dataclasses
import importlib
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch, products
from kernels_pallas.dispatch import Choice, Implementation
from kernels_pallas.n_m import reference
from sparsejax.formats import NMArray, n_m
from sparsejax.types import Array

# From here on 'xla' is faster on a CPU than unpacking, by 1.3 to 5 times, and with many tokens than a weight that was
# never packed (one core, float32, 1024 x 1024).
_WIDTH, _LEAST = 32, 0.4


def nm_matmul(x: Array, w: NMArray, *, implementation: str | None = None,
              explain: bool = False) -> Array | dispatch.Explanation:
  """`x [..., K]` times the N:M weight `w`, over its contracted axes merged: `[..., *outputs]`, in x's dtype.

  Sums are float32. Differentiable in `x` and `w.values`; of the dense gradient no more than a slab is made at a time.
  `implementation` is 'xla', one dot for the outputs that share their positions, 'dense', which unpacks `w` inside of
  the program, or 'mosaic_tpu'; they run or raise `ValueError`. `None` lets the platform choose when the program is
  lowered, and `explain=True` returns what it would choose, and why: on CPUs N:M is not faster than dense but for
  vectors (`NM(n, m, width)`) of 32 and more.
  """
  products.checked('nm_matmul', x, w, NMArray, 'NMArray.from_dense packs one')
  front, _, places = w.value_axes()
  if front:
    raise ValueError(f'nm_matmul: the weight of shape {w.shape} has axes that are neither contracted nor outputs (of a '
                     'stack, or taps); take one of it at a time with vmap or scan.')
  flat, matrix = x.reshape(-1, x.shape[-1]), _matrix(w)
  if explain:
    return PRODUCT.explained(flat, matrix)
  outputs = [w.values.shape[a] for a in places]
  if 0 in flat.shape or 0 in outputs:
    y = jnp.zeros((flat.shape[0], math.prod(outputs)), x.dtype)
  else:
    y = PRODUCT(flat, matrix, implementation)
  lead = x.ndim - 1
  order = [*range(lead), *(lead + np.argsort(places))]
  return y.reshape(*x.shape[:-1], *outputs).transpose(order)


def prefer(*args: Any) -> Choice:
  """'xla' or 'dense', by what was measured on a CPU (`make bench`)."""
  w, zeros = args[-1], 1 - args[-1].n / args[-1].m
  if w.width < _WIDTH:
    return Choice('dense', f'{w.width} outputs share their positions: unpacked. On CPUs N:M is not faster than dense '
                           f'but in vectors of {_WIDTH} and more')
  if zeros < _LEAST:
    return Choice('dense', f'{zeros:.0%} are zero, and vectors pay from {_LEAST:.0%} on')
  return Choice('xla', f'{zeros:.0%} are zero, in vectors of {w.width}: one dot for each')


def _matrix(w: NMArray) -> NMArray:
  """`w` as `[K, N]`, outputs in the order in which vectors lie along them."""
  _, at, outputs = w.value_axes()
  flat = lambda a: a.transpose(at, *outputs).reshape(a.shape[at], -1)
  indices = flat(w.indices) if w.width == 1 else w.indices
  return dataclasses.replace(w, values=flat(w.values), indices=indices, axes=(-2,), sizes=(math.prod(w.sizes),),
                             outputs=(-1,) if w.width > 1 else ())


def _kernel(module: str) -> Implementation:
  """Imported when it is first asked: Pallas takes a second."""
  load = lambda: importlib.import_module(f'kernels_pallas.n_m.{module}')
  return Implementation(lambda x, w: load().matmul(x, w), lambda x, w: load().refusal(x, w))


def _none_for_hopper(x: Array, w: NMArray) -> str:
  """Why there is no kernel for Hopper, and the remedy: always one, so that what stands beside it never runs."""
  del x
  if (w.n, w.m, w.width) == (2, 4, 1):
    return ("Hopper's sparse tensor cores read 2:4 in an order of their own; pack it as 'sparse24', a "
            'formats.Sparse24Array, and call sparse24_matmul')
  return (f"Hopper's sparse tensor cores multiply 2:4 only, not {w.n}:{w.m}"
          f'{f" in vectors of {w.width}" if w.width > 1 else ""}; prune to 2:4, or leave it to XLA')


PRODUCT = products.Product(
    'nm_matmul',
    {'xla': Implementation(reference.matmul),
     'dense': Implementation(lambda x, w: products.dot(x, n_m.merged(w), 1, 0).astype(x.dtype)),
     'mosaic_gpu': Implementation(reference.matmul, _none_for_hopper), 'mosaic_tpu': _kernel('tpu')},
    {'xla': Implementation(products.both(reference.matmul_transposed, reference.sampled)),
     'dense': Implementation(products.both(
         lambda dy, w: products.dot(dy, n_m.merged(w), 1, 1).astype(dy.dtype), reference.sampled_by_slab))}, prefer)
