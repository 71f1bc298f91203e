"""A gate says, for each input, which units are computed, as weights with exact zeros where nothing is to be computed.

    gate = bernoulli('straight_through', rate=0.1)
    weights, penalty = gate(logits, key, step)                # a `Gated`; without a key a gate makes no random choice
    y, dropped = conditional.apply(block, params, x, weights, capacity=32)

A gate is any function `(logits [..., units], key or None, step) -> Gated`. The estimators are those of Bengio et al.
2013 (1308.3432), of gradients through random binary units; REINFORCE is a loss, `reinforce`, with its `Baseline`.

Other functions are the words of dynamic channel skipping (FTWT):

    target = mass(strength, 0.9)                      # the units that carry 90 % of a layer's response
    logits = foreseen(gate, x)                        # predicted from the layer's input
    loss = task + foresight(logits, target)
    y = computed(x, up, down, logits[0] > 0, widths=(64, 128, 256))      # one input: only the open units

A gate is trained beside the layer; a closed unit costs nothing where one input is computed at a time.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from sparsejax import arguments, errors
from sparsejax.arguments import checked
from sparsejax.types import Array, Bound, Step

__all__ = [
  'Baseline', 'Gated', 'bernoulli', 'computed', 'foreseen', 'foresight', 'gate_of', 'mass', 'noisy_rectifier',
  'observed', 'polarized', 'reinforce', 'response', 'straight_open',
]

ESTIMATORS = ('straight_through', 'sigmoid', 'smooth')
NOISES = {'logistic': jax.random.logistic, 'normal': jax.random.normal}


class Gated(NamedTuple):
  """A `Gated` holds the `weights` of the units, `[..., units]`, 0 where a unit is skipped, and a `penalty`, `[]`."""

  weights: Array
  penalty: Array


Gate = Callable[[Array, Array | None, Step], Gated]


@checked
def bernoulli(estimator: str, *, rate: float | None = None) -> Gate:
  """Returns the gate of binary units that are open with the probability p = `sigmoid(logits)` (Bengio et al. 2013).

  `estimator`: how the gradient of a unit reaches its logit. 'straight_through' hands it on unchanged, the form that
  the paper finds better. 'sigmoid' multiplies it by p (1 - p). 'smooth' opens a unit with the probability `sqrt(p)` and
  gives it the weight `sqrt(p)`, so that its mean is p. A closed unit then has no gradient, and may be skipped backwards
  too. The paper's form of the last could not be read; its mean follows. The noise is drawn once, and the backward pass
  reuses it. `rate`: the penalty is the mean over units of KL(rate || mean of p over the inputs), else 0. Without a key
  a unit is open where its logit is positive.
  """
  if estimator not in ESTIMATORS:
    raise errors.unknown('gates.bernoulli', 'estimator', estimator, ESTIMATORS)
  return Bound(_bernoulli, (estimator, rate))


def refuse_logits(function: str, logits: Array) -> None:
  """Raises `ValueError` for logits that are no floating numbers, which have no slope and would be rounded."""
  if not jnp.issubdtype(logits.dtype, jnp.floating):
    raise ValueError(f'{function}: logits of dtype {logits.dtype}; give floating numbers, as in logits.astype(float).')


def _bernoulli(logits: Array, key: Array | None, step: Step, estimator: str, rate: float | None) -> Gated:
  refuse_logits('gates.bernoulli', logits)
  p = jax.nn.sigmoid(logits)
  chance = jnp.sqrt(p) if estimator == 'smooth' else p
  is_open = logits > 0 if key is None else jax.random.uniform(key, p.shape, p.dtype) < chance
  if estimator == 'smooth':
    weights = is_open.astype(p.dtype) * chance
  else:
    weights = _straight(is_open, logits if estimator == 'straight_through' else p)
  return Gated(weights, _towards(p, rate))


def _straight(is_open: Array, soft: Array) -> Array:
  """Returns 1 where a unit is open and 0 elsewhere, with the gradient of `soft`."""
  hard = jax.lax.stop_gradient(is_open.astype(soft.dtype))
  return hard + (soft - jax.lax.stop_gradient(soft))


def _towards(p: Array, rate: float | None) -> Array:
  """Returns the mean over units of KL(rate || mean of `p` over all inputs), or 0 without a rate."""
  if rate is None:
    return jnp.zeros((), p.dtype)
  mean = jnp.clip(jnp.mean(p, tuple(range(p.ndim - 1))), 1e-6, 1 - 1e-6)
  return jnp.mean(rate * jnp.log(rate / mean) + (1 - rate) * jnp.log((1 - rate) / (1 - mean)))


@checked
def noisy_rectifier(noise: str = 'logistic', *, rate: float | None = None) -> Gate:
  """Returns the gate `max(0, logits + z)` with random z (Bengio et al. 2013): exact zeros, and ordinary gradients.

  With 'logistic' noise a unit is open with the probability `sigmoid(logits)`; 'normal' has that of a standard normal
  z. `rate`: the penalty of `bernoulli`, of these probabilities. Without a key z is 0.
  """
  if noise not in NOISES:
    raise errors.unknown('gates.noisy_rectifier', 'noise', noise, NOISES)
  return Bound(_noisy_rectifier, (noise, rate))


def _noisy_rectifier(logits: Array, key: Array | None, step: Step, noise: str, rate: float | None) -> Gated:
  refuse_logits('gates.noisy_rectifier', logits)
  z = jnp.zeros_like(logits) if key is None else NOISES[noise](key, logits.shape, logits.dtype)
  p = jax.nn.sigmoid(logits) if noise == 'logistic' else jax.scipy.stats.norm.cdf(logits)
  return Gated(jax.nn.relu(logits + z), _towards(p, rate))


class Baseline(NamedTuple):
  """A `Baseline` holds running averages of `(h - p)^2 L` and of `(h - p)^2` of each unit, `float32[units]` each."""

  total: Array
  weight: Array

  @property
  def value(self) -> Array:
    """The baseline of least variance of each unit, `total / weight`; 0 before anything was observed."""
    return jnp.where(self.weight > 0, self.total / jnp.where(self.weight > 0, self.weight, 1), 0)


@checked
def observed(baseline: Baseline, drawn: Array, logits: Array, losses: Array, average: float = 0.99) -> Baseline:
  """Returns the baseline after one more batch, for the next batches: a baseline must not depend on its own draws.

  `drawn`: 0 or 1, `[..., units]`, as `logits`. `losses`: of each example, `[...]`. The baseline of least variance is
  E[(h - p)^2 L] / E[(h - p)^2] of each unit (Bengio et al. 2013, section 3). Both means are averages with the factor
  `average`. `Baseline(jnp.zeros(units), jnp.zeros(units))` is the first.
  """
  _refuse_losses('observed', drawn, logits, losses)
  square = jnp.square(drawn - jax.nn.sigmoid(logits))
  inputs = tuple(range(logits.ndim - 1))
  now = (jnp.mean(square * losses[..., None], inputs), jnp.mean(square, inputs))
  return Baseline(*(average * old + (1 - average) * new for old, new in zip(baseline, now)))


@checked
def reinforce(drawn: Array, logits: Array, losses: Array, baseline: Array | float = 0.0) -> Array:
  """Returns a loss whose gradient to the logits is the mean of `(h - p) (L - b)`: REINFORCE (Bengio et al. 2013).

  The estimator is unbiased for each baseline b, `[]` or `[units]`, that does not depend on the draws h. `losses` are
  those of single examples, `[...]`: the mean over a batch would be unbiased, with the variance of the whole batch for
  each unit. No gradient flows into `losses`, `drawn` and the baseline. The value of the loss means nothing.
  """
  _refuse_losses('reinforce', drawn, logits, losses)
  b = jnp.broadcast_to(jnp.asarray(baseline, logits.dtype), logits.shape)
  merit = jax.lax.stop_gradient((drawn - jax.nn.sigmoid(logits)) * (losses[..., None] - b))
  return jnp.sum(merit * logits) / losses.size


def _refuse_losses(function: str, drawn: Array, logits: Array, losses: Array) -> None:
  refuse_logits(f'gates.{function}', logits)
  if drawn.shape != logits.shape or losses.shape != logits.shape[:-1]:
    raise ValueError(f'gates.{function}: draws {drawn.shape} and losses {losses.shape} of logits {logits.shape}; give '
                     'a draw for each logit, and one loss for each example, not their mean.')


@checked
def polarized(weights: Array, target: float, costs: Array | None = None, *, polarization: float = 1.0,
              activation: float = 1.0) -> Array:
  """Returns the penalty that makes all inputs open the same units, and the asked share of them (consensus by polarity).

  m is the mean weight of each unit over all inputs. The penalty is `polarization` times the mean over units of
  m (1 - m), plus `activation` times `(sum of c m - target)^2`. c are `costs`, `[units]`, made to sum to 1; the default
  is equal costs. m (1 - m) is 0 only where every input agrees. A gate without a slope would have no gradient, so the
  weights are those of `bernoulli`. The paper's formulas are not public; these follow from its abstract.
  Raises `ValueError` without an input, and for costs that are not one for each unit, negative, or known to be all 0.
  """
  if not weights.ndim or not weights.size:
    raise ValueError(f'gates.polarized: weights of shape {weights.shape}; give a weight for each input and unit, '
                     '[..., units].')
  units = weights.shape[-1]
  costs = jnp.ones(units, jnp.float32) if costs is None else costs
  if costs.shape != (units,):
    raise ValueError(f'gates.polarized: costs of shape {costs.shape} for {units} units; give one cost for each unit.')
  if arguments.is_known(costs) and not (bool(jnp.all(costs >= 0)) and bool(jnp.any(costs > 0))):
    raise ValueError('gates.polarized: `costs` must be at least 0, and one above 0; give the share of the FLOPs of '
                     'each unit.')
  mean = jnp.mean(weights, tuple(range(weights.ndim - 1)))
  active = jnp.sum(costs * mean) / jnp.sum(costs)
  return polarization * jnp.mean(mean * (1 - mean)) + activation * jnp.square(active - target)


@checked
def mass(strength: Array, fraction: float) -> Array:
  """Returns the smallest set of units whose share of the total strength is at least `fraction`, `bool[..., units]`.

  `strength` is at least 0; of equal units the first is taken. At least one unit is in the set, also without any
  strength. FTWT (Elkerdawy et al. 2022, 2110.08232) drops the unit that crosses the mass, and so may drop every unit;
  here the unit that crosses is kept.
  """
  total = jnp.sum(strength, -1, keepdims=True)
  share = strength / jnp.where(total > 0, total, 1)
  order = jnp.argsort(share, -1, descending=True, stable=True)
  before = jnp.cumsum(jnp.take_along_axis(share, order, -1), -1) - jnp.take_along_axis(share, order, -1)
  first = jnp.broadcast_to(jnp.arange(strength.shape[-1]) == 0, strength.shape)
  taken = (before < fraction - 1e-6) & (total > 0) | first
  return jnp.take_along_axis(taken, jnp.argsort(order, -1), -1)


@checked
def response(outputs: Array) -> Array:
  """Returns the strength of each unit, `float[batch, units]`: the largest |output| over all places."""
  return jnp.max(jnp.abs(outputs), axis=tuple(range(1, outputs.ndim - 1)))


@checked
def gate_of(key: Array, inputs: int, units: int) -> dict[str, Array]:
  """Returns the parameters of a gate: a matrix `[inputs, units]` and a bias that opens all units."""
  return {'kernel': jax.random.normal(key, (inputs, units)) / inputs**0.5, 'bias': jnp.ones(units)}


@checked
def foreseen(gate: Mapping[str, Array], x: Array) -> Array:
  """Returns the logits of the units, `float[batch, units]`, from the input `[batch, ..., features]` of the layer.

  The input is averaged over all places, and a softmax over the features follows, as in the authors' code.
  """
  pooled = jnp.mean(x, axis=tuple(range(1, x.ndim - 1)))
  return jax.nn.softmax(pooled, -1) @ gate['kernel'] + gate['bias'][None]


@checked
def straight_open(logits: Array) -> Array:
  """Returns 1 where a unit is open and 0 elsewhere, with the gradient of the sigmoid (straight-through)."""
  return bernoulli('sigmoid')(logits, None, 0).weights


@checked
def foresight(logits: Array, target: Array, weight: float = 10.0) -> Array:
  """Returns the loss of a gate: cross-entropy to the target set, summed over units, the mean over the batch."""
  wrong = jax.nn.softplus(jnp.where(target, -logits, logits))
  return weight * jnp.mean(jnp.sum(wrong, -1))


@checked
def computed(x: Array, into: Array, out: Array, keep: Array, widths: Sequence[int],
             activation: Callable[[Array], Array] = jax.nn.relu) -> Array:
  """Returns `activation(x @ into) @ out` over the units in `keep`, `bool[units]`, and computes few others.

  The least of the rising `widths` that holds all open units is computed, on gathered columns and rows. Open units
  beyond the last width are dropped, those of the highest numbers first.
  `x`: `[..., features]`. Raises `ValueError` for widths that do not rise.
  """
  if not widths or list(widths) != sorted(set(widths)) or widths[-1] > len(keep):
    raise ValueError(f'gates.computed: `widths` must rise up to the {len(keep)} units, not {tuple(widths)}.')
  order = jnp.argsort(~keep, stable=True)
  number = jnp.sum(keep)

  def narrow(width: int) -> Callable[[], Array]:
    own = order[:width]

    def run() -> Array:
      h = activation(x @ into[:, own])
      return jnp.where(jnp.broadcast_to(keep[own], h.shape), h, jnp.zeros((), h.dtype)) @ out[own]
    return run

  fits = jnp.sum(number > jnp.asarray(widths[:-1], number.dtype)) if len(widths) > 1 else 0
  return jax.lax.switch(fits, [narrow(width) for width in widths])
