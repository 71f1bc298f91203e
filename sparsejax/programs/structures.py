"""Runs the structures of programs in two ways: a structure is *kept* as what it is, or *walked* round by round.

A structure is a loop, a `cond`, `remat`, `shard_map`, or a function with a derivative rule of its own. `KEPT` stages
the same structure again, around a body that the caller runs. `WALKED` runs one body after the other, on concrete
values.

    outcome = WALKED['scan'](eqn, values)          # Enter(body, arguments of round 0, then, ...)
    outcome = outcome.then(results_of_round_0)     # Enter(body, arguments of round 1, then, ...)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from sparsejax.programs import jaxprs
from sparsejax.types import Array


class Enter(NamedTuple):
  """`Enter` asks a walk to run the inner program `number` of an operation on `arguments`.

  `then(results)` returns the results of the operation, or another `Enter`. `step` is the number of a loop's round, and
  `None` outside of a loop. In a scan, `step` is the index of the slice, which counts down if the scan is reversed.
  """

  program: Any
  arguments: list[Any]
  then: Callable[[list[Any]], 'Outcome']
  number: int = 0
  step: int | None = None


class Stop(NamedTuple):
  """`Stop` asks a walk to stop, and to hand out `site`, an object of the caller.

  `resume(answer)` returns the results of the operation, an `Enter`, or another `Stop`.
  """

  site: Any
  resume: Callable[[Any], 'Outcome']


Outcome = list[Any] | Enter | Stop


class Inside(NamedTuple):
  """`Inside` holds the functions by which a caller runs what is inside of a structure that is kept.

  `run(program, arguments, number)` returns the results of the inner program `number`, all of them arrays.
  `original(arrays)` returns the results of the operation without the caller's rules. `dense(value, why)` and
  `unstacked(value)` are those of `ValueRules`.
  """

  run: Callable[[Any, Sequence[Any], int], list[Array]]
  original: Callable[[list[Any]], list[Any]]
  dense: Callable[[Any, str], Any]
  unstacked: Callable[[Any], tuple[Any, Callable[[Any], Any]] | str]

  def all_dense(self, values: Sequence[Any], why: str) -> list[Any]:
    return [self.dense(value, why) for value in values]

  def for_derivatives(self, captured: list[Any]) -> Callable[[list[Any]], list[Any]]:
    """Returns the operation as a function of its arguments, whose derivatives are those of its own rule for arrays.

    `captured` are the values that the user's function closes over, in which a derivative rule has no derivatives.
    """
    why = 'a derivative rule takes it'
    return lambda given: self.original([*self.all_dense(captured, why), *self.all_dense(given, why)])


# Kept.


def _kept_remat(eqn: Any, values: list[Any], inside: Inside) -> list[Any]:
  run = lambda values: inside.run(jaxprs.body(eqn), values, 0)
  return jax.checkpoint(run, **jaxprs.remat_options(eqn))(values)


def _kept_custom_jvp(eqn: Any, values: list[Any], inside: Inside) -> list[Any]:
  """Takes values from the body as the caller runs it, and tangents from the function's own rule for arrays."""
  run = lambda captured, given: inside.run(jaxprs.body(eqn), [*captured, *given], 0)
  ruled = lambda captured, given, by: jax.jvp(inside.for_derivatives(captured), (given,), (by,))
  again = _valued(run, lambda captured, given: ruled(captured, given, jax.tree.map(_no_tangent, given))[0])
  call = jax.custom_jvp(run)

  def tangents(primals: Any, tangents: Any) -> Any:
    captured, given = primals
    return again(captured, given), ruled(captured, given, tangents[1])[1]

  call.defjvp(tangents)
  return call(*jaxprs.captured(eqn, values))


def _kept_custom_vjp(eqn: Any, values: list[Any], inside: Inside) -> list[Any]:
  """Takes values from the body as the caller runs it, and gradients from the function's own rule for arrays."""
  run = lambda captured, given: inside.run(jaxprs.body(eqn), [*captured, *given], 0)
  ruled = lambda captured, given: jax.vjp(inside.for_derivatives(captured), given)
  again = _valued(run, lambda captured, given: ruled(captured, given)[0])
  call = jax.custom_vjp(run)
  call.defvjp(lambda *values: (again(*values), values), lambda values, dy: (None, *ruled(*values)[1](dy)))
  return call(*jaxprs.captured(eqn, values))


def _valued(run: Callable[..., Any], like: Callable[..., Any]) -> Callable[..., Any]:
  """Returns a function of captured and given values with the results of `run`, and the derivatives of `like`.

  The value that a derivative rule returns has derivatives of its own, which second derivatives need.
  """
  call = jax.custom_jvp(run)

  def tangents(primals: Any, tangents: Any) -> Any:
    captured, given = primals
    return call(captured, given), jax.jvp(lambda given: like(captured, given), (given,), tangents[1:])[1]

  call.defjvp(tangents)
  return call


def _no_tangent(array: Array) -> Any:
  """Returns a tangent of zeros, for arrays of all dtypes."""
  floats = jnp.issubdtype(array.dtype, jnp.inexact)
  return jnp.zeros_like(array) if floats else np.zeros(array.shape, jax.dtypes.float0)


def _kept_cond(eqn: Any, values: list[Any], inside: Inside) -> list[Any]:
  runs = [lambda operands, program=program, k=k: inside.run(program, operands, k)
          for k, program in enumerate(jaxprs.branches(eqn))]
  return lax.switch(inside.dense(values[0], 'it is the number of a branch'), runs, values[1:])


def _kept_while(eqn: Any, values: list[Any], inside: Inside) -> list[Any]:
  (condition, of_condition), (body, of_body), carries = jaxprs.while_parts(eqn, values)
  proceed = lambda carries: inside.run(condition, [*of_condition, *carries], 0)[0]
  step = lambda carries: inside.run(body, [*of_body, *carries], 1)
  return lax.while_loop(proceed, step, inside.all_dense(carries, CHANGES))


def _kept_scan(eqn: Any, values: list[Any], inside: Inside) -> list[Any]:
  """Runs a scan over the arrays that `inside.unstacked` returns; each of their slices becomes a stand-in again."""
  scan, constants, carries, stacks = jaxprs.scan_parts(eqn, values)
  carries, parts = inside.all_dense(carries, CHANGES), []
  for value in stacks:
    split = inside.unstacked(value)
    parts.append((inside.dense(value, split), lambda array: array) if isinstance(split, str) else split)

  def step(carries: list[Array], slices: list[Any]) -> tuple[list[Array], list[Array]]:
    values = [make(x) for (_, make), x in zip(parts, slices)]
    results = inside.run(scan.body, [*constants, *carries, *values], 0)
    return results[:len(carries)], results[len(carries):]

  arrays = [array for array, _ in parts]
  carries, results = lax.scan(step, carries, arrays, scan.length, scan.reverse, scan.unroll)
  return [*carries, *results]


def _kept_shard_map(eqn: Any, values: list[Any], inside: Inside) -> list[Any]:
  """Hands each device what the caller made of a value, if all devices have the whole value, and a shard otherwise.

  A stand-in that all devices have must be a pytree.
  """
  program, options = jaxprs.shard_map_parts(eqn)
  sharded = [any(part is not None for part in spec) for spec in options['in_specs']]
  given = [inside.dense(value, 'a mesh shards it') if cut else value for value, cut in zip(values, sharded)]
  return jax.shard_map(lambda *values: inside.run(program, values, 0), **options)(*given)


CHANGES = 'it changes from round to round'
KEPT: dict[str, Callable[[Any, list[Any], Inside], list[Any]]] = {
  **dict.fromkeys(('checkpoint', 'remat', 'remat2'), _kept_remat), 'custom_jvp_call': _kept_custom_jvp,
  'custom_vjp_call': _kept_custom_vjp, 'cond': _kept_cond, 'while': _kept_while, 'scan': _kept_scan,
  'shard_map': _kept_shard_map}


# Walked. The number of a branch, and the condition of a loop, must be concrete.


def _walked_cond(eqn: Any, values: list[Any]) -> Outcome:
  number = int(_concrete(eqn, values[0]))
  return Enter(jaxprs.branches(eqn)[number], values[1:], lambda results: results, number)


def _walked_while(eqn: Any, values: list[Any]) -> Outcome:
  (condition, of_condition), (body, of_body), carries = jaxprs.while_parts(eqn, values)

  def begin(step: int, carries: list[Any]) -> Outcome:
    return Enter(condition, of_condition + carries, functools.partial(decide, step, carries), 0, step)

  def decide(step: int, carries: list[Any], results: list[Any]) -> Outcome:
    if not _concrete(eqn, results[0]):
      return carries
    return Enter(body, of_body + carries, functools.partial(begin, step + 1), 1, step)

  return begin(0, carries)


def _walked_scan(eqn: Any, values: list[Any]) -> Outcome:
  scan, constants, carries, stacks = jaxprs.scan_parts(eqn, values)
  outputs = [v.aval for v in eqn.outvars[len(carries):]]

  def begin(carries: list[Any], done: tuple[list[Any], ...]) -> Outcome:
    """Begins a round; `done` are the outputs of the rounds before.

    A walk may be copied between rounds, so that nothing here ever changes.
    """
    if len(done) == scan.length:
      columns = zip(*(done[::-1] if scan.reverse else done))
      return carries + ([jnp.stack(column) for column in columns] if done else
                        [jnp.zeros(aval.shape, aval.dtype) for aval in outputs])
    index = scan.length - 1 - len(done) if scan.reverse else len(done)
    slices = [lax.index_in_dim(stack, index, keepdims=False) for stack in stacks]
    n = len(carries)
    then = lambda results: begin(results[:n], (*done, results[n:]))
    return Enter(scan.body, constants + carries + slices, then, 0, index)

  return begin(carries, ())


def _concrete(eqn: Any, value: Any) -> Any:
  """Returns the value; raises `ValueError` if it is traced, since a walk must know it."""
  if isinstance(value, jax.core.Tracer):
    raise ValueError(f'Walk: {jaxprs.place(eqn)} depends on a traced value; walk outside of jit, vmap and grad, or '
                     'keep the operation as it is.')
  return value


WALKED: dict[str, Callable[[Any, list[Any]], Outcome]] = {
  'cond': _walked_cond, 'while': _walked_while, 'scan': _walked_scan}
