"""Differentiates products with a packed weight in forward and reverse mode, to any order.

A product `y = x W(v)` is one of three faces of a trilinear form `F(x, y, v) = sum(y * (x W(v)))`. A face takes two of
the three operands, and returns the derivative of F by the third: `y` is the product, `x` is the product with the
transpose, and `v` is `x^T y` at the stored positions. A face is linear in both of its operands, and the transpose of a
face is another face. Hence one primitive with a rule for tangents and a rule for transposes has all derivatives, and
every derivative calls the same three kernels.

    y = face.bind(x, v, *indices, form=form, of='y', levels=())
    dx = face.bind(dy, v, *indices, form=form, of='x', levels=())
"""

import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core
from jax.interpreters import ad, batching, mlir
from jax.sharding import NamedSharding, PartitionSpec

from sparsejax.types import Array

SLOTS = ('x', 'y', 'v')  # A face takes its operands in this order, then the index arrays of the weight.


class Form(NamedTuple):
  """A `Form` holds what two calls must share to be one program.

  `product` runs the faces and says which values are trained (`products.TrainableProduct`). `implementation` is the
  name that the caller asks for, or `None`. `static` is the structure of the weight's index arrays. `lengths` are K and
  N: `x` is `[M, K]` and `y` is `[M, N]`, both of `dtype`. The values have the shape `shape` and the dtype `stored`.
  """

  product: Any
  implementation: str | None
  static: Any
  lengths: tuple[int, int]
  dtype: np.dtype
  shape: tuple[int, ...]
  stored: np.dtype


def _given(of: str) -> list[str]:
  """Returns the slots of the operands of the face `of`."""
  return [slot for slot in SLOTS if slot != of]


@functools.partial(jax.jit, static_argnames=('form', 'of', 'levels'))
def _run(*arrays: Array, form: Form, of: str, levels: tuple[tuple[bool, ...], ...]) -> Array:
  """Returns the face, mapped over `levels` leading axes of the operands; an entry of a level is for an index array."""
  run = lambda a, b, *indices: form.product.face(form, of, dict(zip(_given(of), (a, b))), indices)
  for mapped in levels:
    run = jax.vmap(run, (0, 0, *(0 if m else None for m in mapped)))
  return run(*arrays)


def _abstract(*avals: Any, form: Form, of: str, levels: Any) -> Any:
  lead = avals[0].shape[:len(levels)]
  rows = avals[0].shape[-2:-1]  # The first operand is `x` or `y`, whatever the face.
  shape = {'x': (*rows, form.lengths[0]), 'y': (*rows, form.lengths[1]), 'v': form.shape}[of]
  return result(avals, lead + shape, form.stored if of == 'v' else form.dtype)


def result(avals: Sequence[Any], shape: tuple[int, ...], dtype: np.dtype) -> Any:
  """Returns the type of a result that varies over every mesh axis that any operand varies over."""
  widest = max(avals, key=lambda aval: len(aval.manual_axis_type.varying))
  sharding = NamedSharding(widest.sharding.mesh, PartitionSpec(*[None] * len(shape)))
  return widest.update(shape=shape, dtype=dtype, weak_type=False, sharding=sharding)


def _tangent(primals: Any, tangents: Any, *, form: Form, of: str, levels: Any) -> tuple[Array, Array]:
  """Returns the face and its tangent: the face is linear in each operand."""
  run = functools.partial(face.bind, form=form, of=of, levels=levels)
  pair, indices, terms = primals[:2], primals[2:], []
  for i, (slot, tangent) in enumerate(zip(_given(of), tangents)):
    if isinstance(tangent, ad.Zero):
      continue
    if slot == 'v':
      tangent = _trained(tangent, indices, form, levels)
    terms.append(run(*pair[:i], tangent, *pair[i + 1:], *indices))
  y = run(*primals)
  return y, functools.reduce(ad.add_jaxvals, terms) if terms else jnp.zeros_like(y)


def _trained(values: Array, indices: tuple[Array, ...], form: Form, levels: Any) -> Array:
  """Returns the tangent of the values, with zeros for values that only pad the format."""
  run = lambda values, *indices: form.product.trained(values, form.product.weight(form, values, indices))
  for mapped in levels:
    run = jax.vmap(run, (0, *(0 if m else None for m in mapped)))
  return run(values, *indices)


def _transposed(cotangent: Any, *arrays: Any, form: Form, of: str, levels: Any) -> list[Array | None]:
  """Returns the cotangent of the one linear operand: the face of the slot of this operand."""
  pair, indices, slots = arrays[:2], arrays[2:], _given(of)
  linear = [ad.is_undefined_primal(a) for a in pair]
  if all(linear):
    raise ValueError(f'{form.product.name}: the product is linear in x and in the values, not in both together; '
                     'transpose it in one of them.')
  results: list[Array | None] = [None] * len(arrays)
  if not isinstance(cotangent, ad.Zero):
    i = linear.index(True)
    operands = {of: cotangent, slots[1 - i]: pair[1 - i]}
    results[i] = face.bind(*(operands[slot] for slot in _given(slots[i])), *indices, form=form, of=slots[i],
                           levels=levels)
  return results


def _batched(arrays: Any, axes: Any, *, form: Form, of: str, levels: Any) -> tuple[Array, int]:
  """Returns the batched face, and the axis of the batch.

  If only `x` or `y` is batched, the examples are more rows: a batched kernel would read the weight again for each.
  """
  run = functools.partial(face.bind, form=form, of=of)
  size = next(a.shape[axis] for a, axis in zip(arrays, axes) if axis is not None)
  if of != 'v' and all(axis is None for axis in axes[1:]):
    place = len(levels)
    rows = jnp.moveaxis(arrays[0], axes[0], place)
    *lead, _, count, length = rows.shape
    y = run(rows.reshape(*lead, size * count, length), *arrays[1:], levels=levels)
    return y.reshape(*lead, size, count, y.shape[-1]), place
  first = lambda a, axis: a if axis is None else jnp.moveaxis(a, axis, 0)
  pair = [jnp.broadcast_to(a, (size, *a.shape)) if axis is None else first(a, axis)
          for a, axis in zip(arrays[:2], axes)]
  mapped = tuple(axis is not None for axis in axes[2:])
  return run(*pair, *map(first, arrays[2:], axes[2:]), levels=(*levels, mapped)), 0


def primitive(name: str, run: Any, abstract: Any, tangent: Any, transposed: Any, batched: Any) -> core.Primitive:
  """Returns a primitive of one result that `run` computes, with the rules for its type, its derivatives and `vmap`."""
  made = core.Primitive(name)
  made.def_impl(run)
  made.def_abstract_eval(abstract)
  ad.primitive_jvps[made] = tangent
  ad.primitive_transposes[made] = transposed
  batching.primitive_batchers[made] = batched
  mlir.register_lowering(made, mlir.lower_fun(run, multiple_results=False))
  return made


face = primitive('packed_product', _run, _abstract, _tangent, _transposed, _batched)
