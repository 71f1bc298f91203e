"""Local search over permutations of experts, which lets a tree gate leave a bad routing (COMET+).

    soft = sinkhorn(logits, tau=1e-3, sweeps=20)                  # while the search runs, trained with everything else
    loss = task(permuted(weights, soft)) + 1e-4 * disorder(soft)
    weights = permuted(weights, assigned(logits))                 # afterwards, fixed

While the permutation is soft, every expert has a weight and no work is saved.
"""

import jax
import jax.numpy as jnp
import optax

from sparsejax import arguments
from sparsejax.argument_kinds import ARRAY, POSITIVE, TIMES
from sparsejax.arguments import checked
from sparsejax.types import Array

__all__ = ['assigned', 'disorder', 'permuted', 'sinkhorn']

arguments.declare('sinkhorn assigned disorder permuted', logits=ARRAY, tau=POSITIVE, sweeps=TIMES, permutation=ARRAY,
                  weights=ARRAY)


@checked
def sinkhorn(logits: Array, tau: float, sweeps: int = 20) -> Array:
  """Returns a nearly doubly stochastic matrix `[E, E]` from `logits / tau`: rows are normalised, then columns.

  Computed with logarithms, because the exponentials overflow at the paper's temperatures, 1e-3 down to 1e-7. The paper
  raises the sweeps from 20 to 150 as the temperature falls; here their number is fixed, so that it differentiates.
  Raises `ValueError` for a matrix that is not square.
  """
  _refuse('sinkhorn', logits)
  normal = lambda logs, axis: logs - jax.nn.logsumexp(logs, axis, keepdims=True)
  sweep = lambda logs, _: (normal(normal(logs, 1), 0), None)
  return jnp.exp(jax.lax.scan(sweep, logits.astype(jnp.float32) / tau, length=sweeps)[0])


@checked
def assigned(logits: Array) -> Array:
  """Returns the permutation matrix of the largest sum of logits, `float32[E, E]`, by the Hungarian algorithm."""
  _refuse('assigned', logits)
  rows, columns = optax.assignment.hungarian_algorithm(-logits.astype(jnp.float32))
  return jnp.zeros(logits.shape, jnp.float32).at[rows, columns].set(1)


@checked
def disorder(permutation: Array) -> Array:
  """Returns the entropy of a soft permutation plus that of its rows after they are normalised, `float32[]`.

  Both are 0 for a permutation. COMET adds 1e-4 times the sum to the loss.
  """
  entropy = lambda p: -jnp.sum(p * jnp.log(jnp.maximum(p, 1e-20)))
  return entropy(permutation) + entropy(permutation / jnp.sum(permutation, 1, keepdims=True))


@checked
def permuted(weights: Array, permutation: Array) -> Array:
  """Returns `weights @ permutation`: the weights `[..., E]` of any gate, handed to other experts."""
  _refuse('permuted', permutation, weights.shape[-1])
  return weights @ permutation.astype(weights.dtype)


def _refuse(function: str, matrix: Array, experts: int | None = None) -> None:
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or experts not in (None, matrix.shape[0]):
    raise ValueError(f'moe.{function}: a matrix of shape {matrix.shape}; give one row and one column for each '
                     f'{"expert" if experts is None else f"of the {experts} experts"}.')
