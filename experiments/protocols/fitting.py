"""Trains small models by one loop, in which every batch is a function of the key and the step.

    tx = optimizer(config, recipe, signals={'key': key})
    params = optimised(loss, tx, params, (images, labels), config, key)[0]
"""

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments.loop import optimizers
from experiments.tasks import digits, forward
from sparsejax import project, recipes
from sparsejax.types import Array, PyTree


def optimizer(config: ConfigDict, recipe: Mapping[str, Any], signals: Mapping[str, Any] | None = None) -> Any:
  """Returns the recipe around the optimizer of the config, for `config.steps` updates."""
  inner = optimizers.make(total_steps=config.steps, **config.optimizer)[1]
  return recipes.from_config(inner, recipe, total_steps=config.steps, signals=signals or {})


def optimised(loss: Callable[[PyTree, Any, Array, Array], Array], tx: Any, params: PyTree, data: Any,
              config: ConfigDict, key: Array) -> tuple[PyTree, Any]:
  """Returns parameters and state after `config.steps` updates of `loss(params, batch, key, step)`.

  `data`: a pytree of arrays `[N, ...]`. A batch holds `config.batch_size` of the N examples, drawn with replacement.
  """
  def step(carry: Any, number: Array, data: Any, key: Array) -> tuple[Any, None]:
    params, state = carry
    own = jax.random.fold_in(key, number)
    rows = jax.random.randint(own, (config.batch_size,), 0, len(jax.tree.leaves(data)[0]))
    grads = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], data), jax.random.fold_in(own, 1), number)
    updates, state = tx.update(grads, state, params)
    return (optax.apply_updates(params, updates), state), None

  @jax.jit  # the data are no constants of the program, which would take longer to compile
  def run(params: PyTree, data: Any, key: Array) -> tuple[PyTree, Any]:
    state = tx.init(params)
    each = lambda carry, number: step(carry, number, data, key)
    return jax.lax.scan(each, (project(params, state), state), jnp.arange(config.steps))[0]

  return run(params, data, key)


def cross_entropy(params: PyTree, batch: Any, key: Array, step: Array) -> Array:
  """Returns the mean loss of the perceptron of `experiments.tasks` on images and labels."""
  return optax.softmax_cross_entropy_with_integer_labels(forward(params, batch[0]), batch[1]).mean()


def right(logits: Array, labels: Array) -> float:
  """Returns the fraction of labels with the largest logit."""
  return float(np.mean(np.argmax(np.asarray(logits), -1) == np.asarray(labels)))


def work(function: Callable[..., Any], *arguments: Any) -> float:
  """Returns the FLOPs of the compiled function, as XLA counts them."""
  return float(jax.jit(function).lower(*arguments).compile().cost_analysis()['flops'])


def both_splits() -> tuple[tuple[Array, Array], tuple[Array, Array]]:
  """Returns images and labels of the digits, for training and for test."""
  return jax.tree.map(jnp.asarray, digits())
