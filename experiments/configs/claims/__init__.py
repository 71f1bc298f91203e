"""Holds a config for each claim of a paper, the claim beside its config, and the words in which a claim is stated.

    CLAIM = claims.Claim('FreezeNet', 'Frozen weights are better than zeros.', 'Wimmer et al. 2020, 2011.14087',
                         [claims.better('FreezeNet', 'SNIP')])

The name of a claim is the name of the file.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from ml_collections import ConfigDict

from experiments.configs import default


class Scores(NamedTuple):
  """A `Scores` holds, by run name, a test score for each seed and how many sparse layers the run emptied in each seed.
  """

  unit: str  # of the test scores
  test: Mapping[str, Sequence[float]]
  empty: Mapping[str, Sequence[int]]


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

  `comparisons` are functions, because the scores exist only after the runs.
  """

  title: str
  sentence: str
  reference: str
  comparisons: Sequence[Callable[[Scores], Comparison]]


def better(more: str, less: str, bar: float = 0.0) -> Callable[[Scores], Comparison]:
  """Returns the function that compares two runs' test scores. `bar` is in the score's unit."""
  return lambda scores: Comparison(f'{more} > {less}', scores.unit, scores.test[more], scores.test[less], bar)


def emptier(more: str, less: str) -> Callable[[Scores], Comparison]:
  """Returns the function that compares the numbers of sparse layers that two runs left without any weight."""
  return lambda scores: Comparison(f'empty: {more} > {less}', 'layers', scores.empty[more], scores.empty[less])


def at_sparsities(percents: Sequence[int], methods: Mapping[str, Mapping], **shared: Any) -> dict[str, dict[str, Any]]:
  """Returns a recipe `<method>-<percent>` for each percentage and method, with `shared` as further arguments."""
  return {f'{name}-{percent}': {**method, **shared, 'sparsity': percent / 100}
          for percent in percents for name, method in methods.items()}


def vit_digits(seeds: int, steps: int, width: int = 32) -> ConfigDict:
  """Returns the config of the small vision transformer on digits, on which several claims are tested."""
  config = default.get_config()
  config.seeds = tuple(range(seeds))
  config.steps = steps
  config.batch_size = 32
  config.model = {'name': 'vit', 'patch': 2, 'width': width, 'depth': 2, 'heads': 4}
  config.optimizer.learning_rate = 2e-3
  return config
