"""Recipes with a structure over layers or tasks prune to modules that grow by correlation, and to masks for tasks.

    tx = sj.recipes.g2gnet(optax.adam(1e-3), 0.75, groups=8, total_steps=10_000, key=jax.random.key(0),
                           probe=sj.starts.correlation(apply, x))
    tx = sj.recipes.cl_dst(optax.adam(1e-3), 0.8, bank=bank, total_steps=10_000, key=jax.random.key(0))
"""

from collections.abc import Callable
from typing import Any

from sparsejax import allocation as allocations
from sparsejax import continual, flows, scores, selections, transforms, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.dynamic import falling, last_step, moving
from sparsejax.recipes.sentence import sentence
from sparsejax.types import Allocation, Array, Inner, Optimizer, Pattern, PyTree, Schedule, Score


@sentence('refresh')
def g2gnet(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.75), *, groups: int = 2,
           shuffle: Array | None = None, probe: Callable[[PyTree], PyTree] | None = None,
           fraction: float | Schedule = 0.3, every: int | None = None, end: int | None = None,
           allocation: Allocation = allocations.uniform, total_steps: int | None = None, **options: Any) -> Optimizer:
  """Begins with modules between layers, drops by magnitude, and grows by a Hebbian rule: G2GNet.

  `groups` and `shuffle` are those of `scores.modular`: weights between equal modules come first, up to the count.
  `probe=starts.correlation(apply, x)` grows weights where inputs and outputs correlate most over the batch `x`; without
  a probe the gradient decides, as in RigL. The structure is that of the abstract. The constants and the form of the
  correlation are ours, since no code of the paper could be read.
  """
  last = last_step('g2gnet', end, total_steps, **options)
  selection = selections.leafwise(pattern, update=updates.drop_and_grow(scores.gradient, falling(fraction, last)),
                                  sparsity=sparsity, allocation=allocation)
  return moving('g2gnet', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                score=scores.modular(groups, shuffle), probe=probe, **options)


@sentence('refresh')
def cl_dst(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.8), *,
           bank: continual.Bank | None = None, grow: Score = scores.random, fraction: float | Schedule = 0.5,
           every: int | None = None, end: int | None = None, allocation: Allocation = allocations.uniform,
           total_steps: int | None = None, **options: Any) -> Optimizer:
  """Trains the mask and the free weights of one task after others: CL with DST (Yildirim et al. 2023, 2308.14831).

  `bank`: the tasks before, see `continual`; training begins from `bank.params`. The mask is drawn over all weights and
  moves as in SET, or by another score `grow`. Weights of earlier tasks may be used, and never change. A weight that
  returns has the value behind its zero, as the weight of an earlier task must. A free weight does so too, while the
  authors' code grows it from zero. Counts are exact, where the code draws first masks and growth by single weights.
  The code leaves biases and norms to drift; `Bank` holds those of each task.
  """
  last = last_step('cl_dst', end, total_steps, 1.0, **options)
  inner = inner if bank is None else transforms.protected(inner, bank.used())
  selection = selections.leafwise(pattern, update=updates.drop_and_grow(grow, falling(fraction, last)),
                                  sparsity=sparsity, allocation=allocation)
  return moving('cl_dst', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                flow=flows.remembered(), **options)
