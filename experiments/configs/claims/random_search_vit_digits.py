r"""Tests a search among random subnetworks: the best of 100 by initial loss against any one, equal sparsity, digits.

    python -m experiments.claims --workdir runs/claims --only random_search_vit_digits

The claim (Farahani 2024) is that the search is no better. "No better" can only be shown up to a margin, so the claim is
read as: the search gains less than one point of accuracy. Nodes are the hidden units of the feed-forward layers.

Measured on one CPU core (AMD EPYC), jax 0.10.2, 10 seeds, 74 s of training in all. Not pruned: 97.56 +- 0.54 % dense.
Differences are paired by seed, with their 95 % intervals, and p is adjusted for all of `docs/claims.md`:

- random-75 > search-75 -1: 97.22 and 95.75 %, +1.47 +- 0.85, p 0.0022, reproduced.
- random-90 > search-90 -1: 97.11 and 96.78 %, +0.33 +- 0.58, p 0.012, reproduced.
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
