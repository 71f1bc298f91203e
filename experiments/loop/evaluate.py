"""Predictions and scores of all seeds' parameters on a split, batch by batch: memory does not grow with the set."""

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
  """The outputs of `apply(params, inputs)` for all seeds at once, compiled once per shape."""
  return jax.jit(jax.vmap(apply, in_axes=(0, None)))


def scores(task: Task, predict: Predict, params: PyTree, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
  """The task's score by its name, and `loss`, `float64[seeds]` each, over every label of `batches` by its weight."""
  total, sums = 0.0, 0.0
  for batch in batches:
    of_batch, weight = sharding.whole(_sums(task, predict(params, batch['inputs']), batch['labels'], batch['weight']))
    sums += np.asarray(of_batch, np.float64)
    total += np.float64(weight)
  score, loss = sums / total
  return {task.name: score, 'loss': loss}


def same_predictions(predict: Predict, params: PyTree, others: PyTree, batches: Iterable[Batch]) -> bool:
  """Are the outputs of both parameters equal bit for bit on all of `batches`?"""
  same = jax.jit(lambda one, other: (_bits(one) == _bits(other)).all())
  alike = lambda inputs: same(predict(params, inputs), predict(others, inputs))
  return all(bool(sharding.whole(alike(batch['inputs']))) for batch in batches)


def one_by_one(function: Callable[..., Any]) -> Callable[..., Any]:
  """`function`, which `jax.vmap` calls for each index by itself, so that convolutions stay what they are.

  Under `vmap` the convolutions of several models become one grouped convolution. On two CPU cores a training step of
  five small CNNs takes three times as long so, and ten times in `jax.lax.map`.
  """
  called = jax.custom_batching.custom_vmap(function)

  @called.def_vmap
  def _(size, batched, *arguments):
    at = lambda i: jax.tree.map(lambda leaf, axis: leaf[i] if axis else leaf, arguments, tuple(batched))
    results = jax.tree.map(lambda *leaves: jnp.stack(leaves), *(function(*at(i)) for i in range(size)))
    return results, jax.tree.map(lambda _: True, results)

  return called


def _bits(outputs: Array) -> Array:
  return jax.lax.bitcast_convert_type(outputs, jnp.uint32)


@functools.partial(jax.jit, static_argnums=0)
def _sums(task: Task, outputs: Array, labels: Array, weight: Array) -> tuple[Array, Array]:
  """Over one batch: what the task's score and loss are the means of, summed, `[2, seeds]`; the weight."""
  means = lambda one: jnp.stack([task.score(one, labels, weight), task.loss(one, labels, weight)])
  total = weight.sum()
  return jax.vmap(means, out_axes=1)(outputs) * total, total
