"""Trains the perceptron of the protocols, by the loop of `experiments.loop.fitting`.

    (train, test), tx = both_splits(config), optimizer(config, recipe, signals={'key': key})
    params = optimised(cross_entropy, tx, params, train, config, key)[0]
"""

from collections.abc import Callable
from typing import Any

import jax
import optax

from experiments.loop.fitting import both_splits, chance, optimised, optimizer, right, splits
from experiments.models.perceptron import forward
from sparsejax.types import Array, PyTree

__all__ = ['both_splits', 'chance', 'cross_entropy', 'optimised', 'optimizer', 'right', 'splits', 'work']


def cross_entropy(params: PyTree, batch: Any, key: Array, step: Array) -> Array:
  """Returns the mean loss of the perceptron on images and labels."""
  return optax.softmax_cross_entropy_with_integer_labels(forward(params, batch[0]), batch[1]).mean()


def work(function: Callable[..., Any], *arguments: Any) -> float:
  """Returns the FLOPs of the compiled function, as XLA counts them."""
  return float(jax.jit(function).lower(*arguments).compile().cost_analysis()['flops'])
