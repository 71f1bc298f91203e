"""Tells where the result of an elementwise operation is zero, from where its operands are.

Each operand is, at a removed unit, zero, a known number, or unknown. If no operand is unknown, the operation itself is
evaluated once, on scalars. Products, quotients and selections have rules for unknown operands.
"""

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax.programs import jaxprs
from sparsejax.programs.follow import Position
from sparsejax.structured.dimensions import Bits, Dim
from sparsejax.structured.reading import Reading, Symbolic

OPERATIONS = (
  'abs', 'acos', 'acosh', 'add', 'add_any', 'and', 'asin', 'asinh', 'atan', 'atan2', 'atanh', 'bessel_i0e',
  'bessel_i1e', 'cbrt', 'ceil', 'clamp', 'complex', 'conj', 'convert_element_type', 'copy', 'copy_p', 'cos', 'cosh',
  'digamma', 'div', 'eq', 'eq_to', 'erf', 'erf_inv', 'erfc', 'exp', 'exp2', 'expm1', 'floor', 'ge', 'gt', 'igamma',
  'igammac', 'imag', 'integer_pow', 'is_finite', 'le', 'le_to', 'lgamma', 'log', 'log1p', 'logistic', 'lt', 'lt_to',
  'max', 'min', 'mul', 'name', 'ne', 'neg', 'nextafter', 'not', 'or', 'polygamma', 'population_count', 'pow', 'real',
  'reduce_precision', 'regularized_incomplete_beta', 'rem', 'round', 'rsqrt', 'select_n', 'shift_left',
  'shift_right_arithmetic', 'shift_right_logical', 'sign', 'sin', 'sinh', 'sqrt', 'square', 'stop_gradient', 'sub',
  'tan', 'tanh', 'xor')

ZERO, LIVE, BROKEN = 'zero', 'live', 'broken'  # the result is zero, unknown but finite, or not finite
_UNKNOWN = object()


def elementwise(reading: Reading, eqn: Any, facts: list[Symbolic], here: Position) -> list[Symbolic]:
  """Makes the dimensions of all operands equal; a length of 1 beside a longer one is a broadcast."""
  shape = eqn.outvars[0].aval.shape
  dims = tuple(_common(reading, eqn, facts, j, n) for j, n in enumerate(shape))
  full = [_stretched(reading, fact, v.aval.shape, dims, shape) for fact, v in zip(facts, eqn.invars)]
  live: dict[int, Bits] = {}
  for v in {v for dim in dims for v in reading.variables.leaves(dim)}:
    rest, broken = _states(reading, eqn, full, v)
    if rest:
      live[v] = rest
    if broken:
      why = (f'{eqn.primitive.name} of what is zero where a unit is removed is not finite', eqn)
      reading.variables.pin_units(v, broken, why)
  value = None
  if all(fact.value is not None for fact in facts):
    value = _evaluated(eqn, [fact.value for fact in facts])
  return [Symbolic(dims, live, value)]


def _common(reading: Reading, eqn: Any, facts: list[Symbolic], j: int, n: int) -> Dim:
  """Returns dimension `j` of the result, after the operands that have it are unified."""
  own = [fact.dims[j] for fact, v in zip(facts, eqn.invars) if v.aval.ndim > j and v.aval.shape[j] == n]
  for other in own[1:]:
    reading.variables.unify(own[0], other, ('', eqn))
  return reading.variables.resolved(own[0])


def _stretched(reading: Reading, fact: Symbolic, own: Sequence[int], dims: Sequence[Dim], shape: Sequence[int]
               ) -> Symbolic:
  """Returns the fact with the units of broadcast dimensions: a number that is not zero is so at all of them."""
  if fact.value is not None:
    return fact
  broadcast = [dim for j, dim in enumerate(dims) if not own or own[j] != shape[j]]
  return fact._replace(live={**reading.live(fact, dims), **reading.every(broadcast)})


def _states(reading: Reading, eqn: Any, facts: Sequence[Symbolic], v: int) -> tuple[Bits, Bits]:
  """Returns the units of a variable at which the result may be other than zero, and those where it is not finite."""
  every = reading.variables.every(v)
  live = [fact.live.get(v, 0) for fact in facts]
  choices = [(fact.value,) if fact.value is not None else tuple(
      state for state, bits in ((0, every & ~bits), (_UNKNOWN, bits)) if bits) for fact, bits in zip(facts, live)]
  rest = broken = 0
  for states in itertools.product(*choices):
    units = every
    for state, fact, bits in zip(states, facts, live):
      if fact.value is None:
        units &= bits if state is _UNKNOWN else ~bits
    if units:
      found = outcome(eqn, states)
      rest |= units * (found != ZERO)
      broken |= units * (found == BROKEN)
  return rest, broken


def outcome(eqn: Any, states: Sequence[Any]) -> str:
  """Returns what an operation gives where its operands are in these states: 0, another number, or unknown."""
  name = eqn.primitive.name
  if _UNKNOWN not in states:
    result = _evaluated(eqn, states)
    if result is None:
      return LIVE
    return ZERO if result == 0 else LIVE if np.isfinite(result) else BROKEN
  if name in ('mul', 'and') and 0 in states:
    return ZERO
  if name in ('div', 'rem') and states[1] == 0:
    return BROKEN
  if name in ('div', 'rem') and states[0] == 0:
    return ZERO
  if name == 'select_n' and all(state == 0 for state in states[1:]):
    return ZERO
  return LIVE


def _evaluated(eqn: Any, numbers: Sequence[Any]) -> Any:
  """Returns the result of an operation on scalars, or `None` if the operands are no numbers."""
  dtypes = tuple(v.aval.dtype for v in eqn.invars)
  if any(jnp.issubdtype(dtype, jax.dtypes.extended) for dtype in dtypes):
    return None
  options = jaxprs.options(eqn)
  try:
    return _once(eqn.primitive, options, tuple(map(str, dtypes)), tuple(numbers))
  except TypeError:  # a parameter that is not hashable
    return _once.__wrapped__(eqn.primitive, options, tuple(map(str, dtypes)), tuple(numbers))


@functools.lru_cache(maxsize=4096)
def _once(primitive: Any, options: tuple[tuple[str, Any], ...], dtypes: tuple[str, ...], numbers: tuple[Any, ...]
          ) -> Any:
  with jax.ensure_compile_time_eval():
    arrays = [jnp.asarray(number, dtype) for number, dtype in zip(numbers, dtypes)]
    return np.asarray(primitive.bind(*arrays, **dict(options))).item()
