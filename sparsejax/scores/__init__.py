"""Scores say how much each weight is worth keeping: `score(w, signals) -> scores`, `float32` shaped like `w`.

The weights of the largest scores are kept. A score reads one leaf, and no masks or counts. A score that needs a signal
which the caller does not have raises `ValueError` and names the signal. A score that accumulates statistics over
updates reads them from a `Memory`. The first mask is chosen in `init`, which has no gradient, unless `dense_steps` are
given.

    score = lambda w, signals: jnp.abs(w * signals.grad)               # any function with this signature is a score
    tx = recipes.gradual_magnitude(optax.adamw(1e-3), 0.9, score=score, dense_steps=100, total_steps=10_000)
    tx = recipes.movement_pruning(optax.adamw(1e-3), 0.9, total_steps=10_000)   # has the memory `accumulated_movement`
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import hessians
from sparsejax.arguments import checked, shown
from sparsejax.scores.memories import (
  GRADIENT,
  Memory,
  Movement,
  accumulated_movement,
  gradient_average,
  needed,
  previous,
  squared_gradient_average,
  weight_times_gradient,
)
from sparsejax.types import ELEMENTWISE, Array, Axes, Bound, Score, Signals, elementwise, gradient_free

__all__ = [
  'Memory', 'Movement', 'accumulated_movement', 'expected_magnitude', 'fisher', 'gradient', 'gradient_average', 'grasp',
  'importance', 'magnitude', 'modular', 'momentum', 'movement', 'obs', 'previous', 'random', 'smoothed', 'snip', 'snr',
  'soft_movement', 'squared_gradient_average', 'synflow', 'value', 'wanda',
]


def applied(score: Score, w: Array, signals: Signals) -> Array:
  """Returns the scores of `w`. Raises `ValueError` unless these are real numbers in the shape of `w`."""
  scores = score(w, signals)
  dtype = getattr(scores, 'dtype', None)
  if getattr(scores, 'shape', None) != w.shape or jnp.issubdtype(dtype, jnp.complexfloating):
    what = shown(scores) if dtype is None else f'{dtype}{list(scores.shape)}'
    raise ValueError(f'sparsejax: {shown(score)}, a `score`, returned {what} for a weight {w.dtype}{list(w.shape)}; '
                     'return a real number for each entry, as in jnp.abs(w).')
  return scores


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
  return jnp.abs(needed('gradient', signals.grad, GRADIENT)).astype(jnp.float32)


@checked
def importance(lam: float) -> Score:
  """Returns the score `|w| + lam |dL/dw|`; needs `signals.grad` (Wang et al. 2022, SparCL, section 3.1).

  The paper adds the gradients of the current batch and of the buffer with two factors. The authors' code has one
  gradient of both losses and `lam=0.5`. Give the score a gradient of another loss by `probe=` of `transforms.sparsify`.
  """
  return Bound(_importance, (lam,), (ELEMENTWISE,))


def _importance(w: Array, signals: Signals, lam: float) -> Array:
  return magnitude(w) + lam * gradient(w, signals)


@elementwise
def snip(w: Array, signals: Signals) -> Array:
  """Returns the connection sensitivity `|w dL/dw|`; needs `signals.grad`.

  The formula is equation 6 of SNIP (Lee et al. 2019), without the division by the sum. At trained weights the same
  formula is the first-order Taylor score (Molchanov et al. 2017), and the score of GSM (Ding et al. 2019, equation 5).
  """
  return jnp.abs(weight_times_gradient('snip', w, signals))


@elementwise
def grasp(w: Array, signals: Signals) -> Array:
  """Returns `w (H g)`, with its sign, for the Hessian H and the gradient g of the loss.

  The score needs H g as `signals.grad`, which `starts.hessian_gradient` computes. The largest scores are kept: the sign
  is opposite to that of GraSP (Wang et al. 2020, equation 8).
  """
  return weight_times_gradient('grasp', w, signals)


@elementwise
def synflow(w: Array, signals: Signals) -> Array:
  """Returns the synaptic flow `|w| dR/d|w|` (Tanaka et al. 2020, SynFlow, section 6).

  R is the sum of the outputs of the network of absolute weights. The score needs dR/d|w| as `signals.grad`, which
  `starts.synaptic_flow` computes.
  """
  return weight_times_gradient('synflow', jnp.abs(w), signals)


@gradient_free
@elementwise
def movement(w: Array, signals: Signals) -> Array:
  """Returns the accumulated score S (Sanh et al. 2020); needs the memory `accumulated_movement`."""
  return needed('movement', signals.stats, 'the memory scores.accumulated_movement').score


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
  return jnp.abs(needed('momentum', signals.stats, 'the memory scores.gradient_average'))


@gradient_free
@elementwise
def fisher(w: Array, signals: Signals) -> Array:
  """Returns `w^2 E[(dL/dw)^2] / 2`; needs the memory `squared_gradient_average`.

  The score estimates how much the loss rises if the weight is removed, by the diagonal empirical Fisher information
  (Theis et al. 2018, equation 6). Gradients are those of batches, not of single examples.
  """
  average = needed('fisher', signals.stats, 'the memory scores.squared_gradient_average')
  return 0.5 * jnp.square(w.astype(jnp.float32)) * average


@checked
def modular(groups: int, shuffle: Array | None = None) -> Score:
  """Returns the score that keeps weights within one of `groups` modules first, at random (G2GNet's modular masks).

  Input i of n is in module `floor(i groups / n)`, and so is output i of n. A weight between equal modules scores 1 more
  than one between others, and all scores have uniform noise from `signals.key`. `shuffle`, a PRNG key, permutes units
  before; dimensions of one length have one permutation, so that a layer's outputs and the next layer's inputs agree.
  The abstract of the paper has no formula; the published code has a third, alternating grouping. Raises `ValueError`
  for a leaf with fewer units than modules, or of unknown axes.
  """
  return Bound(_modular, (groups, shuffle))


def _modular(w: Array, signals: Signals, groups: int, shuffle: Array | None) -> Array:
  axes = signals.axes
  if axes is None or axes.source == 'unknown':
    raise ValueError('scores.modular: needs the axes of the leaf; pass axes=sj.contractions(apply, params, x).')
  into, out = (_module(w.shape, meant, groups, shuffle) for meant in (axes.contracted, axes.output))
  return (into == out).astype(jnp.float32) + random(w, signals)


def _module(shape: tuple[int, ...], meant: tuple[int, ...], groups: int, shuffle: Array | None) -> Array:
  """Returns the module of each unit along the axes `meant`, in a shape that broadcasts to `shape`."""
  sizes = [shape[a] for a in meant]
  units = math.prod(sizes)
  if units < groups:
    raise ValueError(f'scores.modular: a leaf of shape {shape} has {units} units along {meant}, fewer than {groups} '
                     'modules. Ask for fewer groups, or leave the leaf out of `where`.')
  module = jnp.asarray(np.arange(units, dtype=np.int64) * groups // units, jnp.int32)
  module = module if shuffle is None else jax.random.permutation(shuffle, module)
  order = sorted(range(len(meant)), key=lambda i: meant[i])
  return module.reshape(sizes).transpose(order).reshape([n if a in meant else 1 for a, n in enumerate(shape)])


@checked
def smoothed(score: Score, p01: float, p10: float) -> Score:
  """Returns the posterior log-odds of a Markov chain along each row, with `score` as the evidence of each weight.

  `score` gives log-odds: positive for a weight that is worth keeping by itself. A pruned weight is followed by a kept
  weight with probability `p01`, and a kept weight by a pruned one with `p10`. The chain starts in its stationary state,
  so that kept and pruned weights cluster (Turbo-VBI, module B; a sum-product pass in both directions). The chain runs
  over the contracted axes, for each output, tap and layer by itself. NaN is no evidence, and stays NaN at its place.
  """
  return Bound(_smoothed, (score, p01, p10))


def _smoothed(w: Array, signals: Signals, score: Score, p01: float, p10: float) -> Array:
  evidence = score(w, signals).astype(jnp.float32)
  axes = signals.axes or Axes(tuple(range(w.ndim)), ())
  order = (*axes.contracted, *(a for a in range(w.ndim) if a not in axes.contracted))
  turned = jnp.transpose(evidence, order)
  length = math.prod(w.shape[a] for a in axes.contracted)
  rows = jnp.nan_to_num(turned.reshape(length, -1), posinf=1e4, neginf=-1e4)
  stay, go = (np.log1p(-p10), np.log(p01)), (np.log(p10), np.log1p(-p01))
  mixed = lambda a, up, down: jnp.logaddexp(a + up[0], up[1]) - jnp.logaddexp(a + down[0], down[1])
  ahead = lambda message, own: (mixed(message + own, stay, go), message)
  back = lambda message, own: (mixed(message + own, (stay[0], go[0]), (stay[1], go[1])), message)
  first = jnp.zeros_like(rows[0])
  before = jax.lax.scan(ahead, first + np.float32(np.log(p01 / p10)), rows)[1]
  after = jax.lax.scan(back, first, rows, reverse=True)[1]
  return jnp.transpose((before + after).reshape(turned.shape), np.argsort(order)) + evidence


@elementwise
def expected_magnitude(w: Array, signals: Signals) -> Array:
  """Returns `E|theta|` of a Gaussian weight with mean `w`, in `float32` (Li et al. 2024, SSVI, criterion E|theta|).

  The standard deviation is `softplus(rho)`, and `rho` is the follower of the leaf: `tied={'**/rho': '**/mean'}` of
  `transforms.sparsify`. With s that deviation, the value is `w erf(w / (s sqrt 2)) + s sqrt(2 / pi) exp(-w^2 / 2 s^2)`,
  and `|w|` where s is 0. NaN in either array gives NaN.
  """
  mean, deviation = w.astype(jnp.float32), _deviation('expected_magnitude', signals)
  ratio = mean / jnp.where(deviation == 0, 1, deviation)
  spread = np.float32((2 / np.pi) ** 0.5) * deviation * jnp.exp(-jnp.square(ratio) / 2)
  return jnp.where(deviation == 0, jnp.abs(mean), mean * jax.lax.erf(ratio * np.float32(0.5**0.5)) + spread)


@elementwise
def snr(w: Array, signals: Signals) -> Array:
  """Returns `E|theta| / sd|theta|` of a Gaussian weight with mean `w`, in `float32` (Li et al. 2024, SSVI).

  The signal-to-noise ratio is that of the magnitude, and reads the follower `rho` as `expected_magnitude` does. Its
  least value is `sqrt(2 / pi) / sqrt(1 - 2 / pi)`, 1.3236, at mean 0 and any deviation; weights near it all but tie. A
  weight without deviation has infinity, and NaN stays NaN. The authors' code counts NaN as 0.
  """
  mean, deviation = w.astype(jnp.float32), _deviation('snr', signals)
  size = expected_magnitude(w, signals)
  variance = jnp.square(deviation) + (mean - size) * (mean + size)  # mean^2 - size^2 loses fewer digits as a product
  return size / jnp.sqrt(jnp.maximum(variance, 0))


def _deviation(score: str, signals: Signals) -> Array:
  """Returns the standard deviation of each weight, `softplus(rho)` of the first leaf that is tied to it."""
  tied = signals.stats if type(signals.stats) is tuple else ()  # a memory is a NamedTuple, if any tuple
  if not tied:
    raise ValueError(f"scores.{score}: needs the leaf `rho` of each weight's deviation, and none is tied to this leaf. "
                     "Pass tied={'**/rho': '**/mean'} to transforms.sparsify, with the names of your parameters.")
  return jax.nn.softplus(tied[0].astype(jnp.float32))


def wanda(w: Array, signals: Signals) -> Array:
  """Returns `|w|` times the root of the mean square of its input (Sun et al. 2023, Wanda, equation 1).

  The score needs a statistic with `rows` and `square`, such as `calibration.moments`. `w` is `[L, R, K]`, R outputs by
  K inputs. The authors compare the scores of one output, as `Unstructured(balanced=True)` does. Weights of an input
  that is always zero score 0.
  """
  stats = needed('wanda', signals.stats, 'the statistic calibration.moments of a Recipe')
  mean = stats.square / jnp.maximum(stats.rows, 1).astype(stats.square.dtype)[:, None]
  return jnp.abs(w).astype(mean.dtype) * jnp.sqrt(mean)[:, None]


def obs(w: Array, signals: Signals, damping: float = 0.01) -> Array:
  """Returns `w^2 / [H^-1]_jj`, twice the loss of removing one weight (Hassibi and Stork 1993, Optimal Brain Surgeon).

  All other weights of the output then compensate in the best way. The score needs the statistic `calibration.gram`,
  from which the Hessian is computed, with `damping` as a fraction of its mean diagonal. `w` is `[L, R, K]`. A Hessian
  without a factor gives NaN.
  """
  stats = needed('obs', signals.stats, 'the statistic calibration.gram of a Recipe')
  return jnp.square(w.astype(stats.gram.dtype)) / hessians.inverse_diagonal(stats.gram, damping)[:, None]
