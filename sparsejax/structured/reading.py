"""Reads the groups of a program: facts about dimensions and zeros flow through it until no dimension changes any more.

A `Symbolic` is what is known of one value: its dimensions, made of variables, and along which variables the value may
be other than zero where a unit was removed. A `Reading` walks through the program, with one rule for each operation
(`rules.RULES`). An operation without a rule pins all of its dimensions, and is listed.

    reading = Reading(trace(apply, (params, x)))
    reading.run()
    reading.free()               # the variables of which each unit may go
"""

import dataclasses
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sparsejax.programs import jaxprs
from sparsejax.programs.evaluate import CALLS
from sparsejax.programs.follow import FactRules, Position, follow
from sparsejax.programs.structures import KEPT
from sparsejax.programs.tracing import Program
from sparsejax.structured.dimensions import Bits, Dim, Variables

_WALKS = 20  # programs take two to four walks
PARTS = ('slice', 'split', 'dynamic_slice')  # of their operand, they read only what is in their results


class Symbolic(NamedTuple):
  """A `Symbolic` is what is known of one value.

  `dims`: the dimensions, of variables. `live`: the units of each variable at which the value may be other than zero
  once the unit is zero everywhere. `value`: the number that all entries are, if known.
  """

  dims: tuple[Dim, ...]
  live: Mapping[int, Bits] = {}
  value: Any = None


Rule = Callable[['Reading', Any, list[Symbolic], Position], list[Symbolic]]


@dataclasses.dataclass(eq=False)
class Reading:
  """A `Reading` is one program with its variables.

  `zeros` maps the path of a parameter to the entries that are zero, `bool` of its shape. Without `zeros`, all entries
  of a removed unit are zero. `seen` maps the address of each operation to the operation, and to the facts
  of its operands and results. `unread`
  lists the operations without a rule. `constants` holds the facts of constant arrays.
  """

  program: Program
  rules: Mapping[str, Rule]
  zeros: Mapping[str, np.ndarray] | None = None
  variables: Variables = dataclasses.field(default_factory=Variables)
  seen: dict[jaxprs.Address, tuple[Any, list[Symbolic], list[Symbolic]]] = dataclasses.field(default_factory=dict)
  unread: list[str] = dataclasses.field(default_factory=list)
  constants: list[Symbolic] = dataclasses.field(default_factory=list)
  results: list[Symbolic] = dataclasses.field(default_factory=list)

  def run(self) -> None:
    """Walks until no variable is bound any more; pins and zeros are those of the last walk."""
    for _ in range(_WALKS):
      before = self.variables.changes
      self._walk()
      if self.variables.changes == before:
        self._pin_unused()
        return
    raise ValueError('structured.groups: the dimensions of this program do not settle; report this program.')

  def inputs(self) -> list[tuple[str | None, Any]]:
    """Returns each input of the program with its path if it is a parameter."""
    variables = jaxprs.opened(self.program).invars
    return [(path if argument == 0 else None, v)
            for argument, path, v in zip(self.program.arguments, self.program.paths, variables)]

  def dims_of(self, path: str, shape: Sequence[int]) -> tuple[Dim, ...]:
    """Returns the dimensions of a parameter."""
    return tuple(self.variables.resolved(self.variables.named(('parameter', path, axis), n))
                 for axis, n in enumerate(shape))

  def parameters(self) -> dict[str, tuple[Dim, ...]]:
    """Maps the path of each parameter to its dimensions."""
    return {path: self.dims_of(path, v.aval.shape) for path, v in self.inputs() if path is not None}

  def free(self) -> list[int]:
    """Returns the variables of which each unit may go, in the order of the parameters."""
    found = dict.fromkeys(v for dims in self.parameters().values() for dim in dims for v in self.variables.leaves(dim))
    return [v for v in found if not self.variables.pinned.get(v)]

  def _walk(self) -> None:
    self.variables.pinned.clear()
    self.variables.reasons.clear()
    self.unread.clear()
    self.constants.clear()
    facts = [self._input(i, path, v) for i, (path, v) in enumerate(self.inputs())]
    rules = FactRules(self._operation, self._joined, constant_of=self._constant, repeated=self._repeated,
                      sliced=self._sliced, stacked=self._stacked, resized=self._resized, after=self._after)
    self.results = follow(self.program, facts, rules)
    for fact in self.results:
      self.pinned(fact, ('it is an axis of the result', None))

  def _input(self, i: int, path: str | None, v: Any) -> Symbolic:
    if path is None:
      name = ' '.join(filter(None, (f'input {self.program.arguments[i] - 1}', self.program.paths[i])))
      return self.fresh(('input', i), v.aval.shape, (f'it is an axis of {name}', None))
    fact = Symbolic(self.dims_of(path, v.aval.shape))
    if jnp.issubdtype(v.aval.dtype, jax.dtypes.prng_key):
      return self.pinned(fact, ('it is an axis of random keys', None))
    return fact if self.zeros is None else fact._replace(live=self._nonzero(fact.dims, self.zeros[path]))

  def _pin_unused(self) -> None:
    """Pins what no operation reads: parameters without a use, and the parts of an axis that slices leave out."""
    used = {v for fact in self.results for dim in fact.dims for v in self.variables.leaves(dim)}
    for eqn, facts, results in self.seen.values():
      if not jaxprs.inner(eqn):
        read = results if eqn.primitive.name in PARTS else facts
        used.update(v for fact in read for dim in fact.dims for v in self.variables.leaves(dim))
    for dims in self.parameters().values():
      for v in {v for dim in dims for v in self.variables.leaves(dim)} - used:
        self.variables.pin_units(v, self.variables.every(v), ('the program does not use it', None))

  def _nonzero(self, dims: Sequence[Dim], zero: np.ndarray) -> dict[int, Bits]:
    """Returns the units of each variable at which a parameter has an entry that is not zero."""
    live: dict[int, Bits] = {}
    for axis, dim in enumerate(dims):
      rest = tuple(a for a in range(zero.ndim) if a != axis)
      filled = ~zero.all(axis=rest)
      for v in self.variables.leaves(dim):
        for labels in self.variables.labels(dim, v):
          live[v] = live.get(v, 0) | bits_of(labels[filled & (labels >= 0)])
    return {v: bits for v, bits in live.items() if bits}

  # The parts that rules are made of.

  def fresh(self, name: Hashable, shape: Sequence[int], why: tuple[str, Any] | None = None) -> Symbolic:
    """Returns a value of new dimensions, nowhere zero; the same name gives the same dimensions in each walk.

    With `why`, the dimensions are pinned.
    """
    dims = tuple(self.variables.resolved(self.variables.named((name, axis), n)) for axis, n in enumerate(shape))
    fact = Symbolic(dims, self.every(dims))
    return fact if why is None else self.pinned(fact, why)

  def pinned(self, fact: Symbolic, why: tuple[str, Any]) -> Symbolic:
    """Returns the fact, after all of its dimensions are pinned."""
    for dim in fact.dims:
      self.variables.pin(dim, why)
    return fact

  def every(self, dims: Iterable[Dim]) -> dict[int, Bits]:
    """Returns all units of all variables of these dimensions."""
    return {v: self.variables.every(v) for dim in dims for v in self.variables.leaves(dim)}

  def live(self, fact: Symbolic, dims: Iterable[Dim]) -> dict[int, Bits]:
    """Returns the units, of the variables of `dims`, at which a value may be other than zero.

    A variable that was bound since the value was read counts with all units; the next walk knows better.
    """
    within = {v for dim in dims for v in self.variables.leaves(dim)}
    found: dict[int, Bits] = {}
    for v, bits in fact.live.items():
      if v in self.variables.products or v in self.variables.sums:
        parts = self.variables.products.get(v) or sum(self.variables.sums[v], ())
        found.update({w: self.variables.every(w) for w in self.variables.leaves(parts) if w in within})
      elif v in within:
        found[v] = found.get(v, 0) | bits
    return found

  def require(self, dims: Iterable[Dim], facts: Sequence[Symbolic], why: tuple[str, Any]) -> None:
    """Makes sure that a sum of products over `dims` needs no removed unit: units where no factor is zero are pinned."""
    dims = list(dims)
    live = [self.live(fact, dims) for fact in facts]
    for v in {v for dim in dims for v in self.variables.leaves(dim)}:
      bits = self.variables.every(v)
      for each in live:
        bits &= each.get(v, 0)
      if bits:
        self.variables.pin_units(v, bits, why)

  def alike(self, eqn: Any, dims: Sequence[Dim]) -> Dim:
    """Unifies dimensions that an operation makes equal, and returns the dimension."""
    for other in dims[1:]:
      self.variables.unify(dims[0], other, ('', eqn))
    return self.variables.resolved(dims[0])

  def pinned_dim(self, name: Hashable, n: int, why: tuple[str, Any]) -> Dim:
    """Returns a new dimension that is pinned; the same name gives the same dimension in each walk."""
    dim = self.variables.named(name, n)
    self.variables.pin(dim, why)
    return dim

  def wider(self, fact: Symbolic, dims: Sequence[Dim], new: Sequence[Dim] = ()) -> Symbolic:
    """Returns a value that has other dimensions and the zeros of `fact`; along `new`, the value is nowhere zero."""
    live = self.live(fact, dims)
    return Symbolic(tuple(dims), live if fact.value == 0 else {**live, **self.every(new)}, fact.value)

  def together(self, facts: Sequence[Symbolic], dims: Sequence[Dim], new: Sequence[Dim] = ()) -> Symbolic:
    """Returns a value whose entries come from several values: live where one of them is, and along `new`."""
    live = self.every(new)
    for fact in facts:
      filled = self.every(dims) if fact.value and not fact.dims else self.live(fact, dims)
      live = {v: live.get(v, 0) | filled.get(v, 0) for v in (*live, *filled)}
    values = {fact.value for fact in facts}
    return Symbolic(tuple(dims), live, values.pop() if len(values) == 1 else None)

  # The rules of `follow`.

  def _operation(self, eqn: Any, facts: list[Symbolic], here: Position) -> list[Symbolic]:
    rule = self.rules.get(eqn.primitive.name)
    return self.unknown(eqn, facts, here) if rule is None else rule(self, eqn, facts, here)

  def unknown(self, eqn: Any, facts: list[Symbolic], here: Position, why: str = '') -> list[Symbolic]:
    """Returns pinned results of an operation without a rule, pins its operands, and lists the operation."""
    if not why:
      self.unread.append(jaxprs.place(eqn))
    reason = (why or f'the operation {eqn.primitive.name} has no rule', eqn)
    for fact in facts:
      self.pinned(fact, reason)
    return [self.fresh((here.address, i), getattr(v.aval, 'shape', ()), reason) for i, v in enumerate(eqn.outvars)]

  def _constant(self, v: Any, here: Position) -> Symbolic:
    shape = getattr(v.aval, 'shape', ())
    if isinstance(v, core.Literal) and not shape:
      return Symbolic((), {}, _number(v.val))
    self.constants.append(self.fresh(('constant', here.address, id(v)), shape))
    return self.constants[-1]

  def _joined(self, facts: list[Symbolic]) -> Symbolic:
    first, *others = facts
    for fact in others:
      for a, b in zip(first.dims, fact.dims):
        self.variables.unify(a, b, ('branches give the same value', None))
    live: dict[int, Bits] = {}
    for fact in facts:
      for v, bits in self.live(fact, first.dims).items():
        live[v] = live.get(v, 0) | bits
    same = all(fact.value == first.value for fact in others)
    return Symbolic(first.dims, live, first.value if same else None)

  def _repeated(self, before: Symbolic, after: Symbolic) -> Symbolic:
    return self._joined([before, after])

  def _sliced(self, fact: Symbolic, loops: int) -> Symbolic:
    self.variables.pin(fact.dims[0], ('a scan runs along it', None))
    return Symbolic(fact.dims[1:], self.live(fact, fact.dims[1:]), fact.value)

  def _stacked(self, fact: Symbolic, stacks: list[Symbolic], length: int) -> Symbolic:
    rounds = self.variables.named(('rounds', length), length)
    self.variables.pin(rounds, ('a scan runs along it', None))
    return Symbolic((rounds, *fact.dims), {**fact.live, **self.every([rounds])}, fact.value)

  def _resized(self, fact: Symbolic, shape: Sequence[int]) -> Symbolic:
    why = ('a shard_map splits the array', None)
    return self.fresh(('shard', self.pinned(fact, why).dims, tuple(shape)), shape, why)

  def _after(self, eqn: Any, facts: list[Symbolic], results: list[Symbolic], here: Position) -> None:
    """Notes the facts; pins what a program inside of an operation sees if smaller arrays cannot run it."""
    self.seen[here.address] = (eqn, facts, results)
    name = eqn.primitive.name
    if name == 'shard_map' or name not in CALLS and name not in KEPT and name not in self.rules and jaxprs.body(eqn):
      for fact in (*facts, *results):
        self.pinned(fact, (f'the operation {name} runs as a whole', eqn))


def bits_of(units: Iterable[int]) -> Bits:
  """Returns a set of units as bits."""
  bits = 0
  for unit in np.unique(np.asarray(units, int)):
    bits |= 1 << int(unit)
  return bits


def _number(value: Any) -> Any:
  """Returns a scalar as a number of Python, or `None` if it is none."""
  try:
    return np.asarray(value).item()
  except (TypeError, ValueError):
    return None
