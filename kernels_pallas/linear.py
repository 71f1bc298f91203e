"""Gives an op derivatives of every order and mode, and keeps a gradient of its own for the first order in reverse mode.

`differentiable(function, derivative)` returns `function` with tangents by `derivative.tangent`. The tangents are one
primitive, whose transpose is `derivative.gradient`. Both are plain JAX, so that all further derivatives are JAX's own.

    attention = differentiable(forward, Derivative(tangent, gradient, options))
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.interpreters import ad

from kernels_pallas import trilinear
from sparsejax.types import Array


class Derivative(NamedTuple):
  """A `Derivative` holds two functions that JAX can differentiate, and the options that both take first.

  `tangent(options, args, tangents)` returns the tangent of the result, and is linear in `tangents`, one for each of the
  first arguments. `gradient(options, args, dy)` returns a cotangent for each of these arguments. Arguments after them,
  like lists of indices, have no derivative. Derivatives with equal fields are one program.
  """

  tangent: Callable[..., Array]
  gradient: Callable[..., Any]
  options: Any


def differentiable(function: Callable[..., Array], derivative: Derivative, count: int) -> Callable[..., Array]:
  """Returns `function`, whose first `count` arguments have derivatives, with these derivatives."""
  call = jax.custom_jvp(function)

  def tangents(primals: Any, tangents: Any) -> tuple[Array, Array]:
    y = call(*primals)
    return y, tangent.bind(*tangents[:count], *primals, derivative=derivative, count=count, shape=y.shape, levels=())

  call.defjvp(tangents)
  return call


def _mapped(run: Callable[..., Any], levels: Any, count: int) -> Callable[..., Any]:
  """Returns `run(given, *args)` mapped over a leading axis for each level: of all `count` first arrays, and of some."""
  for level in levels:
    run = jax.vmap(run, (*(0,) * count, *(0 if m else None for m in level)))
  return run


@functools.partial(jax.jit, static_argnames=('derivative', 'count', 'shape', 'levels'))
def _run(*arrays: Array, derivative: Derivative, count: int, shape: tuple[int, ...], levels: Any) -> Array:
  run = lambda *a: derivative.tangent(derivative.options, a[count:], a[:count])
  return _mapped(run, levels, count)(*arrays)


def _abstract(*avals: Any, derivative: Derivative, count: int, shape: tuple[int, ...], levels: Any) -> Any:
  return trilinear.result(avals, (*avals[0].shape[:len(levels)], *shape), avals[0].dtype)


def _tangent(primals: Any, tangents: Any, **options: Any) -> tuple[Array, Array]:
  """Returns the tangent and its own tangent, by JAX's rules."""
  moving = [i for i, t in enumerate(tangents) if not isinstance(t, ad.Zero)]

  def run(values: list[Array]) -> Array:
    given = dict(zip(moving, values))
    return _run(*(given.get(i, a) for i, a in enumerate(primals)), **options)

  return tangent.bind(*primals, **options), jax.jvp(run, ([primals[i] for i in moving],),
                                                    ([tangents[i] for i in moving],))[1]


def _transposed(cotangent: Any, *arrays: Any, derivative: Derivative, count: int, shape: Any, levels: Any) -> list[Any]:
  nothing = [None] * (len(arrays) - count)
  if isinstance(cotangent, ad.Zero):
    return [None] * count + nothing
  run = _mapped(lambda dy, *args: derivative.gradient(derivative.options, args, dy), levels, 1)
  gradients = run(cotangent, *arrays[count:])
  return [g if ad.is_undefined_primal(a) else None for g, a in zip(gradients, arrays)] + nothing


def _batched(arrays: Any, axes: Any, *, count: int, levels: Any, **options: Any) -> tuple[Array, int]:
  size = next(a.shape[axis] for a, axis in zip(arrays, axes) if axis is not None)
  first = [a if axis is None else jnp.moveaxis(a, axis, 0) for a, axis in zip(arrays, axes)]
  wide = [jnp.broadcast_to(a, (size, *a.shape)) if axis is None else a for a, axis in zip(first[:count], axes)]
  level = tuple(axis is not None for axis in axes[count:])
  return tangent.bind(*wide, *first[count:], count=count, levels=(*levels, level), **options), 0


tangent = trilinear.primitive('tangent_of_op', _run, _abstract, _tangent, _transposed, _batched)
