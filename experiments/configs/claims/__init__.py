"""Holds one config for each claim of a paper, with the claim beside it, and the words in which a claim is stated.

    CLAIM = claims.Claim('FreezeNet', 'Frozen weights are better than zeros.', 'Wimmer et al. 2020, 2011.14087',
                         lambda outcomes: [claims.better(outcomes, 'FreezeNet', 'SNIP')])

A claim is named by the file of its config.
"""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from ml_collections import ConfigDict

from experiments.configs import default
from experiments.loop import tasks
from experiments.loop.outcomes import Outcomes


class Comparison(NamedTuple):
  """A `Comparison` claims that `more` is larger than `less` by more than `bar`; both sides hold a number for each seed.
  """

  what: str
  unit: str  # of both sides and of `bar`
  more: Sequence[float]
  less: Sequence[float]
  bar: float = 0.0


class Claim(NamedTuple):
  """A `Claim` says what a paper claims, in a `sentence` of our own words, and which runs of the config test the claim.
  """

  title: str
  sentence: str
  reference: str
  comparisons: Callable[[Outcomes], list[Comparison]]


def better(outcomes: Outcomes, more: str, less: str, bar: float = 0.0) -> Comparison:
  """Returns the comparison of two runs' test scores. `bar` is in the score's unit."""
  task = tasks.named(outcomes[more]['task'])
  return Comparison(f'{more} > {less}', task.unit, scores(outcomes, more), scores(outcomes, less), bar)


def emptier(outcomes: Outcomes, more: str, less: str) -> Comparison:
  """Returns the comparison of the numbers of sparse layers that two runs left without any weight."""
  return Comparison(f'empty: {more} > {less}', 'layers', outcomes[more]['empty'], outcomes[less]['empty'])


def scores(outcomes: Outcomes, run: str) -> np.ndarray:
  """Returns the test scores of the run's seeds, in the score's unit."""
  task = tasks.named(outcomes[run]['task'])
  return task.scale * np.asarray(outcomes[run]['test'][task.name], np.float64)


def vit_digits(seeds: int, steps: int, width: int = 32) -> ConfigDict:
  """Returns the config of the small vision transformer on digits, on which several claims are tested."""
  config = default.get_config()
  config.seeds = tuple(range(seeds))
  config.steps = steps
  config.batch_size = 32
  config.model = {'name': 'vit', 'patch': 2, 'width': width, 'depth': 2, 'heads': 4}
  config.optimizer.learning_rate = 2e-3
  return config
