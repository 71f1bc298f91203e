"""Products with a packed weight, differentiable in `x` and in the stored values, from a table for each direction."""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Choice, Implementation
from sparsejax.formats import PackedArray
from sparsejax.types import Array

Table = Mapping[str, Implementation]


@dataclasses.dataclass(frozen=True, eq=False)
class Product:
  """`x [M, K]` times `w`, forward and back: what the implementations of both directions take and give.

  `forward(x, w)` is `[M, N]` in x's dtype. `gradients(x, dy, w)` are dy times the transpose of `w`, like x, and what
  x^T dy has where `w` stores values, like these. `prefer(x, w)` and `prefer(x, dy, w)` choose where the platform has no
  kernel. An implementation that only goes forward leaves the way back to that choice.
  """

  name: str
  forward: Table
  gradients: Table
  prefer: Callable[..., Choice]

  def __call__(self, x: Array, w: PackedArray, implementation: str | None) -> Array:
    """`[M, N]`; raises `ValueError` for an implementation that cannot run."""
    if implementation is not None:
      dispatch.named(self.name, (x, w), self.forward, implementation)
    arrays, static = jax.tree.flatten(w)
    return _compiled(self, implementation, static, *dispatch.varying_alike(x, *arrays))

  def explained(self, x: Array, w: PackedArray) -> dispatch.Explanation:
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


def dot(a: Array, b: Array, i: int, j: int) -> Array:
  """The product over axis `i` of `a` and axis `j` of `b`, two matrices, in float32."""
  return jax.lax.dot_general(a, b, (((i,), (j,)), ((), ())), preferred_element_type=jnp.float32)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _product(product: Product, implementation: str | None, static: Any, x: Array, *arrays: Array) -> Array:
  w = _cast(jax.tree.unflatten(static, arrays), x.dtype)
  return dispatch.run(product.name, (x, w), product.forward, implementation, product.prefer)


def _forward(product, implementation, static, x, *arrays):
  return _product(product, implementation, static, x, *arrays), (x, arrays)


def _backward(product, implementation, static, kept, dy):
  x, arrays = kept
  w = jax.tree.unflatten(static, arrays)
  way = implementation if implementation in product.gradients else None
  dx, dw = dispatch.run(product.name, (x, dy, w), product.gradients, way, product.prefer)
  floats = jnp.issubdtype(w.dtype, jnp.floating)
  return dx, *(dw if a is w.values and floats else None for a in arrays)


_product.defvjp(_forward, _backward)
_compiled = jax.jit(_product, static_argnums=(0, 1, 2))  # for calls outside of `jit`


def both(transposed: Callable[..., Array], sampled: Callable[..., Array]) -> Callable[..., tuple[Array, Array]]:
  """`gradients` of two products: `transposed(dy, w)`, `w` in dy's dtype, and `sampled(x, dy, w)`."""
  return lambda x, dy, w: (transposed(dy, _cast(w, dy.dtype)), sampled(x, dy, w))


def _cast(w: PackedArray, dtype: np.dtype) -> PackedArray:
  return dataclasses.replace(w, values=w.values.astype(dtype))
