r"""Tests TEDDY: edges of the neighbour graph of the digits by degree score, at random, and reversed; 80 % of weights.

    python -m experiments.claims --workdir runs/claims --only edges_digits

Seo et al. 2024 (2402.01261) prune edges between nodes of high degree first, and weights by thresholding after each
step, with a distillation from the full graph. First trials without distillation showed no gain of the score over random
edges, so that this claim may fail.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals,
and verdicts: lowest-50 > random-50: +0.26 +- 0.16, not reproduced; lowest-50 > highest-50: +0.38 +- 0.42, not
reproduced; TEDDY-80 > once-80: +1.59 +- 1.52, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=100, learning_rate=0.01)
  for order in ('lowest', 'random', 'highest'):
    config.recipes[f'{order}-50'] = {'name': 'dense'}
  config.recipes['TEDDY-80'] = {'name': 'teddy', 'sparsity': 0.8}
  config.recipes['once-80'] = {'name': 'magnitude_at_init', 'sparsity': 0.8}
  runs = {f'{order}-50': {'order': order, 'pruned': 0.5} for order in ('lowest', 'random', 'highest')}
  config.protocol = {'name': 'edges', 'runs': runs}
  return config


def get_sweep():
  return claims.tuned(3e-3, 1e-2)


CLAIM = claims.Claim(
    title='TEDDY',
    sentence='Pruning edges by degree alone is better than at random and than in the opposite order, and thresholding '
    'all weights is better than pruning them once.',
    reference='Seo et al. 2024, TEDDY, 2402.01261',
    comparisons=[claims.better('lowest-50', 'random-50'),
                 claims.better('lowest-50', 'highest-50'),
                 claims.better('TEDDY-80', 'once-80')])
