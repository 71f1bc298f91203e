"""Tells which products of a program look like attention, before anything of the program runs.

A product looks like the second product of attention if one of its operands is made of the exponential of another
product. The reader (`reading`) replaces what it can read of these, and lists the others with the reason.

    seen = looks(trace(model.apply, (variables, x)))
    seen.seconds                         # {(12,): {(4,)}}: the product at (12,) weighs by the scores of that at (4,)
"""

import dataclasses
from typing import Any

from sparsejax.programs import jaxprs
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.jaxprs import Address
from sparsejax.programs.structures import KEPT
from sparsejax.programs.tracing import Program

Origin = frozenset[Any]  # of ('argument', number), ('scores', address), ('weights', address), ('sums', address)
NOTHING: Origin = frozenset()

# Operations that compute without a program inside, so that attention in them cannot be read.
OPAQUE = {'custom_call', 'dot_product_attention_fwd_wrapper', 'dot_product_attention_fwd', 'ffi_call', 'pallas_call',
          'tpu_custom_call'}
# Structures whose inside is left as it is, with the reason.
_OWN = 'it is inside of a function with a derivative rule of its own, which would stay dense'
CLOSED = {'custom_vjp_call': _OWN, 'custom_jvp_call': _OWN,
          'shard_map': 'it is inside of a shard_map, where a device has a part of the heads or of the keys'}


@dataclasses.dataclass
class Looks:
  """`Looks` holds the products of a program that look like the second product of attention.

  `seconds` maps the address of each to the addresses of the products that its weights are made of. `eqns` maps an
  address to the operation. `sources` maps each product to the numbers of the arguments that either operand is made of.
  `opaque` maps the address of each kernel of three or more matrices to the reason why nothing can be read. `closed`
  maps the address of a structure to the reason why nothing inside is replaced. `structures` are the addresses of loops,
  branches and other structures, out of which a value can leave only as their result.
  """

  seconds: dict[Address, set[Address]] = dataclasses.field(default_factory=dict)
  eqns: dict[Address, Any] = dataclasses.field(default_factory=dict)
  sources: dict[Address, tuple[set[int], ...]] = dataclasses.field(default_factory=dict)
  opaque: dict[Address, str] = dataclasses.field(default_factory=dict)
  closed: dict[Address, str] = dataclasses.field(default_factory=dict)
  structures: set[Address] = dataclasses.field(default_factory=set)

  @property
  def firsts(self) -> set[Address]:
    """The addresses of the products whose results become weights."""
    return set().union(*self.seconds.values())

  def parameters(self, address: Address) -> list[bool]:
    """Returns, for both operands of a product, whether it is made of parameters and constants only.

    The first argument of the program holds the parameters, unless the whole product is made of that argument.
    """
    sides = self.sources[address]
    own = set().union(*sides) <= {0}
    return [side <= (set() if own else {0}) for side in sides]

  def enclosing(self, address: Address) -> str:
    """Returns why nothing is replaced at an address, or an empty string."""
    return next((why for closed, why in self.closed.items() if address[:len(closed)] == closed), '')

  def inside(self, address: Address) -> bool:
    """Returns whether an address is inside of a structure."""
    return any(address[:len(outer)] == outer for outer in self.structures)

  def _of_data(self, address: Address) -> bool:
    """Returns whether a product cannot be that of a layer: no operand is a parameter, or both number the same things.
    """
    return bool(jaxprs.dot_numbers(self.eqns[address])[0].batch) or not any(self.parameters(address))

  def operation(self, eqn: Any, facts: list[Origin], here: Position) -> list[Origin]:
    """Returns what the results of an operation are made of, and notes the products."""
    name, of = eqn.primitive.name, NOTHING.union(*facts)
    if name in jaxprs.CONTRACTIONS:
      return [self._product(eqn, facts, here.address)] * len(eqn.outvars)
    if name in OPAQUE and sum(len(shape or ()) >= 2 for shape in jaxprs.shapes(eqn.invars)) >= 3:
      self.opaque[here.address], self.eqns[here.address] = f'{name} is a kernel that cannot be read', eqn
    if name in ('exp', 'exp2'):
      of |= {('weights', fact[1]) for fact in of if fact[0] == 'scores'}
    if name == 'reduce_sum':
      of |= {('sums', fact[1]) for fact in of if fact[0] == 'weights'}
    return [of] * len(eqn.outvars)

  def _product(self, eqn: Any, facts: list[Origin], address: Address) -> Origin:
    arguments = [{fact[1] for fact in side if fact[0] == 'argument'} for side in facts[:2]]
    self.sources[address], self.eqns[address] = tuple(arguments), eqn
    for side in facts[:2]:
      weights = {fact[1] for fact in side if fact[0] == 'weights'}
      summed = {fact[1] for fact in side if fact[0] == 'sums'}
      if found := {a for a in weights if a in summed or self._of_data(a)}:
        self.seconds.setdefault(address, set()).update(found)
    own = {('scores', address)} if eqn.primitive.name == 'dot_general' else NOTHING
    return frozenset({('argument', i) for i in set().union(*arguments)} | own)

  def note(self, eqn: Any, facts: list[Origin], results: list[Origin], here: Position) -> None:
    if eqn.primitive.name in CLOSED:
      self.closed[here.address] = CLOSED[eqn.primitive.name]
    if eqn.primitive.name in KEPT:
      self.structures.add(here.address)


def looks(program: Program) -> Looks:
  """Returns the products of a program that look like attention."""
  found = Looks()
  rules = FactRules(found.operation, lambda facts: NOTHING.union(*facts), NOTHING, after=found.note)
  follow(program, [frozenset({('argument', i)}) for i in program.arguments], rules)
  return found
