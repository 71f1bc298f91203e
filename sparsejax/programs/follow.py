"""Lets facts flow through a program abstractly: loops are read until nothing changes, branches are joined.

The caller brings `Rules`: what an operation does to facts, and how facts are joined, sliced and stacked. A *fact* is
whatever the caller knows of one variable. Facts that `==` tells apart are different.

    rules = Rules(operation=lambda eqn, facts, here: [any(facts)] * len(eqn.outvars), joined=any, constant=False)
    follow(program, [True, False], rules)          # which results depend on the first input
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from sparsejax.programs import jaxprs
from sparsejax.programs.jaxprs import Address

Fact = Any
Notes = Any


class Here(NamedTuple):
  """Where an operation is: its address, how many loops are around it, and the notes of this part of the program."""

  address: Address
  loops: int
  notes: Notes


def _nothing(*_: Any) -> None:
  return None


@dataclasses.dataclass(frozen=True)
class Rules:
  """The caller's rules.

  `operation(eqn, facts, here)` returns the facts of the results of an operation that runs no program.
  `joined(facts)` is the fact of a value that is one of several: the result of a branch.
  `repeated(before, after)` is what holds before and after a round of a loop; `None` joins both. Applied again and
  again, it must come to an end.
  `sliced(fact, loops)` is the fact of one step's slice of a stack; `loops` counts the loops around the scan.
  `stacked(fact, stacks, length)` is the fact of the stacked results of all steps; `stacks` are the facts of the stacks
  that the scan slices. `resized(fact, shape)` is the fact of a shard, or of all shards together.
  `constant` is the fact of constants and literals.
  `notes()` makes empty notes of one part of a program, and `merged(notes, parts, eqn, times)` takes over those of the
  programs that `eqn` runs: several for the branches of a `cond`. `times` is how often they run, `None` if unknown.
  `after(eqn, facts, results, here)` sees every operation, with programs inside or without, when its results are known.
  """

  operation: Callable[[Any, list[Fact], Here], list[Fact]]
  joined: Callable[[list[Fact]], Fact]
  constant: Fact = None
  repeated: Callable[[Fact, Fact], Fact] | None = None
  sliced: Callable[[Fact, int], Fact] = lambda fact, loops: fact
  stacked: Callable[[Fact, list[Fact], int], Fact] = lambda fact, stacks, length: fact
  resized: Callable[[Fact, Sequence[int]], Fact] = lambda fact, shape: fact
  notes: Callable[[], Notes] = _nothing
  merged: Callable[[Notes, list[Notes], Any, int | None], None] = _nothing
  after: Callable[[Any, list[Fact], list[Fact], Here], None] = _nothing


def follow(program: Any, facts: Sequence[Fact], rules: Rules, notes: Notes = None) -> list[Fact]:
  """Returns the facts of the results of a program, given those of its inputs; `notes` takes what the rules note."""
  return _follow(program, facts, rules, Here((), 0, notes))


def _follow(program: Any, facts: Sequence[Fact], rules: Rules, here: Here) -> list[Fact]:
  """Follows one jaxpr; `here` is the address of the program, and the notes that are taken in it."""
  jaxpr = jaxprs.opened(program)
  known = dict(zip(jaxpr.invars, facts))
  read = lambda v: rules.constant if isinstance(v, core.Literal) else known.get(v, rules.constant)
  for i, eqn in enumerate(jaxpr.eqns):
    operands, inside = [read(v) for v in eqn.invars], here._replace(address=(*here.address, i))
    results = _results(eqn, operands, rules, inside)
    known.update(zip(eqn.outvars, results))
    rules.after(eqn, operands, results, inside)
  return [read(v) for v in jaxpr.outvars]


def _results(eqn: Any, operands: list[Fact], rules: Rules, here: Here) -> list[Fact]:
  if eqn.primitive.name in STRUCTURES:
    return STRUCTURES[eqn.primitive.name](eqn, operands, rules, here)
  program = None if eqn.primitive.name in jaxprs.PRODUCTS else jaxprs.body(eqn)
  if program is not None:
    return _follow(program, operands, rules, _entered(here, 0))
  return rules.operation(eqn, operands, here)


def _entered(here: Here, number: int, **changes: Any) -> Here:
  return here._replace(address=(*here.address, number), **changes)


def _steady(carries: list[Fact], rules: Rules, run: Callable[[list[Fact], Notes], list[Fact]]
            ) -> tuple[list[Fact], list[Fact], Notes]:
  """Runs the body of a loop until the facts of the carries hold for every round.

  Returns the facts of the carries, those of the other results, and the notes of the last round.
  """
  repeated = rules.repeated or (lambda before, after: rules.joined([before, after]))
  while True:
    notes = rules.notes()
    results = run(carries, notes)
    after = [repeated(a, b) for a, b in zip(carries, results)]
    if after == carries:
      return carries, results[len(carries):], notes
    carries = after


def _scan(eqn: Any, operands: list[Fact], rules: Rules, here: Here) -> list[Fact]:
  scan = jaxprs.scan_parts(eqn)
  constants, carries, stacks = scan.split(operands)
  slices = [rules.sliced(fact, here.loops) for fact in stacks]

  def step(carries: list[Fact], notes: Notes) -> list[Fact]:
    inside = _entered(here, 0, loops=here.loops + 1, notes=notes)
    return _follow(scan.body, constants + carries + slices, rules, inside)

  carries, results, notes = _steady(carries, rules, step)
  rules.merged(here.notes, [notes], eqn, scan.length)
  return carries + [rules.stacked(fact, stacks, scan.length) for fact in results]


def _while(eqn: Any, operands: list[Fact], rules: Rules, here: Here) -> list[Fact]:
  loop = jaxprs.while_parts(eqn)
  of_condition, of_body, carries = loop.split(operands)
  inside = lambda number, notes: _entered(here, number, loops=here.loops + 1, notes=notes)
  carries, _, notes = _steady(
      carries, rules, lambda carries, notes: _follow(loop.body, of_body + carries, rules, inside(1, notes)))
  _follow(loop.condition, of_condition + carries, rules, inside(0, notes))
  rules.merged(here.notes, [notes], eqn, None)
  return carries


def _cond(eqn: Any, operands: list[Fact], rules: Rules, here: Here) -> list[Fact]:
  programs = jaxprs.branches(eqn)
  notes = [rules.notes() for _ in programs]
  results = [_follow(program, operands[1:], rules, _entered(here, k, notes=part))
             for k, (program, part) in enumerate(zip(programs, notes))]
  rules.merged(here.notes, notes, eqn, 1)
  return [rules.joined(list(column)) for column in zip(*results)]


def _shard_map(eqn: Any, operands: list[Fact], rules: Rules, here: Here) -> list[Fact]:
  """The body sees one shard of everything, and runs on every device."""
  program, devices = jaxprs.shards(eqn)
  fitted = lambda facts, variables: list(map(rules.resized, facts, jaxprs.shapes(variables)))
  notes = rules.notes()
  results = _follow(program, fitted(operands, jaxprs.opened(program).invars), rules, _entered(here, 0, notes=notes))
  rules.merged(here.notes, [notes], eqn, devices)
  return fitted(results, eqn.outvars)


STRUCTURES: dict[str, Callable[[Any, list[Fact], Rules, Here], list[Fact]]] = {
  'scan': _scan, 'while': _while, 'cond': _cond, 'shard_map': _shard_map}
