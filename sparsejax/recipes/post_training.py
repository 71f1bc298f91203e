"""Pruning after training: each recipe is a paper's method as a value, which `sj.prune` runs on a few batches of data.

`sparsity` is asked of each leaf, by default the pattern's own; `allocation` shares it out otherwise. Papers that prune
one matrix as a whole and papers that prune each output by itself differ in the default `pattern`.

    out = sj.prune(apply, params, batches, sj.recipes.wanda(0.5))
    out = sj.prune(apply, params, batches, sj.recipes.sparsegpt(pattern=sj.NM(2, 4)))
"""

from collections.abc import Mapping
from typing import Any

from sparsejax import allocation as allocations
from sparsejax import calibration, patterns, scores
from sparsejax.arguments import checked
from sparsejax.patterns import Unstructured
from sparsejax.post_training import Recipe
from sparsejax.types import Allocation, Pattern

Patterns = Pattern | Mapping[str, Pattern]
Shares = Allocation | allocations.Ranked


@checked
def magnitude(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5), *,
              allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes by |w|, without data and without repair: the baseline of all papers here (Han et al. 2015, 1506.02626)."""
  return _recipe('magnitude', pattern, sparsity, allocation, score=scores.magnitude)


@checked
def wanda(sparsity: float | None = None, pattern: Patterns = Unstructured(0.5, balanced=True), *,
          allocation: Shares = allocations.uniform) -> Recipe:
  """Prunes by |w| times the norm of the input, compared within an output: Wanda (Sun et al. 2023, 2306.11695, eq. 1).

  No weight is repaired. The authors' code rounds the count of an output down and measures each decoder block dense,
  which `sequential=` of `sj.prune` can do. Among equal scores it prunes the lower index, and `ranking` the higher.
  """
  return _recipe('wanda', pattern, sparsity, allocation, score=scores.wanda, statistic=calibration.moments)


def _recipe(name: str, pattern: Any, sparsity: float | None, allocation: Shares, **words: Any) -> Recipe:
  return Recipe(patterns.parse(pattern), sparsity, allocation=allocation, name=name, **words)
