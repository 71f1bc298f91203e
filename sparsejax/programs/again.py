"""Computes a result of a function again, where it is needed, out of another result that is stored anyway.

An optimizer returns updates and its next state. The updates of most optimizers follow from the next state: under
momentum they are a multiple of it. A branch that is seldom taken then gets the state, and no copy of the updates.

    step = halves(lambda state: optimizer.update(grads, state, params), state)
    step.first, step.second                  # the updates, and the next state
    step.again(step.second)                  # the updates, computed anew; `step.again` is `None` where that cannot be
"""

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
from jax.extend import core

from sparsejax.programs import jaxprs
from sparsejax.types import PyTree

# Each entry of the results of these operations depends on the same entry of the operands alone.
ENTRYWISE = {
  'abs', 'add', 'and', 'clamp', 'convert_element_type', 'copy', 'copy_p', 'cos', 'div', 'eq', 'exp', 'ge', 'gt',
  'integer_pow', 'is_finite', 'le', 'log', 'log1p', 'logistic', 'lt', 'max', 'min', 'mul', 'ne', 'neg', 'not', 'or',
  'pow', 'rsqrt', 'select_n', 'sign', 'sin', 'sqrt', 'square', 'stop_gradient', 'sub', 'tanh'}


class Halves(NamedTuple):
  """A `Halves` holds the two results of a function, and says how the first follows from the second.

  `again(second)` computes the first result from a second one, or is `None` if more is needed. `entrywise`: each entry
  of the first result needs only the same entries of the second.
  """

  first: PyTree
  second: PyTree
  again: Callable[[PyTree], PyTree] | None = None
  entrywise: bool = False


def halves(function: Callable[[PyTree], tuple[PyTree, PyTree]], spent: PyTree) -> Halves:
  """Returns the `Halves` of `function(spent)`.

  `again` may read the scalars of `spent`, and every array that the function closes over. No other array of `spent` is
  read again: the compiler may update all of them in place. `again` is `None` outside of `jit`, and for a `spent`
  without arrays, or with other leaves.
  """
  arrays = jax.tree.leaves(spent)
  traced = any(isinstance(leaf, jax.core.Tracer) for leaf in arrays)
  if not traced or not all(isinstance(leaf, jax.Array) for leaf in arrays):
    return Halves(*function(spent))
  called = jax.jit(function)
  program = jax.make_jaxpr(called)(spent)
  first, second = called(spent)  # stages the call that is traced already, and traces nothing
  (call,), closed_over = program.eqns, dict(zip(program.jaxpr.constvars, program.consts))
  body = jaxprs.body(call)
  jaxpr, number = jaxprs.opened(body), len(jax.tree.leaves(first))
  sliced = _sliced(jaxpr, number)
  gone = {v for v, given in zip(jaxpr.invars, call.invars) if given not in closed_over and math.prod(v.aval.shape) > 1}
  if not gone.isdisjoint(sliced.invars):
    return Halves(first, second)
  values = closed_over | dict(zip(program.jaxpr.invars, arrays))
  known = dict(zip([*jaxpr.constvars, *jaxpr.invars], [*jaxprs.constants(body), *map(values.get, call.invars)]))
  again = functools.partial(_again, sliced, known, jaxpr.outvars[number:], jax.tree.structure(first))
  return Halves(first, second, again, all(map(_entrywise, sliced.eqns)))


def _again(sliced: Any, known: dict[Any, Any], outvars: list[Any], structure: Any, second: PyTree) -> PyTree:
  """Returns the first result, by the part of the program between the second and the first.

  `known`: the values of constants and inputs of the program. `outvars`: the variables of the second result.
  """
  known = known | {v: x for v, x in zip(outvars, jax.tree.leaves(second)) if not isinstance(v, core.Literal)}
  return jax.tree.unflatten(structure, core.jaxpr_as_fun(core.ClosedJaxpr(sliced, ()))(*map(known.get, sliced.invars)))


def _sliced(jaxpr: Any, number: int) -> Any:
  """Returns the part of a program that computes the first `number` results out of the others.

  Its inputs are all that it reads: results of the program, constants and inputs.
  """
  results = jaxpr.outvars[:number]
  stored = {v for v in jaxpr.outvars[number:] if not isinstance(v, core.Literal)}
  needed = dict.fromkeys(v for v in results if not isinstance(v, core.Literal))
  eqns = []
  for eqn in reversed(jaxpr.eqns):
    if any(v in needed and v not in stored for v in eqn.outvars):
      eqns.append(eqn)
      needed |= dict.fromkeys(v for v in eqn.invars if not isinstance(v, core.Literal))
  made = {v for eqn in eqns for v in eqn.outvars} - stored
  return jaxpr.replace(constvars=(), invars=[v for v in needed if v not in made], outvars=results, eqns=eqns[::-1])


def _entrywise(eqn: Any) -> bool:
  """Returns whether an operation, and every operation inside of it, works on each entry by itself."""
  if (program := jaxprs.body(eqn)) is not None:
    return all(map(_entrywise, jaxprs.opened(program).eqns))
  if eqn.primitive.name == 'broadcast_in_dim':
    return math.prod(eqn.invars[0].aval.shape) == 1
  return eqn.primitive.name in ENTRYWISE
