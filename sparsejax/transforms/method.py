"""A `Method` is everything that `sparsify` is told, as one value.

    method = Method(optax.sgd(0.1), flows.hard(), selections.leafwise(NM(2, 4)))
    method.due(step)       # whether masks are chosen at `step`
    method.until_freeze    # the flow, which is `hard` from the fine-tune phase on
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax

from sparsejax import flows, plans, schedules, scores, starts, types
from sparsejax.selections import Selection
from sparsejax.types import Array, Axes, Flow, Predicate, PyTree, Schedule, Start


@dataclasses.dataclass(frozen=True, eq=False)
class Method:
  """A `Method` holds the words of one sparse optimizer; `sparsify` describes them. `freeze`: the step of the last mask.

  Masks are chosen when `due(step)`. The facts `always` and `never` save work.
  """

  inner: optax.GradientTransformationExtraArgs
  flow: Flow
  selection: Selection
  where: Predicate | PyTree | None = None
  axes: Mapping[str, Axes] | None = None
  refresh: Schedule = schedules.every(1)
  dense_steps: int = 0
  freeze: int | None = None
  slots: str = 'kept'
  key: Array | None = None
  allow_empty: bool = False
  memory: scores.Memory | None = None
  start: Start | None = None
  first: Selection | None = None
  pause: bool = False
  name: str = ''
  tied: Mapping[str, str] | None = None
  probe: Callable[[PyTree], PyTree] | None = None

  @property
  def words(self) -> tuple[str, ...]:
    """The names of the words that are the identity of a state, without their numbers."""
    return plans.words_of(self.flow, self.selection.select)

  @property
  def once(self) -> bool:
    """Whether masks are known to be chosen only once, in `init` or after the dense phase."""
    return types.says(self.refresh, types.AT_ZERO)

  @property
  def until_freeze(self) -> Flow:
    """The flow, which is `flows.hard` from step `freeze` on."""
    return self.flow if self.freeze is None else flows.until(self.flow, self.freeze)

  @property
  def always(self) -> bool:
    """Whether masks are known to be chosen at every step."""
    return self.freeze is None and self.dense_steps == 0 and types.says(self.refresh, types.ALWAYS)

  @property
  def never(self) -> bool:
    """Whether masks are known to be chosen in `init` alone."""
    return self.dense_steps == 0 and self.once

  def due(self, step: Array) -> Array:
    """Returns whether masks are chosen at `step`, `bool[]`.

    The step `freeze` chooses the last mask, unless the schedule is `False` at all steps from 1 to `freeze`.
    """
    if isinstance(step, jax.core.Tracer):
      return self._due(step)
    try:
      return _due_at_once(self, step)
    except jax.errors.ConcretizationTypeError:  # a schedule of the user may branch in Python, outside of `jit`
      return self._due(step)

  def _due(self, step: Array) -> Array:
    in_time, due = step >= self.dense_steps, self.refresh(step - self.dense_steps)
    if self.freeze is None:
      return in_time & due
    return in_time & (step <= self.freeze) & (due | ((step == self.freeze) & self._moves(step)))

  def _moves(self, step: Array) -> Any:
    """Returns whether the schedule ever chooses masks after `init`; the answer counts at the step `freeze` only."""
    if self.dense_steps or types.says(self.refresh, types.ALWAYS):
      return True
    ever = lambda: jnp.any(jax.vmap(self.refresh)(jnp.arange(1, self.freeze + 1)))
    return jax.lax.cond(step == self.freeze, ever, lambda: jnp.zeros((), bool))

  @property
  def placeholders(self) -> tuple[str, ...]:
    """The names that `init` has to be given: the names of `starts.given` in `start` and `key`."""
    return tuple(sorted(starts.names(self.start) | starts.names(self.key)))

  def filled(self, values: Mapping[str, Any]) -> 'Method':
    """Returns the method with the placeholders replaced by their values."""
    return dataclasses.replace(self, start=starts.fill(self.start, values), key=starts.fill(self.key, values))


# A single program outside of `jit`, where each operation would be compiled by itself.
_due_at_once = jax.jit(Method._due, static_argnums=0)
