"""Stages are patterns that change over the steps of training.

    stages = (NM(8, 32), NM(4, 16), NM(2, 8), NM(1, 4))
    Staged(NM(1, 4), lambda step: stages[min(step // 100, 3)]).at(150)  # 4:16
    Switch(stages, index)(scores, None, axes)                           # the mask of stage `index`, which may be traced
"""

import dataclasses
from typing import Any

from jax import lax

from sparsejax import counts
from sparsejax.types import Array, Axes, Pattern, Pooled, Schedule


@dataclasses.dataclass(frozen=True)
class Staged:
  """A `Staged` is a pattern that changes over the steps: `schedule(step)` returns the pattern at `step`.

  `target` is the pattern at the end of training. States and reports record `target`. Without a step a `Staged` has the
  attributes of its `target`. Each stage has its own count.
  """

  target: Pattern
  schedule: Schedule
  fixed = True

  def __str__(self) -> str:
    return str(self.target)

  def __getattr__(self, name: str) -> Any:
    if name == 'target':  # not yet there, while the dataclass is unpickled
      raise AttributeError(name)
    return getattr(self.target, name)

  @property
  def sparsity(self) -> float | None:
    return self.target.sparsity

  @property
  def static(self) -> bool:
    return self.target.static

  @property
  def group(self) -> tuple[int, int]:
    return self.target.group

  def at(self, step: Any) -> Pattern:
    """Returns the pattern at `step`."""
    return self.schedule(step)

  def __call__(self, scores: Array, count: Any = None, axes: Axes = Axes((0,), (1,))) -> Array:
    return self.target(scores, count, axes)

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    return self.at(0).validate(shape, axes) or self.target.validate(shape, axes)

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    return self.target.violation(w, axes, sparsity)

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    return self.target.pooled(scores, axes)


@dataclasses.dataclass(frozen=True)
class Switch:
  """A `Switch` is one of several patterns, by a traced `index`.

  Only the mask of the chosen stage is computed; under `vmap` the masks of all stages are. The `group`, the
  units and the violations are those of the last stage.
  """

  stages: tuple[Pattern, ...]
  index: Any
  sparsity = None
  static = False
  fixed = True

  @property
  def group(self) -> tuple[int, int]:
    return self.stages[-1].group

  def __str__(self) -> str:
    return ' -> '.join(map(str, self.stages))

  def validate(self, shape: tuple[int, ...], axes: Axes) -> str | None:
    return next((why for why in (stage.validate(shape, axes) for stage in self.stages) if why), None)

  def __call__(self, scores: Array, count: Any = None, axes: Axes = Axes((0,), (1,))) -> Array:
    return lax.switch(self.index, [lambda s, p=stage: p(s, count, axes) for stage in self.stages], scores)

  def survivors(self, scores: Array, count: Any, axes: Axes, drop: Any) -> Array:
    """Returns the mask of the survivors of a drop, by the rule of the chosen stage."""
    rules = [lambda s, p=stage: counts.survivors(p, s, count, axes, drop) for stage in self.stages]
    return lax.switch(self.index, rules, scores)

  def violation(self, w: Array, axes: Axes, sparsity: float | None = None) -> str:
    return self.stages[-1].violation(w, axes, sparsity)

  def pooled(self, scores: Array, axes: Axes) -> Pooled:
    return self.stages[-1].pooled(scores, axes)
