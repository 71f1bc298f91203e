"""Dynamic sparse training keeps the model as sparse as asked at every step, under a mask that moves.

All recipes start from random masks and need `key=`. Every `every` updates, up to `end`, the fraction `fraction(step)`
of the kept weights is dropped by magnitude. As many weights are grown, from zero, with fresh optimizer slots.
`gradient` below is the gradient that the update got, of all weights, because users differentiate with respect to the
parameters. Each recipe also takes the options of `transforms.sparsify`.

    tx = sj.recipes.rigl(optax.adamw(1e-3), 0.9, total_steps=10_000, key=jax.random.key(0))
    state = tx.init(params)
    params = sj.project(params, state)
"""

from collections.abc import Callable
from typing import Any

from sparsejax import allocation as allocations
from sparsejax import flows, schedules, scores, selections, transforms, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import most, random_pruning
from sparsejax.recipes.sentence import sentence
from sparsejax.selections import Selection
from sparsejax.types import Allocation, Inner, Optimizer, Pattern, PyTree, Schedule


@sentence('refresh')
def static_sparse(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
                  allocation: Allocation = allocations.erk, **options: Any) -> Optimizer:
  """Trains under a fixed random mask: `random_pruning`, the baseline of this file (Mocanu et al. 2018; Evci 2020)."""
  return random_pruning(inner, sparsity, pattern, allocation=allocation, **options)


@sentence('refresh')
def set_(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
         fraction: float | Schedule = 0.3, every: int | None = None, end: int | None = None,
         allocation: Allocation = allocations.erdos_renyi, total_steps: int | None = None, **options: Any) -> Optimizer:
  """Drops by magnitude and grows at random: SET (Mocanu et al. 2018, 1707.04780, algorithm 1).

  `fraction`: a schedule, or the start of a cosine that is 0 at `end`. From step `end` on the mask is fixed. The default
  of `end` is three quarters of `total_steps`, or the start of the fine-tune phase if that is earlier. The default of
  `every` is 100, or half of `end` if that is fewer, because the mask has to move before `end`. The
  paper drops a constant fraction of the smallest positive and the largest negative weights, once an epoch. This recipe
  drops the smallest magnitudes, as RigL's code of SET does.
  """
  last = _last('set_', end, total_steps, **options)
  update = updates.drop_and_grow(scores.random, _falling(fraction, last))
  selection = selections.leafwise(pattern, update=update, sparsity=sparsity, allocation=allocation)
  return _moving('set_', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                 **options)


@sentence('refresh')
def rigl(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
         fraction: float | Schedule = 0.3, every: int | None = None, end: int | None = None,
         allocation: Allocation = allocations.erk, probe: Callable[[PyTree], PyTree] | None = None,
         total_steps: int | None = None, **options: Any) -> Optimizer:
  """Drops by magnitude and grows where the gradient is largest: RigL (Evci et al. 2020, 1911.11134, algorithm 1).

  On steps that change the mask the weights stay as they are (algorithm 1). The optimizer's own step count does not
  advance on these steps. `fraction` is that of `set_`: the paper's cosine from 0.3, to 0 at three quarters of training.
  `probe`: a function of the parameters whose result takes the place of the gradient in growth, such as the gradient of
  a larger batch. The authors' code can revive inactive weights with old values (see `updates.drop_and_grow`).
  """
  last = _last('rigl', end, total_steps, **options)
  update = updates.drop_and_grow(scores.gradient, _falling(fraction, last))
  selection = selections.leafwise(pattern, update=update, sparsity=sparsity, allocation=allocation)
  return _moving('rigl', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                 pause=True, probe=probe, **options)


@sentence('refresh')
def snfs(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
         fraction: float | Schedule = 0.5, every: int | None = None, end: int | None = None, momentum: float = 0.9,
         allocation: Allocation = allocations.uniform, total_steps: int | None = None, **options: Any) -> Optimizer:
  """Grows by |momentum|, more in layers where it is large: SNFS, sparse momentum (Dettmers, Zettlemoyer 2019).

  1907.04840, algorithm 1. The momentum is an average of gradients that is stored beside any optimizer. Counts move
  between layers and are exact together, while the authors' code only comes near and has a floor for dense layers.
  """
  last = _last('snfs', end, total_steps, **options)
  selection = selections.redistributed(pattern, sparsity=sparsity, grow=scores.momentum, allocation=allocation,
                                       fraction=_falling(fraction, last))
  return _moving('snfs', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                 memory=scores.gradient_average(momentum), **options)


def _moving(recipe: str, inner: Inner, selection: Selection, sparsity: float | None, pattern: Any,
            allocation: Allocation, every: int | None, last: int, **options: Any) -> Optimizer:
  """Returns the sentence of all recipes that move masks: random ones first, then `selection` every `every` steps.

  From step `last` on the mask is fixed. Raises `ValueError` if nothing is pruned.
  """
  if not most(pattern, sparsity):
    raise ValueError(f'recipes.{recipe}: nothing is pruned, so that there is nothing to grow into; raise `sparsity`, '
                     'or take recipes.dense.')
  every = max(1, min(100, last // 2)) if every is None else every
  if every >= last > 1:
    raise ValueError(f'recipes.{recipe}: every={every}: the mask would never move before it is fixed at step {last}. '
                     'Lower `every`, or raise `end`.')
  first = selections.leafwise(pattern, score=scores.random, sparsity=sparsity, allocation=allocation)
  return transforms.sparsify(inner, flows.hard(), selection, first=first, **{'slots': 'fresh'} | options,
                             refresh=schedules.before(schedules.every(every), last))


def _last(recipe: str, end: int | None, total_steps: int | None, fine_tune_steps: int = 0, **options: Any) -> int:
  """Returns the step from which on the mask is fixed."""
  if end is None and total_steps is None:
    raise ValueError(f'recipes.{recipe}: pass total_steps=, the number of updates, or end=, from which on the mask is '
                     'fixed.')
  return max(min(round(0.75 * total_steps), total_steps - fine_tune_steps), 1) if end is None else end


def _falling(fraction: float | Schedule, end: int) -> Schedule:
  return fraction if callable(fraction) else schedules.cosine(fraction, 0.0, end=end)
