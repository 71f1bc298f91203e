"""Builds the differentiable product with a packed weight from a table of implementations for each direction.

    product = TrainableProduct('nm_matmul', forward, transposed, sampled, prefer)
    y = product(x, w, outputs, None)                                                 # [M, N], in x's dtype
    print(product.explained(x, w))                                                   # what each platform would run
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from kernels_pallas import dispatch
from kernels_pallas.dispatch import Choice, Table
from kernels_pallas.trilinear import Form, face
from sparsejax.formats import PackedArray
from sparsejax.types import Array


@dataclasses.dataclass(frozen=True, eq=False)
class TrainableProduct:
  """A `TrainableProduct` multiplies `x [M, K]` by a packed `w`, and differentiates in `x` and in `w.values`.

  The product, its gradients and the derivatives of all orders call three kernels, each with a table of implementations
  (`kernels_pallas.trilinear`). `forward(x, w)` returns `[M, N]` in x's dtype. `transposed(dy, w)` returns `dy` times
  the transpose of `w`, `[M, K]`, in dy's dtype. For both, `w` has been cast to the dtype of the other operand.
  `sampled(x, dy, w)` returns `x^T dy` at the stored positions, with the shape and dtype of `w.values`; it reads no
  values.

  `prefer` takes the same arguments, and chooses where the platform has no kernel. If the implementation that the caller
  asks for has no entry in `transposed` or `sampled`, `prefer` chooses there too. `trained(values, w)` returns a
  derivative of the values with zeros for the values that only pad the format.
  """

  name: str
  forward: Table
  transposed: Table
  sampled: Table
  prefer: Callable[..., Choice]
  trained: Callable[[Array, PackedArray], Array] = lambda values, w: values

  def __call__(self, x: Array, w: PackedArray, outputs: int, implementation: str | None) -> Array:
    """Returns the product, `[M, outputs]`; raises `ValueError` for an `implementation` that cannot run."""
    if implementation is not None:
      dispatch.runnable(self.name, (x, w), self.forward, implementation)
    indices, static = jax.tree.flatten(dataclasses.replace(w, values=None))
    form = Form(self, implementation, static, (x.shape[1], outputs), x.dtype, w.values.shape, w.values.dtype)
    return face.bind(*dispatch.varying_alike(x, w.values, *indices), form=form, of='y', levels=())

  def weight(self, form: Form, values: Array | None, indices: Sequence[Array]) -> PackedArray:
    """Returns the weight of a call again; without `values`, with zeros."""
    values = jnp.zeros(form.shape, form.stored) if values is None else values
    return dataclasses.replace(jax.tree.unflatten(form.static, indices), values=values)

  def face(self, form: Form, of: str, given: dict[str, Array], indices: Sequence[Array]) -> Array:
    """Returns the face `of` of the product from the operands `given`."""
    table = {'x': self.transposed, 'y': self.forward, 'v': self.sampled}[of]
    w = self.weight(form, given.get('v'), indices)
    w = w if of == 'v' else _cast(w, form.dtype)
    args = *(given[slot] for slot in ('x', 'y') if slot in given), w
    return dispatch.run(self.name, args, table, form.implementation if form.implementation in table else None,
                        self.prefer)

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


def each_token(product: Callable[[Array], Array], x: Array) -> Array:
  """Returns `product(x[i])` for each token i of `x [M, K]`, one after another, stacked."""
  return product(x[0])[None] if len(x) == 1 else jax.lax.map(product, x)


def _cast(w: PackedArray, dtype: np.dtype) -> PackedArray:
  return dataclasses.replace(w, values=w.values.astype(dtype))
