"""Estimates the memory that a call of `prune` needs, from shapes alone, and refuses what does not fit.

    need = estimate(programs, targets, cohorts, calibration.gram, recipe.repairs)
    refuse_if_too_large(need, limit=8 << 30)
"""

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from sparsejax import calibration
from sparsejax.post_training.cohorts import Cohort
from sparsejax.post_training.recipe import Repair
from sparsejax.post_training.targets import Target
from sparsejax.programs import jaxprs
from sparsejax.programs.tracing import Program

STACKS = 5  # arrays like a stack: dense, present, mask and scores, and what a repair changes
FACTORS = 3  # arrays like a Gram matrix: the sum, its factor and a workspace
ROWS = 2  # arrays like the rows of a product, besides the patches of a convolution, of which the statistic is taken


def estimate(programs: Sequence[Program], targets: Mapping[str, Target], cohorts: Mapping[str, Cohort],
             statistic: calibration.Statistic, repairs: Sequence[Repair] = ()) -> int:
  """Returns the bytes that are expected at the peak, besides the parameters and batches that exist already.

  The estimate adds up the live values of all batches, the statistics of the largest cohort, the results, and the larger
  of two: the arrays of the largest unit, and the copies of the rows of the largest product. The arrays of a unit
  include those that the `repairs` hold at their peak, see `recipe.Weighed`. Cohorts, units and repairs come one by one,
  so that only the largest of each counts.
  """
  distinct = {id(program): program for program in programs}
  known = {key: _peak(jaxprs.opened(program)) for key, program in distinct.items()}
  frontier = sum(known[id(program)] for program in programs)
  rows = max(_of_rows(program, targets) for program in distinct.values())
  copies = 1 if all(cohort.once for cohort in cohorts.values()) else 2  # a copy of a walk waits while the other goes on
  statistics = {path: _bytes(jax.eval_shape(statistic, _rows(target))) for path, target in targets.items()}
  together = {id(cohort): sum(statistics[path] * _at_once(targets[path], cohort) for path in cohort.paths)
              for cohort in cohorts.values()}
  held = lambda target: max((repair.held(_shape(target)) for repair in repairs if hasattr(repair, 'held')), default=0)
  units = [_itemsize(target) * (STACKS * math.prod(_shape(target)) + held(target)) + (FACTORS - 1) * statistics[path]
           for path, target in targets.items()]
  results = sum(target.array.size * (target.array.dtype.itemsize + 1) for target in targets.values())
  return frontier * copies + max(together.values()) + max(rows, max(units)) + results


def refuse_if_too_large(need: int, limit: int | None) -> None:
  """Raises `ValueError` with both numbers if `need` bytes are more than `limit`, or more than is free."""
  room = free() if limit is None else limit
  if room is not None and need > room:
    which = 'are free' if limit is None else 'are allowed by `memory_limit`'
    raise ValueError(f'prune: about {_shown(need)} are needed and {_shown(room)} {which}. Give fewer or smaller '
                     "batches, sequential='weight', fewer `rows` at a time (exact_obs, obc), or a recipe without a "
                     'Gram matrix (wanda); a larger `memory_limit` overrules this estimate.')


def free() -> int | None:
  """Returns the bytes that are free on the devices, or on the host for CPU devices; `None` if nothing tells."""
  if jax.default_backend() != 'cpu':
    stats = [device.memory_stats() or {} for device in jax.local_devices()]
    room = [s['bytes_limit'] - s['bytes_in_use'] for s in stats if 'bytes_limit' in s and 'bytes_in_use' in s]
    return sum(room) if len(room) == len(stats) else None
  try:
    with open('/proc/meminfo', encoding='ascii') as lines:
      return next(int(line.split()[1]) * 1024 for line in lines if line.startswith('MemAvailable'))
  except (OSError, StopIteration):
    try:
      return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_AVPHYS_PAGES')
    except (OSError, ValueError, AttributeError):
      return None


def _shown(number: int) -> str:
  return f'{number:,} bytes'


def _shape(target: Target) -> tuple[int, int, int]:
  return next(iter(target.arrangements.values())).shape


def _at_once(target: Target, cohort: Cohort) -> int:
  """Returns how many units of a target are measured at once, which is 1 if every round of a loop is a cohort."""
  return 1 if cohort.depth or not target.gone else len(target.units)


def _rows(target: Target) -> calibration.Rows:
  matrices, _, inputs = _shape(target)
  dtype = np.dtype(f'float{8 * _itemsize(target)}')
  return calibration.Rows(jax.ShapeDtypeStruct((matrices, 1, inputs), dtype))  # type: ignore[arg-type]


def _of_rows(program: Program, targets: Mapping[str, Target]) -> int:
  """Returns the bytes of the copies of rows that the statistic of the largest product of a program works in."""
  at = dict(jaxprs.equations(program))
  known: dict[Any, int] = {}
  for target in targets.values():
    for number, use in target.uses.items():
      own = dataclasses.replace(target.arrangements[number], eqn=at[use.address])
      avals = [v.aval for v in own.eqn.invars]
      x, others = avals[1 - use.operand], avals[2:]
      key = own.row_key, x.shape, x.dtype
      if key not in known:
        shape = jax.eval_shape(own.rows, x, others)[0].shape
        patches = math.prod(shape) != math.prod(x.shape)
        known[key] = (ROWS + patches) * math.prod(shape) * (8 if x.dtype == np.float64 else 4)
  return max(known.values(), default=0)


def _itemsize(target: Target) -> int:
  """Returns the bytes of a number in the arrays of a unit, which are `float64` for such parameters only."""
  return 8 if target.array.dtype == np.float64 else 4


def _bytes(tree: Any) -> int:
  return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _peak(jaxpr: Any) -> int:
  """Returns the most bytes of values that a program has computed and still needs, inner programs included."""
  last = {v: i for i, eqn in enumerate(jaxpr.eqns) for v in eqn.invars if not isinstance(v, core.Literal)}
  last |= {v: len(jaxpr.eqns) for v in jaxpr.outvars if not isinstance(v, core.Literal)}
  live: dict[Any, int] = {}
  most = 0
  for i, eqn in enumerate(jaxpr.eqns):
    inside = max(map(_peak, map(jaxprs.opened, jaxprs.inner(eqn))), default=0)
    live |= {v: _size(v) for v in eqn.outvars}
    most = max(most, sum(live.values()) + inside)
    live = {v: size for v, size in live.items() if last.get(v, -1) > i}
  return most


def _size(variable: Any) -> int:
  shape, dtype = getattr(variable.aval, 'shape', None), getattr(variable.aval, 'dtype', None)
  if shape is None or dtype is None or jnp.issubdtype(dtype, jax.dtypes.prng_key):
    return 0
  return math.prod(shape) * np.dtype(dtype).itemsize


