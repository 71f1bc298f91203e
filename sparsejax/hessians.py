"""Factorises the Hessian of a layer's output error, raises its damping where needed, and takes care of dead inputs.

The Hessian is the Gram matrix `X^T X` of the inputs of the layer, `[K, K]`. A common factor of the Hessian changes no
mask and no weight. All functions scale the Hessian so that the mean of its diagonal, over live inputs, is 1.

    factor = inverse_factor(gram, 0.01, layer=0)
    factor.upper.T @ factor.upper                 # the inverse of the damped Hessian
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from sparsejax.types import Array

MOST = 1.0  # the largest damping, as a fraction of the mean diagonal
LEAST = 1e-6  # the first damping above 0 that is tried, where 0 was asked
_BLOCK = 256  # LAPACK factorises blocks on one core, and products of blocks take all cores


class InverseFactor(NamedTuple):
  """An `InverseFactor` is the Cholesky factor of the inverse of one damped Hessian.

  `reversed`: `[K, K]`, the factor with both axes reversed, which is lower triangular. `damping`: the damping that was
  used, a fraction of the mean diagonal, `float32[]`; NaN if there is no factor. `raised`: `int32[]`, how often it was
  raised. `dead`: `bool[K]`, the inputs that are zero in every row of the calibration data.
  """

  reversed: Array
  damping: Array
  raised: Array
  dead: Array

  @property
  def upper(self) -> Array:
    """The factor, `[K, K]` and upper triangular: `upper^T upper` is the inverse of the Hessian."""
    return self.reversed[::-1, ::-1]


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


def inverse_factor(gram: Array, damping: float, layer: Any = 0) -> InverseFactor:
  """Returns the factor of the inverse Hessian for the first damping, from `damping` on, with which one exists.

  A damping that is too small is raised tenfold, up to 1. JAX returns a factor of NaN where a matrix is not positive
  definite, and raises no error: if no damping suffices, because the Gram matrix has a NaN for example, all of the
  factor and `damping` are NaN. `gram`: concrete Gram matrices `[L, K, K]`, of which `layer` is factorised.
  """
  raised, (factor, found, dead) = 0, lower(gram, damping, layer)
  while not found and damping < MOST:
    damping, raised = min(max(10 * damping, LEAST), MOST), raised + 1
    factor, found, dead = lower(gram, damping, layer)
  return InverseFactor(inverted(factor), jnp.float32(damping if found else jnp.nan), jnp.int32(raised), dead)


@jax.jit
def lower(gram: Array, damping: Any, layer: Any) -> tuple[Array, Array, Array]:
  """Returns the Cholesky factor of one Hessian with both axes reversed, whether there is one, and the dead inputs."""
  gram = lax.dynamic_index_in_dim(gram, layer, 0, keepdims=False)
  # With both axes reversed, the factor of H is the inverse of an upper factor of H^-1. The usual way inverts H and
  # factorises the inverse, which costs twice as much.
  size, block = len(gram), min(len(gram), _BLOCK)
  matrix = _padded(damped(gram, damping)[::-1, ::-1], block)
  tiles = len(matrix) // block

  def column(i: Any, matrix: Array) -> Array:
    own = lax.linalg.cholesky(_reduced(matrix, i, i, block), symmetrize_input=False)

    def below(row: Any, matrix: Array) -> Array:
      part = _reduced(matrix, row, i, block)
      return _put(matrix, lax.linalg.triangular_solve(own, part, left_side=False, lower=True, transpose_a=True), row, i)

    return lax.fori_loop(i + 1, tiles, below, _put(matrix, own, i, i))

  factor = jnp.tril(lax.fori_loop(0, tiles, column, matrix)[:size, :size])
  return factor, jnp.all(jnp.isfinite(jnp.diagonal(factor))), jnp.diagonal(gram) == 0


@functools.partial(jax.jit, donate_argnums=0)
def inverted(factor: Array) -> Array:
  """Returns the inverse of a lower triangular factor, in the place of the factor, which is gone."""
  size, block = len(factor), min(len(factor), _BLOCK)

  def row(i: Any, matrix: Array) -> Array:  # rows before `i`, and tiles before `column`, are those of the inverse
    own = _tile(matrix, i, i, block)

    def tile(column: Any, matrix: Array) -> Array:
      part = lax.fori_loop(column, i, lambda j, part: part - _product(
          _tile(matrix, i, j, block), _tile(matrix, j, column, block)), jnp.zeros_like(own))
      part = jnp.where(i == column, jnp.eye(block, dtype=own.dtype), part)
      return _put(matrix, lax.linalg.triangular_solve(own, part, left_side=True, lower=True), i, column)

    return lax.fori_loop(0, i + 1, tile, matrix)

  matrix = _padded(factor, block)
  return lax.fori_loop(0, len(matrix) // block, row, matrix)[:size, :size]


def _padded(matrix: Array, block: int) -> Array:
  """Returns the matrix with ones behind its diagonal up to a multiple of `block`."""
  extra = -len(matrix) % block
  diagonal = jnp.concatenate([jnp.zeros(len(matrix), matrix.dtype), jnp.ones(extra, matrix.dtype)])
  return jnp.pad(matrix, (0, extra)) + jnp.diag(diagonal) if extra else matrix


def _reduced(matrix: Array, row: Any, column: Any, block: int) -> Array:
  """Returns a tile less the product of all tiles before it in its row and in the row `column`."""
  less = lambda j, part: part - _product(_tile(matrix, row, j, block), _tile(matrix, column, j, block).T)
  return lax.fori_loop(0, column, less, _tile(matrix, row, column, block))


def _tile(matrix: Array, row: Any, column: Any, block: int) -> Array:
  return lax.dynamic_slice(matrix, (row * block, column * block), (block, block))


def _put(matrix: Array, tile: Array, row: Any, column: Any) -> Array:
  return lax.dynamic_update_slice(matrix, tile, (row * len(tile), column * len(tile)))


def _product(a: Array, b: Array) -> Array:
  return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)  # a GPU would multiply in TF32, and a TPU in bfloat16


def inverse_diagonal(gram: Array, damping: float) -> Array:
  """Returns the diagonal of the inverse Hessian, `[L, K]`, of concrete Gram matrices `[L, K, K]`."""
  return jnp.stack([_diagonal(inverse_factor(gram, damping, layer)) for layer in range(len(gram))])


@jax.jit
def _diagonal(factor: InverseFactor) -> Array:
  return jnp.sum(jnp.square(factor.upper), 0)
