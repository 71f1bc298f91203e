"""Tells which products end a program: a head, whose result is no operand of a product and is added to no other data.

    last in ends(program)          # whether the product at the address `last` is such an end
"""

from typing import Any

from sparsejax.programs import jaxprs
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.tracing import Program

INPUT: jaxprs.Address = (-1,)  # stands for the inputs among the addresses of products


class _Ends:
  """An `_Ends` collects the products that are seen, and those whose result goes on."""

  def __init__(self) -> None:
    self.seen: set[jaxprs.Address] = set()
    self.passed: set[jaxprs.Address] = set()

  def operation(self, eqn: Any, facts: list[frozenset[jaxprs.Address]], here: Position) -> list[Any]:
    """Returns, for each result, the products and the input that the result is made of since the last product."""
    of: frozenset[jaxprs.Address] = frozenset().union(*facts)
    if eqn.primitive.name in jaxprs.CONTRACTIONS:
      self.seen.add(here.address)
      self.passed |= of
      of = frozenset({here.address}) if of else of
    elif _is_residual(eqn, facts):
      self.passed |= of
    return [of] * len(eqn.outvars)


def _is_residual(eqn: Any, facts: list[frozenset[jaxprs.Address]]) -> bool:
  """Returns whether an operation adds a product to the input or to what was added to the input before."""
  shapes = jaxprs.shapes([*eqn.invars, *eqn.outvars])
  return (eqn.primitive.name in ('add', 'add_any') and len({*shapes}) == 1 and all(facts) and
          sum(INPUT in fact for fact in facts) == 1)


def ends(program: Program) -> set[jaxprs.Address]:
  """Returns the addresses of the products that end a program whose first argument holds the parameters.

  The result of such a product reaches the results of the program without another product, and without a residual
  connection: an encoder whose last product is added to the stream has no head. Operations of a loss do not count.
  """
  found = _Ends()
  rules = FactRules(found.operation, lambda facts: frozenset().union(*facts), frozenset())
  follow(program, [frozenset() if argument == 0 else frozenset({INPUT}) for argument in program.arguments], rules)
  return found.seen - found.passed
