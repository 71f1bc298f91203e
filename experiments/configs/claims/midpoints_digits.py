r"""Tests connected tickets: midpoints of retrainings of one ticket, and of independent tickets, at 80 %, digits.

    python -m experiments.claims --workdir runs/claims --only midpoints_digits

Sparse solutions that share a ticket lie in one basin, and independent ones do not (Frankle et al. 2020, 1912.05671).
The barriers and the sharpness of layers stand beside the scores (Adilova et al. 2024).

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals, and
verdicts: soup > independent: +32.39 +- 14.61, not reproduced. `docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=300, learning_rate=2e-3)
  for run in ('independent', 'soup'):
    config.recipes[run] = {'name': 'iterative_magnitude', 'sparsity': 0.8}
  config.protocol = {'name': 'midpoints', 'runs': {'independent': {'members': 'independent'}}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='Connected tickets',
    sentence='The midpoint of two retrainings of one ticket is better than that of two independent tickets.',
    reference='Frankle et al. 2020, Linear Mode Connectivity and the Lottery Ticket Hypothesis, 1912.05671',
    comparisons=[claims.better('soup', 'independent')])
