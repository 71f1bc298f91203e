"""Scores say how much each weight is worth keeping: `score(w, signals) -> scores`, `float32` shaped like `w`.

The weights of the largest scores are kept. A score reads one leaf, and no masks or counts. A score that needs a signal
which the caller does not have raises `ValueError` and names the signal. A score that accumulates statistics over
updates reads them from a `Memory`. The first mask is chosen in `init`, which has no gradient, unless `dense_steps` are
given.

    score = lambda w, signals: jnp.abs(w * signals.grad)               # any function with this signature is a score
    tx = recipes.gradual_magnitude(optax.adamw(1e-3), 0.9, score=score, dense_steps=100, total_steps=10_000)
    tx = recipes.movement_pruning(optax.adamw(1e-3), 0.9, total_steps=10_000)   # has the memory `accumulated_movement`
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

from sparsejax import hessians, neighbours, trees
from sparsejax.arguments import checked
from sparsejax.types import Array, Schedule, Signals, elementwise, gradient_free

__all__ = [
  'Memory', 'Movement', 'accumulated_movement', 'fisher', 'gradient', 'gradient_average', 'grasp', 'magnitude',
  'momentum', 'movement', 'obs', 'previous', 'random', 'snip', 'soft_movement', 'squared_gradient_average',
  'synflow', 'value', 'wanda',
]


@gradient_free
@elementwise
def magnitude(w: Array, signals: Signals = Signals()) -> Array:
  """Returns `|w|`; NaN stays NaN, which `ranking` ranks last."""
  del signals
  return jnp.abs(w).astype(jnp.float32)


@gradient_free
@elementwise
def random(w: Array, signals: Signals) -> Array:
  """Returns random scores, uniform in [0, 1); needs `signals.key`.

  Each score is a hash of the key and of the weight's place in row-major order: two rounds of a mixing function of
  32 bits (Wellons 2018, Prospecting for Hash Functions, `lowbias32`), with two words that the key draws. A score of
  `jax.random.uniform` takes thirteen times as long. Leaves of 2^32 weights and more take that one. Scores are multiples
  of 2^-24 in `float32` for weights of any dtype, because bfloat16 has too few levels to rank a matrix.
  """
  if signals.key is None:
    raise ValueError('scores.random: needs a PRNG key; pass `key=jax.random.key(seed)` to the recipe.')
  if w.size >= 2**32:
    return jax.random.uniform(signals.key, w.shape, jnp.float32)
  first, second = jax.random.bits(signals.key, (2,))
  place = jnp.zeros((), jnp.uint32)
  for axis, length in enumerate(w.shape):
    place = place * np.uint32(length) + jax.lax.broadcasted_iota(jnp.uint32, w.shape, axis)
  return (_mixed(_mixed(place ^ first) + second) >> 8).astype(jnp.int32).astype(jnp.float32) * np.float32(2**-24)


def _mixed(x: Array) -> Array:
  """Returns a permutation of all `uint32` that turns each bit with a probability near one half if another bit turns."""
  for shift, factor in ((16, 0x7feb352d), (15, 0x846ca68b)):
    x = (x ^ x >> shift) * np.uint32(factor)
  return x ^ x >> 16


@gradient_free
@elementwise
def value(w: Array, signals: Signals) -> Array:
  """Returns the weight itself, with its sign; for flows whose master is a score, such as `flows.searched`."""
  del signals
  return w.astype(jnp.float32)


@elementwise
def gradient(w: Array, signals: Signals) -> Array:
  """Returns `|dL/dw|`; needs `signals.grad`."""
  return jnp.abs(_needed('gradient', signals.grad, _GRADIENT)).astype(jnp.float32)


@elementwise
def snip(w: Array, signals: Signals) -> Array:
  """Returns the connection sensitivity `|w dL/dw|`; needs `signals.grad`.

  The formula is equation 6 of SNIP (Lee et al. 2019), without the division by the sum. At trained weights the same
  formula is the first-order Taylor score (Molchanov et al. 2017), and the score of GSM (Ding et al. 2019, equation 5).
  """
  return jnp.abs(_product('snip', w, signals))


@elementwise
def grasp(w: Array, signals: Signals) -> Array:
  """Returns `w (H g)`, with its sign, for the Hessian H and the gradient g of the loss.

  The score needs H g as `signals.grad`, which `starts.hessian_gradient` computes. The largest scores are kept: the sign
  is opposite to that of GraSP (Wang et al. 2020, equation 8).
  """
  return _product('grasp', w, signals)


@elementwise
def synflow(w: Array, signals: Signals) -> Array:
  """Returns the synaptic flow `|w| dR/d|w|` (Tanaka et al. 2020, SynFlow, section 6).

  R is the sum of the outputs of the network of absolute weights. The score needs dR/d|w| as `signals.grad`, which
  `starts.synaptic_flow` computes.
  """
  return _product('synflow', jnp.abs(w), signals)


@gradient_free
@elementwise
def movement(w: Array, signals: Signals) -> Array:
  """Returns the accumulated score S (Sanh et al. 2020); needs the memory `accumulated_movement`."""
  return _needed('movement', signals.stats, 'the memory scores.accumulated_movement').score


@gradient_free
@elementwise
def soft_movement(w: Array, signals: Signals) -> Array:
  """Returns `sigmoid(S)` of the accumulated score S; needs the memory `accumulated_movement`.

  Soft movement pruning compares this score to its threshold.
  """
  return jax.nn.sigmoid(movement(w, signals))


@gradient_free
@elementwise
def momentum(w: Array, signals: Signals) -> Array:
  """Returns `|average of dL/dw|` (Dettmers and Zettlemoyer 2019); needs the memory `gradient_average`."""
  return jnp.abs(_needed('momentum', signals.stats, 'the memory scores.gradient_average'))


@gradient_free
@elementwise
def fisher(w: Array, signals: Signals) -> Array:
  """Returns `w^2 E[(dL/dw)^2] / 2`; needs the memory `squared_gradient_average`.

  The score estimates how much the loss rises if the weight is removed, by the diagonal empirical Fisher information
  (Theis et al. 2018, equation 6). Gradients are those of batches, not of single examples.
  """
  average = _needed('fisher', signals.stats, 'the memory scores.squared_gradient_average')
  return 0.5 * jnp.square(w.astype(jnp.float32)) * average


def wanda(w: Array, signals: Signals) -> Array:
  """Returns `|w|` times the root of the mean square of its input (Sun et al. 2023, Wanda, equation 1).

  The score needs a statistic with `rows` and `square`, such as `calibration.moments`. `w` is `[L, R, K]`, R outputs by
  K inputs. The authors compare the scores of one output, as `Unstructured(balanced=True)` does. Weights of an input
  that is always zero score 0.
  """
  stats = _needed('wanda', signals.stats, 'the statistic calibration.moments of a Recipe')
  mean = stats.square / jnp.maximum(stats.rows, 1).astype(stats.square.dtype)[:, None]
  return jnp.abs(w).astype(mean.dtype) * jnp.sqrt(mean)[:, None]


def obs(w: Array, signals: Signals, damping: float = 0.01) -> Array:
  """Returns `w^2 / [H^-1]_jj`, twice the loss of removing one weight (Hassibi and Stork 1993, Optimal Brain Surgeon).

  All other weights of the output then compensate in the best way. The score needs the statistic `calibration.gram`,
  from which the Hessian is computed, with `damping` as a fraction of its mean diagonal. `w` is `[L, R, K]`. A Hessian
  without a factor gives NaN.
  """
  stats = _needed('obs', signals.stats, 'the statistic calibration.gram of a Recipe')
  return jnp.square(w.astype(stats.gram.dtype)) / hessians.inverse_diagonal(stats.gram, damping)[:, None]


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
    optimizer: optax.GradientTransformation = optax.sgd(1.0), penalty: Schedule | None = None) -> Memory:
  """Returns the memory of a score S that starts at 0 and that `optimizer` trains by the gradient dL/dS = w dL/dw'.

  The gradient is equation 2 of Sanh et al. 2020, section 4.1, where w' is the sparse weight. `penalty(step)` is the
  factor lambda of the penalty `lambda mean(sigmoid(S))` of soft movement pruning (section 4.2). The mean is taken over
  the leaf. Without `penalty` there is none.
  """
  def start(w: Array) -> Movement:
    score = _zeros(w)
    return Movement(score, optimizer.init(score))

  def observe(stat: Movement, w: Array, signals: Signals) -> Movement:
    grad = _product('movement', w, signals)
    if penalty is not None:
      gate = jax.nn.sigmoid(stat.score)
      grad += penalty(signals.step) * gate * (1 - gate) / w.size
    moves, state = optimizer.update(grad, stat.state, stat.score)
    return Movement(stat.score + moves, state)

  return Memory(start, observe)


@checked
def gradient_average(decay: float = 0.9) -> Memory:
  """Returns the memory of an exponential moving average of the gradient, which starts at 0.

  The average is not debiased, because a common factor does not change the ranks.
  """
  return Memory(_zeros, lambda stat, w, s: decay * stat + (1 - decay) * s.grad.astype(jnp.float32))


@checked
def squared_gradient_average(decay: float = 0.99) -> Memory:
  """Returns the memory of an exponential moving average of the squared gradient, which starts at 0, not debiased."""
  return Memory(_zeros, lambda stat, w, s: decay * stat + (1 - decay) * jnp.square(s.grad.astype(jnp.float32)))


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


_GRADIENT = 'the gradient of this leaf'


def _needed(score: str, signal: Any, what: str) -> Any:
  if signal is None or trees.is_dense(signal):
    remedy = ('(there is none in `init`): pass `loss=`, params -> scalar, to a recipe that scores at initialisation, '
              'choose the first mask later with `dense_steps=1`, or score with magnitude or random instead'
              ) if what == _GRADIENT else '(pass it as `memory=`)'
    raise ValueError(f'scores.{score}: needs {what}, and the caller has none here {remedy}.')
  return signal


def _product(score: str, w: Array, signals: Signals) -> Array:
  return w.astype(jnp.float32) * _needed(score, signals.grad, _GRADIENT).astype(jnp.float32)
