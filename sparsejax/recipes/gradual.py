"""Gradual pruning raises the sparsity from dense to sparse while the model trains.

Steps are counted in updates. Each recipe also takes the options of `transforms.sparsify`.

    tx = sj.recipes.gradual_magnitude(optax.adamw(1e-3), 0.9, total_steps=10_000)
    state = tx.init(params)
    updates, state = tx.update(grads, state, params)
"""

from typing import Any

import optax

from sparsejax import allocation as allocations
from sparsejax import flows, schedules, scores, selections, transforms, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import Shares, most, together
from sparsejax.recipes.sentence import sentence
from sparsejax.types import Inner, Optimizer, Pattern, Schedule, Score


@sentence('refresh')
def gradual_magnitude(
    inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    begin: int = 0, end: int | None = None, every: int = 100, initial: float = 0.0, score: Score = scores.magnitude,
    memory: scores.Memory | None = None, allocation: Shares = allocations.uniform, total_steps: int | None = None,
    **options: Any) -> Optimizer:
  """Prunes by magnitude, with a cubic rise from `initial` (Zhu and Gupta 2017, To prune, or not to prune, equation 1).

  Masks are chosen at `begin`, every `every` updates from then on, and at `end`. The default is three quarters of
  `total_steps`, or the start of the fine-tune phase if that is earlier. A pruned weight stays pruned, at zero; the
  authors' code keeps hidden values, which may return.
  Another `score`, with its `memory`, is another method: `scores.fisher`, or `scores.snip`, Taylor pruning.
  """
  end = end_of('gradual_magnitude', end, total_steps, 0.75, begin, options)
  ramp = schedules.cubic(_part('gradual_magnitude', initial, sparsity, pattern), 1.0, begin=begin, end=end)
  selection = selections.leafwise(
      pattern, score=score, update=updates.prune_to, sparsity=sparsity, ramp=ramp, allocation=allocation)
  return transforms.sparsify(inner, flows.hard(), selection, memory=memory, total_steps=total_steps,
                             refresh=due_at(end, begin, every, options, then=False), **options)


@sentence('refresh')
def movement_pruning(
    inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    begin: int = 0, end: int | None = None, every: int = 1, initial: float = 0.0,
    score_optimizer: optax.GradientTransformation = optax.sgd(1.0), allocation: Shares = allocations.uniform,
    total_steps: int | None = None, **options: Any) -> Optimizer:
  """Keeps the weights that move away from zero: movement pruning (Sanh et al. 2020, 2005.07683, section 4, equation 2).

  The score sums -w dL/dw' by `score_optimizer`; the released code uses Adam(1e-2). A pruned weight keeps its value and
  may return. The sparsity rises as in `gradual_magnitude`.
  """
  end = end_of('movement_pruning', end, total_steps, 0.75, begin, options)
  ramp = schedules.cubic(_part('movement_pruning', initial, sparsity, pattern), 1.0, begin=begin, end=end)
  selection = selections.leafwise(pattern, score=scores.movement, sparsity=sparsity, ramp=ramp, allocation=allocation)
  return transforms.sparsify(
      inner, flows.remembered(), selection, memory=scores.accumulated_movement(score_optimizer),
      total_steps=total_steps, refresh=due_at(end, begin, every, options, then=True), **options)


@sentence()
def soft_movement_pruning(inner: Inner, threshold: float = 0.1, penalty: float = 1.0, *, begin: int = 0,
                          end: int | None = None, score_optimizer: optax.GradientTransformation = optax.adam(1e-2),
                          total_steps: int | None = None, **options: Any) -> Optimizer:
  """Keeps sigmoid(S) > tau, with a penalty on mean(sigmoid(S)): soft movement pruning (Sanh et al. 2020, section 4.2).

  tau rises from 0 to `threshold`, and the penalty, of each leaf's own mean, from 0 to `penalty`. Both are cubic from
  `begin` to `end`. The released code's lambda is of the mean over all matrices: divide it by their number. The sparsity
  comes out of training, with at least half a percent of each layer kept. The masks are unstructured.
  """
  end = end_of('soft_movement_pruning', end, total_steps, 0.75, begin, options)
  rise = lambda top: schedules.cubic(0.0, top, begin=begin, end=end)
  return transforms.sparsify(
      inner, flows.remembered(), selections.score_threshold(scores.soft_movement, rise(threshold)),
      memory=scores.accumulated_movement(score_optimizer, rise(penalty)), total_steps=total_steps, **options)


@sentence('refresh')
def global_sparse_momentum(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
                           weight_decay: float = 1e-4, dense_steps: int | None = None, total_steps: int | None = None,
                           **options: Any) -> Optimizer:
  """Passes the gradient to the global top of |w dL/dw|, while the rest decays: GSM (Ding et al. 2019, algorithm 1).

  `inner` is SGD with a momentum of 0.98 or 0.99 in the paper. The coupled `weight_decay` of all sparse leaves is added
  before `inner`. After `dense_steps` the global magnitude decides the mask. The default is the last update but one, or
  the number that leaves `fine_tune_steps`; the paper does not fine-tune. The authors' code keeps all weights that tie
  at the threshold, while the count here is exact.
  """
  if dense_steps is None:
    last = end_of('global_sparse_momentum', None, total_steps, 1.0, 0, {})
    dense_steps = last - max(options.get('fine_tune_steps', 0), 1)
  rank = lambda score: selections.leafwise(pattern, score=score, sparsity=sparsity, allocation=together(pattern))
  where = {key: options.get(key) for key in ('where', 'axes', 'tied')}
  active = transforms.updating(rank(scores.snip), weight_decay=weight_decay, **where)
  return transforms.sparsify(optax.chain(active, inner), flows.hard(), rank(scores.magnitude),
                             refresh=schedules.once(0), dense_steps=dense_steps, total_steps=total_steps, **options)


@sentence()
def iterative_soft_shrinkage(inner: Inner, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
                             shrink: float | Schedule = 0.95, total_steps: int | None = None,
                             fine_tune_steps: int | None = None, **options: Any) -> Optimizer:
  """Multiplies the smallest weights by `shrink` after every step: ISS-P (Wang et al. 2023, 2303.09650).

  The mask is chosen anew at every step, at the full sparsity from the first step on, in each layer. In the last
  `fine_tune_steps` (default: half of `total_steps`) the last mask is fixed. The released code rounds the count up and
  leaves at least 0.5 % of a layer.
  """
  total = end_of('iterative_soft_shrinkage', None, total_steps, 1.0, 0, options)
  tuned = total // 2 if fine_tune_steps is None else fine_tune_steps
  return transforms.sparsify(inner, flows.soft_shrink(shrink), selections.leafwise(pattern, sparsity=sparsity),
                             total_steps=total, fine_tune_steps=tuned, **options)


def due_at(end: int, begin: int, every: int, options: Any, *, then: bool) -> Schedule:
  """Returns when masks are chosen: every `every` updates from `begin` on, and at `end`; after `end` too with `then`.

  `sparsify` counts from the end of the dense phase, while `begin` and `end` count all updates, as the ramp does.
  """
  regular = schedules.every(every, begin=begin, end=None if then else end)
  due = schedules.either(regular, schedules.once(end)) if then and (end - begin) % every else regular
  dense_steps = options.get('dense_steps', 0)
  return schedules.delayed(due, -dense_steps) if dense_steps else due


def _part(recipe: str, initial: float, sparsity: float | None, pattern: Pattern) -> float:
  """Returns the part of the sparsity that is asked at the beginning."""
  target = most(pattern, sparsity)
  if initial > target:
    raise ValueError(f'recipes.{recipe}: initial={initial} is above the sparsity at the end, {target}; the sparsity '
                     'rises from `initial`.')
  return initial and initial / target


def end_of(recipe: str, end: int | None, total_steps: int | None, part: float, begin: int, options: Any) -> int:
  """Returns the step at which a ramp ends, by default within its phase. Raises `ValueError` if it has no steps."""
  if end is None and total_steps is None:
    raise ValueError(f'recipes.{recipe}: pass total_steps=, the number of updates{", or end=" if part < 1 else ""}.')
  first = max(begin, options.get('dense_steps', 0))
  if end is None:
    last = total_steps - options.get('fine_tune_steps', 0)
    end = min(round(part * total_steps), last)
    end = end if end > first else last
  if end <= first:
    raise ValueError(f'recipes.{recipe}: the ramp from begin={begin} to end={end} is over before it begins, or before '
                     f'the dense phase is ({options.get("dense_steps", 0)} updates). Let it end later, or raise '
                     'total_steps.')
  return end
