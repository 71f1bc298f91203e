"""Predicts and scores a split batch by batch, for the parameters of all seeds: memory does not grow with the split.

    predict = predictor(model.apply)
    test = scores(tasks.named('classification'), predict, params, runs.split(setup, 'test'))
    test['accuracy']    # float64[seeds]
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.data import Batch
from experiments.loop import sharding
from experiments.loop.tasks import Task
from sparsejax.types import Array, PyTree

Predict = Callable[[PyTree, Array], Array]  # (params of all seeds, inputs) -> outputs `[seeds, ...]`


def predictor(apply: Callable[[PyTree, Array], Array]) -> Predict:
  """Returns `apply(params, inputs)` mapped over the seeds of `params`, compiled once per shape."""
  return jax.jit(jax.vmap(apply, in_axes=(0, None)))


def scores(task: Task, predict: Predict, params: PyTree, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
  """Returns the task's score, under the score's name, and `loss`: each `float64[seeds]`.

  Both are means over all labels of `batches`, each label with its weight. Raises `ValueError` without any.
  """
  total, sums = 0.0, 0.0
  for batch in batches:
    outputs = predict(params, batch['inputs'])
    of_batch, weight = sharding.gathered(_sums(task, outputs, batch['labels'], batch['weight']))
    sums += np.asarray(of_batch, np.float64)
    total += np.float64(weight)
  if not total:
    raise ValueError('evaluate: a split has no examples; own data need some for "valid" and "test", and a named set a '
                     'larger data.valid_fraction.')
  score, loss = sums / total
  return {task.name: score, 'loss': loss}


def same_predictions(predict: Predict, params: PyTree, others: PyTree, batches: Iterable[Batch]) -> bool:
  """Returns whether the outputs of `params` and of `others` have equal bits on all of `batches`."""
  same = jax.jit(lambda outputs, other: (outputs.view(jnp.uint32) == other.view(jnp.uint32)).all())
  alike = lambda inputs: same(predict(params, inputs), predict(others, inputs))
  return all(bool(sharding.gathered(alike(batch['inputs']))) for batch in batches)


def one_by_one(function: Callable[..., Any], loop: bool) -> Callable[..., Any]:
  """Returns `function` with a batching rule of its own: `jax.vmap` calls `function` once for each index.

  The calls are one `jax.lax.map` if `loop`, and stand one after the other in the program if not.

  Under an ordinary `vmap` the convolutions of several models become one grouped convolution. On two CPU cores a
  training step of five small CNNs then takes three times as long, and ten times as long in `jax.lax.map`. Matrix
  products are faster in `jax.lax.map`: a step of five small transformers takes 0.72 of the time under `vmap`.
  """
  called = jax.custom_batching.custom_vmap(function)

  @called.def_vmap
  def _(size, batched, *arguments):
    leaves, structure = jax.tree.flatten(arguments)
    flags = structure.flatten_up_to(tuple(batched))

    def at(own: Any) -> Any:
      own = iter(own)
      return function(*structure.unflatten([next(own) if flag else leaf for leaf, flag in zip(leaves, flags)]))

    owned = [leaf for leaf, flag in zip(leaves, flags) if flag]
    results = jax.lax.map(at, owned) if loop else jax.tree.map(
        lambda *of_one: jnp.stack(of_one), *(at([leaf[i] for leaf in owned]) for i in range(size)))
    return results, jax.tree.map(lambda _: True, results)

  return called


@functools.partial(jax.jit, static_argnums=0)
def _sums(task: Task, outputs: Array, labels: Array, weight: Array) -> tuple[Array, Array]:
  """Returns the weighted sums of score and loss over one batch, `[2, seeds]`, and the sum of the weights."""
  means = lambda of_seed: jnp.stack([task.score(of_seed, labels, weight), task.loss(of_seed, labels, weight)])
  total = weight.sum()
  return jax.vmap(means, out_axes=1)(outputs) * total, total
