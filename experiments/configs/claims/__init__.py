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

  `unit` is that of the test scores, and `chance` is the score of the best constant prediction, `None` where unknown.
  `labels` is the number of test labels where the score is the percentage of them that is right, and else `None`.
  `quality` is the accuracy of a run's models where the test score is another number, such as a calibration.
  """

  unit: str
  test: Mapping[str, Sequence[float]]
  empty: Mapping[str, Sequence[int]]
  chance: float | None = None
  labels: int | None = None
  quality: Mapping[str, Sequence[float]] = {}


class Comparison(NamedTuple):
  """A `Comparison` claims that `more` is larger than `less` by more than `bar`; both sides hold a number for each seed.

  `trained` names the runs whose test scores the sides are, whose quality must be above chance level.
  """

  what: str
  unit: str  # of both sides and of `bar`
  more: Sequence[float]
  less: Sequence[float]
  bar: float = 0.0
  trained: Sequence[str] = ()


class Claim(NamedTuple):
  """A `Claim` says what a paper claims, in a `sentence` of our own words, and which runs of the config test the claim.

  `comparisons` are functions, because the scores exist only after the runs. Each of `needs` returns why these runs
  cannot test the claim, or `None`.
  """

  title: str
  sentence: str
  reference: str
  comparisons: Sequence[Callable[[Scores], Comparison]]
  needs: Sequence[Callable[[Scores], str | None]] = ()


def better(more: str, less: str, bar: float = 0.0, trains: bool = True) -> Callable[[Scores], Comparison]:
  """Returns the function that compares two runs' test scores. `bar` is in the score's unit.

  Two runs of which one is at chance level decide nothing, unless `trains` is false: the claim is then that one of the
  runs does not train.
  """
  return lambda scores: Comparison(f'{more} > {less}', scores.unit, scores.test[more], scores.test[less], bar,
                                   (more, less) if trains else ())


def at_share(more: str, less: str, share: float) -> Callable[[Scores], Comparison]:
  """Returns the function that compares one run's test scores with a share of another's, seed by seed."""
  return lambda scores: Comparison(f'{more} > {share:.0%} of {less}', scores.unit, scores.test[more],
                                   [share * score for score in scores.test[less]])


def at_least(run: str, score: float) -> Callable[[Scores], str | None]:
  """Returns the function that says that `run` does not reach `score`, a mean over the seeds in the score's unit."""
  def missed(scores: Scores) -> str | None:
    mean = sum(scores.test[run]) / len(scores.test[run])
    return None if mean >= score else f'{run} reaches {mean:.2f} {scores.unit}, below {score:g}'

  return missed


def emptier(more: str, less: str) -> Callable[[Scores], Comparison]:
  """Returns the function that compares the numbers of sparse layers that two runs left without any weight."""
  return lambda scores: Comparison(f'empty: {more} > {less}', 'layers', scores.empty[more], scores.empty[less])


def tuned(*rates: float, metric: str = 'accuracy') -> dict[str, Any]:
  """Returns the grid that tunes each run over the learning `rates`, on the validation split and two seeds of its own.

  Every run of a claim thus has the same budget.
  """
  return {'learning_rate': rates, 'tuning': {'seeds': (1000, 1001)}, 'metric': metric}


def at_sparsities(percents: Sequence[int], methods: Mapping[str, Mapping], **shared: Any) -> dict[str, dict[str, Any]]:
  """Returns a recipe `<method>-<percent>` for each percentage and method, with `shared` as further arguments."""
  return {f'{name}-{percent}': {**method, **shared, 'sparsity': percent / 100}
          for percent in percents for name, method in methods.items()}


def digits(steps: int, learning_rate: float = 1e-3, batch_size: int = 64, seeds: int = 5) -> ConfigDict:
  """Returns the config of a claim that is tested on digits, with a dense run."""
  config = default.get_config()
  config.seeds = tuple(range(seeds))
  config.steps = steps
  config.batch_size = batch_size
  config.optimizer.learning_rate = learning_rate
  return config


def vit_digits(seeds: int, steps: int, width: int = 32) -> ConfigDict:
  """Returns the config of the small vision transformer on digits, on which several claims are tested."""
  config = digits(steps, learning_rate=2e-3, batch_size=32, seeds=seeds)
  config.model = {'name': 'vit', 'patch': 2, 'width': width, 'depth': 2, 'heads': 4}
  return config


def mlp_mnist(seeds: int, steps: int, momentum: float | None = None) -> ConfigDict:
  """Returns the config of LeNet-300-100 on MNIST, on which claims about perceptrons are tested, with a dense run.

  With `momentum`, the optimizer is SGD.
  """
  config = digits(steps, seeds=seeds)
  config.data.name = 'mnist'
  config.model = {'name': 'mlp', 'widths': (300, 100)}
  if momentum is not None:
    config.optimizer = {**config.optimizer.to_dict(), 'name': 'sgd', 'options': {'momentum': momentum}}
  return config


def moving(percents: Sequence[int], where: Sequence[str]) -> dict[str, dict[str, Any]]:
  """Returns the recipes of a fixed random mask, of SET and of RigL, with the same sparsity in each layer (ERK)."""
  methods = {'static': {'name': 'static_sparse'}, 'SET': {'name': 'set_', 'every': 0.02},
             'RigL': {'name': 'rigl', 'every': 0.02}}
  return at_sparsities(percents, methods, where=where, allocation='erk')


def moving_is_better(percents: Sequence[int]) -> list[Callable[[Scores], Comparison]]:
  """Returns the comparisons of the recipes of `moving`: RigL above SET, and SET above the fixed mask."""
  return [better(f'{more}-{percent}', f'{less}-{percent}')
          for percent in percents for more, less in (('RigL', 'SET'), ('SET', 'static'))]
