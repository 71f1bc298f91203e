"""Predictions and scores of all seeds' parameters on a split, batch by batch: memory does not grow with the set."""

from collections.abc import Callable, Iterable

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from experiments import models, sharding
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
    of_batch, weight = sharding.whole(_sums(predict(params, batch['inputs']), batch['labels'], batch['weight']))
    sums += np.asarray(of_batch, np.float64)
    total += np.float64(weight)
  accuracy, loss = sums / total
  return {'accuracy': accuracy, 'loss': loss}


def same_predictions(predict: Predict, params: PyTree, others: PyTree, batches: Iterable[Batch]) -> bool:
  """Are the logits of both parameters equal bit for bit on all of `batches`?"""
  same = jax.jit(lambda one, other: (_bits(one) == _bits(other)).all())
  alike = lambda inputs: same(predict(params, inputs), predict(others, inputs))
  return all(bool(sharding.whole(alike(batch['inputs']))) for batch in batches)


def _bits(logits: Array) -> Array:
  return jax.lax.bitcast_convert_type(logits, jnp.uint32)


@jax.jit
def _sums(logits: Array, labels: Array, weight: Array) -> tuple[Array, Array]:
  """Over one batch: what `models.accuracy` and `models.loss` are the means of, summed, `[2, seeds]`; the weight."""
  means = lambda one: jnp.stack([models.accuracy(one, labels, weight), models.loss(one, labels, weight)])
  total = weight.sum()
  return jax.vmap(means, out_axes=1)(logits) * total, total
