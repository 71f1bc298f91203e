"""Splits a backward pass in two, and says what that saves in a pipeline: zero-bubble schedules, on paper.

    y, pull_input, pull_weights = pipelines.split_backward(layer)(params, x)
    dx, dw = pull_input(dy), pull_weights(dy)                          # dw may wait until the pipeline is idle
    print(pipelines.bubbles(stages=4, microbatches=8, **pipelines.work(layer, params, x)))

`sparsejax plan FILE --pipeline stages=4,microbatches=8` prints the same of a function `stage` in FILE. There is no
engine: the schedules are those of Qi et al. 2023, Zero Bubble Pipeline Parallelism, 2401.10241.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from sparsejax import arguments
from sparsejax.argument_kinds import FUNCTION, PARAMS, RATE, TIMES
from sparsejax.arguments import checked
from sparsejax.tables import aligned
from sparsejax.types import Array, PyTree

__all__ = ['Bubbles', 'PipelineSchedule', 'bubbles', 'split_backward', 'work']

arguments.declare('bubbles', stages=TIMES, microbatches=TIMES, forward=RATE, inputs=RATE, weights=RATE)
arguments.declare('split_backward work', stage=FUNCTION, params=PARAMS, x=PARAMS)


class PipelineSchedule(NamedTuple):
  """A `PipelineSchedule` is a pipeline schedule: the time in which a stage idles, and the activations that it holds.

  `activations` is a multiple of those of 1F1B, and `sends` a multiple of its communication.
  """

  name: str
  idle: float
  activations: int
  sends: int


class Bubbles(NamedTuple):
  """A `Bubbles` holds the schedules of one pipeline and the busy time of a stage; prints as a table."""

  busy: float
  schedules: tuple[PipelineSchedule, ...]

  def __str__(self) -> str:
    rows = [(each.name, f'{each.idle:g}', f'{100 * each.idle / (self.busy + each.idle or 1):.1f} %',
             f'{each.activations} x', f'{each.sends} x') for each in self.schedules]
    return aligned(('schedule', 'idle', 'of the whole', 'activations', 'sends'), rows, right=(1, 2, 3, 4))


@checked
def bubbles(stages: int, microbatches: int, forward: float = 1.0, inputs: float = 1.0, weights: float = 1.0) -> Bubbles:
  """Returns the idle time of a stage under 1F1B and three zero-bubble schedules, in the unit of the three times.

  `forward`, `inputs` and `weights`: the time that one microbatch takes in one stage, for the forward pass and for the
  gradients of inputs and of weights. With p stages, 1F1B idles (p - 1)(F + B + W), ZB-H1 (p - 1)(F + B - W) with equal
  activations, and ZB-H2 (p - 1)(F + B - 2 W) with twice as many; below zero there is no idle time. ZB-V has none for
  F = B = W, and elsewhere is counted like ZB-H2. With N:M weights under straight-through training F and B may be
  halved and W stays dense, so that ZB-H1 alone has no bubble.
  """
  idle = lambda times: max(0.0, (stages - 1) * (forward + inputs - times * weights))
  found = (('1F1B', idle(-1), 1, 1), ('ZB-H1', idle(1), 1, 1), ('ZB-H2', idle(2), 2, 1), ('ZB-V', idle(2), 1, 2))
  return Bubbles(microbatches * (forward + inputs + weights), tuple(PipelineSchedule(*row) for row in found))


@checked
def split_backward(stage: Callable[[PyTree, PyTree], Any]) -> Callable[[PyTree, PyTree], tuple[Any, Any, Any]]:
  """Returns the function `(params, x) -> (y, pull_input, pull_weights)` of a stage `(params, x) -> y`.

  Each pullback maps the gradient of `y` to that of one argument, and computes nothing of the other: under `jit` both
  are computed from the residuals of one forward pass. Both together are the result of `jax.vjp`.
  """
  def forward(params: PyTree, x: PyTree) -> tuple[Any, Any, Any]:
    y, pull = jax.vjp(stage, params, x)
    return y, lambda dy: pull(dy)[1], lambda dy: pull(dy)[0]

  return forward


@checked
def work(stage: Callable[[PyTree, PyTree], Array], params: PyTree, x: PyTree) -> dict[str, float]:
  """Returns the FLOPs of the three parts of a stage, read from compiled programs: the last arguments of `bubbles`.

  Arguments may be `jax.ShapeDtypeStruct`s. The forward pass of the residuals is taken off the backward parts.
  """
  y = jax.eval_shape(stage, params, x)
  flops = lambda f, *args: float((jax.jit(f).lower(*args).compile().cost_analysis() or {}).get('flops', 0))
  parts = {'inputs': 1, 'weights': 2}
  residuals = jax.eval_shape(lambda params, x: jax.vjp(stage, params, x)[1], params, x)
  pulled = {name: flops(lambda pull, dy, i=i: pull(dy)[2 - i], residuals, y) for name, i in parts.items()}
  return {'forward': flops(stage, params, x), **pulled}
