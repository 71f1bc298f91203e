r"""Tests sparse unlearning: a tenth of the digits is forgotten by a dense and a 95 % sparse perceptron, and with l1.

    python -m experiments.claims --workdir runs/claims --only unlearning_digits

Jia et al. 2023 (2304.04934): the gap between unlearning and retraining is smaller for sparse models. The retrained
model has the same mask. A score is 1 minus the gap; the membership attack is a threshold and not a support vector
machine.

Measured on one of two shared CPU cores (AMD EPYC), jax 0.10.2, 5 seeds. Differences in points, with 95 % intervals,
and verdicts: sparse > dense: -28.63 +- 10.20, not reproduced; l1 > dense: -30.47 +- 7.73, the opposite.
`docs/claims_of_systems.md` has the rest.
"""

from experiments.configs import claims


def get_config():
  config = claims.digits(steps=300, learning_rate=2e-3)
  config.recipes['sparse'] = {'name': 'iterative_magnitude', 'sparsity': 0.95}
  config.recipes['l1'] = {'name': 'l1_sparse', 'sparsity': 0.95}
  config.protocol = {'name': 'forgetting', 'runs': {'l1': {'unlearn': 'l1'}}}
  return config


def get_sweep():
  return claims.tuned(1e-3, 3e-3)


CLAIM = claims.Claim(
    title='Sparse unlearning',
    sentence='Fine-tuning on the retained examples comes closer to retraining for a sparse model than for a dense one, '
    'with and without an l1 penalty.',
    reference='Jia et al. 2023, Model Sparsity Can Simplify Machine Unlearning, 2304.04934',
    comparisons=[claims.better('sparse', 'dense'), claims.better('l1', 'dense')])
