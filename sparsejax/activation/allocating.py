"""Divides the skipped inputs among weights: by the least added error, `greedy`, or by a bound on each error, `ppl`.

    sparsify(apply, params, batches, wina(0.5), allocation=greedy(0.025))
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np

from sparsejax import arguments
from sparsejax.activation.in_order import in_order
from sparsejax.activation.measuring import (
  FUNCTION,
  Observed,
  Thresholds,
  below,
  over_batches,
  results_moved,
  runs,
  skipping,
  tested,
)
from sparsejax.activation.places import Unit, Weights
from sparsejax.activation.rules import PerplexityRule, Rule, error_bound, over_scale
from sparsejax.argument_kinds import RAISED
from sparsejax.arguments import checked
from sparsejax.programs.calls import Calls
from sparsejax.types import Array

arguments.declare('greedy', step=RAISED)

LEVELS = np.linspace(0.0, 0.95, 20)  # sparsities at which the errors of a product are measured
MIDDLE = 10  # the number of the level, 0.5, at which the move of the results is measured


class Greedy(NamedTuple):
  """A `Greedy` raises one sparsity after the other, by `step` times the mean size over the size of the weight."""

  step: float

  def __call__(self, errors: Mapping[Unit, np.ndarray], sizes: Mapping[Unit, int], sparsity: float
               ) -> dict[Unit, float]:
    """Returns the sparsity of each unit, of which the mean, weighted by size, is `sparsity`.

    `errors` are the relative errors of each unit at `LEVELS`, linear between. The unit whose step adds the least error
    is raised. Ties go to the first unit, and the last step is cut to the sparsity that is left.
    """
    mean, total = np.mean(list(sizes.values())), sum(sizes.values())
    found, left = dict.fromkeys(sizes, 0.0), sparsity * total
    at = lambda unit, level: np.interp(level, LEVELS, errors[unit])
    next_of = lambda unit: min(found[unit] + self.step * mean / sizes[unit], LEVELS[-1])
    while left > 1e-9 * total:
      able = [unit for unit in found if found[unit] < LEVELS[-1]]
      if not able:
        raise ValueError(f'{FUNCTION}: greedy reaches {LEVELS[-1]} everywhere before {sparsity}; ask for less.')
      unit = min(able, key=lambda unit: at(unit, next_of(unit)) - at(unit, found[unit]))
      raised = min(next_of(unit) - found[unit], left / sizes[unit])
      found[unit], left = found[unit] + raised, left - raised * sizes[unit]
    return {unit: float(level) for unit, level in found.items()}


@checked
def greedy(step: float = 0.025) -> Greedy:
  """Returns the allocation of TEAL (Liu et al. 2024, 2408.14690, algorithm 1): equal steps where they cost least.

  Deviation: the error of a step is the relative squared error of the weight's own product, times how far such an error
  moves the results. The errors are measured once, at 20 sparsities and with dense inputs. The move
  is measured once for each weight, at a sparsity of 0.5 of this weight alone, and results of padding count. The errors
  of weights add. The authors measure the output of the block anew for each step.
  """
  return Greedy(step)


def shared(calls: Calls, places: Weights, rule: Rule, own: Mapping[Unit, Any],
           found: Mapping[Unit, list[Any]], allocation: Greedy) -> dict[Unit, float]:
  """Returns the sparsities that an allocation gives the units."""
  if rule.neurons or rule.rest is not None:
    raise ValueError(f'{FUNCTION}: an allocation divides the skipped inputs of teal and wina, not those of '
                     f'{rule.name}; leave `allocation` out.')
  histograms = {unit: over_batches(each) for unit, each in found.items()}

  def limits_at(level: float) -> Thresholds:
    return {unit: rule.thresholds(each.quantile(rule.level(level)), own[unit]) for unit, each in histograms.items()}

  levels = [_errors(calls, places, limits_at(level)) for level in LEVELS[1:]]
  dense, limits = runs(calls, places, lambda seen: None), limits_at(LEVELS[MIDDLE])
  errors = {}
  for unit in found:
    error = levels[MIDDLE - 1][unit]
    reach = _moved_by(calls, places, limits, unit, dense) / error if error else 0.0
    errors[unit] = reach * np.asarray([0.0, *(sums[unit] for sums in levels)])
  sizes = {unit: int(np.prod(places[unit[0]].first.shape)) for unit in found}
  return allocation(errors, sizes, rule.sparsity)


def _moved_by(calls: Calls, places: Weights, limits: Thresholds, unit: Unit, dense: list[list[Any]]) -> float:
  """Returns the squared move of the results over their squared norm if `unit` alone skips inputs."""
  skips = below(limits)

  def visit(observed: Observed) -> list[Any] | None:
    seen = observed.product
    return skipping(seen, skips(seen), {})[1] if seen.unit == unit else None

  return results_moved(dense, runs(calls, places, visit))


def _errors(calls: Calls, places: Weights, limits: Thresholds) -> dict[Unit, float]:
  """Returns the relative squared error of each product, with dense inputs."""
  sums: dict[Unit, list[float]] = {unit: [0.0, 0.0] for unit in limits}

  def visit(observed: Observed) -> None:
    seen, valid = observed.product, observed.valid
    if seen.unit not in limits:
      return
    skipped = jnp.where(below(limits)(seen), seen.x, jnp.zeros((), seen.x.dtype))
    parts = skipped if valid is None else jnp.where(valid, skipped, 0), seen.x if valid is None else jnp.where(
        valid, seen.x, 0)
    (error,), (whole,) = (seen.answered(part) for part in parts)
    sums[seen.unit] = [a + float(jnp.sum(jnp.square(b.astype(jnp.float32)))) for a, b in zip(
        sums[seen.unit], (error, whole))]

  runs(calls, places, visit)
  return {unit: error / whole if whole else 0.0 for unit, (error, whole) in sums.items()}


def bounded(calls: Calls, places: Weights, rule: PerplexityRule, sequential: bool) -> Thresholds:
  """Returns the thresholds of the largest bound on the relative errors at which the perplexity rises as allowed."""
  inputs: dict[Unit, list[Observed]] = {}
  results = runs(calls, places, lambda seen: inputs.setdefault(seen.product.unit, []).append(seen))
  rows = {unit: _counted_rows(each) for unit, each in inputs.items()}
  dense = _loss(calls, rule, results)
  units = [unit for place in places.values() for unit in place.units]

  def tried(bound: float) -> tuple[Thresholds, list[list[Any]]]:
    limit = lambda unit, rows: _bounded_limit(places[unit[0]].stack(unit), rows, bound)
    if sequential:
      return in_order(calls, places, lambda unit, seen: limit(unit, _counted_rows(seen)), {})
    limits = {unit: limit(unit, rows.get(unit)) for unit in units}
    return limits, tested(calls, places, below(limits), {})[1]

  low, high, best = 0.0, 1.0, tried(0.0)[0]
  while high - low > rule.tolerance:
    middle = (low + high) / 2
    limits, results = tried(middle)
    if _loss(calls, rule, results) - dense <= np.log1p(rule.percent / 100):
      low, best = middle, limits
    else:
      high = middle
  return best


def _counted_rows(seen: list[Observed]) -> np.ndarray:
  """Returns the rows that count, `[T, K]`, of the inputs of a weight that is one matrix."""
  found = []
  for each in seen:
    rows = each.rows(each.product.x)
    if len(rows.x) != 1:
      raise ValueError(f'{FUNCTION}: ppl reads weights that are one matrix, and {each.product.unit[0]} is several.')
    found.append(np.asarray(rows.x[0])[np.asarray(rows.counted[0])])
  return np.concatenate(found)


def _bounded_limit(stack: Array, rows: np.ndarray | None, bound: float) -> np.ndarray:
  """Returns the thresholds `[1, K]` of one matrix `[1, N, K]` whose relative output error is at most `bound`."""
  w = np.asarray(stack[0], np.float32)
  tau = 0.0 if rows is None or not len(rows) else error_bound(rows, w, bound, np.ones(len(rows), bool))[0]
  sizes = np.sqrt(np.sum(np.square(w), 0))
  return over_scale(tau, sizes)[None]


def _loss(calls: Calls, rule: PerplexityRule, results: list[list[Any]]) -> float:
  """Returns the mean over batches of the user's loss; refuses a loss that is not finite."""
  found = [rule.loss(program.unflatten(each), *args, **kwargs)
           for program, each, (args, kwargs) in zip(calls.programs, results, calls.given)]
  if wrong := [each for each in found if np.shape(each) or np.asarray(each).dtype.kind not in 'fiuV']:
    what = f'an array of shape {np.shape(wrong[0])}' if np.shape(wrong[0]) else arguments.shown(wrong[0])
    raise ValueError(f'{FUNCTION}: the loss of ppl returned {what}; `loss(results, *inputs)` must return one number, '
                     'the mean over the tokens of a batch, in nats.')
  losses = [float(each) for each in found]
  if not np.all(np.isfinite(losses)):
    raise ValueError(f'{FUNCTION}: the loss of ppl is not finite in batch {int(np.argmin(np.isfinite(losses)))}. Look '
                     'at the batch, and at `loss(results, *inputs)`.')
  return float(np.mean(losses))
