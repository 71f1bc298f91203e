"""Compares two runs seed by seed: the difference, its interval, its p-value, and verdicts that hold all together.

    first = paired([2.09, 2.10, 2.08], [2.12, 2.14, 2.11])
    first.difference, first.half, first.p            # -0.033, 0.014, 0.010
    holm([first.p, 0.2])                             # [0.019, 0.2]
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from scipy import special

from experiments.tables import pages

LEVEL = 0.05  # the probability of any wrong verdict on a page
VERDICTS = ('better', 'worse', 'not told apart', 'not testable')


class Paired(NamedTuple):
  """A `Paired` is the mean of the differences of two runs over the seeds, half its 95 % interval, and the p-value.

  The interval and the two-sided p-value are those of Student's t; both are NaN for fewer than two seeds.
  """

  difference: float
  half: float
  p: float


def paired(first: Sequence[float], second: Sequence[float]) -> Paired:
  """Returns how `first` differs from `second`; both hold a number for each seed, in the order of the seeds."""
  differences = np.asarray(first, np.float64) - np.asarray(second, np.float64)
  mean, half = pages.interval(differences)
  count = len(differences)
  if count < 2:
    return Paired(mean, half, float('nan'))
  error = differences.std(ddof=1) / np.sqrt(count)
  if not error:  # All seeds differ by the same number, which is no chance unless the number is zero.
    return Paired(mean, half, float(mean == 0))
  return Paired(mean, half, float(2 * special.stdtr(count - 1, -abs(mean / error))))


def holm(values: Sequence[float]) -> list[float]:
  """Returns the p-values adjusted for all comparisons together (Holm 1979): all below `LEVEL` hold at once.

  The k-th smallest of n is multiplied by n - k + 1, is at least the adjusted value before, and at most 1. A NaN stays
  NaN and does not count among the n.
  """
  order = [i for i in np.argsort(values, kind='stable') if not np.isnan(values[i])]
  adjusted, largest = [float('nan')] * len(values), 0.0
  for rank, i in enumerate(order):
    largest = max(largest, min(1.0, (len(order) - rank) * values[i]))
    adjusted[i] = largest
  return adjusted


def verdict(difference: float, adjusted: float, lower_is_better: bool) -> str:
  """Returns which of `VERDICTS` the first of two runs deserves, by the adjusted p-value of their difference."""
  if np.isnan(adjusted):
    return 'not testable'
  if adjusted >= LEVEL:
    return 'not told apart'
  return 'better' if (difference < 0) == lower_is_better else 'worse'
