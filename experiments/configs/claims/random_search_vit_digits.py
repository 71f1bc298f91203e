r"""Searching for a better random subnetwork: the best of 100 by initial loss against any one, equal sparsity, digits.

  python -m experiments.train --config experiments/configs/claims/random_search_vit_digits.py --workdir runs/search

The claim (Farahani 2024): the search is no better. Nodes are the hidden units of the feed-forward layers.

Measured on two shared CPU cores, jax 0.10.2, 5 seeds, 45 s of training in all, 95 % intervals of paired differences:
random-75 > search-75: 95.11 and 95.78 % (-0.67 +- 1.70, not reproduced); random-90 > search-90: 94.89 and 94.94 %
(-0.06 +- 1.34, not reproduced).
"""

from experiments.configs import claims


def get_config():
  config = claims.vit_digits(seeds=10, steps=400)
  shared = {'pattern': 'channel', 'where': ['mlp/fc1/kernel'], 'allocation': 'uniform'}
  methods = {'random': {'name': 'random_pruning'}, 'search': {'name': 'random_search', 'candidates': 100}}
  config.recipes = {'dense': {'name': 'dense'}}
  for percent in (75, 90):
    for name, method in methods.items():
      config.recipes[f'{name}-{percent}'] = {**method, **shared, 'sparsity': percent / 100}
  return config
