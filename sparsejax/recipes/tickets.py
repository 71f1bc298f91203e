"""Tickets are sparse networks that are found in trained networks.

    tx = sj.recipes.iterative_magnitude(optax.sgd(0.1), 0.8, ticket=trained)
    state = tx.init(rewound)                       # masks by |trained|; `rewound` are the weights to train
    params = sj.project(rewound, state)
"""

from typing import Any

import jax.numpy as jnp
import optax

from sparsejax import flows, schedules, scores, selections, starts, transforms, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import Shares, chosen_once
from sparsejax.recipes.sentence import sentence
from sparsejax.types import Inner, Optimizer, Pattern, Predicate, PyTree, Schedule

# The memory of `flows.searched`: the pretrained weight itself, which never changes.
_WEIGHT = scores.Memory(lambda w: jnp.array(w, copy=True), lambda weight, w, signals: weight)


@sentence('refresh')
def iterative_magnitude(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
                        ticket: PyTree | None = None, allocation: Shares | None = None, **options: Any) -> Optimizer:
  """Trains under the mask of the largest magnitudes of `ticket`, trained parameters: a round of IMP.

  Frankle and Carbin 2019, 1803.03635, section 2; Renda et al. 2020, 2003.02389. `init` and `update` get the weights to
  train: the weights of an early step for weight rewinding, `ticket` itself (the default) for learning-rate rewinding. A
  weight that is zero in `ticket` is pruned again. The ranking is over all leaves and exact, while the authors' code
  keeps the weights that tie at an interpolated percentile.
  """
  start = starts.probed(starts.of(ticket)) if ticket is not None else None
  score = scores.magnitude if ticket is None else scores.gradient
  return chosen_once(inner, pattern, sparsity, allocation, score, start, **options)


@sentence('refresh')
def l1_sparse(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
              penalty: float = 5e-4, ticket: PyTree | None = None, allocation: Shares | None = None,
              total_steps: int | None = None, **options: Any) -> Optimizer:
  """Trains a pruned model on retained data with a fading l1 penalty: sparse unlearning (Jia et al. 2023).

  2304.04934, section 4. The mask is that of `iterative_magnitude`, by the magnitudes of `ticket`. The subgradient
  `penalty sign(w)` is added before `inner`. `penalty` falls linearly to 0 over `total_steps`; without a number of
  steps it stays. The authors' code steps once an epoch and penalises every parameter, while here dense leaves go
  free. Give `update` the gradients of retained examples.
  """
  fading = schedules.linear(penalty, 0.0, end=total_steps) if total_steps else penalty
  start = starts.probed(starts.of(ticket)) if ticket is not None else None
  score = scores.magnitude if ticket is None else scores.gradient
  return chosen_once(inner, pattern, sparsity, allocation, score, start, flow=flows.lasso(fading),
                     total_steps=total_steps, **options)


@sentence()
def lottery_jackpot(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
                    restriction: Schedule | None = None, total_steps: int | None = None,
                    where: Predicate | PyTree | None = None, axes: Any = None, **options: Any) -> Optimizer:
  """Searches masks of pretrained weights, which are fixed: lottery jackpots (Zhang et al. 2023, 2104.08700).

  `inner` trains a score of each weight by w dL/dw'. A score begins at 1 where the magnitude mask keeps the weight, and
  at 0.99 elsewhere. All other parameters are frozen. `restriction(step)` is the part of the changes that is made. The
  default is (1 - step / total_steps)^4, which the released code seems to mean (there the part is 1 throughout). All
  changes are made without `total_steps` and `restriction`, and under another pattern than unstructured.
  """
  short = restriction or (total_steps and schedules.polynomial(power=4, end=total_steps))
  if short and not isinstance(pattern, Unstructured):
    if restriction:
      raise ValueError(f'recipes.lottery_jackpot: the restriction counts changes in a leaf, and {pattern} in a unit of '
                       'it; leave out restriction=, or search unstructured masks.')
    short = None
  picked = {'where': where, 'axes': axes}
  searched = selections.leafwise(pattern, score=scores.value, sparsity=sparsity,
                                 update=updates.swap(short) if short else updates.reselect)
  return transforms.sparsify(
      optax.chain(inner, transforms.only(**picked)), flows.searched(), searched, memory=_WEIGHT,
      first=selections.leafwise(pattern, sparsity=sparsity), total_steps=total_steps, **picked, **options)
