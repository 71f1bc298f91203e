"""Finds the weights of least absolute sum whose outputs stay close to those of the dense weights: Net-Trim.

    v = trimmed(w, x, epsilon=0.1 * jnp.linalg.norm(w.T @ x))          # `w` is [K, R], `x` is [K, T]
    v = trimmed(w, x, epsilon, inactive=w.T @ x <= 0)                  # of a layer that a ReLU follows
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array

HIGHEST = lax.Precision.HIGHEST


def trimmed(w: Array, x: Array, epsilon: Any, *, inactive: Array | None = None, rho: float = 10.0,
            iterations: int = 10_000) -> Array:
  """Returns the solution `[K, R]` of Net-Trim's convex program (Aghasi et al. 2017, 1611.05162), by ADMM.

  Minimises the sum of `|v|` under `|v^T x - w^T x|_F <= epsilon`. `inactive`: the entries `[R, T]` of the output that a
  ReLU sets to zero; there, `v^T x <= 0` is asked instead, and the norm leaves them out. A square root of `x x^T` gives
  the same solution as `x` if nothing is inactive. The iteration ends when the weights move by less than 5e-9 an entry,
  as the authors' code does, or after `iterations`.
  """
  gram = jnp.matmul(x, x.T, precision=HIGHEST)
  scale = 0.3 * jnp.sqrt(jnp.max(gram))  # the authors' code, for the conditioning of the linear system
  scale = jnp.where(scale > 0, scale, 1)
  solve = _by_eigenvectors(gram / scale**2) if inactive is None else _by_factor(gram / scale**2, x / scale)
  epsilon, target = epsilon / scale, solve(None, w)[1]

  def near(z: Array) -> Array:
    off = z - target if inactive is None else jnp.where(inactive, 0, z - target)
    ball = target + off * jnp.minimum(1, epsilon / jnp.maximum(jnp.linalg.norm(off), jnp.finfo(w.dtype).tiny))
    return ball if inactive is None else jnp.where(inactive, jnp.minimum(z, 0), ball)

  def step(state: Any) -> Any:
    i, (v, there), _, dual, sparse_dual = state
    output = near(there - dual)
    shrunk = v - sparse_dual
    sparse = jnp.sign(shrunk) * jnp.maximum(jnp.abs(shrunk) - 1 / rho, 0)
    solved, given = solve(output + dual, sparse + sparse_dual)
    dual, sparse_dual = dual + output - given, sparse_dual + sparse - solved
    return i + 1, (solved, given), (sparse, jnp.linalg.norm(solved - v)), dual, sparse_dual

  going = lambda state: (state[0] < iterations) & (state[2][1] >= 5e-9 * w.size)
  zeros = jnp.zeros_like(w), jnp.zeros_like(target)
  first = 0, zeros, (w, jnp.asarray(jnp.inf, w.dtype)), zeros[1], zeros[0]
  return lax.while_loop(going, step, first)[2][0]


def _by_factor(gram: Array, x: Array) -> Any:
  """Returns `solve(output, v)`: the solution of the linear system for an output `[R, T]` and `v`, and its output.

  Without an output, it returns `v` and its output.
  """
  factor = lax.linalg.cholesky(gram + jnp.eye(len(gram), dtype=gram.dtype))
  dot = functools.partial(jnp.matmul, precision=HIGHEST)

  def solve(output: Array | None, v: Array) -> tuple[Array, Array]:
    if output is not None:
      half = lax.linalg.triangular_solve(factor, dot(x, output.T) + v, left_side=True, lower=True)
      v = lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)
    return v, dot(v.T, x)

  return solve


def _by_eigenvectors(gram: Array) -> Any:
  """Returns the same as `_by_factor`, with outputs `[K, R]` in the basis of the eigenvectors of the Gram matrix.

  In this basis the linear system is diagonal, so that a step takes two products, and its cost does not depend on T.
  """
  values, basis = jnp.linalg.eigh(gram)
  values = jnp.maximum(values, 0)[:, None]
  root, dot = jnp.sqrt(values), functools.partial(jnp.matmul, precision=HIGHEST)

  def solve(output: Array | None, v: Array) -> tuple[Array, Array]:
    across = dot(basis.T, v)
    if output is None:
      return v, root * across
    across = (root * output + across) / (values + 1)
    return dot(basis, across), root * across

  return solve
