"""Calibrates one weight after the other, each on operands behind products that are sparse already: `in_order`.

    found, results = in_order(calls, places, solve, rests)      # `solve(unit, observed)` returns thresholds `[L, K]`

The walks of all batches wait at the first product of a unit without thresholds. Where the unit has later products,
copies of the walks go on to them, with this unit dense. Then the walks go on from where they waited, with this unit
sparse.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from sparsejax.activation.measuring import Observed, below, observed_at, skipping, walks
from sparsejax.activation.places import SkippableWeight, Unit, Weights
from sparsejax.activation.rules import Rest
from sparsejax.programs import jaxprs
from sparsejax.programs.calls import BatchWalk, Calls
from sparsejax.programs.evaluate import Walk
from sparsejax.programs.tracing import Program

Solve = Callable[[Unit, list[Observed]], np.ndarray]


def in_order(calls: Calls, places: Weights, solve: Solve, rests: Mapping[Unit, Rest]
             ) -> tuple[dict[Unit, np.ndarray], list[list[Any]]]:
  """Returns the thresholds of each unit that a batch reaches, and the results of each batch with all of them.

  `solve` gets what the products of a unit are given in the batches that wait for the unit together: in all batches,
  unless the program branches on data.
  """
  found: dict[Unit, np.ndarray] = {}
  together = list(walks(calls, places))
  alone = {path for path, place in places.items() if _once(calls.programs[0], place)}
  for each in together:
    _go_on(each.walk, found, rests)
  while waiting := [each for each in together if each.walk.stopped]:
    unit = min(waiting, key=lambda each: each.walk.position).walk.site.unit
    there = [each for each in waiting if each.walk.site.unit == unit]
    found[unit] = solve(unit, [seen for each in there for seen in _products(each, unit, found, rests, alone)])
    for each in there:
      _go_on(each.walk, found, rests)
  return found, [each.walk.results or [] for each in together]


def _once(program: Program, place: SkippableWeight) -> bool:
  """Returns whether each unit of a weight has one product: all loops around the product slice the weight."""
  around = sum(eqn.primitive.name in ('scan', 'while') and address == place.address[:len(address)]
               for address, eqn in jaxprs.equations(program))
  return len(place.uses) == 1 and around == len(place.gone)


def _go_on(walk: Walk, found: Mapping[Unit, np.ndarray], rests: Mapping[Unit, Rest]) -> None:
  """Goes on, sparse, until the walk waits at a product of a unit without thresholds, or ends."""
  while walk.stopped and walk.site.unit in found:
    _answer(walk, found, rests)


def _answer(walk: Walk, found: Mapping[Unit, np.ndarray], rests: Mapping[Unit, Rest]) -> None:
  seen = walk.site
  walk.answer(skipping(seen, below(found)(seen), rests)[1] if seen.unit in found else None)


def _products(each: BatchWalk, unit: Unit, found: Mapping[Unit, np.ndarray], rests: Mapping[Unit, Rest],
              alone: set[str]) -> list[Observed]:
  """Returns all products of a unit in one batch. A copy of the walk looks for the later ones."""
  if unit[0] in alone:
    return [observed_at(each, each.walk)]
  walk, seen = each.walk.copy(), []
  while walk.stopped:
    seen += [observed_at(each, walk)] if walk.site.unit == unit else []
    _answer(walk, found, rests)
  return seen
