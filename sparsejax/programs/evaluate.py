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
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.extend import core

from sparsejax.programs import jaxprs
from sparsejax.programs.jaxprs import Address
from sparsejax.types import Array


class Enter(NamedTuple):
  """Asks a walk to run the inner program `number` of an operation; `then(results)` goes on.

  `then` returns the results of the operation, or another `Enter`. `step` is the round of a loop, `None` outside of one.
  """

  program: Any
  arguments: list[Any]
  then: Callable[[list[Any]], 'Outcome']
  number: int = 0
  step: int | None = None


class Stop(NamedTuple):
  """Asks a walk to stop at `site`, whatever that is to the caller; `resume(answer)` goes on like `Enter.then`."""

  site: Any
  resume: Callable[[Any], 'Outcome']


Outcome = list[Any] | Enter | Stop


class Here(NamedTuple):
  """Where an operation is: its address, the rounds of the walked loops around it, and `dense`, its own computation.

  `dense(values)` returns the results of the operation for arrays.
  """

  address: Address
  steps: tuple[int, ...]
  dense: Callable[[list[Any]], list[Any]]


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
  name = eqn.primitive.name
  if name in KEPT and rules.keeps(eqn):
    return KEPT[name](eqn, values, rules, here)
  if name in WALKED:
    return WALKED[name](eqn, values)
  program = jaxprs.body(eqn) if name in CALLS or name in KEPT or not rules.keeps(eqn) else None
  if program is not None and name not in jaxprs.STRUCTURES:
    return Enter(program, values, lambda results: results)
  return here.dense(_dense(eqn, values, rules, 'no product'))


def _dense(eqn: Any, values: Sequence[Any], rules: Rules, why: str) -> list[Any]:
  return [rules.dense(eqn, value, why) for value in values]


def _bind(jaxpr: Any, eqn: Any, values: list[Any]) -> list[Any]:
  """Returns the results of one operation of `jaxpr` on arrays."""
  inputs = {v: value for v, value in zip(eqn.invars, values) if not isinstance(v, core.Literal)}
  alone = jaxpr.replace(constvars=(), invars=list(inputs), outvars=eqn.outvars, eqns=[eqn])
  return core.jaxpr_as_fun(core.ClosedJaxpr(alone, ()))(*inputs.values())


# Calls are entered whether loops are kept or walked. Other operations with a body that are kept may have a rule for
# `vmap` of their own, which would be lost, so that they run as they are.
CALLS = {'jit', 'pjit', 'closed_call', 'core_call'}


# Kept: the same structure around a body that is evaluated here. Its results are dense.


def _inside(program: Any, eqn: Any, arguments: Sequence[Any], rules: Rules, here: Here, number: int = 0) -> list[Array]:
  """Returns the results of an inner program, all of them dense."""
  results = evaluate(program, arguments, rules, (*here.address, number))
  return _dense(eqn, results, rules, 'it is one of its results')


def _kept_remat(eqn: Any, values: list[Any], rules: Rules, here: Here) -> list[Any]:
  run = functools.partial(_inside, jaxprs.body(eqn), eqn, rules=rules, here=here)
  return jax.checkpoint(run, **jaxprs.remat_options(eqn))(values)


def _kept_custom_jvp(eqn: Any, values: list[Any], rules: Rules, here: Here) -> list[Any]:
  """The derivative rule is about dense arrays, so that it gets them."""
  call = jax.custom_jvp(functools.partial(_inside, jaxprs.body(eqn), eqn, rules=rules, here=here))
  exact = lambda values: here.dense(_dense(eqn, values, rules, 'its derivative rule takes arrays'))
  call.defjvp(lambda primals, tangents: jax.jvp(exact, primals, tangents))
  return call(values)


def _kept_custom_vjp(eqn: Any, values: list[Any], rules: Rules, here: Here) -> list[Any]:
  run = functools.partial(_inside, jaxprs.body(eqn), eqn, rules=rules, here=here)
  exact = lambda values: here.dense(_dense(eqn, values, rules, 'its derivative rule takes arrays'))
  call = jax.custom_vjp(run)
  call.defvjp(lambda values: (run(values), values), lambda values, dy: jax.vjp(exact, values)[1](dy))
  return call(values)


def _kept_cond(eqn: Any, values: list[Any], rules: Rules, here: Here) -> list[Any]:
  runs = [functools.partial(_inside, program, eqn, rules=rules, here=here, number=k)
          for k, program in enumerate(jaxprs.branches(eqn))]
  return lax.switch(rules.dense(eqn, values[0], 'it is the number of a branch'), runs, values[1:])


def _kept_while(eqn: Any, values: list[Any], rules: Rules, here: Here) -> list[Any]:
  loop = jaxprs.while_parts(eqn)
  of_condition, of_body, carries = loop.split(values)
  proceed = lambda carries: _inside(loop.condition, eqn, [*of_condition, *carries], rules, here, 0)[0]
  step = lambda carries: _inside(loop.body, eqn, [*of_body, *carries], rules, here, 1)
  return lax.while_loop(proceed, step, _dense(eqn, carries, rules, 'it changes from round to round'))


def _kept_scan(eqn: Any, values: list[Any], rules: Rules, here: Here) -> list[Any]:
  """A stack-like stand-in that the scan takes apart stays a stand-in, step by step."""
  scan = jaxprs.scan_parts(eqn)
  constants, carries, stacks = scan.split(values)
  carries, split = _dense(eqn, carries, rules, 'it changes from round to round'), []
  for value in stacks:
    parts = rules.unstacked(value)
    split.append((rules.dense(eqn, value, parts), lambda x: x) if isinstance(parts, str) else parts)

  def step(carries: list[Array], slices: list[Any]) -> tuple[list[Array], list[Array]]:
    values = [make(x) for (_, make), x in zip(split, slices)]
    results = _inside(scan.body, eqn, [*constants, *carries, *values], rules, here)
    return results[:len(carries)], results[len(carries):]

  arrays = [array for array, _ in split]
  carries, results = lax.scan(step, carries, arrays, scan.length, scan.reverse, scan.unroll)
  return [*carries, *results]


KEPT: dict[str, Callable[[Any, list[Any], Rules, Here], list[Any]]] = {
  **dict.fromkeys(('checkpoint', 'remat', 'remat2'), _kept_remat), 'custom_jvp_call': _kept_custom_jvp,
  'custom_vjp_call': _kept_custom_vjp, 'cond': _kept_cond, 'while': _kept_while, 'scan': _kept_scan}


# Walked: the bodies run one after the other. What decides how often is a concrete number.


def _walked_cond(eqn: Any, values: list[Any]) -> Outcome:
  number = int(_concrete(eqn, values[0]))
  programs = jaxprs.branches(eqn)
  number = min(max(number, 0), len(programs) - 1)  # `lax.switch` clamps.
  return Enter(programs[number], values[1:], lambda results: results, number)


def _walked_while(eqn: Any, values: list[Any]) -> Outcome:
  loop = jaxprs.while_parts(eqn)
  of_condition, of_body, carries = loop.split(values)

  def begin(step: int, carries: list[Any]) -> Outcome:
    return Enter(loop.condition, of_condition + carries, functools.partial(decide, step, carries), 0, step)

  def decide(step: int, carries: list[Any], results: list[Any]) -> Outcome:
    if not _concrete(eqn, results[0]):
      return carries
    return Enter(loop.body, of_body + carries, functools.partial(begin, step + 1), 1, step)

  return begin(0, carries)


def _walked_scan(eqn: Any, values: list[Any]) -> Outcome:
  scan = jaxprs.scan_parts(eqn)
  constants, carries, stacks = scan.split(values)
  order = range(scan.length)[::-1] if scan.reverse else range(scan.length)
  outputs = eqn.outvars[scan.carries:]

  def step(number: int, carries: list[Any], done: tuple[list[Any], ...]) -> Outcome:
    if number == scan.length:
      columns = list(zip(*(done[::-1] if scan.reverse else done))) or [[]] * len(outputs)
      return carries + [_stacked(column, v.aval) for column, v in zip(columns, outputs)]
    slices = [lax.index_in_dim(stack, order[number], keepdims=False) for stack in stacks]
    go_on = lambda results: step(number + 1, results[:scan.carries], (*done, results[scan.carries:]))
    return Enter(scan.body, constants + carries + slices, go_on, 0, order[number])

  return step(0, carries, ())


def _stacked(column: Sequence[Array], aval: Any) -> Array:
  return jnp.stack(column) if column else jnp.zeros(aval.shape, aval.dtype)


def _concrete(eqn: Any, value: Any) -> Any:
  """Returns a number that decides what a walk does; under `jit` there is none."""
  if isinstance(value, jax.core.Tracer):
    raise ValueError(f'Walk: {jaxprs.place(eqn)} depends on a traced value; walk outside of jit, vmap and grad, or keep '
                     'the operation as it is.')
  return value


WALKED: dict[str, Callable[[Any, list[Any]], Outcome]] = {
  'cond': _walked_cond, 'while': _walked_while, 'scan': _walked_scan}
