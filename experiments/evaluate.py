"""Predictions and scores of all seeds' parameters on a split, batch by batch: memory does not grow with the set."""

from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import models
from experiments.data import Batch
from sparsejax.types import Array, PyTree

Predict = Callable[[PyTree, Array], Array]  # (params of all seeds, inputs) -> logits `[seeds, ...]`


def predictor(model: nn.Module) -> Predict:
  """The model's logits for all seeds at once, compiled once per shape."""
  apply = lambda params, inputs: model.apply({'params': params}, inputs)
  return jax.jit(jax.vmap(apply, in_axes=(0, None)))


def scores(predict: Predict, params: PyTree, batches: Iterable[Batch]) -> dict[str, np.ndarray]:
  """`accuracy` in [0, 1] and `loss` in nats, `float64[seeds]` each, over every label of `batches` by its weight."""
  total, sums = 0.0, 0.0
  for batch in batches:
    sums += np.asarray(_sums(predict(params, batch['inputs']), batch['labels'], batch['weight']), np.float64)
    total += batch['weight'].sum(dtype=np.float64)
  accuracy, loss = sums / total
  return {'accuracy': accuracy, 'loss': loss}


def same_predictions(predict: Predict, params: PyTree, others: PyTree, batches: Iterable[Batch]) -> bool:
  """Are the logits of both parameters equal bit for bit on all of `batches`?"""
  bits = lambda p, batch: np.asarray(predict(p, batch['inputs'])).tobytes()
  return all(bits(params, batch) == bits(others, batch) for batch in batches)


@jax.jit
def _sums(logits: Array, labels: Array, weight: Array) -> Array:
  """Sums over one batch of what `models.accuracy` and `models.loss` are the means of, `[2, seeds]`."""
  means = lambda one: jnp.stack([models.accuracy(one, labels, weight), models.loss(one, labels, weight)])
  return jax.vmap(means, out_axes=1)(logits) * weight.sum()
