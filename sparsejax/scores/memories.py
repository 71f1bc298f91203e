"""A memory is a statistic that each leaf accumulates over updates, and that scores read as `signals.stats`.

    memory = gradient_average(0.9)
    stat = memory.start(w)
    stat = memory.observe(stat, w, signals)        # once in each update

Users find all names in `sparsejax.scores`, beside the scores that read them.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import neighbours, trees
from sparsejax.arguments import checked
from sparsejax.types import Array, Schedule, Signals


class Memory(NamedTuple):
  """A `Memory` is a statistic of each leaf that a score accumulates over updates.

  `start(w)` returns the first statistic. `observe(stat, w, signals)` returns the next one, and is called once per
  update. `w` is then the weight at which the gradient was taken: the master, if the flow has one. A statistic is any
  pytree of scalars and of `float32` arrays shaped like `w`.
  """

  start: Callable[[Array], Any]
  observe: Callable[[Any, Array, Signals], Any]


class Movement(NamedTuple):
  """A `Movement` is the accumulated score, `float32` shaped like the weight, and the state of the score's optimizer."""

  score: Array
  state: Any


@checked
def accumulated_movement(
    optimizer: optax.GradientTransformation = optax.sgd(1.0), penalty: Schedule | None = None, *,
    since: int | None = None) -> Memory:
  """Returns the memory of a score S that starts at 0 and that `optimizer` trains by the gradient dL/dS = w dL/dw'.

  The gradient is equation 2 of Sanh et al. 2020, section 4.1, where w' is the sparse weight. `penalty(step)` is the
  factor lambda of the penalty `lambda mean(sigmoid(S))` of soft movement pruning (section 4.2). The mean is taken over
  the leaf. Without `penalty` there is none. With `since`, the score is |w| over the largest |w| of the leaf before
  step `since`, and is trained from there.
  """
  def start(w: Array) -> Movement:
    score = _zeros(w)
    return Movement(score, optimizer.init(score))

  def observe(stat: Movement, w: Array, signals: Signals) -> Movement:
    grad = weight_times_gradient('movement', w, signals)
    if penalty is not None:
      # A gate that needs no gradient would be computed before the backward pass, and be held during all of it.
      gate = jax.nn.sigmoid(stat.score + 0 * grad)
      grad += penalty(signals.step) * gate * (1 - gate) / w.size
    moves, state = optimizer.update(grad, stat.state, stat.score)
    moved = Movement(stat.score + moves, state)
    if since is None:
      return moved
    size = jnp.abs(w.astype(jnp.float32))
    begun = Movement(size / jnp.maximum(jnp.max(size), jnp.finfo(jnp.float32).tiny), stat.state)
    return jax.tree.map(lambda a, b: jnp.where(jnp.asarray(signals.step) < since, a, b), begun, moved)

  return Memory(start, observe)


@checked
def gradient_average(decay: float = 0.9) -> Memory:
  """Returns the memory of an exponential moving average of the gradient, which starts at 0.

  The average is not debiased, because a common factor does not change the ranks.
  """
  return Memory(_zeros, lambda stat, w, s: decay * stat + (1 - decay) * _slope('gradient_average', s))


@checked
def squared_gradient_average(decay: float = 0.99) -> Memory:
  """Returns the memory of an exponential moving average of the squared gradient, which starts at 0, not debiased."""
  slope = lambda s: _slope('squared_gradient_average', s)
  return Memory(_zeros, lambda stat, w, s: decay * stat + (1 - decay) * jnp.square(slope(s)))


def previous() -> Memory:
  """Returns the memory of the weights before the step, which a selection compares with those after it."""
  return Memory(_copy, lambda stat, w, s: w.astype(jnp.float32))


def _copy(w: Array) -> Array:
  return jnp.array(w, jnp.float32, copy=True)


def _zeros(w: Array) -> Array:
  """Returns `float32` zeros with the shape and the sharding of `w`.

  The zeros are computed from `w`: a constant would be replicated on all devices.
  """
  return jnp.where(neighbours.everywhere(w), 0.0, w.astype(jnp.float32))


GRADIENT = 'the gradient of this leaf'


def needed(score: str, signal: Any, what: str) -> Any:
  """Returns the signal of a score. Raises `ValueError` with the remedy where the caller has none."""
  if signal is None or trees.is_dense(signal):
    remedy = ('(there is none in `init`): pass `loss=`, params -> scalar, to a recipe that scores at initialisation, '
              'choose the first mask later with `dense_steps=1`, or score with magnitude or random instead'
              ) if what == GRADIENT else '(pass it as `memory=`)'
    raise ValueError(f'scores.{score}: needs {what}, and the caller has none here {remedy}.')
  return signal


def weight_times_gradient(score: str, w: Array, signals: Signals) -> Array:
  """Returns the weight times its gradient, in `float32`."""
  return w.astype(jnp.float32) * needed(score, signals.grad, GRADIENT).astype(jnp.float32)


def _slope(memory: str, signals: Signals) -> Array:
  return needed(memory, signals.grad, GRADIENT).astype(jnp.float32)
