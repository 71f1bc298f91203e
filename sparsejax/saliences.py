"""A salience ranks the units of groups, such as neurons, heads and channels. The units with the least salience go.

A salience is `salience(units) -> float32[rows, units]`, where `units` is a `Units`, which sums any score over the
weights of each unit. `structured.grouped` calls it with all leaves at once, so that a salience may compare units of
several groups. Ties keep the lower unit of the earlier group; NaN ranks last.

    def largest_gradient(units):
      return units.mean(lambda w, signals: jnp.abs(signals.grad))

    selection = structured.grouped(groups, 0.5, score=largest_gradient)
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax.numpy as jnp

from sparsejax.arguments import checked
from sparsejax.globs import matches
from sparsejax.types import Array, Bound, Score, Signals
from sparsejax.units import BESIDE, PRODUCED, SIDES, Places

__all__ = ['Units', 'half_space', 'hessian_trace', 'importance', 'matching', 'mean_magnitude', 'redundancy', 'taylor']

Salience = Callable[['Units'], Array]
TINY = 1e-6  # of the authors of OTO, in the place of a division by zero


@dataclasses.dataclass(frozen=True, eq=False)
class Units:
  """The `Units` are what a salience sees: the places of all units, and the weights and signals of all leaves.

  `sides`: the members whose weights count, see `sparsejax.units`.
  """

  places: Places
  weights: Sequence[Array]
  signals: Sequence[Signals]
  sides: tuple[str, ...] = SIDES

  def sum(self, score: Score) -> Array:
    """Returns the sum of a score over the weights of each unit, `float32[rows, units]`."""
    return self.places.sums([score(w, s) for w, s in zip(self.weights, self.signals)], self.sides)

  def mean(self, score: Score) -> Array:
    """Returns the mean of a score over the weights of each unit, `float32[rows, units]`."""
    return self.sum(score) / self.size

  @property
  def size(self) -> Array:
    """The number of weights of each unit, at least 1."""
    return jnp.maximum(self.sum(lambda w, signals: jnp.ones_like(w)), 1)

  def scaled(self, values: Array) -> Array:
    """Returns `values` over their Euclidean norm, taken over all units; zeros stay zero."""
    real = jnp.where(self.places.real, values, 0)
    return real / jnp.maximum(jnp.sqrt(jnp.sum(jnp.square(real))), jnp.finfo(jnp.float32).tiny)


def mean_magnitude(units: Units) -> Array:
  """Returns the root of the mean square of each unit's weights (Li et al. 2017, but l2 and a mean over all members).

  A mean lets units of several sizes compete. Torch-Pruning also divides by the mean over the group.
  """
  return jnp.sqrt(units.mean(_square))


@checked
def matching(glob: str) -> Salience:
  """Returns the salience that is the mean magnitude of those weights of a unit whose path matches `glob`.

  Raises `ValueError` for groups without such a weight.
  """
  return Bound(_matching, (glob,))


def _matching(units: Units, glob: str) -> Array:
  own = [float(matches(glob, path)) for path in units.places.paths]
  size = units.places.sums([jnp.full(w.shape, share) for w, share in zip(units.weights, own)])
  units.places.refuse_groups_without(glob, own)
  total = units.places.sums([jnp.abs(w) * share for w, share in zip(units.weights, own)])
  return total / jnp.maximum(size, 1)


def taylor(units: Units) -> Array:
  """Returns `(sum w g)^2` of each unit, the squared change of the loss (Molchanov et al. 2019, equation 8).

  Reads `signals.grad`. The paper averages over minibatches; here the gradient is that of the step.
  """
  return jnp.square(units.sum(_product))


def importance(units: Units) -> Array:
  """Returns the salience of HESSO: five terms of a fifth each, each over its norm over all units (Chen et al. 2024).

  The terms are ||x||, ||x|| over the size, cos(x, g) + 1, |<x, g>| and <x, g>^2 / 2, with g the gradient. The released
  code takes the first step of the optimizer in the place of g; with SGD both are the same.
  """
  norm, product = jnp.sqrt(units.sum(_square)), units.sum(_product)
  cosine = product / (norm * jnp.sqrt(units.sum(_gradient_square)) + TINY)
  terms = norm, norm / units.size, cosine + 1, jnp.abs(product), jnp.square(product) / 2
  return jnp.sum(jnp.stack([units.scaled(term) for term in terms]), 0) / len(terms)


def redundancy(units: Units) -> Array:
  """Returns minus the redundancy of DHSPG, so that units to shrink rank last (Chen et al. 2023, OTOv2).

  The redundancy is half of cos(x, g) and half of p / ||x||, with p the size of the unit, each over its norm over all
  units. A positive cosine says that a step along the gradient already shrinks the unit. HESSO gives the
  cosine the other sign.
  """
  norm, product = jnp.sqrt(units.sum(_square)), units.sum(_product)
  cosine = product / (norm * jnp.sqrt(units.sum(_gradient_square)) + TINY)
  return -(units.scaled(cosine) + units.scaled(1 / (norm / units.size + TINY))) / 2


def hessian_trace(units: Units) -> Array:
  """Returns trace(H) ||w||^2 / p of each unit, of size p: the Hessian-aware salience of HAP (Yu et al. 2022, eq. 6).

  Reads the products v * (H v) as `signals.grad`: `starts.hutchinson` is the probe. The paper's code divides the trace
  by p, too, and ranks all channels together, as here.
  """
  diagonal = lambda w, signals: _gradient(signals)
  return units.mean(diagonal) * units.sum(_square)


@checked
def half_space(epsilon: float = 0.0, until: int | None = None) -> Salience:
  """Returns the salience <x', x> / ||x||^2 - `epsilon` of HSPG (Chen et al. 2021, Only Train Once, algorithm 2).

  x is the unit before the step, which the memory `scores.previous` keeps, and x' after it. A unit below zero left its
  half-space, and `updates.below_zero` makes it zero. x and x' are of what produces the unit alone: a zero-invariant
  group of the paper has no consumer. From step `until` on the salience is `redundancy`: a single step of one minibatch
  says which units leave the half-space, and not which of the others can be missed.
  """
  return Bound(_half_space, (epsilon, until))


def _half_space(units: Units, epsilon: float, until: int | None) -> Array:
  own = dataclasses.replace(units, sides=(PRODUCED, BESIDE))
  before = own.sum(lambda w, signals: jnp.square(signals.stats))
  after = own.sum(lambda w, signals: w * signals.stats)
  left = jnp.where(before > 0, after / jnp.maximum(before, jnp.finfo(jnp.float32).tiny), 0) - epsilon
  return left if until is None else jnp.where(jnp.asarray(units.signals[0].step) < until, left, redundancy(units))


def _square(w: Array, signals: Signals) -> Array:
  return jnp.square(w.astype(jnp.float32))


def _gradient(signals: Signals) -> Array:
  if signals.grad is None:
    raise ValueError('saliences: the salience reads a gradient, and there is none when the first masks are chosen. '
                     'Choose them later, as in dense_steps=100.')
  return signals.grad.astype(jnp.float32)


def _gradient_square(w: Array, signals: Signals) -> Array:
  return jnp.square(_gradient(signals))


def _product(w: Array, signals: Signals) -> Array:
  return w.astype(jnp.float32) * _gradient(signals)
