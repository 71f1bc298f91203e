"""Refuses labels and class probabilities that cannot be those of one classifier.

    refuse_labels('transfer.frequency_map', labels, classes=10)     # ValueError unless they are from 0 to 9
"""

import jax
import jax.numpy as jnp

from sparsejax.arguments import is_known


def refuse_predictions(function: str, probs: jax.Array, labels: jax.Array) -> None:
  """Raises `ValueError` unless the arguments are class probabilities `[examples, classes]` and their labels."""
  if probs.ndim != 2 or labels.shape != probs.shape[:1] or not len(probs):
    raise ValueError(f'{function}: probabilities {probs.shape} and labels {labels.shape}; give [examples, classes] and '
                     '[examples], at least one example.')
  if is_known(probs) and bool(jnp.any((probs < 0) | (probs > 1 + 1e-3)) |
                              jnp.any(jnp.abs(jnp.sum(probs, -1) - 1) > 1e-2)):
    raise ValueError(f'{function}: rows of probabilities do not sum to 1; give jax.nn.softmax(logits).')
  refuse_labels(function, labels, probs.shape[1])


def refuse_labels(function: str, labels: jax.Array, classes: int) -> None:
  """Raises `ValueError` unless labels are integers, and from 0 to `classes - 1` where they are known."""
  known = is_known(labels) and labels.size
  if not jnp.issubdtype(labels.dtype, jnp.integer) or (
      known and not 0 <= int(jnp.min(labels)) <= int(jnp.max(labels)) < classes):
    told = f' from {jnp.min(labels)} to {jnp.max(labels)}' if known else ''
    raise ValueError(f'{function}: labels of {labels.dtype}{told}; give integers from 0 to {classes - 1}.')
