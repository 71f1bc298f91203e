"""Searches for an architecture among mixtures of operations, whose weights are trained until they become sharp.

    y = mixed([dense_layer, sparse_layer], alpha, x)           # alpha: `float[operations]`, a parameter
    grads = bilevel(loss, params, train_batch, valid_batch, trees.named('alpha'))
    best = sharpest(alpha)                                     # the number of the operation that stays

A search space over sparse operations is the same mixture, whose operations have leaves that a recipe makes sparse:
`recipes.dass` (Mousavi et al. 2023) trains weights, masks and alphas.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from sparsejax import trees
from sparsejax.types import Array, Predicate, PyTree

Weighting = Callable[[Array], Array]


def max_w(alpha: Array) -> Array:
  """Returns 1 - max(w) + w with w = softmax(alpha): the best operation has the weight 1 (sharpDARTS, 1903.09900).

  No gradient flows through the maximum, as the authors' code intends in a comment. The code itself lets it through.
  """
  w = jax.nn.softmax(alpha)
  return 1 - jax.lax.stop_gradient(jnp.max(w, -1, keepdims=True)) + w


def mixed(operations: Sequence[Callable[[Array], Array]], alpha: Array, x: Array, *,
          weighting: Weighting = jax.nn.softmax, channels: int = 1) -> Array:
  """Returns the sum of `weighting(alpha)[o] * operations[o](x)`, the mixture of DARTS (Liu et al. 2019, equation 2).

  With `channels=K`, only the first 1/K of the last axis goes through the operations, which must keep the shape.
  PC-DARTS calls this a partial connection. Raises `ValueError` if `alpha` has not one
  number for each operation, and if K does not divide the axis.
  """
  if jnp.shape(alpha) != (len(operations),):
    raise ValueError(f'architecture.mixed: {len(operations)} operations need alpha of shape [{len(operations)}], not '
                     f'{list(jnp.shape(alpha))}.')
  if x.shape[-1] % channels:
    raise ValueError(f'architecture.mixed: channels={channels} does not divide the last axis of {list(x.shape)}.')
  own, rest = jnp.split(x, [x.shape[-1] // channels], -1)
  total = sum(w * operation(own) for w, operation in zip(weighting(alpha), operations))
  return total if channels == 1 else jnp.concatenate([total, rest], -1)


def sharpest(alpha: Array) -> Array:
  """Returns the number of the operation with the largest alpha, along the last axis; of equal ones, the first."""
  return jnp.argmax(alpha, -1)


def without_worst(alive: Array, performance: Array) -> Array:
  """Returns which operations stay, `bool[operations]`, after the one of the least `performance` is dropped.

  Binarized NAS (Chen et al. 2020) reduces its search space so. The last operation stays. NaN is least.
  """
  known = jnp.where(jnp.isnan(performance), -jnp.inf, performance)
  worst = jnp.argmin(jnp.where(alive, known, jnp.inf)) if alive.ndim == 1 else None
  if worst is None:
    raise ValueError(f'architecture.without_worst: `alive` is bool[operations], not of shape {list(alive.shape)}.')
  return jnp.where(jnp.sum(alive) > 1, alive & (jnp.arange(len(alive)) != worst), alive)


def bilevel(loss: Callable[[PyTree, Any], Array], params: PyTree, train: Any, valid: Any, alphas: Predicate) -> PyTree:
  """Returns gradients of `loss(params, batch)`, on `valid` for the alphas and on `train` for all others.

  DARTS calls this the first-order form. `alphas(path, leaf)` picks the leaves. Raises `ValueError` if it picks none.
  """
  paths, leaves, treedef = trees.flatten(params)
  picked = [bool(alphas(path, leaf)) for path, leaf in zip(paths, leaves)]
  if not any(picked):
    raise ValueError('architecture.bilevel: `alphas` picks no leaf; name the leaves, as in trees.named("alpha").')
  by_train, by_valid = (treedef.flatten_up_to(jax.grad(loss)(params, batch)) for batch in (train, valid))
  return treedef.unflatten([b if own else a for own, a, b in zip(picked, by_train, by_valid)])
