"""Walks the program of every batch in lock-step: measures a cohort of targets, prunes the cohort, and goes on.

A *batch walk* is a `programs.Walk` of one batch. All walks wait at the first product of a cohort. Copies of the walks
go on to the last product of the cohort and collect statistics with dense weights. Then the cohort is pruned, and the
walks go on from where they waited, with pruned weights.
"""

import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import calibration, errors
from sparsejax.post_training.cohorts import Cohort
from sparsejax.post_training.recipe import Factors
from sparsejax.post_training.targets import Index, Target, names_of
from sparsejax.programs.arrangements import Arrangement
from sparsejax.programs.calls import BatchWalk
from sparsejax.programs.operands import Site
from sparsejax.types import Array

Unit = tuple[str, Index]


class Solved:
  """A `Solved` is a unit that has been pruned: its weights and mask, and the error that was measured since.

  `part`, `mask`: shaped like the unit. `started`: the dense weights at the mask before any repair, or `None` if no
  repair changed a weight. `factors`: the factors of a wrapped unit, or `None`; `part` is then dense. `errors`: sums of
  squares over the outputs so far, of the dense product and of the errors
  before and after repair.
  """

  def __init__(self, part: Array, mask: Array, started: Array | None, measured: bool, factors: Factors | None = None):
    self.part, self.mask, self.started, self.measured, self.factors = part, mask, started, measured, factors
    self.errors: list[Any] = [0.0, 0.0, 0.0]


@dataclasses.dataclass
class Lockstep:
  """A `Lockstep` holds the walks of all batches, the cohorts, and what has been pruned.

  `solve(unit, statistic)` prunes a unit. `solved` maps each unit that is pruned to its `Solved`.
  """

  walks: list[BatchWalk]
  targets: Mapping[str, Target]
  cohorts: Mapping[str, Cohort]
  statistic: calibration.Statistic
  solve: Callable[[Unit, Any], Solved]
  solved: dict[Unit, Solved] = dataclasses.field(default_factory=dict)
  shared: tuple[Any, Any, Any] = (None, (), None)
  shown: dict[Any, Index] = dataclasses.field(default_factory=dict)
  split: dict[Cohort, bool] = dataclasses.field(default_factory=dict)

  def run(self) -> None:
    """Prunes every unit that a batch reaches, and measures the errors of all units."""
    for each in self.walks:
      self._to_a_cohort(each)
    while waiting := [each for each in self.walks if each.walk.stopped]:
      first = min(waiting, key=lambda each: each.walk.position)
      cohort = self.cohorts[first.walk.site.path]
      began = cohort.round_of(first.walk.position)
      together = [each for each in waiting if self.cohorts[each.walk.site.path] is cohort
                  and cohort.round_of(each.walk.position) == began]
      if cohort.split and cohort not in self.split:
        self.split[cohort] = self._are_alone(together, cohort)
      for unit, statistic in self._measured(together, cohort).items():
        self.solved[unit] = self.solve(unit, statistic)
      for each in together:
        self._to_a_cohort(each)

  def _to_a_cohort(self, each: BatchWalk) -> None:
    """Goes on until the walk waits at a product of a unit that is not pruned yet, or ends where all units are."""
    walk = each.walk
    while walk.stopped:
      unit = self._unit(walk.site)
      if unit is not None and unit not in self.solved and walk.site.use.data:
        return
      walk.answer(None if unit is None or unit not in self.solved else self._answer(each, unit))

  def _measured(self, together: Sequence[BatchWalk], cohort: Cohort) -> dict[Unit, Any]:
    """Returns the statistic of each unit of a cohort, over all batches that wait for the cohort.

    Products of one operand, such as query, key and value, share one statistic.
    """
    sites = [each.walk.site for each in together]
    operands = [site.x for site in sites]
    key = (self.targets[sites[0].path].arrangements[sites[0].number].row_key, len(sites))
    once = self._once(cohort)
    if once and key == self.shared[0] and all(map(operator.is_, operands, self.shared[1])):
      unit = self._unit(sites[0])
      assert unit is not None
      return {unit: self.shared[2]}
    self.shared = (None, (), None)  # the former statistic is dropped before the next is collected
    statistics: dict[Unit, Any] = {}
    for each in together:
      self._collect(each, cohort, statistics)
    for unit, statistic in statistics.items():
      if not bool(_finite(statistic)):
        self._refuse(unit, together, cohort)
    if once:
      self.shared = key, operands, *statistics.values()
    return statistics

  def _once(self, cohort: Cohort) -> bool:
    """Returns whether the products at which the walks wait are all products of their units."""
    return cohort.once or self.split.get(cohort, False)

  def _are_alone(self, together: Sequence[BatchWalk], cohort: Cohort) -> bool:
    """Returns whether each unit of a cohort is used once, at the same product in all batches.

    The program does not tell where it picks layers by a number (`w[i]`), so that copies of the walks look ahead.
    """
    if len(together) < len(self.walks):
      return False
    seen: list[list[Any]] = []
    for each in together:
      walk, began = each.walk.copy(), each.walk.position
      seen.append([])
      while walk.stopped and not cohort.passed(began, walk.position):
        if walk.site.path in cohort.paths:
          seen[-1].append((walk.position, self._unit(walk.site)))
        walk.answer()
    units = [unit for _, unit in seen[0]]
    return len(set(units)) == len(units) and all(other == seen[0] for other in seen)

  def _refuse(self, unit: Unit, together: Sequence[BatchWalk], cohort: Cohort) -> None:
    """Raises `ValueError` that names the first batch that is not finite at the input of a unit."""
    for each in together:
      alone: dict[Unit, Any] = {}
      self._collect(each, cohort, alone)
      if unit in alone and not bool(_finite(alone[unit])):
        raise ValueError(f'prune: the input of {names_of(self.targets[unit[0]], unit[1])} holds NaN, infinities, or '
                         f'numbers whose squares overflow, in batch {each.number}. Look at the batch and at the '
                         'products before, or leave the rows out with `valid`.')
    raise ValueError(f'prune: the sums over the input of {names_of(self.targets[unit[0]], unit[1])} overflow; scale '
                     'the batches down.')

  def _collect(self, each: BatchWalk, cohort: Cohort, statistics: dict[Unit, Any]) -> None:
    """Adds the rows of all products of a cohort in one batch, which the walk waits for, to `statistics`."""
    if self._once(cohort):
      self._add(each, each.walk.site, statistics)
      return
    walk, began = each.walk.copy(), each.walk.position
    while walk.stopped and not cohort.passed(began, walk.position):
      site, unit = walk.site, self._unit(walk.site)
      if unit is not None and site.path in cohort.paths and site.use.data and unit not in self.solved:
        self._add(each, site, statistics)
      pruned = self.solved.get(unit) if unit is not None else None
      walk.answer(None if pruned is None else site.product(weight=self._operand(site, pruned.part)))

  def _add(self, each: BatchWalk, site: Site, statistics: dict[Unit, Any]) -> None:
    unit = self._unit(site)
    assert unit is not None
    own = dataclasses.replace(self.targets[site.path].arrangements[site.number], eqn=site.eqn)
    statistic = _measuring(self.statistic, _Shown(own.row_key, own))(site.x, site.others, each.valid(site)[0])
    statistics[unit] = calibration.add(statistics[unit], statistic) if unit in statistics else statistic

  def _answer(self, each: BatchWalk, unit: Unit) -> Array:
    """Returns the product with the pruned weight, and measures the error that the pruning has made."""
    site, pruned = each.walk.site, self.solved[unit]
    weight = self._operand(site, pruned.part)
    y = site.product(weight=weight)
    if pruned.measured and site.use.data:
      error = site.product(weight=site.weight - weight)
      first = error if pruned.started is None else site.product(
          weight=site.weight - self._operand(site, pruned.started))
      found = _energies(y, error, first, each.valid(site)[1])
      pruned.errors = [a + b for a, b in zip(pruned.errors, found)]
    return y

  def _operand(self, site: Site, part: Array) -> Array:
    made = self.targets[site.path].arrangements[site.number].operand(part)
    return made.astype(site.weight.dtype)

  def _unit(self, site: Site) -> Unit | None:
    """Returns the unit of a product, or `None` if its parameter is no target."""
    if site.path not in self.targets:
      return None
    target, key = self.targets[site.path], (site.path, site.number, site.layer)
    if key in self.shown:
      return site.path, self.shown[key]
    unit = _unit_of(target, site)
    if unit == site.layer:  # otherwise data may decide which layer is picked
      self.shown[key] = unit
    return site.path, unit


@dataclasses.dataclass(frozen=True)
class _Shown:
  """A `_Shown` is an arrangement that equals every other that shows the same rows."""

  key: Any
  own: Arrangement = dataclasses.field(compare=False)


@functools.lru_cache(maxsize=256)
def _measuring(statistic: calibration.Statistic, shown: _Shown) -> Callable[..., Any]:
  """Returns the compiled function of an operand, of the other operands and of a mask that returns the statistic."""
  return jax.jit(lambda x, others, valid: statistic(calibration.Rows(*shown.own.rows(x, others, valid))))


@jax.jit
def _finite(statistic: Any) -> Array:
  return functools.reduce(jnp.logical_and, [jnp.all(jnp.isfinite(leaf)) for leaf in jax.tree.leaves(statistic)])


@jax.jit
def _energies(y: Array, error: Array, first: Array, valid: Array | None) -> list[Array]:
  """Returns the sums of squares of the dense product `y + error`, of the first error, and of the error."""
  square, wide = lambda a: jnp.square(calibration.wide(a)), calibration.wide
  counted = lambda a: jnp.sum(a if valid is None else jnp.where(valid, a, 0))
  return [counted(square(wide(y) + wide(error))), counted(square(first)),
          counted(square(error))]


def _unit_of(target: Target, site: Site) -> Index:
  """Returns which part of the parameter a product takes, as the values tell; the loop's round is tried first.

  Raises `ValueError` if the product takes other values than those of the parameter.
  """
  own = target.arrangements[site.number]
  likely = [site.layer] if site.layer in target.units else []
  for unit in [*likely, *target.units]:
    if bool(jnp.array_equal(own.operand(target.at(target.array, unit)).astype(site.weight.dtype), site.weight)):
      return unit
  raise errors.at_leaf('prune', target.path, target.array.shape,
                       f'{site.use.place} takes other values than those of the parameter, which the program changes '
                       'before (a scale, a mask, a normalisation, a flip). Put the changed values into the parameter, '
                       'or leave it out of `where`.')

