"""Runs a program operation by operation, with the caller's rules for some of the values and operations.

`evaluate` runs a program to its end. A `Walk` stops at the sites that a rule asks for, and goes on with an answer; it
can be copied at a site, so that a caller may return there. A value is dropped after its last use.

    rules = Rules(lambda eqn, values, here: [-values[0]] if eqn.primitive.name == 'sin' else None)
    evaluate(program, [x], rules)          # the program with `-x` for each `sin(x)`

Loops, branches, `remat` and functions with derivatives of their own are either *kept* as what they are, with their
bodies evaluated inside (`KEPT`), or *walked*: their bodies run here, round by round, on concrete values (`WALKED`).
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from jax.extend import core

from sparsejax import errors
from sparsejax.programs import jaxprs
from sparsejax.programs.jaxprs import Address
from sparsejax.programs.structures import KEPT, WALKED, Enter, Inside, Outcome, Stop
from sparsejax.types import Array


class Here(NamedTuple):
  """Where an operation is: its address, the rounds of the walked loops around it, and `dense`, its own computation.

  `dense(values)` returns the results of the operation for arrays.
  """

  address: Address
  steps: tuple[int, ...]
  dense: Callable[[list[Any]], list[Any]]


CALLS = {'jit', 'pjit', 'closed_call', 'core_call'}


def _unwrapped(eqn: Any, value: Any, why: str) -> Any:
  return value


@dataclasses.dataclass(frozen=True)
class Rules:
  """The caller's rules.

  `operation(eqn, values, here)` returns the results of an operation, a `Stop`, an `Enter`, or `None` for no rule.
  `concerns(eqn, values, address)` tells whether an operation is the caller's concern. All others, and the programs
  inside of them, run as they are; their values hold no stand-in.
  `dense(eqn, value, why)` returns the array behind a value that no rule took, which may be a stand-in for it.
  `keeps(eqn)` tells whether an operation of `KEPT` is kept; otherwise it is walked.
  `unstacked(value)` takes a stack apart for a kept scan: it returns the arrays to slice, and the function that makes a
  value of the slices; or why that is impossible.
  """

  operation: Callable[[Any, list[Any], Here], Outcome | None]
  concerns: Callable[[Any, list[Any], Address], bool] = lambda eqn, values, address: True
  dense: Callable[[Any, Any, str], Any] = _unwrapped
  keeps: Callable[[Any], bool] = lambda eqn: True
  unstacked: Callable[[Any], tuple[Any, Callable[[Any], Any]] | str] = lambda value: (value, lambda slices: slices)


def evaluate(program: Any, values: Sequence[Any], rules: Rules, address: Address = ()) -> list[Any]:
  """Returns the results of a program on `values`, in which rules may give stand-ins for arrays.

  Raises `ValueError` if a rule stops: only a `Walk` can, in the loops that it does not keep.
  """
  walk = Walk(program, values, rules, address)
  if walk.stopped:
    raise ValueError(f'evaluate: a rule stops at {walk.site}, in a program that runs to its end; walk the loop around '
                     'the site, with Rules(keeps=...).')
  return walk.results


@dataclasses.dataclass
class _Frame:
  """A program that is being run: the values that are still needed, and which operation is next."""

  jaxpr: Any
  values: dict[Any, Any]
  then: Callable[[list[Any]], Outcome]
  address: Address
  steps: tuple[int, ...]
  next: int = 0

  def read(self, variable: Any) -> Any:
    return variable.val if isinstance(variable, core.Literal) else self.values[variable]

  def write(self, variables: Sequence[Any], values: Sequence[Any]) -> None:
    needed = _last_uses(self.jaxpr)
    self.values.update((v, value) for v, value in zip(variables, values) if v in needed)

  def take(self, variables: Sequence[Any]) -> list[Any]:
    """Returns the operands of the next operation, and drops those that no later operation needs."""
    values, last = [self.read(v) for v in variables], _last_uses(self.jaxpr)
    for v in variables:
      if not isinstance(v, core.Literal) and last[v] == self.next:
        self.values.pop(v, None)
    return values


@functools.lru_cache(maxsize=1024)
def _last_uses(jaxpr: Any) -> dict[Any, int]:
  """Returns the number of the last operation that reads each variable, or how many there are for a result."""
  uses = [*enumerate(eqn.invars for eqn in jaxpr.eqns), (len(jaxpr.eqns), jaxpr.outvars)]
  return {v: i for i, variables in uses for v in variables if not isinstance(v, core.Literal)}


class Walk:
  """A program on its way: it stops at each site, and goes on with the answer.

  `stopped` tells whether the walk waits for an answer, `site` is what the rule put into `Stop.site`, and `results` are
  those of the program once the walk has come to its end, `None` before.
  """

  def __init__(self, program: Any, values: Sequence[Any], rules: Rules, address: Address = ()):
    self.rules, self.results, self._stop = rules, None, None
    self._frames: list[_Frame] = []
    self._go(Enter(program, list(values), lambda results: results), address)

  @property
  def stopped(self) -> bool:
    return self._stop is not None

  @property
  def site(self) -> Any:
    return self._stop.site if self._stop else None

  def answer(self, value: Any = None) -> None:
    """Goes on with an answer to the site, whose meaning is the rule's, up to the next site or to the end."""
    if self._stop is None:
      raise ValueError('Walk.answer: the walk has come to its end; copy() it at a site to return to the site.')
    stop, self._stop = self._stop, None
    self._go(stop.resume(value))

  def copy(self) -> 'Walk':
    """Returns a walk at the same site. Both go on independently; they share the arrays that they have computed."""
    other = object.__new__(Walk)
    other.rules, other.results, other._stop = self.rules, self.results, self._stop
    other._frames = [dataclasses.replace(frame, values=dict(frame.values)) for frame in self._frames]
    return other

  def _go(self, outcome: Outcome, address: Address = ()) -> None:
    """Runs until a rule stops, or the program has ended."""
    while True:
      if isinstance(outcome, Stop):
        self._stop = outcome
        return
      if isinstance(outcome, Enter):
        self._push(outcome, address)
      elif self._frames:
        frame = self._frames[-1]
        frame.write(frame.jaxpr.eqns[frame.next].outvars, outcome)
        frame.next += 1
      else:
        self.results = outcome
        return
      outcome = self._advance()

  def _push(self, enter: Enter, address: Address) -> None:
    steps = ()
    if self._frames:
      parent = self._frames[-1]
      address = (*parent.address, parent.next, enter.number)
      steps = parent.steps if enter.step is None else (*parent.steps, enter.step)
    jaxpr = jaxprs.opened(enter.program)
    frame = _Frame(jaxpr, {}, enter.then, address, steps)
    frame.write((*jaxpr.constvars, *jaxpr.invars), (*jaxprs.constants(enter.program), *enter.arguments))
    self._frames.append(frame)

  def _advance(self) -> Outcome:
    """Runs the next operation of the innermost program, or ends this program."""
    frame = self._frames[-1]
    if frame.next == len(frame.jaxpr.eqns):
      self._frames.pop()
      return frame.then([frame.read(v) for v in frame.jaxpr.outvars])
    eqn = frame.jaxpr.eqns[frame.next]
    here = Here((*frame.address, frame.next), frame.steps, functools.partial(_bind, frame.jaxpr, eqn))
    return _outcome(eqn, frame.take(eqn.invars), self.rules, here)


def _outcome(eqn: Any, values: list[Any], rules: Rules, here: Here) -> Outcome:
  """Returns what the rules, the structure, or the operation itself make of the values, in this order."""
  if not rules.concerns(eqn, values, here.address):
    return here.dense(values)
  outcome = rules.operation(eqn, values, here)
  if outcome is not None:
    return outcome
  name, dense = eqn.primitive.name, functools.partial(rules.dense, eqn)
  if name in KEPT and rules.keeps(eqn):
    run = functools.partial(_inside, rules, here, dense)
    return KEPT[name](eqn, values, Inside(run, here.dense, dense, rules.unstacked))
  if name in WALKED:
    return WALKED[name](eqn, values)
  if _entered(eqn, rules):
    return Enter(jaxprs.body(eqn), values, lambda results: results)
  return here.dense([dense(value, 'no product') for value in values])


def _inside(rules: Rules, here: Here, dense: Callable[[Any, str], Any], program: Any, arguments: Sequence[Any],
            number: int) -> list[Array]:
  """Returns the results of the inner program `number` of a structure that is kept, all of them dense."""
  results = evaluate(program, arguments, rules, (*here.address, number))
  return [dense(result, 'it is one of its results') for result in results]


def _entered(eqn: Any, rules: Rules) -> bool:
  """Returns whether the programs inside of an operation are evaluated by the rules.

  `jit` is always entered. An unknown operation with a body may have a rule of its own for `vmap` or for derivatives,
  which would be lost. It is entered only where structures are walked, on concrete values.
  """
  name = eqn.primitive.name
  if name in KEPT or name in CALLS:
    return True
  return name not in jaxprs.STRUCTURES and not rules.keeps(eqn) and jaxprs.body(eqn) is not None


def check_reached(function: str, program: Any, sites: Mapping[Address, str], rules: Rules) -> None:
  """Raises `ValueError` if an evaluation by these rules cannot reach one of the sites, given with their names."""
  entered = lambda eqn: _entered(eqn, rules)
  reached = {address for address, _ in jaxprs.equations(program, entered=entered)}
  missed = [name for address, name in sites.items() if address not in reached]
  if missed:
    raise ValueError(f'{function}: the program cannot be evaluated where it uses {errors.some(missed)}, inside of a '
                     'shard_map or of an operation that is run as a whole; trace the function without it.')


def _bind(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
  """Returns the results of one operation of `jaxpr` on arrays."""
  inputs = {v: value for v, value in zip(eqn.invars, values) if not isinstance(v, core.Literal)}
  alone = jaxpr.replace(constvars=(), invars=list(inputs), outvars=eqn.outvars, eqns=[eqn])
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*inputs.values())
