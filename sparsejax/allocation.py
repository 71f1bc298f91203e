"""Allocations: how a sparsity asked of the whole is shared out among the leaves.

An allocation is `allocation(leaves, sparsity) -> sparsities`, both mappings by path, over the sparse leaves only.
"""

from collections.abc import Callable, Mapping

from sparsejax import trees
from sparsejax.types import Array


def uniform(leaves: Mapping[str, Array], sparsity: float) -> dict[str, float]:
  """Every leaf gets the same sparsity."""
  return dict.fromkeys(leaves, sparsity)


def custom(sparsities: Mapping[str, float]) -> Callable[[Mapping[str, Array], float], dict[str, float]]:
  """Sparsities by glob: `custom({'block_0/**': 0.5, '**': 0.9})`; the first glob that matches decides.

  Raises `ValueError` for a leaf that no glob covers, and for a glob that covers none.
  """
  def allocate(leaves: Mapping[str, Array], sparsity: float) -> dict[str, float]:
    del sparsity
    return dict(zip(leaves, trees.per_leaf('allocation.custom', 'sparsities', sparsities, list(leaves))))

  return allocate
