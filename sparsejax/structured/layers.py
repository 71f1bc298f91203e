"""Finds the units of a scanned stack that each layer may lose by itself.

A scan runs one body on one slice of each stack. A unit that never leaves the body may be another one in each layer, if
each layer loses equally many. A constant inside of the body is the same for all layers, and so forbids that.

    layered(reading)               # {variable: 12}, the number of layers
"""

from collections.abc import Iterable
from typing import Any

from sparsejax.programs import jaxprs
from sparsejax.structured.reading import Reading, Symbolic


def layered(reading: Reading) -> dict[int, int]:
  """Maps each variable of which each layer of a scan may lose units of its own to the number of layers."""
  found: dict[int, int] = {}
  for address, (eqn, facts, results) in reading.seen.items():
    if eqn.primitive.name == 'scan':
      scan, constants, carries, stacks = jaxprs.scan_parts(eqn, facts)
      inside = _within(reading, stacks) - _within(reading, [*constants, *carries, *results, *_fixed(reading)])
      found.update({v: scan.length for v in inside - _elsewhere(reading, address) if _in_stacks(reading, stacks, v)})
  return found


def _within(reading: Reading, facts: Iterable[Symbolic]) -> set[int]:
  """Returns the variables of these values."""
  return {v for fact in facts for dim in fact.dims for v in reading.variables.leaves(dim)}


def _fixed(reading: Reading) -> list[Symbolic]:
  """Returns the facts of values that do not depend on the layer: constants, and results of operations on nothing."""
  return reading.constants + [fact for eqn, facts, results in reading.seen.values() if not facts for fact in results]


def _elsewhere(reading: Reading, scan: jaxprs.Address) -> set[int]:
  """Returns the variables of what is outside of a scan; operations around the scan only hand stacks on."""
  found: set[int] = set()
  for address, (_, facts, results) in reading.seen.items():
    around, inside = scan[:len(address)] == address, address[:len(scan)] == scan
    if not inside:
      found |= _within(reading, results if around else [*facts, *results])
  return found


def _in_stacks(reading: Reading, stacks: list[Any], v: int) -> bool:
  """Returns whether each parameter with a variable is one of the stacks, and has the variable behind the layers."""
  owners = [dims for dims in reading.parameters().values() if any(v in reading.variables.leaves(dim) for dim in dims)]
  own = [tuple(map(reading.variables.resolved, stack.dims)) for stack in stacks]
  return all(dims in own and v not in reading.variables.leaves(dims[0]) for dims in owners)
