"""A flow says how values and gradients pass between the dense master and the sparse point that the user holds.

W is the master, m its mask, q the sparse point and G the gradient of the loss at q. All have the shape of one leaf. A
flow defines q (`project`) and the gradient of the master (`pull_back`); each docstring writes both out. The step and
the coefficients of a leaf are `signals.step` and `signals.stats`.

    flow = flows.sr_ste(2e-4)
    q = flow.project(W, m, signals)
    master_gradient = flow.pull_back(G, W, m, signals)
"""

import dataclasses
import math
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import errors, neighbours
from sparsejax.arguments import checked
from sparsejax.types import Array, Bound, Flow, Schedule, Signals, hashes

__all__ = [
  'bidirectional', 'decayed', 'forgotten', 'frozen', 'hard', 'is_forgotten', 'lasso', 'on_the_edge', 'relevance',
  'remembered', 'searched', 'soft_shrink', 'soft_threshold', 'sr_ste', 'straight_through', 'until',
]

GRADIENTS = ('scaled', 'straight_through')


def hard() -> Flow:
  """Returns the flow q = m W with gradient m G. No value lives behind the zeros, so no master is stored."""
  return Flow(_masked, _masked_gradient, dense=False)


def straight_through() -> Flow:
  """Returns the flow q = m W with gradient G on every weight, pruned weights included (Bengio et al. 2013)."""
  return Flow(_masked, _whole_gradient)


def binary() -> Flow:
  """Returns the flow q = m sign(W) a, with a the mean |W| over the kept weights of an output; the gradient is clipped.

  The gradient of W is G where |W| <= 1, and 0 elsewhere (Rastegari et al. 2016, XNOR-Net; of Binarized NAS, too). The
  sign of 0 is 1. The outputs are read from the axes of the leaf, so that leaves of unknown axes are refused.
  """
  return Flow(_binarised, _clipped_gradient, along_axes=True)


@checked
def sr_ste(decay: float | Schedule, *, decoupled: bool = False, learning_rate: float | Schedule | None = None) -> Flow:
  """Returns the flow q = m W with gradient G + decay (1 - m) W (Zhou et al. 2021, equation 8).

  `decoupled`: the gradient is G. After the optimizer's step, pruned master weights lose `learning_rate * decay` of
  themselves, as weights under AdamW's weight decay do. `decay` and `learning_rate` (default 1) are numbers, or
  schedules of `signals.step`. Raises `ValueError` for a `learning_rate` without `decoupled`, where it has no effect.
  """
  if not decoupled:
    if learning_rate is not None:
      raise ValueError('flows.sr_ste: learning_rate= scales the decay that is decoupled from the gradient; pass '
                       'decoupled=True, or leave learning_rate out.')
    return Flow(_masked, Bound(_sparse_refined_gradient, (decay,)))
  rate = 1.0 if learning_rate is None else learning_rate
  return Flow(_masked, _whole_gradient, settle=Bound(_shrink_pruned, (decay, rate)))


@checked
def decayed(beta: float | Schedule, gradient: str) -> Flow:
  """Returns the flow q = m W + beta(step) (1 - m) W, with beta from 1 (dense) to 0 (N:M), a schedule or a number.

  `gradient='scaled'`: (m + beta (1 - m)) G, the derivative of q. `'straight_through'`: G on every weight.
  """
  if gradient not in GRADIENTS:
    raise errors.unknown('flows.decayed', 'gradient', gradient, GRADIENTS)
  project = Bound(_decayed, (beta,))
  return Flow(project, Bound(_decayed_gradient, (beta,)) if gradient == 'scaled' else _whole_gradient)


def soft_threshold() -> Flow:
  """Returns the flow q = s m (W - sign(W) th) with gradient G on every weight (Vanderschueren, De Vleeschouwer 2023).

  th is the leaf's threshold, `signals.stats`; a negative threshold counts as 0. s rescales each output channel (of
  `signals.axes`) by 1.01 / (r + 0.01), where r = (mean |W| m + 1e-6) / (mean |W| + 1e-6) over the channel.
  """
  return Flow(_soft_thresholded, _whole_gradient, along_axes=True)


def remembered() -> Flow:
  """Returns the flow q = m W with gradient m G, where a pruned weight keeps its value behind the zero.

  A weight returns with the value that it had. Masks in the forward pass work so: movement pruning, and gradual pruning
  in TensorFlow's and PyTorch's libraries.
  """
  return Flow(_masked, _masked_gradient)


@checked
def lasso(penalty: float | Schedule) -> Flow:
  """Returns the flow q = m W with gradient m G + penalty sign(q), where sign(0) = 0: l1 on the kept weights.

  `penalty`: a number, or a schedule of `signals.step`. No master is stored, and no further weight becomes exactly zero.
  """
  return Flow(_masked, Bound(_penalised_gradient, (penalty,)), dense=False)


@checked
def soft_shrink(ratio: float | Schedule) -> Flow:
  """Returns the flow q = W with gradient G that multiplies pruned weights by `ratio` at every step (ISS-P, Wang 2023).

  `ratio`: a number, or a schedule of `signals.step`.
  """
  return Flow(_whole, _whole_gradient, settle=Bound(_shrunk, (ratio,)))


def frozen() -> Flow:
  """Returns the flow in which pruned weights keep the value that they had when they were pruned, with no gradient.

  The forward pass is dense, and the mask says which weights are trained (FreezeNet, Wimmer et al. 2020). No master is
  stored.
  """
  return Flow(_whole, _masked_gradient, dense=False, frozen=True)


@checked
def relevance(gamma: float | Schedule, alpha: float) -> Flow:
  """Returns the flow q = m W with gradient m (G + 2 gamma W exp(-|G| / alpha)) (Bonetta et al. 2022).

  A weight whose loss has no slope decays, and a relevant weight keeps its plain gradient. |G| counts as a constant, and
  is that of the update, so that no second backward pass is needed; the authors' code makes one. `gamma`: a number, or a
  schedule of `signals.step`. `alpha` is the size of a gradient that protects. The sum goes into the optimizer: the
  decay is coupled, as in the authors' code. No master is stored.
  """
  return Flow(_masked, Bound(_relevant_gradient, (gamma, alpha)), dense=False)


@checked
def searched(kept: float = 1.0, pruned: float = 0.99) -> Flow:
  """Returns the flow q = m W with W fixed in `signals.stats`; the master is a score S with gradient W G (Zhang 2023).

  S begins at `kept` where the first mask keeps a weight, and at `pruned` elsewhere.
  """
  return Flow(_fixed, _score_gradient, begin=Bound(_first_scores, (kept, pruned)))


@checked
def on_the_edge(gain: float) -> Flow:
  """Returns `remembered` with each leaf rescaled to the edge of chaos, E[fan_in w^2] = `gain`, at the first mask.

  Hayou et al. 2021, Robust Pruning at Initialization, section 3. The mean is over all weights of a layer, with pruned
  weights as zeros. fan_in is that of the dense layer, taps included.
  """
  return Flow(_masked, _masked_gradient, begin=Bound(_rescaled, (gain,)), along_axes=True)


@checked
def until(flow: Flow, at: int) -> Flow:
  """Returns a flow that is `flow` before step `at` and `hard` from then on.

  The caller that stores the master makes it the sparse point at step `at`. A flow without a master is returned as it
  is, because a fixed mask changes nothing else about it.
  """
  if not flow.dense:
    return flow
  settle = flow.settle and Bound(_settle_until, (flow, at))
  return flow._replace(project=Bound(_project_until, (flow, at)), pull_back=Bound(_pull_back_until, (flow, at)),
                       settle=settle)


def recorded(flow: Flow) -> Flow:
  """Returns the flow as a treedef can hold it: without its functions if their coefficients are arrays."""
  return Flow(*(_unknown if callable(word) and not hashes(word) else word for word in flow))


def at(flow: Flow, step: Any) -> Flow:
  """Returns a flow of this module with the numbers of a step in the place of its schedules.

  Leaves of a step then share the numbers, which the program of the step computes once. Other flows stay as they are.
  """
  number = lambda x: at(x, step) if isinstance(x, Flow) else x(step) if callable(x) else x
  fixed = lambda word: dataclasses.replace(word, arguments=tuple(map(number, word.arguments)))
  known = lambda word: isinstance(word, Bound) and word.function.__module__ == __name__
  return Flow(*(fixed(word) if known(word) else word for word in flow))


def _now(coefficient: Any, signals: Signals) -> Any:
  """Returns a coefficient, which is a number or a schedule, at the step of the signals."""
  return coefficient(signals.step) if callable(coefficient) else coefficient


def forgotten(flow: Flow) -> Flow:
  """Returns the flow as pickle can take it, without its functions; `project` then says what is missing."""
  return flow._replace(project=_forgotten, pull_back=_forgotten, settle=None, begin=None)


def is_forgotten(flow: Flow | None) -> bool:
  """Returns whether the functions of a flow were lost in a pickle."""
  return flow is not None and flow.project is _forgotten


def _forgotten(*args: Any) -> Array:
  raise ValueError('sparsejax.project: the state comes from a pickle, which cannot hold the schedule of its flow (a '
                   'lambda or a closure). Make one update, or use a schedule of sparsejax.schedules.')


def _unknown(*args: Any) -> Array:
  raise ValueError('sparsejax.project: the flow has coefficients that are arrays; give numbers to the recipe.')


def _binarised(master: Array, mask: Array, signals: Signals) -> Array:
  own = signals.axes
  inside = (*own.contracted, *own.spatial) if own is not None else tuple(range(master.ndim - 1))
  size = jnp.sum(jnp.where(mask, jnp.abs(master), 0), inside, keepdims=True)
  mean = size / jnp.maximum(jnp.sum(mask, inside, keepdims=True), 1).astype(master.dtype)
  return jnp.where(mask, jnp.where(master >= 0, mean, -mean), jnp.zeros((), master.dtype))


def _clipped_gradient(grad: Array, master: Array, mask: Array, signals: Signals) -> Array:
  return jnp.where(jnp.abs(master) <= 1, grad, jnp.zeros((), grad.dtype))


def _masked(master: Array, mask: Array, signals: Signals) -> Array:
  return neighbours.where_kept(mask, master)  # not a product: 0 * NaN is NaN


def _whole(master: Array, mask: Array, signals: Signals) -> Array:
  return master


def _shrunk(master: Array, mask: Array, signals: Signals, ratio: Any) -> Array:
  return jnp.where(mask, master, master * jnp.asarray(_now(ratio, signals), master.dtype))


def _fixed(master: Array, mask: Array, signals: Signals) -> Array:
  return _masked(signals.stats.astype(master.dtype), mask, signals)


def _score_gradient(grad: Array, master: Array, mask: Array, signals: Signals) -> Array:
  return grad * signals.stats.astype(master.dtype)


def _first_scores(master: Array, mask: Array, signals: Signals, kept: float, pruned: float) -> Array:
  return jnp.where(mask, jnp.asarray(kept, master.dtype), jnp.asarray(pruned, master.dtype))


def _rescaled(master: Array, mask: Array, signals: Signals, gain: float) -> Array:
  axes = signals.axes
  along = tuple(a for a in range(master.ndim) if a not in axes.layer)
  fan_in = math.prod(master.shape[a] for a in (*axes.contracted, *axes.spatial))
  energy = fan_in * jnp.mean(jnp.square(jnp.where(mask, master, 0)), along, keepdims=True)
  return jnp.where(energy > 0, jnp.sqrt(gain / jnp.where(energy > 0, energy, 1)), 1) * master


def _masked_gradient(grad: Array, master: Array, mask: Array, signals: Signals) -> Array:
  return neighbours.where_kept(mask, grad)


def _penalised_gradient(grad: Array, master: Array, mask: Array, signals: Signals, penalty: Any) -> Array:
  pulled = (_now(penalty, signals) * jnp.sign(master).astype(jnp.float32)).astype(grad.dtype)
  return neighbours.where_kept(mask, grad + pulled)


def _whole_gradient(grad: Array, master: Array, mask: Array, signals: Signals) -> Array:
  return grad


def _relevant_gradient(grad: Array, master: Array, mask: Array, signals: Signals, gamma: Any, alpha: Any) -> Array:
  decay = 2 * _now(gamma, signals) * master * jnp.exp(-jnp.abs(grad) / alpha).astype(master.dtype)
  return neighbours.where_kept(mask, grad + decay.astype(grad.dtype))


def _sparse_refined_gradient(grad: Array, master: Array, mask: Array, signals: Signals, decay: Any) -> Array:
  pulled = (_now(decay, signals) * master).astype(grad.dtype)
  return grad + neighbours.where_kept(mask, jnp.zeros_like(pulled), pulled)


def _shrink_pruned(master: Array, mask: Array, signals: Signals, decay: Any, learning_rate: Any) -> Array:
  loss = _now(learning_rate, signals) * _now(decay, signals)
  return jnp.where(mask, master, master * jnp.asarray(1 - loss, master.dtype))


def _decayed(master: Array, mask: Array, signals: Signals, beta: Any) -> Array:
  return jnp.where(mask, master, _faded(master, _now(beta, signals)))


def _decayed_gradient(grad: Array, master: Array, mask: Array, signals: Signals, beta: Any) -> Array:
  return jnp.where(mask, grad, _faded(grad, _now(beta, signals)))


def _faded(x: Array, beta: Any) -> Array:
  beta = jnp.asarray(beta, x.dtype)
  return jnp.where(beta == 0, jnp.zeros((), x.dtype), beta * x)  # 0 * NaN is NaN, 0 * -1 is -0


def _soft_thresholded(master: Array, mask: Array, signals: Signals) -> Array:
  axes = tuple(a for a in range(master.ndim) if a not in signals.axes.output + signals.axes.layer)
  w = master.astype(jnp.float32)
  size = jnp.where(jnp.isnan(w), 0.0, jnp.abs(w))  # a single NaN must not spoil the mean of its channel
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
  """Returns the matrix-product rule of BDWP, `rule(x, w, w_backward)`, for a bilinear `op(x, w)`.

  The forward pass is `op(x, w)`. The gradient to `x` is taken through `w_backward` instead of `w`, so on purpose the
  rule is not the derivative of its forward pass. The gradient to `w` is the dense gradient of the ordinary product.
  `w_backward` gets no gradient. `op` is any product: `jnp.matmul`, a `lax.dot_general` or a convolution with its
  numbers bound.
  """

  @jax.custom_vjp
  def rule(x, w, w_backward):
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
