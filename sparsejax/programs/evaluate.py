"""Runs a program operation by operation, with a caller's rules for some of the values and operations.

`evaluate` runs a program to its end. A `Walk` stops at the sites that a rule chooses, and goes on with an answer. A
walk can be copied at a site, so that a caller may return there. A value is dropped after its last use.

    rules = ValueRules(lambda eqn, values, here: [-values[0]] if eqn.primitive.name == 'sin' else None)
    evaluate(program, [x], rules)          # the program with `-x` for each `sin(x)`

The rules choose for each structure whether the structure is kept or walked (`structures`). Under `jit`, keep all.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from sparsejax import errors
from sparsejax.programs import jaxprs
from sparsejax.programs.structures import KEPT, WALKED, Enter, Inside, Outcome, Stop
from sparsejax.types import Array


class Operation(NamedTuple):
  """An `Operation` holds the address of an operation, and its computation.

  `steps` are the rounds of the walked loops around the operation, outermost first. `dense(arrays)` returns the results
  of the operation without the caller's rules.
  """

  address: jaxprs.Address
  steps: tuple[int, ...]
  dense: Callable[[list[Any]], list[Any]]


CALLS = {'jit', 'pjit', 'closed_call', 'core_call'}


@dataclasses.dataclass(frozen=True)
class ValueRules:
  """`ValueRules` hold what a caller of `evaluate` does with values, of which some may be stand-ins for arrays.

  `operation(eqn, values, here)` returns the results of an operation, a `Stop`, an `Enter`, or `None` if it has no rule.
  Without a rule, a structure is kept or walked, and every other operation gets dense values.
  `concerns(eqn, values, address)` returns whether an operation, or a program inside of it, is the caller's concern. All
  others run as they are; they may have no stand-in among their values.
  `dense(eqn, value, why)` returns the array behind a value. `why` is the reason why a stand-in does not suffice.
  `keeps(eqn)` returns whether a structure is kept; otherwise it is walked.
  `unstacked(value)` takes a stack apart for a scan that is kept. The function returns the arrays to slice, and a
  function that makes a value of the slices. If that is impossible, it returns the reason as a text.
  """

  operation: Callable[[Any, list[Any], Operation], Outcome | None]
  concerns: Callable[[Any, list[Any], jaxprs.Address], bool] = lambda eqn, values, address: True
  dense: Callable[[Any, Any, str], Any] = lambda eqn, value, why: value
  keeps: Callable[[Any], bool] = lambda eqn: True
  unstacked: Callable[[Any], tuple[Any, Callable[[Any], Any]] | str] = lambda value: (value, lambda slices: slices)


def evaluate(program: Any, values: Sequence[Any], rules: ValueRules, address: jaxprs.Address = ()) -> list[Any]:
  """Returns the results of a program on `values`, of which some may be stand-ins.

  Raises `ValueError` if a rule stops. Only a `Walk` can stop, and only inside of structures that are walked.
  """
  walk = Walk(program, values, rules, address)
  if walk.stopped:
    raise ValueError(f'evaluate: a rule stops at {walk.site}, in a program that runs to its end; walk the loop around '
                     'the site, with ValueRules(keeps=...).')
  return walk.results


@dataclasses.dataclass
class _Frame:
  """A `_Frame` holds a program that is being run: the values that are still needed, and the next operation.

  `entered` is the number of inner programs that the next operation has run or is running.
  """

  jaxpr: Any
  values: dict[Any, Any]
  then: Callable[[list[Any]], Outcome]
  address: jaxprs.Address
  steps: tuple[int, ...]
  next: int = 0
  entered: int = 0

  def read(self, variable: Any) -> Any:
    return variable.val if isinstance(variable, core.Literal) else self.values[variable]

  def write(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
    needed = _last_uses(self.jaxpr)
    self.values.update((v, value) for v, value in zip(variables, values, strict=True) if v in needed)

  def take(self, variables: Sequence[Any]) -> list[Any]:
    """Returns the operands of the next operation, and drops the operands that no later operation needs."""
    values, last = [self.read(v) for v in variables], _last_uses(self.jaxpr)
    for v in variables:
      if not isinstance(v, core.Literal) and last[v] == self.next:
        self.values.pop(v, None)
    return values


def _framed(enter: Enter, address: jaxprs.Address, steps: tuple[int, ...]) -> _Frame:
  """Returns the frame of a program before its first operation."""
  jaxpr = jaxprs.opened(enter.program)
  frame = _Frame(jaxpr, {}, enter.then, address, steps)
  frame.write((*jaxpr.constvars, *jaxpr.invars), (*jaxprs.constants(enter.program), *enter.arguments))
  return frame


@functools.lru_cache(maxsize=256)
def _last_uses(jaxpr: Any) -> dict[Any, int]:
  """Maps each variable that is read to the number of the last operation that reads it.

  A result of the program maps to the number of operations.
  """
  uses = [*enumerate(eqn.invars for eqn in jaxpr.eqns), (len(jaxpr.eqns), jaxpr.outvars)]
  return {v: i for i, variables in uses for v in variables if not isinstance(v, core.Literal)}


class Walk:
  """A `Walk` runs a program up to the next site, and goes on with the answer.

  `stopped` tells whether the walk waits for an answer, and `site` is the object of the rule that stopped it. `results`
  are those of the program after the end of the walk, and `None` before.
  """

  def __init__(self, program: Any, values: Sequence[Any], rules: ValueRules, address: jaxprs.Address = ()):
    self.rules, self.results, self._stop = rules, None, None
    self._frames = [_framed(Enter(program, list(values), lambda results: results), address, ())]
    self._go(self._advance())

  @property
  def stopped(self) -> bool:
    return self._stop is not None

  @property
  def site(self) -> Any:
    return self._stop.site if self._stop else None

  @property
  def position(self) -> tuple[tuple[int, int], ...]:
    """How far the walk is, outermost program first: the number of the next operation, and of its inner program.

    The second number counts the inner programs that the operation has run so far, rounds of loops among them. Positions
    of walks of one program compare in the order of execution, unless the walks took different branches of a `cond`.
    """
    return tuple((frame.next, frame.entered) for frame in self._frames)

  def answer(self, value: Any = None) -> None:
    """Goes on to the next site or to the end, with an answer that the rule understands."""
    if self._stop is None:
      raise ValueError('Walk.answer: the walk has come to its end; copy() it at a site to return to the site.')
    stop, self._stop = self._stop, None
    self._go(stop.resume(value))

  def copy(self) -> 'Walk':
    """Returns a walk at the same site. Both walks go on independently, and share the arrays computed so far."""
    other = object.__new__(Walk)
    other.rules, other.results, other._stop = self.rules, self.results, self._stop
    other._frames = [dataclasses.replace(frame, values=dict(frame.values)) for frame in self._frames]
    return other

  def _go(self, outcome: Outcome) -> None:
    """Runs until a rule stops or the program ends."""
    while True:
      if isinstance(outcome, Stop):
        self._stop = outcome
        return
      if isinstance(outcome, Enter):
        parent = self._frames[-1]
        parent.entered += 1
        steps = parent.steps if outcome.step is None else (*parent.steps, outcome.step)
        self._frames.append(_framed(outcome, (*parent.address, parent.next, outcome.number), steps))
      elif self._frames:
        frame = self._frames[-1]
        frame.write(frame.jaxpr.eqns[frame.next].outvars, outcome)
        frame.next, frame.entered = frame.next + 1, 0
      else:
        self.results = outcome
        return
      outcome = self._advance()

  def _advance(self) -> Outcome:
    """Runs the next operation of the innermost program, or ends the program after its last operation."""
    frame = self._frames[-1]
    if frame.next == len(frame.jaxpr.eqns):
      self._frames.pop()
      return frame.then([frame.read(v) for v in frame.jaxpr.outvars])
    eqn = frame.jaxpr.eqns[frame.next]
    here = Operation((*frame.address, frame.next), frame.steps, functools.partial(_bind, frame.jaxpr, eqn))
    return _outcome(eqn, frame.take(eqn.invars), self.rules, here)


def _outcome(eqn: Any, values: list[Any], rules: ValueRules, here: Operation) -> Outcome:
  """Returns the outcome of an operation: by the caller's rule, by its structure, or of dense values, in this order."""
  if not rules.concerns(eqn, values, here.address):
    return here.dense(values)
  outcome = rules.operation(eqn, values, here)
  if outcome is None:
    outcome = inside(eqn, values, rules, here)
  return here.dense([rules.dense(eqn, value, 'no product') for value in values]) if outcome is None else outcome


def inside(eqn: Any, values: list[Any], rules: ValueRules, here: Operation,
           original: Callable[[list[Any]], list[Any]] | None = None) -> Outcome | None:
  """Returns the outcome of an operation that runs programs, kept or walked as the rules say; `None` for any other.

  `original(arrays)` is the operation without the rules, of which derivative rules are taken; by default `here.dense`.
  """
  name, dense = eqn.primitive.name, functools.partial(rules.dense, eqn)
  if name in KEPT and rules.keeps(eqn):
    def run(program: Any, arguments: Sequence[Any], number: int) -> list[Array]:
      results = evaluate(program, arguments, rules, (*here.address, number))
      return [dense(result, 'it is one of its results') for result in results]

    return KEPT[name](eqn, values, Inside(run, original or here.dense, dense, rules.unstacked))
  if name in WALKED:
    return WALKED[name](eqn, values)
  if _entered(eqn, rules):
    return Enter(jaxprs.body(eqn), values, lambda results: results)
  return None


def _entered(eqn: Any, rules: ValueRules) -> bool:
  """Returns whether the rules reach the programs inside of an operation.

  `jit` and structures are always entered, but a `shard_map` only if it is kept. An unknown operation with a body is
  entered where structures are walked. If structures are kept, entering could lose a rule for `vmap` or for derivatives
  that the operation may have.
  """
  name = eqn.primitive.name
  if name == 'shard_map':  # Its body runs on every device, so that only the structure itself can run it.
    return rules.keeps(eqn)
  if name in KEPT or name in CALLS:
    return True
  return name not in jaxprs.STRUCTURES and not rules.keeps(eqn) and jaxprs.body(eqn) is not None


def rules_at(function: str, program: Any, sites: Mapping[jaxprs.Address, Mapping[Any, Any]],
             rule: Callable[..., Outcome], keeps: Callable[[Any], bool] = lambda eqn: True) -> ValueRules:
  """Returns rules that concern only the operations at the addresses of `sites`, whose outcome is that of `rule`.

  Each site maps names to what the caller keeps of them. Raises `ValueError` with the names at all addresses that an
  evaluation cannot reach; `function` is the name of the caller for this message.
  """
  around = {address[:n] for address in sites for n in range(1, len(address) + 1, 2)}
  rules = ValueRules(lambda eqn, values, here: rule(eqn, values, here) if here.address in sites else None,
                     concerns=lambda eqn, values, address: address in around, keeps=keeps)
  whole = lambda eqn: eqn.primitive.name == 'shard_map' or not _entered(eqn, rules)  # A shard is not the value.
  reached = {address for address, _ in jaxprs.equations(program, entered=lambda eqn: not whole(eqn))}
  missed = [name for address, names in sites.items() if address not in reached for name in names]
  if missed:
    raise ValueError(f'{function}: the program uses {errors.some(missed)} inside of a shard_map, or of an operation '
                     'that runs as a whole, where no value can be taken out. Leave the parameter out of `where`, or '
                     'trace a function without this operation.')
  return rules


def _bind(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
  """Returns the results of one operation of `jaxpr` on arrays.

  Each operand gets a variable of its own, since a variable may be both operands of a product and a rule may change one.
  """
  inputs = [core.Var(v.aval) for v in eqn.invars]
  alone = jaxpr.replace(constvars=(), invars=inputs, outvars=eqn.outvars, eqns=[eqn.replace(invars=inputs)])
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*values)
