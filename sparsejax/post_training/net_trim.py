"""Finds the weights of least absolute sum whose outputs stay close to those of the dense weights: Net-Trim.

    v = trimmed(w, x, epsilon=0.1 * jnp.linalg.norm(w.T @ x))          # `w` is [K, R], `x` is [K, T]
    v = trimmed(w, x, epsilon, inactive=w.T @ x <= 0)                  # of a layer that a ReLU follows
"""

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
  x, epsilon = x / scale, epsilon / scale
  target = jnp.matmul(w.T, x, precision=HIGHEST)
  factor = lax.linalg.cholesky(gram / scale**2 + jnp.eye(len(w), dtype=w.dtype))

  def near(z: Array) -> Array:
    off = z - target if inactive is None else jnp.where(inactive, 0, z - target)
    ball = target + off * jnp.minimum(1, epsilon / jnp.maximum(jnp.linalg.norm(off), jnp.finfo(w.dtype).tiny))
    return ball if inactive is None else jnp.where(inactive, jnp.minimum(z, 0), ball)

  def step(state: Any) -> Any:
    i, v, _, dual, sparse_dual = state
    output = near(jnp.matmul(v.T, x, precision=HIGHEST) - dual)
    shrunk = v - sparse_dual
    sparse = jnp.sign(shrunk) * jnp.maximum(jnp.abs(shrunk) - 1 / rho, 0)
    right = jnp.matmul(x, (output + dual).T, precision=HIGHEST) + sparse + sparse_dual
    solved = _solved(factor, right)
    dual, sparse_dual = dual + output - jnp.matmul(solved.T, x, precision=HIGHEST), sparse_dual + sparse - solved
    return i + 1, solved, (sparse, jnp.linalg.norm(solved - v)), dual, sparse_dual

  going = lambda state: (state[0] < iterations) & (state[2][1] >= 5e-9 * w.size)
  first = 0, jnp.zeros_like(w), (w, jnp.asarray(jnp.inf, w.dtype)), jnp.zeros_like(target), jnp.zeros_like(w)
  return lax.while_loop(going, step, first)[2][0]


def _solved(factor: Array, right: Array) -> Array:
  half = lax.linalg.triangular_solve(factor, right, left_side=True, lower=True)
  return lax.linalg.triangular_solve(factor, half, left_side=True, lower=True, transpose_a=True)
