r"""Tests a search among random subnetworks: the best of 100 by initial loss against any one, equal sparsity, digits.

    python -m experiments.train --config experiments/configs/claims/random_search_vit_digits.py --workdir runs/search

The claim (Farahani 2024) is that the search is no better. "No better" can only be shown up to a margin, so the claim is
read as: the search gains less than one point of accuracy. Nodes are the hidden units of the feed-forward layers.

Measured on one of two shared CPU cores, jax 0.10.2, 10 seeds, 384 s of training in all. Not pruned: 96.89 +- 0.65 %
dense. Differences are paired by seed, with their 95 % intervals:

- random-75 > search-75 -1: 95.39 and 95.83 %, -0.44 +- 0.78, not reproduced.
- random-90 > search-90 -1: 95.11 and 95.28 %, -0.17 +- 0.70, reproduced.

The first run had 5 seeds and told nothing apart. These seeds and 5 more were then run.
"""

from experiments.configs import claims

MARGIN = 1.0  # points of accuracy


def get_config():
  config = claims.vit_digits(seeds=10, steps=400)
  methods = {'random': {'name': 'random_pruning'}, 'search': {'name': 'random_search', 'candidates': 100}}
  config.recipes.update(claims.at_sparsities(
      (75, 90), methods, pattern='channel', where=['mlp/fc1/kernel'], allocation='uniform'))
  return config


def get_sweep():
  return claims.tuned(1e-3, 2e-3, 4e-3)


CLAIM = claims.Claim(
    title='Random search',
    sentence='The best of many random subnetworks is no better than any one of them; here: it is better by less than '
    'one point of accuracy.',
    reference='Farahani 2024, random search in node space',
    comparisons=[claims.better(f'random-{percent}', f'search-{percent}', bar=-MARGIN) for percent in (75, 90)])
