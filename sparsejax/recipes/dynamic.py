"""Dynamic sparse training: as sparse as asked at every step, with a mask that moves.

All start from random masks and need `key=`. Every `every` updates, up to `end`, the fraction `fraction(step)` of the
kept weights is dropped by magnitude and as many grown, from zero, with fresh optimizer slots. `gradient` below is the
one that the update got: of all weights, since the user differentiates with respect to the parameters. Each recipe also
takes the options of `transforms.sparsify`.
"""

from collections.abc import Mapping
from typing import Any

import optax

from sparsejax import allocation as allocations
from sparsejax import flows, patterns, schedules, scores, selections, transforms, updates
from sparsejax.patterns import Unstructured
from sparsejax.recipes.at_init import random_pruning
from sparsejax.types import Allocation, Pattern, Schedule

Optimizer = optax.GradientTransformationExtraArgs


def static_sparse(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    allocation: Allocation = allocations.erk, **options: Any) -> Optimizer:
  """Static sparse training: `random_pruning`, the baseline of all of these (Mocanu et al. 2018; Evci et al. 2020)."""
  return random_pruning(inner, sparsity, pattern, allocation=allocation, **options)


def set_(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    fraction: float | Schedule = 0.3, every: int = 100, end: int | None = None,
    allocation: Allocation = allocations.erdos_renyi, total_steps: int | None = None, **options: Any) -> Optimizer:
  """SET: drops by magnitude, grows at random (Mocanu et al. 2018, 1707.04780, algorithm 1).

  `fraction`: a schedule, or where its cosine to 0 at `end` begins (default: three quarters of `total_steps`). The paper
  drops the smallest positive and the largest negative weights, a constant fraction, once an epoch; this, as RigL's
  code of SET, the smallest magnitudes.
  """
  _refuse_dense('set_', sparsity, pattern)
  end = _last('set_', end, total_steps)
  update = updates.drop_and_grow(scores.random, _falling(fraction, end))
  selection = selections.leafwise(pattern, first=scores.random, update=update, sparsity=sparsity, allocation=allocation)
  return transforms.sparsify(inner, flows.hard(), selection, refresh=_until(every, end), total_steps=total_steps,
                             **{'slots': 'fresh'} | options)


def rigl(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    fraction: float | Schedule = 0.3, every: int = 100, end: int | None = None,
    allocation: Allocation = allocations.erk, total_steps: int | None = None, **options: Any) -> Optimizer:
  """RigL: drops by magnitude, grows where the gradient is largest (Evci et al. 2020, 1911.11134, algorithm 1).

  An update that moves the mask does not move the weights, as in the paper; those of the optimizer's schedules do not
  count it. `fraction` as in `set_`: the paper's cosine from 0.3, to 0 at three quarters of training. The authors' code
  can revive inactive weights with old values (see `updates.drop_and_grow`).
  """
  _refuse_dense('rigl', sparsity, pattern)
  end = _last('rigl', end, total_steps)
  update = updates.drop_and_grow(scores.gradient, _falling(fraction, end))
  selection = selections.leafwise(pattern, first=scores.random, update=update, sparsity=sparsity, allocation=allocation,
                                  instead=True)
  return transforms.sparsify(inner, flows.hard(), selection, refresh=_until(every, end), total_steps=total_steps,
                             **{'slots': 'fresh'} | options)


def snfs(
    inner: optax.GradientTransformation, sparsity: float | None = None, pattern: Pattern = Unstructured(0.9), *,
    fraction: float | Schedule = 0.5, every: int = 100, end: int | None = None, momentum: float = 0.9,
    allocation: Allocation = allocations.uniform, total_steps: int | None = None, **options: Any) -> Optimizer:
  """SNFS, sparse momentum: grows by |momentum|, more in layers where it is large (Dettmers, Zettlemoyer 2019).

  1907.04840, algorithm 1. The momentum is an average of gradients kept beside the optimizer, whichever that is. Counts
  move between layers and are exact together; the authors' code only comes near, and has a floor for dense layers.
  """
  _refuse_dense('snfs', sparsity, pattern)
  end = _last('snfs', end, total_steps)
  selection = selections.redistributed(pattern, sparsity=sparsity, grow=scores.momentum, allocation=allocation,
                                       fraction=_falling(fraction, end), memory=scores.gradient_average(momentum))
  return transforms.sparsify(inner, flows.hard(), selection, refresh=_until(every, end), total_steps=total_steps,
                             **{'slots': 'fresh'} | options)


def _refuse_dense(recipe: str, sparsity: float | None, pattern: Any) -> None:
  """Raises `ValueError` if nothing is pruned."""
  pattern = patterns.parse(pattern)
  several = list(pattern.values()) if isinstance(pattern, Mapping) else [pattern]
  if sparsity == 0 or sparsity is None and all(one.sparsity == 0 for one in several):
    raise ValueError(f'recipes.{recipe}: nothing is pruned, so that there is nothing to grow into; raise `sparsity`, '
                     'or take recipes.dense.')


def _last(recipe: str, end: int | None, total_steps: int | None) -> int:
  """The update from which on the mask is fixed."""
  if end is None and total_steps is None:
    raise ValueError(f'recipes.{recipe}: pass total_steps=, the number of updates, or end=, from which on the mask is '
                     'fixed.')
  end = max(round(0.75 * total_steps), 1) if end is None else end
  if end < 1 or total_steps is not None and end > total_steps:
    raise ValueError(f'recipes.{recipe}: end={end} is not among the {total_steps} updates.')
  return end


def _falling(fraction: float | Schedule, end: int) -> Schedule:
  return fraction if callable(fraction) else schedules.cosine(fraction, 0.0, end=end)


def _until(every: int, end: int) -> Schedule:
  return schedules.before(schedules.every(every), end)
