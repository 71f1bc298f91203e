"""Builds the differentiable product with a packed weight from a table of implementations for each direction.

    product = TrainableProduct('nm_matmul', {'xla': Implementation(matmul)}, {'xla': Implementation(gradients)}, prefer)
    y = product(x, w, None)                                                          # [M, N], in x's dtype
    print(product.explained(x, w))                                                   # what each platform would run
"""

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Choice, Table
from sparsejax.formats import PackedArray
from sparsejax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class TrainableProduct:
  """A `TrainableProduct` multiplies `x [M, K]` by a packed `w`, and differentiates in `x` and in `w.values`.

  `forward` holds implementations of `(x, w)`, which return `[M, N]` in x's dtype. `gradients` holds implementations of
  `(x, dy, w)`, which return two gradients. The first gradient is `dy` times the transpose of `w`, with the shape of
  `x`. The second gradient is `x^T dy`, sampled at the stored positions; it has the shape of `w.values`.

  `prefer(x, w)` and `prefer(x, dy, w)` choose where the platform has no kernel. If the implementation that runs forward
  has no entry in `gradients`, `prefer` chooses the implementation of the gradients.
  """

  name: str
  forward: Table
  gradients: Table
  prefer: Callable[..., Choice]

  def __call__(self, x: Array, w: PackedArray, implementation: str | None) -> Array:
    """Returns the product, `[M, N]`; raises `ValueError` for an `implementation` that cannot run."""
    if implementation is not None:
      dispatch.runnable(self.name, (x, w), self.forward, implementation)
    arrays, static = jax.tree.flatten(w)
    return _compiled(self, implementation, static, *dispatch.varying_alike(x, *arrays))

  def explained(self, x: Array, w: PackedArray) -> dispatch.Choices:
    """Returns the implementation that each platform would run forward."""
    return dispatch.chosen((x, w), self.forward, self.prefer)


def refusal(x: Array | jax.ShapeDtypeStruct, w: Any, kind: type[PackedArray]) -> str | None:
  """Returns why the op for the format `kind` cannot multiply `x` by `w`, with the remedy, or `None`.

  Of `x`, only the shape and the dtype are read.
  """
  if not isinstance(w, kind):
    name = kind.__name__
    return f'the weight must be a formats.{name}, not {type(w).__name__}; {name}.from_dense packs a dense array'
  if reason := refused_dtype(x):
    return reason
  length = math.prod(w.shape[a] for a in w.axes)
  if not x.shape or x.shape[-1] != length:
    return (f'x of shape {x.shape} must end in {length}, the contracted length of the weight of shape {w.shape}; '
            'reshape x so that its last axis has that length')
  return None


def refused_dtype(x: Array | jax.ShapeDtypeStruct) -> str | None:
  """Returns why no op can multiply an array of the dtype of `x`, with the remedy, or `None`."""
  if jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize <= 4:
    return None
  return f'x has dtype {x.dtype}; cast x to float32, bfloat16 or float16'


def refused_stack(w: PackedArray, stacked: bool) -> str | None:
  """Returns why no op can multiply `w` if it is `stacked`: an op takes a single packed matrix."""
  return (f'the weight of shape {w.shape} is a stack: it has axes that are neither contracted nor outputs; multiply by '
          'the matrices of the stack one at a time, with vmap or scan') if stacked else None


def as_matrix(x: Array) -> Array:
  """Returns `x [..., K]` as `[M, K]`; K and M may be 0."""
  return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def dot(a: Array, b: Array, i: int, j: int) -> Array:
  """Returns the product of two matrices over axis `i` of `a` and axis `j` of `b`, in float32."""
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(product: TrainableProduct, implementation: str | None, static: Any, x: Array, *arrays: Array) -> Array:
  w = _cast(jax.tree.unflatten(static, arrays), x.dtype)
  return dispatch.run(product.name, (x, w), product.forward, implementation, product.prefer)


def _forward(product, implementation, static, x, *arrays):
  return _product(product, implementation, static, x, *arrays), (x, arrays)


def _backward(product, implementation, static, residuals, dy):
  x, arrays = residuals
  w = jax.tree.unflatten(static, arrays)
  name = implementation if implementation in product.gradients else None
  dx, dw = dispatch.run(product.name, (x, dy, w), product.gradients, name, product.prefer)
  floats = jnp.issubdtype(w.dtype, jnp.floating)
  return dx, *(dw if a is w.values and floats else None for a in arrays)


_product.defvjp(_forward, _backward)
_compiled = jax.jit(_product, static_argnums=(0, 1, 2))  # Calls outside of `jit` run as one program too.


def both(transposed: Callable[..., Array], sampled: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
  """Returns an implementation of both gradients, `transposed(dy, w)` and `sampled(x, dy, w)`.

  `w` is cast to dy's dtype for `transposed`.
  """
  return lambda x, dy, w: (transposed(dy, _cast(w, dy.dtype)), sampled(x, dy, w))


def _cast(w: PackedArray, dtype: np.dtype) -> PackedArray:
  return dataclasses.replace(w, values=w.values.astype(dtype))
