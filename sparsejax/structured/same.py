"""Tells whether two functions have the same program, so that one may stand for the other."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jax.extend import core

from sparsejax.programs import jaxprs
from sparsejax.programs.evaluate import CALLS
from sparsejax.programs.tracing import trace


def is_same(first: Callable[..., Any], second: Callable[..., Any], args: Sequence[Any]) -> bool:
  """Returns whether two functions run the same operations, in the same order, on the same values.

  `jit` inside of a program does not matter. A function that raises is no other's equal.
  """
  try:
    one, other = trace(first, args), trace(second, args)
  except Exception:  # the user's function may raise anything on shapes that it was not made for
    return False
  return one.structure == other.structure and _listed(one) == _listed(other)


def _listed(program: Any) -> list[Any]:
  """Returns the operations of a program or of an inner one, with numbers for values in the order of their making."""
  found: list[Any] = []
  jaxpr = jaxprs.opened(program)
  numbers: dict[Any, Any] = {v: ('input', i) for i, v in enumerate(jaxpr.invars)}
  numbers.update({v: _constant(c) for v, c in zip(jaxpr.constvars, jaxprs.constants(program))})
  found.append(_run(jaxpr, numbers, found))
  return found


def _run(jaxpr: Any, numbers: dict[Any, Any], found: list[Any]) -> list[Any]:
  """Appends the operations of one jaxpr to `found`, and returns the numbers of its results."""
  read = lambda v: _constant(v.val) if isinstance(v, core.Literal) else numbers[v]
  for eqn in jaxpr.eqns:
    values = [read(v) for v in eqn.invars]
    if eqn.primitive.name in CALLS:
      body = jaxprs.body(eqn)
      inside = dict(zip(jaxprs.opened(body).invars, values))
      inside.update({v: _constant(c) for v, c in zip(jaxprs.opened(body).constvars, jaxprs.constants(body))})
      results = _run(jaxprs.opened(body), inside, found)
    else:
      found.append((jaxprs.setting(eqn), values, [_listed(part) for part in jaxprs.inner(eqn)]))
      results = [(len(found), i) for i in range(len(eqn.outvars))]
    numbers.update(zip(eqn.outvars, results))
  return [read(v) for v in jaxpr.outvars]


def _constant(value: Any) -> Any:
  array = np.asarray(value)
  return str(array.dtype), array.shape, array.tobytes()
