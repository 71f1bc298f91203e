"""Gives weights a mean and a deviation: Gaussian weights that are trained, pruned and drawn.

    params = bayes.gaussian(params, key)                      # each matrix becomes {'mean': ..., 'rho': ...}
    tx = recipes.ssvi(optax.sgd(0.01, 0.9), 0.9, total_steps=10_000, key=key)
    loss = task(apply(bayes.sample(params, key), x)) + beta * bayes.kl(params)      # any model: `sample` gives arrays
    probabilities = softmax(apply(bayes.means(params), x))

The deviation of a weight is `softplus(rho + OFFSET)`, so that rho = 0 is the deviation with which weights begin, 6e-4.
A weight of which mean and rho are both exactly zero is pruned, and has the deviation 0. A grown weight begins so too,
and has a deviation from its first update on.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import arguments, trees
from sparsejax.argument_kinds import ARRAY, DRAWN, FUNCTION, PARAMS, POSITIVE, RATE
from sparsejax.arguments import checked
from sparsejax.types import Array, Bound, Predicate, PyTree, Score, Signals

__all__ = [
  'DEVIATION', 'OFFSET', 'deviation', 'gaussian', 'kl', 'means', 'noisy_product', 'offset', 'sample', 'support',
]

DEVIATION = 6e-4  # with which weights begin, in the authors' code
OFFSET = math.log(math.expm1(DEVIATION))

arguments.declare('gaussian noisy_product sample means kl', params=PARAMS, weight=PARAMS, key=DRAWN, spread=RATE,
                  x=ARRAY, prior=POSITIVE)
arguments.declare('deviation', weight=PARAMS)
arguments.declare('offset', score=FUNCTION)
arguments.declare('support', a=POSITIVE, b=POSITIVE, pruned_a=POSITIVE, pruned_b=POSITIVE)


@checked
def gaussian(params: PyTree, key: Array | None = None, where: Predicate | PyTree = trees.matrices,
             spread: float = 5e-4) -> PyTree:
  """Returns the parameters with `{'mean': w, 'rho': rho}` in the place of each leaf w that `where` picks.

  Without a key all deviations begin at 6e-4. With one they begin at |N(6e-4, `spread`^2)|, as in the code of SSVI,
  whose means begin at N(0, 0.01^2); here the means are the given weights.
  """
  paths, leaves, treedef = trees.flatten(params)
  picked = trees.select('bayes.gaussian', where, params)
  keys = [None] * len(leaves) if key is None else list(jax.random.split(key, len(leaves)))
  return treedef.unflatten([{'mean': w, 'rho': _rho(w, k, spread)} if pick else w
                            for w, pick, k in zip(leaves, picked, keys)])


def _rho(w: Array, key: Array | None, spread: float) -> Array:
  if key is None:
    return jnp.zeros_like(w)
  drawn = jnp.abs(DEVIATION + spread * jax.random.normal(key, w.shape, jnp.float32))
  return (jnp.log(jnp.expm1(jnp.maximum(drawn, 1e-6))) - OFFSET).astype(w.dtype)


def _is_gaussian(node: Any) -> bool:
  return isinstance(node, dict) and set(node) == {'mean', 'rho'}


def _each(function: Callable[..., Any], params: PyTree, *rest: PyTree) -> PyTree:
  return jax.tree.map(lambda node, *more: function(node, *more) if _is_gaussian(node) else node, params, *rest,
                      is_leaf=_is_gaussian)


@checked
def deviation(weight: PyTree) -> Array:
  """Returns the standard deviation of a leaf `{'mean', 'rho'}`, `float32`, exactly 0 where both are 0: pruned."""
  pruned = (weight['mean'] == 0) & (weight['rho'] == 0)
  return jnp.where(pruned, 0, jax.nn.softplus(weight['rho'].astype(jnp.float32) + OFFSET))


@checked
def means(params: PyTree) -> PyTree:
  """Returns ordinary parameters: the mean of each Gaussian leaf, and all other leaves as they are."""
  return _each(lambda weight: weight['mean'], params)


@checked
def sample(params: PyTree, key: Array) -> PyTree:
  """Returns ordinary parameters, drawn once for the whole batch; a pruned weight is exactly zero.

  Other leaves stay. The gradient is that of the reparametrisation `mean + deviation * noise`. For less variance, a
  layer of one's own may use `noisy_product`, which draws for each output.
  """
  _, leaves, treedef = trees.flatten(params, is_leaf=_is_gaussian)
  keys = treedef.unflatten(list(jax.random.split(key, len(leaves))))
  return _each(_drawn, params, keys)


def _drawn(weight: PyTree, key: Array) -> Array:
  mean = weight['mean']
  return mean + (deviation(weight) * jax.random.normal(key, mean.shape, jnp.float32)).astype(mean.dtype)


@checked
def noisy_product(x: Array, weight: PyTree, key: Array | None = None) -> Array:
  """Returns `x @ w` of a Gaussian leaf `[in, out]` by the local reparametrisation (Kingma et al. 2015), `[..., out]`.

  The result is `x @ mean + sqrt(x^2 @ deviation^2 + 1e-8) noise`, with a noise for each output and example. Without a
  key, as at test time, the result is `x @ mean`. Raises `ValueError` for a weight that is no Gaussian leaf.
  """
  if not _is_gaussian(weight):
    raise ValueError("bayes.noisy_product: `weight` must be a leaf {'mean', 'rho'} of bayes.gaussian; multiply others "
                     'by x @ w.')
  mean = x @ weight['mean']
  if key is None:
    return mean
  variance = jnp.square(x.astype(jnp.float32)) @ jnp.square(deviation(weight))
  return mean + (jnp.sqrt(variance + 1e-8) * jax.random.normal(key, mean.shape, jnp.float32)).astype(mean.dtype)


@checked
def kl(params: PyTree, prior: float = 0.005) -> Array:
  """Returns the sum over kept weights of KL(N(mean, deviation^2) || N(0, `prior`^2)), `float32[]`.

  SSVI (Li et al. 2024, 2402.16359) adds `0.01 / N min(2 e / E, 1)` times it to the mean loss of N examples, at epoch e
  of E. Raises `ValueError` for parameters without a Gaussian leaf, which would have no divergence.
  """
  leaves = [node for node in jax.tree.leaves(params, is_leaf=_is_gaussian) if _is_gaussian(node)]
  if not leaves:
    raise ValueError("bayes.kl: no leaf is {'mean', 'rho'}, so that there is no posterior; make one by bayes.gaussian.")
  return jnp.sum(jnp.stack([_divergence(node, prior) for node in leaves]))


def _divergence(weight: PyTree, prior: float) -> Array:
  sigma, mean = deviation(weight), weight['mean'].astype(jnp.float32)
  kept = sigma > 0
  safe = jnp.where(kept, sigma, prior)
  each = jnp.log(prior / safe) + (jnp.square(safe) + jnp.square(mean)) / (2 * prior**2) - 0.5
  return jnp.sum(jnp.where(kept, each, 0))


@checked
def offset(score: Score) -> Score:
  """Returns a score of Gaussian weights, such as `scores.snr`, that reads `rho + OFFSET` in the place of rho."""
  return Bound(_offset, (score,), tuple(getattr(score, 'facts', ())))


def _offset(w: Array, signals: Signals, score: Score) -> Array:
  rho = tuple(each.astype(jnp.float32) + OFFSET for each in signals.stats or ())
  return score(w, signals._replace(stats=rho))


@checked
def support(a: float = 1.0, b: float = 1.0, pruned_a: float = 1.0, pruned_b: float = 1e-3) -> Score:
  """Returns the score of a weight's log-odds to belong to the support, with the precision integrated out, `float32`.

  The prior of Turbo-VBI (Xia et al. 2023) is w ~ N(0, 1 / rho), with rho ~ Gamma(`a`, `b`) on the support and
  Gamma(`pruned_a`, `pruned_b`) off it. Integrated over rho, w has a Student t density each, and the score is the
  difference of the two logarithms. The mean-field loop between rho and the support has two fixed points, and keeps
  every weight from an even start. The integrated form has one. No code was published; the constants are not the
  paper's. `scores.smoothed` adds the Markov prior along the rows.
  """
  return Bound(_support, (a, b, pruned_a, pruned_b))


def _support(w: Array, signals: Signals, a: float, b: float, pruned_a: float, pruned_b: float) -> Array:
  square = jnp.square(w.astype(jnp.float32)) / 2
  log_t = lambda a, b: math.lgamma(a + 0.5) - math.lgamma(a) + a * math.log(b) - (a + 0.5) * jnp.log(b + square)
  return log_t(a, b) - log_t(pruned_a, pruned_b)
