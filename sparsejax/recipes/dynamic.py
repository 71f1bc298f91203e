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

import optax

from sparsejax import allocation as allocations
from sparsejax import flows, schedules, scores, selections, starts, transforms, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import most, random_pruning
from sparsejax.recipes.sentence import sentence
from sparsejax.selections import Selection
from sparsejax.types import Allocation, Flow, Inner, Optimizer, Pattern, PyTree, Schedule, Score


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
  last = last_step('set_', end, total_steps, **options)
  update = updates.drop_and_grow(scores.random, falling(fraction, last))
  selection = selections.leafwise(pattern, update=update, sparsity=sparsity, allocation=allocation)
  return moving('set_', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
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
  last = last_step('rigl', end, total_steps, **options)
  update = updates.drop_and_grow(scores.gradient, falling(fraction, last))
  selection = selections.leafwise(pattern, update=update, sparsity=sparsity, allocation=allocation)
  return moving('rigl', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                 pause=True, probe=probe, **options)


@sentence('refresh')
def snfs(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
         fraction: float | Schedule = 0.5, every: int | None = None, end: int | None = None, momentum: float = 0.9,
         allocation: Allocation = allocations.uniform, total_steps: int | None = None, **options: Any) -> Optimizer:
  """Grows by |momentum|, more in layers where it is large: SNFS, sparse momentum (Dettmers, Zettlemoyer 2019).

  1907.04840, algorithm 1. The momentum is an average of gradients that is stored beside any optimizer. Counts move
  between layers and are exact together, while the authors' code only comes near and has a floor for dense layers.
  """
  last = last_step('snfs', end, total_steps, **options)
  selection = selections.redistributed(pattern, sparsity=sparsity, grow=scores.momentum, allocation=allocation,
                                       fraction=falling(fraction, last))
  return moving('snfs', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                 memory=scores.gradient_average(momentum), **options)


@sentence('refresh', 'dense_steps')
def sparcl(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.75), *, lam: float = 0.5,
           fraction: float | Schedule = 0.04, every: int | None = None, end: int | None = None,
           masks: PyTree | None = None, gradient_sparsity: float = 0.8, hold: int = 30,
           probe: Callable[[PyTree], PyTree] | None = None, allocation: Allocation = allocations.uniform,
           total_steps: int | None = None, **options: Any) -> Optimizer:
  """Moves masks by |w| + lam |g|, grows at random, and passes few gradients: SparCL (Wang et al. 2022, 2209.09476).

  Task-aware masks and dynamic gradient masks, sections 3.1 and 3.3: every `hold` updates the `1 - gradient_sparsity`
  largest gradients of each leaf are chosen, and only their weights move. `masks`: the masks of the task before; the
  default is the largest magnitudes. `probe`: a function of the parameters that returns g, the gradient of current and
  buffered examples. By default g is the gradient of the update, before any gradient is masked. Removal of examples
  (section 3.2) and replay belong to the loop. Deviations: counts are exact, ties and zeros included, while the authors'
  code drops what ties with a percentile. Its 1 % more weights in the first tenth of each task are left out.
  """
  last = last_step('sparcl', end, total_steps, 0.9, **options)
  update = updates.drop_and_grow(scores.random, steady(fraction))
  selection = selections.leafwise(pattern, score=scores.importance(lam), update=update, sparsity=sparsity,
                                  allocation=allocation)
  picked = {key: options.get(key) for key in ('where', 'axes', 'tied')}
  passing = selections.leafwise(Unstructured(gradient_sparsity), score=scores.gradient)
  inner = optax.chain(transforms.updating(passing, refresh=schedules.every(hold), **picked), inner)
  start = None if masks is None else starts.masks(masks)
  return moving('sparcl', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                score=scores.magnitude, start=start, probe=probe, **options)


@sentence('refresh')
def dsl(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.5), *,
        fraction: float | Schedule = 0.5, every: int | None = None, end: int | None = None, momentum: float = 0.9,
        allocation: Allocation = allocations.uniform, total_steps: int | None = None, **options: Any) -> Optimizer:
  """Trains sparse tables of embeddings under a constant budget: dynamic sparse learning (Wang et al. 2024, 2402.02855).

  Drops by magnitude and grows by gradient over the whole training; `fraction` falls by a cosine to a hundredth of
  itself. `where` has to name the tables, which are dense by default: `where=trees.named('**/embedding')`. A batch has
  gradients for its own rows alone, so that growth reads an average of gradients with the factor `momentum`. Deviations:
  the released code reads the last batch, and draws first masks by single weights. The abstract adjusts how the budget
  is distributed over tables. Code and recipe keep the budget of each table, and `snfs` moves counts between tables.
  """
  last = last_step('dsl', end, total_steps, 1.0, **options)
  fall = fraction if callable(fraction) else schedules.cosine(fraction, 0.01 * fraction, end=last)
  selection = selections.leafwise(pattern, update=updates.drop_and_grow(scores.momentum, fall), sparsity=sparsity,
                                  allocation=allocation)
  return moving('dsl', inner, selection, sparsity, pattern, allocation, every, last, total_steps=total_steps,
                memory=scores.gradient_average(momentum), **options)


@sentence('refresh')
def quick_selection(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
                    fraction: float | Schedule = 0.2, every: int | None = None, end: int | None = None,
                    allocation: Allocation = allocations.erdos_renyi, total_steps: int | None = None,
                    **options: Any) -> Optimizer:
  """Trains a sparse denoising autoencoder by SET, whose strengths rank features (Atashgahi et al. 2022, 2012.00560).

  Algorithm 1: the constant `fraction` of weights moves every `every` updates, an epoch in the paper. Then
  `metrics.strength(params)` of the first layer ranks the features. Grown weights start at 0, where the paper draws them
  with a deviation of 0.1, and the smallest magnitudes go, see `set_`. The paper's memory, without dense masks, is not
  that of this recipe.
  """
  last = last_step('quick_selection', end, total_steps, 1.0, **options)
  return set_(inner, sparsity, pattern, fraction=steady(fraction), every=every, end=last,
              allocation=allocation, total_steps=total_steps, **options)


def moving(recipe: str, inner: Inner, selection: Selection, sparsity: float | None, pattern: Any,
           allocation: Allocation, every: int | None, last: int, *, score: Score = scores.random,
           flow: Flow = flows.hard(), **options: Any) -> Optimizer:
  """Returns the sentence of recipes that move masks: the first ones by `score`, then `selection` every `every` steps.

  From step `last` on the mask is fixed. Raises `ValueError` if nothing is pruned.
  """
  if not most(pattern, sparsity):
    raise ValueError(f'recipes.{recipe}: nothing is pruned, so that there is nothing to grow into; raise `sparsity`, '
                     'or take recipes.dense.')
  every = max(1, min(100, last // 2)) if every is None else every
  if every >= last > 1:
    raise ValueError(f'recipes.{recipe}: every={every}: the mask would never move before it is fixed at step {last}. '
                     'Lower `every`, or raise `end`.')
  first = selections.leafwise(pattern, score=score, sparsity=sparsity, allocation=allocation)
  return transforms.sparsify(inner, flow, selection, first=first, **{'slots': 'fresh'} | options,
                             refresh=schedules.before(schedules.every(every), last))


def last_step(recipe: str, end: int | None, total_steps: int | None, part: float = 0.75, fine_tune_steps: int = 0,
              **options: Any) -> int:
  """Returns the step from which on the mask is fixed, by default after the given part of training."""
  if end is None and total_steps is None:
    raise ValueError(f'recipes.{recipe}: pass total_steps=, the number of updates, or end=, from which on the mask is '
                     'fixed.')
  return max(min(round(part * total_steps), total_steps - fine_tune_steps), 1) if end is None else end


def falling(fraction: float | Schedule, end: int) -> Schedule:
  """Returns the fraction as a schedule: a cosine from a number to 0 at step `end`."""
  return fraction if callable(fraction) else schedules.cosine(fraction, 0.0, end=end)


def steady(fraction: float | Schedule) -> Schedule:
  """Returns the fraction as a schedule, which is constant for a number."""
  return fraction if callable(fraction) else schedules.constant(fraction)
