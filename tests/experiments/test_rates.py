"""Tunes an engine that gives made-up outcomes: the best rate on the validation split, by the quality of the models."""

import numpy as np
import pictures
import pytest

from experiments import configs
from experiments.configs import claims
from experiments.loop import fitting
from experiments.sweep import rates

DATA = {'train': pictures.drawn(40, 0), 'test': pictures.drawn(20, 1)}


def made(seen):
  """Returns an engine whose run `a` is best at the rate 0.1 by score and quality, and `b` at 0.2 by quality alone."""
  def run(config, workdir, request):
    one = {name: configs.at_run(config, name).optimizer.learning_rate for name in config.recipes}
    seen.append((workdir.name, tuple(config.seeds), one, [len(labels) for _, labels in fitting.both_splits(config)]))
    quality = {'a': {0.1: 0.9, 0.2: 0.8}, 'b': {0.1: 0.5, 0.2: 0.6}}
    return {name: {'test': {'accuracy': [1 - rate]}, 'steps': 3, 'seeds': list(config.seeds),
                   **({'quality': [quality[name][rate]]} if name == 'b' else {})} for name, rate in one.items()}
  return run


def config():
  runs = {name: {'name': 'dense'} for name in 'ab'}
  return configs.complete({**claims.digits(steps=3).to_dict(), 'data': {**DATA}, 'recipes': runs})


def test_each_run_gets_its_best_rate_on_the_validation_split(tmp_path):
  seen = []
  found = rates.tuned(made(seen), config(), tmp_path, claims.tuned(0.1, 0.2), None)
  assert [each[:2] for each in seen] == [('rate-0.1', (1000, 1001)), ('rate-0.2', (1000, 1001)),
                                         (tmp_path.name, (0, 1, 2, 3, 4))]
  assert [each[3] for each in seen] == [[36, 4], [36, 4], [40, 20]]  # A tenth is for validation.
  assert seen[2][2] == {'a': 0.1, 'b': 0.2} and found['b']['tuning']['best'] == 0.2
  assert found['a']['tuning']['means'] == [0.9, 0.8] and found['b']['tuning']['means'] == [0.5, 0.6]


def test_without_a_grid_the_rate_is_that_of_the_config_and_rates_need_a_tuning(tmp_path):
  seen = []
  given = config()
  given.unlock().optimizer.learning_rate = 0.1
  rates.tuned(made(seen), given, tmp_path, {}, None)
  assert len(seen) == 1 and seen[0][2] == {'a': 0.1, 'b': 0.1}
  with pytest.raises(ValueError, match='give tuning'):
    rates.tuned(made(seen), given, tmp_path, {'learning_rate': [0.1, 0.2]}, None)
  given = configs.merged(given, {'data': {'train': (np.ones((4, 5, 5, 1)), np.arange(4)), 'test': DATA['test']}})
  with pytest.raises(ValueError, match='images of 64 pixels'):
    fitting.both_splits(given)
