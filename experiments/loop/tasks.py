"""Defines the tasks that a model can be trained for: the loss, the score and the units of each.

    task = tasks.named('classification')
    task.loss(logits, labels, weight)   # scalar, in nats
    task.score(logits, labels, weight)  # scalar, the accuracy in [0, 1]
"""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict

from experiments import configs
from sparsejax.types import Array

Measure = Callable[[Array, Array, Array | None], Array]  # (outputs, labels, weight) -> the weighted mean, a scalar

SMALLEST_ERROR = 1e-10  # mean squared error; the PSNR is then at most 100 dB, and finite for a perfect image


class Task(NamedTuple):
  """A `Task` says what is minimised, `loss`, and what is reported, `score`, of which a larger value is better.

  Records and results contain the score as `name`. `score` times `scale` is in `unit`.
  """

  loss: Measure
  score: Measure
  name: str
  scale: float
  unit: str
  difference: str  # the unit of a difference of two scores
  loss_unit: str
  short: str  # the format string of a score in one word


def cross_entropy(logits: Array, labels: Array, weight: Array | None = None) -> Array:
  """Returns the weighted mean softmax cross-entropy of `logits` `[..., classes]`, in nats.

  `labels` `int[...]` are the classes, and `weight` `[...]` is the weight of each label, or `[B]` of each example.
  """
  return _mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), weight)


def accuracy(logits: Array, labels: Array, weight: Array | None = None) -> Array:
  """Returns the weighted fraction of `labels` `int[...]` that have the largest logit. Ties go to the lower class."""
  return _mean((logits.argmax(-1) == labels).astype(jnp.float32), weight)


def absolute_error(images: Array, targets: Array, weight: Array | None = None) -> Array:
  """Returns the mean absolute error (L1) of `images` `[B, H, W, C]`, weighted by `weight` `[B]` for each image."""
  return _mean(jnp.abs(images - targets).mean((1, 2, 3)), weight)


def psnr(images: Array, targets: Array, weight: Array | None = None) -> Array:
  """Returns the weighted mean over `images` `[B, H, W, C]` of the peak signal-to-noise ratio in dB, 100 at most.

  Pixels are clipped to [0, 1], the range of `targets`.
  """
  squared = ((images.clip(0, 1) - targets)**2).mean((1, 2, 3))
  return _mean(-10 * jnp.log10(jnp.maximum(squared, SMALLEST_ERROR)), weight)


def _never(outputs: Array, labels: Array, weight: Array | None = None) -> Array:
  raise ValueError(f"tasks: the task {configs.OWN!r} is trained by the config's own loss and score; give both.")


TASKS: Mapping[str, Task] = {
    'classification': Task(cross_entropy, accuracy, 'accuracy', 100, '%', 'points of accuracy', 'nats', '{:.1%}'),
    'super_resolution': Task(absolute_error, psnr, 'psnr', 1, 'dB', 'dB of PSNR', 'the range of a pixel', '{:.2f} dB'),
    configs.OWN: Task(_never, _never, 'score', 1, '', 'the score', 'units of the own loss', '{:.4f}'),
}


def named(name: str) -> Task:
  """Returns the task `name` of `TASKS`. Raises `ValueError` with the closest names for an unknown name."""
  configs.refuse_unknown('tasks.named', 'task', [name], TASKS)
  return TASKS[name]


def of_config(config: ConfigDict) -> tuple[str, Task]:
  """Returns the task that `config` trains for, and its name: `config.data.task`, with own `loss` and `score` if given.

  With an own score the name is `own`. Raises `ValueError` for a score without a loss of labels that are no classes.
  """
  name = config.data.task if config.score is None else configs.OWN
  task = named(name)
  loss = named(config.data.task).loss if config.loss is None else _own('loss', config.loss)
  return name, task._replace(loss=loss, score=task.score if config.score is None else _own('score', config.score))


def refuse_no_classes(labels: jax.ShapeDtypeStruct, least: int) -> None:
  """Raises `ValueError` if `labels`, of which `least` is the smallest, are no classes and have no accuracy."""
  remedy = 'a loss and a score of your own as config.loss and config.score.'
  if least < 0:
    raise ValueError(f'config: the smallest label is {least}, and classes begin at 0; give other labels, or {remedy}')
  if not jnp.issubdtype(labels.dtype, jnp.integer):
    raise ValueError(f'config: the labels are {labels.dtype}{list(labels.shape)}, which are no classes; give {remedy}')


def _own(key: str, function: Callable[[Array, Array], Array]) -> Measure:
  """Returns the measure of a function (outputs, labels) -> `[B]` or `[B, T]` that a config gives as `key`."""
  def measure(outputs: Array, labels: Array, weight: Array | None = None) -> Array:
    values = function(outputs, labels)
    if jnp.ndim(values) == 0 or len(values) != len(labels):
      raise ValueError(f'config: {key} returns shape {jnp.shape(values)} for {len(labels)} labels; it must return one '
                       'number for each example, because the last batch of a split is padded. Leave its mean out.')
    dtype = jnp.result_type(values)
    if key == 'loss' and not jnp.issubdtype(dtype, jnp.floating):
      raise ValueError(f'config: loss returns {dtype}, which has no gradient; return floating numbers.')
    values = values if jnp.issubdtype(dtype, jnp.floating) else values.astype(jnp.float32)
    if weight is not None and weight.shape != values.shape:  # A number an example beside a weight a label, or reverse.
      values, weight = (array.reshape(len(labels), -1).mean(1) for array in (values, weight))
    return _mean(values, weight)

  return measure


def _mean(values: Array, weight: Array | None) -> Array:
  """Returns the weighted mean, a scalar. If all weights are 0, as in a batch of padding, the mean is 0.

  The weight of an example is that of each of its labels.
  """
  if weight is None:
    return values.mean()
  weight = jnp.broadcast_to(weight.reshape(weight.shape + (1,) * (values.ndim - weight.ndim)), values.shape)
  return (values * weight).sum() / jnp.maximum(weight.sum(), jnp.finfo(values.dtype).tiny)
