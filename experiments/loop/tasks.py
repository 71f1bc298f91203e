"""What a model is trained for and what it is judged by: one loss, one score and their units for each task."""

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from sparsejax import errors

Array = jax.Array
Measure = Callable[[Array, Array, Array | None], Array]  # (outputs, labels, weight) -> the weighted mean, a scalar

FAINTEST = 1e-10  # mean squared error: a PSNR of at most 100 dB, so that a perfect image has a finite one


class Task(NamedTuple):
  """`score` is written as `name` in records and results; times `scale` it is in `unit`, and larger is better."""

  loss: Measure
  score: Measure
  name: str
  scale: float
  unit: str
  difference: str  # the unit of a difference of two scores
  loss_unit: str
  short: str  # a score in one word, as `str.format` does it


def cross_entropy(logits: Array, labels: Array, weight: Array | None = None) -> Array:
  """Mean softmax cross-entropy in nats of `logits` `[..., classes]` against `labels` `int[...]`, weighted."""
  return _mean(optax.softmax_cross_entropy_with_integer_labels(logits, labels), weight)


def accuracy(logits: Array, labels: Array, weight: Array | None = None) -> Array:
  """Fraction of `labels` that are the largest logit, weighted. Ties go to the lower class."""
  return _mean((logits.argmax(-1) == labels).astype(jnp.float32), weight)


def absolute_error(images: Array, targets: Array, weight: Array | None = None) -> Array:
  """Mean absolute error (L1) of `images` `[B, H, W, C]`, each image by its `weight` `[B]`."""
  return _mean(jnp.abs(images - targets).mean((1, 2, 3)), weight)


def psnr(images: Array, targets: Array, weight: Array | None = None) -> Array:
  """Peak signal-to-noise ratio in dB, 100 at most, of `images` `[B, H, W, C]` cut to [0, 1]: the images' mean."""
  squared = ((images.clip(0, 1) - targets)**2).mean((1, 2, 3))
  return _mean(-10 * jnp.log10(jnp.maximum(squared, FAINTEST)), weight)


TASKS: Mapping[str, Task] = {
    'classification': Task(cross_entropy, accuracy, 'accuracy', 100, '%', 'points of accuracy', 'nats', '{:.1%}'),
    'super_resolution': Task(absolute_error, psnr, 'psnr', 1, 'dB', 'dB of PSNR', 'the range of a pixel', '{:.2f} dB'),
}


def named(name: str) -> Task:
  """The task `name` of `TASKS`. Raises `ValueError` with the closest for one that is not there."""
  if name not in TASKS:
    raise errors.unknown('tasks.named', 'task', name, TASKS)
  return TASKS[name]


def _mean(values: Array, weight: Array | None) -> Array:
  """The weighted mean; 0 where all weights are 0, as in a batch of padding."""
  if weight is None:
    return values.mean()
  return (values * weight).sum() / jnp.maximum(weight.sum(), jnp.finfo(values.dtype).tiny)
