"""Has the sentences for weights with a prior: a sparse Gaussian posterior, and zeros that cluster along rows.

    params = bayes.gaussian(params)
    tx = recipes.ssvi(optax.sgd(0.01, 0.9), 0.9, total_steps=10_000, key=jax.random.key(0))
    tx = recipes.turbo_vbi(optax.adamw(1e-3), 0.9, total_steps=10_000)
"""

from typing import Any

from sparsejax import allocation as allocations
from sparsejax import bayes, scores, selections, trees, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.dynamic import falling, last_step, moving
from sparsejax.recipes.gradual import gradual_magnitude
from sparsejax.recipes.sentence import sentence
from sparsejax.types import Allocation, Inner, Optimizer, Pattern, Predicate, PyTree, Schedule, Score

_TIED, _SNR = {'**/rho': '**/mean'}, bayes.offset(scores.snr)


@sentence('refresh', 'tied')
def ssvi(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
         fraction: float | Schedule = 0.3, every: int | None = None, end: int | None = None,
         score: Score = _SNR, allocation: Allocation = allocations.uniform,
         where: Predicate | PyTree | None = None, total_steps: int | None = None, **options: Any) -> Optimizer:
  """Trains a Gaussian posterior that is sparse all along: sparse subspace variational inference (Li et al. 2024).

  2402.16359, algorithm 1. The parameters are those of `bayes.gaussian`; mean and rho have one mask. Weights of the
  least signal-to-noise ratio E|w| / sd|w| are dropped and as many grown by |dL/dmean|, from mean 0. Weights stay as
  they are on these steps. A grown weight begins with the first deviation, 6e-4, where the authors' code takes
  softplus of the mean rho of the layer. The code keeps the first layer dense; say so by `where`, of which the default
  is every `mean`.
  """
  last = last_step('ssvi', end, total_steps, **{k: v for k, v in options.items() if k == 'fine_tune_steps'})
  update = updates.drop_and_grow(scores.gradient, falling(fraction, last))
  selection = selections.leafwise(pattern, score=score, update=update, sparsity=sparsity, allocation=allocation)
  return moving('ssvi', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                pause=True, tied=_TIED, where=trees.named('**/mean') if where is None else where, **options)


@sentence('refresh')
def turbo_vbi(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
              p01: float = 0.1, p10: float = 0.2, begin: int = 0, end: int | None = None, every: int = 100,
              total_steps: int | None = None, **options: Any) -> Optimizer:
  """Prunes by the posterior of a Markov prior, so that zeros cluster along the rows: Turbo-VBI (Xia et al. 2023).

  The score is the log-odds of `bayes.support`, smoothed by a sum-product pass. `p01` is the probability that a kept
  weight follows a pruned one, and `p10` the reverse. The rho of the three-layer prior are integrated out. The paper's
  variational loop has no count. In this sentence the sparsity rises as in `gradual_magnitude`, and the optimizer's
  weight decay stands for the gradient of the prior.
  """
  score = scores.smoothed(bayes.support(), p01, p10)
  return gradual_magnitude(inner, sparsity, pattern, begin=begin, end=end, every=every, score=score,
                           total_steps=total_steps, **options)
