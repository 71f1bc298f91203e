"""Factorises the Hessian of a layer's output error, raises its damping where needed, and takes care of dead inputs.

The Hessian is the Gram matrix `X^T X` of the inputs of the layer, `[K, K]`. A common factor of the Hessian changes no
mask and no weight. All functions scale the Hessian so that the mean of its diagonal, over live inputs, is 1.

    factor = inverse_factor(gram, damping=0.01)
    factor.upper.T @ factor.upper                 # the inverse of the damped Hessian
"""

from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array

MOST = 1.0  # the largest damping, as a fraction of the mean diagonal
LEAST = 1e-6  # the first damping above 0 that is tried, where 0 was asked


class InverseFactor(NamedTuple):
  """An `InverseFactor` is the Cholesky factor of the inverse of one damped Hessian, `upper^T upper = H^-1`.

  `upper`: `[K, K]`, upper triangular. `damping`: the damping that was used, a fraction of the mean diagonal. `raised`:
  how often it was raised. `dead`: `bool[K]`, the inputs that are zero in every row of the calibration data.
  """

  upper: Array
  damping: Array
  raised: Array
  dead: Array


def damped(gram: Array, damping: Any) -> Array:
  """Returns the damped Hessian `[K, K]`: the scaled Gram matrix plus `damping` on the diagonal, and 1 at dead inputs.

  The mean diagonal, of which `damping` is a fraction, is that of the live inputs. The authors' code of SparseGPT also
  counts the ones that it sets for dead inputs.
  """
  diagonal = jnp.diagonal(gram)
  live = diagonal != 0  # NaN is live, and the factor is then NaN
  mean = jnp.sum(diagonal) / jnp.maximum(jnp.sum(live, dtype=gram.dtype), 1)
  added = jnp.where(live, jnp.asarray(damping, gram.dtype), 1)
  return gram / jnp.where(mean == 0, 1, mean) + jnp.diag(added)


def inverse_factor(gram: Array, damping: Any) -> InverseFactor:
  """Returns the factor of the inverse Hessian for the first damping, from `damping` on, with which one exists.

  A damping that is too small is raised tenfold, up to 1. JAX returns a factor of NaN where a matrix is not positive
  definite, and raises no error: if no damping suffices, because the Gram matrix has a NaN for example, `upper` and
  `damping` are NaN. `damping` is a number from 0 to 1, traced or not.
  """
  def lower(damping: Array) -> Array:
    # With both axes flipped, the factor of H is the inverse of an upper factor of H^-1. The usual way inverts H and
    # factorises the inverse, which costs twice as much.
    return lax.linalg.cholesky(damped(gram, damping)[::-1, ::-1], symmetrize_input=False)

  def unsettled(state: Any) -> Array:
    damping, raised, factor = state
    return (raised < 0) | ~jnp.all(jnp.isfinite(jnp.diagonal(factor))) & (damping < MOST)

  def again(state: Any) -> Any:
    damping, raised, _ = state
    damping = jnp.where(raised < 0, damping, jnp.clip(10 * damping, LEAST, MOST))
    return damping, raised + 1, lower(damping)

  asked = jnp.asarray(damping, gram.dtype)
  used, raised, factor = lax.while_loop(unsettled, again, (asked, jnp.int32(-1), jnp.full_like(gram, jnp.nan)))
  identity = jnp.eye(len(gram), dtype=gram.dtype)
  upper = lax.linalg.triangular_solve(factor, identity, left_side=True, lower=True)[::-1, ::-1]
  found = jnp.all(jnp.isfinite(jnp.diagonal(factor)))
  return InverseFactor(upper, jnp.where(found, used, jnp.nan), raised, jnp.diagonal(gram) == 0)


def inverse_diagonal(gram: Array, damping: Any) -> Array:
  """Returns the diagonal of the inverse Hessian, `[..., K]`, of Gram matrices `[..., K, K]`."""
  one = lambda gram: jnp.sum(jnp.square(inverse_factor(gram, damping).upper), 0)
  return lax.map(one, gram.reshape(-1, *gram.shape[-2:])).reshape(gram.shape[:-1])
