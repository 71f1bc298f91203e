"""Flows: how values and gradients pass between the dense master and the sparse point that the user holds.

W is the master, m its mask, q the sparse point, G the gradient of the loss at q, all `[...]` of one leaf. A flow says
what q is (`project`) and what the master's gradient is (`pull_back`); both are written out in each docstring. Times
and coefficients come from `signals.step` and `signals.stats`.
"""

import math
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import errors
from sparsejax.types import Array, Bound, Flow, Schedule, Signals

GRADIENTS = ('scaled', 'straight_through')


def hard() -> Flow:
  """q = m W, gradient m G. Nothing lives behind the zeros, so no master is stored."""
  return Flow(_masked, _masked_gradient, dense=False)


def straight_through() -> Flow:
  """q = m W, gradient G on every weight, pruned ones too (Bengio et al. 2013)."""
  return Flow(_masked, _whole_gradient)


def sr_ste(decay: float, *, decoupled: bool = False, learning_rate: float | Schedule = 1.0) -> Flow:
  """q = m W, gradient G + decay (1 - m) W (Zhou et al. 2021, equation 8).

  `decoupled`: the gradient is G, and after the optimizer's step those master weights that are pruned then lose
  `learning_rate * decay` of themselves, as AdamW does with weight decay.
  """
  if not decoupled:
    return Flow(_masked, Bound(_sparse_refined_gradient, (decay,)))
  return Flow(_masked, _whole_gradient, settle=Bound(_shrink_pruned, (decay, learning_rate)))


def decayed(beta: Schedule, gradient: str) -> Flow:
  """q = m W + beta(step) (1 - m) W, with beta from 1 (dense) to 0 (N:M).

  `gradient='scaled'`: (m + beta (1 - m)) G, the derivative of q. `'straight_through'`: G on every weight.
  """
  if gradient not in GRADIENTS:
    raise errors.unknown('flows.decayed', 'gradient', gradient, GRADIENTS)
  project = Bound(_decayed, (beta,))
  return Flow(project, Bound(_decayed_gradient, (beta,)) if gradient == 'scaled' else _whole_gradient)


def soft_threshold() -> Flow:
  """q = s m (W - sign(W) th), gradient G on every weight (Vanderschueren and De Vleeschouwer 2023).

  th is the leaf's threshold, `signals.stats`; a negative one stands for none. s rescales each output channel (of
  `signals.axes`) by 1.01 / (r + 0.01), where r = (mean |W| m + 1e-6) / (mean |W| + 1e-6) over the channel.
  """
  return Flow(_soft_thresholded, _whole_gradient)


def remembered() -> Flow:
  """q = m W, gradient m G, but what is pruned keeps its value behind the zero, and returns with it.

  As a mask in the forward pass does: movement pruning, and gradual pruning in TensorFlow's and PyTorch's libraries.
  """
  return Flow(_masked, _masked_gradient)


def soft_shrink(ratio: float) -> Flow:
  """q = W, gradient G; after every step what the mask prunes is `ratio` times what it was (ISS-P, Wang et al. 2023)."""
  return Flow(_whole, _whole_gradient, settle=Bound(_shrunk, (ratio,)))


def frozen() -> Flow:
  """Pruned weights keep the value that they had when they were pruned, instead of zero, and get no gradient.

  FreezeNet (Wimmer et al. 2020): the forward pass is dense, the mask says what is trained. Needs no master.
  """
  return Flow(_whole, _masked_gradient, dense=False)


def searched(kept: float = 1.0, pruned: float = 0.99) -> Flow:
  """q = m W with W fixed, `signals.stats`; the master is a score S, whose gradient is W G (Zhang et al. 2023).

  S begins at `kept` where the first mask keeps, and at `pruned` elsewhere.
  """
  return Flow(_fixed, _score_gradient, begin=Bound(_first_scores, (kept, pruned)))


def on_the_edge(gain: float) -> Flow:
  """As `remembered`, but with the first mask each leaf is rescaled to the edge of chaos, E[fan_in w^2] = `gain`.

  Hayou et al. 2021, Robust Pruning at Initialization, section 3: the mean is over all weights of a layer, the pruned
  ones as zeros; fan_in is that of the dense layer, taps included.
  """
  return Flow(_masked, _masked_gradient, begin=Bound(_rescaled, (gain,)))


def until(flow: Flow, at: int) -> Flow:
  """`flow` before step `at`, `hard` from there on. Whoever stores the master makes it the sparse point at `at`.

  A flow without a master is itself: a fixed mask is all that there is to it.
  """
  if not flow.dense:
    return flow
  settle = flow.settle and Bound(_settle_until, (flow, at))
  return Flow(Bound(_project_until, (flow, at)), Bound(_pull_back_until, (flow, at)), settle, flow.dense, flow.begin)


def _masked(master: Array, mask: Array, signals: Signals) -> Array:
  del signals
  return jnp.where(mask, master, jnp.zeros((), master.dtype))  # not a product: 0 * NaN is NaN


def _whole(master: Array, mask: Array, signals: Signals) -> Array:
  del mask, signals
  return master


def _shrunk(master: Array, mask: Array, signals: Signals, ratio: float) -> Array:
  del signals
  return jnp.where(mask, master, master * jnp.asarray(ratio, master.dtype))


def _fixed(master: Array, mask: Array, signals: Signals) -> Array:
  return _masked(signals.stats.astype(master.dtype), mask, signals)


def _score_gradient(grad: Array, master: Array, mask: Array, signals: Signals) -> Array:
  del mask
  return grad * signals.stats.astype(master.dtype)


def _first_scores(master: Array, mask: Array, signals: Signals, kept: float, pruned: float) -> Array:
  del signals
  return jnp.where(mask, jnp.asarray(kept, master.dtype), jnp.asarray(pruned, master.dtype))


def _rescaled(master: Array, mask: Array, signals: Signals, gain: float) -> Array:
  axes = signals.axes
  along = tuple(a for a in range(master.ndim) if a not in axes.layer)
  fan_in = math.prod(master.shape[a] for a in (*axes.contracted, *axes.spatial))
  energy = fan_in * jnp.mean(jnp.square(jnp.where(mask, master, 0)), along, keepdims=True)
  return jnp.where(energy > 0, jnp.sqrt(gain / jnp.where(energy > 0, energy, 1)), 1) * master


def _masked_gradient(grad: Array, master: Array, mask: Array, signals: Signals) -> Array:
  del master, signals
  return jnp.where(mask, grad, jnp.zeros((), grad.dtype))


def _whole_gradient(grad: Array, master: Array, mask: Array, signals: Signals) -> Array:
  del master, mask, signals
  return grad


def _sparse_refined_gradient(grad: Array, master: Array, mask: Array, signals: Signals, decay: float) -> Array:
  del signals
  return grad + jnp.where(mask, jnp.zeros((), grad.dtype), (decay * master).astype(grad.dtype))


def _shrink_pruned(master: Array, mask: Array, signals: Signals, decay: float, learning_rate: Any) -> Array:
  rate = learning_rate(signals.step) if callable(learning_rate) else learning_rate
  return jnp.where(mask, master, master * jnp.asarray(1 - rate * decay, master.dtype))


def _decayed(master: Array, mask: Array, signals: Signals, beta: Schedule) -> Array:
  return jnp.where(mask, master, _faded(master, beta(signals.step)))


def _decayed_gradient(grad: Array, master: Array, mask: Array, signals: Signals, beta: Schedule) -> Array:
  del master
  return jnp.where(mask, grad, _faded(grad, beta(signals.step)))


def _faded(x: Array, beta: Any) -> Array:
  beta = jnp.asarray(beta, x.dtype)
  return jnp.where(beta == 0, jnp.zeros((), x.dtype), beta * x)  # 0 * NaN is NaN, 0 * -1 is -0


def _soft_thresholded(master: Array, mask: Array, signals: Signals) -> Array:
  axes = tuple(a for a in range(master.ndim) if a not in signals.axes.output + signals.axes.layer)
  w = master.astype(jnp.float32)
  size = jnp.where(jnp.isnan(w), 0.0, jnp.abs(w))  # one NaN must not take its whole channel with it
  kept = jnp.where(mask, size, 0.0)
  ratio = (jnp.mean(kept, axes, keepdims=True) + 1e-6) / (jnp.mean(size, axes, keepdims=True) + 1e-6)
  shrunk = w - jnp.sign(w) * jnp.maximum(signals.stats, 0.0)
  return jnp.where(mask, 1.01 / (ratio + 0.01) * shrunk, 0.0).astype(master.dtype)


def _project_until(master: Array, mask: Array, signals: Signals, flow: Flow, at: int) -> Array:
  return jnp.where(signals.step >= at, _masked(master, mask, signals), flow.project(master, mask, signals))


def _pull_back_until(grad: Array, master: Array, mask: Array, signals: Signals, flow: Flow, at: int) -> Array:
  whole = flow.pull_back(grad, master, mask, signals)
  return jnp.where(signals.step >= at, _masked_gradient(grad, master, mask, signals), whole)


def _settle_until(master: Array, mask: Array, signals: Signals, flow: Flow, at: int) -> Array:
  return jnp.where(signals.step >= at, master, flow.settle(master, mask, signals))


def bidirectional(op: Any) -> Any:
  """The matrix-product rule of BDWP for a bilinear `op(x, w)`: returns `rule(x, w, w_backward)`.

  Forward `op(x, w)`; the gradient to `x` is taken through `w_backward` instead of `w`; the gradient to `w` is dense,
  that of the ordinary product; `w_backward` gets none. The gradient to `x` is then not that of the forward pass, on
  purpose. `op` is whatever multiplies: `jnp.matmul`, a `lax.dot_general` or a convolution with its numbers bound.
  """

  @jax.custom_vjp
  def rule(x, w, w_backward):
    del w_backward
    return op(x, w)

  def forward(x, w, w_backward):
    return op(x, w), (x, w, w_backward)

  def backward(residuals, dy):
    x, w, w_backward = residuals
    (dx,) = jax.vjp(lambda x: op(x, w_backward), x)[1](dy)
    (dw,) = jax.vjp(lambda w: op(x, w), w)[1](dy)
    return dx, dw, jnp.zeros_like(w_backward)

  rule.defvjp(forward, backward)
  return rule
