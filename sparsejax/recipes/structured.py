"""Each structured recipe trains whole units to zero: neurons, heads and channels, which `structured.cut` removes.

`groups` come from `structured.groups`; to leave some out, pass a dict with the others. `sparsity` is the fraction of
units that are zero at the end; a `budget`, such as `structured.flops(0.5)`, takes the place of `sparsity`. Each recipe
also takes the options of `transforms.sparsify`, but `where`.

    found = sj.structured.groups(apply, params, x)
    tx = sj.recipes.group_magnitude(optax.adamw(1e-3), found, 0.5, total_steps=1000)
    ...                                                      # train
    small = sj.structured.cut(found, params)
"""

from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import optax

from sparsejax import (
  flows,
  penalties,
  saliences,
  schedules,
  scores,
  starts,
  structured,
  transforms,
  trees,
  updates,
)
from sparsejax.recipes.sentence import sentence
from sparsejax.saliences import Salience
from sparsejax.structured import Allowance, Groups
from sparsejax.types import Array, Bound, Inner, Optimizer, Schedule, Step
from sparsejax.units import belongs

SETS = ('refresh', 'where', 'axes', 'dense_steps')  # of the options of `sparsify`


@sentence(*SETS)
def group_magnitude(inner: Inner, groups: Groups, sparsity: float = 0.5, *, begin: int = 1, end: int | None = None,
                    every: int = 100, score: Salience = saliences.mean_magnitude, alone: bool = False,
                    multiple_of: int = 1, budget: Allowance | None = None, total_steps: int | None = None,
                    **options: Any) -> Optimizer:
  """Prunes the units of least magnitude, with a cubic rise (Li et al. 2017, Pruning filters; the ramp is Zhu's, 2017).

  Units are chosen every `every` updates from `begin` to `end`, by default half of `total_steps`. A unit that is zero
  stays zero. Another `score` is another method. The paper prunes a trained model once, and each layer by itself
  (`alone`): with a trained model and `begin=end`, so does this recipe.
  """
  end = _end('group_magnitude', end, total_steps, begin)
  ramp = schedules.cubic(begin=begin, end=end) if end > begin else None
  selection = structured.grouped(groups, sparsity, score=score, update=updates.prune_to, ramp=ramp, alone=alone,
                                 multiple_of=multiple_of, budget=budget)
  due = schedules.every(every, end=end - begin) if ramp else schedules.once(0)
  return transforms.sparsify(inner, flows.hard(), selection, where=belongs(groups), refresh=due, dense_steps=begin,
                             total_steps=total_steps, **options)


@sentence(*SETS)
def group_taylor(inner: Inner, groups: Groups, sparsity: float = 0.5, *, begin: int = 1, end: int | None = None,
                 every: int = 100, alone: bool = False, multiple_of: int = 1, budget: Allowance | None = None,
                 total_steps: int | None = None, **options: Any) -> Optimizer:
  """Prunes the units whose removal changes the loss least, to first order (Molchanov et al. 2019, equation 8).

  The schedule is that of `group_magnitude`. The gradient is that of the step at which units are chosen. The paper
  averages the importance over minibatches, and has gates on the outputs as a second form.
  """
  return group_magnitude(inner, groups, sparsity, begin=begin, end=end, every=every, score=saliences.taylor,
                         alone=alone, multiple_of=multiple_of, budget=budget, total_steps=total_steps, **options)


@sentence(*SETS)
def oto(inner: Inner, groups: Groups, sparsity: float = 0.5, *, penalty: float = 1e-3, epsilon: float = 0.0,
        begin: int = 1, end: int | None = None, multiple_of: int = 1, budget: Allowance | None = None,
        total_steps: int | None = None, **options: Any) -> Optimizer:
  """Trains once, towards units that are exactly zero: OTO by HSPG (Chen et al. 2021, Only Train Once, algorithm 2).

  The gradient of `penalty` times the group norm is added from the first step on. From `begin` on, a unit whose step
  leaves the half-space of `epsilon` becomes zero and stays zero. At most `sparsity` of all units become zero. The
  units that have gone farthest go first. The authors' code draws the last units at random, and goes beyond the cap.
  `inner` is SGD in the paper, whose buffer the code empties at `begin`. Consumers of a zero unit are zero, too.

  The half-space promises no number of zero units. At `end`, by default half of `total_steps`, as many of the others
  become zero as are missing to `sparsity`, or to the budget. The redundancy of DHSPG, the successor of HSPG, says which
  (Chen et al. 2023, OTOv2).
  """
  end = _end('oto', end, total_steps, begin)
  selection = structured.grouped(groups, sparsity, score=saliences.half_space(epsilon, end),
                                 update=updates.below_zero(until=end), multiple_of=multiple_of, budget=budget)
  where, due = belongs(groups), schedules.every(1, end=end - begin) if end > begin else schedules.once(0)
  pulled = transforms.penalised(penalties.group_norm(penalty, groups), where=where)
  return transforms.sparsify(optax.chain(pulled, inner), flows.hard(), selection, where=where, dense_steps=begin,
                             refresh=due, memory=scores.previous(), total_steps=total_steps, **options)


@sentence(*SETS)
def hesso(inner: Inner, groups: Groups, sparsity: float = 0.5, *, begin: int = 1, steps: int = 100, periods: int = 1,
          score: Salience = saliences.importance, multiple_of: int = 1, budget: Allowance | None = None,
          erase: Sequence[str] = (), **options: Any) -> Optimizer:
  """Chooses redundant units at the start of each of `periods` and fades them out over `steps` updates: HESSO (2024).

  Exactly the fraction `sparsity` of all units is zero in the end, without a penalty to tune (Chen et al. 2024). Each
  period takes an equal part, rounded. The authors' code rounds down, and adds the rest in the last period. Another
  `score` is another ranking of the units. `erase=structured.erasable(groups)` lets whole branches vanish, as H2SPG does
  (Chen et al. 2023, OTOv3): the authors published no code of H2SPG, and the ranking here is that of HESSO.
  """
  selection = structured.grouped(groups, sparsity, score=score, multiple_of=multiple_of, budget=budget, erase=erase,
                                 update=updates.prune_to, ramp=_in_parts(begin, steps, periods))
  fading = flows.soft_shrink(schedules.fade(steps, begin=begin, periods=periods))
  due = schedules.every(steps, end=steps * (periods - 1)) if periods > 1 else schedules.once(0)
  return transforms.sparsify(inner, fading, selection, where=belongs(groups), dense_steps=begin,
                             refresh=due, **{'allow_empty': bool(erase), **options})


@sentence(*SETS)
def dhspg(inner: Inner, groups: Groups, sparsity: float = 0.5, *, begin: int = 1, steps: int = 100, periods: int = 1,
          multiple_of: int = 1, budget: Allowance | None = None, erase: Sequence[str] = (), **options: Any
          ) -> Optimizer:
  """Chooses redundant units at `begin` by the salience of DHSPG (Chen et al. 2023, OTOv2), and fades them out.

  The paper shrinks the redundant units by a penalty of its own for each unit, and projects them by the half-space until
  all are zero. This recipe lets the units fall along a straight line over `steps` updates, as in `hesso`.
  """
  return hesso(inner, groups, sparsity, begin=begin, steps=steps, periods=periods, score=saliences.redundancy,
               multiple_of=multiple_of, budget=budget, erase=erase, **options)


@sentence(*SETS)
def wgsef(inner: Inner, groups: Groups, kept: int, learning_rate: float | Schedule, *, penalty: float = 1e-2,
          begin: int = 1, multiple_of: int = 1, budget: Allowance | None = None, **options: Any) -> Optimizer:
  """Trains towards `kept` units by the proximal step of the group sparse envelope (WGSEF, 2023); exact from `begin` on.

  At `begin` the `kept` units of the largest norm stay, or as many as a `budget` allows, and all others are zero. All
  units have the weight one. `learning_rate` is that of `inner`, whose proximal steps are as long.
  """
  sizes, where = sum(group.size for group in groups.values()), belongs(groups)
  if not len(groups) <= kept <= sizes:
    raise ValueError(f'recipes.wgsef: kept={kept} of {sizes} units in {len(groups)} groups; keep one of each at least.')
  near = transforms.proximal(inner, penalties.sparse_envelope(penalty, groups, kept), learning_rate, where=where)
  selection = structured.grouped(groups, 1 - kept / sizes, multiple_of=multiple_of, budget=budget)
  return transforms.sparsify(near, flows.hard(), selection, where=where, dense_steps=begin, refresh=schedules.once(0),
                             **options)


@sentence(*SETS)
def norm_scale(inner: Inner, groups: Groups, sparsity: float = 0.5, *, scales: str = 'scale', penalty: float = 1e-4,
               begin: int = 1, multiple_of: int = 1, budget: Allowance | None = None, **options: Any) -> Optimizer:
  """Pulls the scales of norms to zero by l1, and prunes the units of least scale (Liu et al. 2017, slimming).

  `scales`: a glob of the parameters that scale a normalised unit, such as `BatchNorm_*/scale`. Each group needs one.
  At `begin` all units compete by |scale|, a threshold over all layers as in the paper.
  """
  pulled = transforms.penalised(penalties.l1(penalty), where=trees.named(scales))
  selection = structured.grouped(groups, sparsity, score=saliences.matching(scales), multiple_of=multiple_of,
                                 budget=budget)
  return transforms.sparsify(optax.chain(pulled, inner), flows.hard(), selection, where=belongs(groups),
                             dense_steps=begin, refresh=schedules.once(0), **options)


@sentence(*SETS)
def latency_aware(inner: Inner, groups: Groups, sparsity: float = 0.5, *, penalty: float = 1e-7,
                  cost: Any = None, begin: int = 1, multiple_of: int = 1, budget: Allowance | None = None,
                  **options: Any) -> Optimizer:
  """Adds a differentiable estimate of the multiply-adds to the loss, and prunes the smallest units at `begin`.

  `cost` is a function of effective sizes, see `penalties.latency`. The default is `structured.multiply_adds(groups)`.
  The published method learns gates; here the norm of what produces a unit stands for its gate.
  """
  where = belongs(groups)
  surrogate = penalties.latency(penalty, groups, cost or structured.multiply_adds(groups))
  pulled = transforms.penalised(surrogate, where=where)
  selection = structured.grouped(groups, sparsity, multiple_of=multiple_of, budget=budget)
  return transforms.sparsify(optax.chain(pulled, inner), flows.hard(), selection, where=where, dense_steps=begin,
                             refresh=schedules.once(0), **options)


@sentence(*SETS, 'start')
def hap(inner: Inner, groups: Groups, sparsity: float = 0.5, *, loss: Any, samples: int = 300, key: Any,
        implants: float = 0.0,
        multiple_of: int = 1, budget: Allowance | None = None, **options: Any) -> Optimizer:
  """Prunes a trained model by the trace of the Hessian, then trains on: HAP (Yu et al. 2022, equation 6).

  `loss(params)`: the loss of a batch, in evaluation mode. `samples`: the random vectors of the trace. All units
  compete; the paper keeps at least 5 % of a layer, here one unit of each group. `implants`: the fraction of the units
  to be pruned that keep the centre tap of their filters, the neural implant of the paper (its code has 0.1).
  `structured.split_centers` makes 1 x 1 convolutions of these filters after the cut.
  """
  selection = structured.implanted(groups, sparsity, implants, score=saliences.hessian_trace, budget=budget,
                                   multiple_of=multiple_of)
  probe = starts.hutchinson(starts.needed('hap', 'loss', loss, 'params -> scalar'), samples, key)
  return transforms.sparsify(inner, flows.hard(), selection, where=belongs(groups), refresh=schedules.once(0),
                             start=starts.probed(probe), key=key, **options)


def _in_parts(begin: int, steps: int, periods: int) -> Schedule | None:
  """Returns the ramp that rises by an equal part at the start of each period; `None` for one period."""
  return Bound(_part, (begin, steps, periods)) if periods > 1 else None


def _part(step: Step, begin: int, steps: int, periods: int) -> Array:
  return jnp.minimum((jnp.asarray(step) - begin) // steps + 1, periods).astype(jnp.float32) / periods


def _end(recipe: str, end: int | None, total_steps: int | None, begin: int) -> int:
  """Returns the step of the last choice. Raises `ValueError` if it is before the first, or if nothing tells it."""
  if end is None:
    if total_steps is None:
      raise ValueError(f'recipes.{recipe}: pass total_steps=, the number of updates, or end=.')
    end = max(total_steps // 2, begin)
  if end < begin:
    raise ValueError(f'recipes.{recipe}: end={end} is before begin={begin}.')
  return end
