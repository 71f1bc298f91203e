"""Finds how sparse a trained model can be made before it gets worse: its essential sparsity.

    pruned = lambda sparsity: sj.prune_weights(params, sj.Unstructured(sparsity)).params
    found = essential_sparsity(pruned, accuracy, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9])
    found.sparsity, found.drop
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from sparsejax import arguments
from sparsejax.types import PyTree


class Essential(NamedTuple):
  """An `Essential` holds a sweep over sparsities and what it shows.

  `values`: the metric at each of `sparsities`; `dense`: the metric at sparsity 0. `sparsity`: the largest sparsity up
  to which the metric stays within the tolerance, 0 if none does. `drop`: the larger sparsity at which the fall of the
  metric grows most, or `None` if the sweep ends before.
  """

  sparsities: tuple[float, ...]
  values: tuple[float, ...]
  dense: float
  sparsity: float
  drop: float | None


@arguments.checked
def essential_sparsity(pruned: Callable[[float], PyTree], metric: Callable[[PyTree], float],
                       sparsities: Sequence[float], tolerance: float = 0.01) -> Essential:
  """Returns the essential sparsity of a model (Jaiswal et al. 2023, The Emergence of Essential Sparsity, 2306.03805).

  `pruned(sparsity)` returns the pruned parameters, and `metric(params)` a number of which more is better. The essential
  sparsity is the largest one such that the metric is at least `(1 - tolerance)` times the dense metric there and at all
  smaller ones. The paper reads the drop from a plot; here it is the largest second difference behind that sparsity.
  Raises `ValueError` unless `sparsities` increase from above 0, and for a metric that is not finite.
  """
  points = [arguments.verified('post_training.essential_sparsity', 'sparsity', s) for s in sparsities]
  if not points or any(a >= b for a, b in zip([0.0, *points], points)):
    raise ValueError(f'post_training.essential_sparsity: sparsities={points} must increase, from above 0.')
  dense, *values = (_finite(s, float(metric(pruned(s)))) for s in (0.0, *points))
  good = [value >= dense - tolerance * abs(dense) for value in values]
  last = good.index(False) if False in good else len(good)
  falls = [before - after for before, after in zip([dense, *values], values)]
  bends = {points[i]: falls[i] - (falls[i - 1] if i else 0.0) for i in range(last, len(points))}
  return Essential(tuple(points), tuple(values), dense, points[last - 1] if last else 0.0,
                   max(bends, key=bends.__getitem__) if bends else None)


def _finite(sparsity: float, value: float) -> float:
  if not math.isfinite(value):
    raise ValueError(f'post_training.essential_sparsity: the metric at sparsity {sparsity} is {value}; return a finite '
                     'number, of which more is better.')
  return value
