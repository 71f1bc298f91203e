"""Divides the targets into cohorts that are measured together, and says when a walk has passed all uses of a cohort.

Everything before a cohort is pruned while the cohort is measured, and the cohort itself is dense. `sequential` decides:
'weight' makes a cohort of each unit, 'dense' one of all, and a function `path -> key` one of all paths with one key.
If all uses of a cohort are in the same round of a loop that slices them, every round is a cohort by itself.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from sparsejax import errors
from sparsejax.post_training.targets import Target
from sparsejax.programs.jaxprs import Address, equations
from sparsejax.programs.tracing import Program

Sequential = str | Callable[[str], Any]
Position = tuple[tuple[int, int], ...]  # see `programs.Walk.position`


@dataclasses.dataclass(frozen=True)
class Cohort:
  """A `Cohort` is the set of targets that are measured together.

  `depth`: how many programs, from the outermost, are around all uses of a cohort and stay the same in one round.
  `last`: the number of the last operation with a use, in the innermost of these programs. `once`: whether the cohort is
  one product, so that no walk has to go on to a later use. `split`: whether the units of the target may be measured one
  after the other, which the walks find out.
  """

  paths: frozenset[str]
  depth: int
  last: int
  once: bool
  split: bool

  def round_of(self, position: Position) -> Position:
    """Returns what the positions of all uses of the cohort in one round have in common."""
    return position[:self.depth]

  def passed(self, began: Position, position: Position) -> bool:
    """Returns whether a walk at `position` has passed all uses of the round in which the cohort `began`."""
    if self.round_of(position) != self.round_of(began):
      return True
    return position[self.depth][0] > self.last


def cohorts_of(program: Program, targets: Mapping[str, Target], sequential: Sequential) -> dict[str, Cohort]:
  """Returns the cohort of each target."""
  if isinstance(sequential, str) and sequential not in ('weight', 'dense'):
    raise errors.unknown('prune', '`sequential`', sequential, ['weight', 'dense', 'a function path -> key'])
  key = sequential if callable(sequential) else (lambda path: path if sequential == 'weight' else 0)
  loops = {address for address, eqn in equations(program) if eqn.primitive.name in ('scan', 'while')}
  members: dict[Any, list[str]] = {}
  for path in targets:
    members.setdefault(key(path), []).append(path)
  made: dict[str, Cohort] = {}
  for paths in members.values():
    cohort = _cohort([targets[path] for path in paths], loops, sequential)
    made |= dict.fromkeys(paths, cohort)
  return made


def _cohort(targets: list[Target], loops: set[Address], sequential: Sequential) -> Cohort:
  uses = [use for target in targets for use in target.uses.values()]
  depth = 0 if sequential == 'dense' else min(_depth(use, loops) for use in uses)
  first = uses[0].address
  while any(use.address[:2 * depth] != first[:2 * depth] for use in uses):
    depth -= 1
  around = lambda use: sum(address == use.address[:len(address)] for address in loops)
  inside = lambda use: all(len(address) < 2 * depth for address in loops if address == use.address[:len(address)])
  once = len(uses) == 1 and inside(uses[0]) and around(uses[0]) == len(uses[0].view.loops)
  split = sequential == 'weight' and not once and bool(targets[0].gone)
  paths = frozenset(target.path for target in targets)
  return Cohort(paths, depth, max(use.address[2 * depth] for use in uses), once, split)


def _depth(use: Any, loops: set[Address]) -> int:
  """Returns how many programs are around a use that one round of the loops that slice the parameter has in common.

  Only the outermost loops count: a loop that does not slice the parameter comes back to each of its layers.
  """
  depth, number = 0, 0
  for place in range(1, len(use.address), 2):
    if use.address[:place] in loops:
      if number not in use.view.loops:
        return depth
      number += 1
      depth = (place + 1) // 2
  return depth if number else 0
