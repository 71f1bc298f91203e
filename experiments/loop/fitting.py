"""Trains small models by one loop, in which every batch is a function of the key and the step.

    train, test = both_splits(config)
    tx = optimizer(config, recipe, signals={'key': key})
    params, state = optimised(loss, tx, params, train, config, key)
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from ml_collections import ConfigDict

from experiments import configs
from experiments import data as sets
from experiments.loop import evaluate, examples, optimizers
from experiments.loop.examples import Examples
from sparsejax import project, recipes
from sparsejax.types import Array, PyTree

Split = tuple[Array, Array]  # images [N, 64] from 0 to 1, and labels [N] from 0 to 9


class Ending(NamedTuple):
  """An `Ending` is the end of a training: the parameters, the optimizer's state, and the examples that are left."""

  params: PyTree
  state: Any
  examples: Examples


def optimizer(config: ConfigDict, recipe: Mapping[str, Any], signals: Mapping[str, Any] | None = None,
              steps: int | None = None) -> Any:
  """Returns the recipe around the optimizer of the config, for `steps` updates, by default `config.steps`."""
  steps = steps or config.steps
  inner = optimizers.make(total_steps=steps, **config.optimizer)[1]
  return recipes.from_config(inner, recipe, total_steps=steps, signals=signals or {})


def optimised(loss: Callable[[PyTree, Any, Array, Array], Array], tx: Any, params: PyTree, data: Any,
              config: ConfigDict, key: Array) -> tuple[PyTree, Any]:
  """Returns parameters and state after `config.steps` updates of `loss(params, batch, key, step)`.

  `data`: a pytree of arrays `[N, ...]`. A batch holds `config.batch_size` of the N examples, drawn with replacement.
  """
  count = len(jax.tree.leaves(data)[0])
  alone = lambda *arguments: (loss(*arguments), None)
  run = jax.jit(lambda params, state, data, key: trained_on(alone, tx, params, state, data, config, key,
                                                            examples.of_rows(np.arange(count), count))[:2])
  return run(params, tx.init(params), data, key)  # The first state is no constant of the program.


def trained_on(loss: Callable[[PyTree, Any, Array, Array], tuple[Array, Array | None]], tx: Any, params: PyTree,
               state: Any, data: Any, config: ConfigDict, key: Array, left: Examples, removed: float = 0.0) -> Ending:
  """Returns the end of a training, as `optimised` does, on the examples of `data` that are `left`; does not compile.

  `loss` also returns which of the batch are right, `bool[B]`, or `None`. With `removed` above 0 this fraction of the
  examples goes in rounds, and the steps are fewer, as `examples.removal_steps` says.
  """
  times, steps = examples.removal_steps(config.steps, removed)
  gone = (left.count * removed / examples.ROUNDS).astype(jnp.int32)

  def step(carry: Ending, number: Array) -> tuple[Ending, None]:
    params, state, left = carry
    own = jax.random.fold_in(key, number)
    if removed:
      due = jnp.isin(number, jnp.asarray(times))
      left = jax.lax.cond(due, lambda each: each.without(gone), lambda each: each, left)
    rows = left.drawn(own, config.batch_size)
    batch = jax.tree.map(lambda x: x[rows], data)
    grads, correct = jax.grad(loss, has_aux=True)(params, batch, jax.random.fold_in(own, 1), number)
    updates, state = tx.update(grads, state, params)
    left = left.observed(rows, correct) if removed else left
    return Ending(optax.apply_updates(params, updates), state, left), None

  return jax.lax.scan(step, Ending(project(params, state), state, left), jnp.arange(steps))[0]


def both_splits(config: ConfigDict) -> tuple[Split, Split]:
  """Returns images and labels for training and for test, of `config.data`: the digits, or own images of their size.

  The training split is whole, validation included. Raises `ValueError` for images of another size, and for labels that
  are not the ten digits.
  """
  found = splits(config)
  for images, labels in found:
    if images.shape[1:] != (64,) or labels.ndim != 1 or not {*labels.tolist()} <= {*range(10)}:
      raise ValueError(f'config.data: this engine reads images of 64 pixels with labels 0 to 9, not {images.shape[1:]} '
                       f'with labels {labels.dtype}{list(labels.shape)}; leave config.data out for the digits.')
  return tuple((jnp.asarray(images, jnp.float32), jnp.asarray(labels)) for images, labels in found)


def splits(config: ConfigDict) -> list[tuple[np.ndarray, np.ndarray]]:
  """Returns inputs `[N, ...]` in one row each, and labels, for training and for test, whatever data the config has.

  The training split is whole, validation included.
  """
  section = {**config.data, 'valid_fraction': 0.0}
  return _read(section) if config.data.name == configs.OWN else _once(tuple(section.items()))


def _read(section: Mapping[str, Any]) -> list[tuple[np.ndarray, np.ndarray]]:
  found = sets.pixels(**section)
  flat = {split: (images.reshape(len(images), -1), labels) for split, (images, labels) in found.items()}
  return [flat['train'], flat['test']]


@functools.lru_cache(1)
def _once(section: tuple[tuple[str, Any], ...]) -> list[tuple[np.ndarray, np.ndarray]]:
  return _read(dict(section))


def chance(labels: Array) -> float:
  """Returns the accuracy of the best constant answer to `labels`, `int[N]`."""
  return evaluate.labels([{'labels': np.asarray(labels), 'weight': np.ones(len(labels))}])['chance']


def right(logits: Array, labels: Array) -> float:
  """Returns the fraction of labels with the largest logit."""
  return float(np.mean(np.argmax(np.asarray(logits), -1) == np.asarray(labels)))
