"""Scores: how much a weight is worth keeping, one number each, larger is better.

A score is `score(w, signals) -> float32 like w`. It looks at one leaf and knows nothing of masks or counts. One that
misses a signal raises `ValueError` and says which. What it needs to remember from one update to the next is a `Memory`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import neighbours, trees
from sparsejax.types import Array, Schedule, Signals


def magnitude(w: Array, signals: Signals = Signals()) -> Array:
  """`|w|`. NaN stays NaN, which `ranking` puts last."""
  del signals
  return jnp.abs(w).astype(jnp.float32)


def random(w: Array, signals: Signals) -> Array:
  """Uniform in [0, 1), drawn in float32 whatever the weight's dtype: bfloat16 has too few levels to rank a matrix.

  Needs `signals.key`.
  """
  if signals.key is None:
    raise ValueError('scores.random: needs a PRNG key; pass `key=jax.random.key(seed)` to the recipe.')
  return jax.random.uniform(signals.key, w.shape, jnp.float32)


def value(w: Array, signals: Signals) -> Array:
  """The weight itself, signed: where the master is a score (`flows.searched`)."""
  del signals
  return w.astype(jnp.float32)


def gradient(w: Array, signals: Signals) -> Array:
  """`|dL/dw|`. Needs `signals.grad`."""
  return jnp.abs(_needed('gradient', signals.grad, _GRADIENT)).astype(jnp.float32)


def snip(w: Array, signals: Signals) -> Array:
  """`|w dL/dw|`, connection sensitivity (Lee et al. 2019, SNIP, equation 6, not divided by its sum).

  At weights that are trained already the first-order Taylor score of Molchanov et al. 2017, and what GSM ranks by
  (Ding et al. 2019, equation 5). Needs `signals.grad`.
  """
  return jnp.abs(_product('snip', w, signals))


def grasp(w: Array, signals: Signals) -> Array:
  """`w (H g)`, signed: the highest are kept (Wang et al. 2020, GraSP, equation 8, with the other sign).

  Needs `signals.grad` to be H g, as `starts.hessian_gradient` makes it.
  """
  return _product('grasp', w, signals)


def synflow(w: Array, signals: Signals) -> Array:
  """`|w| dR/d|w|` (Tanaka et al. 2020, SynFlow, section 6). Needs `signals.grad` of `starts.synaptic_flow`."""
  return _product('synflow', jnp.abs(w), signals)


def movement(w: Array, signals: Signals) -> Array:
  """The accumulated score itself (Sanh et al. 2020). Needs the memory `accumulated_movement`."""
  return _needed('movement', signals.stats, 'the memory scores.accumulated_movement').score


def soft_movement(w: Array, signals: Signals) -> Array:
  """`sigmoid` of the accumulated score: what soft movement pruning compares to its threshold."""
  return jax.nn.sigmoid(movement(w, signals))


def momentum(w: Array, signals: Signals) -> Array:
  """`|EMA of dL/dw|` (Dettmers and Zettlemoyer 2019). Needs the memory `gradient_average`."""
  return jnp.abs(_needed('momentum', signals.stats, 'the memory scores.gradient_average'))


def fisher(w: Array, signals: Signals) -> Array:
  """`w^2 E[(dL/dw)^2] / 2`: the loss of removing a weight by the diagonal empirical Fisher (Theis et al. 2018, eq. 6).

  The gradients are those of batches, not of single examples. Needs the memory `squared_gradient_average`.
  """
  average = _needed('fisher', signals.stats, 'the memory scores.squared_gradient_average')
  return 0.5 * jnp.square(w.astype(jnp.float32)) * average


class Memory(NamedTuple):
  """What a score remembers of each leaf. `start(w) -> stat`; `observe(stat, w, signals) -> stat` once an update, with
  the weight that the gradient was taken at (the master, where there is one). A stat is any pytree, its arrays float32
  and shaped like `w`, or scalars."""

  start: Callable[[Array], Any]
  observe: Callable[[Any, Array, Signals], Any]


class Movement(NamedTuple):
  """`score`, `float32` like the weight, and the state of the optimizer that trains it."""

  score: Array
  state: Any


def accumulated_movement(
    optimizer: optax.GradientTransformation = optax.sgd(1.0), penalty: Schedule = lambda step: 0.0) -> Memory:
  """S from 0, trained by `optimizer` on dL/dS = w dL/dw' (Sanh et al. 2020, section 4.1, equation 2).

  `penalty(step)`: lambda of `lambda mean(sigmoid(S))`, the mean over the leaf (soft movement pruning, section 4.2).
  """
  def start(w: Array) -> Movement:
    score = nothing(w)
    return Movement(score, optimizer.init(score))

  def observe(stat: Movement, w: Array, signals: Signals) -> Movement:
    gate = jax.nn.sigmoid(stat.score)
    grad = _product('movement', w, signals) + penalty(signals.step) * gate * (1 - gate) / w.size
    moves, state = optimizer.update(grad, stat.state, stat.score)
    return Movement(stat.score + moves, state)

  return Memory(start, observe)


def gradient_average(decay: float = 0.9) -> Memory:
  """EMA of the gradient, from 0, not debiased: ranks do not change by that."""
  return Memory(nothing, lambda stat, w, s: decay * stat + (1 - decay) * s.grad.astype(jnp.float32))


def squared_gradient_average(decay: float = 0.99) -> Memory:
  """EMA of the squared gradient, from 0, not debiased."""
  return Memory(nothing, lambda stat, w, s: decay * stat + (1 - decay) * jnp.square(s.grad.astype(jnp.float32)))


def nothing(w: Array) -> Array:
  """`float32` zeros like `w`, computed from it: a constant would lie on every device, whatever `w`'s sharding."""
  return jnp.where(neighbours.everywhere(w), 0.0, w.astype(jnp.float32))


_GRADIENT = 'the gradient of this leaf'


def _needed(score: str, signal: Any, what: str) -> Any:
  if signal is None or trees.is_dense(signal):
    remedy = ('(there is none in `init`): pass `loss=`, params -> scalar, to a recipe that scores at initialisation, '
              'or score with magnitude or random instead') if what == _GRADIENT else '(`memory=` of the selection)'
    raise ValueError(f'scores.{score}: needs {what}, and the caller has none here {remedy}.')
  return signal


def _product(score: str, w: Array, signals: Signals) -> Array:
  return w.astype(jnp.float32) * _needed(score, signals.grad, _GRADIENT).astype(jnp.float32)
