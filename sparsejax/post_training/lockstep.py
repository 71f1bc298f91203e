"""Walks the program of every batch in lock-step: measures a group of targets, prunes the group, and goes on.

A *batch walk* is a `programs.Walk` of one batch. All walks wait at the first product of a group. Copies of the walks go
on to the last product of the group and collect statistics with dense weights. Then the group is pruned, and the walks
go on from where they waited, with pruned weights.
"""

import dataclasses
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp

from sparsejax import calibration, errors
from sparsejax.post_training.groups import Group
from sparsejax.post_training.targets import Index, Target, names_of
from sparsejax.programs.evaluate import Walk
from sparsejax.programs.operands import Site
from sparsejax.types import Array

Unit = tuple[str, Index]


class Solved:
  """A `Solved` is a unit that has been pruned: its weights and mask, and the error that was measured since.

  `part`, `mask`: shaped like the unit. `started`: the dense weights at the mask before any repair, or `None` if no
  repair changed a weight. `errors`: sums of squares over the outputs so far, of the dense product and of the errors
  before and after repair.
  """

  def __init__(self, part: Array, mask: Array, started: Array | None, measured: bool):
    self.part, self.mask, self.started, self.measured = part, mask, started, measured
    self.errors: list[Any] = [0.0, 0.0, 0.0]


@dataclasses.dataclass
class BatchWalk:
  """A `BatchWalk` is the walk of one batch, with the number of the batch.

  `valid(site)` returns a mask of the entries of `site.x` that count, or `None` for all of them.
  """

  number: int
  walk: Walk
  valid: Callable[[Site], Array | None]


@dataclasses.dataclass
class Lockstep:
  """A `Lockstep` holds the walks of all batches, the groups, and what has been pruned.

  `solve(unit, statistic)` prunes a unit. `solved` maps each unit that is pruned to its `Solved`.
  """

  walks: list[BatchWalk]
  targets: Mapping[str, Target]
  groups: Mapping[str, Group]
  statistic: calibration.Statistic
  solve: Callable[[Unit, Any], Solved]
  solved: dict[Unit, Solved] = dataclasses.field(default_factory=dict)
  shared: tuple[Any, Any, Any] = (None, (), None)
  shown: dict[Any, Index] = dataclasses.field(default_factory=dict)

  def run(self) -> None:
    """Prunes every unit that a batch reaches, and measures the errors of all units."""
    for each in self.walks:
      self._to_a_group(each)
    while waiting := [each for each in self.walks if each.walk.stopped]:
      first = min(waiting, key=lambda each: each.walk.position)
      group = self.groups[first.walk.site.path]
      began = group.round_of(first.walk.position)
      together = [each for each in waiting if self.groups[each.walk.site.path] is group
                  and group.round_of(each.walk.position) == began]
      for unit, statistic in self._measured(together, group).items():
        self.solved[unit] = self.solve(unit, statistic)
      for each in together:
        self._to_a_group(each)

  def _to_a_group(self, each: BatchWalk) -> None:
    """Goes on until the walk waits at a product of a unit that is not pruned yet, or ends where all units are."""
    walk = each.walk
    while walk.stopped:
      unit = self._unit(walk.site)
      if unit is not None and unit not in self.solved and walk.site.use.data:
        return
      walk.answer(None if unit is None or unit not in self.solved else self._answer(each, unit))

  def _measured(self, together: Sequence[BatchWalk], group: Group) -> dict[Unit, Any]:
    """Returns the statistic of each unit of a group, over all batches that wait for the group.

    Products of one operand, such as query, key and value, share one statistic.
    """
    sites = [each.walk.site for each in together]
    operands = [site.x for site in sites]
    key = (self.targets[sites[0].path].arrangements[sites[0].number].row_key, len(sites))
    if group.once and key == self.shared[0] and all(map(operator.is_, operands, self.shared[1])):
      unit = self._unit(sites[0])
      assert unit is not None
      return {unit: self.shared[2]}
    self.shared = (None, (), None)  # the former statistic is dropped before the next is collected
    statistics: dict[Unit, Any] = {}
    for each in together:
      self._collect(each, group, statistics)
    if group.once:
      self.shared = key, operands, *statistics.values()
    return statistics

  def _collect(self, each: BatchWalk, group: Group, statistics: dict[Unit, Any]) -> None:
    """Adds the rows of all products of a group in one batch, which the walk waits for, to `statistics`."""
    if group.once:
      self._add(each, each.walk.site, statistics)
      return
    walk, began = each.walk.copy(), each.walk.position
    while walk.stopped and not group.passed(began, walk.position):
      site, unit = walk.site, self._unit(walk.site)
      if unit is not None and site.path in group.paths and site.use.data and unit not in self.solved:
        self._add(each, site, statistics)
      pruned = self.solved.get(unit) if unit is not None else None
      walk.answer(None if pruned is None else site.product(weight=self._operand(site, pruned.part)))

  def _add(self, each: BatchWalk, site: Site, statistics: dict[Unit, Any]) -> None:
    unit = self._unit(site)
    assert unit is not None
    own = dataclasses.replace(self.targets[site.path].arrangements[site.number], eqn=site.eqn)
    rows = calibration.Rows(*own.rows(site.x, site.others, each.valid(site)))
    _check_finite(rows, names_of(self.targets[site.path], unit[1]), each.number, site)
    statistic = self.statistic(rows)
    statistics[unit] = calibration.add(statistics[unit], statistic) if unit in statistics else statistic

  def _answer(self, each: BatchWalk, unit: Unit) -> Array:
    """Returns the product with the pruned weight, and measures the error that the pruning has made."""
    site, pruned = each.walk.site, self.solved[unit]
    if pruned.measured and site.use.data:
      self._measure(site, pruned, each.valid(site))
    return site.product(weight=self._operand(site, pruned.part))

  def _measure(self, site: Site, pruned: Solved, valid: Array | None) -> None:
    x = site.x if valid is None else jnp.where(valid, site.x, jnp.zeros((), site.x.dtype))
    error = lambda part: _square(site.product(x=x, weight=site.weight - self._operand(site, part)))
    after = error(pruned.part)
    before = after if pruned.started is None else error(pruned.started)
    found = (_square(site.product(x=x)), before, after)
    pruned.errors = [a + b for a, b in zip(pruned.errors, found)]

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


def _square(y: Array) -> Array:
  return jnp.sum(jnp.square(y.astype(jnp.float32)))


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


def _check_finite(rows: calibration.Rows, name: str, batch: int, site: Site) -> None:
  if not bool(rows.finite):
    raise ValueError(f'prune: the input of {name} at {site.use.place} holds NaN or infinities in batch {batch}. '
                     'Look at the batch and at the products before, or leave the rows out with `valid`.')
