"""Schedules: how a number changes over the steps. `schedule(step) -> scalar`, pure, so that a resumed run goes on.

Steps are optimizer steps, whole numbers; `begin` and `end` are absolute within the schedule's own clock. Each function
here returns a `Bound`, which compares and prints by value. Any function of the step is a schedule too.
"""

import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp

from sparsejax import errors
from sparsejax.types import Bound, Schedule, Step


def constant(value: float) -> Schedule:
  """`value` at every step."""
  return Bound(_constant, (value,))


def linear(init_value: float = 1.0, end_value: float = 0.0, *, begin: int = 0, end: int) -> Schedule:
  """`init_value` up to `begin`, `end_value` from `end` on, a straight line between."""
  return Bound(_polynomial, (init_value, end_value, begin, _after('linear', begin, end), 1))


def cubic(init_value: float = 0.0, end_value: float = 1.0, *, begin: int = 0, end: int) -> Schedule:
  """Fast first, then ever slower: `end + (init - end) (1 - progress)^3` (Zhu and Gupta 2017, equation 1)."""
  return Bound(_polynomial, (init_value, end_value, begin, _after('cubic', begin, end), 3))


def cosine(init_value: float = 1.0, end_value: float = 0.0, *, begin: int = 0, end: int) -> Schedule:
  """Half a cosine from `init_value` at `begin` to `end_value` from `end` on, exactly `end_value` there."""
  return Bound(_cosine, (init_value, end_value, begin, _after('cosine', begin, end)))


def exponential(rate: float | None = None, *, half_life: float | None = None, begin: int = 0) -> Schedule:
  """`exp(-rate * (step - begin))`, 1 before `begin`; or the same by its `half_life` in steps. It never reaches 0."""
  if (rate is None) == (half_life is None):
    raise ValueError('schedules.exponential: give exactly one of `rate` (per step) and `half_life` (in steps).')
  name, value = ('half_life', half_life) if rate is None else ('rate', rate)
  if value <= 0:
    raise ValueError(f'schedules.exponential: `{name}` must be positive, not {value}.')
  return Bound(_exponential, (0.6931471805599453 / half_life if rate is None else rate, begin))


def stepwise(values: Sequence[Any], boundaries: Sequence[int]) -> Schedule:
  """`values[i]` from step `boundaries[i]` on; `values[0]` also before. Boundaries rise."""
  values, boundaries = tuple(values), tuple(int(b) for b in boundaries)
  if len(values) != len(boundaries) or not values or list(boundaries) != sorted(set(boundaries)):
    raise ValueError(f'schedules.stepwise: needs one rising boundary for each value, got {len(values)} values and '
                     f'boundaries {boundaries}. A stage of no steps (too few steps for the stages) is a cause.')
  return Bound(_stepwise, (values, boundaries))


def polynomial(init_value: float = 1.0, end_value: float = 0.0, *, power: float, begin: int = 0, end: int) -> Schedule:
  """`end + (init - end) (1 - progress)^power`: `linear` with power 1, `cubic` with 3."""
  return Bound(_polynomial, (init_value, end_value, begin, _after('polynomial', begin, end), power))


def every(steps: int, *, begin: int = 0, end: int | None = None) -> Schedule:
  """`True` at `begin` and every `steps` steps from there; with an `end` also there, on the grid or not, and not after.

  So whatever has to be reached at `end` is: a grid that misses it leaves a ramp unfinished.
  """
  if steps < 1:
    raise ValueError(f'schedules.every: `steps` must be at least 1, not {steps}.')
  return Bound(_every, (steps, begin) if end is None else (steps, begin, _after('every', begin, end)))


def before(schedule: Schedule, end: int) -> Schedule:
  """A schedule of bools, and `False` from `end` on."""
  return Bound(_before, (schedule, end))


def density_decay(sparsity: float, *, end: int) -> Schedule:
  """From 0 to 1 at `end`, the part of `sparsity` at which the density is `(1 - sparsity)^(step / end)`."""
  return Bound(_density_decay, (sparsity, _after('density_decay', 0, end)))


def once(at: int) -> Schedule:
  """`True` at step `at` only."""
  return Bound(_once, (at,))


def named(name: str, **arguments: Any) -> Schedule:
  """A schedule by its name, for configurations.

  Raises `ValueError` with the closest names for an unknown schedule or argument, and for an argument that is missing.
  """
  known = {f.__name__: f for f in (
      constant, linear, cubic, polynomial, cosine, exponential, density_decay, stepwise, every, once)}
  if name not in known:
    raise errors.unknown('schedules.named', 'schedule', name, known)
  parameters = inspect.signature(known[name]).parameters
  for argument in arguments:
    if argument not in parameters:
      raise errors.unknown('schedules.named', f'argument of schedule {name!r}:', argument, parameters)
  missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in arguments]
  if missing:
    raise ValueError(f'schedules.named: schedule {name!r} needs `{"`, `".join(missing)}`.')
  return known[name](**arguments)


def _after(name: str, begin: int, end: int) -> int:
  if end <= begin:
    raise ValueError(f'schedules.{name}: `end` ({end}) must come after `begin` ({begin}).')
  return end


def _progress(step: Step, begin: int, end: int) -> Any:
  step = jnp.asarray(step, jnp.float32)
  # XLA divides by a constant by multiplying with its reciprocal: 41 / 41 is not 1 then, and the end has to be exact.
  return jnp.where(step < end, jnp.clip((step - begin) / (end - begin), 0.0, 1.0), 1.0)


def _constant(step: Step, value: float) -> Any:
  del step
  return jnp.asarray(value)


def _polynomial(step: Step, init_value: float, end_value: float, begin: int, end: int, power: int) -> Any:
  return end_value + (init_value - end_value) * (1.0 - _progress(step, begin, end)) ** power


def _cosine(step: Step, init_value: float, end_value: float, begin: int, end: int) -> Any:
  progress = _progress(step, begin, end)
  # cos(pi) in float32 is not -1 to the last bit on every backend, and the end has to be exact: a mask decays to 0.
  height = jnp.where(progress < 1.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)), 0.0)
  return end_value + (init_value - end_value) * height


def _exponential(step: Step, rate: float, begin: int) -> Any:
  return jnp.exp(-rate * jnp.maximum(jnp.asarray(step, jnp.float32) - begin, 0.0))


def _stepwise(step: Step, values: tuple[Any, ...], boundaries: tuple[int, ...]) -> Any:
  stage = sum((jnp.asarray(step) >= boundary).astype(jnp.int32) for boundary in boundaries[1:])
  return jnp.asarray(values)[jnp.asarray(stage, jnp.int32)]


def _every(step: Step, steps: int, begin: int, end: int | None = None) -> Any:
  step = jnp.asarray(step)
  due = (step >= begin) & ((step - begin) % steps == 0)
  return due if end is None else (due & (step < end)) | (step == end)


def _before(step: Step, schedule: Schedule, end: int) -> Any:
  return schedule(step) & (jnp.asarray(step) < end)


def _density_decay(step: Step, sparsity: float, end: int) -> Any:
  part = 1.0 - jnp.float32(1.0 - sparsity) ** _progress(step, 0, end)
  return jnp.where(jnp.asarray(step) < end, part / sparsity, 1.0) if sparsity else jnp.asarray(step) >= end


def _once(step: Step, at: int) -> Any:
  return jnp.asarray(step) == at
