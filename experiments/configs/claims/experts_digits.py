r"""Tests experts: rectified routing against dropped tokens, and a gate that begins dense, eight experts, digits.

    python -m experiments.claims --workdir runs/claims --only experts_digits

Zeng et al. 2024 (2402.12399, Rectify-Router) fill vacant slots and compute dropped tokens; Nie et al. 2021 (2112.14397)
begin with all experts. COMET's claim needs recommendation data, see `comet_films.py`.
The balance alone trains the gate of `top-1`, whose weight is 1. With `'gate': 'switch'` the task trains the gate, and
top-1 drops 62 % of the images: 40.7 +- 2.3 %, and rectified 96.5 +- 0.8 % (5 seeds, commit fce384bcfb69).

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals, and
verdicts: rectified > top-1: +7.67 +- 2.27, reproduced; dense-to-sparse > top-1: +5.56 +- 2.58, not reproduced.
`docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=600, learning_rate=3e-3)
  for run in ('top-1', 'rectified', 'dense-to-sparse', 'COMET'):
    config.recipes[run] = {'name': 'dense'}
  config.protocol = {'name': 'experts', 'runs': {
      'dense': {'gate': 'softmax'}, 'rectified': {'rectified': True}, 'dense-to-sparse': {'gate': 'dense_to_sparse'},
      'COMET': {'gate': 'comet'}}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='Experts',
    sentence='With slots for the even load alone, rectified routing is better than dropping, and a gate that begins '
    'dense is better than top-1 from the start.',
    reference='Zeng et al. 2024, Rectify-Router, 2402.12399; Nie et al. 2021, Dense-to-Sparse Gate, 2112.14397',
    comparisons=[claims.better('rectified', 'top-1'),
                 claims.better('dense-to-sparse', 'top-1')])
