r"""Tests COMET: trees that choose two of sixteen experts, with and without a local search, MovieLens-100K.

    python -m experiments.claims --workdir runs/claims --only comet_films

Ibrahim et al. 2023 (2306.02824): a gate of trees is better than hashing and top-k, and the search over permutations
helps it. `active` and `work` in `outcome.json` say how many experts a rating needs, and which part of the FLOPs of all
experts the compiled prediction has. The films need the package recbole, see `experiments.data.movielens`.
`gamma` and `entropy` were set to 1 before the seeds were run, because gamma 10 and entropy 0.1 left all sixteen experts
active after 200 steps (seed 0).

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals, and
verdicts: COMET-search > hash: +1.04 +- 0.42, not reproduced; COMET > top-2: +0.10 +- 0.24, not reproduced; COMET-search
> COMET: -0.05 +- 0.15, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=1000, learning_rate=3e-3, batch_size=256)
  config.data.name = 'films_rated'
  config.recipes = {name: {'name': 'dense'} for name in ('top-2', 'hash', 'COMET', 'COMET-search')}
  config.protocol = {'name': 'liked', 'runs': {
      'top-2': {'gate': 'top_k'}, 'hash': {'gate': 'hashed'}, 'COMET-search': {'searched': True}}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='COMET',
    sentence='The area under the curve of COMET is above that of top-2, and with the search above that of hashing '
    'and of COMET alone.',
    reference='Ibrahim et al. 2023, COMET, 2306.02824',
    comparisons=[claims.better('COMET-search', 'hash'), claims.better('COMET', 'top-2'),
                 claims.better('COMET-search', 'COMET')])
