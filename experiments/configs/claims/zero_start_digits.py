r"""Tests ZerO: a perceptron that starts without chance, its accuracy and what 90 % magnitude pruning loses, digits.

    python -m experiments.claims --workdir runs/claims --only zero_start_digits

Zhao et al. 2021 (2110.12661): a start of zeros and ones, up to a Hadamard factor, trains as well as a random one. Its
solutions are of lower rank and sparser.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals,
and verdicts: ZerO > dense -1: +0.28 +- 1.29, not reproduced; ZerO-90 > dense-90: +2.11 +- 5.53, not reproduced.
`docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=600, learning_rate=2e-3)
  for run in ('ZerO', 'dense-90', 'ZerO-90'):
    config.recipes[run] = {'name': 'dense'}
  config.protocol = {'name': 'starts', 'runs': {
      'ZerO': {'start': 'zero'}, 'dense-90': {'pruned': 0.9}, 'ZerO-90': {'start': 'zero', 'pruned': 0.9}}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='ZerO',
    sentence='A start without chance is at most one point below a random one, and loses less by pruning 90 % once.',
    reference='Zhao et al. 2021, ZerO Initialization, 2110.12661',
    comparisons=[claims.better('ZerO', 'dense', bar=-1.0),
                 claims.better('ZerO-90', 'dense-90')])
