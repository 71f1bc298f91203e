"""Tells which groups may vanish whole, as a branch beside a skip connection may: H2SPG's rule (Chen et al. 2023).

A group may vanish if every result still depends on an input of the program without the group.

    names = erasable(found)                                   # ('block_0/up/kernel:1', ...)
    small = cut(found, params, {name: np.zeros(found[name].size, bool) for name in names})
"""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from sparsejax import errors
from sparsejax.arguments import checked
from sparsejax.programs import jaxprs
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.tracing import trace
from sparsejax.structured.groups import Groups
from sparsejax.structured.reading import Reading, Symbolic
from sparsejax.structured.rules import RULES

ZERO, FIXED, MOVING = range(3)  # A value is zero without the groups, or another constant, or depends on an input.
# A zero operand makes these operations zero.
PRODUCTS = {'mul', 'dot_general', 'ragged_dot_general', 'conv_general_dilated'}
# These operations make zeros of zeros.
KEEP_ZERO = PRODUCTS | {
  'add', 'add_any', 'sub', 'neg', 'max', 'min', 'abs', 'sign', 'sqrt', 'square', 'tanh', 'sin', 'copy', 'transpose',
  'reshape', 'squeeze', 'broadcast_in_dim', 'convert_element_type', 'reduce_sum', 'concatenate', 'slice', 'split',
  'select_n', 'stop_gradient', 'name', 'reduce_precision'}


@checked
def erasable(groups: Groups, order: Iterable[str] | None = None) -> tuple[str, ...]:
  """Returns the names of groups that may vanish together, visited in `order`, by default that of `groups`.

  A group is taken if every result still depends on an input without this group and those taken before. The groups that
  ought to go first, as those of the least salience, come first in `order`. Raises `ValueError` for an unknown name.
  """
  facts, taken = _Facts(groups), list[str]()
  for name in groups if order is None else order:
    if name not in groups:
      raise errors.unknown('structured.erasable', 'group', name, groups)
    if facts.connected([*taken, name]):
      taken.append(name)
  return tuple(taken)


def disconnects(groups: Groups, names: Sequence[str]) -> bool:
  """Returns whether some result depends on no input once these groups are gone."""
  return bool(names) and not _Facts(groups).connected(names)


class _Facts:
  """A `_Facts` follows what depends on the inputs through one program."""

  def __init__(self, groups: Groups):
    self.reading = Reading(trace(groups.apply, (groups.shapes, *groups.inputs)), RULES)
    self.reading.run()
    self.variables = self._named(groups)
    self.whole = self._followed([])

  def _named(self, groups: Groups) -> dict[str, int]:
    """Maps the names of the groups to their variables, which the first members show."""
    parameters, found = self.reading.parameters(), {}
    for name, group in groups.items():
      first = group.members[0]
      dim = parameters[first.path][first.axis]
      found[name] = next(v for v in self.reading.variables.leaves(dim) if all(
          map(np.array_equal, self.reading.variables.labels(dim, v), first.labels)))
    return found

  def connected(self, names: Iterable[str]) -> bool:
    """Returns whether each result that depends on an input does so without these groups."""
    (before, lost), (after, now_lost) = self.whole, self._followed(names)
    return all(b == a for b, a in zip(before, after) if b == MOVING) and now_lost <= lost

  def _followed(self, names: Iterable[str]) -> tuple[list[int], bool]:
    """Returns the facts of the results, and whether a round of a loop makes a carry independent of the inputs."""
    keep = {self.variables[name]: np.zeros(self.reading.variables.sizes[self.variables[name]], bool) for name in names}
    lost = []

    def repeated(before: int, after: int) -> int:
      lost.append(after < before == MOVING)
      return max(before, after)

    def operation(eqn: Any, facts: list[int], here: Position) -> list[int]:
      _, operands, results = self.reading.seen[here.address]
      empty = [self._empty(fact, keep) for fact in operands]
      seen = [ZERO if gone else fact for fact, gone in zip(facts, empty)]
      return [ZERO if self._empty(result, keep) else _fact(eqn.primitive.name, seen) for result in results]

    rules = FactRules(operation, joined=max, repeated=repeated, constant_of=_constant)
    inputs = [FIXED if path is not None else MOVING for path, _ in self.reading.inputs()]
    return follow(self.reading.program, inputs, rules), any(lost)

  def _empty(self, fact: Symbolic, keep: dict[int, np.ndarray]) -> bool:
    return any(not self.reading.variables.kept(dim, keep).any() for dim in fact.dims)


def _fact(name: str, facts: list[int]) -> int:
  if name in PRODUCTS and ZERO in facts or name == 'div' and facts[0] == ZERO:
    return ZERO
  if facts and max(facts) == ZERO:
    return ZERO if name in KEEP_ZERO else FIXED
  return max(facts, default=FIXED)


def _constant(v: Any, here: Position) -> int:
  is_zero = isinstance(v, core.Literal) and not jaxprs.shapes([v])[0] and v.val == 0
  return ZERO if is_zero else FIXED
