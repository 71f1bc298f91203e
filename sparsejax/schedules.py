"""Schedules say how a number changes over the optimizer steps: `schedule(step) -> scalar`.

A schedule is a pure function of the step, so that a resumed run continues it exactly. Steps are whole numbers.
`begin` and `end` are step numbers, not durations. Each function of this
module returns a `Bound`, which compares and prints by value. Any other function of the step is a schedule as well.

    decay = schedules.linear(1.0, 0.0, begin=100, end=300)
    decay(200)                                             # 0.5
    recipes.mdgf(optax.adamw(1e-3), decay=decay)
"""

import inspect
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
from jax import lax

from sparsejax import arguments, errors
from sparsejax.arguments import checked
from sparsejax.types import ALWAYS, AT_ZERO, ENDLESS, Bound, Schedule, Step

__all__ = [
  'before', 'constant', 'cosine', 'cubic', 'delayed', 'density_decay', 'either', 'every', 'exponential', 'fade',
  'linear', 'named', 'once', 'polynomial', 'reach', 'stepwise',
]


@checked
def constant(value: float) -> Schedule:
  """Returns the schedule that is `value` at every step."""
  return Bound(_constant, (value,))


@checked
def linear(init_value: float = 1.0, end_value: float = 0.0, *, begin: int = 0, end: int) -> Schedule:
  """Returns a straight line from `init_value`, up to step `begin`, to exactly `end_value`, from step `end` on."""
  return Bound(_polynomial, (init_value, end_value, begin, _after('linear', begin, end), 1), end=end)


@checked
def cubic(init_value: float = 0.0, end_value: float = 1.0, *, begin: int = 0, end: int) -> Schedule:
  """Returns the cubic ramp of gradual pruning, which is fast at first and then ever slower.

  The value is `end_value + (init_value - end_value) * (1 - progress)^3` (Zhu and Gupta 2017, equation 1). `progress`
  rises from 0 at `begin` to 1 at `end`.
  """
  return Bound(_polynomial, (init_value, end_value, begin, _after('cubic', begin, end), 3), end=end)


@checked
def cosine(init_value: float = 1.0, end_value: float = 0.0, *, begin: int = 0, end: int) -> Schedule:
  """Returns half a cosine wave from `init_value`, up to step `begin`, to exactly `end_value`, from step `end` on."""
  return Bound(_cosine, (init_value, end_value, begin, _after('cosine', begin, end)), end=end)


@checked
def cosine_power(init_value: float = 1.0, end_value: float = 0.0, *, power: float = 10.0, begin: int = 0, end: int
                 ) -> Schedule:
  """Returns the cosine power annealing of sharpDARTS (Hundt et al. 2019, 1903.09900), from `begin` to `end`.

  With c = (1 + cos(pi e / E)) / 2, e from 1 to E = `end - begin + 1`, the value follows `power`^c, scaled to the ends.
  A larger `power` falls faster. `power=1` is the cosine itself.
  """
  return Bound(_cosine_power, (init_value, end_value, begin, _after('cosine_power', begin, end), power), end=end)


@checked
def exponential(rate: float | None = None, *, half_life: float | None = None, begin: int = 0) -> Schedule:
  """Returns the schedule `exp(-rate * (step - begin))`, which is 1 before `begin`.

  `rate` is per step; `half_life`, in steps, may be given in its place. The schedule never reaches 0.
  Raises `ValueError` unless exactly one of `rate` and `half_life` is given, and unless the given number is positive.
  """
  if (rate is None) == (half_life is None):
    raise ValueError('schedules.exponential: give exactly one of `rate` (per step) and `half_life` (in steps).')
  return Bound(_exponential, (0.6931471805599453 / half_life if rate is None else rate, begin), (ENDLESS,), begin)


@checked
def stepwise(values: Sequence[Any], boundaries: Sequence[int]) -> Schedule:
  """Returns the schedule that is `values[i]` from step `boundaries[i]` on, and `values[0]` before all boundaries.

  Raises `ValueError` unless `boundaries` holds one step for each value, in increasing order.
  """
  values = tuple(values)
  boundaries = tuple(int(arguments.verified('schedules.stepwise', 'begin', boundary)) for boundary in boundaries)
  if len(values) != len(boundaries) or not values or list(boundaries) != sorted(set(boundaries)):
    raise ValueError(f'schedules.stepwise: needs one rising boundary for each value, got {len(values)} values and '
                     f'boundaries {boundaries}. A stage of no steps (too few steps for the stages) is a cause.')
  return Bound(_stepwise, (values, boundaries), end=boundaries[-1])


@checked
def polynomial(init_value: float = 1.0, end_value: float = 0.0, *, power: float, begin: int = 0, end: int) -> Schedule:
  """Returns the ramp `end_value + (init_value - end_value) * (1 - progress)^power`.

  `progress` rises from 0 at `begin` to 1 at `end`. Power 1 gives `linear`, and power 3 gives `cubic`.
  """
  return Bound(_polynomial, (init_value, end_value, begin, _after('polynomial', begin, end), power), end=end)


@checked
def every(steps: int, *, begin: int = 0, end: int | None = None) -> Schedule:
  """Returns the schedule that is `True` at step `begin` and at every `steps`-th step after `begin`.

  If `end` is given, the schedule is also `True` at step `end`, and `False` after `end`. Step `end` is included even if
  it is no multiple of `steps` after `begin`: otherwise a ramp that ends there would remain unfinished.
  """
  facts = (ALWAYS,) if (steps, begin, end) == (1, 0, None) else ()
  return Bound(_every, (steps, begin) if end is None else (steps, begin, _after('every', begin, end)), facts,
               begin if end is None else end)


@checked
def before(schedule: Schedule, end: int) -> Schedule:
  """Returns the `schedule` of bools up to step `end - 1`, and `False` from step `end` on."""
  return Bound(_before, (schedule, end), end=end)


@checked
def density_decay(sparsity: float, *, end: int) -> Schedule:
  """Returns a ramp from 0 to 1, reached at step `end`, under which the density decays exponentially.

  A sparsity of `ramp(step) * sparsity` leaves a density of `(1 - sparsity)^(step / end)`.
  """
  return Bound(_density_decay, (sparsity, _after('density_decay', 0, end)), end=end)


@checked
def once(at: int) -> Schedule:
  """Returns the schedule that is `True` at step `at` only."""
  return Bound(_once, (at,), (AT_ZERO,) if at == 0 else (), at)


@checked
def delayed(schedule: Schedule, steps: int) -> Schedule:
  """Returns the schedule that is at `step + steps` what `schedule` is at `step`; negative `steps` bring it forward."""
  end = reach(schedule)
  return Bound(_delayed, (schedule, steps), end=None if end is None else end + steps)


@checked
def either(first: Schedule, second: Schedule) -> Schedule:
  """Returns the schedule of bools that is `True` where one of two schedules is."""
  return Bound(_either, (first, second), end=max((reach(each) or 0 for each in (first, second)), default=None))


@checked
def fade(steps: int, *, begin: int = 0, periods: int = 1) -> Schedule:
  """Returns the factor (T - t - 1) / (T - t) at t steps after `begin`, with T = `steps` (HESSO, Chen et al. 2024).

  A weight that is multiplied by the factor at each step falls along a straight line to zero. The factor is 0 after
  `steps` steps. Before `begin` the factor is that of t = 0. Each of several `periods` begins anew at t = 0, so that
  weights that are chosen then fall to zero in their turn.
  """
  return Bound(_fade, (steps, begin, periods), (), begin + steps * periods)


def reach(schedule: Any) -> int | None:
  """Returns the last step that a schedule names, see `types.Bound`, or `None` for another function or value.

  The attribute `end` lets a user's own function carry one: `schedule.end = 300`.
  """
  end = getattr(schedule, 'end', None) if callable(schedule) else None
  return end if isinstance(end, int) else None


@checked
def named(name: str, **values: Any) -> Schedule:
  """Returns the schedule that a configuration gives by its `name` and the arguments of the function of that name.

  Raises `ValueError` for a missing argument, and, with the most similar names, for an unknown schedule or argument.
  """
  known = {f.__name__: f for f in (
      constant, linear, cubic, polynomial, cosine, exponential, density_decay, stepwise, every, once)}
  if name not in known:
    raise errors.unknown('schedules.named', 'schedule', name, known)
  parameters = inspect.signature(known[name]).parameters
  for argument in values:
    if argument not in parameters:
      raise errors.unknown('schedules.named', f'argument of schedule {name!r}:', argument, parameters)
  missing = [p.name for p in parameters.values() if p.default is p.empty and p.name not in values]
  if missing:
    raise ValueError(f'schedules.named: schedule {name!r} needs `{"`, `".join(missing)}`.')
  return known[name](**values)


def _after(name: str, begin: int, end: int) -> int:
  if end <= begin:
    raise ValueError(f'schedules.{name}: `end` ({end}) must come after `begin` ({begin}).')
  return end


def _progress(step: Step, begin: int, end: int) -> Any:
  step = jnp.asarray(step, jnp.float32)
  # XLA multiplies by the reciprocal of a constant divisor. 41 / 41 is then not 1, but the last value must be exact.
  return lax.select(step < end, lax.clamp(0.0, (step - begin) / (end - begin), 1.0), lax.full_like(step, 1.0))


def _constant(step: Step, value: float) -> Any:
  return jnp.asarray(value)


def _polynomial(step: Step, init_value: float, end_value: float, begin: int, end: int, power: int) -> Any:
  return end_value + (init_value - end_value) * (1.0 - _progress(step, begin, end)) ** power


def _cosine(step: Step, init_value: float, end_value: float, begin: int, end: int) -> Any:
  progress = _progress(step, begin, end)
  # On some backends cos(pi) in float32 differs from -1 in the last bit, but a decaying mask must end at exactly 0.
  height = jnp.where(progress < 1.0, 0.5 * (1.0 + jnp.cos(jnp.pi * progress)), 0.0)
  return end_value + (init_value - end_value) * height


def _cosine_power(step: Step, init_value: float, end_value: float, begin: int, end: int, power: float) -> Any:
  count, progress = end - begin + 1, _progress(step, begin, end)
  height = lambda e: 0.5 * (1.0 + jnp.cos(jnp.pi * e / count))
  bent = height if power == 1 else lambda e: jnp.float32(power) ** height(e)
  part = (bent(1 + progress * (count - 1)) - bent(count)) / (bent(1) - bent(count))
  return end_value + (init_value - end_value) * jnp.where(progress < 1.0, part, 0.0)


def _exponential(step: Step, rate: float, begin: int) -> Any:
  return jnp.exp(-rate * jnp.maximum(jnp.asarray(step, jnp.float32) - begin, 0.0))


def _stepwise(step: Step, values: tuple[Any, ...], boundaries: tuple[int, ...]) -> Any:
  stage = sum((jnp.asarray(step) >= boundary).astype(jnp.int32) for boundary in boundaries[1:])
  return jnp.asarray(values)[jnp.asarray(stage, jnp.int32)]


def _every(step: Step, steps: int, begin: int, end: int | None = None) -> Any:
  step = jnp.asarray(step)
  since = step - begin
  due = (since >= 0) & (lax.rem(since, lax.full_like(since, steps)) == 0)
  return due if end is None else (due & (step < end)) | (step == end)


def _delayed(step: Step, schedule: Schedule, steps: int) -> Any:
  return schedule(step - steps)


def _either(step: Step, first: Schedule, second: Schedule) -> Any:
  return jnp.asarray(first(step)) | second(step)


def _before(step: Step, schedule: Schedule, end: int) -> Any:
  return schedule(step) & (jnp.asarray(step) < end)


def _density_decay(step: Step, sparsity: float, end: int) -> Any:
  part = 1.0 - jnp.float32(1.0 - sparsity) ** _progress(step, 0, end)
  return jnp.where(jnp.asarray(step) < end, part / sparsity, 1.0) if sparsity else jnp.asarray(step) >= end


def _fade(step: Step, steps: int, begin: int, periods: int) -> Any:
  since = jnp.maximum(jnp.asarray(step, jnp.float32) - begin, 0)
  left = jnp.where(since < steps * periods, steps - since % steps, 0)
  return jnp.maximum(left - 1, 0) / jnp.maximum(left, 1)


def _once(step: Step, at: int) -> Any:
  return jnp.asarray(step) == at
