"""Lets facts flow through a program without running it: `follow` reads loops until nothing changes, and joins branches.

A *fact* is whatever a caller knows of one variable; facts are compared by `==`. The caller brings `FactRules`: an
operation's effect on facts, and how facts are joined, sliced and stacked.

    rules = FactRules(operation=lambda eqn, facts, here: [any(facts)] * len(eqn.outvars), joined=any, constant=False)
    follow(program, [True, False], rules)          # which results depend on the first input
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from sparsejax.programs import jaxprs

Fact = Any
Notes = Any


class Position(NamedTuple):
  """A `Position` holds the address of an operation, how many loops are around it, and the notes to write to.

  `notes` are those of the part of the program that the operation is in: the body of a loop, a branch, or the whole.
  """

  address: jaxprs.Address
  loops: int
  notes: Notes


@dataclasses.dataclass(frozen=True)
class FactRules:
  """`FactRules` hold what a caller of `follow` knows of facts.

  `operation(eqn, facts, here)` returns the facts of the results of an operation that runs no program.
  `joined(facts)` returns the fact of a value that is one of several, as the result of a `cond` is.
  `constant` is the fact of constants and literals. `constant_of(variable, here)` replaces `constant` where constants
  differ: `variable` is a `core.Literal` or a constant of the program at the position `here`.
  `repeated(before, after)` returns the fact that holds before and after a round of a loop; by default, both joined.
  Applied round after round, `repeated` must reach a fact that no longer changes.
  `sliced(fact, loops)` returns the fact of one slice of a stack; `loops` counts the loops around the scan.
  `stacked(fact, stacks, length)` returns the fact of the stacked results of all steps of a scan; `stacks` are the facts
  of the stacks that the scan slices.
  `resized(fact, shape)` returns the fact of one shard, or of all shards together.
  `notes()` returns empty notes for one part of a program.
  `merged(notes, parts, eqn, times)` adds the notes of the programs that `eqn` runs. A loop has a single part, a `cond`
  has a part for each branch. `times` is the number of rounds or devices, `None` if unknown.
  `after(eqn, facts, results, here)` is called after each operation, with or without inner programs.
  """

  operation: Callable[[Any, list[Fact], Position], list[Fact]]
  joined: Callable[[list[Fact]], Fact]
  constant: Fact = None
  repeated: Callable[[Fact, Fact], Fact] | None = None
  sliced: Callable[[Fact, int], Fact] = lambda fact, loops: fact
  stacked: Callable[[Fact, list[Fact], int], Fact] = lambda fact, stacks, length: fact
  resized: Callable[[Fact, Sequence[int]], Fact] = lambda fact, shape: fact
  notes: Callable[[], Notes] = lambda: None
  merged: Callable[[Notes, list[Notes], Any, int | None], None] = lambda notes, parts, eqn, times: None
  after: Callable[[Any, list[Fact], list[Fact], Position], None] = lambda eqn, facts, results, here: None
  constant_of: Callable[[Any, Position], Fact] | None = None


def follow(program: Any, facts: Sequence[Fact], rules: FactRules, notes: Notes = None) -> list[Fact]:
  """Returns the facts of the results of a program from the facts of its inputs; the rules write to `notes`."""
  return _follow(program, facts, rules, Position((), 0, notes))


def _follow(program: Any, facts: Sequence[Fact], rules: FactRules, here: Position) -> list[Fact]:
  """Follows one jaxpr; `here` is the position of the program itself."""
  jaxpr = jaxprs.opened(program)
  known = dict(zip(jaxpr.invars, facts))
  of = rules.constant_of or (lambda v, here: rules.constant)
  read = lambda v: of(v, here) if isinstance(v, core.Literal) or v not in known else known[v]
  for i, eqn in enumerate(jaxpr.eqns):
    operands, inside = [read(v) for v in eqn.invars], here._replace(address=(*here.address, i))
    results = _results(eqn, operands, rules, inside)
    known.update(zip(eqn.outvars, results))
    rules.after(eqn, operands, results, inside)
  return [read(v) for v in jaxpr.outvars]


def _results(eqn: Any, operands: list[Fact], rules: FactRules, here: Position) -> list[Fact]:
  if eqn.primitive.name in STRUCTURES:
    return STRUCTURES[eqn.primitive.name](eqn, operands, rules, here)
  program = None if eqn.primitive.name in jaxprs.CONTRACTIONS else jaxprs.body(eqn)
  if program is not None:
    return _follow(program, operands, rules, _inside(here, 0, here.notes))
  return rules.operation(eqn, operands, here)


def _inside(here: Position, number: int, notes: Notes, loops: int = 0) -> Position:
  return Position((*here.address, number), here.loops + loops, notes)


def _steady(program: Any, number: int, operands: tuple[list[Fact], list[Fact], list[Fact]], rules: FactRules,
            here: Position) -> tuple[list[Fact], list[Fact], Notes]:
  """Follows the body of a loop until the facts of the carries hold for every round.

  `operands` are the facts of the constants, the carries and the slices. Returns the facts of the carries, the facts of
  the other results, and the notes of the last round.
  """
  repeated = rules.repeated or (lambda before, after: rules.joined([before, after]))
  constants, carries, slices = operands
  while True:
    notes = rules.notes()
    results = _follow(program, [*constants, *carries, *slices], rules, _inside(here, number, notes, loops=1))
    after = [repeated(a, b) for a, b in zip(carries, results)]
    if after == carries:
      return carries, results[len(carries):], notes
    carries = after


def _scan(eqn: Any, operands: list[Fact], rules: FactRules, here: Position) -> list[Fact]:
  scan, constants, carries, stacks = jaxprs.scan_parts(eqn, operands)
  slices = [rules.sliced(fact, here.loops) for fact in stacks]
  carries, results, notes = _steady(scan.body, 0, (constants, carries, slices), rules, here)
  rules.merged(here.notes, [notes], eqn, scan.length)
  return carries + [rules.stacked(fact, stacks, scan.length) for fact in results]


def _while(eqn: Any, operands: list[Fact], rules: FactRules, here: Position) -> list[Fact]:
  (condition, of_condition), (body, of_body), carries = jaxprs.while_parts(eqn, operands)
  carries, _, notes = _steady(body, 1, (of_body, carries, []), rules, here)
  _follow(condition, of_condition + carries, rules, _inside(here, 0, notes, loops=1))
  rules.merged(here.notes, [notes], eqn, None)
  return carries


def _cond(eqn: Any, operands: list[Fact], rules: FactRules, here: Position) -> list[Fact]:
  programs = jaxprs.branches(eqn)
  notes = [rules.notes() for _ in programs]
  results = [_follow(program, operands[1:], rules, _inside(here, k, part))
             for k, (program, part) in enumerate(zip(programs, notes))]
  rules.merged(here.notes, notes, eqn, 1)
  return [rules.joined(list(column)) for column in zip(*results)]


def _shard_map(eqn: Any, operands: list[Fact], rules: FactRules, here: Position) -> list[Fact]:
  """Follows the body, which takes one shard of each operand and runs on every device."""
  program, devices = jaxprs.shards(eqn)
  fitted = lambda facts, variables: list(map(rules.resized, facts, jaxprs.shapes(variables)))
  notes = rules.notes()
  results = _follow(program, fitted(operands, jaxprs.opened(program).invars), rules, _inside(here, 0, notes))
  rules.merged(here.notes, [notes], eqn, devices)
  return fitted(results, eqn.outvars)


STRUCTURES: dict[str, Callable[[Any, list[Fact], FactRules, Position], list[Fact]]] = {
  'scan': _scan, 'while': _while, 'cond': _cond, 'shard_map': _shard_map}
