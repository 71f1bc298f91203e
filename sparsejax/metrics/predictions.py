"""Measures predictions: calibration, the quality of recommendations, and what a sequence of tasks has left.

    calibration(jax.nn.softmax(logits), labels).ece
    recall_at(scores, seen, truth, 20)                  # items that a user has seen are not recommended
    forgetting(accuracies).backward_transfer            # accuracies[i, j]: of task j after training task i
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from sparsejax import arguments, labelled
from sparsejax.arguments import checked
from sparsejax.types import Array

__all__ = ['CalibrationError', 'Forgetting', 'calibration', 'forgetting', 'ndcg_at', 'recall_at']


class CalibrationError(NamedTuple):
  """A `CalibrationError` compares confidence and accuracy, in `float32`.

  `ece` is the expected calibration error and `mce` the largest gap of a bin. `confidence`, `accuracy` and the
  number of `examples`, `[bins]`, are those of each bin; an empty bin has zeros.
  """

  ece: Array
  mce: Array
  confidence: Array
  accuracy: Array
  examples: Array


@checked
def calibration(probs: Array, labels: Array, bins: int = 15) -> CalibrationError:
  """Returns the calibration error of class probabilities `[examples, classes]` (Guo et al. 2017, equation 3).

  The confidence of an example is its largest probability; of equal ones the first class is the prediction. Bins have
  equal widths and hold their upper ends. The error is the mean over examples of |accuracy - confidence| of their bin.
  `labels`: `int[examples]`. Raises `ValueError` for probabilities that are none, logits above all, and for labels of
  no class.
  """
  labelled.refuse_predictions('metrics.calibration', probs, labels)
  probs = probs.astype(jnp.float32)
  sure, right = jnp.max(probs, -1), (jnp.argmax(probs, -1) == labels).astype(jnp.float32)
  place = jnp.clip(jnp.ceil(sure * bins).astype(jnp.int32) - 1, 0, bins - 1)
  sums = lambda x: jax.ops.segment_sum(x, place, bins)
  count = sums(jnp.ones_like(sure))
  mean = lambda x: sums(x) / jnp.maximum(count, 1)
  gap = jnp.abs(mean(right) - mean(sure))
  return CalibrationError(jnp.sum(gap * count) / len(sure), jnp.max(gap), mean(sure), mean(right), count)


@checked
def recall_at(scores: Array, seen: Array, truth: Array, k: int) -> Array:
  """Returns the mean over users of the fraction of their `truth` among the `k` best items, `float32[]`.

  `scores`: `[users, items]`. `seen`: `bool[users, items]`, items of training, which are never recommended. `truth`:
  `bool[users, items]`. Ties go to the lower item, and NaN ranks last. Raises `ValueError` for a user without truth, for
  truth that was seen, and for a `k` beyond the items.
  """
  hits = _hits('recall_at', scores, seen, truth, k)
  return jnp.mean(jnp.sum(hits, -1) / jnp.sum(truth, -1, dtype=jnp.float32))


@checked
def ndcg_at(scores: Array, seen: Array, truth: Array, k: int) -> Array:
  """Returns the mean over users of the normalised discounted gain of the `k` best items, `float32[]`; see `recall_at`.

  A hit at rank r, from 1 on, gains 1 / log2(r + 1). The gain of a user is divided by that of hits at the first ranks,
  as many as the truth has items, at most `k` (Jarvelin and Kekalainen 2002, with gains of 0 and 1).
  """
  hits = _hits('ndcg_at', scores, seen, truth, k)
  gain = 1 / jnp.log2(jnp.arange(2, k + 2, dtype=jnp.float32))
  best = jnp.cumsum(gain)[jnp.minimum(jnp.sum(truth, -1, dtype=jnp.int32), k) - 1]
  return jnp.mean(hits @ gain / best)


def _hits(function: str, scores: Array, seen: Array, truth: Array, k: int) -> Array:
  """Returns whether the item at each of the first `k` ranks is of the truth, `float32[users, k]`."""
  if scores.ndim != 2 or not scores.shape == seen.shape == truth.shape or k > scores.shape[1] or (
      not len(scores)):
    raise ValueError(f'metrics.{function}: scores {scores.shape}, seen {seen.shape}, truth {truth.shape} and k={k}; '
                     'give three arrays [users, items] of at least one user, and a k of at most the items.')
  if arguments.is_known(truth) and arguments.is_known(seen):
    empty = np.flatnonzero(~np.any(np.asarray(truth, bool), 1))
    if len(empty):
      users = ', '.join(str(int(user)) for user in empty[:5])
      raise ValueError(f'metrics.{function}: {len(empty)} users have no item in `truth`: {users}. Leave their rows out '
                       'of all three arrays.')
    if bool(jnp.any(truth.astype(bool) & seen.astype(bool))):
      raise ValueError(f'metrics.{function}: an item is in `truth` and in `seen`, so that it is never recommended; '
                       'take it out of one of them.')
  ranked = jnp.where(seen.astype(bool), -jnp.inf, jnp.where(jnp.isnan(scores), -jnp.inf, scores))
  _, best = jax.lax.top_k(ranked, k)
  shown = jnp.take_along_axis(~seen.astype(bool), best, -1)
  return (jnp.take_along_axis(truth.astype(bool), best, -1) & shown).astype(jnp.float32)


class Forgetting(NamedTuple):
  """A `Forgetting` says what a sequence of tasks has left, in `float32[]`.

  `accuracy`: the mean over tasks after the last one. `forgetting`: the mean over all tasks but the last of the best
  accuracy before the last task minus that after it. `backward_transfer`: the mean over the same tasks of the last
  accuracy minus that right after the task. Both are 0 if there is one task.
  """

  accuracy: Array
  forgetting: Array
  backward_transfer: Array


@checked
def forgetting(matrix: Array) -> Forgetting:
  """Returns the `Forgetting` of accuracies `[tasks, tasks]`; entry `[i, j]` is that of task j after training task i.

  Entries above the diagonal, of tasks that are not trained yet, are not read (Lopez-Paz and Ranzato 2017, equation 3;
  Chaudhry et al. 2018 for forgetting). Raises `ValueError` for a matrix that is not square.
  """
  if matrix.ndim != 2 or matrix.shape[0] != matrix.shape[1] or not len(matrix):
    raise ValueError(f'metrics.forgetting: accuracies of shape {matrix.shape}; give a square matrix, one row for each '
                     'trained task.')
  tasks = len(matrix)
  trained = jnp.arange(tasks)[:, None] >= jnp.arange(tasks)[None]
  best = jnp.max(jnp.where(trained, matrix, -jnp.inf)[:max(tasks - 1, 1)], 0)
  mean: Any = lambda x: jnp.sum(x[:tasks - 1]) / max(tasks - 1, 1)
  last = matrix[-1]
  return Forgetting(jnp.mean(last), mean(best - last), mean(last - jnp.diagonal(matrix)))
