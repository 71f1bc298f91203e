"""Regularised recipes change the gradient so that weights shrink before they are pruned.

    tx = sj.recipes.irrelevant_weights(optax.adam(1e-3), 0.9, total_steps=10_000)
    state = tx.init(params)
"""

import math
from typing import Any

from sparsejax import flows, schedules, selections, transforms, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import Shares, most, together
from sparsejax.recipes.gradual import due_at, end_of
from sparsejax.recipes.sentence import sentence
from sparsejax.types import Inner, Optimizer, Pattern, Schedule


@sentence('refresh')
def irrelevant_weights(
    inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    gamma: float | Schedule = 1e-5, alpha: float = 1.0, every: int | None = None, removed: float = 0.1,
    allocation: Shares | None = None, total_steps: int | None = None, **options: Any) -> Optimizer:
  """Decays weights whose loss has no slope, and prunes in rounds (Bonetta et al. 2022, Regularization-based Pruning).

  Every `every` updates the fraction `removed` of the remaining weights goes, until `sparsity` is reached. The smallest
  of all leaves together go. By default the rounds end at three quarters of `total_steps`. `gamma` and `alpha`
  are those of `flows.relevance`. The paper prunes only while a validation score stays above a bound, which is left to
  the caller's loop, and has no target. The authors' code also decays and prunes biases, norms and embeddings.
  """
  asked = min(most(pattern, sparsity), 1 - 1e-6)
  rounds = max(math.ceil(math.log(1 - asked) / math.log(1 - removed)), 1)
  if every is None:
    every = max(end_of('irrelevant_weights', None, total_steps, 0.75, 0, options) // rounds, 1)
  end = end_of('irrelevant_weights', rounds * every, total_steps, 0.75, 0, options)
  ramp = schedules.density_decay(asked, end=end)
  selection = selections.leafwise(pattern, update=updates.prune_to, sparsity=sparsity, ramp=ramp,
                                  allocation=allocation or together(pattern))
  return transforms.sparsify(inner, flows.relevance(gamma, alpha), selection, total_steps=total_steps,
                             refresh=due_at(end, 0, every, options, then=False), **options)
